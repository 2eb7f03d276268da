"""A few threads that share out calls which leave Python, such as compiled loops."""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
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

    Returns when all are done. An exception of any of them is raised.
    """
    numbers = count()

    def work() -> None:
        while (i := next(numbers)) < n:
            call(i)

    helpers = min(threads, n) - 1
    others = [_pool(threads - 1).submit(work) for _ in range(helpers)] if helpers > 0 else []
    work()
    for other in others:
        other.result()
