"""Every optimizer against its formula in float64 (`reference.py`), over steps, groups, dtypes and hypers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from fastopt import SGD, Adam, Lamb, Larc, Lookahead, Optimizer, QHAdam, RAdam, Ranger, RMSProp
from fastopt.cbs import debias

from .reference import Reference
from .samples import Case, every_native, give_grads, tensors

SHAPES = [(3, 4), (5,), (), (2, 1, 3), (1,)]
LOOK = {"k": 3, "alpha": 0.3}


def looking(build: Callable[..., Optimizer]) -> Callable[..., Optimizer]:
    """`build` with Lookahead around it."""

    def both(params: Any, k: int, alpha: float, **hypers: Any) -> Optimizer:
        return Lookahead(build(params, **hypers), k, alpha)

    return both


# name of the rule, class, hypers (in full: the defaults are another test's matter)
RULES: list[tuple[str, Callable[..., Optimizer], dict[str, Any]]] = [
    ("sgd", SGD, {"lr": 0.1}),
    ("sgd", SGD, {"lr": 0.1, "wd": 0.2}),
    ("sgd", SGD, {"lr": 0.1, "mom": 0.9, "wd": 0.2}),
    ("rmsprop", RMSProp, {"lr": 0.01, "sqr_mom": 0.95, "eps": 1e-3}),
    ("rmsprop", RMSProp, {"lr": 0.01, "sqr_mom": 0.9, "mom": 0.8, "eps": 1e-8, "wd": 0.1}),
    ("adam", Adam, {"lr": 0.05, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-2, "wd": 0.0}),
    ("adam", Adam, {"lr": 0.05, "mom": 0.0, "sqr_mom": 0.5, "eps": 1e-5, "wd": 0.3}),
    ("adam", Adam, {"lr": 0.05, "mom": 0.7, "sqr_mom": 0.0, "eps": 1e-5, "wd": 0.3}),
    ("radam", RAdam, {"lr": 0.05, "mom": 0.9, "sqr_mom": 0.9, "eps": 1e-2, "wd": 0.1}),
    ("radam", RAdam, {"lr": 0.05, "mom": 0.8, "sqr_mom": 0.7, "eps": 1e-5}),
    ("radam", RAdam, {"lr": 0.05, "mom": 0.8, "sqr_mom": 0.5, "eps": 1e-5}),
    ("radam", RAdam, {"lr": 0.05, "mom": 0.9, "sqr_mom": 0.9, "eps": 1e-3, "beta": 10.0}),
    ("qhadam", QHAdam, {"lr": 0.05, "mom": 0.99, "sqr_mom": 0.9, "nu_1": 0.7, "nu_2": 0.6, "eps": 1e-3, "wd": 0.1}),
    ("qhadam", QHAdam, {"lr": 0.05, "mom": 0.9, "sqr_mom": 0.9, "nu_1": 0.7, "nu_2": 1.0, "eps": 1e-8}),
    ("larc", Larc, {"lr": 0.1, "mom": 0.9, "trust_coeff": 0.5, "eps": 1e-2, "wd": 0.1}),
    ("larc", Larc, {"lr": 0.1, "mom": 0.0, "trust_coeff": 3.0, "eps": 1e-2, "wd": 0.1}),
    ("larc", Larc, {"lr": 0.1, "mom": 0.5, "trust_coeff": 3.0, "eps": 1e-2, "wd": 0.1, "clip": False}),
    ("lamb", Lamb, {"lr": 0.05, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-3, "wd": 0.2}),
    ("lamb", Lamb, {"lr": 0.001, "mom": 0.9, "sqr_mom": 0.9, "eps": 10.0}),
    ("radam", Ranger, {"lr": 0.05, "mom": 0.95, "sqr_mom": 0.9, "eps": 1e-3, "wd": 0.1, **LOOK}),
    ("sgd", looking(SGD), {"lr": 0.1, "mom": 0.9, "wd": 0.1, **LOOK}),
    ("rmsprop", looking(RMSProp), {"lr": 0.01, "sqr_mom": 0.9, "mom": 0.5, "eps": 1e-3, **LOOK}),
    ("lamb", looking(Lamb), {"lr": 0.05, "mom": 0.9, "sqr_mom": 0.9, "eps": 1e-3, **LOOK}),
]
IDS = [f"{rule}-{i}" for i, (rule, _, _) in enumerate(RULES)]
every_rule = pytest.mark.parametrize(("rule", "build", "hypers"), RULES, ids=IDS)


def as_array(t: torch.Tensor) -> Any:
    return t.detach().double().numpy()


def follow(
    opt: Optimizer, params: list[torch.Tensor], refs: list[Reference], steps: int, rtol: float, atol: float
) -> None:
    """Step both and compare every parameter after every step."""
    for step in range(steps):
        give_grads(params, step)
        wanted = [ref.step(as_array(p.grad)) for p, ref in zip(params, refs, strict=True) if p.grad is not None]
        opt.step()
        for p, w in zip(params, wanted, strict=True):
            np.testing.assert_allclose(as_array(p), w, rtol=rtol, atol=atol, err_msg=f"shape {p.shape}, step {step}")


@every_rule
@pytest.mark.parametrize("decouple_wd", [True, False])
def test_rule(rule: str, build: Callable[..., Optimizer], hypers: dict[str, Any], decouple_wd: bool) -> None:
    params = tensors(*SHAPES, dtype=torch.float64)
    h = {k: v for k, v in hypers.items()}
    refs = [Reference(rule, as_array(p), decouple_wd, **h) for p in params]
    follow(build(params, **hypers, decouple_wd=decouple_wd), params, refs, 12, 1e-10, 1e-12)


@every_rule
def test_float32_follows_the_formula(rule: str, build: Callable[..., Optimizer], hypers: dict[str, Any]) -> None:
    params = tensors(*SHAPES)
    refs = [Reference(rule, as_array(p), **hypers) for p in params]
    follow(build(params, **hypers), params, refs, 8, 2e-4, 2e-5)


@every_rule
def test_bfloat16_follows_within_its_precision(
    rule: str, build: Callable[..., Optimizer], hypers: dict[str, Any]
) -> None:
    params = tensors(*SHAPES, dtype=torch.bfloat16)
    opt = build(params, **hypers)
    refs = [Reference(rule, as_array(p), **hypers) for p in params]
    follow(opt, params, refs, 3, 0.05, 0.05)
    assert all(p.dtype == torch.bfloat16 for p in params)
    shaped = [t for s in opt.state.values() for t in s.values() if isinstance(t, torch.Tensor) and t.ndim]
    assert all(t.dtype == torch.bfloat16 for t in shaped)


@every_rule
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_tensor_lr_steps_as_the_number(
    rule: str, build: Callable[..., Optimizer], hypers: dict[str, Any], dtype: torch.dtype
) -> None:
    params = tensors(*SHAPES, dtype=dtype)
    lr = torch.tensor(hypers["lr"], dtype=torch.float64)
    opt = build(params, **{**hypers, "lr": lr})
    refs = [Reference(rule, as_array(p), **hypers) for p in params]
    tight = dtype == torch.float64
    follow(opt, params, refs, 7, 1e-10 if tight else 0.06, 1e-12 if tight else 0.06)
    assert all(group["lr"] is lr for group in opt.param_groups)


@every_rule
def test_each_group_has_its_own_hypers(rule: str, build: Callable[..., Optimizer], hypers: dict[str, Any]) -> None:
    params = tensors(*SHAPES, dtype=torch.float64)
    opt = build([params[:2], params[2:]], **{**hypers, "lr": [0.03, 0.07], "wd": [0.0, 0.4]})
    refs = [Reference(rule, as_array(p), **{**hypers, "lr": 0.03, "wd": 0.0}) for p in params[:2]]
    refs += [Reference(rule, as_array(p), **{**hypers, "lr": 0.07, "wd": 0.4}) for p in params[2:]]
    follow(opt, params, refs, 6, 1e-10, 1e-12)


@every_rule
@pytest.mark.parametrize("decouple_wd", [True, False])
def test_do_wd_spares_a_parameter(
    rule: str, build: Callable[..., Optimizer], hypers: dict[str, Any], decouple_wd: bool
) -> None:
    params = tensors(*SHAPES, dtype=torch.float64)
    h = {**hypers, "wd": 0.5}
    opt = build(params, **h, decouple_wd=decouple_wd)
    opt.state[params[0]] = {"do_wd": False}
    refs = [Reference(rule, as_array(p), decouple_wd, do_wd=i != 0, **h) for i, p in enumerate(params)]
    follow(opt, params, refs, 6, 1e-10, 1e-12)


@every_rule
def test_scheduled_hypers_count_from_the_next_step(
    rule: str, build: Callable[..., Optimizer], hypers: dict[str, Any]
) -> None:
    params = tensors((4, 3), dtype=torch.float64)
    opt = build(params, **hypers)
    ref = Reference(rule, as_array(params[0]), **hypers)
    for step, lr in enumerate([0.1, 0.02, 0.3, 0.01]):
        opt.set_hyper("lr", lr)
        ref.h["lr"] = lr
        if hypers.get("mom"):
            opt.set_hyper("mom", 0.5 + lr)
            ref.h["mom"] = 0.5 + lr
        follow(opt, params, [ref], 1, 1e-10, 1e-12)
        assert opt.hypers[0]["lr"] == lr, step


@every_rule
def test_a_zero_lr_moves_nothing_and_zero_gradients_make_no_nan(
    rule: str, build: Callable[..., Optimizer], hypers: dict[str, Any]
) -> None:
    params = tensors(*SHAPES)
    before = [p.clone() for p in params]
    for lr in (0.0, torch.tensor(0.0)):
        opt = build(params, **{**hypers, "lr": lr, "wd": 0.3})
        for step in range(7):
            give_grads(params, step)
            if step % 2:
                for p in params:
                    p.grad = torch.zeros_like(p)
            opt.step()
    assert all(torch.equal(p, b) for p, b in zip(params, before, strict=True))
    opt = build(params, **hypers)
    for p in params:
        p.grad = torch.zeros_like(p)
    for _ in range(7):
        opt.step()
    assert all(torch.isfinite(p).all() for p in params)


@pytest.mark.parametrize(
    ("ours", "theirs", "names"),
    [
        (SGD, torch.optim.SGD, {"momentum": 0.9}),
        (Adam, torch.optim.AdamW, {"betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1}),
    ],
)
def test_equals_torch_where_the_rule_is_the_same(ours: Any, theirs: Any, names: dict[str, Any]) -> None:
    mine, other = tensors(*SHAPES, dtype=torch.float64), tensors(*SHAPES, dtype=torch.float64)
    a, b = ours(mine, lr=0.05, **names), theirs(other, lr=0.05, **names)
    for step in range(6):
        give_grads(mine, step)
        give_grads(other, step)
        a.step()
        b.step()
        for p, q in zip(mine, other, strict=True):
            torch.testing.assert_close(p, q, rtol=1e-10, atol=1e-12)


class TestEdges:
    """What the formulas leave open, as ruled: norms of 0, gradients that are not a number, long counts."""

    def test_larc_where_a_norm_is_zero_steps_with_lr(self) -> None:
        zero, still = torch.zeros(3), torch.ones(3)
        zero.grad, still.grad = torch.ones(3), torch.zeros(3)
        for clip in (True, False):
            opt = Larc([zero.clone(), still.clone()], lr=0.1, clip=clip, mom=0.9)
            opt.param_lists[0][0].grad, opt.param_lists[0][1].grad = zero.grad.clone(), still.grad.clone()
            opt.step()
            moved, kept = opt.param_lists[0]
            torch.testing.assert_close(moved, torch.full((3,), -0.1))
            assert torch.equal(kept, still)
            assert [float(opt.state[p]["local_lr"]) for p in (moved, kept)] == pytest.approx([0.1, 0.1])
            kept.grad = torch.ones(3)  # momentum must not blow up afterwards
            opt.step()
            assert (kept - 1).abs().max() < 0.11

    @pytest.mark.parametrize("clip", [True, False])
    def test_larc_does_not_hide_a_nan(self, clip: bool) -> None:
        p = torch.ones(3)
        p.grad = torch.tensor([1.0, float("nan"), 1.0])
        Larc([p], lr=0.1, clip=clip).step()
        assert torch.isnan(p).any()

    def test_larc_leaves_wd_out_of_the_ratio_of_a_spared_parameter(self) -> None:
        p, q = torch.full((4,), 2.0), torch.full((4,), 2.0)
        p.grad, q.grad = torch.full((4,), 3.0), torch.full((4,), 3.0)
        opt = Larc([p, q], lr=0.1, trust_coeff=0.5, wd=2.0, eps=0.0, clip=False)
        opt.state[p] = {"do_wd": False}
        opt.step()
        assert float(opt.state[p]["local_lr"]) == pytest.approx(0.1 * 0.5 * 4 / 6)
        decayed = 4 * (1 - 0.1 * 2.0)
        assert float(opt.state[q]["local_lr"]) == pytest.approx(0.1 * 0.5 * decayed / (6 + 2.0 * decayed))

    def test_lamb_where_the_parameter_is_zero_has_ratio_one(self) -> None:
        p = torch.zeros(5)
        p.grad = torch.full((5,), 2.0)
        Lamb([p], lr=0.1, eps=0.0).step()
        torch.testing.assert_close(p, torch.full((5,), -0.1))

    def test_lamb_ratio_is_at_most_ten(self) -> None:
        p = torch.full((5,), 1000.0)
        p.grad = torch.full((5,), 2.0)
        Lamb([p], lr=0.1, eps=0.0).step()
        torch.testing.assert_close(p, torch.full((5,), 999.0))

    @pytest.mark.parametrize(("sqr_mom", "first"), [(0.9, 6), (0.99, 6), (0.999, 6), (0.7, 10), (0.6, None)])
    def test_radam_rectifies_from_this_step_on(self, sqr_mom: float, first: int | None) -> None:
        p = torch.ones(1, dtype=torch.float64)
        opt = RAdam([p], lr=0.01, mom=0.0, sqr_mom=sqr_mom, eps=0.0)
        found = None
        for step in range(1, 30):
            before = p.clone()
            p.grad = torch.full((1,), 2.0, dtype=torch.float64)
            opt.step()
            if found is None and not torch.allclose(before - p, torch.tensor(0.02, dtype=torch.float64)):
                found = step
        assert found == first

    def test_qhadam_with_both_nus_one_is_adam(self) -> None:
        a, b = tensors((3, 2), dtype=torch.float64), tensors((3, 2), dtype=torch.float64)
        hypers: dict[str, Any] = {"lr": 0.1, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "wd": 0.01}
        one, two = QHAdam(a, nu_1=1.0, nu_2=1.0, **hypers), Adam(b, **hypers)
        for step in range(5):
            give_grads(a, step)
            give_grads(b, step)
            one.step()
            two.step()
        torch.testing.assert_close(a, b, rtol=1e-12, atol=0)

    def test_l2_changes_the_gradient_itself(self) -> None:
        p = torch.tensor([2.0])
        p.grad = torch.tensor([1.0])
        SGD([p], lr=0.0, wd=0.5, decouple_wd=False).step()
        assert p.grad.item() == 2.0

    def test_states_keep_their_identity(self) -> None:
        (p,) = tensors((3,))
        opt = Adam([p])
        give_grads([p], 0)
        opt.step()
        entry = opt.state[p]
        kept = (entry["grad_avg"], entry["sqr_avg"])
        opt.step()
        assert opt.state[p] is entry
        assert (entry["grad_avg"], entry["sqr_avg"], entry["step"]) == (*kept, 2)
        assert type(entry["step"]) is int

    @pytest.mark.parametrize(
        ("mom", "damp", "step", "wanted"), [(0.9, 0.1, 1, 0.1), (0.0, 1.0, 5, 1.0), (0.5, 0.5, 3, 0.875)]
    )
    def test_debias(self, mom: float, damp: float, step: int, wanted: float) -> None:
        assert debias(mom, damp, step) == pytest.approx(wanted)

    @pytest.mark.parametrize("momentum", [0.0, 0.9])
    def test_sparse_gradients_step_under_sgd(self, momentum: float) -> None:
        table = torch.nn.Embedding(5, 2, sparse=True)
        before = table.weight.detach().clone()
        opt = SGD(table.parameters(), lr=0.1, mom=momentum)
        table(torch.tensor([1, 3])).sum().backward()
        opt.step()
        wanted = before.clone()
        wanted[[1, 3]] -= 0.1
        torch.testing.assert_close(table.weight.detach(), wanted)

    def test_an_l2_penalty_refuses_sparse_gradients(self) -> None:
        table = torch.nn.Embedding(5, 2, sparse=True)
        opt = SGD(table.parameters(), lr=0.1, wd=0.1, decouple_wd=False)
        table(torch.tensor([1])).sum().backward()
        with pytest.raises(RuntimeError, match=r"sparse gradient, which l2_reg with wd=0.1 cannot take"):
            opt.step()
        opt.set_hyper("wd", 0.0)
        before = table.weight.detach().clone()
        opt.step()
        assert torch.allclose(before[1] - 0.1, table.weight[1])

    @pytest.mark.parametrize("engine", [None, "eager"])
    def test_sparse_gradients_are_refused_before_anything_changes(self, engine: str | None) -> None:
        p, table = torch.ones(2, requires_grad=True), torch.nn.Embedding(5, 2, sparse=True)
        p.grad = torch.ones(2)
        before = table.weight.detach().clone()
        table(torch.tensor([1, 3])).sum().backward()
        opt = Adam([[p], [table.weight]], lr=0.1, engine=engine)
        with pytest.raises(RuntimeError, match=r"shape \(5, 2\) in group 1 has a sparse gradient.*average_sqr_grad"):
            opt.step()
        assert torch.equal(p, torch.ones(2))
        assert torch.equal(table.weight, before)
        assert not opt.state

    @every_native
    def test_complex_parameters_are_pairs_of_real_ones(self, case: Case) -> None:
        p = torch.complex(torch.linspace(-1, 1, 5), torch.linspace(2, 0, 5)).requires_grad_()
        pairs = torch.view_as_real(p.detach()).clone().requires_grad_()
        one, two = case([p], lr=0.1), case([pairs], lr=0.1)
        for i in range(8):
            grad = torch.complex(torch.linspace(i, -1, 5), torch.linspace(1, 2, 5))
            p.grad, pairs.grad = grad.conj() if i % 2 else grad, torch.view_as_real(grad).clone()
            if i % 2:
                pairs.grad[:, 1].neg_()
            one.step()
            two.step()
            torch.testing.assert_close(torch.view_as_real(p.detach()), pairs.detach())


DEFAULTS: list[tuple[Callable[..., Optimizer], dict[str, Any]]] = [
    (SGD, {"lr": 1e-3, "mom": 0, "wd": 0}),
    (RMSProp, {"lr": 1e-3, "mom": 0, "sqr_mom": 0.99, "eps": 1e-8, "wd": 0}),
    (Adam, {"lr": 1e-3, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "wd": 0.01}),
    (RAdam, {"lr": 1e-3, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "wd": 0, "beta": 0}),
    (QHAdam, {"lr": 1e-3, "mom": 0.999, "sqr_mom": 0.999, "nu_1": 0.7, "nu_2": 1.0, "eps": 1e-8, "wd": 0}),
    (Larc, {"lr": 1e-3, "mom": 0.9, "trust_coeff": 0.02, "eps": 1e-8, "wd": 0}),
    (Lamb, {"lr": 1e-3, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "wd": 0}),
    (Ranger, {"lr": 1e-3, "mom": 0.95, "sqr_mom": 0.99, "eps": 1e-6, "wd": 0.01, "beta": 0, "k": 6, "alpha": 0.5}),
]


@pytest.mark.parametrize(("build", "hypers"), DEFAULTS)
def test_defaults(build: Callable[..., Optimizer], hypers: dict[str, Any]) -> None:
    assert build(tensors((2,))).hypers == [hypers]


@pytest.mark.parametrize(
    ("build", "arguments", "hypers"),
    [
        (SGD, (0.1, 0.2, 0.3, False), {"lr": 0.1, "mom": 0.2, "wd": 0.3}),
        (RMSProp, (0.1, 0.2, 0.3, 0.4, False), {"lr": 0.1, "sqr_mom": 0.2, "mom": 0.3, "wd": 0.4}),
        (Adam, (0.1, 0.2, 0.3, 0.4, 0.5, False), {"lr": 0.1, "mom": 0.2, "sqr_mom": 0.3, "eps": 0.4, "wd": 0.5}),
        (RAdam, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, False), {"eps": 0.4, "wd": 0.5, "beta": 0.6}),
        (QHAdam, (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, False), {"nu_1": 0.4, "nu_2": 0.5, "eps": 0.6, "wd": 0.7}),
        (Larc, (0.1, 0.2, False, 0.3, 0.4, 0.5, False), {"mom": 0.2, "trust_coeff": 0.3, "eps": 0.4, "wd": 0.5}),
        (Lamb, (0.1, 0.2, 0.3, 0.4, 0.5, False), {"mom": 0.2, "sqr_mom": 0.3, "eps": 0.4, "wd": 0.5}),
        (Ranger, (0.1, 0.2, 0.3, 0.4), {"lr": 0.1, "mom": 0.2, "wd": 0.3, "eps": 0.4}),
    ],
)
def test_order_of_arguments(build: Callable[..., Optimizer], arguments: Any, hypers: dict[str, Any]) -> None:
    found = build(tensors((2,)), *arguments).hypers[0]
    assert {k: found[k] for k in hypers} == hypers
