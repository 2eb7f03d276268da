"""Who owns what: the layout, a pure value that says which interval of which flattened parameter each rank owns.

Nothing here knows of processes or tensors, so a layout for 16,384 ranks is made and tested in one process.

[Note: buckets, segments and regions]
Parameters of one dtype and device lie one after the other in *buckets*, in the order of the model, whatever their
groups. A bucket is what one collective moves. In it the parameters of each group form a *segment*, of which each rank
owns an equal *region*. A parameter starts at a multiple of `ALIGN_BYTES`, the gap before it is padding (`.`).

    bucket    | a a a a a a . . b b b b b b b b b b b . | c c c c c c . . |     layout 'even': two groups,
    segments  |---------------- group 0 ----------------|---- group 1 ----|     so two segments,
    ranks     |-- 0 --|-- 1 --|-- 2 --|-- 3 --|-- 4 ----|-0-|-1-|-2-|-3-|4|     each cut evenly, anywhere

Whatever set of groups is frozen, every rank is left with the same work and the same memory, and what the collective
moves is the other segments alone. Parameters that are marked `force_train` have segments of their own, so that they
train in a frozen group without moving the rest of it.

    bucket    | b b b b b b b b b b b | a a a a a a . . c c . |                 layout 'whole': one region per rank,
    ranks     |---------- 0 ----------|---------- 1 ----------|                 the bucket is sorted by owner

In a `whole` layout each parameter has one owner; owners are balanced within every group first, then over all groups.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import accumulate
from typing import Literal

import torch

from ..pieces import Box, Shape, interval_boxes
from .spread import PartOf

ALIGN_BYTES = 16
"""Parameters and regions start at multiples of this many bytes (what vector loads and tensor cores ask for)."""

BUCKET_BYTES = 25 * 2**20, 128 * 2**20
"""Least and largest default size of a bucket. A larger parameter is a bucket of its own."""

BUCKETS = 24
"""How many buckets there are by default, between those sizes: enough to hide all but one of them, and few enough that
starting collectives costs the host little (measured on two H200: 1.36 B parameters in 25 MiB buckets took 107 ms per
iteration, in 100 MiB ones 77 ms)."""

FIRST_BYTES = 2**20
"""Size of the first bucket of a model: nothing is left to hide its reduction behind, at the end of backward."""

Kind = Literal["even", "whole"]


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


@dataclass(frozen=True)
class Layout:
    """A parameter list cut into buckets for `world_size` ranks. Made by `Layout.even` or `Layout.whole`."""

    kind: Kind
    world_size: int
    params: tuple[ParamSpec, ...]
    buckets: tuple[Bucket, ...]
    bucket_bytes: int
    _places: dict[int, tuple[Bucket, Entry]] = field(init=False, repr=False, compare=False, hash=False)

    def __post_init__(self) -> None:
        places = {entry.param: (bucket, entry) for bucket in self.buckets for entry in bucket.entries}
        object.__setattr__(self, "_places", places)

    @classmethod
    def make(cls, kind: Kind, params: Iterable[ParamSpec], world_size: int, bucket_bytes: int | None = None) -> Layout:
        """The layout of `kind` for `params` (in registration order) on `world_size` ranks."""
        specs = tuple(params)
        bucket_bytes = default_bucket_bytes(specs) if bucket_bytes is None else bucket_bytes
        if world_size < 1:
            raise ValueError(f"a layout needs at least one rank, got world_size={world_size}")
        if bucket_bytes < 1:
            raise ValueError(f"bucket_bytes is a positive number of bytes, got {bucket_bytes}")
        if kind not in ("even", "whole"):
            raise ValueError(f"the kind of a layout is 'even' or 'whole', got {kind!r}")
        return cls(kind, world_size, (), (), bucket_bytes).extended(specs)

    @classmethod
    def even(cls, params: Iterable[ParamSpec], world_size: int, bucket_bytes: int | None = None) -> Layout:
        """Every bucket split evenly: for chains of elementwise cbs and chains whose only coupling is a norm.

        Examples:
            >>> import torch
            >>> spec = ParamSpec("weight", (8, 8), torch.float32, group=0)
            >>> layout = Layout.even([spec], world_size=4)
            >>> [layout.interval(0, rank) for rank in range(4)]
            [(0, 16), (16, 32), (32, 48), (48, 64)]
        """
        return cls.make("even", params, world_size, bucket_bytes)

    @classmethod
    def whole(cls, params: Iterable[ParamSpec], world_size: int, bucket_bytes: int | None = None) -> Layout:
        """Every parameter on one owner: for chains that need whole parameters."""
        return cls.make("whole", params, world_size, bucket_bytes)

    def extended(self, params: Iterable[ParamSpec]) -> Layout:
        """This layout with more parameters in new buckets; what is there stays where it is."""
        new = tuple(params)
        indices = range(len(self.params), len(self.params) + len(new))
        every = self.params + new
        owners = self._owners(every, indices) if self.kind == "whole" else None
        buckets = list(self.buckets)
        for members in _chunks(every, indices, self.bucket_bytes, first=not buckets):
            make = _even_bucket if owners is None else partial(_whole_bucket, owners)
            buckets.append(make(len(buckets), every, members, self.world_size))
        return Layout(self.kind, self.world_size, every, tuple(buckets), self.bucket_bytes)

    def _owners(self, params: Sequence[ParamSpec], new: Sequence[int]) -> dict[int, int]:
        """An owner for each of `new`: per group the dearest first, each to the rank with the least of that group.

        Ranks with equally much of the group are told apart by what they hold in all, then by their number. The order
        depends on the layout alone, so every rank comes to the same owners.
        """
        total = [0.0] * self.world_size
        for index in range(len(self.params)):
            total[self.owner(index)] += params[index].load
        owners: dict[int, int] = {}
        least = [(load, rank) for rank, load in enumerate(total)]
        heapq.heapify(least)
        by_group: dict[int, list[int]] = {}
        for i in new:
            by_group.setdefault(params[i].group, []).append(i)
        for group in sorted(by_group):
            members = sorted(by_group[group], key=lambda i: (-params[i].load, i))
            # A group of n parameters goes to the n ranks with the least load at most: the others need no look.
            heap = [(0.0, *heapq.heappop(least)) for _ in range(min(len(members), self.world_size))]
            for i in members:
                in_group, load, rank = heap[0]
                owners[i] = rank
                heapq.heapreplace(heap, (in_group + params[i].load, load + params[i].load, rank))
            for _, load, rank in heap:
                heapq.heappush(least, (load, rank))
        return owners

    def place(self, param: int) -> tuple[Bucket, Entry]:
        """The bucket of parameter `param` (its index) and its entry there."""
        return self._places[param]

    def interval(self, param: int, rank: int) -> tuple[int, int]:
        """`start, stop` of the elements of the flattened parameter that `rank` owns."""
        bucket, entry = self._places[param]
        return bucket.interval(entry, rank)

    def owner(self, param: int) -> int:
        """The one rank that owns parameter `param` in a `whole` layout."""
        owner = self._places[param][1].owner
        if owner is None:
            raise ValueError(f"parameter {self.params[param].name!r} has no single owner in an {self.kind!r} layout")
        return owner

    def boxes(self, param: int, rank: int, shape: Shape | None = None) -> list[Box]:
        """The boxes that `rank` holds of a state tensor of `shape` (by default the whole's) of parameter `param`.

        A state that is shaped like its parameter is held as the parameter is; any other (a 0-d count) is held whole:
        by every rank of an `even` layout, by the owner of a `whole` one.
        """
        spec = self.params[param]
        shape = spec.whole if shape is None else tuple(shape)
        if self.kind == "whole" and self.owner(param) != rank:
            return []
        if shape != spec.whole:
            return [Box.whole(shape)]
        if self.kind == "whole":
            return [spec.box]
        return [box.inside(spec.box) for box in interval_boxes(spec.shape, *self.interval(param, rank))]

    def elements(self, rank: int) -> int:
        """How many elements of parameters `rank` owns (padding not counted)."""
        return sum(stop - start for start, stop in (self.interval(i, rank) for i in range(len(self.params))))

    def loads(self, weights: Sequence[int] | None = None) -> list[int]:
        """For each rank its elements of parameters, each counted `weights[param]` times (once by default).

        Takes time for parameters and for ranks, not for each pair of them.
        """
        loads = Loads(self.world_size)
        for bucket in self.buckets:
            for segment in bucket.segments:
                share = (segment.stop - segment.start) // self.world_size
                for entry in segment.entries:
                    weight = 1 if weights is None else weights[entry.param]
                    if entry.owner is not None:
                        loads.add(entry.owner, entry.owner + 1, weight * (entry.stop - entry.start))
                    elif share:
                        loads.spread(entry.start - segment.start, entry.stop - segment.start, share, weight)
        return loads.totals()


class Loads:
    """Numbers by rank that are added to intervals of ranks at once."""

    def __init__(self, world_size: int) -> None:
        self._steps = [0] * (world_size + 1)

    def add(self, first: int, stop: int, amount: int) -> None:
        """Add `amount` to the ranks `first` to `stop`."""
        self._steps[first] += amount
        self._steps[stop] -= amount

    def spread(self, start: int, stop: int, share: int, weight: int) -> None:
        """Add `weight` for each of the elements `start` to `stop`, of which every rank has `share` in a row."""
        if start == stop:
            return
        first, last = start // share, (stop - 1) // share
        if first == last:
            return self.add(first, first + 1, weight * (stop - start))
        self.add(first, first + 1, weight * ((first + 1) * share - start))
        self.add(first + 1, last, weight * share)
        return self.add(last, last + 1, weight * (stop - last * share))

    def totals(self) -> list[int]:
        """The number of every rank."""
        return list(accumulate(self._steps[:-1]))


def aligned(count: int, dtype: torch.dtype, parts: int = 1) -> int:
    """`count` elements of `dtype` rounded up so that each of `parts` equal parts is a multiple of the alignment."""
    unit = max(1, ALIGN_BYTES // dtype.itemsize) * parts
    return -(-count // unit) * unit


def default_bucket_bytes(params: Iterable[ParamSpec]) -> int:
    """The size of a bucket for these parameters."""
    total = sum(spec.numel * spec.dtype.itemsize for spec in params)
    least, largest = BUCKET_BYTES
    return min(max(-(-total // BUCKETS), least), largest)


def _chunks(params: Sequence[ParamSpec], indices: Sequence[int], bucket_bytes: int, first: bool) -> list[list[int]]:
    """The members of each bucket: parameters of one dtype and device up to `bucket_bytes`, in the order of the model.

    A bucket that one group has filled by half ends with the group, so that few buckets have several segments.
    """
    chunks: list[list[int]] = []
    filling: dict[tuple[torch.dtype, str], tuple[list[int], int]] = {}
    for i in sorted(indices, key=lambda i: (params[i].place, i)):
        spec = params[i]
        key = (spec.dtype, spec.device)
        size = aligned(spec.room, spec.dtype) * spec.dtype.itemsize
        members, filled = filling.get(key, ([], 0))
        room = min(bucket_bytes, FIRST_BYTES) if first and members and members is chunks[0] else bucket_bytes
        groups = {params[j].group for j in members}
        ends = len(groups) == 1 and spec.group not in groups and 2 * filled >= room
        if not members or filled + size > room or ends:
            members, filled = [], 0
            chunks.append(members)
        members.append(i)
        filling[key] = (members, filled + size)
    return chunks


def _even_bucket(index: int, params: Sequence[ParamSpec], members: list[int], world_size: int) -> Bucket:
    """The bucket of an `even` layout that holds `members`: a segment for each group."""
    first = params[members[0]]
    kinds: dict[tuple[int, bool], list[int]] = {}
    for i in members:
        kinds.setdefault((params[i].group, params[i].forced), []).append(i)
    segments: list[Segment] = []
    at = 0
    for (group, _), mine in kinds.items():
        entries, stop = _place(params, mine, at)
        stop = at + aligned(stop - at, first.dtype, world_size)
        segments.append(Segment(group, at, stop, tuple(entries)))
        at = stop
    return Bucket(index, first.dtype, first.device, at, world_size, tuple(segments))


def _whole_bucket(
    owners: Mapping[int, int], index: int, params: Sequence[ParamSpec], members: list[int], world_size: int
) -> Bucket:
    """The bucket of a `whole` layout that holds `members`, sorted by owner."""
    first = params[members[0]]
    entries: list[Entry] = []
    regions: list[Region] = []
    at = 0
    for owner in sorted({owners[i] for i in members}):
        placed, stop = _place(params, [i for i in members if owners[i] == owner], at, owner)
        entries += placed
        regions.append(Region(owner, at, stop))
        at = stop
    segment = Segment(first.group, 0, at, tuple(entries))
    return Bucket(index, first.dtype, first.device, at, world_size, (segment,), tuple(regions))


def _place(
    params: Sequence[ParamSpec], members: Iterable[int], at: int, owner: int | None = None
) -> tuple[list[Entry], int]:
    """Entries for `members` from element `at` on, and where the next parameter may start."""
    entries = []
    for i in members:
        entries.append(Entry(i, at, at + params[i].numel, owner))
        at = aligned(at + params[i].room, params[i].dtype)
    return entries, at
