"""Where the gradient of a rank's slices comes from.

`LocalGradients` (stage 1): somebody has averaged `p.grad` over the ranks, each rank reads its slice of it.
`ReducedGradients` (stage 2, reduced.py): gradients are summed over the ranks, of which each keeps its own part.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from typing import Protocol

import torch
from torch import Tensor

from ...spread import part_of, part_of_grad
from ..checks.agreement import Agreement
from ..checks.averaged import Sketch, check_alike, comparable, sketch
from ..checks.consistency import BOTH_WAYS, both_ways, equal_everywhere
from ..communication.collectives import Ranks
from ..parameters.buckets import Buffers
from ..wires.header import Place


class Gradients(Protocol):
    """What a step asks of its gradients. Parameters are known by their index in the layout."""

    @property
    def in_round(self) -> bool:
        """Whether a backward pass that reduces gradients is under way, or has failed."""

    @property
    def taken(self) -> bool:
        """Whether there are gradients that are not in `p.grad` any more."""

    @property
    def lacking(self) -> Set[int]:
        """The active parameters that have had a gradient on other ranks only, as of the last `settle`."""

    def settle(self, place: Place) -> list[int]:
        """The parameters that step now: active, with a gradient on any rank. Collective: all ranks are at `place`."""

    def slices(self, params: Sequence[int]) -> list[Tensor | None]:
        """This rank's elements of averaged gradients, each 1-d; None where there is none."""

    def held(self, params: Iterable[int]) -> list[Tensor]:
        """Tensors that hold this rank's gradients of `params`, and beside them nothing but zeros."""

    def under_way(self, buckets: Set[int]) -> bool:
        """Whether any of these buckets is still being reduced."""

    def land(self, buckets: Set[int]) -> None:
        """Make ready what `slice` gives of these buckets."""

    def scale(self, params: Iterable[int], by: Tensor) -> None:
        """Multiply what `held` gives of `params` with a 0-d tensor."""

    def consumed(self) -> None:
        """The step is done."""

    def clear(self) -> None:
        """Forget everything that is not in `p.grad`."""

    def watch(self) -> None:
        """Attend to the parameters that the buffers have and that are not attended to yet."""


class LocalGradients:
    """Stage 1: `p.grad` is whole and averaged on every rank."""

    in_round = False
    taken = False

    def __init__(self, ranks: Ranks, buffers: Buffers, agreement: Agreement, checks: bool = True) -> None:
        self._ranks, self._buffers, self._agreement = ranks, buffers, agreement
        self._checks = checks and not ranks.alone
        self._compared: Set[int] = frozenset()
        self.lacking: Set[int] = frozenset()

    def settle(self, place: Place) -> list[int]:
        """The parameters that have a `p.grad` on any rank.

        Raises:
            RanksDiffer: on all ranks, if gradients have not been averaged, see [Note: averaged] in averaged.py.
        """
        active = self._agreement.stepping()
        has = [i in active and p.grad is not None for i, p in enumerate(self._buffers.params)]
        problem = sparse(self._buffers)
        # A scaler may unscale what is to be averaged afterwards.
        sketches = self._sketches(active) if self._checks and not problem and place != "unscale_" else {}
        told = self._agreement.ask(place, False, problem, [*has, *both_ways(sketches)])[-1]
        by_rank = [sketches]
        if not equal_everywhere(told[-BOTH_WAYS:]):
            by_rank = self._ranks.gather_everywhere(sketches)
            check_alike(by_rank, [spec.name for spec in self._buffers.layout.params])
        self._compared |= comparable(by_rank)
        anywhere = [i for i, there in enumerate(told[:-BOTH_WAYS]) if there]
        self.lacking = frozenset() if len(anywhere) == sum(has) else frozenset(i for i in anywhere if not has[i])
        return anywhere

    def _sketches(self, active: Set[int]) -> dict[int, Sketch]:
        """Of the gradients that are still to be compared: those of a first step, and of what was frozen before."""
        if not self._compared <= active:
            self._compared &= active
        found = {i: p.grad for i in active - self._compared if (p := self._buffers.params[i]).grad is not None}
        return sketch({i: part_of(grad) for i, grad in found.items()}) if found else {}

    def slices(self, params: Iterable[int]) -> list[Tensor | None]:
        """This rank's elements of `p.grad`."""
        grads = [(i, part_of_grad(self._buffers.params[i])) for i in params]
        return [None if grad is None else self._buffers.cut(i, grad) for i, grad in grads]

    def held(self, params: Iterable[int]) -> list[Tensor]:
        """The slices."""
        return [part for part in self.slices(params) if part is not None]

    def under_way(self, buckets: Set[int]) -> bool:
        """Never."""
        return False

    def land(self, buckets: Set[int]) -> None:
        """Nothing to do."""

    def scale(self, params: Iterable[int], by: Tensor) -> None:
        """Multiply the slices in `p.grad` with a 0-d tensor."""
        scale(self.held(params), by)

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
    for i, p in enumerate(buffers.params):
        grad = p.grad
        if grad is not None and grad.layout != torch.strided:
            return (
                f"the gradient of {buffers.layout.params[i].name!r} is sparse, which has no slices: use dense "
                f"gradients (Embedding(sparse=False))"
            )
    return None
