"""Models under fully_shard (stage 3) on two GPUs, over NCCL: equal to one process, on local parts, in few launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

import fastopt

from ..distributed.problems import ELEMENTWISE, NORM, Model, average, members
from .nccl import nccl_mesh

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

SHAPES = (((5, 4), (7,)), ((1, 3), (6, 2, 2), (2,)))


def whole(x: Any) -> torch.Tensor:
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def set_grads(opt: Any, step: int) -> None:
    for i, p in enumerate(members(opt)):
        full = average(step, i, range(4), 4, torch.empty(p.shape)).cuda()
        p.grad = distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full


def every_optimizer(rank: int, world_size: int) -> int:
    mesh = nccl_mesh(rank)
    for name, build in (ELEMENTWISE | NORM).items():
        model, reference = Model(SHAPES).cuda(), Model(SHAPES).cuda()
        fully_shard(model, mesh=mesh)
        opt, plain = build(model.param_groups()), build(reference.param_groups())
        for step in range(5):
            for each in (opt, plain):
                each.freeze_to((1, 0, 0, -1, 0)[step])
                set_grads(each, step)
                each.step()
                each.zero_grad(set_to_none=True)
        for p, q in zip(members(opt), members(plain), strict=True):
            torch.testing.assert_close(whole(p), q.detach(), rtol=3e-6, atol=1e-6, msg=lambda t, n=name: f"{n}: {t}")
        if name != "adamw":
            assert {choice.executor for choice in opt.engine} == {"triton"}, name
    return len(ELEMENTWISE | NORM)


def test_every_optimizer_equals_one_process(ranks: Any) -> None:
    assert ranks(2).run(every_optimizer, timeout=300) == [len(ELEMENTWISE | NORM)] * 2


def one_kernel(rank: int, world_size: int) -> int:
    """Kernels of one step of Adam on 60 parameters, once it is steady."""
    mesh = nccl_mesh(rank)
    torch.manual_seed(0)
    model = nn.Sequential(*[nn.Linear(33, 33) for _ in range(30)]).cuda()
    fully_shard(model, mesh=mesh)
    opt = fastopt.Adam(model.parameters(), lr=1e-3)
    for _ in range(3):
        model(torch.randn(4, 33, device="cuda")).square().mean().backward()
        opt.step()
        opt.zero_grad()
    model(torch.randn(4, 33, device="cuda")).square().mean().backward()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        opt.step()
        torch.cuda.synchronize()
    device = torch.autograd.DeviceType.CUDA
    return sum(e.device_type == device and not e.name.lower().startswith("mem") for e in profile.events())


def test_a_step_is_few_kernels_whatever_the_number_of_parameters(ranks: Any) -> None:
    assert max(ranks(2).run(one_kernel, timeout=120)) <= 4


def mixed(rank: int, world_size: int) -> float:
    """Real training in bfloat16 over float32 shards, clipped; the largest difference between the ranks' weights."""
    mesh = nccl_mesh(rank)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 65), nn.GELU(), nn.Linear(65, 4)).cuda()
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    opt = fastopt.Lamb(model.parameters(), lr=1e-2)
    losses = []
    for step in range(30):
        torch.manual_seed(step)
        x = torch.randn(32, 16, device="cuda")
        loss = (model(x) - x[:, :4]).float().square().mean()
        loss.backward()
        opt.clip_grad_norm_(1.0)
        opt.step()
        opt.zero_grad()
        losses.append(loss.item())
    return losses[-1] / losses[0]


def test_training_in_mixed_precision(ranks: Any) -> None:
    assert max(ranks(2).run(mixed, timeout=120)) < 0.9


def captured(rank: int, world_size: int, build: Any, by_itself: bool) -> None:
    """A captured step on parts follows the hypers and the step count, as one process does.

    `by_itself`: without being told, in capturable groups whose rates are on the GPU.
    """
    mesh = nccl_mesh(rank)
    model, reference = Model(SHAPES).cuda(), Model(SHAPES).cuda()
    fully_shard(model, mesh=mesh)
    opt, plain = build(model.param_groups()), build(reference.param_groups())
    if by_itself:
        for group in opt.param_groups:
            group |= {"capturable": True, "lr": torch.tensor(group["lr"], device="cuda")}
    for each in (opt, plain):
        set_grads(each, 0)
    with pytest.raises(RuntimeError, match="capture"):
        opt.prepare_replay()

    def gradients_of(step: int) -> None:
        for i, (p, q) in enumerate(zip(members(opt), members(plain), strict=True)):
            full = average(step, i, range(4), 4, torch.empty(q.shape)).cuda()
            q.grad.copy_(full)
            spread: Any = distribute_tensor(full, p.device_mesh, p.placements)
            p.grad._local_tensor.copy_(spread._local_tensor)

    for step in range(3):
        gradients_of(step)
        opt.step()
        plain.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    for step in range(3, 7):
        gradients_of(step)
        plain.set_hyper("lr", 0.1 / step)
        if by_itself:
            for group in opt.param_groups:
                group["lr"].fill_(0.1 / step)
        else:
            opt.set_hyper("lr", 0.1 / step)
            opt.prepare_replay()
        graph.replay()
        plain.step()
        for p, q in zip(members(opt), members(plain), strict=True):
            torch.testing.assert_close(whole(p), q.detach(), rtol=1e-5, atol=1e-6)
            assert opt.state[p]["step"] == plain.state[q]["step"] == step + 1


@pytest.mark.parametrize("by_itself", [False, True])
@pytest.mark.parametrize("build", [fastopt.Adam, fastopt.Lamb])
def test_a_captured_step_on_parts(ranks: Any, build: Any, by_itself: bool) -> None:
    ranks(2).run(captured, build, by_itself, timeout=120)
