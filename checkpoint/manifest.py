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
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import xxhash

from ..pieces import Box, Shape
from .dtypes import dtype_of
from .errors import CheckpointError
from .plan import Shard, check_cover
from .values import Json, decode

FORMAT = "fastopt-checkpoint"
VERSION = 1
MANIFEST = "manifest.json"
_HEAD = b'{"digest":"'
_HEAD_END = b'",'
_BODY = len(_HEAD) + 16 + len(_HEAD_END)
_LARGEST = 1 << 62
FILE_NAME = re.compile(r"s-([0-9a-f]{8})-r\d{5,9}-\d{3,9}\.safetensors")
_DIGEST = re.compile(r"[0-9a-f]{16}")
_SAVE_ID = re.compile(r"[0-9a-f]{8}")


@dataclass(frozen=True)
class DataFile:
    """A data file: its name in the step folder, its size, where its data begin, and the digest of what is before."""

    name: str
    bytes: int
    header: int
    digest: str


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint: safetensors dtype name, global shape, and the boxes it is stored in."""

    dtype: str
    shape: Shape
    shards: tuple[Shard, ...]


@dataclass(frozen=True)
class ModelPart:
    """What a model's state dict held: names of tensors, further names of tied ones, and values that are no tensors."""

    tensors: tuple[str, ...]
    aliases: dict[str, str] = field(default_factory=dict)
    values: dict[str, Json] = field(default_factory=dict)


@dataclass(frozen=True)
class Group:
    """A parameter group: names of its parameters, and all its other entries, encoded (see values.py)."""

    params: tuple[str, ...]
    options: dict[str, Json]


@dataclass(frozen=True)
class ParamStates:
    """The state of one parameter: keys whose values are tensors, and the other values, encoded."""

    tensors: tuple[str, ...]
    values: dict[str, Json]


@dataclass(frozen=True)
class OptPart:
    """What an optimizer held, by parameter name: shapes, groups in their order, and states."""

    params: dict[str, Shape]
    groups: tuple[Group, ...]
    states: dict[str, ParamStates]


@dataclass(frozen=True)
class Manifest:
    """A checkpoint. `rng` has for every rank that saved the names of its generators; `block` is bytes per checksum."""

    step: int
    save_id: str
    created: str
    world_size: int
    library: dict[str, str]
    block: int
    files: tuple[DataFile, ...]
    tensors: dict[str, StoredTensor]
    model: ModelPart | None
    opt: OptPart | None
    scheduler: Json
    rng: tuple[tuple[str, ...], ...]
    extra: Json

    @property
    def nbytes(self) -> int:
        """Bytes of all data files."""
        return sum(file.bytes for file in self.files)


def model_key(name: str) -> str:
    """The key in the data files of the model's tensor `name`."""
    return f"model/{name}"


def state_key(name: str, key: str) -> str:
    """The key in the data files of the state `key` of the parameter `name`: `state/<key>/<name>`.

    A percent sign or slash in `key` (not in `name`, which comes last) is escaped, so that no two states share a key.
    """
    return f"state/{key.replace('%', '%25').replace('/', '%2F')}/{name}"


def rng_key(rank: int, name: str) -> str:
    """The key in the data files of the random generator `name` of `rank`."""
    return f"rng/{rank}/{name}"


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
            "rng": manifest.rng,
            "extra": manifest.extra,
        }
    )[1:]
    return _HEAD + xxhash.xxh3_64_hexdigest(body).encode() + _HEAD_END + body


def _tensor_json(tensor: StoredTensor) -> Json:
    shards = [[s.file, s.at, s.box.offset, s.box.shape, s.blocks] for s in tensor.shards]
    return {"dtype": tensor.dtype, "shape": tensor.shape, "shards": shards}


def from_bytes(data: bytes) -> Manifest:
    """Parse and check. Raises CheckpointError that says what is wrong."""
    if not data.startswith(_HEAD) or data[_BODY - len(_HEAD_END) : _BODY] != _HEAD_END:
        raise CheckpointError("it does not begin like a manifest of fastopt")
    body = data[_BODY:]
    if data[len(_HEAD) : len(_HEAD) + 16] != xxhash.xxh3_64_hexdigest(body).encode():
        raise CheckpointError("its digest is not that of its content: it was damaged or edited")
    try:
        tree = json.loads(b"{" + body, object_pairs_hook=_unique, parse_constant=_no_constant)
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


def _int(value: Json, where: str, least: int = 0, most: int = _LARGEST) -> int:
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
    _need(len(shape) <= 64 and math.prod(n for n in shape if n) <= _LARGEST, where, f"impossible shape {shape}")
    return shape


_FIELDS = (
    "format version step save_id created world_size library checksum block files tensors model opt scheduler rng extra"
)


