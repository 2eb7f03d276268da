"""Lookahead as a chain: what it keeps where, whom it touches, and that it shares the optimizer it is around."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from fastopt import SGD, Adam, Lookahead, Optimizer, OptimWrapper, RAdam, Ranger, ranger
from fastopt.cbs import lookahead_start, lookahead_step

from .samples import assert_same, backward, give_grads, model, run_steps, tensors, train, values


def test_five_steps_of_sgd_then_half_way_back() -> None:
    (p,) = tensors((3,))
    start, grad = p.clone(), torch.tensor([0.1, 0.2, 0.3])
    opt = Lookahead(SGD([p], lr=0.1))
    p.grad = grad.clone()
    for _ in range(5):
        opt.step()
    torch.testing.assert_close(p, start - 0.5 * grad)
    opt.step()
    torch.testing.assert_close(p, start - 0.3 * grad)
    torch.testing.assert_close(opt.state[p]["slow_weights"], p)


def test_it_is_a_chain() -> None:
    inner = SGD(tensors((3,)), lr=0.1, mom=0.9)
    opt = Lookahead(inner, k=3, alpha=0.25)
    assert isinstance(opt, Optimizer)
    assert opt.cbs == (lookahead_start, *inner.cbs, lookahead_step)
    assert opt.needs == "elementwise"
    assert (opt.hypers[0]["k"], opt.hypers[0]["alpha"]) == (3, 0.25)
    assert set(opt.state_dict()) == {"state", "param_groups"}


def test_k_and_alpha_per_group() -> None:
    a, b = tensors((1,), (1,))
    opt = Lookahead(SGD([[a], [b]], lr=1.0), k=[1, 2], alpha=[0.25, 0.5])
    start = values([a, b])
    for p in (a, b):
        p.grad = torch.ones(1)
    opt.step()
    torch.testing.assert_close([a, b], [start[0] - 0.25, start[1] - 1.0])
    opt.step()
    torch.testing.assert_close(b, start[1] - 1.0)


def test_counts_per_parameter_and_touches_only_what_steps() -> None:
    a, b = tensors((2,), (2,))
    opt = Lookahead(SGD([a, b], lr=0.1), k=2)
    for step in range(3):
        give_grads([a], step)
        opt.step()
    assert b not in opt.state
    assert opt.state[a]["count"] == 3
    raised = b + 8
    b.copy_(raised)
    give_grads([b], 0)
    grad = b.grad
    assert grad is not None
    opt.step()
    torch.testing.assert_close(b, raised - 0.1 * grad)
    assert opt.state[b]["count"] == 1


@pytest.mark.parametrize("lr", [0.5, torch.tensor(0.5)], ids=["number", "tensor"])
def test_a_zero_lr_pulls_nothing_back(lr: Any) -> None:
    params = tensors((3,))
    opt = Lookahead(SGD(params, lr=lr), k=2)
    run_steps(opt, params, [0])
    before = values(params)
    opt.set_hyper("lr", 0.0)
    run_steps(opt, params, [1])
    assert opt.state[params[0]]["count"] == 2
    assert_same(params, before)
    opt.set_hyper("lr", 0.5)
    run_steps(opt, params, [2, 3])
    assert not torch.equal(params[0], before[0])


class TestSharing:
    """Groups and state are the inner optimizer's, whoever replaces them."""

    @pytest.mark.parametrize(
        "inner", [lambda p: SGD(p, lr=0.1), lambda p: OptimWrapper(p, opt=torch.optim.SGD, lr=0.1)]
    )
    def test_after_a_load_and_after_assignments(self, inner: Callable[[Any], Optimizer]) -> None:
        m = model()
        fast = inner(m.parameters())
        opt = Lookahead(fast, k=2)
        train(m, opt, range(3))
        opt.load_state_dict(copy.deepcopy(opt.state_dict()))
        for a, b in ((opt, fast), (fast, opt)):
            assert a.param_groups[0] is b.param_groups[0]
            assert a.state[next(m.parameters())] is b.state[next(m.parameters())]
            a.param_groups = [{**g, "lr": g["lr"] * 2} for g in a.param_groups]
            assert b.param_groups[0]["lr"] == a.param_groups[0]["lr"]
            a.clear_state()
            assert not b.state
            train(m, opt, range(2))
            assert b.state

    def test_a_scheduler_on_the_inner_optimizer(self) -> None:
        m = model()
        fast = SGD(m.parameters(), lr=1.0)
        opt = Lookahead(fast)
        sched = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        opt.load_state_dict(opt.state_dict())
        backward(m, 0)
        opt.step()
        sched.step()
        fast.set_hyper("mom", 0.5)
        assert (fast.hypers[0]["lr"], opt.hypers[0]["mom"]) == (0.5, 0.5)

    def test_freezing_is_shared(self) -> None:
        a, b = tensors((2,), (2,), requires_grad=True)
        fast = SGD([[a], [b]], lr=0.1)
        opt = Lookahead(fast)
        opt.freeze()
        assert [fast.is_frozen(0), opt.is_frozen(0)] == [True, True]
        assert fast.frozen_idx == opt.frozen_idx == 1
        fast.unfreeze()
        assert not opt.is_frozen(0)
        assert opt.frozen_idx == 0

    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
    )
    @pytest.mark.parametrize(
        "inner", [lambda p: Adam(p, lr=0.1), lambda p: OptimWrapper(p, opt=torch.optim.AdamW, lr=0.1)]
    )
    def test_copies(self, how: Callable[[Any], Any], inner: Callable[[Any], Optimizer]) -> None:
        m = model()
        opt = Lookahead(inner(m.parameters()), k=2)
        train(m, opt, range(3))
        n, twin = how((m, opt))
        before = values(m.parameters())
        train(n, twin, range(3, 6))
        assert_same(m.parameters(), before)
        train(m, opt, range(3, 6))
        assert_same(m.parameters(), n.parameters())
        assert twin.opt.param_groups[0] is twin.param_groups[0]
        assert twin.opt is not opt.opt


