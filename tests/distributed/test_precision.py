"""Low precision: master copies, sums in float32, and dynamic loss scaling, against one process."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt
from fastopt.distributed import RanksDiffer, shard
from fastopt.distributed.gradients import grad_scaler

from .problems import SHAPES, Model, assert_same_run, average, feed, gradient, members, set_average
from .test_wire import counted

LOW = (torch.bfloat16, torch.float16)


def masters(rank: int, world_size: int) -> int:
    """bfloat16 and float16 parameters with float32 masters, frozen and unfrozen: bit for bit."""
    runs = 0
    for stage, reduce_dtype in ((1, None), (2, None), (2, torch.float32)):
        for name in ("Adam", "SGD", "QHAdam"):
            build = getattr(fastopt, name)
            model, reference = Model(SHAPES, LOW), Model(SHAPES, LOW)
            opt = shard(
                build(model.param_groups()),
                model,
                stage=stage,
                bucket_bytes=100,
                master_weights=True,
                reduce_dtype=reduce_dtype,
            )
            plain = build(reference.param_groups(), master_weights=True)
            for step, first in enumerate((1, 0, 2, 0)):
                for each in (opt, plain):
                    each.freeze_to(first)
                feed(opt, stage, step, rank, world_size)
                set_average(plain, step, world_size)
                opt.step()
                plain.step()
                for each in (opt, plain):
                    each.zero_grad(set_to_none=True)
            assert_same_run(opt, plain, f"{name}, stage {stage}, {reduce_dtype}, {world_size} ranks")
            for p in members(opt):
                held = opt.state[p]["master"]
                assert held.dtype == torch.float32
                assert held.ndim == 1
            runs += 1
    return runs


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_masters_are_slices_and_equal_one_process(ranks: Any, world_size: int) -> None:
    assert ranks(world_size).run(masters) == [9] * world_size


def masters_of_the_optimizer(rank: int, world_size: int) -> None:
    """The optimizer's own switch counts where `shard` says nothing; ranks must agree on it."""
    model = Model(SHAPES, LOW)
    opt = shard(fastopt.Adam(model.param_groups(), master_weights=True), model)
    feed(opt, 2, 0, rank, world_size)
    opt.step()
    assert all("master" in opt.state[p] for p in members(opt))
    model = Model(SHAPES, LOW)
    with pytest.raises(RanksDiffer, match="master_weights: False on rank 0; True on rank 1"):
        shard(fastopt.Adam(model.param_groups()), model, master_weights=rank == 1)


def test_the_optimizers_own_switch(ranks: Any) -> None:
    ranks(2).run(masters_of_the_optimizer)


def noisy(rank: int, like: Tensor) -> Tensor:
    """Gradients of very different sizes, whose sum in bfloat16 depends on the order and loses most of it."""
    generator = torch.Generator().manual_seed(rank)
    return (torch.randn(like.shape, generator=generator) * 10.0 ** (3 - 2 * rank)).to(like.dtype)


