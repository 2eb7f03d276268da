"""What becomes of the blocks of a page when it is built."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from ..commands import ROOT

sys.path.append(str(ROOT / "scripts"))

from pages.blocks import BlockFailed, run_page, with_examples


def run(text: str, folder: Path) -> Any:
    return run_page(folder / "page.md", text)


def test_blocks_share_names_and_show_their_output(tmp_path: Path) -> None:
    page = run("a\n\n```python\nx = 2\n```\n\nb\n\n```python\nprint(x + 1)\n```\n\nc\n", tmp_path)
    assert page.text == (
        "a\n\n```python\nx = 2\n```\n\nb\n\n```python\nprint(x + 1)\n```\n\n```{ .text .output }\n3\n```\n\nc\n"
    )


def test_kinds(tmp_path: Path) -> None:
    page = run("```python excerpt\n1 / 0\n```\n\n```python hidden\nprint('seen')\n```\n", tmp_path)
    assert "1 / 0" in page.text
    assert "seen" in page.text
    assert "print" not in page.text
    page = run("```python folded\nprint(1)\n```\n\n```python markdown\nprint('**2**')\n```\n", tmp_path)
    assert page.text.index("1\n```") < page.text.index("    ```python\n    print(1)")
    assert "\n**2**\n" in page.text


def test_figures_become_pictures_with_a_text(tmp_path: Path) -> None:
    draw = "from matplotlib import pyplot\npyplot.figure('a line')\npyplot.plot([1, 2])\n"
    page = run(f"```python\n{draw}```\n", tmp_path)
    assert page.text.endswith("![a line](made/page-1.svg)\n")
    assert list(page.pictures) == ["page-1.svg"]
    assert run(f"```python\n{draw}```\n", tmp_path).pictures == page.pictures  # the same bytes
    with pytest.raises(BlockFailed, match=r"page.md, the block at line 1: a figure without a label"):
        run(f"```python\n{draw.replace(repr('a line'), '')}```\n", tmp_path)


def test_every_page_begins_alike(tmp_path: Path) -> None:
    text = "```python\nimport os, torch\nprint(torch.rand(3), os.getcwd())\n```\n"
    assert run(text, tmp_path).text == run(text, tmp_path).text
    assert str(tmp_path) in run(text, tmp_path).text


def test_an_error_names_page_and_line(tmp_path: Path) -> None:
    with pytest.raises(BlockFailed, match=r"page.md, the block at line 3: ZeroDivisionError: division by zero"):
        run("a\n\n```python\n1 / 0\n```\n", tmp_path)
    with pytest.raises(BlockFailed, match=r"page.md, line 1: a block `python odd`, expected one of folded, "):
        run("```python odd\n```\n", tmp_path)


def test_a_line_that_is_a_link_to_an_example_becomes_its_code(tmp_path: Path) -> None:
    (tmp_path / "it.py").write_text("x = 1\n")
    text = with_examples(tmp_path / "page.md", "See [it](it.py).\n\n[it.py](it.py)\n")
    assert text.startswith('See [it](it.py).\n\n```{ .python title="it.py" }\nx = 1\n```\n\n[Download](it.py)')
