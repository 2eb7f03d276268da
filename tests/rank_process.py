"""What runs inside one rank of a `RankPool`: join the group, answer tasks, leave in good order."""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import multiprocessing
import os
import pickle
import random
import signal
import sys
import threading
import traceback
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist

STACKS_SIGNAL = signal.SIGUSR1
"""A rank that gets it writes the stacks of all its threads into its log, also while it hangs inside C code."""


@dataclass(frozen=True)
class Seat:
    """The place of one process in its pool. The store behind `port` lives in the process that owns the pool."""

    rank: int
    world_size: int
    port: int
    log: Path
    env: dict[str, str]


@dataclass(frozen=True)
class Returned:
    """`fn` returned `value` on this rank."""

    value: Any


@dataclass(frozen=True)
class Raised:
    """`fn` raised on this rank; the traceback is in its log. `summary` is its last line."""

    summary: str


def main(seat: Seat, tasks: Connection) -> None:
    """Serves pickled `(fn, args)` from `tasks` until it closes. Never returns: see `_leave`."""
    multiprocessing.current_process().daemon = False  # ended with its pool all the same, but may start processes
    gc.freeze()  # what the fork server has imported stays, nobody need look through it
    os.setsid()  # a process group of its own: the pool kills it together with whatever `fn` has started
    _write_into(seat.log)
    faulthandler.enable()
    torch._C._set_print_stack_traces_on_fatal_signal(True)  # of C++ threads, too, such as those of Gloo
    faulthandler.register(STACKS_SIGNAL, all_threads=True)
    threading.Thread(target=_die_with_the_pool, daemon=True).start()
    os.environ.update(
        {
            "RANK": str(seat.rank),
            "LOCAL_RANK": str(seat.rank),
            "WORLD_SIZE": str(seat.world_size),
            "LOCAL_WORLD_SIZE": str(seat.world_size),
            **seat.env,
        }
    )
    torch.set_num_threads(1)  # the ranks of all pytest workers share the cores
    store = dist.TCPStore("127.0.0.1", seat.port, is_master=False)
    for number in range(sys.maxsize):
        try:
            task = tasks.recv_bytes()
        except (EOFError, OSError):
            _leave()
        answer = _perform(task, seat, dist.PrefixStore(str(number), store))
        sys.stdout.flush()
        sys.stderr.flush()
        tasks.send_bytes(answer)


def _perform(task: bytes, seat: Seat, store: dist.Store) -> bytes:
    """The pickled answer to one task, which is `Returned` or `Raised`."""
    try:
        if not dist.is_initialized():
            dist.init_process_group("gloo", store=store, rank=seat.rank, world_size=seat.world_size)
        # The numbers that a test draws depend neither on the tests before it nor on the rank.
        random.seed(0)
        np.random.seed(0)
        torch.manual_seed(0)
        fn, args = pickle.loads(task)
        value = fn(seat.rank, seat.world_size, *args)
        if dist.is_initialized():
            dist.barrier()  # ranks that made different collectives fail in this test and not in the next one
        return pickle.dumps(Returned(value))
    except BaseException as error:  # SystemExit and pytest's own outcomes are failures of the rank, too
        traceback.print_exc()
        return pickle.dumps(Raised("".join(traceback.format_exception_only(error)).strip()))


def _write_into(log: Path) -> None:
    """Sends stdout and stderr to `log`, of C code and of children as well."""
    fd = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(fd, 1)
    os.dup2(fd, 2)
    os.close(fd)
    sys.stdout = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115  (open as long as the process lives)
    sys.stderr = open(2, "w", buffering=1, closefd=False)  # noqa: SIM115


def _die_with_the_pool() -> None:
    """A rank that hangs in a collective does not outlive a pytest that was killed."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os.killpg(0, signal.SIGKILL)


def _leave() -> None:
    """Ends the process. Ranks with Gloo sometimes abort while the interpreter shuts down, so it does not get there.

    The barrier keeps a rank from closing its connections while another one still uses them.
    """
    with contextlib.suppress(Exception):
        gc.collect()
        if dist.is_initialized():
            dist.barrier()
            dist.destroy_process_group()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)
