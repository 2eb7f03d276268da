"""`model.zero_grad()` drops gradients that no longer are in `p.grad`, too.

From the first `shard` in stage 2 on, `nn.Module.zero_grad` also asks every sharded optimizer whose parameters all are
in the module. A script that skips a step, or drops the gradients that one loss has left in another's model, then
starts from nothing, as it would with gradients in `p.grad`.
"""

from __future__ import annotations

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

from torch import nn

from ..parameters.readers import values_unread

_zero_grad = nn.Module.zero_grad
_numbers = itertools.count()
# In the order in which they were made: forgetting may take a collective.
_holders: WeakValueDictionary[int, HoldsReduced] = WeakValueDictionary()


class HoldsReduced(Protocol):
    """An optimizer that holds gradients elsewhere."""

    def holds_only(self, params: set[int]) -> bool:
        """Whether all its parameters are among `params`, given by their ids."""

    def forget_gradients(self) -> None:
        """Drop what is not in `p.grad`."""


def _zero_everything(self: nn.Module, set_to_none: bool = True) -> None:
    with values_unread():
        _zero_grad(self, set_to_none)
        params = set(map(id, self.parameters())) if _holders else set()
    if _holders:
        for holder in [one for one in _holders.values() if one.holds_only(params)]:
            holder.forget_gradients()


def teach_module(holder: HoldsReduced | None) -> None:
    """Let `zero_grad` of every module of this process ask `holder`, too, and wait for no parameters."""
    if holder is not None:
        _holders[next(_numbers)] = holder
    nn.Module.zero_grad = _zero_everything  # type: ignore[method-assign]
