"""A limit of the system that one rank meets while it writes: for real, not by a stand-in."""

from __future__ import annotations

import resource
from collections.abc import Callable
from pathlib import Path

import pytest

from fastopt.checkpoint import CheckpointError, load, save

from ..ranks import RankPool
from .torture import check, fill, job, wrong


def save_with_a_limit(rank: int, world: int, root: str) -> str:
    """Step 1 comes through; step 2 does not, since the last rank may write no file of more than 100 kB."""
    model, opt = job(sharded=True)
    fill(model, opt, 1)
    save(root, step=1, model=model, opt=opt, extra=1)
    fill(model, opt, 2)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if rank == world - 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(CheckpointError) as caught:
            save(root, step=2, model=model, opt=opt, extra=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not wrong(model, opt, 2)
    load(root, model=model, opt=opt)
    assert not wrong(model, opt, 1)
    fill(model, opt, 3)
    save(root, step=3, model=model, opt=opt, extra=3)
    return str(caught.value)


def test_a_file_that_one_rank_cannot_write_is_an_error_on_all(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    texts = ranks(3).run(save_with_a_limit, str(tmp_path), timeout=60)
    assert len(set(texts)) == 1
    assert "rank 2: OSError while writing the checkpoint: [Errno 27] File too large" in texts[0]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["step-00000001", "step-00000003"]
    assert check(str(tmp_path), 3, 3) == 3