def sums_in_float32(rank: int, world_size: int) -> None:
    for kind in ("even", "whole"):
        model = Model((((40, 7), (9,)), ((33,),)), (torch.bfloat16,))
        build = fastopt.SGD(model.parameters(), lr=1.0)
        opt = shard(build, model, layout=kind, master_weights=True, reduce_dtype=torch.float32)
        before = [p.detach().clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = noisy(rank, p)
        with counted() as calls:
            opt.step()
        opt.synchronize()
        for p, old in zip(model.parameters(), before, strict=True):
            total = torch.zeros(p.shape)
            for other in range(world_size):
                total += noisy(other, old).float()
            assert torch.equal(p, (old.float() - total / world_size).to(p.dtype))
        exchanged = [n for name, n in calls if name == "all_to_all_single"]
        if kind == "even":
            # What is exchanged is bfloat16; beside the gradients there are padding and headers.
            payload = 2 * sum(p.numel() for p in model.parameters())
            assert payload <= exchanged[0] <= payload + world_size * (2 * 200 + 3 * 16)


@pytest.mark.parametrize("world_size", [2, 3])
def test_sums_in_float32_of_gradients_in_bfloat16(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(sums_in_float32)


def network() -> nn.Sequential:
    torch.manual_seed(4)
    return nn.Sequential(nn.Linear(5, 9), nn.Tanh(), nn.Linear(9, 2))


def scaled(rank: int, world_size: int) -> None:
    """`torch.amp.GradScaler` as in one process: unscale, clip, step, skip, update."""
    for stage, chain in ((1, "even"), (2, "even"), (2, "whole")):
        model, reference = network(), network()
        opt = shard(fastopt.Adam(model.parameters(), lr=0.05), model, stage=stage, layout=chain, bucket_bytes=200)
        plain = fastopt.Adam(reference.parameters(), lr=0.05)
        scalers = [torch.amp.GradScaler("cpu", init_scale=1024.0, growth_interval=2) for _ in range(2)]
        for step in range(6):
            xs = [torch.randn(4, 5, generator=torch.Generator().manual_seed(9 * step + r)) for r in range(world_size)]
            if step == 3:
                xs[-1][0, 0] = float("inf")  # on the last rank alone
            for x in xs:
                scalers[1].scale(reference(x).square().mean() / world_size).backward()
            if stage == 1:
                scalers[0].scale(torch.zeros(()))
                for p, q in zip(model.parameters(), reference.parameters(), strict=True):
                    p.grad = None if q.grad is None else q.grad.clone()
            else:
                scalers[0].scale(model(xs[rank]).square().mean()).backward()
            before = {name: value.clone() for name, value in model.state_dict().items()}
            if step % 2:
                for scaler, each in zip(scalers, (opt, plain), strict=True):
                    scaler.unscale_(each)
                norm = opt.clip_grad_norm_(0.2)
                want = nn.utils.clip_grad_norm_(reference.parameters(), 0.2)
                torch.testing.assert_close(norm, want, rtol=1e-5, atol=0, equal_nan=True)
            for scaler, each in zip(scalers, (opt, plain), strict=True):
                scaler.step(each)
                scaler.update()
                each.zero_grad()
            after = model.state_dict()
            same = all(torch.equal(before[name], after[name]) for name in before)
            assert same == (step == 3), f"stage {stage}, step {step}"
            assert scalers[0].get_scale() == scalers[1].get_scale()
        for p, q in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
        assert scalers[0].get_scale() != 1024.0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_complaint_22_inf_on_one_rank_skips_the_step_on_all(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(scaled)


def nothing_to_unscale(rank: int, world_size: int) -> None:
    """A rank that owns nothing, and one that has no gradient, take part all the same."""
    model = Model((((1,),),))
    opt = shard(fastopt.SGD(model.parameters(), lr=1.0), model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    (p,) = model.parameters()
    start = p.detach().clone()
    if rank == 0:
        scaler.scale(p.sum()).backward()
    else:
        scaler.scale(torch.zeros(()))
    scaler.step(opt)
    scaler.update()
    opt.synchronize()
    torch.testing.assert_close(p.detach(), start - 1 / world_size)


def test_complaint_22_ranks_without_elements_or_gradients(ranks: Any) -> None:
    ranks(3).run(nothing_to_unscale)


def test_another_optimizer_is_unscaled_as_ever() -> None:
    model = nn.Linear(3, 3)
    shard(fastopt.SGD(model.parameters(), lr=0.1), model)
    other = nn.Linear(3, 1)
    opt = torch.optim.SGD(other.parameters(), lr=1.0)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    before = other.bias.detach().clone()
    scaler.scale(other(torch.ones(1, 3)).sum()).backward()
    scaler.unscale_(opt)
    assert other.bias.grad is not None
    assert other.bias.grad.item() == 1.0
    scaler.step(opt)
    assert torch.equal(other.bias.detach(), before - 1)


@pytest.mark.parametrize(("dtype", "stage", "error"), [(torch.int32, 2, TypeError), (torch.float32, 1, ValueError)])
def test_sums_that_cannot_be(dtype: Any, stage: Any, error: type[Exception]) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(error, match="reduce_dtype"):
        shard(fastopt.SGD(model.parameters(), lr=0.1), model, stage=stage, reduce_dtype=dtype)


def accumulated(rank: int, world_size: int) -> None:
    """Passes that are each reduced add up in float32."""
    model = Model((((33, 3),),), (torch.bfloat16,))
    opt = shard(fastopt.SGD(model.parameters(), lr=1.0), model, master_weights=True, reduce_dtype=torch.float32)
    (p,) = model.parameters()
    start, total = p.detach().clone(), torch.zeros(p.shape)
    for part in range(3):
        (p * gradient(part, 0, rank, p.detach())).sum().backward()
        total += average(part, 0, range(world_size), world_size, start.float())
    opt.step()
    opt.synchronize()
    assert torch.equal(p, (start.float() - total).to(p.dtype))


def test_accumulation_in_float32(ranks: Any) -> None:
    ranks(2).run(accumulated)


def test_the_scalers_method_that_is_replaced_is_the_one_that_was_read() -> None:
    """There is no public way: `GradScaler` looks into `p.grad` itself. This tells if PyTorch changes how."""
    replaced = grad_scaler._in_place
    assert list(inspect.signature(replaced).parameters) == ["self", "optimizer", "inv_scale", "found_inf", "allow_fp16"]
    for caller in (torch.amp.GradScaler.unscale_, torch.amp.GradScaler._check_inf_per_device):
        assert "_unscale_grads_" in caller.__code__.co_names
