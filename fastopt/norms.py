"""The norm of gradients, by which they are clipped."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from .spread import Sharers, part_of_grad, sharers_of


def grad_norm(params: Iterable[Any], norm_type: float) -> tuple[Tensor, list[Tensor]]:
    """The norm of all gradients of `params` together, 0-d, float64; and this process's part of each gradient.

    One small all-reduce for each dimension of a mesh that cuts parameters.

    Raises:
        ValueError: `norm_type` is not positive.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type is a positive number or inf, got {norm_type}")
    by_sharers: dict[Sharers, list[Tensor]] = {}
    for p in params:
        grad = part_of_grad(p)
        if grad is not None:
            by_sharers.setdefault(sharers_of(p), []).append(grad)
    every = [grad for grads in by_sharers.values() for grad in grads]
    if not every:
        return torch.zeros((), dtype=torch.float64), []
    device, inf = every[0].device, norm_type == float("inf")
    totals = []
    for sharers, grads in by_sharers.items():
        norms = [_norm(g, norm_type).to(device) for g in grads if g.numel()]
        parts = torch.stack(norms) if norms else torch.zeros(1, dtype=torch.float64, device=device)
        total = parts.amax() if inf else parts.pow(norm_type).sum()
        for group in sharers:
            op = torch.distributed.ReduceOp.MAX if inf else torch.distributed.ReduceOp.SUM
            torch.distributed.all_reduce(total, op=op, group=group)
        totals.append(total)
    together = torch.stack(totals)
    return (together.amax() if inf else together.sum().pow(1 / norm_type)), every


def _norm(grad: Tensor, norm_type: float) -> Tensor:
    """The norm of one gradient, 0-d, float64; of the magnitudes where it is complex."""
    dtype = torch.complex128 if grad.is_complex() else torch.float64
    if grad.layout is not torch.strided:
        grad = grad.coalesce().values()
    norm: Tensor = torch.linalg.vector_norm(grad, norm_type, dtype=dtype)
    return norm
