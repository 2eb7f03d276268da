"""Runs functions on the ranks of a process group: real processes, Gloo over loopback.

    def sums(rank, world_size, start):
        x = torch.tensor(start + rank)
        dist.all_reduce(x)
        return x.item()

    def test_sums(ranks):
        assert ranks(3).run(sums, 10) == [33, 33, 33]

A rank that raises or dies takes the others with it after `GRACE` seconds, a hang ends at the time-out; both raise
`RanksFailed`, which shows the output of every rank and where those that hung were. `rank_process` is the other side.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import pickle
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from types import TracebackType
from typing import Any

import torch.distributed as dist

from . import rank_process
from .rank_process import Raised, Returned, Seat

GRACE = 2.0
"""Seconds that the other ranks get after the first failure; often they fail too, and say more about it."""

SHOWN = 40_000
"""Characters of each rank's output in a failure, counted from the end."""

# A fresh interpreter needs four seconds for torch, on each rank. A fork server has imported it once (in a process with
# one thread and no process group, so that forking is safe), and starts a rank in twenty milliseconds. What fastopt
# itself imports, some of it only at its first step, is a third of a second more.
_context = multiprocessing.get_context("forkserver")
_PRELOADED = "torch torch.distributed torch._dynamo fsspec safetensors.torch pytest hypothesis"
_context.set_forkserver_preload(
    [*_PRELOADED.split(), "fastopt.api", "fastopt.distributed", "fastopt.checkpoint", "llvmlite.binding", "llvmlite.ir"]
)


class RanksFailed(AssertionError):
    """A rank raised or died, or the ranks were not done in time. The message holds every rank's output."""


def run_ranks(
    fn: Callable[..., Any], world_size: int, *args: Any, timeout: float = 120, env: dict[str, str] | None = None
) -> list[Any]:
    """`fn(rank, world_size, *args)` on `world_size` fresh processes; the results in the order of the ranks.

    As `RankPool.run`, for tests that change the processes themselves: environment (`env`, set before `fn` is
    imported), process group, signals, crashes.
    """
    with RankPool(world_size, env=env) as pool:
        return pool.run(fn, *args, timeout=timeout)


@dataclass
class _Rank:
    """The pool's view of one of its processes, and of what it answered to the task at hand."""

    number: int
    process: ForkServerProcess
    tasks: Connection
    log: Path
    answer: Returned | Raised | None = None

    @property
    def died(self) -> bool:
        return self.answer is None and self.process.exitcode is not None

    @property
    def waiting(self) -> bool:
        return self.answer is None and not self.died

    @property
    def failed(self) -> bool:
        return self.died or isinstance(self.answer, Raised)

    def collect(self) -> None:
        """Takes the answer, where there is one."""
        with contextlib.suppress(EOFError, OSError):
            if self.tasks.poll():
                self.answer = pickle.loads(self.tasks.recv_bytes())
                return
        if not self.process.is_alive() and self.process.exitcode is None:
            self.process.join(1)

    def signal_group(self, number: int) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid or 0, number)

    def outcome(self) -> str:
        """How the task ended here, in a few words."""
        if isinstance(self.answer, Raised):
            return f"raised {self.answer.summary}"
        if self.died:
            code = self.process.exitcode or 0
            return f"died of {signal.Signals(-code).name}" if code < 0 else f"left with exit code {code}"
        return "returned" if self.answer else "was still running, and was killed"

    def output(self) -> str:
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        return text if len(text) <= SHOWN else f"[{len(text) - SHOWN} characters before]\n{text[-SHOWN:]}"


