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

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from ...pieces import Box, Shape, interval_boxes
from .cutting import chunks, default_bucket_bytes, even_bucket, find_owners, whole_bucket
from .loads import Loads
from .places import Bucket, Entry, ParamSpec

Kind = Literal["even", "whole"]


@dataclass(frozen=True)
class Layout:
    """A parameter list cut into buckets for `world_size` ranks. Made by `Layout.make`, `even` or `whole`."""

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
        if not isinstance(world_size, int) or world_size < 1:
            raise ValueError(f"a layout needs at least one rank, got world_size={world_size!r}")
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
        owners: dict[int, int] = {}
        if self.kind == "whole":
            placed = {index: self.owner(index) for index in range(len(self.params))}
            owners = find_owners(self.world_size, every, placed, indices)
        buckets = list(self.buckets)
        for members in chunks(every, indices, self.bucket_bytes, first=not buckets):
            at = len(buckets), every, members, self.world_size
            buckets.append(whole_bucket(owners, *at) if self.kind == "whole" else even_bucket(*at))
        return Layout(self.kind, self.world_size, every, tuple(buckets), self.bucket_bytes)

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
