"""What is on its way between the ranks in stage 2, and this rank's part of what has come.

[Note: full gradients]
A bucket's full gradient is packed on the model's stream, and lives until it has been sent. Before the next one is made
the model's stream waits for the oldest, so that at most `IN_FLIGHT` are alive. Parts are waited for, added up, averaged
and scaled in the lane (lane.py), the latter two only when they are needed.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Sequence, Set

import torch
from torch import Tensor

from ..communication.collectives import Ranks, Reading, Reduction
from ..communication.lane import Lane
from ..communication.profiler_label import label
from ..parameters.buckets import Buffers
from ..wires.header import EXTRA
from ..wires.packing import pack
from ..wires.wire import Wire
from .rounds import Part, average, numbers_beside

IN_FLIGHT = 2
"""Buckets whose full gradient may be alive at once: one that backward is making, and one that is being reduced."""


class Reductions:
    """Buckets under way, and the parts of those that have come.

    Args:
        ranks: who takes part.
        buffers: the parameters.
        dtype: of the sums over the ranks; None takes that of the gradients and leaves the order to the backend.
        lane: where parts are made and kept.
    """

    def __init__(self, ranks: Ranks, buffers: Buffers, dtype: torch.dtype | None, lane: Lane) -> None:
        self._ranks, self._buffers, self._dtype, self._lane = ranks, buffers, dtype, lane
        self._in_flight: deque[tuple[Wire, Tensor, Reduction]] = deque()
        self._parts: dict[int, Part] = {}
        self._headers: dict[int, tuple[Wire, Tensor]] = {}

    def _send(self, wire: Wire, sources: dict[int, Tensor], leading: list[int]) -> Reduction:
        """Start the collective of one bucket."""
        flat = self._buffers.buckets[wire.bucket.index]
        arrived = []
        while len(self._in_flight) >= IN_FLIGHT - 1:
            before, full, earlier = self._in_flight.popleft()
            earlier.arrive()
            arrived.append((before, earlier))
            del full  # before the next one is made
        flags = [int(param in sources) for param in wire.params]
        full = self._ranks.transport.passing(wire.numel, flat.flat)
        with label(f"fastopt reduce {flat.label}"):
            pack(wire, full, sources, self._header(wire, flags, leading, full))
            with self._lane.inside():
                for before, earlier in arrived:
                    earlier.finish()  # the lane has just waited for the model's stream, which has waited for it
                    self._keep(before, earlier)
                reduction = self._ranks.reduce(wire, full, self._dtype, f"reduce {flat.label}")
        self._in_flight.append((wire, full, reduction))
        return reduction

    def _header(self, wire: Wire, flags: list[int], leading: list[int], beside: Tensor) -> Tensor:
        """The header on the device; that of a bucket of which all gradients are there is kept."""
        if leading or not all(flags):
            return numbers_beside(beside, flags + leading, wire.header)
        known = self._headers.get(wire.bucket.index)
        if known is None or known[0] is not wire:
            known = self._headers[wire.bucket.index] = wire, numbers_beside(beside, flags, wire.header)
        return known[1]

    def _send_nothing(self, wire: Wire, leading: list[int]) -> Reading:
        """Take part in a collective without a gradient, and forget its result."""
        self._land_all()
        reduction = self._send(wire, {}, leading)
        reading = self._read(wire, reduction)
        self._drop(reduction)
        self._in_flight.clear()
        return reading

    def _read(self, wire: Wire, reduction: Reduction) -> Reading:
        start = wire.payloads[self._ranks.rank] + len(wire.params)
        return reduction.read(start, start + EXTRA)

    def _land(self) -> None:
        """Wait for the oldest bucket under way, and keep its sum."""
        wire, _, reduction = self._in_flight.popleft()
        with self._lane.inside():
            with self._lane.outside():
                reduction.arrive()
            reduction.wait()
            self._keep(wire, reduction)

    def _keep(self, wire: Wire, reduction: Reduction) -> None:
        """Add a sum that has been waited for to this rank's gradient."""
        part = Part(wire, self._ranks.rank, reduction.mine, self._ranks.total)
        earlier = self._parts.get(wire.bucket.index)
        if earlier is not None:
            part.add(earlier)
        self._parts[wire.bucket.index] = part

    def _drop(self, reduction: Reduction) -> None:
        """Wait for a sum that nobody wants."""
        with self._lane.inside():
            with self._lane.outside():
                reduction.arrive()
            reduction.wait()

    def _pass_on(self) -> None:
        """Let sums go on over copies, which they do when they are waited for: other ranks may wait for them now."""
        if self._ranks.replicas is not None:
            for *_, reduction in self._in_flight:
                reduction.arrive()

    def _land_all(self) -> None:
        while self._in_flight:
            self._land()

    def _drop_all(self) -> None:
        """Wait for all that is under way, and forget it."""
        for *_, reduction in self._in_flight:
            self._drop(reduction)
        self._in_flight.clear()

    @property
    def taken(self) -> bool:
        """Whether there are gradients that are not in `p.grad` any more."""
        return bool(self._in_flight or self._parts)

    def under_way(self, buckets: Set[int]) -> bool:
        """Whether any of these buckets is still being reduced."""
        return any(wire.bucket.index in buckets for wire, *_ in self._in_flight)

    def land(self, buckets: Set[int]) -> None:
        """Wait for these buckets, and average them."""
        while self.under_way(buckets):
            self._land()
        with self._lane.inside():
            landed = [self._parts[index] for index in sorted(buckets & self._parts.keys())]
            average(landed)
            for part in landed:
                part.ready()

    def slices(self, params: Sequence[int]) -> list[Tensor | None]:
        """This rank's elements of averaged gradients."""
        bucket_of = self._buffers.bucket_of
        views: dict[int, Tensor] = {}
        for index in {bucket_of[i] for i in params} & self._parts.keys():
            views.update(self._parts[index].views)
        return [views.get(i) for i in params]

    def held(self, params: Iterable[int]) -> list[Tensor]:
        """The parts of all buckets; what is not active is zero in them."""
        self._land_all()
        average(self._parts.values())
        return [part.ready() for part in self._parts.values()]

    def scale(self, params: Iterable[int], by: Tensor) -> None:
        """Multiply all parts with a 0-d tensor when they are needed."""
        for part in self._parts.values():
            part.scale(by)
