"""Who writes what, and which bytes to read: arithmetic on boxes. Pure: no file, no process group, no data.

See [Note: two halves of a plan].
"""

from __future__ import annotations

import heapq
import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from ...pieces import Box, Shape, interval_boxes
from ..format.records import file_order

# [Note: two halves of a plan]
# Saving: a tensor that one process holds a part of is written by that process; a tensor that many processes hold whole
# is given to one of them, or cut in rows where it is larger than a fair share. Every process computes the same plan
# from facts that all of them share, so no plan travels.
# Loading: each process intersects the boxes that it wants with the boxes on disk. Checksums are per block of a file, so
# what is read is rounded out to whole blocks; neighbours in a file are read together.

PART_BYTES = 512 << 20
READ_BYTES = 16 << 20
_BLOCK_RANGE = (256 << 10, 16 << 20)
_MANY_BLOCKS = 1 << 16
_LEAST_CUT = 1 << 20


def block_bytes(total: int) -> int:
    """Bytes per checksum for a checkpoint of `total` bytes: 256 KiB to 16 MiB, a power of two, few enough in number."""
    smallest, largest = _BLOCK_RANGE
    block = smallest
    while block < largest and total > block * _MANY_BLOCKS:
        block *= 2
    return block


# ---- saving ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A tensor that several ranks hold whole: who may write it (`holders`, None for all) is a matter of the plan.

    One that may not be `cut` is written by one rank however large it is.
    """

    key: str
    shape: Shape
    itemsize: int
    holders: tuple[int, ...] | None = None
    cut: bool = True

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor."""
        return math.prod(self.shape) * self.itemsize


