"""Parameters and their places in buckets, pure values. See [Note: buckets, segments and regions] in layout.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch

from ...pieces import Box, Shape
from .tensor_parallel import PartOf

ALIGN_BYTES = 16
"""Parameters and regions start at multiples of this many bytes (what vector loads and tensor cores ask for)."""


@dataclass(frozen=True)
class ParamSpec:
    """What a layout needs to know of one parameter.

    Attributes:
        name: in the model.
        shape, dtype, device: of the parameter.
        group: index of its group.
        place: its position in the model; neighbours there share a bucket.
        forced: whether it trains in a frozen group too.
        cost: what a step on all of it costs, in any unit, to balance the owners of a `whole` layout; by default its
            number of elements.
        part: where it belongs if it is a part of a tensor that a tensor parallel plan has spread.
    """

    name: str
    shape: Shape
    dtype: torch.dtype
    group: int
    device: str = "cpu"
    place: int = 0
    forced: bool = False
    cost: float | None = None
    part: PartOf | None = None

    @property
    def load(self) -> float:
        """What it counts for the balance of owners."""
        return self.room if self.cost is None else self.cost

    @property
    def numel(self) -> int:
        """Number of elements (1 for shape `()`)."""
        return math.prod(self.shape)

    @property
    def room(self) -> int:
        """Elements that are set aside for it."""
        return self.numel if self.part is None else self.part.room

    @property
    def whole(self) -> Shape:
        """Shape of the tensor in the model, of which this may be a part."""
        return self.shape if self.part is None else self.part.shape

    @property
    def box(self) -> Box:
        """What this is of the tensor in the model."""
        return Box.whole(self.shape) if self.part is None else self.part.box


@dataclass(frozen=True)
class Entry:
    """A parameter's place in a bucket: its index in the layout and its elements `start` to `stop` of the flat buffer.

    `owner` is the rank that owns all of it in a `whole` layout, None in an `even` one.
    """

    param: int
    start: int
    stop: int
    owner: int | None = None


@dataclass(frozen=True)
class Region:
    """The elements `start` to `stop` of a bucket's flat buffer that `rank` owns."""

    rank: int
    start: int
    stop: int

    @property
    def numel(self) -> int:
        """Number of elements, padding included."""
        return self.stop - self.start


@dataclass(frozen=True)
class Segment:
    """The parameters of one group in a bucket, or all of a `whole` one: elements `start` to `stop` of its buffer."""

    group: int
    start: int
    stop: int
    entries: tuple[Entry, ...]

    def region(self, rank: int, world_size: int) -> Region:
        """What `rank` owns of it in an `even` layout."""
        share = (self.stop - self.start) // world_size
        return Region(rank, self.start + rank * share, self.start + (rank + 1) * share)


@dataclass(frozen=True)
class Bucket:
    """Parameters of one dtype and device in one flat buffer of `numel` elements.

    `owned` lists the regions of a `whole` layout, one per rank that owns something, in the order of the buffer;
    it is None in an `even` layout, where every rank owns an equal part of each segment. A `whole` bucket is one
    segment.
    """

    index: int
    dtype: torch.dtype
    device: str
    numel: int
    world_size: int
    segments: tuple[Segment, ...]
    owned: tuple[Region, ...] | None = None

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """All parameters, in the order of the buffer."""
        return tuple(entry for segment in self.segments for entry in segment.entries)

    def regions(self, rank: int) -> tuple[Region, ...]:
        """What `rank` owns of the flat buffer: a part of each segment, or its one region of a `whole` bucket."""
        if self.owned is None:
            return tuple(segment.region(rank, self.world_size) for segment in self.segments)
        return tuple(region for region in self.owned if region.rank == rank)

    @cached_property
    def _segment_of(self) -> dict[int, Segment]:
        return {entry.param: segment for segment in self.segments for entry in segment.entries}

    def interval(self, entry: Entry, rank: int) -> tuple[int, int]:
        """The part of the flattened parameter at `entry` that `rank` owns; `(n, n)` where it owns nothing."""
        count = entry.stop - entry.start
        if self.owned is not None:
            return (0, count) if entry.owner == rank else (count, count)
        region = self._segment_of[entry.param].region(rank, self.world_size)
        start = min(max(region.start, entry.start), entry.stop)
        stop = max(min(region.stop, entry.stop), start)
        return start - entry.start, stop - entry.start


def aligned(count: int, dtype: torch.dtype, parts: int = 1) -> int:
    """`count` elements of `dtype` rounded up so that each of `parts` equal parts is a multiple of the alignment."""
    unit = max(1, ALIGN_BYTES // dtype.itemsize) * parts
    return -(-count // unit) * unit
