"""Loading on any number of ranks: find, check, read and verify everything, then change the live objects.

See [Note: all or nothing] and, in targets.py, [Note: copies or in place].
"""

from __future__ import annotations

import os
import platform
from collections import Counter
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import nn

from ...bare import bare_optimizer
from ...pieces import Box
from ..arguments import check_objects, check_whole_number
from ..contents import rng
from ..errors import CheckpointError
from ..format.records import Manifest, rng_key, step_folder
from ..format.values import Json
from ..io.processors import processors
from ..io.storage import LocalStorage, Storage
from ..ranks.peers import Peers
from ..verifying import note_sound
from .coverage import Coverage
from .finding import Search, damage_of
from .optimizer_target import OptTarget
from .reading import Reader, Wanted
from .targets import ModelTarget, ValuesTarget

# [Note: all or nothing]
# Nothing live is changed until every rank has read and verified all that it needs. Then the optimizer, the scheduler
# and their like, which run code of others that may refuse, are loaded; if they do so on any rank, every rank puts back
# what was there. The model and the random generators come last: names, shapes and dtypes are known to fit by then.
#
# With check="during" only what is new memory is read first. Live tensors are overwritten last and checked while that
# happens, when nothing else can go wrong any more. If a block is bad on any rank, every rank goes on to the checkpoint
# before, which overwrites all of it again, or raises. The same happens where a file goes bad between being verified
# and being read.

