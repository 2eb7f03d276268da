"""Flat buffers: the memory of a bucket's parameters, which become views of it, and the slices that a rank owns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence, Set
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

from ...spread import is_spread, part_of
from ..communication.transport import GroupTransport, Transport
from ..ownership.layout import Layout
from ..ownership.places import Bucket
from ..wires.header import EXTRA
from ..wires.wire import Wire, wire_of

KEPT = 8
"""Sets of active parameters whose wires are kept: freezing mostly changes between a few."""


@dataclass
class FlatBucket:
    """A bucket at run time.

    Attributes:
        bucket: its place in the layout.
        flat: `[bucket.numel]`, the memory of all its parameters.
        label: what a profiler shows, naming the bucket and its first and last parameter.
    """

    bucket: Bucket
    flat: Tensor
    label: str


class Buffers:
    """All buckets of a layout with their memory, on one rank.

    Making it moves `params` (in the layout's order; of DTensors this rank's part) into the buffers: each keeps its
    identity and its value, and becomes a contiguous tensor on the buffer's memory, with a storage of its own. A
    collective on the buffer then reads and writes the parameters in place.

    Attributes:
        params: all parameters, in the layout's order.
        buckets: all buckets with their memory.
        bucket_of: for each parameter the number of its bucket.
    """

    def __init__(self, layout: Layout, rank: int, params: Sequence[Tensor], transport: Transport | None = None) -> None:
        self.rank = rank
        self._transport = transport or GroupTransport(None)
        self.layout = layout
        self.params: list[Tensor] = []
        self.buckets: list[FlatBucket] = []
        self._slices: dict[int, Tensor] = {}
        self._homes: list[int] = []
        self._plain = True
        self.bucket_of: list[int] = []
        self._reducing: dict[frozenset[int], tuple[Wire, ...]] = {}
        self._gathering: dict[frozenset[int], tuple[Wire, ...]] = {}
        self.extend(layout, params)

    def extend(self, layout: Layout, params: Sequence[Tensor]) -> None:
        """Take in `params`, the parameters of the buckets that `layout` has more than the present one."""
        self.layout = layout
        self._reducing.clear()
        self._gathering.clear()
        self.params += params
        for bucket in layout.buckets[len(self.buckets) :]:
            self.buckets.append(self._make(bucket))
        self._plain = not any(map(is_spread, self.params))
        self._homes += [part_of(p).data_ptr() for p in params]
        self.bucket_of += [layout.place(i)[0].index for i in range(len(self.bucket_of), len(self.params))]

    def _make(self, bucket: Bucket) -> FlatBucket:
        """The buffer of `bucket`, with its parameters moved in."""
        members = [self.params[entry.param] for entry in bucket.entries]
        flat = self._transport.empty(bucket.numel, part_of(members[0]).detach()).zero_()
        for entry, p in zip(bucket.entries, members, strict=True):
            home = flat[entry.start : entry.stop]
            part = part_of(p)
            home.copy_(part.detach().reshape(-1))
            part.data = on_own_storage(home).view(part.shape)
            start, stop = bucket.interval(entry, self.rank)
            self._slices[entry.param] = home[start:stop]
        names = [self.layout.params[bucket.entries[i].param].name for i in (0, -1)]
        return FlatBucket(bucket, flat, f"bucket {bucket.index} ({names[0]} .. {names[1]})")

    def slice(self, param: int) -> Tensor:
        """The elements of parameter `param` that this rank owns, 1-d, a view of the parameter's memory."""
        return self._slices[param]

    def cut(self, param: int, whole: Tensor) -> Tensor:
        """The same elements of `whole`, a tensor of the parameter's shape: a view if `whole` is contiguous."""
        start, stop = self.layout.interval(param, self.rank)
        return whole.reshape(-1)[start:stop]

    def reducing(self, params: Set[int]) -> tuple[Wire, ...]:
        """The wires that reduce the gradients of `params`, in the order of their collectives.

        The last bucket comes first, as backward makes gradients from the end; the first wire has the long header.
        """
        return self._wires(self._reducing, params, reversed(self.buckets), (EXTRA, 0))

    def gathering(self, params: Set[int]) -> tuple[Wire, ...]:
        """The wires that bring `params` from their owners, in the order in which a forward pass needs them."""
        return self._wires(self._gathering, params, self.buckets, (None, None))

    def _wires(
        self,
        known: dict[frozenset[int], tuple[Wire, ...]],
        params: Set[int],
        flats: Iterable[FlatBucket],
        extra: tuple[int | None, int | None],
    ) -> tuple[Wire, ...]:
        """Wires of `flats`, with `extra` numbers in the header of the first and of the others; kept for a few sets."""
        key = frozenset(params)
        if key not in known:
            if len(known) >= KEPT:
                known.clear()
            wires: list[Wire] = []
            for flat in flats:
                wire = wire_of(flat.bucket, key, extra[bool(wires)])
                if wire is not None:
                    wires.append(wire)
            known[key] = tuple(wires)
        return known[key]

    def displaced(self) -> list[str]:
        """Names of parameters whose memory is no longer in the buffer, because somebody has assigned `p.data`."""
        parts = self.params if self._plain else list(map(part_of, self.params))
        found = [part.data_ptr() for part in parts]
        if found == self._homes:
            return []
        moved = zip(self.layout.params, parts, found, self._homes, strict=True)
        return [spec.name for spec, part, now, home in moved if now != home and part.numel()]

    @property
    def deserted(self) -> bool:
        """Whether no parameter lies in the buffers any more."""
        return len(self.displaced()) == sum(1 for p in self.params if part_of(p).numel())


def on_own_storage(part: Tensor) -> Tensor:
    """A contiguous tensor on the memory of `part`, a contiguous slice, whose storage is that memory and no more.

    What others save models with takes tensors on one storage for one tensor under several names, and leaves out all but
    the first; `torch.save` of one of them would write all of the storage.
    """
    start = part.storage_offset() * part.element_size()
    own = part.untyped_storage()[start : start + part.nbytes]
    made = torch.empty(0, dtype=part.dtype, device=part.device)
    made.set_(own, 0, part.shape)  # type: ignore[call-overload]
    return made


def shared_memory(named: Sequence[tuple[str, Tensor]]) -> tuple[str, str] | None:
    """The names of two different tensors that use the same memory, None if there are none."""
    extents = []
    for name, whole in named:
        p = part_of(whole)
        if p.numel():
            reach = sum((n - 1) * stride for n, stride in zip(p.shape, p.stride(), strict=True)) + 1
            start = p.data_ptr()
            extents.append((str(p.device), start, start + reach * p.element_size(), name))
    extents.sort()
    for (device, _, end, name), (next_device, start, _, next_name) in pairwise(extents):
        if device == next_device and start < end:
            return name, next_name
    return None
