"""Step counts on the device, in groups with `capturable=True`: a captured step then counts without the host.

A count (`step`, Lookahead's `count`) is a Python number in the state, and what follows from it (`1 - mom^step`) is
computed on the host and brought to the GPU: a replayed CUDA graph would repeat one step's. In a capturable group each
number that the chain has put into a state becomes a 0-d tensor, which the same callbacks count on in place.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .engine import GroupWork
from .state import ParamState

#: The entry of a group, by torch's name.
CAPTURABLE = "capturable"

#: A state whose numbers are on the device, its counter of changes then, and the groups that were capturable.
Counted = tuple[ParamState, int, list[int]]


def check_capturable(group: Mapping[str, Any]) -> None:
    """Raise a TypeError where the switch of a group is no bool."""
    if not isinstance(group.get(CAPTURABLE, False), bool):
        raise TypeError(f"capturable={group[CAPTURABLE]!r}, expected True or False")


def on_device(number: float, p: Tensor) -> Tensor:
    """A count as a tensor beside `p`: float32, as torch's optimizers keep theirs, which is exact up to 2^24 steps."""
    return torch.full((), number, dtype=torch.float32, device=p.device)


def counts_to_device(work: Iterable[GroupWork], state: Any, counted: Counted | None) -> Counted | None:
    """Make tensors of the numbers in the states of capturable groups, after a step on `work`.

    Args:
        state: of the optimizer.
        counted: what the last call returned: nothing is looked through again that has not changed since.
    """
    capturable = [w for w in work if w.group.get(CAPTURABLE)]
    if not capturable or (counted and counted[0] is state and counted[1:] == (state.changes, _indices(capturable))):
        return counted
    for w in capturable:
        for p, entry in zip(w.params, w.states, strict=True):
            numbers = {key: value for key, value in entry.items() if type(value) in (int, float)}
            for key, value in numbers.items():
                entry[key] = on_device(value, p)
    return (state, state.changes, _indices(capturable)) if isinstance(state, ParamState) else None


def _indices(work: Iterable[GroupWork]) -> list[int]:
    return [w.index for w in work]
