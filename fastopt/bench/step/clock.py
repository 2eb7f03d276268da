"""Times of work on a device, and its bandwidth."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch


class Clock:
    """Waits for the device, where there is one to wait for."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def now(self) -> float:
        """Seconds, when the device has nothing left to do."""
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def steps(self, step: Callable[[], Any], n: int) -> float:
        """Milliseconds per step of `n` steps in a row."""
        start = self.now()
        for _ in range(n):
            step()
        return (self.now() - start) / n * 1e3

    def host(self, step: Callable[[], Any]) -> float:
        """Microseconds until `step` returns; the device was idle before."""
        start = self.now()
        step()
        return (time.perf_counter() - start) * 1e6


def copy_bandwidth(device: str, clock: Clock, n: int | None = None) -> float:
    """GB/s that a copy of `n` floats reads and writes."""
    a = torch.ones(n or 1 << (29 if device == "cuda" else 25), device=device)
    b = torch.empty_like(a)
    times = [clock.steps(lambda: b.copy_(a), 5) for _ in range(8)]
    return 2 * a.numel() * 4 / statistics.median(times[2:]) / 1e6
