"""Muon as a chain of two callbacks, with nothing declared: what it does to matrices needs them whole.

Jordan et al., https://kellerjordan.github.io/posts/muon/: momentum, whose singular values a Newton-Schulz iteration
then brings near 1. Parameters that are no matrices take the momentum as it is.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from fastopt import Optimizer, average_grad

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def newton_schulz(x: Tensor, steps: int) -> Tensor:
    """A matrix with the singular vectors of `x` [m, n] and singular values of about 1."""
    a, b, c = COEFFICIENTS
    tall = x.shape[0] > x.shape[1]
    x = x.mT if tall else x
    x = x / (x.norm() + 1e-7)
    for _ in range(steps):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


def muon_step(p: Tensor, lr: float, grad_avg: Tensor, **kwargs: Any) -> None:
    update = grad_avg
    if p.ndim >= 2 and p.numel():
        update = newton_schulz(grad_avg.reshape(p.shape[0], -1), steps=5).view_as(p)
    p.data.sub_(update, alpha=lr)


def muon(params: Any, lr: float = 0.02, mom: float = 0.95) -> Optimizer:
    return Optimizer(params, [average_grad, muon_step], lr=lr, mom=mom)


def newton_schulz_flops(p: Tensor) -> float:
    """Multiplications of a step on `p`."""
    if p.ndim < 2 or not p.numel():
        return p.numel()
    m, n = sorted((p.shape[0], p.numel() // p.shape[0]))
    return 5 * (2 * m * m * n + m**3)
