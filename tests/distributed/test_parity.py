"""A sharded optimizer equals the same optimizer in one process that is given the averaged gradients.

Every optimizer x stage x 1 to 4 ranks x one group, or three with their own hypers and a freeze schedule: each pair of
these, as an optimizer runs in one stage with one group and in the other with three. Chains of elementwise cbs and
whole parameters: bit for bit. Norms of whole parameters (LARC, LAMB) are sums in another order: within some units in
the last place.
"""

from __future__ import annotations

import pytest

from fastopt.distributed import shard

from .problems import ELEMENTWISE, EVERY, Model, assert_same_run, feed, set_average

FREEZE_TO = (2, 2, 1, 1, 0, -1, 0, 0)
"""Which group is the first to train, per step: gradual unfreezing, and back once."""


def run_matrix(rank: int, world_size: int, split: bool) -> int:
    """Every optimizer in one of the stages; in three groups with a schedule, or in one."""
    for number, (name, build) in enumerate(EVERY.items()):
        stage = 1 + (number + world_size + split) % 2
        bucket_bytes = 100 if (number // 2) % 2 else 2**20
        what = f"{name}, stage {stage}, {world_size} ranks, buckets of {bucket_bytes}"
        model, reference = Model(), Model()
        sharded = shard(build(model.param_groups(split)), model, stage=stage, bucket_bytes=bucket_bytes)
        plain = build(reference.param_groups(split))
        for step, first in enumerate(FREEZE_TO):
            for opt in (sharded, plain):
                if split:
                    opt.freeze_to(first)
                opt.set_hyper("lr", slice(0.01, 0.1 / (step + 1)) if split else 0.1 / (step + 1))
            feed(sharded, stage, step, rank, world_size)
            set_average(plain, step, world_size)
            sharded.step()
            plain.step()
            for opt in (sharded, plain):
                opt.zero_grad(set_to_none=True)
        assert_same_run(sharded, plain, what, exact=name in ELEMENTWISE)
    return len(EVERY)


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("split", [False, True], ids=["one-group", "three-groups-and-freezing"])
def test_every_optimizer(ranks, world_size: int, split: bool) -> None:
    assert ranks(world_size).run(run_matrix, split, timeout=120) == [len(EVERY)] * world_size


def test_without_a_process_group() -> None:
    assert run_matrix(0, 1, True) == len(EVERY)
