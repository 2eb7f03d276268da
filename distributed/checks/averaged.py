"""Stage 1: have gradients been averaged over the ranks? A few numbers of each tell.

[Note: averaged]
In stage 1 somebody else averages `p.grad` before `step`. If nobody does, each rank steps its slices with the gradient
of its own data: training goes wrong and nothing says so. Averaged gradients are the same on all ranks, so the first
step (or clipping) of every parameter compares them. A *sketch* is the norm of a gradient and some of its elements; the
digest of all sketches goes along with the message that stage 1 exchanges anyhow. Only where digests differ do ranks
exchange the sketches, and only what differs by more than rounding is an error: ranks that have clipped by themselves,
on unlike machines, differ in the last bits.

A rank without a gradient is not asked (it counts as zero there), nor is one whose gradient has an inf or NaN: the next
step is. A parameter that was frozen is compared anew, for DistributedDataParallel knows only of what required gradients
when it was made.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .consistency import compare

ADVICE = (
    "in stage 1 gradients are averaged by others and the same on all ranks when step() is called: wrap the model in "
    "DistributedDataParallel (anew, when other parameters begin to train), call the wrapped model, and make the last "
    "pass before a step outside of its no_sync(); or use stage=2, the default, which averages them itself. "
    "shard(..., check_gradients=False) lets them differ"
)

ELEMENTS = 16
"""Of a gradient, evenly spaced, in its sketch."""

Sketches = Mapping[int, "Sketch"]


@dataclass(frozen=True)
class Sketch:
    """Some numbers of a gradient.

    Attributes:
        norm: of all of it.
        elements: up to `ELEMENTS` of it, evenly spaced.
        tolerance: relative differences up to this are rounding, in the gradient's dtype.
    """

    norm: float
    elements: tuple[float, ...]
    tolerance: float

    @property
    def finite(self) -> bool:
        """Whether there is no inf or NaN in the gradient."""
        return math.isfinite(self.norm)

    def like(self, other: Sketch) -> bool:
        """Whether the two may be of the same gradient, rounded differently."""
        largest = max(map(abs, self.elements + other.elements), default=0.0)
        return abs(self.norm - other.norm) <= self.tolerance * max(self.norm, other.norm) and all(
            abs(a - b) <= self.tolerance * largest for a, b in zip(self.elements, other.elements, strict=True)
        )

    def __str__(self) -> str:
        shown = ", ".join(f"{element:.4g}" for element in self.elements[:3])
        return f"norm {self.norm:.6g} ({shown}{', ...' if len(self.elements) > 3 else ''})"


def sketch(grads: Mapping[int, Tensor]) -> dict[int, Sketch]:
    """The sketches of dense gradients; waits for each device once."""
    found: dict[int, Sketch] = {}
    for device in dict.fromkeys(grad.device for grad in grads.values()):
        here = {i: grad for i, grad in grads.items() if grad.device == device}
        numbers = [_numbers(grad.detach()) for grad in here.values()]
        values: list[float] = torch.cat(numbers).tolist()
        for (i, grad), mine in zip(here.items(), numbers, strict=True):
            norm, *elements = values[: len(mine)]
            del values[: len(mine)]
            found[i] = Sketch(norm, tuple(elements), max(1e-3, 8 * torch.finfo(grad.dtype).eps))
    return dict(sorted(found.items()))


def _numbers(grad: Tensor) -> Tensor:
    """The norm and some elements of a gradient, in float64."""
    flat = grad.reshape(-1)
    norm = torch.linalg.vector_norm(flat, dtype=torch.float64)
    return torch.cat([norm.reshape(1), flat[:: -(-flat.numel() // ELEMENTS) or 1].double()])


def comparable(by_rank: Sequence[Sketches]) -> set[int]:
    """The parameters with a gradient on any rank, that is finite on all that have one."""
    return {i for mine in by_rank for i in mine if all(one[i].finite for one in by_rank if i in one)}


def unlike(by_rank: Sequence[Sketches]) -> list[int]:
    """The parameters whose gradients differ between ranks that have one."""
    found = []
    for i in sorted(comparable(by_rank)):
        first, *others = (mine[i] for mine in by_rank if i in mine)
        if not all(first.like(other) for other in others):
            found.append(i)
    return found


def check_alike(by_rank: Sequence[Sketches], names: Sequence[str]) -> None:
    """Refuse gradients that differ between ranks.

    Raises:
        RanksDiffer: names the parameters, and shows what each rank has.
    """
    differ = unlike(by_rank)
    if differ:
        reports = [{f"the gradient of {names[i]!r}": str(mine[i]) for i in differ if i in mine} for mine in by_rank]
        compare(reports, advice=ADVICE)
