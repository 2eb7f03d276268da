"""Ranks in processes of their own, which are ended together: whatever one of them does, the caller goes on."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from pathlib import Path

from ...launch import alone, environment

GRACE = 5.0
"""Seconds that the other ranks have to end, once one has."""

LINES, SHOWN = 4, 60
"""How many lines of what a rank said go into a sentence about it, and to stderr."""

#: Lines that say nothing about an error: what torch logs while processes end.
_LOGGED = re.compile(r"(\[rank\d+\]:)?\s*\[[WI]\d{4}|\s*$|.*destroy_process_group|.*\.cpp:\d+\]")


def run_ranks(n: int, module: str, arguments: Sequence[str], port: int, seconds: float) -> str | None:
    """Run `module` on `n` ranks that meet at the store on `port` of this machine, with torchrun's environment.

    Returns:
        None once all of them have left with 0. Else what went wrong in a sentence, with the last lines that the rank
        wrote to stderr: one ended otherwise, or without the others, or they took longer than `seconds`. All are ended.
    """
    with tempfile.TemporaryDirectory() as folder, ExitStack() as files:
        logs = [Path(folder) / f"rank-{rank}" for rank in range(n)]
        processes: list[subprocess.Popen[bytes]] = []
        try:
            for rank, log in enumerate(logs):
                stderr = files.enter_context(log.open("wb"))
                env = environment(**_seat(rank, n, port))
                command = alone(module, *arguments)
                processes.append(subprocess.Popen(command, env=env, stderr=stderr, start_new_session=True))
            problem = _watch(processes, seconds)
            if problem is None:
                return None
            rank, what = problem
            said = _lines(logs[rank])
            processes[rank].send_signal(signal.SIGABRT)  # where it is, for stderr
            time.sleep(0.5)
        finally:
            for process in processes:
                _end(process)
        print("\n".join([what, *_lines(logs[rank])[-SHOWN:]]), file=sys.stderr, flush=True)
        return ": ".join(filter(None, [what, " / ".join(said[-LINES:])]))


def _lines(log: Path) -> list[str]:
    """What a rank has said, without what says nothing."""
    return [line.strip() for line in log.read_text(errors="replace").splitlines() if not _LOGGED.match(line)]


def _seat(rank: int, n: int, port: int) -> dict[str, str]:
    """What torchrun tells a rank. The store at `port` is there already, so that no rank makes one."""
    return {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "LOCAL_WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "0",
        "PYTHONFAULTHANDLER": "1",
        "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1"),
    }


def _watch(processes: Sequence[subprocess.Popen[bytes]], seconds: float) -> tuple[int, str] | None:
    """Wait until all have left; which rank kept them from it, and how."""
    start = time.monotonic()
    left: dict[int, float] = {}
    while True:
        codes = [process.poll() for process in processes]
        now = time.monotonic()
        for rank, code in enumerate(codes):
            if code is not None:
                left.setdefault(rank, now)
        failed = [rank for rank in left if codes[rank]]
        if len(left) == len(codes) and not failed:
            return None
        if left and (len(left) == len(codes) or now > min(left.values()) + GRACE):
            rank = (failed or list(left))[0]
            others = "" if len(left) == len(codes) else f", and not all others within {GRACE:.0f} s"
            return rank, f"rank {rank} ended with exit code {codes[rank]}{others}"
        if now > start + seconds:
            return 0, f"no end within {seconds:.0f} s"
        time.sleep(0.1)


def _end(process: subprocess.Popen[bytes]) -> None:
    """End a rank with all that it has started."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
