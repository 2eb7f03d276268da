"""A rank that does not come is named, with the collective that the others wait in."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastopt
from fastopt.distributed import RanksMissing, shard
from fastopt.distributed.communication import watch
from fastopt.distributed.communication.watch import Watch


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))


def one_stays_away(rank: int, world_size: int) -> list[str]:
    """Rank 1 does not step; the others are told before the process group gives up, and when it does."""
    records: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: records.append(record.getMessage())  # type: ignore[method-assign]
    logging.getLogger("fastopt.distributed").addHandler(handler)
    group = dist.new_group(timeout=timedelta(seconds=4))
    model = network()
    opt = shard(fastopt.SGD(model.parameters(), lr=0.1), model, group=group, bucket_bytes=64)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(watch, "PATIENCE", 0.5)
        model(torch.ones(1, 4)).sum().backward()
        opt.step()
        opt.synchronize()
        time.sleep(1.5 * watch.INTERVAL)
        if rank == 1:
            time.sleep(7)
            return records
        with pytest.raises(RanksMissing) as caught:
            model(torch.ones(1, 4)).sum().backward()
        opt.zero_grad()  # waits for nobody any more
    return [*records, str(caught.value)]


def test_the_rank_that_did_not_come_is_named_with_bucket_and_collective(ranks: Any) -> None:
    told = ranks(2).run(one_stays_away)
    assert told[1] == []
    assert len(told[0]) == 2
    for text in told[0]:
        assert "rank 0 waits in reduce bucket 1 (1.weight .. 1.weight) for rank 1 " in text
        assert "last seen in gather bucket 1 (1.weight .. 1.weight), 1 collectives behind" in text
    assert "since" in told[0][0]


def test_counts_are_compared_through_the_store() -> None:
    store = dist.HashStore()
    here, there, slow = (Watch(rank, 3, store) for rank in range(3))
    for each in (here, there, slow):
        each.began("gather bucket 0")
        each.look()
    for each in (here, there):
        each.began("reduce bucket 4")
        each.look()
    told = here.describe("reduce bucket 4")
    assert told == ("rank 0 waits in reduce bucket 4 for rank 2 (last seen in gather bucket 0, 1 collectives behind)")
    slow.began("reduce bucket 4")
    slow.look()
    assert here.describe("reduce bucket 4").endswith("for ranks that have all begun it")
    for each, label in ((here, "a sum of norms"), (there, "gather bucket 0")):
        each.began(label)
        each.look()
    assert "rank 1 (which has begun gather bucket 0 where this rank has begun a sum of norms)" in here.describe("a sum")
    with pytest.raises(RanksMissing, match="rank 1 waits in reduce bucket 4"), there.waiting("reduce bucket 4"):
        raise RuntimeError("timed out")
