"""Who did not come: names the collective that a rank waits for, and the ranks that have not begun it.

Each rank counts the collectives that it begins. A thread of the process writes the count into the store of the process
group, where the others can read it, also of a rank that hangs. It warns of a wait that takes longer than `PATIENCE`; a
wait that fails, because the time-out of the process group has passed or a rank has died, raises `RanksMissing`.
"""

from __future__ import annotations

import atexit
import contextlib
import logging
import threading
import time
from typing import Any
from weakref import WeakSet

from torch._C._distributed_c10d import Store

PATIENCE = 60.0
"""Seconds after which a wait is worth a warning."""

INTERVAL = 1.0
"""Seconds between two looks of the thread."""

_log = logging.getLogger("fastopt.distributed")
_watches: WeakSet[Watch] = WeakSet()
_lock = threading.Lock()
_thread: threading.Thread | None = None
_over = threading.Event()


class RanksMissing(RuntimeError):
    """A collective has failed or timed out; the message names it and the ranks that have not begun it."""


class Waiting:
    """Around a wait, of which there are many: no generator, which takes several times as long."""

    def __init__(self, watch: Watch, label: str) -> None:
        self._watch, self._label = watch, label

    def __enter__(self) -> None:
        self._watch.now = (time.monotonic(), self._label)
        self._watch.warned = False

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._watch.now = None
        if isinstance(error, RuntimeError):
            self._watch.failed = True
            raise RanksMissing(f"{self._watch.describe(self._label)}\n{error}") from error


class Watch:
    """Counts the collectives of one rank.

    Args:
        rank: its number among `world_size`.
        world_size: how many ranks take part.
        store: where counts are shared; None shares nothing.

    Attributes:
        now: since when this rank waits, and for which collective.
        warned: whether a warning has told of it.
        failed: whether a wait has failed: no collective of these ranks is of use any more.
    """

    def __init__(self, rank: int, world_size: int, store: Store | None) -> None:
        self._rank, self._world_size, self._store = rank, world_size, store
        self._count, self._last = 0, "nothing"
        self._told = -1
        self.now: tuple[float, str] | None = None
        self.warned = False
        self.failed = False
        if store is not None:
            _watch(self)

    def began(self, label: str) -> None:
        """Note that a collective begins."""
        self._count += 1
        self._last = label

    def waiting(self, label: str) -> Waiting:
        """Around a wait for the collective `label` that may take for ever."""
        return Waiting(self, label)

    def describe(self, label: str) -> str:
        """Where this rank waits and which ranks are behind it."""
        behind = []
        for other in range(self._world_size):
            count, last = self._of(other)
            if other != self._rank and count < self._count:
                behind.append(f"rank {other} (last seen in {last}, {self._count - count} collectives behind)")
            elif other != self._rank and count == self._count and last != self._last:
                behind.append(f"rank {other} (which has begun {last} where this rank has begun {self._last})")
        who = ", ".join(behind[:8]) + (f" and {len(behind) - 8} more" if len(behind) > 8 else "")
        return f"rank {self._rank} waits in {label} for {who or 'ranks that have all begun it'}"

    def _of(self, rank: int) -> tuple[int, str]:
        """How many collectives another rank has begun, and the last of them, as far as it has told."""
        if self._store is None:
            return 0, "an unknown place"
        with contextlib.suppress(RuntimeError):
            if self._store.check([str(rank)]):
                count, _, last = self._store.get(str(rank)).decode().partition(":")
                return int(count), last
        return 0, "nothing"

    def look(self) -> None:
        """Tell the others where this rank is, and warn of a long wait. Called by the thread."""
        if self._store is not None and self._count != self._told:
            count = self._count
            with contextlib.suppress(RuntimeError):  # the store may be gone before its users
                self._store.set(str(self._rank), f"{count}:{self._last}")
                self._told = count
        waiting = self.now
        if waiting is not None and not self.warned and time.monotonic() - waiting[0] > PATIENCE:
            self.warned = True
            _log.warning("%s, since %.0f seconds", self.describe(waiting[1]), time.monotonic() - waiting[0])


def _watch(one: Watch) -> None:
    """Let the thread of this process look after `one`."""
    global _thread
    with _lock:
        _watches.add(one)
        if _thread is None or not _thread.is_alive():
            _thread = threading.Thread(target=_look_until_exit, name="fastopt watch", daemon=True)
            _thread.start()
            atexit.register(_end)


def _end() -> None:
    """Leave before the interpreter does: a thread inside of the store would bring the process down."""
    _over.set()
    if _thread is not None:
        _thread.join(2 * INTERVAL)


def _look_until_exit() -> None:
    while not _over.wait(INTERVAL):
        with _lock:
            watches = list(_watches)
        for one in watches:
            one.look()
        del watches
