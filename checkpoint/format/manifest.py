"""The manifest: one JSON file that says what a checkpoint holds and where. Pure: bytes in, checked value out.

Its presence is what makes a checkpoint exist. `docs/checkpoint-format.md` describes every field. Parsing
trusts nothing: each field is checked, and no memory is set aside for a tensor before the manifest as a
whole is known to be sound.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import numpy as np
import xxhash

from ...pieces import Box, Shape
from ..errors import CheckpointError, NewerFormat
from .dtypes import dtype_of
from .records import (
    FILE_NAME,
    MANIFEST,
    DataFile,
    Group,
    Manifest,
    ModelPart,
    OptPart,
    ParamStates,
    StoredTensor,
    file_order,
    model_key,
    rng_key,
    state_key,
)
from .shards import Column, Shards
from .values import Json, decode

__all__ = ["FILE_NAME", "MANIFEST", "Manifest", "canonical", "check_digest", "from_bytes", "place", "to_bytes"]

FORMAT = "fastopt-checkpoint"
VERSION = 1
_HEAD = b'{"digest":"'
_HEAD_END = b'",'
_BODY = len(_HEAD) + 16 + len(_HEAD_END)
LARGEST = 1 << 62  # more than any number of bytes, elements or steps
_DIGEST = re.compile(r"[0-9a-f]{16}")
_DIGESTS = re.compile(r"[0-9a-f]*")
_SAVE_ID = re.compile(r"[0-9a-f]{8}")


def canonical(value: Json) -> bytes:
    """JSON with sorted keys, no spaces, ASCII only: the same value gives the same bytes."""
    return json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False).encode()


def to_bytes(manifest: Manifest) -> bytes:
    """The manifest as the file holds it: `{"digest":"<xxh3_64 of all that follows the comma>",...`."""
    model, opt = manifest.model, manifest.opt
    body = canonical(
        {
            "format": FORMAT,
            "version": VERSION,
            "step": manifest.step,
            "save_id": manifest.save_id,
            "created": manifest.created,
            "world_size": manifest.world_size,
            "library": manifest.library,
            "checksum": "xxh3_64",
            "block": manifest.block,
            "files": [vars(file) for file in manifest.files],
            "tensors": {key: _tensor_json(tensor) for key, tensor in manifest.tensors.items()},
            "model": model and {"tensors": model.tensors, "aliases": model.aliases, "values": model.values},
            "opt": opt
            and {
                "params": opt.params,
                "groups": [vars(group) for group in opt.groups],
                "states": {name: vars(states) for name, states in opt.states.items()},
            },
            "scheduler": manifest.scheduler,
            "scaler": manifest.scaler,
            "loader": manifest.loader,
            "rng": manifest.rng,
            "extra": manifest.extra,
        }
    )[1:]
    return _HEAD + xxhash.xxh3_64_hexdigest(body).encode() + _HEAD_END + body


def _tensor_json(tensor: StoredTensor) -> Json:
    what = "shards" if tensor.shards.boxes is None else "boxes"
    return {"dtype": tensor.dtype, "shape": tensor.shape, what: tensor.shards.rows()}


def place(files: tuple[DataFile, ...], tensors: dict[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The tensors with the place of each part in its file: one after the other, in the order of `file_order`.

    Raises CheckpointError where the parts of a file are not exactly its data.
    """
    sizes = {key: dtype_of(tensor.dtype, key).itemsize for key, tensor in tensors.items()}
    room, held = (
        sum(file.bytes - file.header for file in files),
        sum(math.prod(tensor.shape) * sizes[key] for key, tensor in tensors.items()),
    )
    if room != held:  # first of all, so that no number below can be too large
        raise CheckpointError(f"its tensors have {held} bytes, its files {room}")
    order = sorted(tensors, key=lambda key: file_order(key, sizes[key]))
    parts = [tensors[key].shards for key in order]
    first = np.concatenate([[0], np.cumsum([len(shards) for shards in parts], dtype=np.int64)])
    file: Column = np.concatenate([np.zeros(0, np.int64), *(shards.file for shards in parts)])
    nbytes = np.concatenate([np.zeros(0, np.int64), *(shards.sizes for shards in parts)])
    nbytes *= np.repeat(np.array([sizes[key] for key in order], dtype=np.int64), np.diff(first))
    at, ends = _one_after_the_other(file, nbytes, np.array([file.header for file in files], dtype=np.int64))
    for each, end in zip(files, ends.tolist(), strict=True):
        if end != each.bytes:
            raise CheckpointError(f"{each.name} has {each.bytes} bytes, but the tensors in it end at byte {end}")
    return {
        key: StoredTensor(tensors[key].dtype, tensors[key].shape, shards.placed(at[start:stop]))
        for key, shards, (start, stop) in zip(order, parts, pairwise(first.tolist()), strict=True)
    }


