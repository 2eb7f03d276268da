"""Processes that a benchmark starts, when somebody presses Ctrl-C: they end with it, and only it says so."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Iterator
from multiprocessing import active_children

_GRACE = 5.0  # seconds in which a child may end by itself


@contextlib.contextmanager
def deaf() -> Iterator[None]:
    """What starts here does not hear Ctrl-C, which a terminal tells all processes: who has started it ends it."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextlib.contextmanager
def ended_together() -> Iterator[None]:
    """Whatever ends this one early, Ctrl-C above all, ends the children of `multiprocessing` as well."""
    try:
        yield
    except BaseException:
        for child in active_children():
            child.terminate()
        for child in active_children():
            child.join(_GRACE)
            child.kill()
            child.join()
        raise
