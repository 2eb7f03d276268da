"""kill -9 at random moments of a save: what was there before loads, or the new one, never a mix.

A bounded number; `scripts/torture_checkpoint.py` runs as many as you like.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fastopt.checkpoint import CheckpointError, load, save

from .s3_server import BUCKET, S3Server
from .torture import check, fill, job, kill_rounds, wrong


def test_ranks_killed_at_random_moments(tmp_path: Path) -> None:
    tally = kill_rounds(str(tmp_path / "run"), rounds=12, seed=3)
    assert tally.rounds == 12
    assert tally.outcomes["the one before is there"] > 0


def test_ranks_killed_at_random_moments_on_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    with S3Server() as server:
        for name, value in server.env.items():
            monkeypatch.setenv(name, value)
        assert kill_rounds(f"s3://{BUCKET}/run", rounds=3, seed=1, env=server.env).rounds == 3


def test_the_check_finds_a_mix(tmp_path: Path) -> None:
    model, opt = job(sharded=False)
    fill(model, opt, 1)
    save(tmp_path, step=1, model=model, opt=opt, extra=1)
    assert check(str(tmp_path), 1, 1) == 1
    with pytest.raises(AssertionError, match="expected 2 to 3"):
        check(str(tmp_path), 2, 3)
    with torch.no_grad():
        next(iter(opt.state.values()))["grad_avg"][0] = 2
    assert wrong(model, opt, 1) == ["state 0"]
    save(tmp_path, step=2, model=model, opt=opt, extra=2)
    with pytest.raises(AssertionError, match="a mix"):
        check(str(tmp_path), 2, 2)
    with pytest.raises(CheckpointError):
        load(tmp_path / "none", model=model)