def _one_after_the_other(file: Column, nbytes: Column, start: Column) -> tuple[Column, Column]:
    """Where each part begins in its `file`, given where the first of each file does, and where the last ones end."""
    order = np.argsort(file.astype(np.min_scalar_type(max(1, len(start)))), kind="stable")
    ends = np.cumsum(nbytes[order])
    counts = np.bincount(file, minlength=len(start))
    totals = np.append(np.int64(0), ends)[np.cumsum(counts)]
    shift = start - np.append(np.int64(0), totals[:-1])[: len(start)]  # what is before a file's parts in `ends`
    at = np.empty_like(file)
    at[order] = ends - nbytes[order] + shift[file[order]]
    return at, totals + shift


def check_digest(data: bytes) -> None:
    """Raise CheckpointError unless these bytes begin like a manifest and have the digest that they name."""
    if not data.startswith(_HEAD) or data[_BODY - len(_HEAD_END) : _BODY] != _HEAD_END:
        raise CheckpointError("it does not begin like a manifest of fastopt")
    digest = data[len(_HEAD) : len(_HEAD) + 16]
    if digest != xxhash.xxh3_64_hexdigest(memoryview(data)[_BODY:]).encode():
        raise CheckpointError("its digest is not that of its content: it was damaged or edited")


def from_bytes(data: bytes) -> Manifest:
    """Parse and check. Raises CheckpointError that says what is wrong."""
    check_digest(data)
    try:
        tree = json.loads(b"{" + data[_BODY:], object_pairs_hook=_unique, parse_constant=_no_constant)
    except CheckpointError:
        raise
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"it is not JSON: {error}") from None
    try:
        return _manifest(tree)
    except RecursionError:
        raise CheckpointError("it is nested too deep") from None


def _unique(pairs: list[tuple[str, Json]]) -> dict[str, Json]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise CheckpointError("an object in it has the same key twice")
    return found


def _no_constant(text: str) -> Json:
    raise CheckpointError(f"it holds {text}, which is not JSON")


# ---- checks: each takes a parsed value and its place, and returns it typed -------------------------------------------


def _need(ok: bool, where: str, what: str) -> None:
    if not ok:
        raise CheckpointError(f"{where}: {what}")


def _int(value: Json, where: str, least: int = 0, most: int = LARGEST) -> int:
    if type(value) is not int or not least <= value <= most:
        raise CheckpointError(f"{where}: expected a whole number from {least} to {most}, got {str(value)[:80]}")
    return value


def _str(value: Json, where: str, pattern: re.Pattern[str] | None = None) -> str:
    if not isinstance(value, str) or (pattern and not pattern.fullmatch(value)):
        raise CheckpointError(f"{where}: unexpected {str(value)[:80]!r}")
    return value


def _list(value: Json, where: str) -> list[Json]:
    if not isinstance(value, list):
        raise CheckpointError(f"{where}: expected a list, got {type(value).__name__}")
    return value


def _dict(value: Json, where: str, keys: tuple[str, ...] | None = None) -> dict[str, Json]:
    if not isinstance(value, dict):
        raise CheckpointError(f"{where}: expected an object, got {type(value).__name__}")
    if keys is not None and set(value) != set(keys):
        wrong = sorted(set(value) ^ set(keys))
        raise CheckpointError(f"{where}: missing or unknown fields {wrong}")
    return value


def _names(value: Json, where: str) -> tuple[str, ...]:
    names = tuple(_str(name, where) for name in _list(value, where))
    _need(len(set(names)) == len(names), where, "a name is there twice")
    return names


def _shape(value: Json, where: str) -> Shape:
    shape = tuple(_int(n, where) for n in _list(value, where))
    _need(len(shape) <= 64 and math.prod(n for n in shape if n) <= LARGEST, where, f"impossible shape {shape}")
    return shape


_FIELDS = (
    "format version step save_id created world_size library checksum block files tensors model opt scheduler scaler"
    " loader rng extra"
)


