"""Saving: every rank writes its own files, rank 0 writes the manifest last.

See [Note: commit].
"""

from __future__ import annotations

import datetime
import numbers
import os
import secrets
from functools import partial
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
import xxhash
from torch import nn

from .. import __version__
from . import gather, rng
from .catalog import step_folder
from .datafile import BlockDigests, Item, Origin, header
from .dtypes import DTYPES, dtype_name
from .errors import CheckpointError
from .gather import Snapshot
from .manifest import (
    MANIFEST,
    DataFile,
    Group,
    Manifest,
    ModelPart,
    OptPart,
    ParamStates,
    StoredTensor,
    canonical,
    model_key,
    state_key,
    to_bytes,
)
from .peers import LostContact, Peers
from .plan import PART_BYTES, Shard, Whole, Written, block_bytes, check_cover, pack, share_out
from .storage import Storage, open_storage
from .values import Json, check_json, encode

# [Note: commit]
# 1. Every rank gathers what it holds; records are exchanged; ranks that disagree raise, before anything is written.
# 2. Every rank writes data files whose names hold an id drawn for this save, so that they collide with nothing.
# 3. What was written (or the error) goes to rank 0, which checks that the boxes cover every tensor exactly once and
#    that it sees every file at its full size, and only then publishes the manifest: one atomic act, the commit.
# 4. The outcome goes to every rank. After an error each rank removes its files, unless a manifest may refer to them.


def save(
    url: str | os.PathLike[str],
    *,
    step: int,
    model: nn.Module | None = None,
    opt: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    extra: Json = None,
    group: dist.ProcessGroup | None = None,
) -> str:
    """Save a checkpoint of `step` under the root `url` (a path or any fsspec URL) and return the step folder's URL.

    model: its parameters and buffers, as its state dict names them (buffers may differ between ranks: those of rank 0
    are saved). opt: groups, hyper-parameters, freezing and states.
    scheduler: anything with a state_dict of plain values. extra: JSON, taken from rank 0.
    The random generators of every rank are saved too.

    Collective: every rank of `group` (default: the default group, or this process alone) must call it. When it returns,
    the checkpoint is complete and on disk. Raises CheckpointError on every rank where anything fails on one; then the
    checkpoints before are as they were and this one does not exist. A step is never overwritten.
    """
    peers = Peers(group)
    work = _Save(peers, url, step, model, opt, scheduler, extra)
    records = peers.agree("gathering what to save", work.collect)
    work.plan(records)
    try:
        answer = peers.to_first("writing the checkpoint", work.write, work.commit)
    except LostContact:
        raise
    except CheckpointError:
        work.discard()
        raise
    return str(answer)


def _same(value: Json) -> Json:
    return value


