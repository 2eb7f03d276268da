"""How two checkpoints differ: names, shapes, settings, values."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch
from torch import Tensor

from ...pieces import Box
from ..catalog import find
from ..format.dtypes import DTYPES
from ..format.manifest import from_bytes
from ..format.records import Manifest, StoredTensor
from ..format.values import Json
from ..io.storage import Storage, open_storage
from .windows import Progress, Source


@dataclass(frozen=True)
class Difference:
    """One thing that differs: `what` it is, and how it is on the left and on the right (None where it is not).

    For values, `left` is the number of elements that differ, `right` the largest difference between two numbers.
    """

    kind: str
    what: str
    left: Json
    right: Json


def diff(
    left: str | os.PathLike[str],
    right: str | os.PathLike[str],
    left_step: int | None = None,
    right_step: int | None = None,
    values: bool = True,
    progress: Progress | None = None,
) -> list[Difference]:
    """Everything in which two checkpoints differ, bit for bit; how they are cut into files and ranks does not matter.

    Step, time, ranks and versions are no differences. values: compare the elements of tensors too, which reads (and
    verifies) both, but for files that they share. Steps as in `load`. Not collective.
    """
    storages = open_storage(left), open_storage(right)
    manifests = [from_bytes(find(s, n)[1]) for s, n in zip(storages, (left_step, right_step), strict=True)]
    found = _settings(*manifests)
    a, b = (manifest.tensors for manifest in manifests)
    for key in sorted(a.keys() | b.keys()):
        if key not in a or key not in b or (a[key].dtype, a[key].shape) != (b[key].dtype, b[key].shape):
            found.append(Difference("tensor", key, *(_describe(t.get(key)) for t in (a, b))))
    if values:
        common = [key for key in sorted(a.keys() & b.keys()) if _describe(a[key]) == _describe(b[key])]
        found += _values(storages, manifests, common, progress)
    return found


def _describe(tensor: StoredTensor | None) -> Json:
    return None if tensor is None else f"{tensor.dtype} {list(tensor.shape)}"


def _settings(a: Manifest, b: Manifest) -> list[Difference]:
    found: list[Difference] = []
    for what in ("scheduler", "scaler", "loader", "extra"):
        found += _json_difference(what, getattr(a, what), getattr(b, what))
    found += _json_difference("model", _model(a), _model(b))
    found += _json_difference("opt", _opt(a), _opt(b))
    return found


def _model(manifest: Manifest) -> Json:
    model = manifest.model
    return model and {"aliases": model.aliases, "values": model.values}


def _opt(manifest: Manifest) -> Json:
    opt = manifest.opt
    if opt is None:
        return None
    groups = [{"params": list(group.params), **group.options} for group in opt.groups]
    return {"groups": groups, "states": {name: dict(state.values) for name, state in opt.states.items()}}


def _json_difference(what: str, a: Json, b: Json) -> list[Difference]:
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [*a, *(key for key in b if key not in a)]
        return [d for key in keys for d in _json_difference(f"{what}.{key}", a.get(key), b.get(key))]
    if isinstance(a, list | tuple) and isinstance(b, list | tuple) and len(a) == len(b):
        return [d for i, (x, y) in enumerate(zip(a, b, strict=True)) for d in _json_difference(f"{what}[{i}]", x, y)]
    return [] if type(a) is type(b) and a == b else [Difference("setting", what, a, b)]


def _values(
    storages: tuple[Storage, Storage], manifests: list[Manifest], keys: list[str], progress: Progress | None
) -> list[Difference]:
    same_root = storages[0].url == storages[1].url
    keys = [key for key in keys if not (same_root and _places(manifests[0], key) == _places(manifests[1], key))]
    tensors = manifests[0].tensors
    total = sum(Box.whole(tensors[k].shape).numel * DTYPES[tensors[k].dtype].itemsize for k in keys)
    a, b = Source(storages[0], manifests[0], progress, total), Source(storages[1], manifests[1])
    found = []
    for key in keys:
        number, largest = 0, 0.0
        for x, y in zip(a.windows(key), b.windows(key), strict=True):
            count, most = _compare(x, y)
            number, largest = number + count, max(largest, most)
        if number:
            found.append(Difference("values", key, number, largest))
    return found


def _places(manifest: Manifest, key: str) -> list[tuple[str, int, int]]:
    """The files a tensor is in, and where: the same place is the same data."""
    shards = manifest.tensors[key].shards
    files = [manifest.files[int(number)].path for number in shards.file]
    return list(zip(files, shards.at.tolist(), shards.start.tolist(), strict=True))


def _compare(x: Tensor, y: Tensor) -> tuple[int, float]:
    """How many elements are not the same bit for bit, and the largest difference (infinite beside a NaN)."""
    size = x.element_size()
    bits = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[size]
    i, j = x.view(bits), y.view(bits)
    differ = i != j
    number = int(differ.sum())
    if not number:
        return 0, 0.0
    p, q = i[differ].view(x.dtype), j[differ].view(y.dtype)  # not all types can be picked from
    wide = torch.complex128 if p.is_complex() else torch.float64
    most = (p.to(wide) - q.to(wide)).abs().nan_to_num(nan=float("inf"), posinf=float("inf")).max()
    return number, float(most)
