"""Getting boxes of tensors out of data files: only the blocks that are needed, each verified, straight into place."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from threading import Event

import torch
import xxhash
from torch import Tensor

from ...pieces import Box
from ..contents.plan import Read, Use, reads
from ..errors import CheckpointError
from ..format.dtypes import DTYPES, memory
from ..format.records import Manifest
from ..format.shards import flat_index
from ..io.gpu_copies import PIECE, Blocks, Devices
from ..io.hostmemory import in_large_pages
from ..io.processors import processors
from ..io.storage import Storage
from .coverage import Coverage

_AT_ONCE = 8  # requests in flight, of at most 16 MiB each
_SCRATCH = 1 << 20  # bytes that are read at once to be looked at only


@dataclass
class Wanted:
    """Boxes wanted of the stored tensor `key`. `buffers` get their data: those given, or new ones on the CPU.

    A buffer has the shape of its box. It may be on any device, of any strides and of another dtype, and is then written
    by way of other memory, a few MiB of it.
    """

    key: str
    boxes: list[Box]
    buffers: list[Tensor] = field(default_factory=list)


def read(storage: Storage, manifest: Manifest, wanted: Sequence[Wanted]) -> None:
    """Fill the buffers of `wanted` from the data files. Raises CheckpointError naming file, bytes and tensor."""
    Reader(storage, manifest, wanted).read()


class Reader:
    """What is wanted of a checkpoint, planned once: to be verified, read, or both, in several threads.

    workers: how many of them may work at the same time on bytes that are in memory already and need nothing but
    processors (default: as many as there are, up to four).
    """

    def __init__(
        self, storage: Storage, manifest: Manifest, wanted: Sequence[Wanted], workers: int | None = None
    ) -> None:
        self.storage, self.manifest = storage, manifest
        self.wanted = wanted
        self.targets: list[tuple[Wanted, int]] = []
        uses: list[Use] = []
        for want in wanted:
            stored = manifest.tensors[want.key]
            itemsize = DTYPES[stored.dtype].itemsize
            for number, box in enumerate(want.boxes):
                for shard, common in stored.shards.meeting(box, itemsize):
                    uses.append(Use(len(self.targets), shard.file, shard.at, shard.box, common, itemsize))
                self.targets.append((want, number))
        ends = [(file.header, file.bytes) for file in manifest.files]
        self.reads = reads(uses, ends, manifest.block)
        self._workers = workers or processors()

    def read(self, coverage: Coverage | None = None) -> None:
        """Fill the buffers, those that are given or new ones, and check every byte on the way.

        Every block is checked when it has just been stored: after an error the buffers hold something, of which
        nothing is good for use. What goes to a GPU is ordered as if it had been copied there by the caller, on the
        stream that is current; all of it is there when this returns. `coverage` is told what was read.

        Raises CheckpointError naming file, bytes and tensor.
        """
        for want in self.wanted:
            if not want.buffers:
                dtype = DTYPES[self.manifest.tensors[want.key].dtype]
                new = (torch.empty(box.shape, dtype=dtype, device="cpu") for box in want.boxes)
                want.buffers = [in_large_pages(buffer) for buffer in new]
        devices = Devices(buffer for want in self.wanted for buffer in want.buffers)
        self._run(_Filling(self, devices), devices)
        if coverage is not None:
            coverage.add(self.reads)

    def verify(self, coverage: Coverage | None = None) -> None:
        """Look at everything that `read` would, and keep nothing; a few MiB of memory. Raises as `read` does."""
        self._run(self._check, Devices(()))
        if coverage is not None:
            coverage.add(self.reads)

    def _run(self, work: Callable[[Read], None], devices: Devices) -> None:
        """All requests; the first error ends it. What needs nothing but processors is done by as many as there are.

        When it returns or raises, nothing is being copied to `devices` any more.
        """
        here: list[Read] = []
        rest: list[Read] = []
        for request in self.reads:
            (here if self._in_memory(request) else rest).append(request)
        lanes = [here[lane :: self._workers] for lane in range(self._workers)]
        ended = Event()
        inference = torch.is_inference_mode_enabled()

        def one_lane(lane: Sequence[Read]) -> None:
            with torch.inference_mode() if inference else nullcontext():  # a thread has modes of its own
                for request in lane:
                    if not ended.is_set():
                        work(request)

        try:
            with ThreadPoolExecutor(_AT_ONCE + self._workers, initializer=devices.enter) as pool:
                try:
                    futures = [pool.submit(one_lane, lane) for lane in (*lanes[1:], *([r] for r in rest)) if lane]
                    one_lane(lanes[0])
                    for done in futures:
                        done.result()
                except BaseException:
                    ended.set()
                    pool.shutdown(cancel_futures=True)
                    raise
        finally:
            devices.wait()

    def _in_memory(self, request: Read) -> bool:
        return self.storage.in_memory(self.manifest.files[request.file].path, request.start, request.stop)

    def _check(self, request: Read) -> None:
        """Look at the bytes, and keep none."""
        check = _Check(self, request)
        path = self.manifest.files[request.file].path
        cached = self.storage.cached(path, request.start, request.stop)
        if cached is not None:
            for window in cached.windows():
                check(memory(window))
        else:
            scratch = memory(torch.empty(min(request.stop - request.start, _SCRATCH), dtype=torch.uint8, device="cpu"))
            for start in range(request.start, request.stop, len(scratch)):
                self.storage.read_into(path, start, [scratch[: request.stop - start]], check)
        check.finish()


@dataclass
class _Piece:
    """What lies aside of bytes of a request: in block `number`, complete when `stop` bytes of the request are there.

    parts: bytes `start` to `stop` of the file for a use.
    """

    stop: int
    number: int
    parts: list[tuple[Use, int, int, Tensor]] = field(default_factory=list)


class _Filling:
    """Reads requests into the buffers of `reader`; to be called by several threads at once."""

    def __init__(self, reader: Reader, devices: Devices) -> None:
        self.reader, self.devices = reader, devices
        self.block = max((request.stop - request.start for request in reader.reads), default=0)
        self.spare: list[Blocks] = []

    def __call__(self, request: Read) -> None:
        """Straight from the storage to where the bytes belong, where that is memory that it can fill; and verify them.

        All else lies aside, in blocks, until it is copied from there, a piece at a time, while the next is being read.
        """
        try:
            blocks = self.spare.pop()
        except IndexError:
            blocks = Blocks(self.devices, self.block)
        views, pieces = self._plan(request, blocks)
        check = _Check(self.reader, request)
        seen = 0

        def each(view: memoryview) -> None:
            nonlocal seen
            check(view)
            seen += len(view)
            while pieces and pieces[0].stop <= seen:
                self._pass_on(pieces.popleft(), blocks)
                if pieces:
                    blocks.free(pieces[0].number)

        if pieces:
            blocks.free(pieces[0].number)
        self.reader.storage.read_into(self.reader.manifest.files[request.file].path, request.start, views, each)
        check.finish()
        self.spare.append(blocks)

    def _plan(self, request: Read, blocks: Blocks) -> tuple[list[memoryview], deque[_Piece]]:
        """Where the bytes of a request are to be stored, and what lies aside then."""
        views: list[memoryview] = []
        pieces: deque[_Piece] = deque()
        at = request.start
        twice = any(a.stop > b.at for a, b in pairwise(request.uses))  # bytes that go to two places
        for use in request.uses:
            start, stop = max(at, use.at), min(request.stop, use.stop)
            if twice or not self.devices.straight(self._target(use)[1]):
                continue
            place = self._place(use, start, stop)
            if place is not None:
                views += self._aside(request, at, start, blocks, pieces)
                views.append(memory(place))
                at = stop
        views += self._aside(request, at, request.stop, blocks, pieces)
        return views, pieces

    def _aside(
        self, request: Read, start: int, stop: int, blocks: Blocks, pieces: deque[_Piece]
    ) -> Iterator[memoryview]:
        """Memory for bytes that cannot go straight to their places; what uses want of them is noted in `pieces`."""
        while start < stop:
            low = start - (start - request.start) % PIECE
            high = min(low + PIECE, request.stop)
            if not pieces or pieces[-1].stop != high - request.start:
                pieces.append(_Piece(high - request.start, blocks.first))
                blocks.first += 1
            end = min(stop, high)
            data = blocks.memory(pieces[-1].number)[start - low : end - low]
            for use in request.uses:
                first, last = max(start, use.at), min(end, use.stop)
                if first < last:
                    pieces[-1].parts.append((use, first, last, data[first - start : last - start]))
            yield memory(data)
            start = end

    def _pass_on(self, piece: _Piece, blocks: Blocks) -> None:
        """Copy what lies in a block to where it belongs."""
        for use, start, stop, data in piece.parts:
            place = self._place(use, start, stop)
            if place is None:
                self._scatter(use, start, stop, data)
            else:
                self.devices.copy(place, data)
        blocks.copied(piece.number, {self._target(use)[1].device for use, *_ in piece.parts})

    def _target(self, use: Use) -> tuple[Box, Tensor, torch.dtype]:
        """The wanted box, its buffer, and the dtype in the file."""
        want, number = self.reader.targets[use.target]
        return want.boxes[number], want.buffers[number], DTYPES[self.reader.manifest.tensors[want.key].dtype]

    def _place(self, use: Use, start: int, stop: int) -> Tensor | None:
        """The bytes of the destination where those from `start` to `stop` go to one place there; else None."""
        target, buffer, dtype = self._target(use)
        if start >= stop or not buffer.is_contiguous() or buffer.dtype is not dtype:
            return None
        if use.box == target:
            first: int | None = (start - use.at) // use.itemsize
        else:
            first = _one_place(use.boxes(start, stop), target)
        if first is None:
            return None
        return buffer.detach().reshape(-1).view(torch.uint8)[first * use.itemsize :][: stop - start]

    def _scatter(self, use: Use, start: int, stop: int, data: Tensor) -> None:
        """Copy the bytes `start` to `stop` of the file to the part of the wanted box that they belong to."""
        target, buffer, dtype = self._target(use)
        data = self.devices.bring(data, buffer.device)
        if data.storage_offset() % use.itemsize:
            data = data.clone()
        elements = data.view(dtype)
        at = 0
        for box in use.boxes(start, stop):
            part = elements[at : at + box.numel].view(box.shape)
            at += box.numel
            common = box.intersect(target)
            if common:
                place = buffer.detach()[common.relative_to(target).slices]
                self.devices.copy(place, part[common.relative_to(box).slices])


class _Check:
    """Compares the checksums of the blocks of a request with those in the manifest, as the bytes come in."""

    def __init__(self, reader: Reader, request: Read) -> None:
        self.reader, self.request = reader, request
        self.block = reader.manifest.block
        self.file = reader.manifest.files[request.file]
        self.number = (request.start - self.file.header) // self.block
        self.hasher, self.room = xxhash.xxh3_64(), self.block

    def __call__(self, view: memoryview) -> None:
        """The next bytes."""
        at = 0
        while at < len(view):
            chunk = view[at : at + self.room]
            at += len(chunk)
            if len(chunk) == self.block:
                self._compare(xxhash.xxh3_64_hexdigest(chunk))
                continue
            self.hasher.update(chunk)
            self.room -= len(chunk)
            if not self.room:
                self._last()

    def finish(self) -> None:
        """There are no more: the last block may be shorter."""
        if self.room < self.block:
            self._last()

    def _last(self) -> None:
        self._compare(self.hasher.hexdigest())
        self.hasher, self.room = xxhash.xxh3_64(), self.block

    def _compare(self, digest: str) -> None:
        number, file = self.number, self.file
        self.number += 1
        if digest == file.blocks[16 * number : 16 * number + 16]:
            return
        first = file.header + number * self.block
        last = min(first + self.block, file.bytes)
        targets = self.reader.targets
        keys = sorted({targets[use.target][0].key for use in self.request.uses if use.at < last and use.stop > first})
        of = " and ".join(repr(key) for key in keys[:3]) or "no tensor that was asked for"
        raise CheckpointError(
            f"{self.reader.storage.url}/{file.path} is damaged: bytes {first} to {last}, of {of}, do not have the "
            f"checksum they were saved with"
        )


def _one_place(boxes: Sequence[Box], target: Box) -> int | None:
    """The flat index in `target` from which on all elements of `boxes` lie in a row, or None."""
    first: int | None = None
    expected = 0
    for box in boxes:
        if box.intersect(target) != box:
            return None
        local = box.relative_to(target)
        start = flat_index(local.offset, target.shape)
        stop = flat_index(tuple(n - 1 for n in local.stop), target.shape) + 1
        if stop - start != box.numel or (first is not None and start != expected):
            return None
        first = start if first is None else first
        expected = stop
    return first
