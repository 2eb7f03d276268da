"""What PyTorch's `fully_shard` (stage 3) gives each rank: rows of every parameter, gathered unit by unit. Pure.

A *unit* is what one call of `fully_shard` gathers at once: usually each block of the model, and the rest together.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .loads import Loads
from .places import ParamSpec

REST = "the rest"
"""The unit of the parameters that are in no numbered block."""


@dataclass(frozen=True)
class Rows:
    """The first dimension of one parameter cut as `torch.chunk` cuts it.

    Attributes:
        rows: size of the first dimension (1 for a parameter without dimensions).
        row: elements in one row.
        chunk: rows of a rank that has its full share; the last ranks may have fewer, or none.
    """

    rows: int
    row: int
    chunk: int

    @classmethod
    def of(cls, spec: ParamSpec, world_size: int) -> Rows:
        """How `spec` is cut for `world_size` ranks."""
        rows = spec.shape[0] if spec.shape else 1
        return cls(rows, math.prod(spec.shape[1:]), -(-rows // world_size))

    @property
    def padded(self) -> int:
        """Elements that each rank sets aside, and moves, whatever it owns."""
        return self.chunk * self.row


@dataclass(frozen=True)
class Unit:
    """Parameters that are gathered together, as their indices."""

    name: str
    params: tuple[int, ...]


def units_of(params: Sequence[ParamSpec]) -> tuple[Unit, ...]:
    """One unit per numbered block (`layers.3` of `layers.3.attention.q.weight`), and one of the rest, which is last."""
    members: dict[str, list[int]] = {}
    for i, spec in enumerate(params):
        parts = spec.name.split(".")[:-1]
        number = next((j for j, part in enumerate(parts) if part.isdigit()), None)
        members.setdefault(REST if number is None else ".".join(parts[: number + 1]), []).append(i)
    rest = members.pop(REST, None)
    units = [Unit(name, tuple(indices)) for name, indices in members.items()]
    return tuple(units + ([Unit(REST, tuple(rest))] if rest else []))


def loads_of_rows(params: Sequence[ParamSpec], world_size: int, weights: Sequence[int] | None = None) -> list[int]:
    """For each rank its elements of parameters, each counted `weights[param]` times (once by default)."""
    loads = Loads(world_size)
    for i, spec in enumerate(params):
        cut = Rows.of(spec, world_size)
        if cut.padded:
            loads.spread(0, cut.rows * cut.row, cut.padded, 1 if weights is None else weights[i])
    return loads.totals()