class _Save:
    """One save on one rank."""

    storage: Storage
    folder = ""

    def __init__(
        self,
        peers: Peers,
        url: str | os.PathLike[str],
        step: int,
        model: nn.Module | None,
        opt: torch.optim.Optimizer | None,
        scheduler: Any,
        extra: Json,
    ) -> None:
        self.peers = peers
        self.url, self.step = url, step
        self.model, self.opt, self.scheduler, self.extra = model, opt, scheduler, extra
        self.snapshot = Snapshot()
        self.schedule: Json = None
        self.rng: list[list[str]] = []
        self.mine: list[tuple[str, Any]] = []
        self.block = 0
        self.save_id = ""
        self.written: list[str] = []

    def collect(self) -> dict[str, Json]:
        """Look at everything, write nothing; the record that all ranks see."""
        if not isinstance(self.step, numbers.Integral) or isinstance(self.step, bool) or self.step < 0:
            raise CheckpointError(f"step must be a whole number from 0, got {self.step!r}")
        self.step = int(self.step)
        check_json(self.extra, "extra")
        if self.scheduler is not None:
            self.schedule = encode(self.scheduler.state_dict(), "scheduler")
        if self.model is not None:
            gather.take_model(self.snapshot, self.model)
        if self.opt is not None:
            gather.take_optimizer(self.snapshot, self.opt, self.model)
        generators = rng.capture()
        gather.take_rng(self.snapshot, self.peers.rank, generators)
        self.storage = open_storage(self.url)
        self.folder = step_folder(self.step)
        if self.peers.rank == 0 and MANIFEST in self.storage.sizes(self.folder):
            raise CheckpointError(
                f"step {self.step} is already saved at {self.storage.url}/{self.folder}; nothing was overwritten"
            )
        return {
            "url": self.storage.url,
            "step": self.step,
            "save_id": secrets.token_hex(4),
            "bytes": self.snapshot.own_bytes,
            "rng": list(generators),
            "digests": {part: xxhash.xxh3_64_hexdigest(canonical(v)) for part, v in self.snapshot.about.items()},
        }

    def plan(self, records: list[dict[str, Json]]) -> None:
        """Compare the ranks' records and share out what several hold. Every rank comes to the same result or error."""
        for what in ("url", "step"):
            _compare(what, [record[what] for record in records])
        self.save_id = records[0]["save_id"]
        self.rng = [record["rng"] for record in records]
        digests = [record["digests"] for record in records]
        for part in ("model", "opt"):
            if any(d[part] != digests[0][part] for d in digests):
                own = self.snapshot.about[part]
                _compare(part, self.peers.agree("comparing the ranks", partial(_same, own)))
        states = [self.snapshot.about["state"]]
        if any(d["state"] != digests[0]["state"] for d in digests):
            states = self.peers.agree("comparing the ranks", lambda: self.snapshot.about["state"])
        self.states, holders = _merge_states(states)
        shared = self._shared_tensors(holders)
        loads = [int(record["bytes"]) for record in records]
        self.block = block_bytes(sum(loads) + sum(tensor.nbytes for tensor in shared))
        self.mine = share_out(shared, loads)[self.peers.rank]

    def _shared_tensors(self, holders: dict[str, tuple[int, ...]]) -> list[Whole]:
        shared = []
        model = self.snapshot.about["model"]
        for name, (kind, dtype, shape) in (model["tensors"] if model else {}).items():
            if kind != "pieces":
                holders_of = (0,) if kind == "first" else None
                shared.append(Whole(model_key(name), tuple(shape), DTYPES[dtype].itemsize, holders_of))
        for name, state in self.states.items():
            for key, (kind, *about) in state.items():
                if kind == "shared":
                    stored = state_key(name, key)
                    shared.append(Whole(stored, tuple(about[1]), DTYPES[about[0]].itemsize, holders.get(stored)))
        return shared

    def write(self) -> dict[str, Any]:
        """Write this rank's files; the record for rank 0."""
        items = list(self.snapshot.own)
        for key, box in self.mine:
            whole = self.snapshot.shared[key]
            items.append(Item(key, dtype_name(whole.dtype, key), tuple(whole.shape), box, whole[box.slices]))
        self.storage.make_folder(self.folder)
        parts = pack([(i.key, i.box, i.data.element_size()) for i in items], PART_BYTES)
        files, tensors = [], []
        for number, part in enumerate(parts):
            cuts = [_cut(items[w.source], w) for w in part]
            origin = Origin(self.save_id, self.step, self.peers.rank, self.peers.size, number)
            file, shards = self._write_file(origin, cuts)
            files.append(file)
            tensors += [
                (i.key, i.dtype, i.shape, number, at, i.box, blocks)
                for i, (at, blocks) in zip(cuts, shards, strict=True)
            ]
        self.storage.sync_folder(self.folder)
        return {"files": files, "tensors": tensors}

    def _write_file(self, origin: Origin, items: list[Item]) -> tuple[DataFile, list[tuple[int, str]]]:
        head = header(items, origin)
        bodies = [BlockDigests(item, self.block) for item in items]
        path = f"{self.folder}/{origin.file_name}"
        self.written.append(path)
        self.storage.create(path, chain([head], *(body.chunks() for body in bodies)))
        shards, at = [], len(head)
        for item, body in zip(items, bodies, strict=True):
            shards.append((at, "".join(body.hex)))
            at += item.nbytes
        return DataFile(origin.file_name, at, len(head), xxhash.xxh3_64_hexdigest(head)), shards

    def commit(self, records: list[dict[str, Any]]) -> str:
        """On rank 0: check all records, then publish the manifest. The URL of the step folder."""
        manifest = self.manifest(records)
        for key, tensor in manifest.tensors.items():
            check_cover(f"tensor {key!r}", tensor.shape, [shard.box for shard in tensor.shards])
        seen = self.storage.sizes(self.folder)
        for file in manifest.files:
            if seen.get(file.name) != file.bytes:
                raise CheckpointError(
                    f"{self.storage.url}/{self.folder}/{file.name} was written with {file.bytes} bytes, but rank 0 "
                    f"sees {seen.get(file.name, 'no such file')}: is the storage shared by all ranks?"
                )
        try:
            self.storage.publish(f"{self.folder}/{MANIFEST}", to_bytes(manifest))
        except FileExistsError:
            raise CheckpointError(
                f"step {self.step} was saved by somebody else meanwhile, at {self.storage.url}"
            ) from None
        return f"{self.storage.url}/{self.folder}"

    def manifest(self, records: list[dict[str, Any]]) -> Manifest:
        """The manifest of what all ranks wrote."""
        files: list[DataFile] = []
        tensors: dict[str, tuple[str, Any, list[Shard]]] = {}
        for rank, record in enumerate(records):
            for key, dtype, shape, number, at, box, blocks in record["tensors"]:
                entry = tensors.setdefault(key, (dtype, shape, []))
                if entry[:2] != (dtype, shape):
                    raise CheckpointError(
                        f"rank {rank} holds {key!r} as {dtype}{shape}, another rank as {entry[0]}{entry[1]}"
                    )
                entry[2].append(Shard(len(files) + number, at, box, blocks))
            files += record["files"]
        opt = self.snapshot.about["opt"]
        for name, state in self.states.items():  # a tensor without elements has no piece on any rank
            for key, about in state.items():
                if about[0] == "pieces":
                    tensors.setdefault(state_key(name, key), (opt["dtypes"][name], tuple(opt["params"][name]), []))
        return Manifest(
            step=self.step,
            save_id=self.save_id,
            created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            world_size=self.peers.size,
            library={"fastopt": __version__, "torch": str(torch.__version__)},
            block=self.block,
            files=tuple(files),
            tensors={key: StoredTensor(dtype, shape, tuple(shards)) for key, (dtype, shape, shards) in tensors.items()},
            model=_model_part(self.snapshot.about["model"]),
            opt=_opt_part(opt, self.states),
            scheduler=self.schedule,
            rng=tuple(tuple(names) for names in self.rng),
            extra=self.extra,
        )

    def discard(self) -> None:
        """After a failed save: remove this rank's files, as far as possible, unless a manifest is there after all."""
        try:
            if MANIFEST not in self.storage.sizes(self.folder):
                for path in self.written:
                    self.storage.remove(path)
                self.storage.remove_folder(self.folder)
        except Exception:  # the error that led here is the one to show
            return


