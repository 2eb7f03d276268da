"""From what every rank wrote to the manifest: files in one list, and for each tensor where its parts are. Pure."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...pieces import Box, Shape
from ..errors import CheckpointError
from ..format.dtypes import DTYPES
from ..format.manifest import place
from ..format.records import (
    DataFile,
    Group,
    Manifest,
    ModelPart,
    OptPart,
    ParamStates,
    StoredTensor,
    file_key,
    model_key,
    state_key,
)
from ..format.shards import Column, Shards, flat_interval
from ..format.values import Json
from .writing import FileRecord

_DTYPES = list(DTYPES)


@dataclass(frozen=True)
class RankRecord:
    """What one rank wrote, small enough to be gathered from thousands of ranks.

    files: with what sorts them among those of all ranks. table `[n, 5]`: number in the sorted list of all keys, dtype,
    index in `files`, start and count of the interval. boxes: the same for boxes that are no intervals, with offset and
    shape in the place of start and count. shapes: of tensors whose shape is not the expected one.
    """

    files: list[tuple[str, int, DataFile]]
    table: Column
    boxes: list[tuple[int, int, int, Shape, Shape]]
    shapes: dict[int, Shape]


def rank_record(records: Sequence[FileRecord], number: Mapping[str, int], expected: Mapping[str, Any]) -> RankRecord:
    """The record of one rank. number: of each key in the sorted list of all; expected: shapes that all ranks know."""
    rows: list[tuple[int, int, int, int, int]] = []
    boxes: list[tuple[int, int, int, Shape, Shape]] = []
    shapes: dict[int, Shape] = {}
    for index, record in enumerate(records):
        for item in record.items:
            key, dtype = number[item.key], _DTYPES.index(item.dtype)
            interval = flat_interval(item.box, item.shape)
            if interval is None:
                boxes.append((key, dtype, index, item.box.offset, item.box.shape))
            else:
                rows.append((key, dtype, index, interval[0], interval[1] - interval[0]))
            if expected.get(item.key) != item.shape:
                shapes[key] = item.shape
    files = [(record.kind, record.part, record.file) for record in records]
    return RankRecord(files, np.array(rows, dtype=np.int64).reshape(-1, 5), boxes, shapes)


def assemble(
    ranks: Sequence[RankRecord], keys: Sequence[str], expected: Mapping[str, Any]
) -> tuple[tuple[DataFile, ...], dict[str, StoredTensor]]:
    """All files, those of the same kind and part one rank after the other, and all tensors that have data.

    Raises CheckpointError where the parts do not cover each tensor exactly once, or ranks hold one differently.
    """
    order = sorted(
        (kind, part, rank, index)
        for rank, record in enumerate(ranks)
        for index, (kind, part, _) in enumerate(record.files)
    )
    files = tuple(ranks[rank].files[index][2] for _, _, rank, index in order)
    at = {(rank, index): number for number, (_, _, rank, index) in enumerate(order)}
    tables = []
    boxes: dict[int, list[tuple[int, int, Box]]] = {}
    shapes: dict[int, Shape] = {}
    for rank, record in enumerate(ranks):
        numbers = np.array([at[rank, index] for index in range(len(record.files))], dtype=np.int64)
        table = record.table.copy()
        table[:, 2] = numbers[table[:, 2]] if len(table) else table[:, 2]
        tables.append(table)
        for number, dtype, index, offset, shape in record.boxes:
            boxes.setdefault(number, []).append((at[rank, index], dtype, Box(offset, shape)))
        for number, shape in record.shapes.items():
            if shapes.setdefault(number, shape) != shape:
                raise CheckpointError(
                    f"rank {rank} holds {keys[number]!r} in shape {shape}, others in {shapes[number]}"
                )
    everything = np.concatenate(tables) if tables else np.zeros((0, 5), dtype=np.int64)
    everything = everything[np.lexsort((everything[:, 3], everything[:, 0]))]
    bounds = np.searchsorted(everything[:, 0], np.arange(len(keys) + 1))
    tensors: dict[str, StoredTensor] = {}
    for number, key in enumerate(keys):
        rows = everything[bounds[number] : bounds[number + 1]]
        if len(rows) or number in boxes:
            shape = shapes[number] if number in shapes else expected[key]
            tensors[key] = _tensor(key, shape, rows, boxes.get(number, []))
    return files, place(files, tensors)


def _tensor(key: str, shape: Any, rows: Column, boxes: Sequence[tuple[int, int, Box]]) -> StoredTensor:
    where = f"tensor {key!r}"
    dtypes = set(rows[:, 1].tolist()) | {dtype for _, dtype, _ in boxes}
    if len(dtypes) > 1:
        raise CheckpointError(f"ranks hold {where} in different dtypes: {sorted(_DTYPES[d] for d in dtypes)}")
    if boxes:  # the others too, then: one by one
        parts = Shards.intervals(shape, rows[:, 2], rows[:, 3], rows[:, 4])
        others = [(shard.file, shard.box) for shard, _ in parts.meeting(Box.whole(shape), 0)]
        others += [(file, box) for file, _, box in boxes]
        shards = Shards.of_boxes(shape, [file for file, _ in others], [box for _, box in others])
    else:
        shards = Shards.intervals(shape, rows[:, 2], rows[:, 3], rows[:, 4])
    shards.check(where)
    return StoredTensor(_DTYPES[dtypes.pop()], shape, shards)


def with_empty(tensors: dict[str, StoredTensor], key: str, dtype: str, shape: Shape) -> None:
    """Add the tensor without elements that no rank had a part of; nothing where there is one."""
    tensors.setdefault(key, StoredTensor(dtype, shape, Shards.intervals(shape, [], [], [])))


def model_part(about: Json) -> ModelPart | None:
    """What the model held, from what all ranks say about it."""
    return about and ModelPart(tuple(about["order"]), about["aliases"], about["values"])


def opt_part(about: Json, states: dict[str, dict[str, Json]], tensors: Mapping[str, StoredTensor]) -> OptPart | None:
    """What the optimizer held. A state without elements of a parameter of unknown shape is left out."""
    if about is None:
        return None
    parts = {
        name: ParamStates(
            tuple(key for key, (kind, *_) in state.items() if kind != "value" and state_key(name, key) in tensors),
            {key: content[0] for key, (kind, *content) in state.items() if kind == "value"},
        )
        for name, state in states.items()
    }
    groups = tuple(Group(tuple(group["params"]), group["options"]) for group in about["groups"])
    shapes = {name: None if shape is None else tuple(shape) for name, shape in about["params"].items()}
    return OptPart(shapes, groups, parts)


def hugging_face_index(manifest: Manifest) -> bytes | None:
    """`model.safetensors.index.json`, by which Hugging Face's libraries find the weights; None unless the checkpoint
    has a model whose tensors are all whole. A file of an earlier step is named relative to the step folder."""
    if manifest.model is None:
        return None
    homes: dict[str, str] = {}
    total = 0
    for name in manifest.model.tensors:
        tensor = manifest.tensors[model_key(name)]
        if len(tensor.shards) != 1:
            return None
        file = manifest.files[int(tensor.shards.file[0])]
        homes[file_key(model_key(name))] = file.name if file.step == manifest.step else f"../{file.path}"
        total += math.prod(tensor.shape) * DTYPES[tensor.dtype].itemsize
    index = {"metadata": {"total_size": total}, "weight_map": homes}
    return json.dumps(index, indent=2, sort_keys=True).encode()
