"""Where the gradient of a rank's slices comes from.

`LocalGradients` (stage 1): somebody has averaged `p.grad` over the ranks, each rank reads its slice of it.
`ReducedGradients` (stage 2): hooks move every gradient out of `p.grad` into its bucket; buckets are summed over the
ranks, of which each keeps its own region.

[Note: rounds]
All gradients of one synchronised backward pass are reduced in one *round*: one collective per active bucket, in one
fixed order (last bucket first, as backward makes gradients from the end), whatever gradients exist. A bucket is
launched when all its parameters have a gradient and its predecessors are launched; the end of the backward pass
launches the rest, with zeros for what is missing. So the collectives of a round depend only on what the ranks have
agreed on at its start (see [Note: agreement] in consistency.py), never on which part of a model a rank has used.
"""

from __future__ import annotations

import weakref
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.profiler import record_function
from torch.utils.weak import WeakTensorKeyDictionary

from .agreement import Agreement, Waiting
from .buckets import Buffers, FlatBucket
from .collectives import Pending, Ranks

# The hook of every parameter: the optimizer that was made last gets its gradients.
_hooks: Any = WeakTensorKeyDictionary()

IN_FLIGHT = 2
"""Buckets whose full gradient may be alive at once while they are being reduced."""


class Gradients(Waiting, Protocol):
    """What a step asks of its gradients. Parameters are known by their index in the layout."""

    def slice(self, param: int) -> Tensor | None:
        """This rank's elements of the averaged gradient, 1-d; None where it has none."""

    def scale(self, params: Iterable[int], by: Tensor) -> None:
        """Multiply the gradients of `params` with the 0-d tensor `by`."""

    def consumed(self) -> None:
        """The step is done."""

    def clear(self) -> None:
        """Forget everything that is not in `p.grad`."""

    def watch(self) -> None:
        """Attend to the parameters that the buffers have and that are not attended to yet."""


class LocalGradients:
    """Stage 1: `p.grad` is whole and averaged on every rank."""

    def __init__(self, buffers: Buffers) -> None:
        self._buffers = buffers

    def reduce(self) -> None:
        """Nothing to do."""

    def unreduced(self, param: int) -> bool:
        """Never."""
        return False

    def has(self, param: int) -> bool:
        """Whether there is a `p.grad`."""
        return self._buffers.params[param].grad is not None

    def slice(self, param: int) -> Tensor | None:
        """This rank's elements of `p.grad`."""
        grad = self._buffers.params[param].grad
        return None if grad is None else self._buffers.cut(param, grad)

    def scale(self, params: Iterable[int], by: Tensor) -> None:
        """Multiply every `p.grad`."""
        for i in params:
            grad = self._buffers.params[i].grad
            if grad is not None:
                grad.mul_(by.to(grad.device))

    def consumed(self) -> None:
        """Nothing to do: `p.grad` is the user's to drop."""

    def clear(self) -> None:
        """Nothing to do."""

    def watch(self) -> None:
        """Nothing to do."""

    @property
    def problem(self) -> str | None:
        """A gradient that has no slices."""
        for spec, p in zip(self._buffers.layout.params, self._buffers.params, strict=True):
            if p.grad is not None and p.grad.layout != torch.strided:
                return sparse_gradient(spec.name)
        return None


class _Round:
    """The reduction of one backward pass: which buckets take part, which gradients have come, what is under way."""

    def __init__(self, buffers: Buffers, stepping: list[bool]) -> None:
        self.stepping = stepping
        members = {flat.bucket.index: [e.param for e in flat.bucket.entries] for flat in buffers.buckets}
        self.to_launch = deque(
            flat for flat in reversed(buffers.buckets) if any(stepping[i] for i in members[flat.bucket.index])
        )
        # Autograd brings nothing for a parameter that requires no gradient: who waits for it waits for the end.
        self.waits_for = {
            flat.bucket.index: {
                i for i in members[flat.bucket.index] if stepping[i] and buffers.params[i].requires_grad
            }
            for flat in self.to_launch
        }
        self.agreed = False
        self.tasks: set[int] = set()
        self.taken: set[int] = set()
        self.full: dict[int, Tensor] = {}
        self.in_flight: deque[tuple[FlatBucket, Tensor, Tensor, Pending]] = deque()

    def launched(self, index: int) -> bool:
        """Whether bucket `index` takes no more gradients."""
        return all(flat.bucket.index != index for flat in self.to_launch)


