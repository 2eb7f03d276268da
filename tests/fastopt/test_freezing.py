"""Freezing: which groups, that what is frozen does not move, and the marks `force_train` and `do_wd`."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import SGD, Adam, Optimizer

from .samples import Case, assert_moved, assert_same, every_optimizer, give_grads, model, run_steps, tensors, values


def three(**hypers: Any) -> tuple[list[Tensor], Adam]:
    params = tensors((2,), (3,), (1,), requires_grad=True)
    return params, Adam([[p] for p in params], **hypers)


@pytest.mark.parametrize(
    ("n", "frozen", "index"),
    [
        (0, [], 0),
        (1, [0], 1),
        (2, [0, 1], 2),
        (3, [0, 1, 2], 3),
        (4, [0, 1, 2], 4),
        (-1, [0, 1], 2),
        (-3, [], 0),
        (-4, [], -1),
        (-5, [], -2),
    ],
)
def test_freeze_to(n: int, frozen: list[int], index: int) -> None:
    params, opt = three()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        opt.freeze_to(n)
    assert [i for i in range(3) if opt.is_frozen(i)] == frozen
    assert [p.requires_grad for p in params] == [i not in frozen for i in range(3)]
    assert opt.frozen_idx == index
    said = [str(w.message) for w in caught]
    assert said == ([f"Freezing {n} groups; model has 3; whole model is frozen."] if n >= 3 else [])
    before = values(params)
    run_steps(opt, params, [1])
    assert [i for i, (p, b) in enumerate(zip(params, before, strict=True)) if torch.equal(p, b)] == frozen


def test_freeze_and_unfreeze() -> None:
    params, opt = three()
    opt.freeze()
    assert [opt.is_frozen(i) for i in range(3)] == [True, True, False]
    assert [g.get("frozen") for g in opt.param_groups] == [True, True, None]
    params[2].requires_grad_(False)
    opt.unfreeze()
    assert all(p.requires_grad for p in params)
    assert all("frozen" not in g for g in opt.param_groups)
    assert opt.frozen_idx == 0


def test_freeze_needs_two_groups() -> None:
    opt = SGD(tensors((2,)))
    with pytest.raises(ValueError, match="there is just one"):
        opt.freeze()
    assert not opt.is_frozen(0)


def test_each_freeze_to_replaces_the_one_before() -> None:
    params, opt = three()
    opt.freeze_to(2)
    opt.freeze_to(1)
    assert [p.requires_grad for p in params] == [False, True, True]


@every_optimizer
def test_frozen_does_not_move_with_gradient_momentum_and_decay_left(case: Case) -> None:
    params = tensors((4,), (3, 2), requires_grad=True)
    opt = case([[params[0]], [params[1]]], lr=0.1)
    run_steps(opt, params, range(2))
    opt.freeze_to(1)
    before, entry = values(params), {k: str(v) for k, v in opt.state[params[0]].items()}
    run_steps(opt, params, range(2, 9))
    assert_same(params[:1], before[:1])
    assert_moved(params[1:], before[1:])
    assert {k: str(v) for k, v in opt.state[params[0]].items()} == entry
    opt.unfreeze()
    run_steps(opt, params, [9])
    assert_moved(params, before)


@every_optimizer
def test_frozen_from_the_start_has_no_state(case: Case) -> None:
    params = tensors((4,), (3, 2), requires_grad=True)
    opt = case([[params[0]], [params[1]]], lr=0.1)
    opt.freeze()
    run_steps(opt, params, range(2))
    assert params[0] not in opt.state


@every_optimizer
def test_force_train_goes_on_in_a_frozen_group(case: Case) -> None:
    params = tensors((4,), (3,), (2,), requires_grad=True)
    opt = case([params[:2], params[2:]], lr=0.1)
    opt.state[params[1]] = {"force_train": True}
    opt.freeze()
    assert [p.requires_grad for p in params] == [False, True, True]
    assert [opt.steps_on(0, params[0]), opt.steps_on(0, params[1]), opt.steps_on(1, params[2])] == [False, True, True]
    before = values(params)
    run_steps(opt, params, range(2))
    assert_same(params[:1], before[:1])
    assert_moved(params[1:], before[1:])
    assert opt.state[params[1]]["force_train"] is True


def test_a_mark_set_while_everything_is_frozen() -> None:
    params = tensors((4,), (3,), requires_grad=True)
    opt = SGD(params, lr=0.1)
    opt.set_freeze(0, rg=False)
    before = values(params)
    run_steps(opt, params, range(3))
    assert_same(params, before)
    opt.state[params[1]]["force_train"] = True
    run_steps(opt, params, range(1))
    assert_same(params[:1], before[:1])
    assert_moved(params[1:], before[1:])


def test_set_freeze_of_one_group() -> None:
    params, opt = three()
    opt.state[params[1]] = {"force_train": True}
    opt.set_freeze(1, rg=False)
    assert [p.requires_grad for p in params] == [True, True, True]
    assert opt.is_frozen(1)
    opt.set_freeze(1, rg=False, ignore_force_train=True)
    assert [p.requires_grad for p in params] == [True, False, True]
    before = values(params)
    run_steps(opt, params, [0])
    assert_same(params[1:2], before[1:2])
    assert_moved(params[::2], before[::2])
    opt.set_freeze(-2, rg=True)
    assert [p.requires_grad for p in params] == [True, True, True]
    assert not opt.is_frozen(1)
    opt.set_freeze(0, rg=False)
    assert opt.frozen_idx == 1
    with pytest.raises(IndexError):
        opt.set_freeze(3, rg=False)


def test_a_group_frozen_with_its_marked_parameters_is_so_again_after_a_load() -> None:
    params, opt = three()
    opt.state[params[1]] = {"force_train": True}
    opt.set_freeze(1, rg=False, ignore_force_train=True)
    others, resumed = three()
    resumed.state[others[1]] = {"force_train": True}
    resumed.load_state_dict(opt.state_dict())
    assert [p.requires_grad for p in others] == [True, False, True]
    before = values(others)
    run_steps(resumed, others, [0])
    assert_same(others[1:2], before[1:2])


def test_a_tensor_outside_autograd_steps_until_its_group_is_frozen() -> None:
    params = tensors((2,), (3,))
    opt = SGD([[p] for p in params], lr=0.1)
    before = values(params)
    run_steps(opt, params, [0])
    assert_moved(params, before)
    opt.freeze_to(1)
    before = values(params)
    run_steps(opt, params, [1])
    assert_same(params[:1], before[:1])


def test_requires_grad_switched_off_and_on_is_no_freezing() -> None:
    params, opt = three()
    for p in params:
        p.requires_grad_(False)
    assert not any(opt.is_frozen(i) for i in range(3))
    for p in params:
        p.requires_grad_(True)
    before = values(params)
    run_steps(opt, params, [0])
    assert_moved(params, before)


def test_what_cannot_require_a_gradient_cannot_be_frozen() -> None:
    p, q = torch.arange(3), torch.ones(2)
    opt = Optimizer([[q], [p]], None)
    calls: list[Callable[[], None]] = [lambda: opt.freeze_to(1), lambda: opt.set_freeze(1, rg=True), opt.freeze]
    for freeze in calls:
        with pytest.raises(RuntimeError, match=r"params\[0\] of group 1"):
            freeze()
    assert not q.requires_grad
    assert not opt.is_frozen(0)


@every_optimizer
@pytest.mark.parametrize("decay", ["decoupled", "l2"])
def test_do_wd_false_does_not_decay(case: Case, decay: str) -> None:
    if case.name.startswith("OptimWrapper") or "l2" in case.name:
        hypers: dict[str, Any] = {}
    else:
        hypers = {"decouple_wd": decay == "decoupled"}
    spared, plain, undecayed = tensors((3,)), tensors((3,)), tensors((3,))
    opt = case([*spared, *plain], lr=0.1, **{"wd": 0.5, **hypers})
    opt.state[spared[0]] = {"do_wd": False}
    other = case(undecayed, lr=0.1, **{"wd": 0.0, **hypers})
    for step in range(4):
        for params in (spared, plain, undecayed):
            give_grads(params, step)
        opt.step()
        other.step()
    assert_same(spared, undecayed)
    assert not torch.equal(spared[0], plain[0])


@every_optimizer
def test_clear_state_keeps_the_marks(case: Case) -> None:
    params = tensors((3,), (2,), requires_grad=True)
    opt = case(params, lr=0.1)
    opt.state[params[0]] = {"force_train": True, "do_wd": False}
    run_steps(opt, params, range(2))
    opt.clear_state()
    assert opt.state[params[0]] == {"force_train": True, "do_wd": False}
    assert params[1] not in opt.state
    fresh = tensors((3,), (2,), seed=5, requires_grad=True)
    for p, f in zip(params, fresh, strict=True):
        p.data.copy_(f.data)
    again = case(fresh, lr=0.1)
    again.state[fresh[0]] = {"force_train": True, "do_wd": False}
    run_steps(opt, params, range(3))
    run_steps(again, fresh, range(3))
    assert_same(params, fresh)


class TestZeroGrad:
    @every_optimizer
    def test_drops_what_autograd_makes_anew(self, case: Case) -> None:
        params = tensors((2,), requires_grad=True)
        opt = case(params)
        give_grads(params, 0)
        opt.zero_grad()
        assert params[0].grad is None

    @every_optimizer
    def test_zeroes_a_gradient_made_by_hand(self, case: Case) -> None:
        params = tensors((2,))
        opt = case(params)
        give_grads(params, 0)
        kept = params[0].grad
        opt.zero_grad()
        assert params[0].grad is kept
        assert kept is not None
        assert torch.equal(kept, torch.zeros(2))

    @every_optimizer
    def test_a_parameter_frozen_by_hand_keeps_no_gradient_to_step_with(self, case: Case) -> None:
        m = model()
        opt = case([*m.parameters()])
        for _ in range(2):
            m(torch.ones(1, 4)).square().sum().backward()
            opt.step()
        weight = next(m.parameters())
        weight.requires_grad_(False)  # with its last gradient and momentum
        before = weight.detach().clone()
        for _ in range(2):
            opt.zero_grad()
            m(torch.ones(1, 4)).square().sum().backward()
            opt.step()
        assert torch.equal(weight, before)

    @pytest.mark.parametrize("requires_grad", [True, False])
    def test_true_and_false_do_what_they_say(self, requires_grad: bool) -> None:
        params = tensors((2,), requires_grad=requires_grad)
        opt = SGD(params)
        give_grads(params, 0)
        opt.zero_grad(set_to_none=False)
        assert torch.equal(params[0].grad, torch.zeros(2))  # type: ignore[arg-type]
        opt.zero_grad(set_to_none=True)
        assert params[0].grad is None
        opt.zero_grad()

    @pytest.mark.filterwarnings("ignore:Using backward")
    def test_a_gradient_with_a_graph_is_cut_off(self) -> None:
        m = model()
        opt = SGD(m.parameters())
        torch.autograd.backward(m(torch.ones(1, 4)).square().sum(), create_graph=True)
        opt.zero_grad(set_to_none=False)
        assert all(p.grad is not None and not p.grad.requires_grad and not p.grad.any() for p in m.parameters())