def _cut(item: Item, written: Written) -> Item:
    if written.box == item.box:
        return item
    local = written.box.relative_to(item.box)
    return Item(item.key, item.dtype, item.shape, written.box, item.data[local.slices])


def _merge_states(ranks: list[Json]) -> tuple[dict[str, dict[str, Json]], dict[str, tuple[int, ...]]]:
    """What all ranks together say about states, and for each shared one who holds it (nothing where all agree)."""
    if len(ranks) == 1:
        return ranks[0], {}
    merged: dict[str, dict[str, Json]] = {}
    holders: dict[str, tuple[int, ...]] = {}
    first: dict[str, int] = {}
    for rank, states in enumerate(ranks):
        for name, state in states.items():
            for key, about in state.items():
                stored = state_key(name, key)
                known = merged.setdefault(name, {}).setdefault(key, about)
                first.setdefault(stored, rank)
                if {known[0], about[0]} == {"shared", "pieces"}:  # one rank holds all there is, as after consolidating
                    known = known if known[0] == "shared" else about
                    merged[name][key] = known
                elif known != about:
                    raise CheckpointError(
                        f"ranks disagree on the state {key!r} of {name!r}: {_short(known)} on rank {first[stored]}, "
                        f"{_short(about)} on rank {rank}"
                    )
                if about[0] == "shared":
                    holders[stored] = (*holders.get(stored, ()), rank)
    return merged, holders


def _compare(what: str, values: list[Json]) -> None:
    """Raise CheckpointError that says where the values of the ranks differ first."""
    for rank, value in enumerate(values):
        found = _difference(values[0], value, what)
        if found:
            where, a, b = found
            raise CheckpointError(f"ranks disagree on {where}: {_short(a)} on rank 0, {_short(b)} on rank {rank}")


def _difference(a: Json, b: Json, where: str) -> tuple[str, Json, Json] | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if key not in a or key not in b:
                return f"{where} {key!r}", "there" if key in a else "missing", "there" if key in b else "missing"
            if found := _difference(a[key], b[key], f"{where} {key!r}"):
                return found
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if found := _difference(x, y, f"{where} {i}"):
                return found
    elif a != b or type(a) is not type(b):
        return where, a, b
    return None


def _short(value: Json) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."


def _model_part(about: Json) -> ModelPart | None:
    return about and ModelPart(tuple(about["order"]), about["aliases"], about["values"])


def _opt_part(about: Json, states: dict[str, dict[str, Json]]) -> OptPart | None:
    if about is None:
        return None
    parts = {
        name: ParamStates(
            tuple(key for key, (kind, *_) in state.items() if kind != "value"),
            {key: content[0] for key, (kind, *content) in state.items() if kind == "value"},
        )
        for name, state in states.items()
    }
    groups = tuple(Group(tuple(group["params"]), group["options"]) for group in about["groups"])
    return OptPart({name: tuple(shape) for name, shape in about["params"].items()}, groups, parts)
