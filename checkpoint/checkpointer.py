"""A job's checkpoints in one place: saved in the background, kept or removed by rule, and found again.

See [Note: saving in the background].
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from . import catalog
from .arguments import check_whole_number
from .catalog import Entry
from .errors import CheckpointError
from .format.datafile import Item
from .format.values import Json
from .io.storage import local_path, open_storage
from .loading.loading import Checkpoint, load
from .ranks.peers import Peers
from .retention import carry_out, plan_prune
from .saving.saving import Parts, Save
from .saving.staging import Staging

# [Note: saving in the background]
# `save` looks at everything, agrees with the other ranks on who writes what, and copies this rank's share to a staging
# buffer: only for that is the training loop held. A thread then writes, with a process group of its own, so that its
# collectives never meet those of the training. It spends its time in system calls, copies and checksums, which all
# release Python's lock. One save is in flight at a time; the buffer is free again when it is done.
# The outcome of a save is the same on all ranks, and is raised by the next call on each.
# When the interpreter ends it waits for the thread, which is no daemon. By then no more work can be given to thread
# pools, which the writing and most filesystems need; so it is waited for just before that, where Python has the hook
# that its own pools use.
# An event says that a thread is done, since Ctrl-C in the middle of `Thread.join` makes Python before 3.13 take a
# thread that is running for one that has ended: the next save would then overwrite the buffer that it writes from.

_log = logging.getLogger("fastopt.checkpoint")


_writing: set[threading.Event] = set()


def _wait_for_all() -> None:
    for written in list(_writing):
        written.wait()


_before_pools_close = getattr(threading, "_register_atexit", None)
if _before_pools_close is not None:
    _before_pools_close(_wait_for_all)
if hasattr(os, "register_at_fork"):  # a worker of a data loader has no such threads, and must not wait for them
    os.register_at_fork(after_in_child=_writing.clear)


class Checkpointer:
    """Saves and loads the checkpoints of one job under the root `url` (a path or any fsspec URL).

        with Checkpointer("s3://bucket/run1", keep_last=3, keep_every=10_000) as checkpoints:
            checkpoints.load(model=model, opt=opt)
            for step in ...:
                ...
                if step % 1000 == 0:
                    checkpoints.save(step, model=model, opt=opt)

    Making one is collective where `asynchronous`. Call `close` (or leave the `with` block) before the process group is
    destroyed.

    Args:
        url: the root of the checkpoints.
        keep_last: complete checkpoints to keep (None keeps all). What another checkpoint takes files from stays too.
        keep_every: those that are the first from a multiple of so many steps on stay for good.
        asynchronous: `save` returns when this rank's share has been copied; False waits until it is on disk.
        staging: most bytes of such copies on this rank (None: as many as needed). What does not fit is written before
            `save` returns.
        reuse: see `fastopt.checkpoint.save`.
        group: the ranks that save together, all of which must make the same calls (default: the default group).
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        *,
        keep_last: int | None = None,
        keep_every: int | None = None,
        asynchronous: bool = True,
        staging: int | None = None,
        reuse: bool = True,
        group: dist.ProcessGroup | None = None,
    ) -> None:
        check_whole_number("keep_last", keep_last, 1, "a number of checkpoints, at least 1")
        check_whole_number("keep_every", keep_every, 1, "a positive number beside a keep_last")
        check_whole_number("staging", staging, 0, "a number of bytes")
        if keep_every is not None and keep_last is None:
            raise ValueError(f"keep_every is a positive number beside a keep_last, got {keep_every}")
        self.url = url
        self.keep_last, self.keep_every = keep_last, keep_every
        self.asynchronous, self.reuse = asynchronous, reuse
        self.group = group
        self._peers = Peers(group)
        self._background = self._peers.apart() if asynchronous else self._peers
        self._staging = Staging(staging)
        self._written: threading.Event | None = None
        self._error: CheckpointError | None = None
        self._closed = False
        self._lock = threading.RLock()
        self._inside = False
        path = local_path(url)
        if path is not None:  # the same place also after os.chdir
            self.url = path

    # ---- saving

    def save(
        self,
        step: int,
        *,
        model: nn.Module | None = None,
        opt: torch.optim.Optimizer | None = None,
        scheduler: Any = None,
        scaler: Any = None,
        loader: Any = None,
        extra: Json = None,
    ) -> None:
        """Save a checkpoint of `step`; the arguments are those of `fastopt.checkpoint.save`. Collective.

        Waits for a save that is still being written, and for one that another thread of this process has called.
        Asynchronously, later changes of the tensors do not get into the checkpoint, which exists when it has been
        written: see `wait`.

        Raises CheckpointError on every rank: of this save, or of the one before, which failed after its `save` had
        returned; this one has then not begun.
        """
        if self._closed:
            raise CheckpointError("this Checkpointer is closed")
        parts = Parts(model, opt, scheduler, scaler, loader, extra)
        with self._lock:
            if self._inside:  # the buffer and the other ranks are in the middle of something
                raise CheckpointError(
                    f"save of step {step} was called in the middle of another save, as by the handler of a signal: let "
                    f"the handler set a flag, and save where the training loop sees it"
                )
            try:
                self._inside = True
                self.wait()
                self._save(Save(self._peers, self.url, step, parts))
            finally:
                self._inside = False

    def _save(self, work: Save) -> None:
        work.prepare()
        if self.asynchronous:
            self._start(work, self._stage(work))
            return
        self._finish(work, work.items())
        self.wait()

    def _start(self, work: Save, staged: list[Item]) -> None:
        """Let a thread write; without one, if the system gives no more, it is written here."""
        written = threading.Event()

        def write() -> None:
            try:
                self._finish(work, staged)
            finally:
                written.set()
                _writing.discard(written)

        thread = threading.Thread(target=write, name=f"checkpoint-{work.step}")
        try:
            self._written = written
            _writing.add(written)
            thread.start()
        except RuntimeError:
            write()
        except BaseException:  # Ctrl-C in between: it may be starting all the same
            if not written.wait(0.2) and not thread.is_alive():
                written.set()
                _writing.discard(written)
            raise

    def _stage(self, work: Save) -> list[Item]:
        """Copy this rank's share. A failure goes with the work, to be told to all ranks when they meet next."""
        try:
            fits, others = self._staging.fitting(work.items())
            if others:
                work.write_now(others)
            return self._staging.copy(fits)
        except Exception as error:
            work.failed = error
            return []

    def _finish(self, work: Save, items: Sequence[Item]) -> None:
        """Write, commit and remove what is no longer needed. Keeps the error for the next call."""
        failed = f"saving step {work.step} to {self.url} failed"
        try:
            work.finish(items, self.reuse, self._background)
            failed = f"step {work.step} is saved at {self.url}, but removing older ones failed"
            if self.keep_last is not None:
                self._background.on_first("removing old checkpoints", lambda: self._prune(work))
        except Exception as error:
            kind = type(error) if isinstance(error, CheckpointError) else CheckpointError
            self._error = kind(f"{failed}: {error}")
            self._error.__cause__ = error
            if self.asynchronous:
                _log.error("%s", self._error)

    def _prune(self, work: Save) -> None:
        assert self.keep_last is not None
        carry_out(work.storage, plan_prune(work.storage, self.keep_last, self.keep_every, saved=work.step))

    def wait(self) -> None:
        """Wait until the save in flight is on disk. Raises CheckpointError where it failed, once. Not collective."""
        if self._written is not None:
            self._written.wait()
            self._written = None
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    @property
    def saving(self) -> bool:
        """Whether a save is still being written."""
        return self._written is not None and not self._written.is_set()

    # ---- finding and loading

    def latest(self) -> Entry | None:
        """The newest complete checkpoint, or None. Waits for a save in flight. Not collective."""
        self.wait()
        return catalog.latest(self.url)

    def load(self, **into: Any) -> Checkpoint | None:
        """Load the newest checkpoint, or the one of `step=`, into the objects given; None where there is none at all.

        The arguments are those of `fastopt.checkpoint.load`. Waits for a save in flight. Collective.

        Raises CheckpointError where there are checkpoints but none that can be loaded: a job must not begin anew
        because of damage.
        """
        self.wait()
        if into.get("step") is None and self._peers.on_first("looking for checkpoints", self._newest_completed) is None:
            return None
        return load(self.url, group=self.group, **into)

    def _newest_completed(self) -> int | None:
        return catalog.newest_completed(open_storage(self.url))

    # ---- the end

    def close(self) -> None:
        """Wait for the save in flight, give back the staging memory and the process group. CheckpointError where it
        failed."""
        self._closed = True
        try:
            self.wait()
        finally:
            self._staging.free()
            if not self.saving:  # after Ctrl-C
                self._background = self._peers

    def __enter__(self) -> Checkpointer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Close. An exception that is on its way already is not replaced; that of the save has been logged."""
        try:
            self.close()
        except CheckpointError:
            if error is None:
                raise
