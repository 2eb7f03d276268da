"""Who writes what, and which bytes to read: arithmetic on boxes. Pure: no file, no process group, no data.

See [Note: two halves of a plan].
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from ..pieces import Box, Shape, interval_boxes
from .errors import CheckpointError

# [Note: two halves of a plan]
# Saving: a tensor that one process holds a part of is written by that process; a tensor that many processes hold whole
# is given to one of them, or cut in rows where it is larger than a fair share. Every process computes the same plan
# from facts that all of them share, so no plan travels.
# Loading: each process intersects the boxes that it wants with the boxes on disk. Checksums are per block of a stored
# box, so what is read is rounded out to whole blocks; neighbours in a file are read together.

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


# ---- boxes that make up a tensor -------------------------------------------------------------------------------------


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


# ---- saving ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Whole:
    """A tensor that several ranks hold whole: who may write it (`holders`, None for all) is a matter of the plan."""

    key: str
    shape: Shape
    itemsize: int
    holders: tuple[int, ...] | None = None

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
    jobs = [(box, t) for t in tensors for box in cut_box(Box.whole(t.shape), _fair_cut(t, fair))]
    jobs.sort(key=lambda job: (-job[0].numel * job[1].itemsize, job[1].key, job[0].offset))
    for box, tensor in jobs:
        ranks = range(len(total)) if tensor.holders is None else tensor.holders
        rank = min(ranks, key=lambda r: (total[r], r))
        total[rank] += box.numel * tensor.itemsize
        todo[rank].append((tensor.key, box))
    return todo


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


def pack(boxes: Sequence[tuple[str, Box, int]], part_bytes: int) -> list[list[Written]]:
    """Spread `(key, box, itemsize)` over files of at most `part_bytes`, no key twice in one file (a safetensors rule).

    Inside a file the widest elements come first, so that every tensor is aligned to its own element size.
    """
    parts: list[list[Written]] = []
    sizes: list[int] = []
    keys: list[set[str]] = []
    for source, (key, box, itemsize) in enumerate(boxes):
        for cut in cut_box(box, max(1, part_bytes // itemsize)):
            item = Written(key, cut, itemsize, source)
            room = (i for i, size in enumerate(sizes) if size + item.nbytes <= part_bytes and key not in keys[i])
            at = next(room, len(parts))
            if at == len(parts):
                parts.append([])
                sizes.append(0)
                keys.append(set())
            parts[at].append(item)
            sizes[at] += item.nbytes
            keys[at].add(key)
    for part in parts:
        part.sort(key=lambda item: (-item.itemsize, item.key))
    return parts


# ---- loading ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Shard:
    """A stored box: file number, first byte in that file, and the digests of its blocks (16 hex digits each)."""

    file: int
    at: int
    box: Box
    blocks: str


@dataclass(frozen=True)
class Use:
    """Bytes `start:stop` of `shard` (whole blocks, `at` in the file) that hold elements of the wanted box `target`."""

    key: str
    shard: Shard
    target: int
    itemsize: int
    start: int
    stop: int

    @property
    def boxes(self) -> list[Box]:
        """What the bytes are, as boxes of the whole tensor, in the order of the bytes."""
        origin = self.shard.box
        local = interval_boxes(origin.shape, self.start // self.itemsize, self.stop // self.itemsize)
        return [Box(tuple(a + b for a, b in zip(box.offset, origin.offset, strict=True)), box.shape) for box in local]


@dataclass
class Read:
    """One request: bytes `start:stop` of file number `file`, and what they are used for, in the order of the bytes."""

    file: int
    start: int
    stop: int
    uses: list[Use] = field(default_factory=list)


class ShardIndex:
    """The stored boxes of one tensor, to be asked which of them meet a wanted box."""

    def __init__(self, shards: Sequence[Shard]) -> None:
        self._axis = 0
        solid = [shard for shard in shards if shard.box.numel]
        if solid and solid[0].box.shape:
            self._axis = max(range(len(solid[0].box.shape)), key=lambda d: len({s.box.offset[d] for s in solid}))
            solid.sort(key=lambda shard: shard.box.offset[self._axis])
        self._shards = solid
        self._starts = [shard.box.offset[self._axis] for shard in solid] if solid and solid[0].box.shape else []
        self._longest = max((s.box.shape[self._axis] for s in solid), default=0) if self._starts else 0

    def meeting(self, box: Box) -> Iterator[tuple[Shard, Box]]:
        """The stored boxes that share elements with `box`, each with the shared box."""
        shards = self._shards
        if self._starts:
            low = bisect_left(self._starts, box.offset[self._axis] - self._longest + 1)
            shards = shards[low : bisect_left(self._starts, box.stop[self._axis])]
        for shard in shards:
            common = shard.box.intersect(box)
            if common:
                yield shard, common


def uses(key: str, target: int, box: Box, itemsize: int, index: ShardIndex, block: int) -> list[Use]:
    """The stretches of blocks to read for `box`, which is the caller's number `target`, of the tensor `key`."""
    found: list[Use] = []
    for shard, common in index.meeting(box):
        size = shard.box.numel * itemsize
        for start, stop in _stretches(shard.box, common, itemsize, block):
            found.append(Use(key, shard, target, itemsize, start, min(stop, size)))
    return found


def _stretches(stored: Box, wanted: Box, itemsize: int, block: int) -> list[tuple[int, int]]:
    """Byte ranges of `stored`, in whole blocks of at most READ_BYTES together, that contain all of `wanted`."""
    local = wanted.relative_to(stored)
    step = block // itemsize
    first = flat_index(local.offset, stored.shape)
    last = flat_index(tuple(n - 1 for n in local.stop), stored.shape)
    numbers = range(first // step, last // step + 1)
    if last - first + 1 > local.numel:  # with gaps: some of the blocks may hold nothing that is wanted
        limit = stored.numel
        numbers_with = [
            n
            for n in numbers
            if any(part.intersect(local) for part in interval_boxes(stored.shape, n * step, min(limit, (n + 1) * step)))
        ]
    else:
        numbers_with = list(numbers)
    stretches: list[tuple[int, int]] = []
    for n in numbers_with:
        start, stop = n * block, (n + 1) * block
        if stretches and stretches[-1][1] == start and stop - stretches[-1][0] <= max(READ_BYTES, block):
            stretches[-1] = (stretches[-1][0], stop)
        else:
            stretches.append((start, stop))
    return stretches


def flat_index(index: Shape, shape: Shape) -> int:
    """The row-major position of `index` in a tensor of `shape`."""
    at = 0
    for i, n in zip(index, shape, strict=True):
        at = at * n + i
    return at


def join_reads(wanted: Sequence[Use]) -> list[Read]:
    """The requests for `wanted`: neighbours in a file become one request of at most READ_BYTES; nothing is read twice
    for the same stretch, and no byte between two stretches is read."""
    ordered = sorted(wanted, key=lambda use: (use.shard.file, use.shard.at + use.start, use.target))
    reads: list[Read] = []
    for use in ordered:
        start, stop = use.shard.at + use.start, use.shard.at + use.stop
        last = reads[-1] if reads else None
        if (
            last
            and last.file == use.shard.file
            and start <= last.stop
            and (stop <= last.stop or stop - last.start <= READ_BYTES)
        ):
            last.stop = max(last.stop, stop)
        else:
            last = Read(use.shard.file, start, stop)
            reads.append(last)
        last.uses.append(use)
    return reads
