"""Stored tensors a window at a time, verified, and files written from them: memory for one window, not for a tensor."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
import xxhash
from torch import Tensor

from ...pieces import Box
from ..contents.plan import cut_box
from ..format.dtypes import DTYPES
from ..format.records import Manifest
from ..io.storage import Storage
from ..loading.reading import Wanted, read

Progress = Callable[[int, int], Any]
"""Is called with the bytes done so far and in all."""

WINDOW_BYTES = 32 << 20


class Source:
    """A checkpoint whose tensors are read in order; counts for `progress` what has been read, of `total` bytes."""

    def __init__(self, storage: Storage, manifest: Manifest, progress: Progress | None = None, total: int = 0) -> None:
        self.storage, self.manifest = storage, manifest
        self.progress, self.total, self.done = progress, total, 0

    def windows(self, key: str) -> Iterator[Tensor]:
        """The elements of a tensor in row-major order, in flat tensors of at most WINDOW_BYTES."""
        stored = self.manifest.tensors[key]
        itemsize = DTYPES[stored.dtype].itemsize
        for box in cut_box(Box.whole(stored.shape), WINDOW_BYTES // itemsize):
            if not box.numel:
                continue
            wanted = Wanted(key, [box])
            read(self.storage, self.manifest, [wanted])
            self.done += box.numel * itemsize
            if self.progress:
                self.progress(self.done, self.total)
            yield wanted.buffers[0].reshape(-1)


def hashed(chunks: Iterable[memoryview], block: int, digests: list[str]) -> Iterator[memoryview]:
    """The chunks as they are; `digests` collects the checksum of every `block` bytes, 16 hexadecimal digits each."""
    hasher, room = xxhash.xxh3_64(), block
    for chunk in chunks:
        at = 0
        while at < len(chunk):
            part = chunk[at : at + room]
            hasher.update(part)
            at += len(part)
            room -= len(part)
            if not room:
                digests.append(hasher.hexdigest())
                hasher, room = xxhash.xxh3_64(), block
        yield chunk
    if room < block:
        digests.append(hasher.hexdigest())


def shapes_only(shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """A tensor that has everything but data."""
    return torch.empty(tuple(shape), dtype=dtype, device="meta")
