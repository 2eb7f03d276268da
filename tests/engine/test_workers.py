"""Threads that share out calls."""

from __future__ import annotations

import threading
import time

import pytest

from fastopt.engine.executors.workers import share_out


def test_every_call_is_made_once() -> None:
    made: list[int] = []
    share_out(made.append, 50, 3)
    share_out(made.append, 0, 3)
    assert sorted(made) == list(range(50))


@pytest.mark.parametrize("where", ["here", "in another thread"])
def test_an_exception_leaves_no_call_behind(where: str) -> None:
    """Whoever gets it frees the memory that the calls work on: Ctrl-C in the midst of a step."""
    here, begun, ended = threading.get_ident(), list[int](), list[int]()
    two_have_begun = threading.Barrier(2)

    def call(i: int) -> None:
        begun.append(i)
        two_have_begun.wait(30)
        if (threading.get_ident() == here) == (where == "here"):
            raise KeyboardInterrupt
        time.sleep(0.1)
        ended.append(i)
        two_have_begun.abort()

    with pytest.raises((KeyboardInterrupt, threading.BrokenBarrierError)):
        share_out(call, 20, 2)
    assert ended, "the other call was still being made"
    assert len(begun) < 20
