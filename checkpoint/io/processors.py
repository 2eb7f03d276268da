"""How many threads this process may keep busy."""

from __future__ import annotations

import os


def processors(ranks: int = 1) -> int:
    """How many threads one of the `ranks` processes on this machine may keep busy: four at most."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, min(4, usable // ranks))
