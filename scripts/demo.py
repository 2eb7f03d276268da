"""Show that a job survives the death of a rank: train on 2 ranks, SIGKILL one, resume the checkpoint on 3.

    scripts/train --demo [--keep DIR]

Takes about a minute. The report says what was lost and what came back; the exit code is 0 only if all of it held.
"""

from __future__ import annotations

import argparse
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from job.metrics import read_metrics, steps_of

TRAIN = Path(__file__).with_name("train.py")
STEPS, EVERY, KILL_AFTER = 120, 40, 48
SIZE = ["--layers", "2", "--width", "64", "--heads", "2", "--context", "64", "--batch", "24"]
REPEAT_TOLERANCE = 0.02
"""How far, in nats, the loss of a step may lie from that of the same step on another number of ranks."""


class DemoError(Exception):
    """Something in the demonstration did not go as it should; the message says what."""


@dataclass
class Job:
    """A running torchrun with everything it prints."""

    process: subprocess.Popen[bytes]
    log: Path

    @classmethod
    def start(cls, ranks: int, folder: Path, *flags: str) -> Job:
        """Train on `ranks` ranks into `folder`."""
        log = folder / f"{ranks}-ranks.log"
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        files = ["--checkpoint", str(folder / "checkpoints"), "--metrics", str(folder / "metrics.jsonl")]
        schedule = ["--steps", str(STEPS), "--every", str(EVERY), "--val-every", "10", "--threads", "1"]
        command = [*torchrun, str(TRAIN), *SIZE, *files, *schedule, "--plot", str(folder / "curves.png"), *flags]
        env = {**os.environ, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE": "1", "OMP_NUM_THREADS": "1"}
        env["CUDA_VISIBLE_DEVICES"] = ""  # 2 and 3 ranks on every machine, however many GPUs it has
        if sys.platform == "linux":
            env.setdefault("GLOO_SOCKET_IFNAME", "lo")  # all ranks are here, whatever this machine's name resolves to
        with log.open("wb") as out:
            process = subprocess.Popen(command, stdout=out, stderr=subprocess.STDOUT, env=env, start_new_session=True)
        return cls(process, log)

    def wait(self, seconds: float, until: Callable[[], bool] | None = None) -> int | None:
        """The exit code, or None once `until` holds; a DemoError with the output when `seconds` pass before."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            code = self.process.poll()
            if code is not None:
                return code
            if until is not None and until():
                return None
            time.sleep(0.05)
        raise DemoError(f"the job did not get there within {seconds:.0f} seconds:\n{self.tail()}")

    def tail(self, lines: int = 30) -> str:
        """The last lines of the output of all ranks."""
        return "\n".join(self.log.read_text(errors="replace").splitlines()[-lines:])

    def stop(self) -> None:
        """Kill what is left of the job, ranks included: they share its session."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()


def demonstrate(folder: Path) -> None:
    """The whole story; a DemoError where it does not hold."""
    say(f"1. train {STEPS} steps on 2 ranks, a checkpoint every {EVERY} steps")
    job = Job.start(2, folder)
    try:
        victim = kill_one_rank(job, folder)
        code = job.wait(60)
    finally:
        job.stop()
    if code == 0:
        raise DemoError("the job ended well although one of its ranks was killed")
    before = lines_of(folder)
    died_at, saved_at = steps_of(before)[-1]["step"], last_checkpoint(before)["step"]
    say(f"2. rank 1 (process {victim}) got SIGKILL: the job died after step {died_at} with exit code {code}")
    say(f"   the newest complete checkpoint is of step {saved_at}: {Path(last_checkpoint(before)['url']).name}")
    show_files(Path(last_checkpoint(before)["url"].removeprefix("file://")))

    say("3. resume on 3 ranks")
    job = Job.start(3, folder, "--resume")
    try:
        code = job.wait(150)
    finally:
        job.stop()
    if code != 0:
        raise DemoError(f"the resumed job ended with exit code {code}:\n{job.tail()}")
    report(before, lines_of(folder), saved_at)


def kill_one_rank(job: Job, folder: Path) -> int:
    """SIGKILL rank 1 once a checkpoint is there and some steps came after it; returns its process id."""
    if job.wait(90, until=lambda: made_steps(folder) >= KILL_AFTER) is not None:
        raise DemoError(f"the job ended before it could be killed:\n{job.tail()}")
    lines = lines_of(folder)
    last_checkpoint(lines)
    pid: int = lines[0]["pids"][1]
    os.kill(pid, signal.SIGKILL)
    return pid


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """The metrics so far."""
    path = folder / "metrics.jsonl"
    return read_metrics(path) if path.exists() else []


def made_steps(folder: Path) -> int:
    """The newest step in the metrics."""
    return max((line["step"] for line in steps_of(lines_of(folder))), default=0)


def last_checkpoint(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """The metrics line of the newest checkpoint."""
    saved = [line for line in lines if line.get("event") == "checkpoint"]
    if not saved:
        raise DemoError("there was no checkpoint before the kill")
    return saved[-1]


def show_files(folder: Path) -> None:
    """Name and size of each file of a checkpoint."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            say(f"     {path.relative_to(folder)}  {path.stat().st_size:,} bytes")


def report(before: list[dict[str, Any]], after: list[dict[str, Any]], saved_at: int) -> None:
    """Losses of the steps that were made twice, and what each rank held; a DemoError if they do not fit."""
    resumed = [line for line in after if line.get("event") == "resume"]
    if not resumed or resumed[-1]["step"] != saved_at or resumed[-1]["world_size"] != 3:
        raise DemoError(f"the job did not go on from step {saved_at} on 3 ranks")
    was = {line["step"]: line["loss"] for line in steps_of(before)}
    now = {line["step"]: line["loss"] for line in steps_of(after)}
    twice = [step for step in was if step > saved_at]
    if not twice:
        raise DemoError("no step was made twice, so there is nothing to compare")
    say("   loss of the steps made on both sides of the kill (the same rows, summed in another order):")
    for step in twice:
        say(f"     step {step}: on 2 ranks {was[step]:.6f}, on 3 ranks {now[step]:.6f}")
    worst = max(abs(was[step] - now[step]) for step in twice)
    if worst > REPEAT_TOLERANCE:
        raise DemoError(f"the loss jumped by {worst:.4f} nats, more than {REPEAT_TOLERANCE}")
    held = [line for line in after if line.get("event") == "held"]
    say("   optimizer state held, of " + f"{resumed[-1]['parameters']:,} parameters:")
    for line in (held[0], held[-1]):
        sizes = line["state_bytes"]
        parts = ", ".join(f"rank {rank} {n:,} bytes ({n / max(sum(sizes), 1):.1%})" for rank, n in enumerate(sizes))
        say(f"     on {line['world_size']} ranks: {parts}")
    end = after[-1]
    if end.get("event") != "end" or end["step"] != STEPS:
        raise DemoError("the resumed job did not reach its last step")
    say(f"4. step {STEPS}: validation {end['val_bpb']:.3f} bits per byte, byte frequencies {end['baseline_bpb']:.3f}")
    if end["val_bpb"] >= end["baseline_bpb"]:
        raise DemoError("the validation loss is not below that of the byte frequencies")


def say(text: str) -> None:
    """Print at once, also into a pipe."""
    print(text, flush=True)


def main(arguments: Sequence[str]) -> int:
    """Run the demonstration; returns the exit code."""
    parser = argparse.ArgumentParser(prog="demo.py", description="Kill a rank and resume on another number of ranks.")
    parser.add_argument("--keep", metavar="DIR", help="leave checkpoints, metrics and logs in this new folder")
    keep = parser.parse_args(arguments).keep
    started = time.monotonic()
    try:
        if keep is None:
            with tempfile.TemporaryDirectory(prefix="fastopt-demo-") as folder:
                demonstrate(Path(folder))
        else:
            kept = Path(keep).absolute()
            if kept.exists() and any(kept.iterdir()):
                raise DemoError(f"--keep {keep} is not empty: name a new folder")
            kept.mkdir(parents=True, exist_ok=True)
            demonstrate(kept)
            say(f"   curves, metrics, logs and checkpoints: {kept}")
    except DemoError as error:
        say(f"demo failed: {error}")
        return 1
    except KeyboardInterrupt:
        say("interrupted")
        return 128 + signal.SIGINT
    say(f"done in {time.monotonic() - started:.0f} seconds")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
