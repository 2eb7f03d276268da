"""What a checkpoint is made of, as plain values, and the keys under which tensors are stored."""

from __future__ import annotations

import re
from dataclasses import dataclass, field

from ...pieces import Shape
from .shards import Shards
from .values import Json

MANIFEST = "manifest.json"
INDEX = "model.safetensors.index.json"
FILE_NAME = re.compile(r"(?:s|model)-([0-9a-f]{8})-r\d{5,9}-\d{3,9}\.safetensors")


@dataclass(frozen=True)
class DataFile:
    """A data file: its name, its size, where its data begin, and the digest of what is before.

    `step` says in whose step folder it lies: that of the checkpoint, or an earlier one where nothing in the file has
    changed since. `blocks` are the digests of its data, 16 hexadecimal digits for each block.
    """

    name: str
    bytes: int
    header: int
    digest: str
    step: int
    blocks: str

    @property
    def path(self) -> str:
        """Where it is, from the root."""
        return f"{step_folder(self.step)}/{self.name}"


@dataclass(frozen=True)
class StoredTensor:
    """A tensor of the checkpoint: safetensors dtype name, global shape, and where its parts are."""

    dtype: str
    shape: Shape
    shards: Shards


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
    """What an optimizer held, by parameter name: shapes (None where unknown), groups in their order, and states."""

    params: dict[str, Shape | None]
    groups: tuple[Group, ...]
    states: dict[str, ParamStates]


@dataclass(frozen=True)
class Manifest:
    """A checkpoint. `rng` has for every rank that saved the names of its generators; `block` is bytes per checksum.

    `loader` has the position in the data: of every rank that saved, or one for all, or none.
    """

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
    scaler: Json
    loader: tuple[Json, ...]
    rng: tuple[tuple[str, ...], ...]
    extra: Json

    @property
    def nbytes(self) -> int:
        """Bytes of all data files, those of earlier steps included."""
        return sum(file.bytes for file in self.files)


def step_folder(step: int) -> str:
    """The folder of a step, `step-00001000`, so that names sort as numbers do."""
    return f"step-{step:08d}"


def model_key(name: str) -> str:
    """The key in the manifest of the model's tensor `name`."""
    return f"model/{name}"


def state_key(name: str, key: str) -> str:
    """The key of the state `key` of the parameter `name`: `state/<key>/<name>`.

    A percent sign or slash in `key` (not in `name`, which comes last) is escaped, so that no two states share a key.
    """
    return f"state/{key.replace('%', '%25').replace('/', '%2F')}/{name}"


def rng_key(rank: int, name: str) -> str:
    """The key of the random generator `name` of `rank`."""
    return f"rng/{rank}/{name}"


def part_of(key: str) -> str:
    """What a key belongs to: `model`, `state/<key>` or `rng`."""
    kind, _, rest = key.partition("/")
    return f"state/{rest.partition('/')[0]}" if kind == "state" else kind


def rank_of(name: str) -> int:
    """The rank that wrote the data file `name`, see FILE_NAME."""
    return int(name.rpartition("-r")[2].partition("-")[0])


def file_key(key: str) -> str:
    """The key inside a data file: the model's tensors go by their own names there, as Hugging Face has them."""
    return key.removeprefix("model/")


def file_order(key: str, itemsize: int) -> tuple[int, str]:
    """Sorts the tensors of a data file: wide elements first, so that each is aligned; then by key."""
    return -itemsize, key
