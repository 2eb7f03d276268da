"""Fixtures of all tests."""

from __future__ import annotations

import gc
import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

# Also where pytest runs without scripts/test: several pytest workers and their ranks share the cores, and a torchrun
# that restarts its workers does not recover with the agent's store (torch 2.13 with Gloo). Gloo stays on loopback.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TORCH_DISABLE_SHARE_RDZV_TCP_STORE", "1")
os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")

from .ranks import RankPool

TESTS = Path(__file__).resolve().parent


#: Modules that take the longest. They run first, so that no worker is left alone with one of them at the end.
LONG = (
    "scripts/test_job_runs.py",
    "checkpoint/test_cli.py",
    "test_packaging.py",
    "scripts/test_bench_zero.py",
    "checkpoint/test_every_optimizer.py",
    "scripts/test_job_demo.py",
    "scripts/test_bench_checkpoint.py",
    "docs/test_site.py",
    "distributed/test_parity.py",
    "fastopt/test_parts.py",
    "distributed/test_in_backward.py",
    "test_ranks.py",
    "distributed/test_models.py",
    "checkpoint/test_killed.py",
    "scripts/test_job_ranks.py",
    "doctor/test_doctor.py",
    "test_commands.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    place = {str(TESTS / name): number for number, name in enumerate(LONG)}
    items.sort(key=lambda item: place.get(str(item.path), len(LONG)))


def pytest_collection_finish() -> None:
    """The modules and tests stay until the end: no collection of garbage need look through them."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _signals() -> Iterator[None]:
    """A test leaves the handlers of signals as they were: children of later tests would inherit others."""
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    yield
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


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
