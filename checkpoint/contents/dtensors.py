"""DTensors, such as fully_shard makes: which box of the whole this rank holds, and a whole one from a local part."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor

from ...pieces import Box
from ...spread import box_of
from ..errors import CheckpointError


def is_one(value: Tensor) -> bool:
    """Whether `value` is a DTensor. Where nothing has imported them, nothing is one."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(value, module.DTensor)


def box_here(value: Any, where: str) -> Box:
    """The box that this rank holds of a DTensor, maybe without elements.

    Raises CheckpointError for placements that hold no box.
    """
    if value.device_mesh.get_coordinate() is None:
        return Box((0,) * value.ndim, (0,) * value.ndim)
    try:
        box = box_of(value)
    except ValueError as error:
        raise CheckpointError(f"{where}: {error}") from error
    if tuple(value.to_local().shape) != box.shape:
        raise CheckpointError(
            f"{where}: the local part has shape {tuple(value.to_local().shape)}, expected {box.shape}"
        )
    return box


def written_here(value: Any, where: str) -> list[tuple[Box, Tensor]]:
    """What this rank saves of a DTensor: its part, unless an earlier rank of a replicating dimension holds it too."""
    box = box_here(value, where)
    coordinate = value.device_mesh.get_coordinate()
    copies = coordinate is None or any(
        coordinate[axis] for axis, placement in enumerate(value.placements) if placement.is_replicate()
    )
    return [] if copies else [(box, value.to_local())]


def like(value: Any, local: Tensor) -> Tensor:
    """A DTensor laid out as `value` whose local part is `local`, on the device of `value`."""
    from torch.distributed.tensor import DTensor

    made: Tensor = DTensor.from_local(
        local.to(value.device),
        value.device_mesh,
        value.placements,
        run_check=False,
        shape=value.shape,
        stride=value.stride(),
    )
    return made