def share_out(tensors: Sequence[Whole], load: Sequence[int]) -> list[list[tuple[str, Box]]]:
    """For each rank the boxes that it writes of `tensors`; `load` `[world]` are the bytes it writes anyway.

    Whole tensors, the largest first, to the rank with the least so far; a tensor of more than a fair share of
    the bytes of `tensors` (and 1 MiB) is cut along its first dimension that can be cut. Same input, same plan.
    """
    todo: list[list[tuple[str, Box]]] = [[] for _ in load]
    total = list(load)
    fair = max(_LEAST_CUT, -(-sum(t.nbytes for t in tensors) // len(total)))
    jobs = [(box, t) for t in tensors for box in _cuts(t, fair)]
    jobs.sort(key=lambda job: (-job[0].numel * job[1].itemsize, job[1].key, job[0].offset))
    free = [(bytes_, rank) for rank, bytes_ in enumerate(total)]
    heapq.heapify(free)
    for box, tensor in jobs:
        size = box.numel * tensor.itemsize
        if tensor.holders is not None:
            rank = min(tensor.holders, key=lambda r: (total[r], r))
        else:
            while free[0][0] != total[free[0][1]]:  # it has been given something as a holder
                heapq.heapreplace(free, (total[free[0][1]], free[0][1]))
            rank = free[0][1]
            heapq.heapreplace(free, (total[rank] + size, rank))
        total[rank] += size
        todo[rank].append((tensor.key, box))
    return todo


def _cuts(tensor: Whole, fair: int) -> list[Box]:
    whole = Box.whole(tensor.shape)
    return cut_box(whole, _fair_cut(tensor, fair)) if tensor.cut else [whole]


def _fair_cut(tensor: Whole, fair: int) -> int:
    """Elements per box when `tensor` is cut into boxes of about `fair` bytes, of equally many rows where possible."""
    boxes = -(-tensor.nbytes // fair)
    rows = next((n for n in tensor.shape if n > 1), 1)
    if boxes < 2 or rows < boxes:
        return max(1, fair // tensor.itemsize)
    return -(-rows // boxes) * (math.prod(tensor.shape) // rows)


def cut_box(box: Box, limit: int) -> list[Box]:
    """`box` as boxes of at most `limit` elements, in row-major order, each contiguous in the data of `box`."""
    if box.numel <= limit:
        return [box]
    axis = next(d for d, n in enumerate(box.shape) if n > 1)
    row = box.numel // box.shape[axis]
    rows = max(1, limit // row)
    cuts: list[Box] = []
    for first in range(0, box.shape[axis], rows):
        offset, shape = list(box.offset), list(box.shape)
        offset[axis] += first
        shape[axis] = min(rows, box.shape[axis] - first)
        cuts += cut_box(Box(tuple(offset), tuple(shape)), limit)
    return cuts


@dataclass(frozen=True)
class Written:
    """A box of the tensor `key` as it lies in a data file; `source` is the index of the caller's piece."""

    key: str
    box: Box
    itemsize: int
    source: int

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return self.box.numel * self.itemsize


def pack(boxes: Sequence[tuple[str, Box, int]], part_bytes: int, cut: bool = True) -> list[list[Written]]:
    """Spread `(key, box, itemsize)` over files of at most `part_bytes`, no key twice in one file (a safetensors rule).

    Without `cut` a box larger than that gets a file of its own. The order in a file is that of `file_order`.
    """
    parts: list[list[Written]] = []
    sizes: list[int] = []
    keys: list[set[str]] = []
    for source, (key, box, itemsize) in enumerate(boxes):
        for part in cut_box(box, max(1, part_bytes // itemsize)) if cut else [box]:
            item = Written(key, part, itemsize, source)
            room = (i for i, size in enumerate(sizes) if size + item.nbytes <= part_bytes and key not in keys[i])
            at = next(room, len(parts))
            if at == len(parts):
                parts.append([])
                sizes.append(0)
                keys.append(set())
            parts[at].append(item)
            sizes[at] += item.nbytes
            keys[at].add(key)
    for items in parts:
        items.sort(key=lambda item: file_order(item.key, item.itemsize))
    return parts


# ---- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Use:
    """A part of the wanted box number `target`: of the stored `box`, whose bytes begin at `at` in the file number
    `file`, the elements of `common`."""

    target: int
    file: int
    at: int
    box: Box
    common: Box
    itemsize: int

    @property
    def stop(self) -> int:
        """The byte in the file after the last of the stored box."""
        return self.at + self.box.numel * self.itemsize

    def boxes(self, start: int, stop: int) -> list[Box]:
        """What the bytes `start` to `stop` of the file are, as boxes of the whole tensor, in the order of the bytes."""
        if (start, stop) == (self.at, self.stop):
            return [self.box]
        first, last = (start - self.at) // self.itemsize, (stop - self.at) // self.itemsize
        local = interval_boxes(self.box.shape, first, last)
        origin = self.box.offset
        return [Box(tuple(a + b for a, b in zip(box.offset, origin, strict=True)), box.shape) for box in local]

    def spans(self, block: int) -> list[tuple[int, int]]:
        """The bytes of the file that hold `common`; stretches less than a block apart count as one."""
        if self.common == self.box:
            return [(self.at, self.stop)]
        local, shape = self.common.relative_to(self.box), self.box.shape
        inner = len(shape)  # dimensions from here on are in a row
        length = 1
        while inner and length == math.prod(shape[inner:]):
            inner -= 1
            length *= local.shape[inner]
        starts = np.zeros(1, dtype=np.int64)
        for d in range(inner):
            steps = (np.arange(local.shape[d]) + local.offset[d]) * math.prod(shape[d + 1 :])
            starts = (starts[:, None] + steps[None, :]).reshape(-1)
        starts = starts + sum(local.offset[d] * math.prod(shape[d + 1 :]) for d in range(inner, len(shape)))
        far = np.flatnonzero(np.diff(starts) - length >= max(1, block // self.itemsize))
        firsts = starts[np.append(0, far + 1)].tolist()
        lasts = starts[np.append(far, len(starts) - 1)].tolist()
        size = self.itemsize
        return [(self.at + a * size, self.at + (b + length) * size) for a, b in zip(firsts, lasts, strict=True)]


@dataclass
class Read:
    """One request: bytes `start` to `stop` of file number `file`, whole blocks, and what they are for, in order."""

    file: int
    start: int
    stop: int
    uses: list[Use] = field(default_factory=list)


def reads(uses: Sequence[Use], ends: Sequence[tuple[int, int]], block: int) -> list[Read]:
    """The requests for `uses`: whole blocks, neighbours together up to READ_BYTES, nothing twice.

    ends: for each file where its data begin and end; blocks are counted from where they begin.
    """
    stretches: list[tuple[int, int, int]] = []
    for use in uses:
        begin, end = ends[use.file]
        for start, stop in use.spans(block):
            low = begin + (start - begin) // block * block
            stretches.append((use.file, low, min(end, begin + -(-(stop - begin) // block) * block)))
    step = max(READ_BYTES, block)
    found: list[Read] = []
    for file, start, stop in sorted(stretches):
        last = found[-1] if found and found[-1].file == file else None
        at = start if last is None else max(start, last.stop)
        while at < stop:
            if last and last.stop == at and at - last.start < step:
                last.stop = min(stop, last.start + step)
            else:
                last = Read(file, at, min(stop, at + step))
                found.append(last)
            at = last.stop
    places = [(read.file, read.start) for read in found]
    for use in sorted(uses, key=lambda use: (use.file, use.at, use.target)):
        first = max(0, bisect_right(places, (use.file, use.at)) - 1)
        for read in found[first : bisect_left(places, (use.file, use.stop))]:
            if read.file == use.file and read.stop > use.at:
                read.uses.append(use)
    return found
