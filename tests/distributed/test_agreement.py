"""Ranks that disagree get the same exception, on every rank, that says what differs; nothing hangs, nothing moves."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import fastopt
from fastopt.distributed import RanksDiffer, shard
from fastopt.distributed.checks import agreement

from .problems import Model, feed, members
from .test_wire import counted

Case = Callable[[int], Any]


def message(call: Callable[[], Any]) -> str:
    """The text of the RanksDiffer that `call` raises."""
    with pytest.raises(RanksDiffer) as caught:
        call()
    return str(caught.value)


# ---- at shard()


class Named(nn.Module):
    """Parameters of given names and shapes."""

    def __init__(self, **shapes: tuple[int, ...]) -> None:
        super().__init__()
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(shape)))


def build(model: nn.Module, **hypers: Any) -> fastopt.Optimizer:
    return fastopt.Adam(list(model.parameters()), **{"lr": 0.1, **hypers})


def two_groups(model: nn.Module, flip: bool) -> fastopt.Optimizer:
    a, b = ([p] for p in model.parameters())
    return fastopt.Adam([b, a] if flip else [a, b], lr=0.1)


def other_names(rank: int) -> Any:
    model = Named(**{"wrong" if rank == 1 else "weight": (3,), "bias": (2,)})
    return shard(build(model), model)


def other_shapes(rank: int) -> Any:
    model = Named(weight=(3, 1 + rank), bias=(2,))
    return shard(build(model), model)


def more_parameters(rank: int) -> Any:
    model = Named(**{f"p{i}": (2,) for i in range(2 + rank)})
    return shard(build(model), model)


def more_groups(rank: int) -> Any:
    model = Named(a=(2,), b=(2,))
    return shard(two_groups(model, False) if rank else build(model), model)


def other_order_of_groups(rank: int) -> Any:
    model = Named(first=(2,), second=(2,))
    return shard(two_groups(model, flip=rank == 1), model)


def other_dtype(rank: int) -> Any:
    model = Named(weight=(4,))
    return shard(build(model.double() if rank else model), model)


def other_hyper(rank: int) -> Any:
    model = Named(weight=(4,))
    return shard(build(model, lr=0.1 + rank), model)


def other_chain(rank: int) -> Any:
    model = Named(weight=(4,))
    ps = list(model.parameters())
    return shard(fastopt.SGD(ps, lr=0.1, mom=0.9) if rank else fastopt.SGD(ps, lr=0.1), model)


def other_stage(rank: int) -> Any:
    model = Named(weight=(4,))
    return shard(build(model), model, stage=1 + rank % 2)


def other_freezing(rank: int) -> Any:
    model = Named(first=(2,), second=(2,))
    opt = two_groups(model, False)
    opt.freeze_to(rank % 2)
    return shard(opt, model)


def one_is_not_of_the_model(rank: int) -> Any:
    model = Named(weight=(4,))
    other = Named(weight=(4,))
    return shard(build(other if rank == 1 else model), model)


def other_executor(rank: int) -> Any:
    model = Named(weight=(4,))
    return shard(build(model, engine="eager" if rank == 1 else "foreach"), model)


def cost_that_fails(rank: int) -> Any:
    model = Named(weight=(4,))
    return shard(build(model), model, cost=lambda p: {0: 1.0, 2: 1.0}[rank])


AT_SHARD: dict[Case, tuple[str, ...]] = {
    other_names: ("params[0] of group 0", "'weight'", "'wrong'", "rank 1"),
    other_shapes: ("'weight'", "(3, 1)", "(3, 2)", "rank 0", "rank 1"),
    more_parameters: ("params[2] of group 0", "'p2'", "nothing on rank 0"),
    more_groups: ("number of groups", "1 on rank 0"),
    other_order_of_groups: ("params[0] of group 0", "'first'", "'second'"),
    other_dtype: ("torch.float64", "torch.float32 on cpu on rank 0"),
    other_hyper: ("hyper 'lr' of group 0", "0.1 on rank 0", "1.1 on rank 1"),
    other_chain: ("chain", "average_grad", "rank 0"),
    other_executor: ("executors", "foreach on rank", "eager on rank 1"),
    other_stage: ("stage: 1 on", "2 on rank 1"),
    other_freezing: ("group 0", "frozen"),
    cost_that_fails: ("problem", "KeyError: 1 on rank 1"),
    one_is_not_of_the_model: ("problem", "not a parameter of the model", "rank 1"),
}


def refused(rank: int, world_size: int) -> list[str]:
    told = []
    for case in AT_SHARD:
        told.append(message(lambda case=case: case(rank)))
    shard_works_afterwards(rank)
    return told


def shard_works_afterwards(rank: int) -> None:
    model = Named(weight=(4,))
    opt = shard(build(model), model)
    model.weight.grad = torch.ones(4)
    opt.step()


@pytest.mark.parametrize("world_size", [2, 3])
def test_shard_refuses_ranks_that_differ(ranks: Any, world_size: int) -> None:
    told = ranks(world_size).run(refused)
    for i, (case, says) in enumerate(AT_SHARD.items()):
        assert len({each[i] for each in told}) == 1, f"{case.__name__}: not the same on all ranks"
        for words in says:
            assert words in told[0][i], f"{case.__name__}: {words!r} is not in {told[0][i]!r}"


# ---- at a step


def differ_at_step(rank: int, world_size: int) -> list[str]:
    """Hypers and freezing that differ on one rank; once they agree, training goes on as if nothing had been."""
    told = []
    for stage in (1, 2):
        model = Model()
        opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model, stage=stage)
        feed(opt, stage, 0, rank, world_size)
        opt.step()
        before = [p.detach().clone() for p in model.parameters()]
        steps = [entry["step"] for entry in opt.state.values()]

        def check(breaks: Callable[[], Any], mends: Callable[[], Any], opt=opt, stage=stage, model=model) -> None:
            feed(opt, stage, 1, rank, world_size)
            if rank == world_size - 1:
                breaks()
            told.append(message(opt.step))
            mends()
            opt.zero_grad(set_to_none=True)
            assert all(map(torch.equal, before, model.parameters()))  # noqa: B023
            assert [entry["step"] for entry in opt.state.values()] == steps  # noqa: B023

        lrs = [h["lr"] for h in opt.hypers]
        check(lambda o=opt: o.set_hyper("lr", slice(0.1, 0.4)), lambda o=opt, v=lrs: o.set_hyper("lr", v))
        check(lambda o=opt: o.hypers[1].update(mom=0.5), lambda o=opt: o.hypers[1].update(mom=0.9))
        check(lambda o=opt: o.freeze_to(1), lambda o=opt: o.unfreeze())
        check(
            lambda o=opt: o.state[members(o)[2]].update(do_wd=False),
            lambda o=opt: o.state[members(o)[2]].pop("do_wd", None),
        )
        feed(opt, stage, 1, rank, world_size)
        opt.step()
        assert not all(map(torch.equal, before, model.parameters()))
    return told


def test_a_step_refuses_ranks_that_differ(ranks: Any) -> None:
    told = ranks(3).run(differ_at_step)
    assert told[0] == told[1] == told[2]
    for lr, mom, frozen, undecayed in (told[0][:4], told[0][4:]):
        assert "hyper 'lr' of group 1: 0.05 on ranks 0, 1; 0.2" in lr
        assert "hyper 'mom' of group 1: 0.9 on ranks 0, 1; 0.5 on rank 2" in mom
        assert "group 0: not frozen on ranks 0, 1; frozen on rank 2" in frozen
        assert "do_wd of 'g0.2': True on ranks 0, 1; False on rank 2" in undecayed


def differ_in_backward(rank: int, world_size: int) -> list[str]:
    """Freezing that differs is noticed in the backward pass, clipping on one rank only in the next message."""
    told = []
    model = Model()
    opt = shard(fastopt.SGD(model.param_groups(), lr=0.1), model)
    if rank == 1:
        opt.freeze_to(1)
    loss = sum(p.sum() for p in model.parameters())
    assert isinstance(loss, torch.Tensor)
    told.append(message(loss.backward))
    opt.unfreeze()
    opt.zero_grad(set_to_none=True)

    feed(opt, 2, 0, rank, world_size)
    told.append(message(opt.step if rank else lambda: opt.clip_grad_norm_(1.0)))
    return told


def test_ranks_in_different_places_are_told(ranks: Any) -> None:
    told = ranks(2).run(differ_in_backward)
    assert told[0] == told[1]
    frozen, places = told[0]
    assert "group 0: not frozen on rank 0; frozen on rank 1" in frozen
    assert "where they are: clip_grad_norm_, after 0 steps on rank 0; step, after 0 steps on rank 1" in places
    assert "hyper" not in places


def hyper_between(rank: int, world_size: int) -> str:
    """A hyper that differs is the step's matter, not the backward pass's."""
    model = Model()
    opt = shard(fastopt.SGD(model.param_groups(), lr=0.1), model)
    opt.set_hyper("lr", 0.1 + rank)
    loss = sum(p.sum() for p in model.parameters())
    assert isinstance(loss, torch.Tensor)
    loss.backward()
    told = message(opt.step)
    opt.set_hyper("lr", 0.2)
    before = [p.detach().clone() for p in model.parameters()]
    opt.step()
    for p, q in zip(model.parameters(), before, strict=True):
        torch.testing.assert_close(p.detach(), q - 0.2)
    return told


def test_a_hyper_that_differs_after_backward_keeps_the_gradients(ranks: Any) -> None:
    told = ranks(2).run(hyper_between)
    assert told[0] == told[1]
    assert "hyper 'lr' of group 0: 0.1 on rank 0; 1.1 on rank 1" in told[0]


def hyper_after_backward(rank: int, world_size: int, odd_step: int, clip: bool) -> tuple[str, int]:
    """A hyper that is set between backward and step, as some training loops do; on one rank another value, once."""
    model = nn.Sequential(nn.Linear(3, 4), nn.Linear(4, 2))
    opt = shard(fastopt.Adam([list(layer.parameters()) for layer in model], lr=0.1), model)
    for step in range(4):
        model(torch.ones(1, 3)).sum().backward()
        before = [p.detach().clone() for p in model.parameters()]
        try:
            if clip:
                opt.clip_grad_norm_(1.0)
            opt.set_hyper("lr", 0.5 if (rank, step) == (2, odd_step) else 0.1 / (step + 2))
            opt.step()
        except RanksDiffer as error:
            assert all(map(torch.equal, before, model.parameters()))
            opt.set_hyper("lr", 0.1)
            opt.step()  # with the gradients that are there
            opt.synchronize()
            assert not any(map(torch.equal, before, model.parameters()))
            return str(error), step
        opt.zero_grad()
    raise AssertionError("nobody was told")


@pytest.mark.parametrize("clip", [False, True])
def test_a_hyper_set_after_backward_is_compared_before_the_step_once_it_is_known_to_be_set_there(
    ranks: Any, clip: bool
) -> None:
    """The first time it is compared with the next backward pass, and the message names the step that has used it."""
    for odd_step in (0, 1, 2):
        told = ranks(3).run(hyper_after_backward, odd_step, clip)
        assert told[0] == told[1] == told[2]
        text, raised_in = told[0]
        value = 0.1 / (odd_step + 2)
        where = " in step 0" if odd_step == 0 else ""
        assert f"hyper 'lr' of group 1{where}: {value} on ranks 0, 1; 0.5 on rank 2" in text
        assert raised_in == (1 if odd_step == 0 else odd_step)


def messages_of_late_hypers(rank: int, world_size: int) -> list[int]:
    """How many messages each step costs whose hypers are set late in some of them."""
    model = nn.Linear(3, 4)
    opt = shard(fastopt.Adam(model.parameters(), lr=0.1), model)
    made = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(agreement, "LATE", 3)
        for late in (False, False, True, False, False, False, False, True, True, False, False, False, False):
            with counted() as calls:
                model(torch.ones(1, 3)).sum().backward()
                if late:
                    opt.set_hyper("lr", opt.hypers[0]["lr"] / 2)
                opt.step()
                opt.zero_grad()
            made.append(sum(name == "control" for name, _ in calls))
    return made


def test_a_message_compares_late_hypers_only_where_there_have_been_some(ranks: Any) -> None:
    for made in ranks(2).run(messages_of_late_hypers):
        assert made == [0, 0, 0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0]


def problem_on_one_rank(rank: int, world_size: int) -> list[str]:
    """Something only one rank has done wrong stops all of them."""
    model = Model()
    opt = shard(fastopt.SGD(model.param_groups(), lr=0.1), model, stage=1)
    feed(opt, 1, 0, rank, world_size)
    first = next(model.parameters())
    if rank == 1:
        first.data = first.detach().clone()
    told = [message(opt.step)]

    model = Model()
    opt = shard(fastopt.SGD(model.param_groups(), lr=0.1), model)
    if rank == 1:
        first = next(model.parameters())
        first.grad = torch.sparse_coo_tensor([[0], [1]], [1.0], first.shape, check_invariants=True)
    told.append(message(opt.step))
    return told


def test_a_problem_on_one_rank_is_raised_on_all(ranks: Any) -> None:
    told = ranks(2).run(problem_on_one_rank)
    assert told[0] == told[1]
    assert "the memory of 'g0.0' was replaced" in told[0][0]
    assert "nothing on rank 0" in told[0][0]
    assert "the gradient of 'g0.0' is sparse" in told[0][1]


def add_group_differs(rank: int, world_size: int) -> list[str]:
    model = Model()
    *first, last = model.param_groups()
    opt = shard(fastopt.Adam(first, lr=0.1), model)
    told = [message(lambda: opt.add_param_group({**last, "lr": 0.1 * (rank + 1)}))]
    assert len(opt.param_groups) == 2
    stranger = [torch.zeros(3, requires_grad=True)]
    told.append(message(lambda: opt.add_param_group({"params": stranger} if rank else last)))
    assert len(opt.param_groups) == 2
    with pytest.raises(ValueError, match="not a parameter of the model"):
        opt.add_param_group({"params": stranger})
    return told


def test_add_param_group_refuses_ranks_that_differ(ranks: Any) -> None:
    told = ranks(2).run(add_group_differs)
    assert told[0] == told[1]
    assert "hyper 'lr' of group 2: 0.1 on rank 0; 0.2 on rank 1" in told[0][0]
    assert "not a parameter of the model" in told[0][1]


# ---- what cannot be sharded, in one process


def sparse_model() -> tuple[Any, nn.Module]:
    model = nn.Sequential(nn.Embedding(5, 2, sparse=True))
    return build(model), model


def meta_model() -> tuple[Any, nn.Module]:
    with torch.device("meta"):
        model = nn.Linear(2, 2)
    return build(model), model


def complex_model() -> tuple[Any, nn.Module]:
    model = nn.Linear(2, 2, dtype=torch.complex64)
    return fastopt.SGD(model.parameters(), lr=0.1), model


def memory_in_common() -> tuple[Any, nn.Module]:
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = nn.Parameter(model[0].weight.data[1:])
    return build(model), model


def scripted_model() -> tuple[Any, nn.Module]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        model = nn.Sequential(torch.jit.script(nn.Linear(2, 2)))
    return build(model), model


def torch_optimizer() -> tuple[Any, nn.Module]:
    model = nn.Linear(2, 2)
    return torch.optim.SGD(model.parameters(), lr=0.1), model


def closure_optimizer() -> tuple[Any, nn.Module]:
    model = nn.Linear(2, 2)
    return fastopt.OptimWrapper(torch.optim.LBFGS(model.parameters())), model


def sharded_already() -> tuple[Any, nn.Module]:
    model = nn.Linear(2, 2)
    return shard(build(model), model), model


@pytest.mark.parametrize(
    ("make", "error", "says"),
    [
        (sparse_model, ValueError, "sparse=False"),
        (meta_model, ValueError, "'weight' is on the meta device"),
        (complex_model, ValueError, "'weight' is complex"),
        (memory_in_common, ValueError, r"'0.weight' and '1.weight' are different parameters in the same memory"),
        (scripted_model, ValueError, "'0' has been compiled by torch.jit"),
        (torch_optimizer, TypeError, "OptimWrapper"),
        (closure_optimizer, TypeError, "LBFGS couples all parameters"),
        (sharded_already, TypeError, "sharded already"),
    ],
)
def test_what_cannot_be_sharded_is_named(make: Callable[[], Any], error: type[Exception], says: str) -> None:
    opt, model = make()
    with pytest.raises(error, match=says):
        shard(opt, model)


@pytest.mark.parametrize(("stage", "says"), [(3, "fully_shard"), (0, "stage is 1 or 2"), ("2", "stage is 1 or 2")])
def test_unknown_stages_are_refused(stage: Any, says: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match=says):
        shard(build(model), model, stage=stage)


def test_a_model_that_is_none_is_refused() -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=r"nn\.Module, got a list"):
        shard(build(model), list(model.parameters()))  # type: ignore[arg-type]


def test_the_optimizer_within_does_not_step() -> None:
    model = nn.Linear(2, 2)
    inner = build(model)
    sharded = shard(inner, model)
    for attempt in (inner.step, inner.state_dict, lambda: inner.load_state_dict(sharded.state_dict())):
        with pytest.raises(RuntimeError, match="has been sharded"):
            attempt()
    with pytest.raises(TypeError, match="has been sharded, and holds only"):
        shard(inner, model)
    assert sharded.opt is inner
    assert sharded.param_groups is inner.param_groups
