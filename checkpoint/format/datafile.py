"""Data files: plain safetensors files whose header also says where each tensor belongs.

A file is 8 bytes little-endian header length, the JSON header padded with spaces so that the data begin at a multiple
of 4096, and the data without gaps. `__metadata__` carries, beside `format`, what torch.distributed.checkpoint's
HuggingFaceStorageReader looks for (`DCP_SHARDING_INFO`) and the global shapes, so that a file explains itself.
"""

from __future__ import annotations

import json
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import xxhash
from torch import Tensor

from ...pieces import Box, Shape
from ..errors import CheckpointError
from ..io.gpu_copies import Devices
from .dtypes import byte_view, memory
from .records import file_key

ALIGN = 4096
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library reads no more
_COPY_BYTES = 4 << 20
_LEAST_COPY = 1 << 20  # a smaller one is not worth memory that is pinned


@dataclass(frozen=True)
class Item:
    """A box of the tensor `key` (safetensors dtype name, global shape) with its data, on any device, of any strides.

    `frozen`: it belongs to a parameter that is not trained, so the next checkpoint may well have the same.
    """

    key: str
    dtype: str
    shape: Shape
    box: Box
    data: Tensor
    frozen: bool = False

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return self.data.numel() * self.data.element_size()


@dataclass(frozen=True)
class Origin:
    """Where a file comes from, for its header. `kind`: `model` or `s` (states and all else)."""

    kind: str
    save_id: str
    step: int
    rank: int
    world_size: int
    part: int

    @property
    def file_name(self) -> str:
        """The name of the data file, unique to this save, kind, rank and part."""
        return f"{self.kind}-{self.save_id}-r{self.rank:05d}-{self.part:03d}.safetensors"


def header(items: Sequence[Item], origin: Origin) -> bytes:
    """All bytes before the data, a multiple of 4096, for a file that holds the data of `items` in that order."""
    about = {key: value for key, value in vars(origin).items() if key != "kind"}
    shapes = {file_key(item.key): item.shape for item in items}
    tree: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": _json({file_key(item.key): {"saved_offsets": item.box.offset} for item in items}),
            "fastopt": _json({**about, "version": 1, "shapes": shapes}),
        }
    }
    at = 0
    for item in items:
        tree[file_key(item.key)] = {
            "dtype": item.dtype,
            "shape": item.box.shape,
            "data_offsets": [at, at + item.nbytes],
        }
        at += item.nbytes
    text = _json(tree).encode()
    size = -(-(8 + len(text)) // ALIGN) * ALIGN
    if size > _LARGEST_HEADER:
        raise CheckpointError(
            f"{origin.file_name}: {len(items)} tensors make a header of {size} bytes, too long to read"
        )
    return (size - 8).to_bytes(8, "little") + text + b" " * (size - 8 - len(text))


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))


class Body:
    """The data of a file as chunks to write; `blocks` collects the digest of every `block` bytes, 16 hex digits each.

    The chunks are views of the tensors where these are contiguous and on the CPU. Each is hashed just before it is
    handed out, in pieces that stay in the processor's cache for the write.
    """

    def __init__(self, items: Sequence[Item], block: int) -> None:
        self.items = items
        self.block = block
        self.blocks: list[str] = []

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, in chunks of at most one block; no chunk belongs to two blocks."""
        hasher, room = xxhash.xxh3_64(), self.block
        for item in self.items:
            for view in _views(item.data):
                at = 0
                while at < len(view):
                    chunk = view[at : at + room]
                    at += len(chunk)
                    if len(chunk) == self.block:
                        self.blocks.append(xxhash.xxh3_64_hexdigest(chunk))
                        yield chunk
                        continue
                    hasher.update(chunk)
                    room -= len(chunk)
                    if not room:
                        self.blocks.append(hasher.hexdigest())
                        hasher, room = xxhash.xxh3_64(), self.block
                    yield chunk
        if room < self.block:
            self.blocks.append(hasher.hexdigest())

    def same_as(self, blocks: str) -> bool:
        """Whether the data have these digests; the look ends at the first difference. Nothing is collected."""
        seen = 0
        for _ in self.chunks():
            if self.blocks[seen:] and self.blocks[seen] != blocks[16 * seen : 16 * seen + 16]:
                break
            seen = len(self.blocks)
        same = "".join(self.blocks) == blocks
        self.blocks = []
        return same


def _views(data: Tensor) -> Iterator[memoryview]:
    """The bytes of `data` in row-major order; those on an accelerator 4 MiB at a time, the next being on its way."""
    devices = Devices([data])
    if devices.straight(data) or not data.is_contiguous() or data.nbytes < _LEAST_COPY:
        yield byte_view(data)
        return
    flat = data.detach().resolve_conj().resolve_neg().reshape(-1)
    coming: deque[tuple[Tensor, list[Any]]] = deque()
    step = max(1, _COPY_BYTES // data.element_size())
    for start in range(0, flat.numel(), step):
        part = flat[start : start + step]
        copy = devices.memory(max(_LEAST_COPY, part.nbytes))[: part.nbytes]
        devices.copy(copy.view(part.dtype), part)
        coming.append((copy, devices.mark([part.device])))
        if len(coming) > 1:
            yield _arrived(*coming.popleft())
    while coming:
        yield _arrived(*coming.popleft())


def _arrived(copy: Tensor, marks: list[Any]) -> memoryview:
    for mark in marks:
        mark.synchronize()
    return memory(copy)
