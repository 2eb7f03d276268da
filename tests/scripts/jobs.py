"""Starts the training job as a user does, with a time-out that kills it and shows all it printed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from scripts.job.metrics import read_metrics, steps_of

ROOT = Path(__file__).parents[2]
TINY = ["--layers", "1", "--width", "16", "--heads", "2", "--context", "16", "--batch", "12", "--val-rows", "8"]
"""A model that steps in a few milliseconds."""


def write_text(folder: Path, files: int = 12) -> Path:
    """A folder of small text files, the same on every call."""
    folder.mkdir()
    for i in range(files):
        lines = (f"def name_{i}_{n}(x): return x * {n * n % 97} + {i}\n" for n in range(60))
        (folder / f"file_{i:02d}.txt").write_text("".join(lines))
    return folder


@dataclass
class Job:
    """A started job. Its ranks are in its session, so that killing the session leaves none behind."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(
        cls, folder: Path, *arguments: str, ranks: int = 0, torchrun: tuple[str, ...] = (), share_store: bool = False
    ) -> Job:
        """`scripts/train.py` with `arguments`, under torchrun where `ranks` are asked for; output goes to a log."""
        launcher = [sys.executable]
        if ranks:
            launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}", *torchrun]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join([str(ROOT), *sys.path])}
        env["CUDA_VISIBLE_DEVICES"] = ""  # these jobs have more ranks than most machines have GPUs
        env["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "0" if share_store else "1"
        if sys.platform == "linux":
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")
        log = folder / f"job-{time.monotonic_ns()}.log"
        with log.open("wb") as out:
            process = subprocess.Popen(
                [*launcher, str(ROOT / "scripts/train.py"), "--threads", "1", *arguments],
                stdout=out,
                stderr=subprocess.STDOUT,
                env=env,
                cwd=folder,
                start_new_session=True,
            )
        return cls(process, log)

    @property
    def output(self) -> str:
        """All that the job has printed so far."""
        return self.log.read_text(errors="replace")

    def wait(self, timeout: float = 60, until: Callable[[], bool] | None = None) -> int | None:
        """The exit code, or None as soon as `until` holds; an AssertionError with all output after `timeout` s."""
        deadline = time.monotonic() + timeout
        while time.monotonic() < deadline:
            code = self.process.poll()
            if code is not None:
                return code
            if until is not None and until():
                return None
            time.sleep(0.02)
        self.kill()
        raise AssertionError(f"the job was not done after {timeout} seconds; it printed:\n{self.output}")

    def kill(self) -> None:
        """End every process of the job."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def succeed(self, timeout: float = 60) -> str:
        """Wait for exit code 0 and return the output."""
        code = self.wait(timeout)
        assert code == 0, f"exit code {code}; the job printed:\n{self.output}"
        return self.output


def steps_in(path: Path) -> dict[int, dict[str, Any]]:
    """The metrics line of each step of the newest run."""
    return {line["step"]: line for line in steps_of(read_metrics(path))} if path.exists() else {}


def losses_in(path: Path) -> list[float]:
    """The loss of each step, in order."""
    return [line["loss"] for _, line in sorted(steps_in(path).items())]


def events_in(path: Path, event: str) -> list[dict[str, Any]]:
    """The lines of one kind of event."""
    return [line for line in read_metrics(path) if line.get("event") == event] if path.exists() else []