def _manifest(tree: Json) -> Manifest:
    top = _dict(tree, "manifest")
    _need(top.get("format") == FORMAT, "format", f"not {FORMAT!r} but {str(top.get('format'))[:80]!r}")
    version = top.get("version")
    if type(version) is int and version > VERSION:
        raise NewerFormat(
            f"it has version {str(version)[:20]} of the format, this fastopt reads up to {VERSION}: install a newer one"
        )
    _need(type(version) is int and version == VERSION, "version", f"unknown {str(version)[:20]!r}")
    top = _dict(tree, "manifest", tuple(_FIELDS.split()))
    _need(top["checksum"] == "xxh3_64", "checksum", f"unknown algorithm {str(top['checksum'])[:80]!r}")
    world = _int(top["world_size"], "world_size", 1, 1 << 24)
    step = _int(top["step"], "step")
    block = _int(top["block"], "block", 16, 16 << 20)
    _need(block & (block - 1) == 0, "block", f"{block} is not a power of two")
    save_id = _str(top["save_id"], "save_id", _SAVE_ID)
    listed = _list(top["files"], "files")
    files = tuple(_file(item, f"files[{i}]", save_id, step, block) for i, item in enumerate(listed))
    _need(len({(file.name, file.step) for file in files}) == len(files), "files", "a file is listed twice")
    known: dict[str, Shards] = {}
    stored = _dict(top["tensors"], "tensors").items()
    tensors = place(files, {key: _tensor(item, f"tensor {key!r}", len(files), known) for key, item in stored})
    for what in ("scheduler", "scaler"):
        decode(top[what], what)
    loader = tuple(_list(top["loader"], "loader"))
    _need(len(loader) in (0, 1, world), "loader", f"{len(loader)} positions for {world} ranks")
    decode(list(loader), "loader")
    return Manifest(
        step=step,
        save_id=save_id,
        created=_str(top["created"], "created"),
        world_size=world,
        library={k: _str(v, f"library.{k}") for k, v in _dict(top["library"], "library").items()},
        block=block,
        files=files,
        tensors=tensors,
        model=None if top["model"] is None else _model(top["model"], tensors),
        opt=None if top["opt"] is None else _opt(top["opt"], tensors),
        scheduler=top["scheduler"],
        scaler=top["scaler"],
        loader=loader,
        rng=_rng(top["rng"], world, tensors),
        extra=top["extra"],
    )


def _rng(value: Json, world: int, tensors: dict[str, StoredTensor]) -> tuple[tuple[str, ...], ...]:
    rng = tuple(_names(item, f"rng[{i}]") for i, item in enumerate(_list(value, "rng")))
    _need(len(rng) in (0, world), "rng", f"{len(rng)} entries for {world} ranks")
    for rank, names in enumerate(rng):
        for name in names:
            entry = tensors.get(rng_key(rank, name))
            _need(entry is not None and entry.dtype == "U8" and len(entry.shape) == 1, "rng", f"no data for {name!r}")
    return rng


