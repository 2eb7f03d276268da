"""A few threads that share out calls which leave Python, such as compiled loops."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from functools import lru_cache
from itertools import count


@lru_cache(maxsize=1)
def _pool(threads: int) -> ThreadPoolExecutor:
    return ThreadPoolExecutor(threads, "fastopt")


# A forked process has the pool but none of its threads.
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_pool.cache_clear)


def share_out(call: Callable[[int], None], n: int, threads: int) -> None:
    """Make the calls `call(0)` to `call(n - 1)`, in any order, on this thread and `threads - 1` others.

    Returns when none is being made any more: the calls work on memory that is the caller's. An exception of any of
    them, or of what interrupts this thread (Ctrl-C), is raised, and those that have not begun are left out then.
    """
    numbers, given_up = count(), False

    def work() -> None:
        while (i := next(numbers)) < n and not given_up:
            call(i)

    others: list[Future[None]] = []
    try:
        for _ in range(min(threads, n) - 1):
            others.append(_pool(threads - 1).submit(work))
        work()
    except BaseException:
        given_up = True
        raise
    finally:
        if others:
            wait(others)
    for other in others:
        other.result()
