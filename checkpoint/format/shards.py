"""Where the parts of one stored tensor are: intervals of the flattened tensor, or boxes, each in a data file. Pure.

See [Note: runs of shards].
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
import numpy.typing as npt

from ...pieces import Box, Shape, interval_boxes
from ..errors import CheckpointError

# [Note: runs of shards]
# A job on a thousand ranks holds a piece of nearly every tensor on each of them. Nearly all of these pieces are equally
# large, a fixed number of elements apart, in files that follow each other: a few such runs say where all of them are.
# In memory the pieces of a tensor are columns of numbers, and only those that are asked for become objects.

Column = npt.NDArray[np.int64]
Row = list[Any]
_PERIODS = (*range(1, 17), 20, 22, 24, 28, 32, 44, 48, 64)


@dataclass(frozen=True)
class Shard:
    """A stored box: number of the file, first byte in that file (from its beginning)."""

    file: int
    at: int
    box: Box


@dataclass(frozen=True, eq=False)
class Shards:
    """The parts of one tensor of `shape`. Either `start` and `count` (elements of the flattened tensor) say what each
    part is, or `boxes` does; `file` and `at` are as in `Shard`. Intervals are sorted by `start`."""

    shape: Shape
    file: Column
    at: Column
    start: Column
    count: Column
    boxes: tuple[Box, ...] | None = None
    _longest: int = field(init=False, repr=False, default=0)
    _axis: int = field(init=False, repr=False, default=0)

    @classmethod
    def intervals(cls, shape: Shape, file: Any, start: Any, count: Any) -> Shards:
        """Parts that are intervals; where they are in their files is left for `placed`."""
        file, start, count = (np.asarray(column, dtype=np.int64) for column in (file, start, count))
        if len(start) > 1:
            order = np.argsort(start, kind="stable")
            file, start, count = file[order], start[order], count[order]
        return cls(shape, file, np.zeros_like(file), start, count)

    @classmethod
    def of_boxes(cls, shape: Shape, file: Sequence[int], boxes: Sequence[Box]) -> Shards:
        """Parts that are boxes; intervals where all of them are contiguous in the flattened tensor."""
        flat = [flat_interval(box, shape) for box in boxes]
        if all(interval is not None for interval in flat):
            starts, stops = ([i[n] for i in flat if i is not None] for n in (0, 1))
            return cls.intervals(shape, file, starts, [b - a for a, b in zip(starts, stops, strict=True)])
        axis = max(range(len(shape)), key=lambda d: len({box.offset[d] for box in boxes}))
        order = sorted(range(len(boxes)), key=lambda i: boxes[i].offset[axis])
        numbers = np.array([file[i] for i in order], dtype=np.int64)
        nothing = np.zeros_like(numbers)
        made = cls(shape, numbers, nothing, nothing, nothing, tuple(boxes[i] for i in order))
        object.__setattr__(made, "_axis", axis)
        object.__setattr__(made, "_longest", max(box.shape[axis] for box in boxes))
        return made

    def __len__(self) -> int:
        return len(self.file)

    def __eq__(self, other: object) -> bool:
        return (
            isinstance(other, Shards)
            and (self.shape, self.boxes) == (other.shape, other.boxes)
            and all(np.array_equal(getattr(self, c), getattr(other, c)) for c in ("file", "at", "start", "count"))
        )

    @property
    def sizes(self) -> Column:
        """Elements of each part."""
        if self.boxes is None:
            return self.count
        return np.array([box.numel for box in self.boxes], dtype=np.int64)

    def placed(self, at: Column) -> Shards:
        """The same, each part at that byte of its file."""
        made = Shards(self.shape, self.file, at, self.start, self.count, self.boxes)
        object.__setattr__(made, "_axis", self._axis)
        object.__setattr__(made, "_longest", self._longest)
        return made

    def check(self, where: str) -> None:
        """Raise CheckpointError unless the parts cover the tensor exactly once, no two in one file."""
        if len(self) > 1 and len(set(self.file.tolist())) != len(self):
            raise CheckpointError(f"{where}: two of its parts are in the same file")
        if self.boxes is not None:
            check_cover(where, self.shape, self.boxes)
            return
        total, stops = math.prod(self.shape), self.start + self.count
        if len(self) and not self.start[0] and stops[-1] == total and (self.start[1:] == stops[:-1]).all():
            return
        held = 0
        for start, count in zip(self.start.tolist(), self.count.tolist(), strict=True):
            if start != held:
                wrong = "overlap" if start < held else "leave a gap"
                raise CheckpointError(f"{where}: its parts {wrong} at element {start} of shape {self.shape}")
            held += count
        if held != total:
            raise CheckpointError(f"{where}: {held} of the {total} elements of shape {self.shape} are there")

    def meeting(self, box: Box, itemsize: int) -> Iterator[tuple[Shard, Box]]:
        """The stored boxes that share elements with `box`, each with the shared box."""
        if not box.numel:
            return
        found = self._near_boxes(box) if self.boxes is not None else self._near_intervals(box, itemsize)
        for shard in found:
            common = box if shard.box == box else shard.box.intersect(box)
            if common:
                yield shard, common

    def _near_boxes(self, box: Box) -> Iterator[Shard]:
        assert self.boxes is not None
        axis = self._axis
        first = bisect_left(self.boxes, box.offset[axis] - self._longest + 1, key=lambda b: b.offset[axis])
        last = bisect_left(self.boxes, box.stop[axis], key=lambda b: b.offset[axis])
        for i in range(first, last):
            yield Shard(int(self.file[i]), int(self.at[i]), self.boxes[i])

    def _near_intervals(self, box: Box, itemsize: int) -> Iterator[Shard]:
        low = flat_index(box.offset, self.shape)
        high = flat_index(tuple(n - 1 for n in box.stop), self.shape) + 1
        first = bisect_right(self.start, low) - 1
        last = bisect_left(self.start, high, max(first, 0))
        for i in range(max(first, 0), last):
            start, at = int(self.start[i]), int(self.at[i])
            for part in interval_boxes(self.shape, start, start + int(self.count[i])):
                yield Shard(int(self.file[i]), at, part)
                at += part.numel * itemsize

    # ---- rows of the manifest

    def rows(self) -> list[Row]:
        """What the manifest says: `[file, start, count]`, with `[..., times, files, elements]` for a run of them;
        `[file, offset, shape]` for boxes."""
        if self.boxes is not None:
            return [[int(f), b.offset, b.shape] for f, b in zip(self.file, self.boxes, strict=True)]
        if len(self) < 3:
            return sorted(
                [f, s, n] for f, s, n in zip(*(c.tolist() for c in (self.file, self.start, self.count)), strict=True)
            )
        order = np.argsort(self.file, kind="stable")
        file, start, count = self.file[order], self.start[order], self.count[order]
        rows: list[Row] = []
        turns = np.flatnonzero(np.diff(start) < 0) + 1  # where the next parts of all ranks begin
        for first, last in pairwise([0, *turns.tolist(), len(file)]):
            rows += _runs(file[first:last], start[first:last], count[first:last])
        return rows


def _runs(file: Column, start: Column, count: Column) -> list[Row]:
    """Rows in the order of the files, runs of equal steps together."""
    if len(file) < 3:
        return [[int(f), int(s), int(n)] for f, s, n in zip(file, start, count, strict=True)]
    period = _period(file, start, count)
    rows: list[Row] = []
    for lane in range(period):
        f, s, n = file[lane::period], start[lane::period], count[lane::period]
        step_f, step_s = np.diff(f), np.diff(s)
        alike = (np.diff(step_f) == 0) & (np.diff(step_s) == 0) & (np.diff(n)[1:] == 0) & (np.diff(n)[:-1] == 0)
        at = 0
        breaks = np.append(np.flatnonzero(~alike), len(f) - 2)
        while at < len(f):
            last = int(breaks[np.searchsorted(breaks, at)]) + 1 if at < len(f) - 2 else at
            if last - at < 2:
                rows.append([int(f[at]), int(s[at]), int(n[at])])
                at += 1
                continue
            rows.append([int(f[at]), int(s[at]), int(n[at]), last - at + 1, int(step_f[at]), int(step_s[at])])
            at = last + 1
    return sorted(rows)


def _period(file: Column, start: Column, count: Column) -> int:
    """The distance at which most shards repeat the steps of the one before."""
    best, most = 1, -1
    for period in _PERIODS:
        if 3 * period > len(file):
            break
        step = start[period:] - start[:-period]
        far = file[period:] - file[:-period]
        same = (count[period:] == count[:-period])[: -period or None]
        alike = int(((step[period:] == step[:-period]) & (far[period:] == far[:-period]) & same).sum())
        if alike > most + 2 * period:
            best, most = period, alike
        if most >= len(file) - 2 * best - 2:
            break
    return best


# ---- boxes ----------------------------------------------------------------------------------------------------------


def flat_index(index: Shape, shape: Shape) -> int:
    """The row-major position of `index` in a tensor of `shape`."""
    at = 0
    for i, n in zip(index, shape, strict=True):
        at = at * n + i
    return at


def flat_interval(box: Box, shape: Shape) -> tuple[int, int] | None:
    """The elements `(start, stop)` of the flattened tensor that `box` is, or None where they are not in a row."""
    if not box.fits(shape):
        raise CheckpointError(f"the box at {box.offset} of shape {box.shape} is outside shape {shape}")
    if not box.numel:
        return 0, 0
    start = flat_index(box.offset, shape)
    stop = flat_index(tuple(n - 1 for n in box.stop), shape) + 1
    return (start, stop) if stop - start == box.numel else None


def check_cover(name: str, shape: Shape, boxes: Sequence[Box]) -> None:
    """Raise CheckpointError unless `boxes` cover a tensor of `shape` exactly once. Empty boxes count for nothing."""
    for box in boxes:
        if not box.fits(shape):
            raise CheckpointError(f"{name}: the box at {box.offset} of shape {box.shape} is outside shape {shape}")
    solid = [box for box in boxes if box.numel]
    overlap = _overlap(solid)
    if overlap:
        a, b = overlap
        raise CheckpointError(f"{name}: the boxes at {a.offset} of {a.shape} and at {b.offset} of {b.shape} overlap")
    held = sum(box.numel for box in solid)
    if held != math.prod(shape):
        raise CheckpointError(f"{name}: {held} of the {math.prod(shape)} elements of shape {shape} are there")


def _overlap(boxes: Sequence[Box]) -> tuple[Box, Box] | None:
    """Two boxes that share an element, or None: a sweep along the dimension in which most boxes begin apart."""
    if len(boxes) < 2:
        return None
    if not boxes[0].shape:
        return boxes[0], boxes[1]
    axis = max(range(len(boxes[0].shape)), key=lambda d: len({box.offset[d] for box in boxes}))
    open_boxes: list[Box] = []
    for box in sorted(boxes, key=lambda box: box.offset[axis]):
        open_boxes = [other for other in open_boxes if other.stop[axis] > box.offset[axis]]
        for other in open_boxes:
            if other.intersect(box):
                return other, box
        open_boxes.append(box)
    return None
