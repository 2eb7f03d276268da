"""What one step works on: for each group that steps, its hypers and the tensors with their states."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

#: Sums a float64 vector `[n]` of per-process partial sums over all processes.
Reduce = Callable[[Tensor], Tensor]


@dataclass
class GroupWork:
    """The part of one parameter group that steps now.

    Attributes:
        index: position of the group in `param_groups`.
        group: the group itself, as stored.
        hypers: what every callback of the group receives as keywords.
        params: the tensors to step, each with `.grad` set: whole parameters or 1-d slices of them.
        states: the live state of each tensor, read and updated in place.
    """

    index: int
    group: dict[str, Any]
    hypers: dict[str, Any]
    params: list[Tensor]
    states: list[dict[str, Any]]
