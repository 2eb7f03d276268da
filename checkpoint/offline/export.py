"""The weights of a checkpoint as Hugging Face's libraries want them: `model-00001-of-00002.safetensors`, an index."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch

from ...pieces import Box, Shape
from ..catalog import find
from ..contents.plan import pack
from ..errors import CheckpointError
from ..format.datafile import ALIGN
from ..format.dtypes import DTYPES, dtype_name, memory
from ..format.manifest import from_bytes
from ..format.records import INDEX, Manifest, model_key
from ..io.storage import Storage, open_storage
from .windows import Progress, Source

FILE_BYTES = 5 << 30


@dataclass(frozen=True)
class _Weight:
    name: str
    dtype: torch.dtype
    shape: Shape

    @property
    def nbytes(self) -> int:
        return Box.whole(self.shape).numel * self.dtype.itemsize


def export_hf(
    url: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    step: int | None = None,
    dtype: torch.dtype | None = None,
    progress: Progress | None = None,
    file_bytes: int = FILE_BYTES,
) -> list[str]:
    """Write the model of the checkpoint of `step` (default: the newest complete one) under `url` into a folder.

    The folder gets `model-00001-of-0000N.safetensors`, of at most `file_bytes` of data each (a larger tensor aside),
    and last `model.safetensors.index.json`; their names are returned. Parameters have their own names. Tied ones are
    written once, under the first. dtype: what floating point numbers are rounded to; integers stay.

    Everything read is verified. Memory: some tens of MiB; where `destination` is an object store, one file. Nothing is
    overwritten, and after an error nothing is left. Not collective.
    """
    if dtype is not None and (not isinstance(dtype, torch.dtype) or not dtype.is_floating_point):
        raise TypeError(f"dtype is a floating-point dtype such as torch.bfloat16, got {dtype!r}")
    source, target = open_storage(url), open_storage(destination)
    folder, data = find(source, step)
    manifest = from_bytes(data)
    if manifest.model is None:
        raise CheckpointError(f"{source.url}/{folder} holds no model")
    weights = [_weight(manifest, name, dtype) for name in manifest.model.tensors]
    total = sum(w.nbytes for w in weights)
    stored = (manifest.tensors[model_key(w.name)] for w in weights)
    to_read = sum(Box.whole(tensor.shape).numel * DTYPES[tensor.dtype].itemsize for tensor in stored)
    reader = Source(source, manifest, progress, to_read)
    parts = pack([(w.name, Box.whole(w.shape), w.dtype.itemsize) for w in weights], file_bytes, cut=False)
    names = [f"model-{number:05d}-of-{len(parts):05d}.safetensors" for number in range(1, len(parts) + 1)]
    _check_free(target, [*names, INDEX])
    homes: dict[str, str] = {}
    target.make_folder("")
    created: list[str] = []
    try:
        for file, part in zip(names, parts, strict=True):
            chosen = [weights[written.source] for written in part]
            created.append(file)
            target.create(file, chain([_header(chosen)], _data(reader, chosen)))
            homes |= {weight.name: file for weight in chosen}
        target.sync_folder("")
        index = {"metadata": {"total_size": total}, "weight_map": homes}
        created.append(INDEX)
        target.publish(INDEX, json.dumps(index, indent=2, sort_keys=True).encode())
    except BaseException as error:
        if isinstance(error, FileExistsError):  # of somebody who exports there at the same time
            theirs = created.pop()
        with contextlib.suppress(Exception):  # the error that led here is the one to show
            for file in reversed(created):
                target.remove(file)
        if isinstance(error, FileExistsError):
            raise CheckpointError(f"{target.url}/{theirs} is there already; nothing was overwritten") from error
        raise
    return [*names, INDEX]


def _weight(manifest: Manifest, name: str, dtype: torch.dtype | None) -> _Weight:
    stored = manifest.tensors[model_key(name)]
    have = DTYPES[stored.dtype]
    return _Weight(name, dtype if dtype is not None and have.is_floating_point else have, stored.shape)


def _check_free(target: Storage, names: Sequence[str]) -> None:
    there = target.sizes("")
    for name in names:
        if name in there:
            raise CheckpointError(f"{target.url}/{name} is there already; nothing was overwritten")


def _header(weights: Sequence[_Weight]) -> bytes:
    tree: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    at = 0
    for w in weights:
        tree[w.name] = {
            "dtype": dtype_name(w.dtype, w.name),
            "shape": w.shape,
            "data_offsets": [at, at + w.nbytes],
        }
        at += w.nbytes
    text = json.dumps(tree, separators=(",", ":")).encode()
    size = -(-(8 + len(text)) // ALIGN) * ALIGN
    return (size - 8).to_bytes(8, "little") + text.ljust(size - 8)


def _data(reader: Source, weights: Sequence[_Weight]) -> Iterator[memoryview]:
    for weight in weights:
        for window in reader.windows(model_key(weight.name)):
            yield memory(window.to(weight.dtype))
