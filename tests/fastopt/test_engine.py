"""The executor: order of calls, what a cb is given, partials, missing names, and norms over cut parameters."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import (
    SGD,
    Adam,
    Lamb,
    Larc,
    Optimizer,
    RAdam,
    Ranger,
    adam_step,
    average_grad,
    average_sqr_grad,
    lamb_step,
    larc_layer_lr,
    momentum_step,
    sgd_step,
    step_stat,
    weight_decay,
    whole_norm,
    whole_rms,
)
from fastopt.engine import GroupWork, run

from .samples import NATIVE, Case, every_native, give_grads, tensors


class TestCalls:
    def test_group_by_group_parameter_by_parameter_cb_by_cb(self) -> None:
        a, b, c = tensors((1,), (2,), (3,))
        seen: list[tuple[str, int]] = []

        def first(p: Tensor, **kwargs: Any) -> None:
            seen.append(("first", p.numel()))

        def second(p: Tensor, **kwargs: Any) -> None:
            seen.append(("second", p.numel()))

        opt = Optimizer([[a, b], [c]], [first, second])
        give_grads([a, b, c], 0)
        opt.step()
        assert seen == [(name, n) for n in (1, 2, 3) for name in ("first", "second")]

    def test_a_cb_gets_state_and_hypers_and_hypers_win(self) -> None:
        (p,) = tensors((2,))
        given: dict[str, Any] = {}

        def look(p: Tensor, **kwargs: Any) -> dict[str, Any]:
            given.update(kwargs)
            return {"seen": kwargs.get("seen", 0) + 1, "lr": 99}

        opt = Optimizer([p], look, lr=0.1, extra="x")
        opt.state[p] = {"do_wd": False}
        give_grads([p], 0)
        opt.step()
        opt.step()
        assert given == {"lr": 0.1, "extra": "x", "do_wd": False, "seen": 1}
        assert opt.state[p]["seen"] == 2

    def test_what_a_cb_returns_is_seen_by_the_next(self) -> None:
        (p,) = tensors((2,))
        seen = []

        def make(p: Tensor, **kwargs: Any) -> dict[str, int]:
            return {"made": 7}

        def use(p: Tensor, made: int, **kwargs: Any) -> str:
            seen.append(made)
            return "ignored"

        give_grads([p], 0)
        opt = Optimizer([p], [make, use])
        opt.step()
        assert seen == [7]
        assert opt.state[p] == {"made": 7}

    def test_gradients_are_off_inside(self) -> None:
        (p,) = tensors((2,), requires_grad=True)
        modes = []

        def look(p: Tensor, **kwargs: Any) -> None:
            modes.append(torch.is_grad_enabled())
            p.mul_(2)

        give_grads([p], 0)
        Optimizer([p], look).step()
        assert modes == [False]
        assert torch.is_grad_enabled()

    def test_a_chain_may_be_empty(self) -> None:
        (p,) = tensors((2,))
        give_grads([p], 0)
        before = p.clone()
        opt = Optimizer([p], None)
        opt.step()
        assert torch.equal(p, before)
        assert opt.hypers == [{}]

    def test_users_own_state_and_hyper(self) -> None:
        (p,) = tensors((3,))

        def total(p: Tensor, weight: float, sum: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
            assert p.grad is not None
            return {"sum": p.grad * weight + (0 if sum is None else sum)}

        total.defaults = {"weight": 2.0}  # type: ignore[attr-defined]
        opt = Optimizer([p], total)
        p.grad = torch.ones(3)
        opt.step()
        opt.hypers[0]["weight"] = 0.5
        opt.step()
        torch.testing.assert_close(opt.state[p]["sum"], torch.full((3,), 2.5))

    def test_a_callable_object_without_a_hash(self) -> None:
        class Add:
            __hash__ = None  # type: ignore[assignment]

            def __call__(self, p: Tensor, amount: float, **kwargs: Any) -> None:
                p.add_(amount)

        (p,) = tensors((2,))
        start = p.clone()
        give_grads([p], 0)
        Optimizer([p], Add(), amount=1.0).step()
        torch.testing.assert_close(p, start + 1)
        with pytest.raises(TypeError, match="Add needs 'amount'"):
            Optimizer([p], Add()).step()


class TestDefaults:
    def test_gathered_in_order_then_overridden(self) -> None:
        def one(p: Tensor, **kwargs: Any) -> None: ...
        def two(p: Tensor, **kwargs: Any) -> None: ...

        one.defaults = {"a": 1, "b": 1}  # type: ignore[attr-defined]
        two.defaults = {"b": 2, "c": 2}  # type: ignore[attr-defined]
        assert Optimizer([1], [one, two], c=3).hypers == [{"a": 1, "b": 2, "c": 3}]
        assert one.defaults == {"a": 1, "b": 1}  # type: ignore[attr-defined]

    def test_through_a_partial(self) -> None:
        assert Optimizer([1], partial(average_grad, dampening=True)).hypers == [{"mom": 0.9}]
        assert Optimizer([1], partial(partial(average_grad, dampening=True))).hypers == [{"mom": 0.9}]

    def test_an_argument_that_a_partial_binds_is_no_hyper(self) -> None:
        (p,) = tensors((2,))
        opt = Optimizer([p], [partial(average_grad, mom=0.5), momentum_step], lr=0.1)
        assert opt.hypers == [{"lr": 0.1}]
        give_grads([p], 0)
        opt.step()

    def test_eps_of_a_composed_adam_comes_along(self) -> None:
        (p,) = tensors((2,))
        opt = Optimizer([p], [average_grad, average_sqr_grad, step_stat, adam_step], lr=0.1)
        give_grads([p], 0)
        opt.step()
        assert opt.hypers[0]["eps"] == 1e-5


class TestMissing:
    def test_a_hyper(self) -> None:
        (p,) = tensors((2,))
        give_grads([p], 0)
        with pytest.raises(TypeError, match=r"sgd_step needs 'lr' in group 0.*Pass it to the optimizer"):
            Optimizer([p], sgd_step).step()

    def test_a_stat(self) -> None:
        a, b = tensors((2,), (3,))
        give_grads([b], 0)
        opt = Optimizer([[a], [b]], [weight_decay, adam_step], lr=0.1, mom=0.9, sqr_mom=0.9)
        with pytest.raises(TypeError, match=r"adam_step needs 'step', 'grad_avg', 'sqr_avg' in group 1.*put the stat"):
            opt.step()

    def test_in_a_partial(self) -> None:
        (p,) = tensors((2,))
        give_grads([p], 0)
        opt = Optimizer([p], partial(average_grad, dampening=True))
        del opt.hypers[0]["mom"]
        with pytest.raises(TypeError, match="average_grad needs 'mom'"):
            opt.step()

    def test_nothing_of_that_parameter_has_moved(self) -> None:
        (p,) = tensors((2,))
        give_grads([p], 0)
        before = p.clone()
        opt = Optimizer([p], [weight_decay, momentum_step], lr=0.1, wd=0.5)
        with pytest.raises(TypeError, match="momentum_step needs 'grad_avg'"):
            opt.step()
        assert torch.equal(p, before) or not opt.state


class TestNeeds:
    @pytest.mark.parametrize(
        ("build", "needs"),
        [(SGD, "elementwise"), (Adam, "elementwise"), (Ranger, "elementwise"), (Larc, "norm"), (Lamb, "norm")],
    )
    def test_of_the_library(self, build: Callable[..., Optimizer], needs: str) -> None:
        assert build(tensors((2,))).needs == needs

    def test_the_largest_wins_and_unknown_is_whole(self) -> None:
        def mine(p: Tensor, **kwargs: Any) -> None: ...

        assert Optimizer([1], None).needs == "elementwise"
        assert Optimizer([1], [sgd_step, lamb_step]).needs == "norm"
        assert Optimizer([1], [sgd_step, partial(larc_layer_lr, clip=False)]).needs == "norm"
        assert Optimizer([1], [lamb_step, mine]).needs == "whole"
        mine.needs = "elementwise"  # type: ignore[attr-defined]
        assert Optimizer([1], [lamb_step, mine]).needs == "norm"
        mine.needs = "nothing"  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"mine.needs is 'nothing'"):
            _ = Optimizer([1], mine).needs


class TestChoice:
    def test_says_which_runs_and_why(self, monkeypatch: pytest.MonkeyPatch) -> None:
        a, b = tensors((2,), (3,))
        monkeypatch.setattr("fastopt.engine.run.llvm_is_there", lambda: False)
        opt = Adam([[a], [b]])
        assert [(c.group, c.executor) for c in opt.engine] == [(0, "foreach"), (1, "foreach")]
        assert "fastopt[cpu]" in opt.engine[0].reason
        assert SGD([a], engine="eager").engine[0] == (0, "eager", "chosen by engine=")
        assert Lamb([a]).engine[0].executor == SGD([a]).engine[0].executor == "eager"
        assert "few operations" in SGD([a]).engine[0].reason
        assert Lamb([a], engine="foreach").engine[0].executor == "foreach"
        assert SGD([a], engine="triton").engine[0] == (0, "foreach", "triton, chosen by engine=, cannot run it here")

    def test_a_chain_that_runs_as_it_is_is_not_sorted_in_every_step(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr("fastopt.engine.run.llvm_is_there", lambda: False)
        sorted_, real = [0], run.make_cohorts

        def counted(*args: Any) -> Any:
            sorted_[0] += 1
            return real(*args)

        monkeypatch.setattr(run, "make_cohorts", counted)
        (p,) = tensors((2,))
        opt = SGD([p], lr=1.0)
        for _ in range(40):
            p.grad = torch.ones(2)
            opt.step()
        assert opt.engine[0].executor == "eager"
        assert sorted_[0] == 2

    def test_on_cpus_chains_are_compiled_where_that_is_possible(self) -> None:
        pytest.importorskip("llvmlite")
        a, b = tensors((2,), (3,))
        assert {c.executor for c in Lamb([[a], [b]]).engine} == {"llvm"}
        softplus = RAdam([a], beta=50.0, sqr_mom=0.9)
        for _ in range(9):
            a.grad = torch.ones(2)
            softplus.step()
        assert softplus.engine[0].executor == "foreach"
        assert "not compiled" in softplus.engine[0].reason

    def test_an_unknown_one_is_refused_at_once(self, monkeypatch: pytest.MonkeyPatch) -> None:
        with pytest.raises(ValueError, match=r"'warp'.*choose from.*eager"):
            SGD(tensors((2,)), engine="warp")
        monkeypatch.setenv("FASTOPT_ENGINE", "warp")
        with pytest.raises(ValueError, match="FASTOPT_ENGINE"):
            SGD(tensors((2,)))


# ---- norms of parameters that are cut


class Ranks:
    """`n` processes played by threads: `reduce` adds up what all of them hand in, as an all-reduce does."""

    def __init__(self, n: int) -> None:
        self.n, self.barrier = n, threading.Barrier(n, timeout=20)
        self.given: list[Tensor] = [torch.zeros(0)] * n
        self.calls = 0

    def reduce_of(self, rank: int) -> Callable[[Tensor], Tensor]:
        def reduce(x: Tensor) -> Tensor:
            assert x.dtype == torch.float64
            assert x.ndim == 1
            self.given[rank] = x
            self.barrier.wait()
            total = torch.stack(self.given).sum(0)
            if rank == 0:
                self.calls += 1
            self.barrier.wait()
            return total

        return reduce

    def run(self, fn: Callable[[int], None]) -> None:
        """`fn(rank)` in one thread per rank."""
        errors: list[BaseException] = []

        def safely(rank: int) -> None:
            try:
                fn(rank)
            except BaseException as e:
                errors.append(e)
                self.barrier.abort()

        threads = [threading.Thread(target=safely, args=(rank,)) for rank in range(self.n)]
        for t in threads:
            t.start()
        for t in threads:
            t.join()
        if errors:
            raise errors[0]


def cuts(numel: int, n: int) -> list[slice]:
    """`n` slices of uneven sizes, some of them empty."""
    edges = [0, *((numel * (i * i + 1)) // (n * n + 1) for i in range(1, n)), numel]
    return [slice(a, b) for a, b in pairwise(edges)]


SHAPES = [(5, 3), (7,), (), (1, 2), (0,)]


@pytest.mark.parametrize("case", [c for c in NATIVE if "Lookahead" not in c.name], ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_slices_on_several_ranks_equal_the_whole(case: Case, n: int, dtype: torch.dtype) -> None:
    whole = tensors(*SHAPES, dtype=dtype)
    opt = case([whole[:2], whole[2:]], lr=[0.1, 0.3])
    flats = [p.flatten().clone() for p in whole]
    parts = [[f[cuts(f.numel(), n)[rank]].clone() for f in flats] for rank in range(n)]
    states: list[list[dict[str, Any]]] = [[{} for _ in SHAPES] for _ in range(n)]
    chains = [case([whole[:2], whole[2:]], lr=[0.1, 0.3]) for _ in range(n)]
    ranks = Ranks(n)
    for step in range(6):
        give_grads(whole, step)
        grads = [p.grad.flatten() for p in whole if p.grad is not None]

        def one(rank: int, grads: list[Tensor] = grads) -> None:
            for part, g in zip(parts[rank], grads, strict=True):
                part.grad = g[cuts(g.numel(), n)[rank]].clone()
            chain = chains[rank]
            work = [
                GroupWork(0, chain.param_groups[0], chain.hypers_of(0), parts[rank][:2], list(states[rank][:2])),
                GroupWork(1, chain.param_groups[1], chain.hypers_of(1), parts[rank][2:], list(states[rank][2:])),
            ]
            chain.run(work, ranks.reduce_of(rank))

        ranks.run(one)
        opt.step()
    for i, p in enumerate(whole):
        found = torch.cat([parts[rank][i] for rank in range(n)])
        if opt.needs == "elementwise":
            assert torch.equal(found, p.flatten())
        else:
            torch.testing.assert_close(found, p.flatten(), rtol=1e-11 if dtype == torch.float64 else 1e-5, atol=1e-12)
    assert ranks.calls == (6 if opt.needs == "norm" else 0)  # one for all parameters of all groups


@every_native
def test_run_without_a_reduce_is_a_step(case: Case) -> None:
    a, b = tensors((2, 3), (4,)), tensors((2, 3), (4,))
    one, two = case(a, lr=0.1), case(b, lr=0.1)
    states: list[dict[str, Any]] = [{}, {}]
    for step in range(5):
        give_grads(a, step)
        give_grads(b, step)
        one.step()
        two.run([two.group_work(0, b, states)])
    assert all(torch.equal(p, q) for p, q in zip(a, b, strict=True))
    assert [sorted(s) for s in states] == [sorted(one.state[p]) for p in a]


def test_norms_asked_for_one_after_the_other() -> None:
    """A user's cb with two rounds of norms, the second of something made from the first."""

    def unit_step(p: Tensor, lr: float, **kwargs: Any) -> dict[str, Tensor]:
        assert p.grad is not None
        (g,) = whole_norm(p.grad)
        direction = p.grad / g
        rms, other = whole_rms(direction, p)
        p.sub_(direction, alpha=lr)
        return {"rms": rms, "other": other}

    unit_step.needs = "norm"  # type: ignore[attr-defined]
    whole = torch.arange(1.0, 7.0, dtype=torch.float64)
    grad = torch.linspace(1.0, 2.0, 6, dtype=torch.float64)
    parts = [whole[:4].clone(), whole[4:].clone()]
    states: list[dict[str, Any]] = [{}, {}]
    ranks, opt = Ranks(2), Optimizer([torch.zeros(6)], unit_step, lr=0.5)

    def one(rank: int) -> None:
        parts[rank].grad = (grad[:4] if rank == 0 else grad[4:]).clone()
        opt.run([opt.group_work(0, [parts[rank]], [states[rank]])], ranks.reduce_of(rank))

    ranks.run(one)
    norm = float((grad**2).sum() ** 0.5)
    torch.testing.assert_close(torch.cat(parts), whole - 0.5 * grad / norm)
    for s in states:
        torch.testing.assert_close(s["rms"], torch.tensor(6**-0.5, dtype=torch.float64))
        torch.testing.assert_close(s["other"], torch.tensor(float((whole**2).mean() ** 0.5), dtype=torch.float64))
    assert ranks.calls == 2


