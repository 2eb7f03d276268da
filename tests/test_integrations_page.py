"""docs/integrations.md: the examples for plain PyTorch run here, those of other sections in files of tests/clients."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .commands import ROOT
from .pages import Block, blocks

PAGE = "docs/integrations.md"
HERE = "PyTorch"


@pytest.mark.parametrize("block", blocks(PAGE, HERE), ids=Block.title)
def test_example(block: Block, tmp_path: Path) -> None:
    block.run_here(tmp_path)


def test_every_section_has_its_examples_run() -> None:
    sections = {block.section for block in blocks(PAGE)} - {HERE}
    run = set()
    for file in (ROOT / "tests" / "clients").glob("test_*.py"):
        run |= set(re.findall(r'blocks\("docs/integrations.md", "(.*?)"\)', file.read_text()))
    assert sections == run


def test_the_tests_that_it_names_are_there() -> None:
    for path, name in re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", (ROOT / PAGE).read_text()):
        text = (ROOT / path).read_text()
        assert f"def {name}" in text or f"class {name}" in text or not name, f"{path}::{name}"
