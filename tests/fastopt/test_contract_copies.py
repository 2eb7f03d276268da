"""What any torch optimizer must do: copies, proxies, gradient scaling, profiling, optimizer in backward, exports."""

from __future__ import annotations

import copy
import inspect
import io
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt
from fastopt import Optimizer

from .samples import (
    CLASSES,
    Case,
    assert_same,
    backward,
    batch,
    every_class,
    every_native,
    every_optimizer,
    give_grads,
    model,
    tensors,
    train,
    values,
)

HOW: list[Callable[[Any], Any]] = [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))]
every_way = pytest.mark.parametrize("how", HOW, ids=["deepcopy", "pickle"])


class TestCopies:
    """R8: also after a scheduler was attached, the copy steps itself."""

    @every_optimizer
    @every_way
    def test_step_by_themselves(self, case: Case, how: Callable[[Any], Any]) -> None:
        m = model()
        opt = case([m[0].parameters(), m[2].parameters()], lr=[0.02, 0.05])
        torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        train(m, opt, range(2))
        opt.freeze()
        n, twin = how((m, opt))
        assert type(twin) is type(opt)
        assert twin.hypers == opt.hypers
        assert twin.defaults == opt.defaults
        assert twin.frozen_idx == 1
        before = values(m.parameters())
        train(n, twin, range(2, 5))
        assert_same(m.parameters(), before)
        train(m, opt, range(2, 5))
        assert_same(m.parameters(), n.parameters())
        twin.unfreeze()
        assert opt.is_frozen(0)
        assert len(twin.cbs) == len(opt.cbs)
        twin.add_param_group({"params": [torch.ones(1)]})
        schedule = torch.optim.lr_scheduler.ExponentialLR(twin, 0.5)
        twin.step()
        schedule.step()

    @every_native
    def test_a_copy_has_its_own_hooks_and_state(self, case: Case) -> None:
        params = tensors((2,))
        opt = case(params)
        give_grads(params, 0)
        opt.step()
        twin = copy.deepcopy(opt)
        assert reading_leaves_nothing(twin)
        seen: list[int] = []
        twin.register_step_post_hook(lambda *a: seen.append(1))
        opt.step()
        assert seen == []

    def test_own_functions_survive_a_deepcopy(self) -> None:
        def mine(p: Tensor, lr: float, **kwargs: Any) -> None:
            p.sub_(lr)

        (p,) = tensors((2,))
        opt = copy.deepcopy(Optimizer([p], mine, lr=0.5))
        q = opt.param_lists[0][0]
        give_grads([q], 0)
        before = q.clone()
        opt.step()
        torch.testing.assert_close(q, before - 0.5)


def reading_leaves_nothing(opt: Optimizer) -> bool:
    n = len(opt.state)
    opt.state[torch.zeros(1)]
    return len(opt.state) == n


