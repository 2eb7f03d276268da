"""Buckets moved by copies between two GPUs: the same bits as over NCCL, and no kernel of NCCL in an iteration."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import fastopt
from fastopt.distributed import shard

from .test_overlap import on_gpus, stack

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

OPTIONS: dict[str, dict[str, Any]] = {
    "one group": {},
    "stepping in backward": {"step_in_backward": True},
    "float32 sums": {"reduce_dtype": torch.float32},
}


def split(model: nn.Sequential, several: bool) -> Any:
    """All parameters, or groups of three layers, so that buckets are mixed."""
    params = list(model.parameters())
    return [params[i : i + 3] for i in range(0, len(params), 3)] if several else params


def train(rank: int, group: Any, transport: str | None, several: bool, options: dict[str, Any]) -> list[torch.Tensor]:
    model = stack(256, 9)
    opt = fastopt.Adam(split(model, several), lr=1e-3)
    sharded = shard(
        opt,
        model,
        group=group,
        master_weights=True,
        bucket_bytes=2**19,
        transport=transport,
        **options,  # type: ignore[arg-type]
    )
    for step, first in enumerate((0, 1, 1, 0, 2, 0, 0, 0)):
        if several:
            sharded.freeze_to(first)
        x = torch.randn(64, 256, device="cuda", generator=torch.Generator("cuda").manual_seed(2 * step + rank))
        model(x.bfloat16()).square().mean().backward()
        if "step_in_backward" not in options and step % 2:
            sharded.clip_grad_norm_(0.01)
        sharded.step()
        sharded.zero_grad()
    return [value.cpu() for value in model.state_dict().values()]


def same_bits(rank: int, world_size: int) -> list[str]:
    group = on_gpus(rank)
    different = []
    for name, options in OPTIONS.items():
        for several in (False, True):
            runs = [train(rank, group, transport, several, options) for transport in (None, "copy")]
            if not all(map(torch.equal, *runs)):
                different.append(f"{name}, {several}")
    return different


def test_training_has_the_bits_of_nccl(ranks: Any) -> None:
    assert ranks(2).run(same_bits, timeout=200) == [[], []]


def kernels(rank: int, world_size: int) -> int:
    """How many kernels of NCCL an iteration has."""
    group = on_gpus(rank)
    model = stack(1024, 6)
    opt = shard(fastopt.Adam(model.parameters()), model, group=group, transport="copy", bucket_bytes=2**21)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        with profile(activities=[ProfilerActivity.CUDA]) as prof:
            model(x).square().mean().backward()
            opt.step()
            opt.zero_grad()
            torch.cuda.synchronize()
    names = [e.name() for e in prof.profiler.kineto_results.events()]
    return sum("nccl" in name.lower() for name in names)


def test_no_kernel_of_nccl(ranks: Any) -> None:
    assert ranks(2).run(kernels, timeout=120) == [0, 0]
