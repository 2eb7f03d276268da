"""What is done on one rank only, or after `shard`, and would train wrongly without a word: all ranks are told."""

from __future__ import annotations

import copy
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import fastopt
from fastopt.distributed import shard

from .test_averaged import average, told_by
from .test_complaints import backward, batch, body_and_head, groups
from .test_wire import counted


def job(stage: int) -> tuple[nn.Sequential, Any]:
    model = body_and_head()
    return model, shard(fastopt.Adam(groups(model), lr=0.1), model, stage=stage)


def train(model: nn.Module, opt: Any, rank: int, steps: range) -> None:
    for step in steps:
        backward(model, step, rank)
        if opt.stage == 1:
            average(model)
        opt.step()
        opt.zero_grad()


def weights(model: nn.Module, opt: Any) -> list[torch.Tensor]:
    opt.synchronize()
    return [p.detach().clone() for p in model.parameters()]


# ---- loading on one rank


def loads(rank: int, world_size: int, stage: int) -> list[str]:
    model, opt = job(stage)
    train(model, opt, rank, range(2))
    other, told = nn.Sequential(*copy.deepcopy(model)).state_dict(), []

    def refuses() -> None:
        before = weights(model, opt)
        steps = [entry.get("step") for entry in opt.state.values()]
        told.append(told_by(lambda: train(model, opt, rank, range(2, 3))))
        assert all(map(torch.equal, before, weights(model, opt)))
        assert steps == [entry.get("step") for entry in opt.state.values()]
        opt.zero_grad(set_to_none=True)

    state = opt.state_dict()
    for value in other.values():
        value.add_(1)
    if rank == 0:
        model.load_state_dict(other)
    refuses()
    if rank == 0:
        model[1].load_state_dict({key.removeprefix("1."): other[key] for key in other if key.startswith("1.")})
    else:
        model.load_state_dict(other)
    train(model, opt, rank, range(3, 5))

    if rank == 0:
        opt.load_state_dict(state)
    refuses()
    opt.load_state_dict(state)
    train(model, opt, rank, range(2))
    if rank == 1:
        opt.clear_state()
    refuses()
    opt.clear_state()
    train(model, opt, rank, range(2))

    # Another model is put in and taken out again for an evaluation on one rank: nothing differs.
    kept = copy.deepcopy(model.state_dict())
    if rank == 0:
        model.load_state_dict(other)
        model.load_state_dict(kept)
    with counted() as calls:
        train(model, opt, rank, range(2, 4))
    assert [name for name, _ in calls].count("all_gather_object") == 1
    return told


@pytest.mark.parametrize("stage", [1, 2])
def test_what_one_rank_alone_has_loaded(ranks: Any, stage: int) -> None:
    told, same = ranks(2).run(loads, stage)
    assert told == same
    model, state, cleared = told
    assert "parameter '0.0.weight': norm " in model
    assert "was not called alike on all ranks" in model
    assert "'step' of '0.0.weight': 2 on rank 0; 4 on rank 1" in state
    assert "parameter" not in state
    assert "'step' of '0.0.weight': 4 on rank 0; nothing on rank 1" in cleared


# ---- parameters replaced or frozen by hand


def changes(rank: int, world_size: int, stage: int) -> list[str]:
    told = []
    model, opt = job(stage)
    train(model, opt, rank, range(1))
    if rank == 1:
        model[1].weight = nn.Parameter(model[1].weight.detach().clone())
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()  # takes zeros for rank 1's
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    told.append(told_by(opt.step))

    model, opt = job(stage)
    nn.utils.parametrizations.weight_norm(model[1])
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = weights(model, opt)
    with pytest.raises(RuntimeError) as caught:
        opt.step()
    assert all(map(torch.equal, before, weights(model, opt)))
    told.append(str(caught.value))

    model, opt = job(stage)
    del model[1]  # and nothing has come in its place
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()

    model, opt = job(stage)
    if rank == 1:
        model[1].bias.requires_grad_(False)
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            opt.step()
    assert len(warned) == rank
    told.append(str(warned[0].message) if warned else "")
    return told


@pytest.mark.parametrize("stage", [1, 2])
def test_what_is_replaced_or_frozen_by_hand(ranks: Any, stage: int) -> None:
    (replaced, normed, nothing), (same, _, frozen) = ranks(2).run(changes, stage)
    assert replaced == same
    assert "nothing on rank 0; '1.weight' of the model is another tensor than when shard() was called" in replaced
    assert "'1.weight' is no longer in the model, '1.parametrizations.weight.original0' has come in its place" in normed
    assert nothing == ""
    assert "'1.bias' does not require a gradient on this rank, but has one on others" in frozen