class TestValues:
    """R5, R16."""

    @every_optimizer
    @pytest.mark.filterwarnings("ignore:.*built with mom=0")
    def test_saved_with_weights_only(self, case: Case) -> None:
        m = model()
        opt = case(m.named_parameters())
        torch.optim.lr_scheduler.OneCycleLR(opt, 0.1, total_steps=5)
        train(m, opt, range(2))
        file = io.BytesIO()
        torch.save(opt.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        opt.load_state_dict(loaded)
        train(m, opt, [2])


class Proxy:
    """What Lightning and Fabric put around an optimizer: its attributes, its class as a parent."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__.update({k: v for k, v in optimizer.__dict__.items() if k not in ("step", "__del__")})
        self.__class__ = type("Proxy" + type(optimizer).__name__, (Proxy, type(optimizer)), {})
        self._optimizer = optimizer

    def step(self, closure: Any = None) -> Any:
        return self._optimizer.step(closure)


class Forwarding:
    """The same by `__getattr__`, without the attributes themselves."""

    def __init__(self, optimizer: Any) -> None:
        self.__dict__["_optimizer"] = optimizer
        self.__class__ = type("Forwarding" + type(optimizer).__name__, (Forwarding, type(optimizer)), {})

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_optimizer"], name)


@every_optimizer
@pytest.mark.parametrize("proxy", [Proxy, Forwarding])
def test_proxies(case: Case, proxy: Any) -> None:
    """R19."""
    m, n = model(), model()
    opt, plain = case([m[0].parameters(), m[2].parameters()]), case([n[0].parameters(), n[2].parameters()])
    around: Any = proxy(opt)
    assert torch.optim.Optimizer in inspect.getmro(type(around))
    assert around.__class__.__name__.endswith(type(opt).__name__)
    train(m, around, range(3))
    train(n, plain, range(3))
    assert_same(m.parameters(), n.parameters())
    assert around.hypers == opt.hypers
    assert around.param_groups[0] is opt.param_groups[0]
    assert around.needs == opt.needs
    around.set_hyper("lr", 0.5)
    assert opt.hypers[0]["lr"] == 0.5
    assert repr(around.state_dict()) == repr(opt.state_dict())
    around.zero_grad()
    around.freeze()
    assert opt.is_frozen(0)


class TestScaler:
    @every_optimizer
    def test_unscales_and_steps(self, case: Case) -> None:
        m, n = model(), model()
        one, two = case(m.parameters(), lr=0.05), case(n.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        for seed in range(3):
            x, y = batch(seed)
            torch.autograd.backward(scaler.scale(nn.functional.mse_loss(m(x), y)))
            scaler.step(one)
            scaler.update()
            one.zero_grad()
            train(n, two, [seed])
        assert_same(m.parameters(), n.parameters())

    @every_optimizer
    def test_a_skipped_step_is_skipped(self, case: Case) -> None:
        m = model()
        opt = case(m.parameters(), lr=0.05)
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
        before = values(m.parameters())
        x, y = batch(0)
        torch.autograd.backward(scaler.scale(nn.functional.mse_loss(m(x), y) * float("inf")))
        scaler.step(opt)
        scaler.update()
        assert scaler.get_scale() == 2.0
        assert_same(m.parameters(), before)
        assert len(opt.state) == 0


@every_optimizer
def test_profiler_names(case: Case) -> None:
    params = tensors((2,), requires_grad=True)
    opt = case(params)
    give_grads(params, 0)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        opt.step()
        opt.zero_grad()
    names = [event.key for event in profile.key_averages()]
    assert f"Optimizer.step#{type(opt).__name__}.step" in names
    assert f"Optimizer.zero_grad#{type(opt).__name__}.zero_grad" in names


@every_class
def test_optimizer_in_backward(cls: Any) -> None:
    from torch.distributed.optim.apply_optimizer_in_backward import (
        _apply_optimizer_in_backward,
        _get_in_backward_optimizers,
    )

    m, n = model(), model()
    _apply_optimizer_in_backward(cls, m.parameters(), {"lr": 0.05, "weight_decay": 0.1})
    plain = cls(n.parameters(), lr=0.05, weight_decay=0.1)
    opts = _get_in_backward_optimizers(m)
    assert len(opts) == 4
    schedules = [torch.optim.lr_scheduler.ExponentialLR(opt, 0.5) for opt in [*opts, plain]]
    for seed in range(3):
        backward(m, seed)
        train(n, plain, [seed])
        for schedule in schedules:
            schedule.step()
    assert_same(m.parameters(), n.parameters())


@every_optimizer
def test_accelerates_prepare(case: Case) -> None:
    """A load of its own state dict through a device map before the first step, then new group dicts."""
    m, n = model(), model()
    one, two = case(m.parameters(), lr=0.05), case(n.parameters(), lr=0.05)
    held = two.param_groups[0]
    schedule = torch.optim.lr_scheduler.ExponentialLR(two, 0.5)
    two.load_state_dict(copy.deepcopy(two.state_dict()))
    assert two.param_groups[0] is not held
    train(m, one, [0])
    train(n, two, [0])
    schedule.step()
    one.set_hyper("lr", 0.025)
    train(m, one, [1])
    train(n, two, [1])
    assert_same(m.parameters(), n.parameters())


def test_everything_public_is_exported() -> None:
    seeds = """pytorch_hp_map Optimizer sgd_step weight_decay l2_reg average_grad average_sqr_grad momentum_step SGD
    rms_prop_step RMSProp step_stat debias adam_step Adam radam_step RAdam qhadam_step QHAdam larc_layer_lr larc_step
    Larc lamb_step Lamb Lookahead ranger detuplify_pg set_item_pg OptimWrapper _BaseOptimizer"""
    assert set(seeds.split()) <= set(fastopt.__all__)
    assert all(hasattr(fastopt, name) for name in fastopt.__all__)


@pytest.mark.parametrize("wrong", [0, "x"])
def test_misspelt_hypers_of_named_optimizers_are_refused(wrong: Any) -> None:
    for cls in CLASSES:
        with pytest.raises(TypeError):
            cls(tensors((2,)), weight_decays=wrong)
