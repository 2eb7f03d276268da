"""What the job tells: JSON lines for programs, a bar or plain lines for people."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .errors import JobError


class MetricsFile:
    """Appends one JSON object per line and flushes it, so that a killed job loses none. Without a path it does nothing.

    Lines with `event` mark `start`, `resume`, `held`, `checkpoint` and `end`; the others are steps.
    """

    def __init__(self, path: str) -> None:
        self._file = None
        if path:
            try:
                Path(path).parent.mkdir(parents=True, exist_ok=True)
                self._file = open(path, "a", encoding="utf-8")  # noqa: SIM115 (it stays open for the whole run)
            except OSError as error:
                raise JobError(f"--metrics {path} cannot be written: {error}") from error

    def write(self, **values: Any) -> None:
        """Append one line."""
        if self._file is not None:
            self._file.write(json.dumps(values) + "\n")
            self._file.flush()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """The lines of the newest run in the file: those from its last `start` on. A line cut off by a kill is left out."""
    lines: list[dict[str, Any]] = []
    for text in Path(path).read_text(encoding="utf-8").splitlines():
        try:
            line = json.loads(text)
        except json.JSONDecodeError:
            continue
        if line.get("event") == "start":
            lines.clear()
        lines.append(line)
    return lines


def steps_of(lines: Iterable[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line per step, in order; where a step was made again after a resume, the later line."""
    by_step = {line["step"]: line for line in lines if "event" not in line}
    return [by_step[step] for step in sorted(by_step)]


@dataclass
class Speed:
    """Tokens per second over the last steps and over the whole process."""

    tokens_per_step: int
    started: float = field(default_factory=time.perf_counter)
    steps: int = 0
    _times: list[float] = field(default_factory=list)

    def tick(self) -> float:
        """Count one step; tokens per second over the last ten."""
        now = time.perf_counter()
        self.steps += 1
        self._times = [*self._times[-10:], now]
        first = self._times[0] if len(self._times) > 1 else self.started
        return self.tokens_per_step * max(len(self._times) - 1, 1) / max(now - first, 1e-9)

    @property
    def seconds(self) -> float:
        """Seconds since the start of this process's training."""
        return time.perf_counter() - self.started

    @property
    def overall(self) -> float:
        """Tokens per second of this process's steps, validation and checkpoints included."""
        return self.tokens_per_step * self.steps / max(self.seconds, 1e-9)


class Progress:
    """A bar on a terminal, a line every `log_every` steps elsewhere; silent on ranks other than 0."""

    def __init__(self, *, first: int, steps: int, log_every: int, shown: bool) -> None:
        self.steps, self.log_every, self.shown = steps, log_every, shown
        self._val = "-"
        self._bar = _bar(first, steps) if shown and sys.stderr.isatty() else None

    def step(self, step: int, *, loss: float, val: float | None, speed: float, lr: float) -> None:
        """Show that `step` steps are made; without a new `val` the last one stays."""
        if not self.shown:
            return
        if val is not None:
            self._val = f"{val:.3f}"
        text = f"loss {loss:.4f}, val {self._val} bits/byte, {speed:,.0f} tokens/s, lr {lr:.2e}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update()
        elif step % self.log_every == 0 or step == self.steps:
            print(f"step {step}/{self.steps}: {text}", flush=True)

    def close(self) -> None:
        """End the bar."""
        if self._bar is not None:
            self._bar.close()


def _bar(first: int, steps: int) -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm(total=steps, initial=first, unit="step", dynamic_ncols=True)
