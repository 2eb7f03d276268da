"""Loading on any number of ranks: find, check, read and verify everything, then change the live objects.

See [Note: all or nothing] and, in into.py, [Note: copies or in place].
"""

from __future__ import annotations

import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from ..pieces import Box
from . import catalog, rng
from .coverage import Coverage
from .errors import CheckpointError, StorageError
from .into import ModelTarget, ValuesTarget
from .into_opt import OptTarget
from .manifest import from_bytes
from .peers import Peers
from .reading import Stamp, Wanted, read, verify
from .records import MANIFEST, Manifest, rng_key, step_folder
from .storage import LocalStorage, Storage, open_storage
from .values import Json
from .verifying import note_sound

# [Note: all or nothing]
# Nothing live is changed until every rank has read and verified all that it needs. Then the optimizer, the scheduler
# and their like, which run code of others that may refuse, are loaded; if they do so on any rank, every rank puts back
# what was there. The model and the random generators come last: names, shapes and dtypes are known to fit by then.

_log = logging.getLogger("fastopt.checkpoint")


@dataclass(frozen=True)
class Checkpoint:
    """What was loaded.

    Attributes:
        step: of the checkpoint.
        url: of its folder.
        created: when it was saved, UTC, `2026-01-31T12:00:00Z`.
        world_size: by how many ranks.
        extra: the user's JSON.
        report: with `strict=False`, what did not fit, a sentence each.
        skipped: newer checkpoints that could not be loaded, and why.
    """

    step: int
    url: str
    created: str
    world_size: int
    extra: Json
    report: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()


def load(
    url: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    opt: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    scaler: Any = None,
    loader: Any = None,
    step: int | None = None,
    strict: bool = True,
    cast: bool = False,
    rng: bool = True,
    on_corrupt: Literal["previous", "raise"] = "previous",
    staging: int | None = None,
    group: dist.ProcessGroup | None = None,
) -> Checkpoint:
    """Load the checkpoint of `step`, or the newest complete one, under the root `url` into the objects given.

    The number of ranks may differ from that at saving, and so may the order and the split of parameter groups:
    parameters are known by name, groups by their members. Every rank reads only what it holds.

    A checkpoint of which all ranks together have read every byte is noted as verified, as by `verify`.

    Collective: every rank of `group` must call it.

    Args:
        url: the root, a path or any fsspec URL.
        model: takes parameters and buffers.
        opt: takes groups, hyper-parameters, freezing and states.
        scheduler: anything with `load_state_dict`, such as an LRScheduler; likewise `scaler` and `loader`.
        scaler: a GradScaler.
        loader: the position in the data.
        step: which checkpoint; it is never replaced by another one.
        strict: names and shapes must fit, else the error lists what is missing, unexpected or different. With False,
            for transfer to another model or other groups, what does not fit stays as it is and is listed in `report`.
        cast: floating-point tensors of the model, states and masters may be stored in another floating-point dtype than
            the live ones have, and are rounded to that. States that are not there yet get the dtype they were saved in.
        rng: restore the random generators. Rank r takes those of rank r of the job that saved; a rank that this job did
            not have is seeded from the checkpoint and its rank, the same way each time.
        on_corrupt: what to do where the newest checkpoint turns out to be damaged: take the one before, with a warning
            on every rank, or raise.
        staging: most bytes of copies of live tensors that this rank may hold until all ranks have read theirs (default:
            none on a local file system, else a quarter of the free memory, shared by the ranks of this machine). Beyond
            it nothing is copied; the files are read twice instead, first to verify them.
        group: the ranks that load together (default: the default group, or this process alone).

    Raises:
        CheckpointError: on every rank where anything fails on one; all objects are as they were. Only where a file that
            has just been verified can no longer be read the second time, the error says that they are partly loaded.
        StorageError: the storage is out of reach.
    """
    if on_corrupt not in ("previous", "raise"):
        raise ValueError(f"on_corrupt is 'previous' or 'raise', got {on_corrupt!r}")
    peers = Peers(group)
    live = _Live(model, opt, scheduler, scaler, loader, rng, strict, cast)
    storage = _open(peers, url, step)
    skipped: list[str] = []
    below: int | None = None
    parsed: dict[int, Manifest] = {}
    while True:
        number, data, passed = peers.on_first(
            "looking for the checkpoint", partial(_find, storage, step, below, skipped, on_corrupt, parsed)
        )
        skipped += passed
        work = _Load(peers, storage, parsed.get(number) or from_bytes(data), live)
        peers.agree("comparing the checkpoint with what it is loaded into", work.prepare)
        work.choose(staging)
        damage = next(filter(None, peers.agree("reading the checkpoint", work.read)), None)
        if damage is None:
            break
        if step is not None or on_corrupt == "raise":
            raise CheckpointError(damage)
        skipped.append(damage)
        below = number
        if peers.rank == 0:
            catalog.note_damage(storage, number, data, damage)
    for reason in skipped:
        _log.warning("rank %d: loading step %d instead of a newer one: %s", peers.rank, number, reason)
    work.load()
    work.note(data)
    return work.result(tuple(skipped))