def _manifest(tree: Json) -> Manifest:
    top = _dict(tree, "manifest")
    _need(top.get("format") == FORMAT, "format", f"not {FORMAT!r} but {str(top.get('format'))[:80]!r}")
    version = top.get("version")
    _need(type(version) is int and version == VERSION, "version", f"this reads {VERSION}, not {str(version)[:20]}")
    top = _dict(tree, "manifest", tuple(_FIELDS.split()))
    _need(top["checksum"] == "xxh3_64", "checksum", f"unknown algorithm {str(top['checksum'])[:80]!r}")
    world = _int(top["world_size"], "world_size", 1, 1 << 24)
    block = _int(top["block"], "block", 16, 16 << 20)
    _need(block & (block - 1) == 0, "block", f"{block} is not a power of two")
    save_id = _str(top["save_id"], "save_id", _SAVE_ID)
    files = tuple(_file(item, f"files[{i}]", save_id) for i, item in enumerate(_list(top["files"], "files")))
    _need(len({file.name for file in files}) == len(files), "files", "a file is listed twice")
    tensors = {
        key: _tensor(item, f"tensor {key!r}", files, block) for key, item in _dict(top["tensors"], "tensors").items()
    }
    _check_disjoint(tensors, files)
    rng = tuple(_names(item, f"rng[{i}]") for i, item in enumerate(_list(top["rng"], "rng")))
    _need(len(rng) in (0, world), "rng", f"{len(rng)} entries for {world} ranks")
    for rank, names in enumerate(rng):
        for name in names:
            entry = tensors.get(rng_key(rank, name))
            _need(entry is not None and entry.dtype == "U8" and len(entry.shape) == 1, "rng", f"no data for {name!r}")
    if top["scheduler"] is not None:
        decode(top["scheduler"], "scheduler")
    return Manifest(
        step=_int(top["step"], "step"),
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
        rng=rng,
        extra=top["extra"],
    )


def _file(value: Json, where: str, save_id: str) -> DataFile:
    item = _dict(value, where, ("name", "bytes", "header", "digest"))
    name = _str(item["name"], f"{where}.name", FILE_NAME)
    _need(name.startswith(f"s-{save_id}-"), where, f"the file {name!r} belongs to another save")
    size = _int(item["bytes"], f"{where}.bytes")
    header = _int(item["header"], f"{where}.header", 8, size)
    return DataFile(name, size, header, _str(item["digest"], f"{where}.digest", _DIGEST))


def _tensor(value: Json, where: str, files: tuple[DataFile, ...], block: int) -> StoredTensor:
    item = _dict(value, where, ("dtype", "shape", "shards"))
    itemsize = dtype_of(item["dtype"], where).itemsize
    shape = _shape(item["shape"], where)
    shards = tuple(
        _shard(s, f"{where} shard {i}", files, itemsize, block) for i, s in enumerate(_list(item["shards"], where))
    )
    check_cover(where, shape, [shard.box for shard in shards])
    return StoredTensor(item["dtype"], shape, shards)


def _shard(value: Json, where: str, files: tuple[DataFile, ...], itemsize: int, block: int) -> Shard:
    item = _list(value, where)
    _need(len(item) == 5, where, f"expected 5 fields, got {len(item)}")
    number = _int(item[0], where, 0, len(files) - 1)
    offset, shape = _shape(item[2], where), _shape(item[3], where)
    _need(len(offset) == len(shape), where, f"offset {offset} does not go with shape {shape}")
    box = Box(offset, shape)
    size = box.numel * itemsize
    file = files[number]
    at = _int(item[1], where, file.header, file.bytes)
    _need(at + size <= file.bytes, where, f"{size} bytes at {at} are more than {file.name} has")
    digests = _str(item[4], where)
    _need(len(digests) == 16 * -(-size // block), where, f"{len(digests)} digits of checksums for {size} bytes")
    _need(not digests or re.fullmatch("[0-9a-f]+", digests) is not None, where, "malformed checksums")
    return Shard(number, at, box, digests)


def _check_disjoint(tensors: dict[str, StoredTensor], files: tuple[DataFile, ...]) -> None:
    """No byte of a file belongs to two boxes: what is read can then never be more than the files hold."""
    spans: list[tuple[int, int, int, str]] = []
    for key, tensor in tensors.items():
        size = dtype_of(tensor.dtype, key).itemsize
        spans += [(s.file, s.at, s.at + s.box.numel * size, key) for s in tensor.shards if s.box.numel]
    spans.sort()
    for (file, _, stop, key), (next_file, start, _, other) in pairwise(spans):
        _need(file != next_file or stop <= start, f"tensors {key!r} and {other!r}", f"overlap in {files[file].name}")


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
    params = {n: _shape(s, f"parameter {n!r}") for n, s in _dict(item["params"], "opt.params").items()}
    groups = tuple(_group(g, f"opt.groups[{i}]") for i, g in enumerate(_list(item["groups"], "opt.groups")))
    members = [name for group in groups for name in group.params]
    _need(len(set(members)) == len(members), "opt.groups", "a parameter is in two groups")
    _need(set(members) == set(params), "opt.groups", "their members are not the parameters listed")
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