# ---- clipping where no gradients are, and several optimizers


def clips(rank: int, world_size: int) -> str:
    model = body_and_head()
    plain = fastopt.Adam(groups(model), lr=0.1)
    opt = shard(plain, model)
    backward(model, 0, rank)
    with pytest.raises(RuntimeError, match=r"call clip_grad_norm_\(\) of the optimizer that"):
        plain.clip_grad_norm_(1.0)
    with pytest.raises(RuntimeError, match="not clipped by value"):
        nn.utils.clip_grad_value_(model.parameters(), 1.0)
    opt.step()

    # Two optimizers of equal size, which the ranks reach in different orders.
    pair = nn.ModuleList([nn.Linear(3, 3), nn.Linear(3, 3)])
    opts = [shard(fastopt.Adam(each.parameters()), pair) for each in pair]
    told = told_by(lambda: pair[rank](torch.ones(1, 3)).sum().backward())
    for each in opts:
        each.zero_grad()
    return told


def test_clipping_in_the_wrong_place_and_optimizers_in_another_order(ranks: Any) -> None:
    told, same = ranks(2).run(clips)
    assert told == same
    assert "the optimizer: of 2 parameters, '0.weight' to '0.bias' on rank 0; of 2 parameters, '1.weight'" in told


def joins(rank: int, world_size: int, inner: bool) -> tuple[str, int, list[float]]:
    """Uneven data: refused where it would leave ranks alone, right where all stop together."""
    model = body_and_head()
    wrapped = DistributedDataParallel(model)
    opt: Any = shard(fastopt.Adam(groups(model), lr=0.1), model if inner else wrapped, stage=1)
    done = 0

    def epoch(**how: Any) -> None:
        nonlocal done
        with wrapped.join(**how):
            for step in range(2 + rank):
                backward(wrapped, step, rank)
                opt.step()
                opt.zero_grad()
                done += 1

    with pytest.raises(RuntimeError, match="no more data") as told:
        epoch()
    assert done == 0
    with pytest.raises(RuntimeError, match="exhausted"):
        epoch(throw_on_early_termination=True)
    opt.synchronize()
    return str(told.value), done, [float(p.detach().sum()) for p in model.parameters()]


@pytest.mark.parametrize("inner", [False, True])
def test_uneven_data_within_join(ranks: Any, inner: bool) -> None:
    first, second = ranks(2).run(joins, inner)
    assert first == second
    assert first[1] == 2
    assert "join(throw_on_early_termination=True)" in first[0]


def test_a_process_group_that_comes_after_shard(monkeypatch: pytest.MonkeyPatch) -> None:
    for stage in (1, 2):
        model, opt = job(stage)
        backward(model, 0, 0)
        opt.step()
        with monkeypatch.context() as patch:
            patch.setattr("torch.distributed.is_initialized", lambda: True)
            patch.setattr("torch.distributed.get_world_size", lambda: 2)
            backward(model, 0, 0)
            with pytest.raises(RuntimeError, match=r"each rank would train by itself: call .*init_process_group\(\)"):
                opt.step()
        opt.step()


# ---- a step between a forward and its backward pass


def step_too_soon(rank: int, world_size: int, stage: int, options: dict[str, Any]) -> None:
    model = body_and_head()
    opt = shard(fastopt.Adam(groups(model), lr=0.1), model, stage=stage, **options)
    for _ in range(2):
        early, late = (model(batch(step, rank)).sum() for step in range(2))
        early.backward()
        if stage == 1:
            average(model)
        opt.step()
        opt.zero_grad()
        with pytest.raises(RuntimeError, match="modified by an inplace operation"):
            late.backward()
        opt.zero_grad()
        train(model, opt, rank, range(1))


@pytest.mark.parametrize(("stage", "options"), [(1, {}), (2, {}), (2, {"step_in_backward": True})])
def test_a_step_between_a_forward_and_its_backward_pass(ranks: Any, stage: int, options: dict[str, Any]) -> None:
    """Gradients would be those of no weights that there have ever been. PyTorch's optimizers raise, too."""
    ranks(2).run(step_too_soon, stage, options)