def _open(peers: Peers, url: str | os.PathLike[str], step: int | None) -> Storage:
    opened: list[Storage] = []

    def open_it() -> tuple[str, int | None]:
        opened.append(open_storage(url))
        return opened[0].url, step

    places = peers.agree("opening the storage", open_it)
    for rank, place in enumerate(places):
        if place != places[0]:
            raise CheckpointError(f"ranks disagree on what to load: {places[0]} on rank 0, {place} on rank {rank}")
    return opened[0]


def _find(
    storage: Storage,
    step: int | None,
    below: int | None,
    skipped: Sequence[str],
    on_corrupt: str,
    parsed: dict[int, Manifest],
) -> tuple[int, bytes, list[str]]:
    """The step to load, its manifest, and why newer ones (under `below`) are passed over. On rank 0, which keeps the
    manifest in `parsed`."""
    if step is not None:
        parsed[step], data = catalog.inspect(storage, step)
        return step, data, []
    passed: list[str] = []
    for number in catalog.step_numbers(storage):
        if below is not None and number >= below:
            continue
        found = catalog.look(storage, number)
        found.refuse_newer()
        if found.complete:
            parsed[number] = found.raise_problem()
            return number, found.data, passed
        passed.append(str(found.problem))
        if on_corrupt == "raise" and MANIFEST in found.sizes:  # one without was never completed
            raise CheckpointError(passed[-1])
    raise CheckpointError("\n".join([f"there is no complete checkpoint at {storage.url}", *skipped, *passed][:6]))


@dataclass(frozen=True)
class _Live:
    """What is loaded into, and how."""

    model: nn.Module | None
    opt: torch.optim.Optimizer | None
    scheduler: Any
    scaler: Any
    loader: Any
    rng: bool
    strict: bool
    cast: bool