def _file(value: Json, where: str, save_id: str, step: int, block: int) -> DataFile:
    item = _dict(value, where, ("name", "bytes", "header", "digest", "step", "blocks"))
    name = _str(item["name"], f"{where}.name", FILE_NAME)
    home = _int(item["step"], f"{where}.step", 0, step)
    if home == step:
        _need(f"-{save_id}-r" in name, where, f"the file {name!r} belongs to another save")
    size = _int(item["bytes"], f"{where}.bytes")
    header = _int(item["header"], f"{where}.header", 8, size)
    blocks = _str(item["blocks"], f"{where}.blocks", _DIGESTS)
    _need(header % 16 == 0, where, f"its data begin at byte {header}, which is not a multiple of 16")
    _need(
        len(blocks) == 16 * -(-(size - header) // block), where, f"{len(blocks)} digits of checksums for {size} bytes"
    )
    return DataFile(name, size, header, _str(item["digest"], f"{where}.digest", _DIGEST), home, blocks)


def _tensor(value: Json, where: str, files: int, known: dict[str, Shards]) -> StoredTensor:
    """`known`: parts that have been checked, for the states of a parameter are all cut alike."""
    item = _dict(value, where)
    what = "boxes" if "boxes" in item else "shards"
    item = _dict(item, where, ("dtype", "shape", what))
    dtype_of(item["dtype"], where)
    text = f"{what}{item['shape']}{item[what]}"
    if text not in known:
        shape = _shape(item["shape"], where)
        rows = [_list(row, f"{where} {what}") for row in _list(item[what], where)]
        _need(len(rows) <= files, where, f"{len(rows)} parts in {files} files")
        shards = _boxes(rows, where, shape, files) if what == "boxes" else _intervals(rows, where, shape, files)
        shards.check(where)
        known[text] = shards
    return StoredTensor(item["dtype"], known[text].shape, known[text])


def _boxes(rows: list[list[Json]], where: str, shape: Shape, files: int) -> Shards:
    numbers, boxes = [], []
    for row in rows:
        _need(len(row) == 3, where, f"a box with {len(row)} fields")
        numbers.append(_int(row[0], where, 0, files - 1))
        offset, extent = _shape(row[1], where), _shape(row[2], where)
        _need(len(offset) == len(extent), where, f"offset {offset} does not go with shape {extent}")
        boxes.append(Box(offset, extent))
    return Shards.of_boxes(shape, numbers, boxes)


def _intervals(rows: list[list[Json]], where: str, shape: Shape, files: int) -> Shards:
    """Every run written out. A file holds one part of a tensor, so that there can be no more parts than files."""
    single: list[tuple[int, int, int]] = []
    runs: list[Column] = []
    parts, total = 0, math.prod(shape)
    for row in rows:
        _need(len(row) in (3, 6), where, f"a part with {len(row)} fields")
        if not all(type(n) is int and 0 <= n <= LARGEST for n in row):
            raise CheckpointError(f"{where}: a part is given in whole numbers, got {str(row)[:80]}")
        file, start, count = row[:3]
        times, far, step = row[3:] or (1, 0, 0)
        parts += times
        _need(times >= 1 and parts <= files, where, f"more parts than the {files} files")
        _need(file + (times - 1) * far < files, where, "a part in a file that is not listed")
        last = start + (times - 1) * step
        _need(last + count <= total, where, f"elements {last} to {last + count} are outside shape {shape}")
        if times == 1:
            single.append((file, start, count))
        else:
            lane = np.arange(times, dtype=np.int64)
            runs.append(np.stack([file + far * lane, start + step * lane, np.full_like(lane, count)]))
    columns = np.array(single, dtype=np.int64).reshape(-1, 3).T
    return Shards.intervals(shape, *(np.concatenate([columns, *runs], axis=1) if runs else columns))


def _model(value: Json, tensors: dict[str, StoredTensor]) -> ModelPart:
    item = _dict(value, "model", ("tensors", "aliases", "values"))
    names = _names(item["tensors"], "model.tensors")
    for name in names:
        _need(model_key(name) in tensors, "model", f"the tensor {name!r} has no data")
    aliases = {a: _str(n, "model.aliases") for a, n in _dict(item["aliases"], "model.aliases").items()}
    for alias, name in aliases.items():
        _need(name in names and alias not in names, "model.aliases", f"{alias!r} is tied to the unknown {name!r}")
    values = _dict(item["values"], "model.values")
    for name, encoded in values.items():
        decode(encoded, f"model value {name!r}")
    return ModelPart(names, aliases, values)


def _opt(value: Json, tensors: dict[str, StoredTensor]) -> OptPart:
    item = _dict(value, "opt", ("params", "groups", "states"))
    shapes = _dict(item["params"], "opt.params").items()
    known = {n: None if s is None else _shape(s, f"parameter {n!r}") for n, s in shapes}
    groups = tuple(_group(g, f"opt.groups[{i}]") for i, g in enumerate(_list(item["groups"], "opt.groups")))
    members = [name for group in groups for name in group.params]
    _need(len(set(members)) == len(members), "opt.groups", "a parameter is in two groups")
    _need(set(members) == set(known), "opt.groups", "their members are not the parameters listed")
    params = {name: known[name] for name in members}  # in their order: JSON has them sorted, "10" before "2"
    states: dict[str, ParamStates] = {}
    for name, entry in _dict(item["states"], "opt.states").items():
        where = f"state of {name!r}"
        _need(name in params, where, "there is no such parameter")
        both = _dict(entry, where, ("tensors", "values"))
        keys, values = _names(both["tensors"], where), _dict(both["values"], where)
        for key in keys:
            _need(
                state_key(name, key) in tensors and key not in values, where, f"{key!r} has no data, or is there twice"
            )
        _decode_all(values, where)
        states[name] = ParamStates(keys, values)
    return OptPart(params, groups, states)


def _group(value: Json, where: str) -> Group:
    item = _dict(value, where, ("params", "options"))
    options = _dict(item["options"], where)
    _decode_all(options, where)
    return Group(_names(item["params"], where), options)


def _decode_all(values: dict[str, Json], where: str, decoder: Callable[[Json, str], Any] = decode) -> None:
    """Decode for the sake of the errors: what comes later may rely on it."""
    for key, encoded in values.items():
        decoder(encoded, f"{where} {key!r}")
