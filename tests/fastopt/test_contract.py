"""What any torch optimizer must do: types, the plain loop, closures, hooks."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from fastopt import SGD, Lookahead, Optimizer, OptimWrapper, Ranger

from ..ranks import run_ranks
from .samples import (
    CLASSES,
    Case,
    assert_moved,
    assert_same,
    backward,
    every_class,
    every_native,
    every_optimizer,
    give_grads,
    model,
    tensors,
    train,
    values,
)


class TestTypes:
    """R1, R2, R10, R12, R14, R19."""

    @every_optimizer
    def test_is_a_torch_optimizer_set_up_as_one(self, case: Case) -> None:
        opt = case(tensors((2,)))
        assert isinstance(opt, torch.optim.Optimizer)
        assert isinstance(opt, Optimizer)
        for name in ("step_pre", "step_post", "state_dict_pre", "state_dict_post", "load_state_dict_pre"):
            assert getattr(opt, f"_optimizer_{name}_hooks") == {}
        assert opt
        assert opt in [opt]

    @every_class
    def test_is_a_class_with_a_default_lr_and_annotations(self, cls: Any) -> None:
        assert torch.optim.Optimizer in inspect.getmro(cls)
        signature = inspect.signature(cls)
        assert signature.parameters["lr"].default == 1e-3
        assert all(p.annotation is not p.empty for p in signature.parameters.values())
        opt = cls(model().parameters())
        assert isinstance(opt.defaults["lr"], float)
        assert "betas" in opt.defaults or "momentum" in opt.defaults
        assert "weight_decay" in opt.defaults

    @every_class
    def test_built_from_dicts_alone(self, cls: Any) -> None:
        m = model()
        opt = cls([{"params": list(m[0].parameters()), "weight_decay": 0.5}, {"params": list(m[2].parameters())}])
        train(m, opt, range(2))
        assert [h["wd"] for h in opt.hypers] == [0.5, cls(tensors((1,))).hypers[0]["wd"]]

    @every_optimizer
    def test_step_is_a_method_that_can_be_replaced(self, case: Case) -> None:
        opt = case(tensors((2,)))
        assert inspect.ismethod(opt.step)
        assert list(inspect.signature(opt.step).parameters) == ["closure"]
        seen = []
        opt.step = lambda closure=None: seen.append(1)  # type: ignore[method-assign]
        opt.step()
        assert seen == [1]

    @every_optimizer
    def test_signatures_that_others_inspect(self, case: Case) -> None:
        opt = case(tensors((2,)))
        assert "set_to_none" in inspect.signature(opt.zero_grad).parameters
        assert "state_dict" in inspect.signature(opt.load_state_dict).parameters

    @every_optimizer
    def test_repr_names_class_and_lr(self, case: Case) -> None:
        opt = case(tensors((2,)), lr=0.125)
        assert type(opt).__name__ in repr(opt)
        assert "lr: 0.125" in repr(opt)

    def test_no_own_step_below_optimizer(self) -> None:
        """R11: a class that overrides `step` and calls its parent's runs the hooks twice."""
        classes: list[type[Optimizer]] = [*CLASSES, Lookahead, OptimWrapper]
        for cls in classes:
            assert inspect.unwrap(cls.step) is inspect.unwrap(Optimizer.step)


class TestLoop:
    @every_optimizer
    def test_learns(self, case: Case) -> None:
        m = model()
        opt = case(m.parameters(), lr=0.02)
        first = backward(m, 0).item()
        opt.zero_grad()
        train(m, opt, [0] * 30)
        assert backward(m, 0).item() < first

    @every_optimizer
    def test_nothing_happens_without_gradients(self, case: Case) -> None:
        m = model()
        opt = case(m.parameters())
        before = values(m.parameters())
        assert opt.step() is None
        assert_same(m.parameters(), before)
        assert len(opt.state) == 0

    @every_native
    def test_groups_swapped_after_construction(self, case: Case) -> None:
        """R3: parameters replaced in the group are the ones that train (as FSDP2 preparation does)."""
        old, new = tensors((3,), seed=1), tensors((3,), seed=2)
        opt = case(old, lr=0.1)
        opt.param_groups[0]["params"][0] = new[0]
        before = values([*old, *new])
        give_grads(new, 0)
        opt.step()
        assert_same(old, before[:1])
        assert_moved(new, before[1:])

    @every_native
    def test_groups_assigned_after_construction(self, case: Case) -> None:
        params = tensors((3,), (2,))
        opt = case(params, lr=0.1)
        group = opt.param_groups[0]
        opt.param_groups = [{**group, "params": params[:1], "lr": 0.0}, {**group, "params": params[1:]}]
        before = values(params)
        give_grads(params, 0)
        opt.step()
        assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [True, False]

    @every_native
    def test_parameters_of_no_elements_and_no_dimensions(self, case: Case) -> None:
        params = tensors((0,), (), (0, 3), (1,))
        opt = case(params, lr=0.1)
        for step in range(4):
            give_grads(params, step)
            opt.step()
        assert all(torch.isfinite(p).all() for p in params)

    @every_native
    def test_parameters_that_are_not_contiguous(self, case: Case) -> None:
        a, b = tensors((4, 3)), tensors((4, 3))
        strided = a[0].t().contiguous().t()
        one, two = case([strided], lr=0.1), case(b, lr=0.1)
        for step in range(4):
            give_grads([strided], step)
            give_grads(b, step)
            one.step()
            two.step()
        torch.testing.assert_close(strided, b[0])

    @every_native
    @pytest.mark.parametrize("engine", ["eager", "foreach", "llvm"])
    def test_a_backward_pass_through_weights_that_have_stepped_is_an_error(self, case: Case, engine: str) -> None:
        """As after torch's own steps: its gradients would be those of no weights at all."""
        weight, factor = torch.ones(3, requires_grad=True), torch.ones(3, requires_grad=True)
        opt = case([weight], lr=0.01, engine=engine)
        for _ in range(4):  # the first step and those like the last
            loss = (weight * factor).sum()
            loss.backward(retain_graph=True)
            opt.step()
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                loss.backward()
            opt.zero_grad()


