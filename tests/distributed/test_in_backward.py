"""Stepping in backward: the same bits as a step after it, gathers that begin before the last reduction, and errors."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import fastopt
from fastopt.distributed import RanksDiffer, shard

from .muon import average_grad, muon_step
from .problems import ELEMENTWISE, NORM
from .test_gradients import batch, groups, network
from .test_wire import counted

BUILDS = {name: build for name, build in (ELEMENTWISE | NORM).items() if name != "adamw"}


def pair(build: Any, world_size: int, **options: Any) -> list[tuple[nn.Sequential, Any]]:
    """The same network twice: stepped after backward, and in backward."""
    made = []
    for stepping in (False, True):
        model = network()
        opt = shard(build(groups(model)), model, bucket_bytes=64, step_in_backward=stepping, **options)
        made.append((model, opt))
    return made


def assert_equal_runs(made: list[tuple[nn.Sequential, Any]], what: str) -> None:
    """Parameters and states of both, bit for bit."""
    for _, opt in made:
        opt.synchronize()
    (one, first), (two, second) = made
    for (name, p), q in zip(one.named_parameters(), two.parameters(), strict=True):
        assert torch.equal(p, q), f"{what}: {name} is off by {(p - q).abs().max()}"
        a, b = first.state[p], second.state[q]
        assert a.keys() == b.keys(), f"{what}: {name} has {list(a)} and {list(b)}"
        for key, value in a.items():
            same = torch.equal(value, b[key]) if isinstance(value, torch.Tensor) else value == b[key]
            assert same, f"{what}: {key} of {name}"


def trains(rank: int, world_size: int) -> None:
    """Accumulation, freezing, another rate in every step, ranks that use a part of the model or none of it."""
    for name, build in BUILDS.items():
        made = pair(build, world_size)
        for step, first in enumerate((1, 1, 0, 2, 0, 0)):
            for model, opt in made:
                opt.freeze_to(first)
                opt.set_hyper("lr", slice(0.01, 0.1 / (step + 1)))
                with opt.no_sync():
                    model(batch(step, rank)).square().mean().backward()
                if step != 4 or rank == 0:
                    depth = len(model) if (step + rank) % 3 or first else 3
                    model[:depth](batch(step + 100, rank)).square().mean().backward()
                opt.step()
                opt.zero_grad()
        assert_equal_runs(made, name)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_is_that_of_a_step_after_backward(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(trains)


def missing(rank: int, world_size: int) -> None:
    """Gradients put there by hand, some missing on some ranks and some on all; then none at all."""
    for name in ("adam", "ranger", "sgd+mom"):
        made = pair(BUILDS[name], world_size)
        for step in range(6):
            for model, opt in made:
                for i, p in enumerate(model.parameters()):
                    there = [True, rank == 0, False, rank > 0][(step + i) % 4] and step != 3
                    p.grad = torch.full_like(p, (1 + rank + i) / 8) if there else None
                opt.step()
                opt.zero_grad()
        assert_equal_runs(made, name)


def test_missing_gradients(ranks: Any) -> None:
    ranks(2).run(missing)


def owned(params: Any) -> fastopt.Optimizer:
    """Muon, which says what it needs."""

    def step(p: Any, **kwargs: Any) -> None:
        muon_step(p, **kwargs)

    step.needs = "whole"  # type: ignore[attr-defined]
    return fastopt.Optimizer(params, [average_grad, step], lr=0.02, mom=0.95)


def other_layouts(rank: int, world_size: int) -> None:
    for what, build, options in (
        ("whole parameters", owned, {}),
        ("float32 sums", BUILDS["adam"], {"reduce_dtype": torch.float32}),
        ("hybrid", BUILDS["adam"], {"group": dist.device_mesh.init_device_mesh("cpu", (2, world_size // 2))}),
    ):
        made = pair(build, world_size, **options)
        for step in range(3):
            for model, opt in made:
                model(batch(step, rank)).square().mean().backward()
                opt.step()
                opt.zero_grad()
        assert_equal_runs(made, what)


def test_whole_parameters_float32_sums_and_copies(ranks: Any) -> None:
    ranks(4).run(other_layouts)


def traffic(rank: int, world_size: int) -> list[list[tuple[str, int]]]:
    """The collectives of an iteration, both ways."""
    told = []
    for model, opt in pair(BUILDS["adam"], world_size):
        for step in range(2):
            with counted() as calls:
                model(batch(step, rank)).square().mean().backward()
                opt.step()
                opt.zero_grad()
        told.append(list(calls))
    return told


def test_the_same_collectives_in_another_order(ranks: Any) -> None:
    for after, within in ranks(2).run(traffic):
        assert sorted(after) == sorted(within)
        names = [name for name, _ in within]
        last = len(names) - 1 - names[::-1].index("reduce_scatter")
        assert "all_gather" in names[:last]
        assert [name for name, _ in after] == sorted((name for name, _ in after), reverse=True)


def schedules(rank: int, world_size: int) -> None:
    """A scheduler on the optimizer, and a closure."""
    made = pair(BUILDS["adam"], world_size)
    schedulers = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for _, opt in made]
    for step in range(4):
        for (model, opt), scheduler in zip(made, schedulers, strict=True):

            def closure(model: nn.Sequential = model, opt: Any = opt, step: int = step) -> torch.Tensor:
                opt.zero_grad()
                loss = model(batch(step, rank)).square().mean()
                loss.backward()
                return loss

            opt.step(closure)
            scheduler.step()
    assert_equal_runs(made, "schedules")
    assert made[1][1].hypers[0]["lr"] == made[0][1].hypers[0]["lr"] < 0.02


def test_schedulers_and_closures(ranks: Any) -> None:
    ranks(2).run(schedules)


def refusals(rank: int, world_size: int) -> None:
    model = network()
    opt = shard(fastopt.Adam(groups(model)), model, bucket_bytes=64, step_in_backward=True)

    def backward(step: int = 0) -> None:
        model(batch(step, rank)).square().mean().backward()

    backward()
    with pytest.raises(RuntimeError, match=r"clip_grad_norm_\(\) comes too late"):
        opt.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="GradScaler"):
        opt.unscale_grads_(torch.ones(()), torch.zeros(()), dict)
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) before opt.step\(\)"):
        opt.zero_grad()
    with pytest.raises(RuntimeError, match=r"zero_grad\(\) before opt.step\(\)"):
        model.zero_grad()
    with pytest.raises(RuntimeError, match=r"load_state_dict\(\) before opt.step\(\)"):
        opt.load_state_dict(opt.state_dict())
    with pytest.raises(RuntimeError, match=r"clear_state\(\) before opt.step\(\)"):
        opt.clear_state()
    opt.set_hyper("lr", 0.5)
    with pytest.raises(RuntimeError, match=r"hyper 'lr' of group 0 was 0.02 .* and is 0.5 now"):
        opt.step()
    opt.set_hyper("lr", slice(0.02, 0.06))
    opt.set_hyper("lr", [0.02, 0.04, 0.06])
    opt.freeze_to(1)
    with pytest.raises(RuntimeError, match="the freezing of group 0 was False"):
        opt.step()
    opt.unfreeze()
    opt.step()
    opt.zero_grad()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    backward()
    with pytest.raises(RuntimeError, match="under no_sync"):
        backward(1)
    opt.step()
    opt.zero_grad()
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())
    backward()
    opt.step()
    backward()
    with opt.no_sync():
        backward(1)
    with pytest.raises(RuntimeError, match="under no_sync"):
        opt.step()


@pytest.mark.parametrize("world_size", [1, 2])
def test_what_comes_too_late_is_refused(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(refusals)


def differs(rank: int, world_size: int) -> None:
    """Ranks with different hypers step nothing."""
    model = network()
    opt = shard(fastopt.Adam(groups(model)), model, bucket_bytes=64, step_in_backward=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    opt.set_hyper("lr", 0.1 + rank)
    with pytest.raises(RanksDiffer, match="hyper 'lr' of group 0"):
        model(batch(0, rank)).square().mean().backward()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    opt.set_hyper("lr", 0.1)
    opt.zero_grad()
    model(batch(0, rank)).square().mean().backward()
    opt.step()
    assert not any(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_ranks_that_differ_step_nothing(ranks: Any) -> None:
    ranks(3).run(differs)


def test_what_cannot_step_in_backward() -> None:
    model = network()
    with pytest.raises(ValueError, match="step_in_backward is for stage 2"):
        shard(fastopt.Adam(model.parameters()), model, stage=1, step_in_backward=True)
    opt = fastopt.Optimizer(model.parameters(), [average_grad, muon_step], lr=0.1, mom=0.9)
    with pytest.raises(ValueError, match="muon_step must see"):
        shard(opt, model, step_in_backward=True)
    opt = fastopt.OptimWrapper(torch.optim.AdamW(model.parameters()))
    with pytest.raises(ValueError, match="torch_step steps on all parameters at once"):
        shard(opt, model, step_in_backward=True)


def no_copies(rank: int, world_size: int) -> None:
    """Copies are for GPUs, and say so before anything has changed."""
    model = network()
    opt = fastopt.Adam(model.parameters())
    before = [p.data_ptr() for p in model.parameters()]
    with pytest.raises(ValueError, match="moves memory between GPUs, one per rank: the parameters are on cpu"):
        shard(opt, model, transport="copy")
    with pytest.raises(ValueError, match="transport is 'copy' or None"):
        shard(opt, model, transport="fax")  # type: ignore[arg-type]
    assert [p.data_ptr() for p in model.parameters()] == before


def test_copies_are_refused_without_gpus(ranks: Any) -> None:
    ranks(2).run(no_copies)
