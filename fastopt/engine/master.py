"""Master weights: a float32 copy of a parameter in bfloat16 or float16, on which the chain steps.

An update of a low-precision parameter is often smaller than its rounding error, and lost. With the copy under the key
`master` in its state, callbacks see a float32 parameter and a float32 gradient, and the rounded result is written to
the parameter in the same pass (Micikevicius et al., https://arxiv.org/abs/1710.03740).
"""

from __future__ import annotations

from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import torch
from torch import Tensor

from .work import GroupWork

#: The key of the state.
MASTER = "master"
_LOW = frozenset({torch.bfloat16, torch.float16})
_HIGH = frozenset({torch.float32, torch.float64})


def has_master(p: Tensor, state: Mapping[str, Any]) -> bool:
    """Whether the chain steps on the master copy of `p`."""
    if p.dtype not in _LOW or MASTER not in state:
        return False
    master = state[MASTER]
    return isinstance(master, Tensor) and master.dtype in _HIGH and master.shape == p.shape


def add_masters(work: Sequence[GroupWork]) -> None:
    """Give every low-precision parameter of `work` that has none a master copy of what it is now."""
    for group in work:
        for p, state in zip(group.params, group.states, strict=True):
            if p.dtype in _LOW and not has_master(p, state):
                state[MASTER] = p.detach().to(torch.float32)


class StandIn:
    """The master copy of `p` as a parameter with a gradient, for callbacks that are called as they are."""

    def __init__(self, p: Tensor, state: MutableMapping[str, Any]) -> None:
        self._p = p
        self._master: Tensor = state[MASTER]
        self.param: Tensor = self._master.detach()
        self.param.grad = None if p.grad is None else p.grad.to(self._master.dtype)

    def finish(self) -> None:
        """Take over what the callbacks did to parameter and gradient."""
        if self.param.data_ptr() != self._master.data_ptr():  # a callback has assigned `p.data`
            self._master.copy_(self.param)
        self._p.detach().copy_(self._master)
        grad = self._p.grad
        # whether it was changed cannot be told without waiting for the device; unchanged it is copied to itself
        if grad is not None and self.param.grad is not None and 0 not in grad.stride():
            grad.copy_(self.param.grad)
