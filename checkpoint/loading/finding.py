"""Which checkpoint a load takes: the newest that is sound, or the one asked for; found by rank 0 for all.

See [Note: one looks, all parse].
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from functools import cached_property

from .. import catalog
from ..errors import CheckpointError, NewerFormat, StorageError
from ..format.records import MANIFEST, Manifest, step_folder
from ..io.storage import Storage, open_storage
from ..ranks.peers import Peers

# [Note: one looks, all parse]
# Rank 0 lists the steps and reads one manifest, whose own digest it checks: the others get these bytes, so that a
# storage is not asked by thousands of ranks, and none of them sees another checkpoint than the rest. All parse it at
# the same time; rank 0 then compares the sizes of the files.

_log = logging.getLogger("fastopt.checkpoint")


class Search:
    """The checkpoints that a load may take, the best first. Every rank has one; `next` is collective.

    Attributes:
        number: the step that is being tried.
        data: its manifest.
        skipped: why newer ones were passed over.
    """

    number = -1
    data = b""

    def __init__(self, peers: Peers, url: str | os.PathLike[str], step: int | None, on_corrupt: str) -> None:
        self.peers = peers
        self.step, self.on_corrupt = step, on_corrupt
        self.skipped: list[str] = []
        self._url = url
        self._below: int | None = None
        self._first = ("", step)
        self._sizes: dict[str, int | None] = {}

    @cached_property
    def _opened(self) -> Storage:
        return open_storage(self._url)

    @property
    def storage(self) -> Storage:
        """Where it is. Raises CheckpointError unless rank 0 has been asked for the same."""
        mine = (self._opened.url, self.step)
        if mine != self._first:
            raise CheckpointError(f"ranks disagree on what to load: {self._first} on rank 0, {mine} here")
        return self._opened

    def next(self) -> None:
        """Find the next one to try. CheckpointError where there is none. Collective."""
        found = self.peers.on_first("looking for the checkpoint", self._find)
        self._first, self.number, self.data, self.skipped = found

    def _find(self) -> tuple[tuple[str, int | None], int, bytes, list[str]]:
        storage = self._opened
        first = (storage.url, self.step)
        passed = list(self.skipped)
        if self._below is not None and self._removed(self._below):
            self._below = None
            passed.pop()
        for number in catalog.step_numbers(storage) if self.step is None else [self.step]:
            if self._below is not None and number >= self._below:
                continue
            found = catalog.glance(storage, number, notes=self.step is None)
            if found.problem is None:
                self._sizes = found.sizes
                return first, number, found.data, passed
            if self.step is None and MANIFEST in found.sizes and self._removed(number):
                return self._find()
            passed.append(found.problem)
            if self.step is not None or (self.on_corrupt == "raise" and MANIFEST in found.sizes):
                raise CheckpointError(passed[-1])  # one without a manifest was never completed
        raise CheckpointError("\n".join([catalog.nothing_at(storage.url), *passed][:6]))

    def _removed(self, number: int) -> bool:
        """Whether somebody has removed the checkpoint since it was seen: then there may be a newer one by now."""
        return MANIFEST not in self._opened.sizes(step_folder(number))

    def manifest(self) -> Manifest:
        """What is to be tried, parsed and checked. Raises CheckpointError where it is not complete."""
        return catalog.parsed(self._opened, self.number, self.data, self._sizes if self.peers.rank == 0 else None)

    def pass_over(self, reason: str, note: bool) -> None:
        """Go on to the one before; CheckpointError where that is not wanted. `note`: leave a note of the damage."""
        if note and self.peers.rank == 0:
            catalog.note_damage(self.storage, self.number, self.data, reason)
        if self.step is not None or self.on_corrupt == "raise":
            raise CheckpointError(reason)
        self.skipped.append(reason)
        self._below = self.number

    def warn(self) -> tuple[str, ...]:
        """What was skipped; a warning of each."""
        for reason in self.skipped:
            text = "rank %d: loading step %d instead of a newer one: %s"
            _log.warning(text, self.peers.rank, self.number, reason)
        return tuple(self.skipped)


def damage_of(work: Callable[[], None]) -> str | None:
    """The text of an error of `work` that is the checkpoint's fault, None where there is none."""
    try:
        work()
    except (StorageError, NewerFormat):
        raise
    except (CheckpointError, FileNotFoundError) as error:
        return str(error)
    return None
