"""The facts of the tour (docs/tour), section by section, with numbers from the formulas."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fastopt import (
    SGD,
    Adam,
    Lamb,
    Larc,
    Lookahead,
    Optimizer,
    OptimWrapper,
    QHAdam,
    RAdam,
    RMSProp,
    average_grad,
    average_sqr_grad,
    detuplify_pg,
    l2_reg,
    larc_layer_lr,
    momentum_step,
    set_item_pg,
    sgd_step,
    step_stat,
    weight_decay,
)


def param(value: Any, grad: Any = None) -> Tensor:
    """A float tensor, outside autograd, with a gradient of a tenth of it unless given."""
    p = torch.tensor(value).float()
    p.grad = p / 10 if grad is None else torch.tensor(grad).float()
    return p


def four() -> list[Tensor]:
    return [param(float(i)) for i in range(4)]


def close(found: Any, wanted: Any, tolerance: float = 1e-5) -> None:
    found = torch.stack([p.reshape(()) for p in found]) if isinstance(found, list) else found
    torch.testing.assert_close(found, torch.tensor(wanted).float(), rtol=tolerance, atol=tolerance)


class TestGroupsAndHypers:
    def test_plain_values_stand_for_parameters(self) -> None:
        def pairs() -> Iterator[list[int]]:
            yield [0, 1]
            yield [2, 3]

        for given, wanted in (([1, 2, 3], [[1, 2, 3]]), (range(3), [[0, 1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])):
            assert Optimizer(given, None).param_lists == wanted
        assert Optimizer(pairs(), lambda p, **kwargs: None).param_lists == [[0, 1], [2, 3]]

    def test_defaults_of_cbs(self) -> None:
        def first(p: Any, lr: float = 0, **kwargs: Any) -> None: ...
        def second(p: Any, lr2: float = 0, **kwargs: Any) -> None: ...
        def without(p: Any, **kwargs: Any) -> None: ...

        first.defaults = {"lr": 0.5}  # type: ignore[attr-defined]
        second.defaults = {"lr2": 0.25}  # type: ignore[attr-defined]
        assert Optimizer([1, 2], [first, second, without]).hypers == [{"lr": 0.5, "lr2": 0.25}]
        assert Optimizer([[1], [2]], first, lr=2.0).hypers == [{"lr": 2.0}] * 2
        assert Optimizer([[1], [2]], first, lr=[1.0, 2.0]).hypers == [{"lr": 1.0}, {"lr": 2.0}]
        assert Optimizer([[1], [2], [3]], first, lr=slice(1e-2)).hypers == [{"lr": 1e-3}, {"lr": 1e-3}, {"lr": 1e-2}]
        spread = Optimizer([[1, 2], [3], [4]], first, lr=slice(1e-4, 1e-2))
        assert spread.hypers == [{"lr": 1e-4}, {"lr": 1e-3}, {"lr": 1e-2}]
        assert spread.param_groups[0] == {"params": [1, 2], "lr": 1e-4}
        with pytest.raises(ValueError, match="2 values for lr"):
            Optimizer([[1, 2], [3], [4]], first, lr=np.array([0.1, 0.2]))


class TestBasicSteppers:
    def test_sgd_step(self) -> None:
        p = param([1.0], [0.25])
        sgd_step(p, 2.0)
        close(p, [0.5])
        close(p.grad, [0.25])

    def test_weight_decay(self) -> None:
        p = param([1.0], [0.25])
        weight_decay(p, 0.5, 0.5)
        close(p, [0.75])
        close(p.grad, [0.25])
        weight_decay(p, 0.5, 0.5, do_wd=False)
        close(p, [0.75])

    def test_l2_reg(self) -> None:
        p = param([1.0], [0.25])
        l2_reg(p, 0.5, 0.5)
        close(p, [1.0])
        close(p.grad, [0.75])
        l2_reg(p, 0.5, 0.5, do_wd=False)
        close(p.grad, [0.75])


class TestStep:
    def test_each_parameter_by_its_hypers(self) -> None:
        ps = four()
        Optimizer(ps, sgd_step, lr=0.1).step()
        close(ps, [i - 0.1 * i / 10 for i in range(4)])

    def test_decay_then_step(self) -> None:
        ps = four()
        Optimizer(ps, [weight_decay, sgd_step], lr=0.1, wd=0.1).step()
        close(ps, [i * (1 - 0.1 * 0.1) - 0.1 * i / 10 for i in range(4)])

    def test_without_a_gradient_nothing_moves(self) -> None:
        ps = four()
        ps[-1].grad = None
        Optimizer(ps, sgd_step, lr=0.1).step()
        close(ps, [0.0, 0.99, 1.98, 3.0])

    def test_a_hyper_of_one_group(self) -> None:
        ps = four()
        opt = Optimizer([ps[:2], ps[2:]], sgd_step, lr=0.1)
        opt.hypers[0]["lr"] = 0.01
        opt.step()
        close(ps, [0.0, 0.999, 1.98, 2.97])

    def test_zero_grad_of_gradients_made_by_hand(self) -> None:
        ps = four()
        Optimizer(ps, sgd_step, lr=0.1).zero_grad()
        assert all(p.grad is not None and p.grad.item() == 0 for p in ps)


class TestStats:
    @pytest.mark.parametrize("dampening", [False, True])
    def test_average_grad(self, dampening: bool) -> None:
        p = param([[1.0, 2.0]], [[4.0, 5.0]])
        state: dict[str, Any] = {}
        weight = 0.1 if dampening else 1.0
        state = average_grad(p, mom=0.9, dampening=dampening, **state)
        close(state["grad_avg"], [[4 * weight, 5 * weight]])
        state = average_grad(p, mom=0.9, dampening=dampening, **state)
        close(state["grad_avg"], [[4 * weight * 1.9, 5 * weight * 1.9]])

    @pytest.mark.parametrize("dampening", [False, True])
    def test_average_sqr_grad(self, dampening: bool) -> None:
        p = param([[1.0, 2.0]], [[4.0, 5.0]])
        state: dict[str, Any] = {}
        weight = 0.01 if dampening else 1.0
        state = average_sqr_grad(p, sqr_mom=0.99, dampening=dampening, **state)
        state = average_sqr_grad(p, sqr_mom=0.99, dampening=dampening, **state)
        close(state["sqr_avg"], [[16 * weight * 1.99, 25 * weight * 1.99]])

    def test_the_defaults_of_dampening(self) -> None:
        p = param([1.0], [2.0])
        close(average_grad(p, mom=0.9)["grad_avg"], [2.0])
        close(average_sqr_grad(p, sqr_mom=0.9)["sqr_avg"], [0.4])

    def test_step_stat(self) -> None:
        p = param(1.0)
        state: dict[str, Any] = {}
        for wanted in (1, 2, 3):
            state = step_stat(p, **state)
            assert state == {"step": wanted}


class TestFreezing:
    def test_up_to_a_group_and_back(self) -> None:
        groups = [four(), four(), four()]
        opt = Optimizer(groups, sgd_step, lr=0.1)
        opt.freeze_to(1)
        assert [{p.requires_grad for p in g} for g in groups] == [{False}, {True}, {True}]
        opt.unfreeze()
        assert all(p.requires_grad for g in groups for p in g)

    def test_parameters_that_always_train(self) -> None:
        groups = [four(), four(), four()]
        opt = Optimizer(groups, sgd_step, lr=0.1)
        for p in groups[1][1::2]:
            opt.state[p] = {"force_train": True}
        opt.freeze()
        assert [p.requires_grad for p in groups[1]] == [False, True, False, True]
        assert {p.requires_grad for p in groups[0]} == {False}


class TestSerializing:
    def test_state_and_hypers_move_to_another_optimizer(self) -> None:
        p, q = param([1.0, 2.0], [4.0, 5.0]), param([10.0, 20.0])
        one, two = Optimizer(p, average_grad), Optimizer(q, average_grad, mom=0.99)
        one.step()
        assert two.state == {}
        two.load_state_dict(one.state_dict())
        assert two.hypers[0]["mom"] == 0.9
        close(two.state[q]["grad_avg"], [4.0, 5.0])

    def test_clear_state_keeps_the_mark(self) -> None:
        p = param([1.0, 2.0], [4.0, 5.0])
        opt = Optimizer(p, average_grad)
        opt.state[p] = {"force_train": True}
        opt.step()
        assert "grad_avg" in opt.state[p]
        opt.clear_state()
        assert opt.state[p] == {"force_train": True}


class TestOptimizers:
    def test_sgd(self) -> None:
        ps = four()
        opt = SGD(ps, lr=0.1)
        opt.step()
        opt.step()
        close(ps, [i * 0.98 for i in range(4)])
        assert not opt.state

    def test_sgd_with_momentum(self) -> None:
        ps = four()
        opt = SGD(ps, lr=0.1, mom=0.9)
        opt.step()
        opt.step()
        close(ps, [i - 0.1 * (0.1 * i) - 0.1 * (0.1 * i * 1.9) for i in range(4)])
        close([opt.state[p]["grad_avg"] for p in ps], [i * 0.19 for i in range(4)])
        assert opt.cbs == (weight_decay, average_grad, momentum_step)

    def test_decay_and_l2_differ_with_momentum(self) -> None:
        a, b = param([2.0], [1.0]), param([2.0], [1.0])
        for _ in range(2):
            a.grad, b.grad = torch.ones(1), torch.ones(1)
        one = SGD([a], lr=0.1, mom=0.9, wd=0.1)
        two = SGD([b], lr=0.1, mom=0.9, wd=0.1, decouple_wd=False)
        one.step()
        two.step()
        close(a, [2 * 0.99 - 0.1])
        close(b, [2 - 0.1 * (1 + 0.2)])
        b.grad = torch.ones(1)
        two.step()
        close(b, [1.88 - 0.1 * (0.9 * 1.2 + 1 + 0.188)])

    @pytest.mark.parametrize("mom", [0.0, 0.9])
    def test_rmsprop(self, mom: float) -> None:
        p = param([1.0, 2.0, 3.0], [0.1, 0.2, 0.3])
        opt = RMSProp([p], lr=0.1, mom=mom)
        opt.step()
        close(p, [0.0, 1.0, 2.0])  # the first mean square is g^2/100, so the step is 10 lr
        opt.step()
        step = 0.1 * (1 + mom) / math.sqrt(0.01 * 1.99)
        close(p, [-step, 1 - step, 2 - step])
        assert RMSProp([param([1.0])], eps=0.5).hypers[0]["eps"] == 0.5

    def test_adam_steps_by_lr_while_gradients_stay(self) -> None:
        p = param([1.0, 2.0, 3.0], [0.1, 0.2, 0.3])
        opt = Adam([p], lr=0.1, wd=0)
        for n in (1, 2, 3):
            opt.step()
            close(p, [1 - 0.1 * n, 2 - 0.1 * n, 3 - 0.1 * n], 1e-3)

    def test_radam_warms_up(self) -> None:
        p = param([1.0, 2.0, 3.0], [0.1, 0.2, 0.3])
        opt = RAdam([p], lr=0.1)
        r_inf = 2 / (1 - 0.99) - 1
        for _ in range(5):
            opt.step()
        close(p, [0.95, 1.9, 2.85])
        r = r_inf - 2 * 6 * 0.99**6 / (1 - 0.99**6)
        w = math.sqrt((r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r))
        opt.step()
        close(p, [0.95 - 0.1 * w, 1.9 - 0.1 * w, 2.85 - 0.1 * w], 1e-4)

    def test_qhadam(self) -> None:
        p = param([1.0, 2.0, 3.0], [0.1, 0.2, 0.3])
        opt = QHAdam([p], lr=0.1)
        opt.step()
        opt.step()
        close(p, [0.8, 1.8, 2.8], 1e-4)

    @pytest.mark.parametrize("clip", [True, False])
    def test_larc(self, clip: bool) -> None:
        ps = [param([1.0, 2.0, 3.0], [0.1, 0.2, 0.3]), param([1.0, 2.0, 3.0], [0.01, 0.02, 0.03])]
        opt = Larc(ps, lr=0.1, clip=clip)
        opt.step()
        rates = [0.1 * 0.02 * 10, 0.1 * 0.02 * 100]  # |p|/|g| is 10 and 100
        if clip:
            rates[1] = 0.1
        assert [float(opt.state[p]["local_lr"]) for p in ps] == pytest.approx(rates)
        assert opt.state[ps[1]]["local_lr"] == 0.1 or not clip
        for p, rate, scale in zip(ps, rates, (0.1, 0.01), strict=True):
            close(p, [x * (1 - rate * scale) for x in (1.0, 2.0, 3.0)])
        assert vars(larc_layer_lr)["defaults"] == {"trust_coeff": 0.02, "wd": 0.0, "eps": 1e-8}

    def test_lamb(self) -> None:
        p = param([1.0, 2.0, 3.0], [0.1, 0.2, 0.3])
        Lamb([p], lr=0.1).step()
        step = 0.1 * math.sqrt(14 / 3)  # every element of Adam's update is 1
        close(p, [1 - step, 2 - step, 3 - step], 1e-3)

    def test_lookahead(self) -> None:
        start, g = np.array([1.0, 2.0, 3.0]), np.array([0.1, 0.2, 0.3])
        p = param(start.tolist(), g.tolist())
        opt = Lookahead(SGD([p], lr=0.1))
        for _ in range(5):
            opt.step()
        close(p, (start - 0.5 * g).tolist())
        opt.step()
        close(p, (0.5 * start + 0.5 * (start - 0.6 * g)).tolist())


class TestTorchGroups:
    def test_spreading_and_setting(self) -> None:
        assert detuplify_pg({"lr": 0.1, "mom": 0.9, "params": [0]}) == {"lr": 0.1, "mom": 0.9}
        group = {"lr": 0.1, "betas": (0.9, 0.999), "params": [0]}
        assert set_item_pg(group, "betas__0", 0.5) == {"lr": 0.1, "betas": (0.5, 0.999), "params": [0]}

    def test_wrapper_hypers_and_lists(self) -> None:
        x, y = torch.tensor([1.0]), torch.tensor([2.0])
        torch_sgd = torch.optim.SGD([{"params": [x], "lr": 1e-3}, {"params": [y], "lr": 1e-2}], momentum=0.9)
        wrapper = OptimWrapper(torch_sgd)
        ours = SGD([[torch.tensor([1.0])], [torch.tensor([2.0])]], lr=[1e-3, 1e-2], mom=0.9)
        assert wrapper.param_lists == ours.param_lists
        assert wrapper.hypers == [{**h, "dampening": 0.0, "nesterov": False} for h in ours.hypers]
        wrapper.param_lists = [[y], [x]]
        assert [g["params"][0] is p for g, p in zip(torch_sgd.param_groups, (y, x), strict=True)] == [True, True]
        wrapper.set_hyper("mom", 0.5)
        wrapper.set_hyper("lr", [0.1, 0.2])
        assert [(g["momentum"], g["lr"]) for g in torch_sgd.param_groups] == [(0.5, 0.1), (0.5, 0.2)]

    @pytest.mark.parametrize("decouple_wd", [True, False])
    def test_adam_is_torchs(self, decouple_wd: bool) -> None:
        cls = torch.optim.AdamW if decouple_wd else torch.optim.Adam
        weights, x, y = torch.randn(5, 4), torch.randn(100, 4), torch.randn(100, 5)
        found = []
        for wrapped in (True, False):
            m = nn.Linear(4, 5, bias=False)
            m.weight.data.copy_(weights)
            opt: Optimizer
            if wrapped:
                opt = OptimWrapper(cls(m.parameters(), lr=1e-3, betas=(0.9, 0.99), eps=1e-5, weight_decay=1e-2))
            else:
                opt = Adam(m.parameters(), 1e-3, wd=1e-2, decouple_wd=decouple_wd)
            for i in range(0, 100, 25):
                torch.autograd.backward(F.mse_loss(m(x[i : i + 25]), y[i : i + 25]))
                opt.step()
                opt.zero_grad()
            found.append(m.weight.detach())
        torch.testing.assert_close(*found)
