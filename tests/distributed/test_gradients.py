"""Gradients that are missing, accumulated, clipped, made by a real backward pass or put there by hand."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt
from fastopt.distributed import shard

from .problems import EVERY, Model, assert_same, assert_same_run, average, feed, gradient, members, set_average

# ---- missing gradients


def present(step: int, index: int, world_size: int) -> list[int]:
    """The ranks on which parameter `index` has a gradient at `step`: all, some or none."""
    everyone = list(range(world_size))
    return [everyone, everyone[:1], [], everyone[-1:], everyone[1:]][(step + index) % 5]


def missing(rank: int, world_size: int) -> None:
    for name in ("adam", "sgd+mom", "adamw", "ranger"):
        for stage in (1, 2):
            model, reference = Model(), Model()
            sharded = shard(EVERY[name](model.param_groups()), model, stage=stage, bucket_bytes=100)
            plain = EVERY[name](reference.param_groups())
            for step in range(7):
                for i, (p, q) in enumerate(zip(members(sharded), members(plain), strict=True)):
                    who = present(step, i, world_size)
                    q.grad = average(step, i, who, world_size, q.detach()) if who else None
                    own = q.grad if stage == 1 else gradient(step, i, rank, p.detach())
                    p.grad = own.clone() if rank in who and own is not None else None
                if stage == 1:
                    # In stage 1 what a rank has is the average already; without one, its slices count as zero.
                    for i, (p, q) in enumerate(zip(members(sharded), members(plain), strict=True)):
                        if q.grad is not None:
                            zero_where_missing(sharded, plain, i, step, world_size, p, q)
                sharded.step()
                plain.step()
                sharded.zero_grad()
            assert_same_run(sharded, plain, f"{name}, stage {stage}, {world_size} ranks")


def zero_where_missing(sharded: Any, plain: Any, i: int, step: int, world_size: int, p: Tensor, q: Tensor) -> None:
    """Zero the reference's gradient on the slices of ranks that have none."""
    assert q.grad is not None
    flat = q.grad.view(-1)
    for other in set(range(world_size)) - set(present(step, i, world_size)):
        if sharded.layout.kind == "even" or sharded.layout.owner(i) == other:
            flat[slice(*sharded.layout.interval(i, other))] = 0


