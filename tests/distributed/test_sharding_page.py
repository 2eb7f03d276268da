"""The examples of docs/sharding.md run as they stand there; the shorter ones, marked `excerpt`, do not."""

from __future__ import annotations

from pathlib import Path

import pytest

from ..pages import blocks

BLOCKS = blocks("docs/sharding.md")


def printed_by(word: str, tmp_path: Path) -> str:
    """What the example that has `word` in it prints, on two ranks if it is for ranks."""
    return next(block for block in BLOCKS if word in block.code and block.kind != "excerpt").run(tmp_path)


@pytest.mark.parametrize(
    ("word", "says"),
    [
        ("newton_schulz", "whole"),
        ("opt.synchronize()", "rank 1: "),
        ("fully_shard", "steps (33, 8) of (65, 8)"),
        ("Lamb(params)", "1 1"),
    ],
    ids=["Muon", "a step", "fully_shard", "plan"],
)
def test_example(word: str, says: str, tmp_path: Path) -> None:
    assert says in printed_by(word, tmp_path)


def test_all_examples_are_run_here() -> None:
    assert sorted(block.kind for block in BLOCKS) == ["", "", *["excerpt"] * 4, "torchrun", "torchrun"]
