"""The global norm of sharded gradients, and clipping by it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from ...spread import Sharers
from ..communication.collectives import Ranks
from ..ownership.tensor_parallel import Spread

ROW = 1024
"""Elements whose squares are summed in float32 on GPUs."""


def total_norm(
    slices: Mapping[Sharers, Iterable[Tensor]], norm_type: float, ranks: Ranks, spread: Spread, device: torch.device
) -> Tensor:
    """The `norm_type` norm of all ranks' `slices` together, a 0-d float64 tensor.

    One collective of a number for each set of sharers, and one more for each dimension of a tensor parallel mesh.
    Sums run in float64, so that it does not matter where the slices are cut.
    """
    inf = norm_type == float("inf")
    local = [_partial(some, norm_type, device) for some in slices.values()]
    partial = torch.stack(local) if local else torch.zeros(1, dtype=torch.float64, device=device)
    over_ranks = ranks.largest(partial) if inf else ranks.sum(partial)
    totals = list(over_ranks.unbind())
    for i, sharers in enumerate(slices):
        if sharers:
            own = totals[i].clone()
            totals[i] = spread.largest(own, sharers) if inf else spread.sum(own, sharers)
    together = torch.stack(totals)
    return together.amax() if inf else together.sum().pow(1 / norm_type)


def _partial(slices: Iterable[Tensor], norm_type: float, device: torch.device) -> Tensor:
    """The sum of powers of all elements, or the largest of them, 0-d."""
    norms = [_norm(part, norm_type).to(device) for part in slices if part.numel()]
    local = torch.stack(norms) if norms else torch.zeros(1, dtype=torch.float64, device=device)
    return local.amax() if norm_type == float("inf") else local.pow(norm_type).sum()


def _norm(part: Tensor, norm_type: float) -> Tensor:
    """The norm of one 1-d part in float64.

    On GPUs squares are summed in float32 over short rows, and the rows in float64: reading is all that takes time then
    (in float64 from the start it takes eight times as long on an H200).
    """
    if not part.is_cuda or norm_type != 2 or part.numel() <= ROW:
        found: Tensor = torch.linalg.vector_norm(part, norm_type, dtype=torch.float64)
        return found
    whole = part.numel() // ROW * ROW
    rows = torch.linalg.vector_norm(part[:whole].view(-1, ROW), dim=1, dtype=torch.float32)
    norms = [torch.linalg.vector_norm(rows, dtype=torch.float64)]
    if whole < part.numel():
        norms.append(torch.linalg.vector_norm(part[whole:], dtype=torch.float64))
    together: Tensor = torch.linalg.vector_norm(torch.stack(norms))
    return together


def clip_factor(total: Tensor, max_norm: float) -> Tensor:
    """What to multiply gradients of norm `total` with so that their norm is at most `max_norm`; 1 if it is already."""
    return (max_norm / (total + 1e-6)).clamp(max=1.0)