def test_norms_in_one_process() -> None:
    x, y = tensors((3, 4), (5,), dtype=torch.bfloat16)
    n1, n2 = whole_norm(x, y)
    assert n1.dtype == torch.float32
    assert n1.shape == ()
    assert float(n2) == pytest.approx(float((y.double() ** 2).sum() ** 0.5), rel=1e-5)
    (r,) = whole_rms(x)
    assert float(r) == pytest.approx(float((x.double() ** 2).mean() ** 0.5), rel=1e-5)
    assert float(whole_rms(torch.zeros(0))[0]) == 0.0


def test_an_error_in_a_norm_cb_does_not_leave_the_engine_waiting() -> None:
    def bad(p: Tensor, **kwargs: Any) -> None:
        whole_norm(p)
        raise RuntimeError("no")

    bad.needs = "norm"  # type: ignore[attr-defined]
    (p,) = tensors((2,))
    give_grads([p], 0)
    opt = Optimizer([p], bad)
    with pytest.raises(RuntimeError, match="no"):
        opt.run([opt.group_work(0, [p], [{}])], lambda x: x)
    (norm,) = whole_norm(torch.ones(4))
    assert float(norm) == 2.0


@pytest.mark.parametrize(("cbs", "named"), [(3, "cbs is a int"), ([sgd_step, "adam"], r"cbs\[1\] is a str")])
def test_what_cannot_be_called_is_named(cbs: object, named: str) -> None:
    with pytest.raises(TypeError, match=named):
        Optimizer([torch.zeros(2)], cbs, lr=0.1)


def test_a_chain_that_moves_nothing_is_said_once() -> None:
    def renames(p: Tensor, lr: float, **kwargs: Any) -> None:
        p = p - lr * p.grad

    (p,) = tensors((2,))
    opt = Optimizer([p], [average_grad, renames], lr=0.1)
    p.grad = torch.ones(2)
    with pytest.warns(UserWarning, match="moved no parameter, though renames asks for lr: change p in place"):
        opt.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt.step()
        Optimizer([p], [average_grad]).step()
        half = p.bfloat16()
        half.grad = p.grad.bfloat16()
        SGD([half], lr=0.0, master_weights=True, engine="foreach").step()