_SPOILT = "what is in memory is partly overwritten and must not be trained on, load it again"


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
    check: Literal["before", "during"] = "before",
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
        check: when the bytes are compared with their checksums, relative to live tensors being overwritten by them.
            `"before"` keeps everything live as it is unless all ranks can load all of it; files are read twice for
            that, or copies are made (see `staging`). `"during"` reads once, straight into the live tensors, and costs
            what reading costs; where a block is bad, what is in memory is of no use until another load succeeds.
            Names, shapes, sizes of files, and whether optimizer and scheduler take what they are given, are known
            before either way; and what is new memory, such as the states of an optimizer that has none yet, is read
            once either way.
        staging: most bytes of copies of live tensors that this rank may hold until all ranks have read theirs (default:
            none on a local file system, else a quarter of the free memory of their device, that of the CPU shared by
            the ranks of this machine). A copy is on the device of what it is a copy of. Beyond it nothing is copied;
            the files are read twice instead, first to verify them.
        group: the ranks that load together (default: the default group, or this process alone).

    Raises:
        CheckpointError: on every rank where anything fails on one; all objects are as they were. Only with
            `check="during"`, or where a file that has just been verified can no longer be read, they may be partly
            overwritten; the error then says so on every rank.
        StorageError: the storage is out of reach.
        TypeError, ValueError: an argument that is none of those it may be; or `check="during"` without `strict`, for
            what does not fit could not be told from what has been overwritten.
    """
    if on_corrupt not in ("previous", "raise"):
        raise ValueError(f"on_corrupt is 'previous' or 'raise', got {on_corrupt!r}")
    if check not in ("before", "during"):
        raise ValueError(f"check is 'before' or 'during', got {check!r}")
    if check == "during" and not strict:
        raise ValueError("check='during' overwrites live tensors, so it is for strict loads: use check='before'")
    check_whole_number("step", step, 0, "a whole number from 0")
    peers = Peers(group)
    live = _Live(model, bare_optimizer(opt), scheduler, scaler, loader, rng, strict, cast)
    search = Search(peers, url, step, on_corrupt)
    spoilt = False
    while True:
        try:
            search.next()
            work = _Load(peers, live)
            told = peers.agree("comparing the checkpoint with what it is loaded into", partial(work.prepare, search))
            damage = next((text for text, _ in told if text is not None), None)
            read_something = damage is None
            if damage is None:
                ranks_here = [node for _, node in told].count(platform.node())
                read = partial(work.read, check, staging, ranks_here)
                damage = next(filter(None, peers.agree("reading the checkpoint", read)), None)
            if damage is None:
                work.commit()
                spoilt = True
                damage = work.finish(search.data)
            if damage is None:
                return work.result(search.warn())
            if spoilt and not strict:
                raise CheckpointError(damage)
            search.pass_over(damage, note=read_something)
        except CheckpointError as error:
            if spoilt:
                raise CheckpointError(f"{_SPOILT}: {error}") from error
            raise
        except BaseException as error:  # Ctrl-C
            if spoilt:
                error.add_note(_SPOILT)
            raise


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
    """One load of one checkpoint on one rank: `prepare`, `read`, `commit`, `finish`.

    `fresh` reads what needs no live memory, `again` what overwrites it.
    """

    fresh: Reader
    again: Reader

    storage: Storage
    manifest: Manifest
    coverage: Coverage

    def __init__(self, peers: Peers, live: _Live) -> None:
        self.peers, self.live = peers, live
        self.opt: OptTarget | None = None
        self.model: ModelTarget | None = None
        self.values: list[ValuesTarget] = []
        self.generators: dict[str, Wanted] = {}
        self.done: list[OptTarget | ValuesTarget] = []
        self.verify_first = True

    @property
    def place(self) -> str:
        """The URL of the step folder."""
        return f"{self.storage.url}/{step_folder(self.manifest.step)}"

    @property
    def _tensors(self) -> list[OptTarget | ModelTarget]:
        return [target for target in (self.opt, self.model) if target is not None]

    def prepare(self, search: Search) -> tuple[str | None, str]:
        """Compare the manifest with the live objects; CheckpointError that lists all that does not fit.

        Returns what is wrong with the checkpoint itself, and the name of this machine.
        """
        self.storage = search.storage
        live = self.live
        holders = {name: getattr(live, name) for name in ("scheduler", "scaler", "loader")}
        check_objects(live.model, live.opt, "load_state_dict", **holders)
        damage = damage_of(partial(self._parse, search))
        if damage is None:
            self._match()
        return damage, platform.node()

    def _parse(self, search: Search) -> None:
        self.manifest = search.manifest()
        self.coverage = Coverage(self.manifest)

    def _match(self) -> None:
        live, manifest, strict = self.live, self.manifest, self.live.strict
        homes: list[int | None] = []
        if live.opt is not None:
            self.opt = OptTarget(manifest, live.opt, live.model, strict, live.cast)
            homes = self.opt.match.homes
        if live.scheduler is not None:
            groups = self.opt.stored_groups if self.opt else 0
            values = _stored(manifest.scheduler)
            self.values.append(ValuesTarget("scheduler", values, live.scheduler, strict, homes, groups))
        if live.scaler is not None:
            self.values.append(ValuesTarget("scaler", _stored(manifest.scaler), live.scaler, strict))
        if live.loader is not None:
            self.values.append(ValuesTarget("loader", self._position(), live.loader, strict))
        if live.model is not None:
            self.model = ModelTarget(manifest, live.model, strict, live.cast)
        if strict and self.problems:
            advice = "(strict=False loads what fits and reports the rest, cast=True takes other floating-point dtypes)"
            lines = [f"{self.place} does not fit what it is loaded into:", *self.problems, advice]
            raise CheckpointError("\n  ".join(lines))
        if live.rng and self.peers.rank < len(manifest.rng):
            for name in manifest.rng[self.peers.rank]:
                key = rng_key(self.peers.rank, name)
                self.generators[name] = Wanted(key, [Box.whole(manifest.tensors[key].shape)])

    @property
    def problems(self) -> list[str]:
        """What does not fit."""
        targets: list[Any] = [self.opt, *self.values, self.model]
        return [line for target in targets if target is not None for line in target.problems]

    def _position(self) -> tuple[Json, ...]:
        """This rank's position in the data, or none."""
        stored = self.manifest.loader
        if len(stored) > 1 and len(stored) != self.peers.size:
            raise CheckpointError(
                f"{self.place}: every one of the {len(stored)} ranks that saved had its own position in the data, "
                f"which cannot be given to {self.peers.size} ranks: load with loader=None and set the position"
            )
        return stored[self.peers.rank :][:1] if len(stored) > 1 else stored

    def _choose(self, check: str, staging: int | None, ranks_here: int) -> None:
        """Decide whether live tensors are copied until all is read, or overwritten where they are."""
        copies = sum((target.copied_bytes for target in self._tensors), Counter[torch.device]())
        in_place = check == "during" or not self._room(copies, staging, ranks_here)
        for target in self._tensors:
            target.plan(in_place)
        fresh = [want for target in self._tensors for want in target.fresh]
        again = [want for target in self._tensors for want in target.again]
        workers = processors(ranks_here)
        self.fresh = Reader(self.storage, self.manifest, [*fresh, *self.generators.values()], workers)
        self.again = Reader(self.storage, self.manifest, again, workers)
        self.verify_first = check == "before"

    def _room(self, copies: Counter[torch.device], staging: int | None, ranks_here: int) -> bool:
        """Whether there may be copies of so many bytes on each device."""
        if staging is None and not isinstance(self.storage, LocalStorage):
            return all(size <= free_memory(device, ranks_here) // 4 for device, size in copies.items())
        return copies.total() <= (staging or 0)

    def read(self, check: str, staging: int | None, ranks_here: int) -> str | None:
        """Read all that needs no live memory, verify the rest. The text of an error that is the checkpoint's fault.

        ranks_here: how many ranks share this machine's memory and processors.
        """
        self._choose(check, staging, ranks_here)

        def both() -> None:
            self.fresh.read(self.coverage)
            if self.verify_first:
                self.again.verify(self.coverage)

        damage = damage_of(both)
        if damage is None:
            rng.check(self._generator_states())
        return damage

    def _generator_states(self) -> dict[str, Any]:
        return {name: want.buffers[0] for name, want in self.generators.items()}

    def commit(self) -> None:
        """Give the optimizer, the scheduler and their like what they are to hold, on all ranks or on none."""
        try:
            self.peers.agree("loading the optimizer", self._commit)
        except BaseException as error:  # Ctrl-C too
            self._roll_back(error)
            raise

    def _commit(self) -> None:
        """Load what may still refuse: optimizer, scheduler and their like."""
        for target in (self.opt, *self.values):
            if target is not None:
                self.done.append(target)
                target.commit()

    def _roll_back(self, error: BaseException) -> None:
        """Put back what `_commit` replaced. What refuses that too is noted in `error`."""
        for target in reversed(self.done):
            try:
                target.roll_back()
            except Exception as again:
                error.add_note(f"rank {self.peers.rank}: the {target.what} refused its former state too: {again!r}")

    def finish(self, data: bytes) -> str | None:
        """Overwrite what is overwritten in place, load the model and set the generators.

        Returns the text of an error that is the checkpoint's fault. Otherwise, where the ranks together have read all
        of it, the note of `verify` is left beside the manifest `data`.
        """

        def note(told: list[tuple[str | None, bytes]]) -> str | None:
            damage = next((text for text, _ in told if text is not None), None)
            if damage is None and self.coverage.whole([bits for _, bits in told]):
                note_sound(self.storage, self.manifest, data)
            return damage

        damage: str | None = self.peers.to_first("loading the model", self._finish, note)
        return damage

    def _finish(self) -> tuple[str | None, bytes]:
        if self.opt is not None:
            self.opt.aim()
        damage = damage_of(partial(self.again.read, self.coverage))
        if damage is None:
            if self.model is not None:
                self.model.finish()
            if self.live.rng and self.manifest.rng:
                known = self.peers.rank < len(self.manifest.rng)
                rng.restore(self._generator_states() if known else rng.fresh(self.manifest.save_id, self.peers.rank))
        return damage, self.coverage.bits

    def result(self, skipped: tuple[str, ...]) -> Checkpoint:
        """What was loaded."""
        m = self.manifest
        return Checkpoint(m.step, self.place, m.created, m.world_size, m.extra, tuple(self.problems), skipped)


def _stored(value: Json) -> tuple[Json, ...]:
    return () if value is None else (value,)


def free_memory(device: torch.device, ranks_here: int) -> int:
    """Bytes that are free on `device`, of the CPU's for each of `ranks_here` processes; 0 where nobody says."""
    if device.type == "cuda":
        cached = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return torch.cuda.mem_get_info(device)[0] + cached
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) << 10 for line in lines if line.startswith("MemAvailable:")) // ranks_here
    except (OSError, StopIteration, ValueError):
        return 0
