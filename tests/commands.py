"""Runs commands that start processes of their own, `torchrun` above all, and leaves none of them behind."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping
from pathlib import Path
from types import TracebackType

from .ranks import RanksFailed

ROOT = Path(__file__).parents[1]
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
MARK = "FASTOPT_TEST_COMMAND"
"""A variable that every descendant of a command inherits, by which they are found whatever session they are in."""


class Command:
    """A running `argv`, with `env` added to the environment, that is killed with all it started when a `with` ends.

    `fastopt` is importable in it from any folder. Both streams of all its processes go to one file: see `output`.
    """

    def __init__(self, *argv: str | Path, env: Mapping[str, str] | None = None, cwd: Path = ROOT) -> None:
        self.argv = argv
        mark = str(uuid.uuid4())
        self._marked = f"{MARK}={mark}".encode()
        self._log = tempfile.TemporaryFile()  # noqa: SIM115  (closed with the command)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")])),
            "PYTHONFAULTHANDLER": "1",  # SIGABRT shows the stacks
            "PYTHONUNBUFFERED": "1",  # what a killed process printed is there, though line ends of two ranks may mix
            **(env or {}),
            MARK: mark,
        }
        self.process = subprocess.Popen(
            argv,
            cwd=cwd,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=self._log,
            stderr=self._log,
            start_new_session=True,
        )

    @property
    def output(self) -> str:
        """What its processes have printed so far."""
        return os.pread(self._log.fileno(), os.fstat(self._log.fileno()).st_size, 0).decode(errors="replace")

    @property
    def processes(self) -> list[int]:
        """The living processes of the command, in the order of their start; without /proc only the first."""
        if sys.platform != "linux":
            return [self.process.pid] if self.process.poll() is None else []
        found = []
        for environ in Path("/proc").glob("[0-9]*/environ"):
            # Processes come and go under the glob; those of other users and zombies cannot be read or read as empty.
            with contextlib.suppress(OSError):
                if self._marked in environ.read_bytes().split(b"\0"):
                    found.append(int(environ.parent.name))
        return sorted(found)

    def wait(self, timeout: float = 120, until: Callable[[], bool] | None = None) -> int | None:
        """Waits for the end and returns the exit code, or None as soon as `until()` is true.

        Neither after `timeout` seconds: kills all and raises `RanksFailed` with the output and the Python stacks.
        """
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            if until is not None and until():
                return None
            with contextlib.suppress(subprocess.TimeoutExpired):
                return self.process.wait(0.05)
        for pid in self.processes:  # torchrun itself comes first, so it does not react to what happens to the others
            _send(pid, signal.SIGABRT)
            time.sleep(0.3)  # stacks come in small writes: one process after the other
        self.kill()
        raise RanksFailed(f"{self}: not done after {timeout:g} s\n{self.output}")

    def kill(self) -> None:
        """Ends every process of the command that is still there."""
        while alive := self.processes:
            for pid in alive:
                _send(pid, signal.SIGKILL)
            time.sleep(0.02)
        self.process.wait()

    def __enter__(self) -> Command:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
        self._log.close()

    def __str__(self) -> str:
        return " ".join(map(str, self.argv))


def run_command(
    *argv: str | Path,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """Runs `argv` to its end, as `Command`; `stdout` of the result has both streams, of all processes.

    Raises `RanksFailed` with the output when it is not done after `timeout` seconds, or, with `check`, when it exits
    with a code other than 0. What it started is killed in any case.
    """
    with Command(*argv, env=env, cwd=cwd) as command:
        code = command.wait(timeout)
        command.kill()
        if check and code:
            raise RanksFailed(f"{command}: exit code {code}\n{command.output}")
        return subprocess.CompletedProcess(list(argv), code or 0, command.output, "")


def torchrun(
    world_size: int,
    script: str | Path,
    *arguments: str | Path,
    max_restarts: int = 0,
    timeout: float = 120,
    env: Mapping[str, str] | None = None,
    cwd: Path = ROOT,
    check: bool = True,
) -> subprocess.CompletedProcess[str]:
    """`run_command` of `script` with its `arguments` on `world_size` ranks of torchrun."""
    argv = (*TORCHRUN, f"--nproc-per-node={world_size}", f"--max-restarts={max_restarts}", script, *arguments)
    return run_command(*argv, timeout=timeout, env=env, cwd=cwd, check=check)


def _send(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)
