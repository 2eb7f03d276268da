"""Hybrid sharding over NCCL, and with copies inside of a shard group: one of both on two GPUs, two by two on four."""

from __future__ import annotations

from typing import Any, Literal

import pytest
import torch

from fastopt.distributed import shard

from ..distributed.problems import EVERY, NORM, Model, assert_same_run, feed, set_average
from .nccl import nccl_mesh

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def hybrid(rank: int, world_size: int, shape: tuple[int, int], transport: Literal["copy"] | None) -> None:
    mesh = nccl_mesh(rank, shape, ("replicate", "shard"))
    for name in ("adam", "lamb", "ranger", "adamw"):
        for stage in (1, 2):
            model, reference = Model().cuda(), Model().cuda()
            how: dict[str, Any] = {"stage": stage, "transport": transport, "bucket_bytes": 100}
            opt = shard(EVERY[name](model.param_groups()), model, group=mesh, **how)
            plain = EVERY[name](reference.param_groups())
            for step, first in enumerate((0, 1, 2, 0)):
                for each in (opt, plain):
                    each.freeze_to(first)
                feed(opt, stage, step, rank, world_size)
                set_average(plain, step, world_size)
                for each in (opt, plain):
                    each.step()
                    each.zero_grad(set_to_none=True)
            assert_same_run(opt, plain, f"{name}, {how}, mesh {shape}", exact=name not in NORM)


@pytest.mark.parametrize("transport", [None, "copy"])
@pytest.mark.parametrize("shape", [(2, 1), (1, 2), (2, 2)], ids=str)
def test_hybrid_sharding_equals_one_process(ranks: Any, shape: tuple[int, int], transport: str | None) -> None:
    world_size = shape[0] * shape[1]
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA devices")
    ranks(world_size).run(hybrid, shape, transport, timeout=200)
