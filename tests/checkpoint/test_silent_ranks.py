"""A rank that does not come: stopped in the middle of a save, or never called."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from fastopt.checkpoint import CheckpointError, latest, load, save
from fastopt.checkpoint.io import storage

from ..ranks import RankPool
from .jobs import Small

Ranks = Callable[[int], RankPool]


def stopped(rank: int, world: int, root: str) -> str:
    """Rank 1 is stopped, as by a debugger or a machine that swaps, until rank 0 has its error; the error."""
    group = dist.new_group(range(world), timeout=timedelta(seconds=1.5))
    pids: list[Any] = [None] * world
    dist.all_gather_object(pids, os.getpid())
    save(root, step=1, model=Small(1), group=group)
    write, once = storage.write, [signal.SIGSTOP]

    def stops(*args: Any) -> None:
        with contextlib.suppress(IndexError):  # two threads write
            os.kill(os.getpid(), once.pop())
        write(*args)

    if rank == 1:
        storage.write = stops
    try:
        with pytest.raises(CheckpointError) as caught:
            save(root, step=2, model=Small(2), group=group)
    finally:
        storage.write = write
        os.kill(pids[1], signal.SIGCONT)
    dist.barrier()
    model = Small()
    assert load(root, model=model).step == 1
    save(root, step=2, model=Small(2))
    return str(caught.value)


def test_a_rank_that_is_stopped_is_an_error_on_all(ranks: Ranks, tmp_path: Path) -> None:
    texts = ranks(2).run(stopped, str(tmp_path))
    for number, text in enumerate(texts):
        assert f"rank {number} lost touch with the others while writing the checkpoint" in text
    assert latest(tmp_path).step == 2  # type: ignore[union-attr]


def alone(rank: int, world: int, root: str) -> str:
    """Only rank 0 saves."""
    group = dist.new_group(range(world), timeout=timedelta(seconds=1))
    text = ""
    if rank == 0:
        with pytest.raises(CheckpointError) as caught:
            save(root, step=1, model=Small(), group=group)
        text = str(caught.value)
    dist.barrier()
    return text


def test_a_save_that_not_all_ranks_call_says_so(ranks: Ranks, tmp_path: Path) -> None:
    text = ranks(2).run(alone, str(tmp_path))[0]
    assert "lost touch with the others while gathering what to save" in text
    assert "every rank must call" in text
    assert not list(tmp_path.iterdir())
