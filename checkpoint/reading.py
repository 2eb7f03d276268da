"""Getting boxes of tensors out of data files: only the blocks that are needed, each verified, into fresh memory."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field

import torch
import xxhash
from torch import Tensor

from ..pieces import Box
from .dtypes import DTYPES, memory
from .errors import CheckpointError
from .manifest import Manifest
from .plan import Read, ShardIndex, Use, flat_index, join_reads, uses
from .storage import Storage

_AT_ONCE = 8  # requests in flight; each holds at most 16 MiB beside the destination


@dataclass
class Wanted:
    """Boxes wanted of the stored tensor `key`; `buffers` holds their data (CPU, contiguous) after reading."""

    key: str
    boxes: list[Box]
    buffers: list[Tensor] = field(default_factory=list)


def read(storage: Storage, folder: str, manifest: Manifest, wanted: Sequence[Wanted]) -> None:
    """Fill the buffers of `wanted` from the data files. Raises CheckpointError naming file, bytes and tensor."""
    stretches: list[Use] = []
    targets: list[tuple[Box, Tensor]] = []
    for want in wanted:
        stored = manifest.tensors[want.key]
        dtype = DTYPES[stored.dtype]
        index = ShardIndex(stored.shards)
        want.buffers = [torch.empty(box.shape, dtype=dtype) for box in want.boxes]
        for box, buffer in zip(want.boxes, want.buffers, strict=True):
            stretches += uses(want.key, len(targets), box, dtype.itemsize, index, manifest.block)
            targets.append((box, buffer))
    reader = _Reader(storage, folder, manifest, targets)
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for done in [pool.submit(reader.run, request) for request in join_reads(stretches)]:
            done.result()


class _Reader:
    """Carries out requests; safe to use from several threads, since requests write to different places."""

    def __init__(self, storage: Storage, folder: str, manifest: Manifest, targets: list[tuple[Box, Tensor]]) -> None:
        self.storage, self.folder, self.manifest, self.targets = storage, folder, manifest, targets

    def run(self, request: Read) -> None:
        """Read, verify, and put the elements where they belong."""
        path = f"{self.folder}/{self.manifest.files[request.file].name}"
        direct = self._direct(request)
        if direct is not None:
            self.storage.read_into(path, request.start, direct)
            for use, view in zip(request.uses, direct, strict=True):
                self._verify(use, view)
            return
        scratch = torch.empty(request.stop - request.start, dtype=torch.uint8)
        self.storage.read_into(path, request.start, [memory(scratch)])
        for use in request.uses:
            at = use.shard.at + use.start - request.start
            data = scratch[at : at + use.stop - use.start]
            self._verify(use, memory(data))
            self._scatter(use, data)

    def _direct(self, request: Read) -> list[memoryview] | None:
        """The destinations as memory, where all bytes of the request go to one place each, in order; else None."""
        views, at = [], request.start
        for use in request.uses:
            box, buffer = self.targets[use.target]
            first = _one_place(use, box)
            if first is None or use.shard.at + use.start != at:
                return None
            at += use.stop - use.start
            start = first * use.itemsize
            views.append(memory(buffer)[start : start + use.stop - use.start])
        return views

    def _verify(self, use: Use, data: memoryview) -> None:
        block = self.manifest.block
        for at in range(0, len(data), block):
            number = (use.start + at) // block
            if xxhash.xxh3_64_hexdigest(data[at : at + block]) != use.shard.blocks[16 * number : 16 * number + 16]:
                file = self.manifest.files[use.shard.file].name
                start = use.shard.at + use.start + at
                stop = start + len(data[at : at + block])
                raise CheckpointError(
                    f"{self.storage.url}/{self.folder}/{file} is damaged: bytes {start} to {stop}, of {use.key!r}, do"
                    f" not have the checksum they were saved with"
                )

    def _scatter(self, use: Use, data: Tensor) -> None:
        """Copy from the bytes of a stored box to the part of the wanted box that they belong to."""
        target, buffer = self.targets[use.target]
        if data.storage_offset() % use.itemsize:
            data = data.clone()
        elements = data.view(buffer.dtype)
        at = 0
        for box in use.boxes:
            part = elements[at : at + box.numel].view(box.shape)
            at += box.numel
            common = box.intersect(target)
            if common:
                buffer[common.relative_to(target).slices].copy_(part[common.relative_to(box).slices])


def _one_place(use: Use, target: Box) -> int | None:
    """The flat index in `target` from which on all elements of `use` lie in a row, or None."""
    first: int | None = None
    expected = 0
    for box in use.boxes:
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
