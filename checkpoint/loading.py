"""Loading on any number of ranks: find, check, read and verify everything, then change the live objects.

See [Note: all or nothing].
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from ..pieces import Box
from . import catalog, rng
from .errors import CheckpointError
from .into import ModelTarget, OptTarget, SchedulerTarget
from .manifest import from_bytes
from .peers import Peers
from .reading import Wanted, read
from .records import Manifest, rng_key
from .storage import open_storage
from .values import Json

# [Note: all or nothing]
# Nothing live is changed until every rank has read and verified all that it needs. Then optimizer and scheduler, which
# run code of others that may refuse, are loaded; if they do so on any rank, every rank puts back what was there. The
# model and the random generators come last: names, shapes and dtypes are known to fit by then.


@dataclass(frozen=True)
class Checkpoint:
    """What was loaded: its step, the URL of its folder, when and by how many ranks it was saved, the user's extra."""

    step: int
    url: str
    created: str
    world_size: int
    extra: Json


def load(
    url: str | os.PathLike[str],
    *,
    model: nn.Module | None = None,
    opt: torch.optim.Optimizer | None = None,
    scheduler: Any = None,
    step: int | None = None,
    rng: bool = True,
    group: dist.ProcessGroup | None = None,
) -> Checkpoint:
    """Load the checkpoint of `step`, or the newest complete one, under the root `url` into the objects given.

    The number of ranks may differ from that at saving, and so may the order of parameters and groups: parameters are
    known by name, groups by their members. Every rank reads only what it holds. Names, shapes and dtypes must fit, else
    CheckpointError lists what is missing, unexpected or different.
    rng: restore the random generators. Rank r takes those of rank r of the job that saved; a rank that this job did not
    have is seeded from the checkpoint and its rank, the same way each time.

    Collective: every rank of `group` (default: the default group, or this process alone) must call it. On an error on
    any rank every rank raises CheckpointError, and model, optimizer, scheduler and generators are as they were.
    """
    peers = Peers(group)
    work = _Load(peers, model, opt, scheduler, rng)
    places = peers.agree("opening the storage", lambda: (work.open(url), step))
    for rank, place in enumerate(places):
        if place != places[0]:
            raise CheckpointError(f"ranks disagree on what to load: {places[0]} on rank 0, {place} on rank {rank}")
    folder, data = peers.on_first("looking for the checkpoint", lambda: catalog.find(work.storage, step))
    peers.agree("comparing the checkpoint with what it is loaded into", lambda: work.prepare(folder, data))
    peers.agree("reading the checkpoint", work.read)
    try:
        peers.agree("loading the optimizer", work.commit)
    except CheckpointError as error:
        work.roll_back(error)
        raise
    peers.agree("loading the model", work.finish)
    manifest = work.manifest
    return Checkpoint(
        manifest.step, f"{work.storage.url}/{folder}", manifest.created, manifest.world_size, manifest.extra
    )


class _Load:
    """One load on one rank."""

    manifest: Manifest
    folder: str

    def __init__(
        self,
        peers: Peers,
        model: nn.Module | None,
        opt: torch.optim.Optimizer | None,
        scheduler: Any,
        with_rng: bool,
    ) -> None:
        self.peers = peers
        self.model, self.opt, self.scheduler, self.with_rng = model, opt, scheduler, with_rng
        self.into: list[ModelTarget | OptTarget | SchedulerTarget] = []
        self.generators: dict[str, Wanted] = {}
        self.done: list[OptTarget | SchedulerTarget] = []

    def open(self, url: str | os.PathLike[str]) -> str:
        """Open the storage; its URL."""
        self.storage = open_storage(url)
        return self.storage.url

    def prepare(self, folder: str, data: bytes) -> None:
        """Compare the manifest with the live objects; CheckpointError that lists all that does not fit."""
        self.folder, self.manifest = folder, from_bytes(data)
        manifest = self.manifest
        order: list[int] = []
        if self.opt is not None:
            target = OptTarget(manifest, self.opt, self.model)
            order = target.order
            self.into.append(target)
        if self.scheduler is not None:
            self.into.append(SchedulerTarget(manifest, self.scheduler, order))
        if self.model is not None:
            self.into.append(ModelTarget(manifest, self.model))
        problems = [line for target in self.into for line in target.problems]
        if problems:
            place = f"{self.storage.url}/{folder}"
            raise CheckpointError("\n  ".join([f"{place} does not fit what it is loaded into:", *problems]))
        if self.with_rng and self.peers.rank < len(manifest.rng):
            for name in manifest.rng[self.peers.rank]:
                key = rng_key(self.peers.rank, name)
                self.generators[name] = Wanted(key, [Box.whole(manifest.tensors[key].shape)])

    def read(self) -> None:
        """Read and verify all that this rank needs."""
        wanted = [want for target in self.into for want in target.wanted()]
        read(self.storage, self.manifest, [*wanted, *self.generators.values()])
        rng.check(self._generator_states())

    def _generator_states(self) -> dict[str, Any]:
        return {name: want.buffers[0] for name, want in self.generators.items()}

    def commit(self) -> None:
        """Load what may still refuse: optimizer and scheduler."""
        for target in self.into:
            if not isinstance(target, ModelTarget):
                self.done.append(target)
                target.commit()

    def roll_back(self, error: CheckpointError) -> None:
        """Put back what `commit` replaced. What refuses that too is noted in `error`."""
        for target in reversed(self.done):
            try:
                target.roll_back()
            except Exception as again:
                error.add_note(f"rank {self.peers.rank}: the {target.what} refused its former state too: {again!r}")

    def finish(self) -> None:
        """Load the model and set the generators."""
        for target in self.into:
            if isinstance(target, ModelTarget):
                target.commit()
        if self.with_rng and self.manifest.rng:
            known = self.peers.rank < len(self.manifest.rng)
            rng.restore(self._generator_states() if known else rng.fresh(self.manifest.save_id, self.peers.rank))
