"""Where the gradient of a rank's slices comes from.

`LocalGradients` (stage 1): somebody has averaged `p.grad` over the ranks, each rank reads its slice of it.
`ReducedGradients` (stage 2, reduced.py): gradients are summed over the ranks, of which each keeps its own part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Protocol

import torch
from torch import Tensor

from ..parts import part_of_grad
from .agreement import Agreement
from .buckets import Buffers
from .collectives import Ranks
from .header import Place


class Gradients(Protocol):
    """What a step asks of its gradients. Parameters are known by their index in the layout."""

    def settle(self, place: Place) -> list[int]:
        """The parameters that step now: active, with a gradient on any rank. Collective: all ranks are at `place`."""

    def slice(self, param: int) -> Tensor | None:
        """This rank's elements of the averaged gradient, 1-d; None where it has none."""

    def held(self, params: Iterable[int]) -> list[Tensor]:
        """Tensors that hold this rank's gradients of `params`, and beside them nothing but zeros."""

    def consumed(self) -> None:
        """The step is done."""

    def clear(self) -> None:
        """Forget everything that is not in `p.grad`."""

    def watch(self) -> None:
        """Attend to the parameters that the buffers have and that are not attended to yet."""


class LocalGradients:
    """Stage 1: `p.grad` is whole and averaged on every rank."""

    def __init__(self, ranks: Ranks, buffers: Buffers, agreement: Agreement) -> None:
        self._ranks, self._buffers, self._agreement = ranks, buffers, agreement

    def settle(self, place: Place) -> list[int]:
        """The parameters that have a `p.grad` on any rank."""
        active = self._agreement.stepping()
        has = [i in active and p.grad is not None for i, p in enumerate(self._buffers.params)]
        *_, anywhere = self._agreement.ask(place, False, sparse(self._buffers), has)
        return [i for i, there in enumerate(anywhere) if there]

    def slice(self, param: int) -> Tensor | None:
        """This rank's elements of `p.grad`."""
        grad = part_of_grad(self._buffers.params[param])
        return None if grad is None else self._buffers.cut(param, grad)

    def held(self, params: Iterable[int]) -> list[Tensor]:
        """The slices."""
        return [part for part in map(self.slice, params) if part is not None]

    def consumed(self) -> None:
        """Nothing to do: `p.grad` is the user's to drop."""

    def clear(self) -> None:
        """Nothing to do."""

    def watch(self) -> None:
        """Nothing to do."""


def scale(tensors: Sequence[Tensor], by: Tensor) -> None:
    """Multiply `tensors` with the 0-d tensor `by`, in as few kernels as can be."""
    for device in {t.device for t in tensors}:
        here = [t for t in tensors if t.device == device]
        torch._foreach_mul_(here, by.to(device))


def sparse(buffers: Buffers) -> str | None:
    """What is wrong with a gradient that is not dense, and so has no slices; None if there is none."""
    for spec, p in zip(buffers.layout.params, buffers.params, strict=True):
        if p.grad is not None and p.grad.layout != torch.strided:
            return (
                f"the gradient of {spec.name!r} is sparse, which has no slices: use dense gradients "
                f"(Embedding(sparse=False))"
            )
    return None
