"""Two optimizers with the same chain and different executors, stepped side by side."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from fastopt import Optimizer

SHAPES = ((4, 5), (), (7,), (3, 0), (33, 40), (1030,))
Build = Callable[[list[Tensor], str], Optimizer]


def params(dtype: torch.dtype, shapes: Sequence[tuple[int, ...]] = SHAPES, device: str = "cpu") -> list[Tensor]:
    """Random parameters, always the same."""
    g = torch.Generator().manual_seed(7)
    return [torch.randn(s, generator=g).to(device, dtype).requires_grad_() for s in shapes]


def gradients(ps: Sequence[Tensor], seed: int, dtype: torch.dtype | None = None) -> list[Tensor]:
    """A random gradient for each, the same for the same seed; in the parameter's dtype or another."""
    g = torch.Generator().manual_seed(seed)
    return [torch.randn(p.shape, generator=g).to(p.device, dtype or p.dtype) for p in ps]


def entries(opt: Optimizer, p: Tensor) -> dict[str, Any]:
    """Everything that a step may change for one parameter."""
    return {"p": p.detach(), "grad": p.grad, **opt.state.get(p, {})}


def assert_equal(a: Any, b: Any, where: str) -> None:
    """The same bits, types and dtypes; nan equals nan."""
    assert type(a) is type(b), (where, a, b)
    if isinstance(a, Tensor):
        assert a.dtype == b.dtype, where
        assert a.shape == b.shape, where
        torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True, msg=lambda text: f"{where}: {text}")
    else:
        assert a == b or (a != a and b != b), (where, a, b)


def assert_near(a: Any, b: Any, where: str, ulps: float) -> None:
    """The same to `ulps` units of the dtype's resolution, relative to the largest value."""
    assert type(a) is type(b), (where, a, b)
    if not isinstance(a, Tensor):
        assert a == b, (where, a, b)
        return
    assert a.dtype == b.dtype, where
    scale = float(a.double().abs().nan_to_num(0, 0, 0).amax()) if a.numel() else 1.0
    unit = torch.finfo(a.dtype).eps if a.dtype.is_floating_point else 0
    torch.testing.assert_close(
        b.double(), a.double(), rtol=ulps * unit, atol=ulps * unit * max(scale, 1.0), equal_nan=True,
        msg=lambda text: f"{where}: {text}",
    )  # fmt: skip


def side_by_side(
    build: Build,
    engine: str,
    dtype: torch.dtype,
    steps: int = 4,
    check: Callable[[Any, Any, str], None] = assert_equal,
    between: Callable[[Optimizer, list[Tensor], int], None] | None = None,
    grad_dtype: torch.dtype | None = None,
    shapes: Sequence[tuple[int, ...]] = SHAPES,
    device: str = "cpu",
) -> tuple[Optimizer, Optimizer]:
    """Step `build(params, 'eager')` and `build(params, engine)` and compare everything after each step.

    `between(opt, params, i)` may change either before step `i`.
    """
    ours, theirs = params(dtype, shapes, device), params(dtype, shapes, device)
    a, b = build(theirs, "eager"), build(ours, engine)
    for i in range(steps):
        grads = gradients(theirs, i, grad_dtype)
        for opt, ps in ((a, theirs), (b, ours)):
            for p, g in zip(ps, grads, strict=True):
                p.grad = None
                if g.dtype != p.dtype:
                    p.grad_dtype = g.dtype  # torch checks the dtype of a gradient since 2.10
                p.grad = g.clone()
            if between is not None:
                between(opt, ps, i)
            opt.step()
        for j, (p, q) in enumerate(zip(theirs, ours, strict=True)):
            x, y = entries(a, p), entries(b, q)
            assert list(x) == list(y), (i, j)
            for key in x:
                check(x[key], y[key], f"step {i}, parameter {j} {tuple(p.shape)}, {key}")
    return a, b
