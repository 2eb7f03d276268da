"""Python values between ranks: what arrives, and by how many collectives."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist

from fastopt.checkpoint.ranks.messages import SLOT, from_all, from_first, to_first


def things(size: int) -> dict[str, list[Any]]:
    """By kind, what each rank has to say."""
    edge = SLOT - 8 - (len(pickle.dumps(b"x" * 1000)) - 1000)
    return {
        "small": [{"rank": rank, "none": None} for rank in range(size)],
        "one is long": [bytes([rank]) * (100_000 if rank == size - 1 else 1) for rank in range(size)],
        "all are long": [[rank] * 50_000 for rank in range(size)],
        **{f"edge {n:+d}": [b"x" * (edge + n)] * size for n in (-1, 0, 1)},
    }


class Counted:
    """A process group that notes which collectives are called."""

    def __init__(self, group: Any) -> None:
        self.group = group
        self.names: list[str] = []

    def __getattr__(self, name: str) -> Any:
        if name not in ("rank", "size"):
            self.names.append(name)
        return getattr(self.group, name)

    def of(self, work: Callable[[Any], Any]) -> tuple[Any, list[str]]:
        """What `work` gives with this group, and what it has called."""
        self.names = []
        return work(self), self.names


def told(rank: int, world_size: int) -> dict[str, tuple[Any, ...]]:
    calls, found = Counted(dist.group.WORLD), {}
    for kind, mine in things(world_size).items():
        everyone = calls.of(lambda group, mine=mine: from_all(mine[rank], group))
        first = calls.of(lambda group, mine=mine: to_first(mine[rank], group))
        last = calls.of(lambda group, mine=mine: from_first(mine[-1] if rank == 0 else None, group))
        found[kind] = everyone, first, last
    return found


@pytest.mark.parametrize("world_size", [2, 3])
def test_what_ranks_tell_each_other(ranks: Any, world_size: int) -> None:
    for rank, found in enumerate(ranks(world_size).run(told)):
        for kind, mine in things(world_size).items():
            long = any(len(pickle.dumps(thing)) > SLOT - 8 for thing in mine)
            everyone, first, last = found[kind]
            assert everyone == (mine, ["allgather"] * (2 if long else 1)), kind
            assert first == (mine if rank == 0 else None, ["allgather", "gather"][: 2 if long else 1]), kind
            long = len(pickle.dumps(mine[-1])) > SLOT - 8
            assert last == (mine[-1], ["broadcast"] * (2 if long else 1)), kind


def test_the_edge_is_met() -> None:
    sizes = {len(pickle.dumps(mine[0])) - (SLOT - 8) for kind, mine in things(2).items() if "edge" in kind}
    assert {0, 1} <= sizes
