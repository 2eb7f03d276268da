"""Callbacks that do not say what they need of a parameter: it is found by recording, and never guessed.

The references are the same chains in one process, parameter by parameter (`engine="eager"`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import Adam, Optimizer, average_grad, lamb_step
from fastopt.distributed import RanksDiffer, shard

from . import callbacks
from .callbacks import (
    counting_step,
    item_step,
    largest_step,
    limited_step,
    sign_step,
    turning_step,
    unit_step,
)
from .problems import Model, assert_same_run, feed, members, set_average


def compare(
    rank: int, world_size: int, cbs: list[Callable[..., Any]], kind: str, layout: Any, exact: bool, steps: int
) -> None:
    for stage in (1, 2):
        model, reference = Model(), Model()
        opt = shard(Optimizer(model.param_groups(), cbs, lr=0.1), model, stage=stage, layout=layout, bucket_bytes=100)
        plain = Optimizer(reference.param_groups(), cbs, lr=0.1, engine="eager")
        assert opt.layout.kind == kind
        for step in range(steps):
            feed(opt, stage, step, rank, world_size)
            set_average(plain, step, world_size)
            opt.step()
            plain.step()
        assert_same_run(opt, plain, f"{cbs} on {world_size} ranks, stage {stage}", exact)


@pytest.mark.parametrize("world_size", [2, 3])
def test_elementwise_is_found_and_equals_one_process(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(compare, [average_grad, sign_step], "even", None, True, 4)


@pytest.mark.parametrize("step", [unit_step, counting_step], ids=["from the start", "in a later step"])
def test_norms_are_found_and_are_of_the_whole_parameter(ranks: Any, step: Callable[..., Any]) -> None:
    ranks(3).run(compare, [step], "even", None, False, 5)


@pytest.mark.parametrize("step", [largest_step, item_step])
def test_what_cannot_be_added_up_or_recorded_gets_whole_parameters(ranks: Any, step: Callable[..., Any]) -> None:
    ranks(2).run(compare, [step], "whole", None, True, 3)


def turning(rank: int, world_size: int) -> str:
    model = Model()
    opt = shard(Optimizer(model.param_groups(), turning_step, lr=0.1), model)
    assert opt.layout.kind == "even"
    for step in range(2):
        feed(opt, 2, step, rank, world_size)
        opt.step()
    before = [p.detach().clone() for p in members(opt)]
    states = {p: {k: v.clone() if isinstance(v, Tensor) else v for k, v in s.items()} for p, s in opt.state.items()}
    feed(opt, 2, 2, rank, world_size)
    with pytest.raises(RuntimeError) as caught:
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(members(opt), before, strict=True))
    assert {p: dict(s) for p, s in opt.state.items()} == states
    return str(caught.value)


def test_a_later_step_that_cannot_be_recorded_is_refused_before_anything_changes(ranks: Any) -> None:
    for text in ranks(2).run(turning):
        assert "turning_step" in text
        assert "cumsum" in text
        assert "cb.needs" in text
        assert "layout='whole'" in text


def test_the_same_chain_on_whole_parameters(ranks: Any) -> None:
    ranks(2).run(compare, [turning_step], "whole", "whole", True, 5)


def turning_on_one_rank(rank: int, world_size: int) -> str:
    callbacks.limit = 100
    model = Model()
    opt = shard(Optimizer(model.param_groups(), limited_step, lr=0.1), model)
    feed(opt, 2, 0, rank, world_size)
    opt.step()
    if rank == 1:
        callbacks.limit = 1
    feed(opt, 2, 1, rank, world_size)
    with pytest.raises(RanksDiffer) as caught:
        opt.step()
    callbacks.limit = 100
    opt.step()
    return str(caught.value)


def test_a_chain_that_turns_on_one_rank_is_an_error_on_all(ranks: Any) -> None:
    for text in ranks(2).run(turning_on_one_rank):
        assert "limited_step" in text
        assert "on rank 1" in text


def test_a_state_of_a_parameter_without_dimensions_keeps_its_shape(ranks: Any) -> None:
    ranks(2).run(resume)


def resume(rank: int, world_size: int) -> None:
    def build() -> tuple[Model, Any]:
        model = Model()
        return model, shard(Optimizer(model.param_groups(), unit_step, lr=0.1), model)

    _, first = build()
    feed(first, 2, 0, rank, world_size)
    first.step()
    _, second = build()
    for p, q in zip(members(second), members(first), strict=True):
        p.data.copy_(q)
    second.load_state_dict(first.state_dict())
    for opt in (first, second):
        feed(opt, 2, 1, rank, world_size)
        opt.step()
    for p, q in zip(members(first), members(second), strict=True):
        assert torch.equal(p, q)
        assert {k: v.shape for k, v in first.state[p].items()} == {k: v.shape for k, v in second.state[q].items()}


class TestNeeds:
    def needs(self, *cbs: Callable[..., Any], **hypers: Any) -> str:
        return Optimizer([torch.zeros(3), torch.zeros(())], list(cbs), lr=0.1, **hypers).needs

    def test_are_what_the_recording_shows(self) -> None:
        assert self.needs(average_grad, sign_step) == "elementwise"
        assert self.needs(unit_step) == "norm"
        assert self.needs(largest_step) == self.needs(item_step) == "whole"

    def test_a_declared_norm_counts_too(self) -> None:
        def looking(p: Tensor, **kwargs: Any) -> None: ...

        averages = {"mom": 0.9, "sqr_mom": 0.99}
        cbs = [*Adam([torch.zeros(1)]).cbs[:-1], looking, lamb_step]
        assert self.needs(*cbs, **averages) == "norm"

    def test_what_does_not_record_is_whole(self) -> None:
        assert Optimizer([torch.zeros(3)], sign_step, lr=0.1, engine="eager").needs == "whole"
        assert self.needs(sign_step) == "whole"  # an argument is missing

    def test_even_slices_of_what_needs_whole_parameters_are_refused(self) -> None:
        model = Model()
        with pytest.raises(ValueError, match=r"layout='even'.*item_step"):
            shard(Optimizer(model.parameters(), item_step, lr=0.1), model, layout="even")
        with pytest.raises(ValueError, match="layout is 'even' or 'whole', got 'odd'"):
            shard(Optimizer(model.parameters(), item_step, lr=0.1), model, layout="odd")  # type: ignore[arg-type]

    def test_the_engine_says_that_it_records(self) -> None:
        model = Model()
        opt = shard(Optimizer(model.param_groups(), unit_step, lr=0.1), model)
        assert opt.needs == "norm"
        assert {choice.executor for choice in opt.engine} <= {"foreach", "llvm"}