def test_a_group_added_later_has_k_and_alpha() -> None:
    a, b = tensors((2,), (3,))
    opt = Lookahead(Adam([a]), k=3, alpha=0.25)
    opt.add_param_group({"params": [b], "k": 1})
    assert [(h["k"], h["alpha"]) for h in opt.hypers] == [(3, 0.25), (1, 0.25)]
    run_steps(opt, [a, b], [0])


@pytest.mark.parametrize("wrong", [3, None, tensors((2,))])
def test_it_needs_an_optimizer(wrong: Any) -> None:
    with pytest.raises(TypeError, match="Lookahead needs an optimizer"):
        Lookahead(wrong)


def test_an_optimizer_that_evaluates_the_loss_is_refused() -> None:
    with pytest.raises(TypeError, match="LBFGS evaluates the loss itself"):
        Lookahead(torch.optim.LBFGS([torch.ones(2, requires_grad=True)]))


def test_two_of_them_are_refused() -> None:
    with pytest.raises(ValueError, match="already"):
        Lookahead(Lookahead(SGD(tensors((2,)))))


@pytest.mark.parametrize("build", [ranger, Ranger])
def test_ranger_is_lookahead_around_radam(build: Callable[..., Optimizer]) -> None:
    m, n = model(), model()
    one = build(m.parameters(), lr=0.05, k=3, alpha=0.25, sqr_mom=0.9, beta=5.0, decouple_wd=False, wd=0.1)
    radam = RAdam(n.parameters(), lr=0.05, mom=0.95, sqr_mom=0.9, eps=1e-6, wd=0.1, beta=5.0, decouple_wd=False)
    two = Lookahead(radam, k=3, alpha=0.25)
    train(m, one, range(8))
    train(n, two, range(8))
    assert_same(m.parameters(), n.parameters())
    assert isinstance(one, Lookahead)


@pytest.mark.parametrize("ours", [{"wd": 0.5, "mom": 0.4, "sqr_mom": 0.6}, {"weight_decay": 0.5, "betas": (0.4, 0.6)}])
def test_ranger_takes_both_spellings(ours: dict[str, Any]) -> None:
    assert {k: Ranger(tensors((2,)), **ours).hypers[0][k] for k in ("wd", "mom", "sqr_mom")} == {
        "wd": 0.5,
        "mom": 0.4,
        "sqr_mom": 0.6,
    }


def test_around_a_class() -> None:
    with pytest.raises(TypeError, match="got the class Adam: build it first"):
        Lookahead(Adam)  # type: ignore[arg-type]
