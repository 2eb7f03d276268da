"""Saving: every rank writes its own files, rank 0 writes the manifest last.

See [Note: commit].
"""

from __future__ import annotations

import contextlib
import copy
import datetime
import numbers
import os
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, overload

import torch
import torch.distributed as dist
import xxhash
from torch import nn

from ... import __version__
from ...bare import bare_optimizer
from .. import catalog
from ..arguments import check_objects
from ..contents import gather, rng
from ..contents.gather import Snapshot
from ..contents.plan import Whole, block_bytes, share_out
from ..errors import CheckpointError
from ..format.datafile import Item, Origin
from ..format.dtypes import DTYPES, dtype_name
from ..format.manifest import LARGEST, canonical, from_bytes, to_bytes
from ..format.records import INDEX, MANIFEST, Manifest, model_key, rng_key, state_key, step_folder
from ..format.values import Json, check_json, encode
from ..io.storage import Storage, open_storage
from ..ranks.peers import LostContact, Peers
from . import assemble
from .compare import compare, merge_states
from .writing import FileRecord, Writer

# [Note: commit]
# 1. Every rank gathers what it holds; records are exchanged; ranks that disagree raise, before anything is written.
# 2. Every rank writes data files whose names hold an id drawn for this save, so that they collide with nothing.
# 3. What was written (or the error) goes to rank 0, which checks that the boxes cover every tensor exactly once and
#    that it sees every file at its full size, and only then publishes the manifest: one atomic act, the commit.
# 4. The outcome goes to every rank. After an error each rank removes its files, unless a manifest may refer to them.


Url = str | os.PathLike[str]


@overload
def save(
    what: Url,
    *,
    step: int,
    model: nn.Module | None = None,
    opt: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    loader: Any = None,
    extra: Json = None,
    reuse: bool = True,
    group: dist.ProcessGroup | None = None,
) -> str: ...


@overload
def save(
    what: Mapping[str, Any],
    url: Url,
    *,
    step: int | None = None,
    extra: Json = None,
    reuse: bool = True,
    group: dist.ProcessGroup | None = None,
) -> str: ...


def save(
    what: Url | Mapping[str, Any],
    url: Url | None = None,
    *,
    step: int | None = None,
    model: nn.Module | None = None,
    opt: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    loader: Any = None,
    extra: Json = None,
    reuse: bool = True,
    group: dist.ProcessGroup | None = None,
) -> str:
    """Save a checkpoint of `step` under a root (a path or any fsspec URL) and return the step folder's URL.

    `save(url, step=, ...)` saves the objects given; `save(state_dict, url)` the state dict of an optimizer, sharded or
    not, or of a model, to be read with `fastopt.checkpoint.open` (without `step` as the step after the newest).

    The random generators of every rank are saved too. Collective: every rank of `group` must call it. When it returns,
    the checkpoint is complete and on disk. A step is never overwritten. Where a job has gone back, the
    newer steps of before are still the newest ones: saving an older one warns of them, until somebody removes them.

    Args:
        what: the root, or a state dict.
        url: the root, after a state dict.
        step: of the checkpoint, from 0.
        model: its parameters and buffers, as its state dict names them. Buffers may differ between ranks: those of rank
            0 are saved. Parameters that several ranks hold whole are taken to be the same on all of these; each writes
            some of them.
        opt: its groups, hyper-parameters, freezing and states.
        scheduler: anything with a state_dict of plain values, the same on all ranks, such as an LRScheduler.
        scaler: the same, such as a GradScaler.
        loader: the same for the position in the data, which may differ between ranks.
        extra: JSON, taken from rank 0.
        reuse: files in which nothing has changed since the newest checkpoint before, such as those of frozen groups,
            are not written again; the manifest names the earlier ones, so the step folders then belong together.
        group: the ranks that save together (default: the default group, or this process alone).

    Raises:
        CheckpointError: on every rank where anything fails on one; then the checkpoints before are as they were and
            this one does not exist.
        StorageError: the storage is out of reach.
    """
    peers = Peers(group)
    if isinstance(what, Mapping):
        if url is None or any(each is not None for each in (model, opt, scheduler, scaler, loader)):
            raise TypeError("a state dict is saved as save(state_dict, url), without model, opt and the others")
        work = Save(peers, url, step, Parts(state_dict=what, extra=extra))
    else:
        if url is not None:
            raise TypeError("save(url, step=..., model=..., opt=...) takes one URL")
        if step is None:
            raise CheckpointError(f"step must be a whole number from 0 to {LARGEST - 1}, got None")
        work = Save(peers, what, step, Parts(model, opt, scheduler, scaler, loader, extra))
    work.prepare()
    return work.finish(work.items(), reuse)


