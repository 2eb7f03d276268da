"""Hybrid sharding over NCCL: copies only on two GPUs, two copies of two shards on four."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fastopt.distributed import shard

from ..distributed.problems import EVERY, NORM, Model, assert_same_run, feed, set_average
from .nccl import nccl_mesh

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def hybrid(rank: int, world_size: int, shape: tuple[int, int]) -> None:
    mesh = nccl_mesh(rank, shape, ("replicate", "shard"))
    for name in ("adam", "lamb", "ranger", "adamw"):
        for stage in (1, 2):
            model, reference = Model().cuda(), Model().cuda()
            opt = shard(EVERY[name](model.param_groups()), model, stage=stage, group=mesh, bucket_bytes=100)
            plain = EVERY[name](reference.param_groups())
            for step, first in enumerate((0, 1, 2, 0)):
                for each in (opt, plain):
                    each.freeze_to(first)
                feed(opt, stage, step, rank, world_size)
                set_average(plain, step, world_size)
                for each in (opt, plain):
                    each.step()
                    each.zero_grad(set_to_none=True)
            assert_same_run(opt, plain, f"{name}, stage {stage}, mesh {shape}", exact=name not in NORM)


@pytest.mark.parametrize("shape", [(2, 1), (2, 2)], ids=str)
def test_hybrid_sharding_equals_one_process(ranks: Any, shape: tuple[int, int]) -> None:
    world_size = shape[0] * shape[1]
    if torch.cuda.device_count() < world_size:
        pytest.skip(f"needs {world_size} CUDA devices")
    ranks(world_size).run(hybrid, shape, timeout=200)
