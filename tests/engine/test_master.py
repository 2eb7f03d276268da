"""Float32 master copies of low-precision parameters."""

from __future__ import annotations

import copy
import importlib.util
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import SGD, Adam, Lamb, Larc, Lookahead, Optimizer, RAdam, Ranger
from fastopt.engine.recording.printing import program_text

from .compare import entries, gradients, params, side_by_side

LOW = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
needs_llvm = pytest.mark.skipif(importlib.util.find_spec("llvmlite") is None, reason="needs llvmlite")
ENGINES = pytest.mark.parametrize("engine", ["eager", "foreach", pytest.param("llvm", marks=needs_llvm)])
BUILDS = {
    "SGD": lambda ps, e: SGD(ps, 0.1, mom=0.9, engine=e, master_weights=True),
    "Adam": lambda ps, e: Adam(ps, 0.01, wd=0.1, engine=e, master_weights=True),
    "Adam, l2": lambda ps, e: Adam(ps, 0.01, wd=0.1, decouple_wd=False, engine=e, master_weights=True),
    "RAdam": lambda ps, e: RAdam(ps, 0.01, engine=e, master_weights=True),
    "Ranger": lambda ps, e: Ranger(ps, 0.01, k=2, engine=e, master_weights=True),
    "Larc": lambda ps, e: Larc(ps, 0.01, engine=e, master_weights=True),
    "Lamb": lambda ps, e: Lamb(ps, 0.01, engine=e, master_weights=True),
}


@LOW
@ENGINES
@pytest.mark.parametrize("name", BUILDS)
def test_the_master_steps_as_a_float32_parameter_does(name: str, engine: str, dtype: torch.dtype) -> None:
    """Against the same optimizer on float32 parameters, by the reference executor, with the same rounded gradients."""
    low, high = params(dtype), [p.detach().float().requires_grad_() for p in params(dtype)]
    a, b = BUILDS[name](low, engine), BUILDS[name](high, "eager")
    for i in range(7):
        for p, q, g in zip(low, high, gradients(low, i), strict=True):
            p.grad, q.grad = g.clone(), g.float()
        a.step()
        b.step()
        for p, q in zip(low, high, strict=True):
            master = a.state[p]["master"]
            assert master.dtype == torch.float32
            torch.testing.assert_close(master, q.detach(), rtol=1e-6, atol=1e-7)
            assert torch.equal(p, master.to(dtype))
            assert [key for key in a.state[p] if key != "master"] == list(b.state[q])
            for key, value in b.state[q].items():
                if isinstance(value, Tensor):
                    assert a.state[p][key].dtype == value.dtype


@LOW
@pytest.mark.parametrize("name", BUILDS)
def test_foreach_gives_the_bits_of_eager(name: str, dtype: torch.dtype) -> None:
    side_by_side(BUILDS[name], "foreach", dtype, steps=6)


@ENGINES
def test_small_updates_are_not_lost(engine: str) -> None:
    p = torch.ones(4, dtype=torch.bfloat16, requires_grad=True)
    q = p.detach().clone().requires_grad_()
    with_master, without = (
        SGD([p], lr=1e-4, engine=engine, master_weights=True),
        SGD([q], lr=1e-4, engine=engine),
    )
    for _ in range(100):
        p.grad, q.grad = torch.ones_like(p), torch.ones_like(q)
        with_master.step()
        without.step()
    assert torch.equal(q, torch.ones_like(q))
    assert torch.equal(p, torch.full_like(p, 1 - 1e-2))


def _clipped(p: Any, lr: float, **kwargs: Any) -> None:
    p.grad.data.clamp_(-0.5, 0.5)
    p.data.add_(p.grad.data, alpha=-lr)


@ENGINES
def test_a_gradient_that_a_callback_changes_is_changed(engine: str) -> None:
    p = torch.zeros(3, dtype=torch.bfloat16, requires_grad=True)
    opt = Optimizer([p], _clipped, engine=engine, master_weights=True, lr=1.0)
    for i in range(3):
        p.grad = torch.tensor([2.0, -3.0, 0.25], dtype=torch.bfloat16)
        opt.step()
        assert p.grad.tolist() == [0.5, -0.5, 0.25]
        assert p.tolist() == [-0.5 * (i + 1), 0.5 * (i + 1), -0.25 * (i + 1)]


def _assigns(p: Any, lr: float, **kwargs: Any) -> None:
    p.data = p.data - lr * p.grad


@ENGINES
def test_a_callback_may_assign_the_data(engine: str) -> None:
    p = torch.zeros(2, dtype=torch.float16, requires_grad=True)
    opt = Optimizer([p], _assigns, engine=engine, master_weights=True, lr=0.5)
    for i in range(3):
        p.grad = torch.ones_like(p)
        opt.step()
        assert p.tolist() == opt.state[p]["master"].tolist() == [-0.5 * (i + 1)] * 2


def test_full_precision_has_no_master() -> None:
    p = torch.ones(2, requires_grad=True)
    p.grad = torch.ones(2)
    opt = Adam([p], master_weights=True)
    opt.step()
    assert "master" not in opt.state[p]


def test_the_state_dict_carries_masters() -> None:
    ps = params(torch.bfloat16)
    opt = Lookahead(Adam(ps, 0.01, master_weights=True), k=2)
    qs = [p.detach().clone().requires_grad_() for p in ps]
    twin = Lookahead(Adam(qs, 0.01, master_weights=True), k=2)
    for i in range(5):
        for p, g in zip(ps, gradients(ps, i), strict=True):
            p.grad = g
        opt.step()
    with torch.no_grad():
        for p, q in zip(ps, qs, strict=True):
            q.copy_(p)
    twin.load_state_dict(copy.deepcopy(opt.state_dict()))
    for i in range(3):
        for p, q, g in zip(ps, qs, gradients(ps, 9 + i), strict=True):
            p.grad, q.grad = g.clone(), g.clone()
        opt.step()
        twin.step()
    for p, q in zip(ps, qs, strict=True):
        x, y = entries(opt, p), entries(twin, q)
        assert all(torch.equal(x[k], y[k]) if isinstance(x[k], Tensor) else x[k] == y[k] for k in x)
    wrong = opt.state_dict()
    wrong["state"][0]["master"] = torch.zeros(3)
    with pytest.raises(ValueError, match="master"):
        twin.load_state_dict(wrong)


def test_one_pass_writes_master_and_parameter() -> None:
    ps = params(torch.bfloat16)
    opt = Adam(ps, engine="foreach", master_weights=True)
    for _ in range(2):
        for p in ps:
            p.grad = torch.ones_like(p)
        opt.step()
    program = opt.program()[-1]
    assert len(program.phases) == 1
    # reads gradient, master and two averages; writes parameter, master and two averages
    assert program.bytes_per_element() == (2 + 4 + 4 + 4, 2 + 4 + 4 + 4)
    assert "master" in program_text(program)
