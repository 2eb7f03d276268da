"""Callbacks without `needs`, as a user writes them. Not in a test's module: pytest puts calls of its own into those."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def sign_step(p: Tensor, lr: float, grad_avg: Tensor, **kwargs: Any) -> None:
    p.data.sub_(lr * grad_avg.sign())


def unit_step(p: Tensor, lr: float, **kwargs: Any) -> dict[str, Any]:
    """Norms of its own, not `whole_norm`, and a state shaped like the parameter."""
    assert p.grad is not None
    size = p.grad.norm() + 1e-3
    p.data.sub_(p.grad / size, alpha=lr)
    return {"kept": p.data * 2, "size": size}


def counting_step(p: Tensor, lr: float, seen: int = 0, **kwargs: Any) -> dict[str, Any]:
    """Elementwise at first, with a norm from the third step on."""
    assert p.grad is not None
    scale = p.grad.norm() if seen >= 2 else 2.0
    p.data.sub_(p.grad * scale, alpha=lr)
    return {"seen": seen + 1}


def turning_step(p: Tensor, lr: float, seen: int = 0, grad_avg: Tensor | None = None, **kwargs: Any) -> dict[str, Any]:
    """Elementwise for two steps; then it looks at the order of the elements, which slices do not have."""
    assert p.grad is not None
    grad = p.grad.cumsum(0) if seen >= 2 else p.grad
    p.data.sub_(grad, alpha=lr)
    return {"seen": seen + 1}


def largest_step(p: Tensor, lr: float, **kwargs: Any) -> None:
    assert p.grad is not None
    p.data.sub_(p.grad / (p.grad.abs().max() + 1), alpha=lr) if p.numel() else None


def item_step(p: Tensor, lr: float, **kwargs: Any) -> None:
    assert p.grad is not None
    p.data.sub_(p.grad, alpha=lr * min(p.grad.abs().sum().item(), 1.0))


limit = 100


def limited_step(p: Tensor, lr: float, seen: int = 0, **kwargs: Any) -> dict[str, Any]:
    assert p.grad is not None
    p.data.sub_(p.grad.cumsum(0) if seen >= limit else p.grad, alpha=lr)
    return {"seen": seen + 1}
