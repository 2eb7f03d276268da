"""Reductions of hybrid sharding: inside one copy of the state, and then over the copies."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch.distributed as dist
from torch import Tensor


class ThenAcross:
    """A part's reduction inside one copy, and then over the copies. As `Work`; may be waited for more than once.

    Args:
        inside: the reduction inside; None where a copy is one rank.
        mine: where its result is.
        add_up: makes that result where the reduction only has brought what it is made of.
        replicas: the ranks that have the same part.
    """

    def __init__(
        self, inside: Any, mine: Tensor, add_up: Callable[[], None] | None, replicas: dist.ProcessGroup
    ) -> None:
        self._inside, self._mine, self._add_up, self._replicas = inside, mine, add_up, replicas
        self._across: Any = None

    def wait(self) -> None:
        """Wait for both."""
        if self._across is None:
            if self._inside is not None:
                self._inside.wait()
            if self._add_up is not None:
                self._add_up()
            self._across = dist.all_reduce(self._mine, group=self._replicas, async_op=True)
        self._across.wait()
