"""Fixtures of all tests."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator

import pytest

# Also where pytest runs without scripts/test: several pytest workers and their ranks share the cores, and a torchrun
# that restarts its workers does not recover with the agent's store (torch 2.13 with Gloo). Gloo stays on loopback.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")

from .ranks import RankPool


@pytest.fixture(scope="module")
def ranks() -> Iterator[Callable[[int], RankPool]]:
    """`ranks(n)` is the pool of `n` ranks that the tests of this module share (see `RankPool.run`)."""
    pools: dict[int, RankPool] = {}

    def pool(world_size: int) -> RankPool:
        if world_size not in pools:
            pools[world_size] = RankPool(world_size)
        return pools[world_size]

    yield pool
    for each in pools.values():
        each.close()