@pytest.mark.parametrize("world_size", [2, 4])
def test_missing_on_some_ranks_is_zero_and_on_all_leaves_the_parameter_alone(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(missing)


def nothing(rank: int, world_size: int) -> dict[str, Any]:
    model = Model()
    before = [p.detach().clone() for p in model.parameters()]
    sharded = shard(fastopt.Adam(model.param_groups(), lr=0.1), model)
    sharded.step()
    assert all(map(torch.equal, before, model.parameters()))
    return sharded.state_dict()["state"]


def test_a_step_without_any_gradient_changes_nothing(ranks: Any) -> None:
    assert ranks(2).run(nothing) == [{}, {}]


# ---- backward passes

SIZES = (6, 11, 7, 3)


def network(seed: int = 3) -> nn.Sequential:
    """A small network with four linear layers, the last of which some inputs do not use."""
    torch.manual_seed(seed)
    layers: list[nn.Module] = []
    for a, b in pairwise(SIZES):
        layers += [nn.Linear(a, b), nn.Tanh()]
    return nn.Sequential(*layers)


def batch(step: int, rank: int) -> Tensor:
    generator = torch.Generator().manual_seed(50 * step + rank)
    return torch.randn(4, SIZES[0], generator=generator)


def groups(model: nn.Sequential) -> list[dict[str, Any]]:
    return [{"params": list(layer.parameters()), "lr": 0.02 * (i + 1)} for i, layer in enumerate(model[::2])]


def close(model: nn.Module, reference: nn.Module) -> None:
    for p, q in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def trains(rank: int, world_size: int) -> None:
    """Real backward passes with accumulation and freezing equal one process on the whole batch."""
    for name in ("adam", "lamb", "adamw"):
        model, reference = network(seed=rank), network(seed=0)
        sharded = shard(EVERY[name](groups(model)), model, bucket_bytes=300)
        plain = EVERY[name](groups(reference))
        for step, first in enumerate((1, 1, 0, 2, 0, 0)):
            sharded.freeze_to(first)
            plain.freeze_to(first)
            with sharded.no_sync():
                model(batch(step, rank)).square().mean().backward()
            assert any(p.grad is not None for p in model.parameters())
            model(batch(step + 100, rank)).square().mean().backward()
            assert all(p.grad is None for p in model.parameters())
            for each in range(world_size):
                for part in (step, step + 100):
                    (reference(batch(part, each)).square().mean() / world_size).backward()
            norm = sharded.clip_grad_norm_(0.3)
            torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.3), rtol=1e-5, atol=0)
            sharded.step()
            plain.step()
            sharded.zero_grad()
            plain.zero_grad()
        close(model, reference)


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_training_equals_one_process_on_the_whole_batch(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(trains)


def several(rank: int, world_size: int) -> None:
    """Two synchronised passes add up; a pass without synchronisation after them is not lost."""
    model, reference = network(), network()
    sharded, plain = shard(fastopt.SGD(groups(model), lr=0.1), model), fastopt.SGD(groups(reference), lr=0.1)
    for part in range(3):
        if part == 2:
            with sharded.no_sync():
                model(batch(part, rank)).sum().backward()
        else:
            model(batch(part, rank)).sum().backward()
        for each in range(world_size):
            (reference(batch(part, each)).sum() / world_size).backward()
    sharded.step()
    plain.step()
    close(model, reference)


def test_passes_add_up_whatever_was_synchronised(ranks: Any) -> None:
    ranks(2).run(several)


def partial_use(rank: int, world_size: int) -> None:
    """Every rank uses another part of the model, and one makes no backward pass at all in some steps."""
    model, reference = network(), network()
    sharded, plain = shard(fastopt.Adam(groups(model), lr=0.1), model, bucket_bytes=64), fastopt.Adam(groups(reference))
    plain.set_hyper("lr", [h["lr"] for h in sharded.hypers])
    for step in range(5):
        for each in range(world_size):
            if (step + each) % 4 == 3:
                continue
            depth = 1 + 2 * ((step + each) % 3)
            if each == rank:
                model[:depth](batch(step, rank)).square().sum().backward()
            (reference[:depth](batch(step, each)).square().sum() / world_size).backward()
        sharded.step()
        plain.step()
        plain.zero_grad()
        sharded.zero_grad()
    close(model, reference)


@pytest.mark.parametrize("world_size", [2, 3])
def test_ranks_may_use_different_parts_of_the_model(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(partial_use)


def after_failure(rank: int, world_size: int) -> None:
    """A backward pass that fails on all ranks, each in another layer, leaves nothing that the next one trips over."""
    model, reference = network(), network()
    sharded, plain = shard(fastopt.SGD(groups(model), lr=0.1), model, bucket_bytes=64), fastopt.SGD(groups(reference))
    plain.set_hyper("lr", [h["lr"] for h in sharded.hypers])

    def explode(grad: Tensor) -> Tensor:
        raise ArithmeticError("in the middle of backward")

    done = 2 + 2 * rank
    hidden = model[:done](batch(0, rank))
    hidden.register_hook(explode)
    with pytest.raises(ArithmeticError):
        model[done:](hidden).sum().backward()
    sharded.zero_grad()
    model(batch(1, rank)).sum().backward()
    for each in range(world_size):
        (reference(batch(1, each)).sum() / world_size).backward()
    sharded.step()
    plain.step()
    close(model, reference)


def test_a_failed_backward_pass_is_forgotten_by_zero_grad(ranks: Any) -> None:
    ranks(2).run(after_failure)


def closures(rank: int, world_size: int) -> None:
    model, reference = network(), network()
    sharded, plain = shard(fastopt.SGD(groups(model), lr=0.1), model), fastopt.SGD(groups(reference), lr=0.1)
    calls = []

    def closure() -> Tensor:
        assert torch.is_grad_enabled()
        calls.append(1)
        sharded.zero_grad()
        loss = model(batch(0, rank)).sum()
        loss.backward()
        return loss

    loss = sharded.step(closure)
    assert len(calls) == 1
    assert_same(loss.detach(), reference(batch(0, rank)).sum().detach(), "loss", exact=False)
    for each in range(world_size):
        (reference(batch(0, each)).sum() / world_size).backward()
    plain.step()
    close(model, reference)


def test_a_closure_runs_once_before_gradients_are_reduced(ranks: Any) -> None:
    ranks(2).run(closures)


def frozen_but_required(rank: int, world_size: int) -> None:
    """Gradients of frozen parameters that somebody asks autograd for stay where they are, and open no round."""
    model = network()
    opt = shard(fastopt.SGD(groups(model), lr=0.1), model)
    with pytest.warns(UserWarning, match="whole model is frozen"):
        opt.freeze_to(3)
    for p in model.parameters():
        p.requires_grad_(True)
    before = [p.detach().clone() for p in model.parameters()]
    if rank == 0:
        model(batch(0, rank)).sum().backward()
    opt.step()
    assert all(map(torch.equal, before, model.parameters()))
    opt.freeze_to(2)
    for p in model.parameters():
        p.requires_grad_(True)
    opt.zero_grad()
    model(batch(0, rank)).sum().backward()
    assert [p.grad is None for p in model.parameters()] == [False] * 4 + [True] * 2
    opt.step()
    opt.synchronize()
    assert not any(map(torch.equal, before[4:], list(model.parameters())[4:]))
    assert all(map(torch.equal, before[:4], list(model.parameters())[:4]))


def test_gradients_of_frozen_parameters_are_left_alone(ranks: Any) -> None:
    ranks(2).run(frozen_but_required)


def dropped(rank: int, world_size: int) -> None:
    """Gradients that are dropped before the step are dropped on a rank, too, that only comes to them in its step."""
    model = network()
    opt = shard(fastopt.Adam(groups(model), lr=0.1), model)
    for passes, at_first, drop in (
        (1, 1, opt.zero_grad),
        (2, 1, opt.zero_grad),
        (1, 1, model.zero_grad),
        (2, 0, opt.zero_grad),  # all ranks make the pass that is dropped, and not all the one that is not
    ):
        before = {name: value.clone() for name, value in model.state_dict().items()}
        for part in range(passes):
            if rank >= (1 if part else at_first):
                model(batch(part, rank)).sum().backward()
            if part == 0:
                drop()
        opt.step()
        moved = [not torch.equal(before[name], value) for name, value in model.state_dict().items()]
        assert moved == [passes == 2] * len(moved)
        opt.zero_grad()


def test_gradients_that_are_dropped_before_the_step(ranks: Any) -> None:
    ranks(2).run(dropped)


def dropped_by_the_module(rank: int, world_size: int) -> None:
    """`model.zero_grad()` drops reduced gradients: those of the optimizers whose parameters all are in the module."""
    model, reference = network(), network()
    halves = [(model[:4], reference[:4]), (model[4:], reference[4:])]
    opts = [shard(fastopt.SGD(half.parameters(), lr=0.1), model) for half, _ in halves]
    plains = [fastopt.SGD(half.parameters(), lr=0.1) for _, half in halves]
    for step, dropped in enumerate(([], [0], [1], [0, 1])):
        for part in (step, step + 50):
            model(batch(part, rank)).sum().backward()
            for each in range(world_size):
                (reference(batch(part, each)).sum() / world_size).backward()
            if part == step:
                model[1:].zero_grad()  # has all parameters of the second optimizer, and some of the first
                halves[1][1].zero_grad()
                for i in dropped:
                    halves[i][0].zero_grad()
                    halves[i][1].zero_grad()
        for opt in (*opts, *plains):
            opt.step()
            opt.zero_grad()
    close(model, reference)


def test_zero_grad_of_a_module(ranks: Any) -> None:
    ranks(2).run(dropped_by_the_module)


# ---- clipping


def torchs_clipping(rank: int, world_size: int) -> None:
    """torch's own clipping is refused where it would find nothing, and does what it does elsewhere."""
    clip = torch.nn.utils.clip_grad_norm_
    for stage in (1, 2):
        model, other = network(), network()
        opt = shard(fastopt.SGD(groups(model), lr=0.1), model, stage=stage)
        assert clip(model.parameters(), 1.0) == 0  # there are none yet
        with opt.no_sync():
            model(batch(0, rank)).sum().backward()
        assert clip(model.parameters(), 1e-3) > 1
        assert clip(model.parameters(), 1.0) < 1.1e-3
        model(batch(0, rank)).sum().backward()
        other(batch(0, rank)).sum().backward()
        assert clip(other.parameters(), 1.0) > 1
        if stage == 1:
            clip(model.parameters(), 1.0)
            continue
        for params in (model.parameters(), next(iter(model.parameters())), [*other.parameters(), *model.parameters()]):
            with pytest.raises(RuntimeError, match="clip_grad_norm_\\(max_norm\\) of the optimizer that shard"):
                clip(params, 1.0)
        assert opt.clip_grad_norm_(1.0) > 1
        opt.step()
        opt.zero_grad()
        assert clip(model.parameters(), 1.0) == 0


def test_clipping_by_torch_is_refused_where_it_finds_nothing(ranks: Any) -> None:
    ranks(2).run(torchs_clipping)


def clips(rank: int, world_size: int) -> None:
    for name in ("adam", "adamw"):
        for stage in (1, 2):
            for norm_type in (2.0, 1.0, 3.5, float("inf")):
                for max_norm in (0.5, 1e3):
                    model, reference = Model(), Model()
                    sharded = shard(EVERY[name](model.param_groups()), model, stage=stage)
                    plain = EVERY[name](reference.param_groups())
                    sharded.freeze_to(1)
                    plain.freeze_to(1)
                    feed(sharded, stage, 0, rank, world_size)
                    set_average(plain, 0, world_size)
                    # PyTorch has no infinity norm of a tensor without elements.
                    trained = [p for p in members(plain) if p.requires_grad and p.numel()]
                    norm = sharded.clip_grad_norm_(max_norm, norm_type)
                    assert norm.shape == ()
                    want = nn.utils.clip_grad_norm_(trained, max_norm, norm_type)
                    torch.testing.assert_close(norm, want, rtol=1e-6, atol=0)
                    sharded.step()
                    plain.step()
                    for p, q in zip(members(sharded), members(plain), strict=True):
                        assert_same(p.detach(), q.detach(), f"{name} {stage} {norm_type} {max_norm}", exact=False)


@pytest.mark.parametrize("world_size", [1, 3])
def test_clipping_equals_torchs_on_the_averaged_gradients(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(clips)


def test_clipping_refuses_a_norm_that_is_none() -> None:
    model = Model()
    with pytest.raises(ValueError, match="norm_type"):
        shard(fastopt.SGD(model.param_groups(), lr=0.1), model).clip_grad_norm_(1.0, 0)


# ---- marks and freezing


def marks(rank: int, world_size: int) -> None:
    """`force_train` in a frozen group, `do_wd=False`, and a group frozen from the start until step 3."""
    for name in ("adam", "larc", "adamw", "ranger"):
        for stage in (1, 2):
            model, reference = Model(), Model()
            sharded = shard(EVERY[name](model.param_groups()), model, stage=stage)
            plain = EVERY[name](reference.param_groups())
            for opt in (sharded, plain):
                ps = members(opt)
                opt.state[ps[1]] = {"force_train": True}
                opt.state[ps[4]] = {"do_wd": False, "force_train": True}
                opt.state[ps[7]] = {"do_wd": False}
                opt.freeze_to(2)
            for step in range(6):
                if step == 3:
                    for opt in (sharded, plain):
                        opt.unfreeze()
                for i, (p, q) in enumerate(zip(members(sharded), members(plain), strict=True)):
                    q.grad = average(step, i, range(world_size), world_size, q.detach())
                    p.grad = q.grad.clone() if stage == 1 else gradient(step, i, rank, p.detach())
                sharded.step()
                plain.step()
                if step == 2:
                    assert_only(sharded, {1, 4, *range(7, 9)})
                sharded.zero_grad(set_to_none=True)
            assert_same_run(sharded, plain, f"{name}, stage {stage}", exact=name != "larc")


def assert_only(sharded: Any, trained: set[int]) -> None:
    """No state of parameters that have not trained."""
    for i, p in enumerate(members(sharded)):
        keys = sharded.state.get(p, {}).keys() - {"force_train", "do_wd"}
        assert bool(keys) == (
            i in trained and (sharded.layout.kind == "even" or sharded.layout.owner(i) == sharded.rank)
        )


@pytest.mark.parametrize("world_size", [2, 3])
def test_marks_and_freezing_from_the_start(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(marks)
