"""The examples of docs/sharding.md run as they stand there; the shorter ones, marked `excerpt`, do not."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from ..commands import ROOT, run_command
from ..test_readme import _BLOCK, on_ranks

BLOCKS = [(m["kind"].strip(), m["code"]) for m in _BLOCK.finditer((ROOT / "docs" / "sharding.md").read_text())]


def printed_by(word: str, tmp_path: Path) -> str:
    """What the example that has `word` in it prints, on two ranks if it is for ranks."""
    kind, code = next((kind, code) for kind, code in BLOCKS if word in code and kind != "excerpt")
    if kind == "torchrun":
        return on_ranks(code, 2, tmp_path)
    (tmp_path / "example.py").write_text(code)
    return run_command(sys.executable, tmp_path / "example.py", cwd=tmp_path).stdout


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
    assert sorted(kind for kind, _ in BLOCKS) == ["", "", "excerpt", "excerpt", "torchrun", "torchrun"]