class TestClosure:
    """R9."""

    @every_optimizer
    @pytest.mark.parametrize("by_keyword", [True, False])
    def test_once_with_gradients_on_before_the_step(self, case: Case, by_keyword: bool) -> None:
        m, n = model(), model()
        one, two = case(m.parameters(), lr=0.05), case(n.parameters(), lr=0.05)
        modes = []

        def closure() -> Tensor:
            modes.append(torch.is_grad_enabled())
            one.zero_grad()
            return backward(m, 3)

        with torch.no_grad():
            loss = one.step(closure=closure) if by_keyword else one.step(closure)
        assert modes == [True]
        assert torch.equal(loss, backward(n, 3))
        two.step()
        assert_same(m.parameters(), n.parameters())

    @every_optimizer
    def test_an_error_inside_changes_nothing(self, case: Case) -> None:
        m = model()
        opt = case(m.parameters())
        backward(m, 0)
        before = values(m.parameters())

        def closure() -> Tensor:
            raise KeyError("data")

        with pytest.raises(KeyError, match="data"):
            opt.step(closure)
        assert_same(m.parameters(), before)
        assert len(opt.state) == 0


_MAKERS: dict[str, Callable[[list[Tensor]], Optimizer]] = {
    "parent": lambda params: Optimizer(params, None),
    "child": SGD,
    "lookahead": lambda params: Lookahead(SGD(params)),
    "ranger": Ranger,
    "wrapper": lambda params: OptimWrapper(params, opt=torch.optim.SGD, lr=0.1),
}


def _hooks_by_class(rank: int, world_size: int, backwards: bool) -> dict[str, list[str]]:
    """Which hooks a step runs, on optimizers of all classes, parents made before or after their children."""
    params = tensors((2,))
    names = list(_MAKERS)[::-1] if backwards else list(_MAKERS)
    opts = [(name, _MAKERS[name](params)) for name in names + names]
    found = {}
    for name, opt in opts:
        seen: list[str] = []
        opt.register_step_pre_hook(lambda *args, seen=seen: seen.append("pre"))
        opt.register_step_post_hook(lambda *args, seen=seen: seen.append("post"))
        give_grads(params, 0)
        opt.step()
        found[name] = seen if len(seen) == 2 else [*seen, "more"]
    return found


class TestHooks:
    @every_native
    def test_order_and_once(self, case: Case) -> None:
        params = tensors((2,))
        opt = case(params)
        case(params)
        Optimizer(params, None)  # the parent class has been instantiated too (R11)
        opt_again = case(params)
        seen: list[str] = []
        handles = [
            register_optimizer_step_pre_hook(lambda *a: seen.append("global pre")),
            register_optimizer_step_post_hook(lambda *a: seen.append("global post")),
        ]
        try:
            for each in (opt, opt_again):
                each.register_step_pre_hook(lambda *a: seen.append("pre"))
                each.register_step_post_hook(lambda *a: seen.append("post"))
                give_grads(params, 0)
                seen.clear()
                each.step()
                assert seen == ["global pre", "pre", "post", "global post"]
        finally:
            for handle in handles:
                handle.remove()

    @pytest.mark.parametrize("backwards", [False, True])
    def test_once_in_either_order_of_parent_and_child(self, backwards: bool) -> None:
        """R11, in a fresh process, because torch's patch of a class stays."""
        assert run_ranks(_hooks_by_class, 1, backwards) == [{name: ["pre", "post"] for name in _MAKERS}]

    @every_optimizer
    def test_a_pre_hook_may_replace_the_arguments(self, case: Case) -> None:
        m = model()
        opt = case(m.parameters())
        opt.register_step_pre_hook(lambda opt, args, kwargs: ((*args[:1], lambda: 42), {}))
        assert opt.step() == 42

    @every_optimizer
    def test_a_post_hook_sees_the_step_done(self, case: Case) -> None:
        params = tensors((2,))
        opt, seen = case(params, lr=0.1), []
        before = values(params)
        opt.register_step_post_hook(lambda *a: seen.append(values(params)))
        give_grads(params, 0)
        opt.step()
        assert_moved(seen[0], before)