class _Load:
    """One load of one checkpoint on one rank."""

    def __init__(self, peers: Peers, storage: Storage, manifest: Manifest, live: _Live) -> None:
        self.peers, self.storage, self.manifest, self.live = peers, storage, manifest, live
        self.opt: OptTarget | None = None
        self.model: ModelTarget | None = None
        self.values: list[ValuesTarget] = []
        self.generators: dict[str, Wanted] = {}
        self.verified: dict[str, Stamp] = {}
        self.coverage = Coverage(manifest)
        self.done: list[OptTarget | ValuesTarget] = []

    @property
    def place(self) -> str:
        """The URL of the step folder."""
        return f"{self.storage.url}/{step_folder(self.manifest.step)}"

    @property
    def _tensors(self) -> list[OptTarget | ModelTarget]:
        return [target for target in (self.opt, self.model) if target is not None]

    def prepare(self) -> None:
        """Compare the manifest with the live objects; CheckpointError that lists all that does not fit."""
        live, manifest, strict = self.live, self.manifest, self.live.strict
        homes: list[int | None] = []
        if live.opt is not None:
            self.opt = OptTarget(manifest, live.opt, live.model, strict, live.cast)
            homes = self.opt.match.homes
        if live.scheduler is not None:
            groups = self.opt.stored_groups if self.opt else 0
            self.values.append(ValuesTarget("scheduler", manifest.scheduler, live.scheduler, strict, homes, groups))
        if live.scaler is not None:
            self.values.append(ValuesTarget("scaler", manifest.scaler, live.scaler, strict))
        if live.loader is not None:
            self.values.append(ValuesTarget("loader", self._position(), live.loader, strict))
        if live.model is not None:
            self.model = ModelTarget(manifest, live.model, strict, live.cast)
        if strict and self.problems:
            raise CheckpointError("\n  ".join([f"{self.place} does not fit what it is loaded into:", *self.problems]))
        if live.rng and self.peers.rank < len(manifest.rng):
            for name in manifest.rng[self.peers.rank]:
                key = rng_key(self.peers.rank, name)
                self.generators[name] = Wanted(key, [Box.whole(manifest.tensors[key].shape)])

    @property
    def problems(self) -> list[str]:
        """What does not fit."""
        targets: list[Any] = [self.opt, *self.values, self.model]
        return [line for target in targets if target is not None for line in target.problems]

    def _position(self) -> Json:
        """This rank's position in the data."""
        stored = self.manifest.loader
        if len(stored) > 1 and len(stored) != self.peers.size:
            raise CheckpointError(
                f"{self.place}: every one of the {len(stored)} ranks that saved had its own position in the data, "
                f"which cannot be given to {self.peers.size} ranks: load with loader=None and set the position"
            )
        return None if not stored else stored[self.peers.rank if len(stored) > 1 else 0]

    def choose(self, staging: int | None) -> None:
        """Decide whether live tensors are copied until all is read, or read in place after having been verified."""
        if staging is None:
            staging = 0 if isinstance(self.storage, LocalStorage) else _free_memory() // 4
        in_place = sum(target.copied_bytes for target in self._tensors) > staging
        for target in self._tensors:
            target.plan(in_place)

    def read(self) -> str | None:
        """Read and verify all that this rank needs. The text of an error that is the checkpoint's fault, or None."""
        fresh = [want for target in self._tensors for want in target.fresh]
        try:
            read(self.storage, self.manifest, [*fresh, *self.generators.values()], coverage=self.coverage)
            again = [want for target in self._tensors for want in target.again]
            self.verified = verify(self.storage, self.manifest, again, self.coverage)
        except StorageError:
            raise
        except (CheckpointError, FileNotFoundError) as error:
            return str(error)
        rng.check(self._generator_states())
        return None

    def _generator_states(self) -> dict[str, Any]:
        return {name: want.buffers[0] for name, want in self.generators.items()}

    def load(self) -> None:
        """Change the live objects, on all ranks or on none."""
        try:
            self.peers.agree("loading the optimizer", self._commit)
        except CheckpointError as error:
            self._roll_back(error)
            raise
        try:
            self.peers.agree("loading the model", self._finish)
        except CheckpointError as error:
            raise CheckpointError(f"model and optimizer are partly loaded, load them again: {error}") from error

    def _commit(self) -> None:
        """Load what may still refuse: optimizer, scheduler and their like."""
        for target in (self.opt, *self.values):
            if target is not None:
                self.done.append(target)
                target.commit()

    def _roll_back(self, error: CheckpointError) -> None:
        """Put back what `_commit` replaced. What refuses that too is noted in `error`."""
        for target in reversed(self.done):
            try:
                target.roll_back()
            except Exception as again:
                error.add_note(f"rank {self.peers.rank}: the {target.what} refused its former state too: {again!r}")

    def _finish(self) -> None:
        """Read what is read in place, load the model and set the generators."""
        if self.opt is not None:
            self.opt.aim()
        again = [want for target in self._tensors for want in target.again]
        read(self.storage, self.manifest, again, self.verified)
        if self.model is not None:
            self.model.finish()
        if self.live.rng and self.manifest.rng:
            known = self.peers.rank < len(self.manifest.rng)
            rng.restore(self._generator_states() if known else rng.fresh(self.manifest.save_id, self.peers.rank))

    def note(self, data: bytes) -> None:
        """Leave the note of `verify` beside the manifest `data` where the ranks, together, have read all of it."""

        def leave(bits: list[bytes]) -> None:
            if self.coverage.whole(bits):
                note_sound(self.storage, self.manifest, data)

        self.peers.to_first("noting what was read", lambda: self.coverage.bits, leave)

    def result(self, skipped: tuple[str, ...]) -> Checkpoint:
        """What was loaded."""
        m = self.manifest
        return Checkpoint(m.step, self.place, m.created, m.world_size, m.extra, tuple(self.problems), skipped)


def _free_memory() -> int:
    """Bytes that this rank may use, its share of the machine's free memory; 0 where nobody says."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        free = next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:"))
        return free // max(1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    except (OSError, StopIteration, ValueError):
        return 0