@dataclass(frozen=True)
class Parts:
    """What is saved, as in `save`."""

    model: nn.Module | None = None
    opt: torch.optim.Optimizer | None = None
    scheduler: Any = None
    scaler: Any = None
    loader: Any = None
    extra: Json = None
    state_dict: Mapping[str, Any] | None = None


class Save:
    """One save on one rank: `prepare`, then `finish` with the `items` or copies of them."""

    storage: Storage
    folder = ""

    def __init__(self, peers: Peers, url: Url, step: int | None, parts: Parts) -> None:
        self.peers = peers
        self.url, self.parts = url, parts
        self.step = -1 if step is None else step
        self._choose = step is None
        self.snapshot = Snapshot()
        self.values: dict[str, Json] = {"scheduler": None, "scaler": None}
        self.extra: Json = None
        self.loader: tuple[Json, ...] = ()
        self.rng: list[list[str]] = []
        self.mine: list[tuple[str, Any]] = []
        self.block = 0
        self.save_id = ""
        self.base: Manifest | None = None
        self.writer: Writer | None = None
        self.written: list[FileRecord] = []
        self.failed: Exception | None = None
        self.replaced: bytes | None = None
        self.indexed = False

    def prepare(self) -> None:
        """Look at everything, compare the ranks and share out the work. Writes nothing. Collective."""
        if self._choose:
            self.step = self.peers.on_first("choosing a step", self._next_step)
        self._plan(self.peers.agree("gathering what to save", self._collect))

    def _next_step(self) -> int:
        return max(catalog.step_numbers(open_storage(self.url)), default=-1) + 1

    def _collect(self) -> dict[str, Json]:
        if not isinstance(self.step, numbers.Integral) or isinstance(self.step, bool) or not 0 <= self.step < LARGEST:
            raise CheckpointError(f"step must be a whole number from 0 to {LARGEST - 1}, got {self.step!r}")
        self.step = int(self.step)
        parts = self.parts
        if all(part is None for part in vars(parts).values()):
            raise CheckpointError("there is nothing to save: pass model=, opt= or others")
        holders = {name: getattr(parts, name) for name in ("scheduler", "scaler", "loader")}
        check_objects(parts.model, parts.opt, "state_dict", **holders)
        check_json(parts.extra, "extra")
        self.extra = copy.deepcopy(parts.extra)
        opt = bare_optimizer(parts.opt)
        for what, holder in (("scheduler", parts.scheduler), ("scaler", parts.scaler)):
            if holder is not None:
                self.values[what] = encode(holder.state_dict(), what)
        if parts.model is not None:
            gather.take_model(self.snapshot, parts.model, opt)
        if opt is not None:
            gather.take_optimizer(self.snapshot, opt, parts.model)
        if parts.state_dict is not None:
            gather.take_state_dict(self.snapshot, parts.state_dict)
        generators = {} if parts.state_dict is not None else rng.capture()
        gather.take_rng(self.snapshot, self.peers.rank, generators)
        self.storage = open_storage(self.url)
        catalog.check_root(self.storage.url)
        self.folder = step_folder(self.step)
        if self.peers.rank == 0:
            found = catalog.refuse_complete(self.storage, self.step)
            self.replaced = found.data if MANIFEST in found.sizes else None
        return {
            "url": self.storage.url,
            "step": self.step,
            "save_id": secrets.token_hex(4),
            "bytes": self.snapshot.own_bytes,
            "rng": list(generators),
            "loader": [] if parts.loader is None else [encode(parts.loader.state_dict(), "loader")],
            "digests": {part: xxhash.xxh3_64_hexdigest(canonical(about)) for part, about in self._about().items()},
        }

    def _about(self) -> dict[str, Json]:
        """What the ranks compare."""
        return {**self.snapshot.about, **self.values}

    def _plan(self, records: list[dict[str, Json]]) -> None:
        """Compare the ranks' records and share out what several hold. Every rank comes to the same result or error."""
        for what in ("url", "step"):
            compare(what, [record[what] for record in records])
        self.save_id = records[0]["save_id"]
        self.rng = [record["rng"] for record in records]
        compare("having a loader", [len(record["loader"]) for record in records])
        positions = [position for record in records for position in record["loader"]]
        self.loader = tuple(positions[:1] if len({canonical(p) for p in positions}) == 1 else positions)
        digests = [record["digests"] for record in records]
        for part in ("model", "opt", "scheduler", "scaler"):
            if any(d[part] != digests[0][part] for d in digests):
                own = self._about()[part]
                compare(part, self.peers.agree("comparing the ranks", partial(_same, own)))
        states = [self.snapshot.about["state"]]
        if any(d["state"] != digests[0]["state"] for d in digests):
            states = self.peers.agree("comparing the ranks", lambda: self.snapshot.about["state"])
        self.states, holders = merge_states(states)
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
                shared.append(Whole(model_key(name), tuple(shape), DTYPES[dtype].itemsize, holders_of, cut=False))
        for name, state in self.states.items():
            for key, (kind, *about) in state.items():
                if kind == "shared":
                    stored = state_key(name, key)
                    shared.append(Whole(stored, tuple(about[1]), DTYPES[about[0]].itemsize, holders.get(stored)))
        return shared

    def items(self) -> list[Item]:
        """The boxes that this rank writes, with the live data."""
        shared = self.snapshot.shared
        items = [
            Item(key, dtype_name(shared[key].dtype, key), tuple(shared[key].shape), box, shared[key][box.slices])
            for key, box in self.mine
        ]
        frozen = self.snapshot.frozen
        return [replace(item, frozen=True) if item.key in frozen else item for item in (*self.snapshot.own, *items)]

    def finish(self, items: Sequence[Item], reuse: bool, peers: Peers | None = None) -> str:
        """Write `items` and commit; the URL of the step folder. Collective, with `peers` in place of its own.

        reuse: look for the checkpoint before, whose unchanged files may be used again.
        """
        peers = peers or self.peers
        try:
            if reuse:
                data = peers.on_first("looking at the checkpoint before", self._newest_before)
                self.base = from_bytes(data) if data else None
            answer = peers.to_first("writing the checkpoint", lambda: self._write(items), self._commit)
        except LostContact:
            raise
        except CheckpointError:
            self._discard()
            raise
        except BaseException:  # Ctrl-C: other ranks may still want the files
            if peers.size == 1:
                self._discard()
            raise
        return str(answer)

    def _newest_before(self) -> bytes | None:
        return catalog.newest_before(self.storage, self.step)

    def write_now(self, items: Sequence[Item]) -> None:
        """Write some of the items ahead of `finish`, which gets the others."""
        if self.writer is None:
            self.storage.make_folder(self.folder)
            origin = Origin("s", self.save_id, self.step, self.peers.rank, self.peers.size, 0)
            self.writer = Writer(self.storage, self.folder, origin, self.block)
        self.written += self.writer.write(items, self.base)

    def _write(self, items: Sequence[Item]) -> assemble.RankRecord:
        if self.failed is not None:
            raise self.failed
        self.write_now(items)
        self.storage.sync_folder(self.folder)
        keys, expected = self._keys()
        return assemble.rank_record(self.written, {key: number for number, key in enumerate(keys)}, expected)

    def _keys(self) -> tuple[list[str], dict[str, Any]]:
        """All keys of this checkpoint, sorted, and the shapes that every rank knows; the same on every rank."""
        model, opt = self.snapshot.about["model"], self.snapshot.about["opt"]
        shapes: dict[str, Any] = {}
        for name, (_, _, shape) in (model["tensors"] if model else {}).items():
            shapes[model_key(name)] = tuple(shape)
        for name, state in self.states.items():
            for key, (kind, *about) in state.items():
                if kind != "value":
                    shape = about[1] if kind == "shared" else opt["params"][name]
                    shapes[state_key(name, key)] = None if shape is None else tuple(shape)
        keys = [*shapes, *(rng_key(rank, name) for rank, names in enumerate(self.rng) for name in names)]
        return sorted(keys), shapes

    def _commit(self, records: list[assemble.RankRecord]) -> str:
        """On rank 0: check all records, then publish the manifest. The URL of the step folder."""
        manifest = self.manifest(records)
        data = to_bytes(manifest)
        catalog.check_readable(data)
        catalog.wait_for(self.storage, manifest)
        index = assemble.hugging_face_index(manifest)
        self.storage.sync_folder("")  # who made the step folder may have died before doing so
        try:
            if self.replaced is not None:
                catalog.make_way(self.storage, self.step, self.replaced)
            if index is not None:
                self.storage.remove(f"{self.folder}/{INDEX}")  # that of a save that died
                self.storage.publish(f"{self.folder}/{INDEX}", index)
                self.indexed = True
            self.storage.publish(f"{self.folder}/{MANIFEST}", data)
            catalog.warn_of_newer(self.storage, self.step)
        except FileExistsError:
            raise CheckpointError(
                f"step {self.step} was saved by somebody else meanwhile, at {self.storage.url}: do two jobs save there?"
            ) from None
        return f"{self.storage.url}/{self.folder}"

    def manifest(self, records: list[assemble.RankRecord]) -> Manifest:
        """The manifest of what all ranks wrote."""
        keys, expected = self._keys()
        files, tensors = assemble.assemble(records, keys, expected)
        opt = self.snapshot.about["opt"]
        for name, state in self.states.items():  # a tensor without elements has no piece on any rank
            for key, about in state.items():
                if about[0] == "pieces" and opt["params"][name] is not None:
                    assemble.with_empty(tensors, state_key(name, key), opt["dtypes"][name], tuple(opt["params"][name]))
        for name, (_, dtype, shape) in (self.snapshot.about["model"] or {"tensors": {}})["tensors"].items():
            assemble.with_empty(tensors, model_key(name), dtype, tuple(shape))
        return Manifest(
            step=self.step,
            save_id=self.save_id,
            created=datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
            world_size=self.peers.size,
            library={"fastopt": __version__, "torch": str(torch.__version__)},
            block=self.block,
            files=files,
            tensors=tensors,
            model=assemble.model_part(self.snapshot.about["model"]),
            opt=assemble.opt_part(opt, self.states, tensors),
            scheduler=self.values["scheduler"],
            scaler=self.values["scaler"],
            loader=self.loader,
            rng=tuple(tuple(names) for names in self.rng),
            extra=self.extra,
        )

    def _discard(self) -> None:
        """After a failed save: remove this rank's files, as far as possible, unless their manifest is there after all.

        Where the manifest is that of another job, the index that others read is made its again.
        """
        try:
            winner = None
            if MANIFEST in self.storage.sizes(self.folder):
                data = self.storage.read_all(f"{self.folder}/{MANIFEST}")
                with contextlib.suppress(CheckpointError):  # damaged, or edited
                    winner = from_bytes(data)
                if winner is not None and winner.save_id == self.save_id:
                    return
            for path in self.writer.created if self.writer else ():
                self.storage.remove(path)
            if self.indexed:
                self.storage.remove(f"{self.folder}/{INDEX}")
                index = None if winner is None else assemble.hugging_face_index(winner)
                if index is not None:
                    self.storage.publish(f"{self.folder}/{INDEX}", index)
            self.storage.remove_folder(self.folder)
        except Exception:  # the error that led here is the one to show
            return


def _same(value: Json) -> Json:
    return value