class ReducedGradients:
    """Stage 2: this rank holds the averaged gradient of its regions only.

    Args:
        ranks: who takes part.
        buffers: the parameters.
        agreement: knows which parameters step, and checks that the ranks start a round on the same buckets.
    """

    def __init__(self, ranks: Ranks, buffers: Buffers, agreement: Agreement) -> None:
        self._ranks, self._buffers, self._agreement = ranks, buffers, agreement
        self._regions: dict[int, Tensor] = {}
        self._seen: set[int] = set()
        self._round: _Round | None = None
        self._problem: str | None = None
        self._watched = 0
        self.syncing = True
        self.watch()

    def watch(self) -> None:
        """Put a hook on every parameter that autograd can reach, frozen ones included: they may be unfrozen later."""
        me = weakref.ref(self)
        for i, p in enumerate(self._buffers.params[self._watched :], start=self._watched):
            if p.is_leaf and p.is_floating_point():
                required = p.requires_grad
                p.requires_grad_(True)
                if p in _hooks:
                    _hooks[p].remove()
                _hooks[p] = p.register_post_accumulate_grad_hook(_hook(me, i))  # type: ignore[no-untyped-call]
                p.requires_grad_(required)
        self._watched = len(self._buffers.params)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients of backward passes inside stay in `p.grad`."""
        before, self.syncing = self.syncing, False
        try:
            yield
        finally:
            self.syncing = before

    @torch.no_grad()
    def arrived(self, param: int) -> None:
        """Autograd has put a gradient into the parameter's `.grad`."""
        if not self.syncing:
            return
        now = self._round or self._open()
        task = torch._C._current_graph_task_id()
        if task not in now.tasks:
            now.tasks.add(task)
            torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)
        bucket = self._buffers.layout.place(param)[0].index
        if now.stepping[param] and not now.launched(bucket):
            self._take(now, param)
            now.waits_for[bucket].discard(param)
            while now.to_launch and not now.waits_for[now.to_launch[0].bucket.index]:
                self._launch_next(now)

    @torch.no_grad()
    def reduce(self) -> None:
        """Reduce what is in `p.grad`, as another rank's backward pass does, or all ranks at a step."""
        now = self._round or self._open()
        now.agreed = True
        self._close(now)

    @torch.no_grad()
    def _backward_ended(self) -> None:
        if self._round is not None:
            self._close(self._round)

    def _open(self) -> _Round:
        self._round = _Round(self._buffers, self._agreement.stepping())
        return self._round

    def _close(self, now: _Round) -> None:
        """Launch the rest, and wait for all of it."""
        while now.to_launch:
            self._launch_next(now)
        while now.in_flight:
            self._land(now)
        self._round = None

    def _take(self, now: _Round, param: int) -> None:
        """Move a gradient from `p.grad` into its bucket."""
        p = self._buffers.params[param]
        grad, p.grad = p.grad, None
        if grad is None:
            return
        if grad.layout != torch.strided:
            self._problem = sparse_gradient(self._buffers.layout.params[param].name)
            return
        bucket, entry = self._buffers.layout.place(param)
        if bucket.index not in now.full:
            now.full[bucket.index] = torch.zeros_like(self._buffers.buckets[bucket.index].flat)
        place = now.full[bucket.index][entry.start : entry.stop].view(p.shape)
        place.add_(grad) if param in now.taken else place.copy_(grad)
        now.taken.add(param)
        self._seen.add(param)

    def _begin(self, now: _Round) -> None:
        """Agree on the round; if the ranks do not, its gradients are dropped."""
        try:
            self._agreement.start_round(self._problem)
        except Exception:
            self.clear()
            raise
        now.agreed = True

    def _launch_next(self, now: _Round) -> None:
        """Start to reduce the next bucket in order, with what is in `p.grad` without a hook having brought it."""
        flat = now.to_launch[0]
        for entry in flat.bucket.entries:
            if now.stepping[entry.param]:
                self._take(now, entry.param)
        if not now.agreed:
            self._begin(now)
        now.to_launch.popleft()
        full = now.full.pop(flat.bucket.index, None)
        if full is None:
            full = torch.zeros_like(flat.flat)
        with record_function(f"fastopt reduce {flat.label}"):
            mine, pending = self._ranks.reduce_bucket(flat.bucket, full)
        now.in_flight.append((flat, full, mine, pending))
        while len(now.in_flight) > IN_FLIGHT:
            self._land(now)

    def _land(self, now: _Round) -> None:
        """Wait for the oldest bucket under way and add its average to this rank's gradient."""
        flat, full, mine, pending = now.in_flight.popleft()
        pending.wait()
        mine.div_(self._ranks.world_size)
        index = flat.bucket.index
        if index in self._regions:
            self._regions[index].add_(mine)
        else:
            # A region that is a view would keep the whole bucket alive.
            self._regions[index] = mine.clone() if mine.numel() < full.numel() and mine._is_view() else mine

    def has(self, param: int) -> bool:
        """Whether the parameter has had a gradient on this rank since the last step."""
        return param in self._seen

    def unreduced(self, param: int) -> bool:
        """Whether a `p.grad` was made after the last round, as by a backward pass under `no_sync()`."""
        return self._buffers.params[param].grad is not None

    def slice(self, param: int) -> Tensor | None:
        """This rank's elements of the averaged gradient."""
        index, start, stop = self._buffers.span(param)
        held = self._regions.get(index)
        return None if held is None else held[start:stop]

    def scale(self, params: Iterable[int], by: Tensor) -> None:
        """Multiply the slices of `params`."""
        for i in params:
            part = self.slice(i)
            if part is not None:
                part.mul_(by.to(part.device))

    def consumed(self) -> None:
        """Free the gradients: what has stepped is not needed again."""
        self._regions.clear()
        self._seen.clear()

    def clear(self) -> None:
        """Forget the gradients and a round that a failed backward pass has left open."""
        self.consumed()
        self._problem = None
        if self._round is not None:
            for *_, pending in self._round.in_flight:
                pending.wait()
        self._round = None

    @property
    def problem(self) -> str | None:
        """A gradient that has no slices."""
        return self._problem


def _hook(gradients: weakref.ref[ReducedGradients], param: int) -> Callable[[Tensor], None]:
    """The hook of one parameter; it does not keep the optimizer alive."""

    def arrived(_: Tensor) -> None:
        alive = gradients()
        if alive is not None:
            alive.arrived(param)

    return arrived


def sparse_gradient(name: str) -> str:
    """What is wrong with a gradient that is not dense."""
    return f"the gradient of {name!r} is sparse, which has no slices: use dense gradients (Embedding(sparse=False))"
