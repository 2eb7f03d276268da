"""Sharding and checkpoints over NCCL on two GPUs, compared with one process on one GPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastopt
from fastopt.checkpoint import load, save
from fastopt.distributed import shard

from ..distributed.problems import ELEMENTWISE, EVERY, Model, assert_same_run, feed, set_average

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def on_gpus(rank: int) -> Any:
    """Take this rank's GPU; a process group over NCCL."""
    torch.cuda.set_device(rank)
    return dist.new_group(backend="nccl")


def every_optimizer(rank: int, world_size: int) -> int:
    """Three groups, freezing and unfreezing, a rate that changes: equal to one process."""
    group = on_gpus(rank)
    compared = 0
    for name, build in EVERY.items():
        for stage in (1, 2):
            model, reference = Model().cuda(), Model().cuda()
            sharded = shard(build(model.param_groups()), model, stage=stage, group=group, bucket_bytes=100)
            plain = build(reference.param_groups())
            for step, first in enumerate((2, 1, 0, -1, 0)):
                for opt in (sharded, plain):
                    opt.freeze_to(first)
                    opt.set_hyper("lr", slice(0.01, 0.1 / (step + 1)))
                feed(sharded, stage, step, rank, world_size)
                set_average(plain, step, world_size)
                sharded.step()
                plain.step()
                for opt in (sharded, plain):
                    opt.zero_grad(set_to_none=True)
            assert_same_run(sharded, plain, f"{name}, stage {stage}", exact=name in ELEMENTWISE)
            compared += 1
    return compared


def test_every_optimizer(ranks: Any) -> None:
    assert ranks(2).run(every_optimizer, timeout=200) == [2 * len(EVERY)] * 2


def layers() -> nn.Sequential:
    """A small network with the same weights everywhere."""
    torch.manual_seed(3)
    return nn.Sequential(nn.Linear(16, 64), nn.GELU(), nn.Linear(64, 64), nn.GELU(), nn.Linear(64, 4)).cuda()


def backward_and_clip(rank: int, world_size: int) -> float:
    """Real backward passes, clipped: the largest difference to one process on the whole batch."""
    group = on_gpus(rank)
    model, reference = layers(), layers()
    sharded = shard(fastopt.Adam(model.parameters(), lr=1e-2), model, group=group)
    plain = fastopt.Adam(reference.parameters(), lr=1e-2)
    for step in range(20):
        torch.manual_seed(step)
        x = torch.randn(world_size * 8, 16, device="cuda")
        model(x[rank * 8 : rank * 8 + 8]).square().mean().backward()
        reference(x).square().mean().backward()
        got = sharded.clip_grad_norm_(0.05)
        want = nn.utils.clip_grad_norm_(reference.parameters(), 0.05)
        torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
        sharded.step()
        plain.step()
        sharded.zero_grad()
        plain.zero_grad()
    pairs = zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def test_backward_with_clipping(ranks: Any) -> None:
    assert max(ranks(2).run(backward_and_clip, timeout=120)) < 1e-4


def saved_and_resumed(rank: int, world_size: int, url: str) -> bool:
    """A checkpoint of two GPUs in a fresh sharded optimizer, and whether the next step is the same."""
    group = on_gpus(rank)
    runs = []
    for resumed in (False, True):
        model = layers()
        opt = shard(fastopt.ranger(model.parameters(), lr=1e-2, k=2), model, group=group)
        if resumed:
            assert load(url, model=model, opt=opt, group=group).step == 3
        for step in range(3 if resumed else 0, 6):
            torch.manual_seed(step)
            model(torch.randn(8, 16, device="cuda")).square().mean().backward()
            opt.step()
            opt.zero_grad()
            if step == 2:
                save(url, step=3, model=model, opt=opt, group=group)
        runs.append([value.clone() for value in model.state_dict().values()])
    return all(torch.equal(p, q) for p, q in zip(*runs, strict=True))


def test_checkpoint(ranks: Any, tmp_path: Path) -> None:
    assert ranks(2).run(saved_and_resumed, str(tmp_path), timeout=120) == [True, True]