@dataclass
class RankPool:
    """`world_size` processes with a default process group, kept alive from one `run` to the next.

    They start at the first `run`, and afresh at the next one after a failure: nobody knows the state of a group whose
    rank has failed. `env` is set in each of them. Also a context manager that ends in `close`.
    """

    world_size: int
    env: dict[str, str] | None = None
    _ranks: list[_Rank] = field(default_factory=list, init=False)
    _folder: Path | None = field(default=None, init=False)
    _store: dist.TCPStore | None = field(default=None, init=False)

    def run(self, fn: Callable[..., Any], *args: Any, timeout: float = 60) -> list[Any]:
        """`fn(rank, world_size, *args)` on every rank; the results in the order of the ranks.

        `fn` is a function of a module, arguments and results are pickled (tensors by value). All random number
        generators start from the same seed on every rank. What a rank prints is printed here when all are done.
        Raises `RanksFailed` when a rank raises or dies, or after `timeout` seconds.
        """
        task = pickle.dumps((fn, args))
        name = f"{fn.__module__}.{fn.__qualname__}"
        try:
            if not self._ranks:
                self._start()
            return self._answers(name, task, timeout)
        except BaseException:  # a time-out of pytest and Ctrl-C, too, leave the ranks in the middle of something
            self._kill()
            raise

    def close(self) -> None:
        """Ends the processes; those that do not leave by themselves within five seconds are killed."""
        for rank in self._ranks:
            rank.tasks.close()
        deadline = time.monotonic() + 5
        for rank in self._ranks:
            rank.process.join(max(0.0, deadline - time.monotonic()))
        self._kill()

    def __enter__(self) -> RankPool:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _start(self) -> None:
        self._folder = Path(tempfile.mkdtemp(prefix="fastopt-ranks-"))
        # The store lives here, on a port that the system chooses: there is no free port to guess, and no rank that
        # the others need to outlive.
        self._store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        for number in range(self.world_size):
            log = self._folder / f"rank{number}.log"
            here, there = _context.Pipe()
            seat = Seat(number, self.world_size, self._store.port, log, self.env or {})
            process = _context.Process(target=rank_process.main, args=(seat, there), name=f"rank {number}", daemon=True)
            process.start()
            there.close()
            self._ranks.append(_Rank(number, process, here, log))

    def _answers(self, name: str, task: bytes, timeout: float) -> list[Any]:
        for rank in self._ranks:
            rank.answer = None
            if rank.log.exists():
                os.truncate(rank.log, 0)
            with contextlib.suppress(OSError):  # a rank that has died since its last task: `_gather` sees it
                rank.tasks.send_bytes(task)
        blamed = self._gather(timeout)
        if blamed is not None or any(rank.waiting for rank in self._ranks):
            raise RanksFailed(self._report(name, blamed, timeout))
        for rank in self._ranks:
            if text := rank.output():
                print(f"[rank {rank.number}] {text}", end="")
        return [rank.answer.value for rank in self._ranks if isinstance(rank.answer, Returned)]

    def _gather(self, timeout: float) -> _Rank | None:
        """Waits until all ranks have answered, or `GRACE` is over after a failure, or the time is.

        Returns the rank that is to blame: the first that failed, but a dead one rather than those that lost it.
        """
        blamed: _Rank | None = None
        deadline = time.monotonic() + timeout
        while waiting := [rank for rank in self._ranks if rank.waiting]:
            left = deadline - time.monotonic()
            if left <= 0:
                break
            wait([handle for rank in waiting for handle in (rank.tasks, rank.process.sentinel)], left)
            for rank in waiting:
                rank.collect()
                if rank.failed and (blamed is None or (rank.died and not blamed.died)):
                    blamed = rank
                    deadline = min(deadline, time.monotonic() + GRACE)
        return blamed

    def _report(self, name: str, blamed: _Rank | None, timeout: float) -> str:
        hung = [rank for rank in self._ranks if rank.waiting]
        for rank in hung:
            with contextlib.suppress(ProcessLookupError):
                os.kill(rank.process.pid or 0, rank_process.STACKS_SIGNAL)
        if hung:
            time.sleep(0.5)  # they write their stacks
        if blamed is not None:
            head = f"rank {blamed.number} {blamed.outcome()}"
        else:
            head = f"not done after {timeout:g} s: rank {', '.join(str(rank.number) for rank in hung)}"
        parts = [f"{name} on {self.world_size} ranks: {head}"]
        for rank in self._ranks:
            parts.append(f"---- rank {rank.number} {rank.outcome()}\n{rank.output().rstrip() or '(no output)'}")
        return "\n".join(parts)

    def _kill(self) -> None:
        for rank in self._ranks:
            rank.signal_group(signal.SIGKILL)
            rank.process.kill()
        for rank in self._ranks:
            rank.process.join()
            rank.tasks.close()
        self._ranks = []
        self._store = None
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None
