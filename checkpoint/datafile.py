"""Data files: plain safetensors files whose header also says where each tensor belongs.

A file is 8 bytes little-endian header length, the JSON header padded with spaces so that the data begin at a multiple
of 4096, and the data without gaps. `__metadata__` carries, beside `format`, what torch.distributed.checkpoint's
HuggingFaceStorageReader looks for (`DCP_SHARDING_INFO`) and the global shapes, so that a file explains itself.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import xxhash
from torch import Tensor

from ..pieces import Box, Shape
from .dtypes import byte_view
from .errors import CheckpointError

ALIGN = 4096
_LARGEST_HEADER = 100_000_000  # bytes; the safetensors library reads no more
_COPY_BYTES = 16 << 20


@dataclass(frozen=True)
class Item:
    """A box of the tensor `key` (safetensors dtype name, global shape) with its data, on any device, of any strides."""

    key: str
    dtype: str
    shape: Shape
    box: Box
    data: Tensor

    @property
    def nbytes(self) -> int:
        """Bytes of the box."""
        return self.data.numel() * self.data.element_size()


@dataclass(frozen=True)
class Origin:
    """Where a file comes from, for its header."""

    save_id: str
    step: int
    rank: int
    world_size: int
    part: int

    @property
    def file_name(self) -> str:
        """The name of the data file, unique to this save, rank and part."""
        return f"s-{self.save_id}-r{self.rank:05d}-{self.part:03d}.safetensors"


def header(items: Sequence[Item], origin: Origin) -> bytes:
    """All bytes before the data, a multiple of 4096, for a file that holds the data of `items` in that order."""
    tree: dict[str, object] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": _json({item.key: {"saved_offsets": item.box.offset} for item in items}),
            "fastopt": _json({**vars(origin), "version": 1, "shapes": {item.key: item.shape for item in items}}),
        }
    }
    at = 0
    for item in items:
        tree[item.key] = {"dtype": item.dtype, "shape": item.box.shape, "data_offsets": [at, at + item.nbytes]}
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


class BlockDigests:
    """The data of one item as chunks to write; `hex` collects the digest of every block of `block` bytes."""

    def __init__(self, item: Item, block: int) -> None:
        self.item = item
        self.block = block
        self.hex: list[str] = []

    def chunks(self) -> Iterator[memoryview]:
        """The bytes, in chunks of one block: views of the tensor where it is contiguous and on the CPU."""
        for view in _views(self.item.data):
            for start in range(0, len(view), self.block):
                chunk = view[start : start + self.block]
                self.hex.append(xxhash.xxh3_64_hexdigest(chunk))
                yield chunk


def _views(data: Tensor) -> Iterator[memoryview]:
    """The bytes of `data` in row-major order; a tensor on an accelerator is copied 16 MiB at a time."""
    if data.device.type == "cpu" or not data.is_contiguous():
        yield byte_view(data)
        return
    flat = data.detach().reshape(-1)
    step = max(1, _COPY_BYTES // data.element_size())
    for start in range(0, flat.numel(), step):
        yield byte_view(flat[start : start + step])
