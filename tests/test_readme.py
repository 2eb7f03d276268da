"""Every code block of the README and of the guide to checkpoints runs as it stands there and prints what they claim."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from .checkpoint.s3_server import BUCKET, S3Server
from .pages import Block, blocks, on_ranks, under_torchrun

BLOCKS = blocks("README.md")
ALONE = [block for block in BLOCKS if block.kind == ""]
ON_RANKS = [block.code for block in BLOCKS if block.kind == "torchrun"]
GUIDE = [block.code for block in blocks("docs/checkpoints.md")]


def test_the_readme_has_the_blocks_that_are_run_here() -> None:
    assert (len(ALONE), len(ON_RANKS)) == (3, 2)
    assert len(BLOCKS) == 5


@pytest.mark.parametrize("block", ALONE, ids=["optimizer", "own callbacks", "engine"])
def test_single_process(block: Block, tmp_path: Path) -> None:
    assert ("executor" if "opt.engine" in block.code else "lr") in block.run(tmp_path)


def test_many_ranks(tmp_path: Path) -> None:
    printed = under_torchrun(ON_RANKS[0], 2, tmp_path)
    two_averages = (8 * 64 + 64 + 64 + 1) * 2 * 4  # bytes in float32
    per_rank = [int(n) for n in re.findall(r"rank \d holds (\d+) bytes", printed)]
    assert len(per_rank) == 2, printed
    assert sum(per_rank) == two_averages
    assert max(per_rank) < 1.05 * two_averages / 2


def test_save_and_resume_on_another_number_of_ranks(tmp_path: Path) -> None:
    code = ON_RANKS[1].replace("URL", repr(str(tmp_path / "run")))
    for ranks, steps in [(2, "1 to 10"), (3, "11 to 20"), (1, "21 to 30")]:
        printed = on_ranks(code, ranks, tmp_path)
        assert [f"rank {r} of {ranks}: steps {steps}" in printed for r in range(ranks)] == [True] * ranks, printed


def test_save_and_resume_on_s3(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        code = ON_RANKS[1].replace("URL", repr(f"s3://{BUCKET}/run"))
        for ranks, steps in [(2, "1 to 10"), (1, "11 to 20")]:
            printed = on_ranks(code, ranks, tmp_path)
            assert f"rank 0 of {ranks}: steps {steps}" in printed, printed


def test_the_guide_saves_in_the_background_and_resumes(tmp_path: Path) -> None:
    (code,) = GUIDE
    code = code.replace("URL", repr(str(tmp_path / "run")))
    for ranks, steps in [(2, "1 to 10"), (1, "11 to 20")]:
        assert f"rank 0: steps {steps}" in on_ranks(code, ranks, tmp_path)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [f"step-000000{n}" for n in (10, 15, 20)]
