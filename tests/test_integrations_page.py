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
        run |= set(re.findall(r'(?:blocks|examples)\("docs/integrations.md", "(.*?)"\)', file.read_text()))
    assert sections == run


def test_the_tests_that_it_names_are_there() -> None:
    text = (ROOT / PAGE).read_text()
    there = {path: path.read_text() for path in (ROOT / "tests").rglob("test_*.py")}
    for path in re.findall(r"`(tests/[\w/]+\.py)`", text):
        assert ROOT / path in there, path
    for name in re.findall(r"`(test_\w+)`", text):
        assert any(f"def {name}(" in each for each in there.values()), name
