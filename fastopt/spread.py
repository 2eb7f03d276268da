"""What this process holds of a DTensor: a tensor that is spread over a mesh of processes, of which each holds a *part*.

`fully_shard` and the plans of `torch.distributed.tensor.parallel` make them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from .pieces import Box

PLAIN = frozenset({Tensor, torch.nn.Parameter})
"""Types that are no DTensors, which are known without a closer look."""

#: The process groups over which a parameter is cut; none where every process has all of it.
Sharers = tuple[Any, ...]


def is_spread(x: Any) -> bool:
    """Whether `x` is a DTensor."""
    return type(x) not in PLAIN and isinstance(x, Tensor) and hasattr(x, "device_mesh")


def part_of(x: Any) -> Any:
    """This process's part of a DTensor, the same object every time; anything else as it is."""
    return x._local_tensor if is_spread(x) else x


def sharers_of(p: Any) -> Sharers:
    """The process groups of the dimensions of the mesh that cut `p`. Copies on other dimensions do not count.

    Raises:
        ValueError: a parameter that is a sum still to be made (`Partial`).
    """
    if not is_spread(p):
        return ()
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is placed as {p.placements}: redistribute it first")
    mesh = p.device_mesh
    cut = [i for i, placement in enumerate(p.placements) if not placement.is_replicate() and mesh.size(i) > 1]
    return tuple(mesh.get_group(i) for i in cut)


def part_of_grad(p: Any) -> Tensor | None:
    """This process's part of the gradient of `p`, placed as `p` is.

    A gradient that is placed otherwise, such as the sum still to be made of a layer norm under sequence parallelism,
    is redistributed first, which is collective over the mesh of `p`.
    """
    grad = p.grad
    if grad is None or not is_spread(p):
        return grad  # type: ignore[no-any-return]
    if not is_spread(grad) or grad.device_mesh != p.device_mesh:
        where = grad.device_mesh if is_spread(grad) else "no mesh"
        raise ValueError(f"the gradient of a parameter of shape {tuple(p.shape)} on {p.device_mesh} is on {where}")
    if grad.placements != p.placements:
        p.grad = grad = grad.redistribute(p.device_mesh, p.placements)
    local = grad._local_tensor
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


def entire_of(x: Any) -> Any:
    """All of a DTensor, as a tensor of its own; anything else as it is."""
    return x.full_tensor().clone() if is_spread(x) else x


def cut_as(p: Any, entire: Tensor) -> Tensor:
    """The part of `entire` that this process holds of `p`."""
    from torch.distributed.tensor import DTensor, Replicate

    copies = DTensor.from_local(entire, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    return copies.redistribute(p.device_mesh, p.placements).to_local()


def hold_parts(state: dict[str, Any], p: Any) -> None:
    """Put the parts of DTensors, and of whole tensors, in their place in the state of `p`."""
    if is_spread(p):
        for key, value in state.items():
            if isinstance(value, Tensor) and (held := take(p, value)) is not value:
                state[key] = held


def show(p: Any, value: Any) -> Any:
    """A state of `p` as the state dict has it: a DTensor placed as `p` is, where it is shaped like this part of `p`."""
    if not is_spread(p) or not isinstance(value, Tensor) or is_spread(value) or not value.ndim:
        return value
    if value.shape != part_of(p).shape:
        return value
    spread: Any = type(p)
    return spread.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def take(p: Any, value: Any) -> Any:
    """A state of `p` as it is held: this process's part of a DTensor, or of a whole tensor of the shape of `p`.

    Raises:
        ValueError: it lies on another mesh.
    """
    if not is_spread(p) or not isinstance(value, Tensor) or not value.ndim or value.shape != p.shape:
        return value
    if not is_spread(value):
        return value if value.shape == part_of(p).shape else cut_as(p, value).clone()
    spread: Any = value
    if spread.device_mesh != p.device_mesh:
        raise ValueError(
            f"a state on {spread.device_mesh} was given to a parameter of shape {tuple(p.shape)} on {p.device_mesh}"
        )
    if spread.placements != p.placements:
        spread = spread.redistribute(p.device_mesh, p.placements)
    return spread._local_tensor


def shown_state(state: Mapping[Any, Mapping[str, Any]]) -> Mapping[Any, Mapping[str, Any]]:
    """A state by parameter as the state dict has it."""
    if not any(map(is_spread, state)):
        return state
    return {p: {key: show(p, value) for key, value in entry.items()} for p, entry in state.items()}


def box_of(p: Any) -> Box:
    """The box of the DTensor `p` that this process holds; maybe without elements.

    Dimensions are cut as `torch.chunk` cuts them, in the order of the mesh's dimensions; where `fully_shard` has cut
    what a tensor parallel plan had cut before (`_StridedShard`), its dimension of the mesh comes after the others.

    Raises:
        ValueError: other placements.
    """
    offset, shape = [0] * p.ndim, list(p.shape)
    coordinate = p.device_mesh.get_coordinate()
    for axis in _order_of_cuts(p):
        dim = p.placements[axis].dim % p.ndim
        chunk = -(-shape[dim] // p.device_mesh.size(axis))
        start = min(chunk * coordinate[axis], shape[dim])
        offset[dim] += start
        shape[dim] = min(chunk, shape[dim] - start)
    return Box(tuple(offset), tuple(shape))


def _order_of_cuts(p: Any) -> list[int]:
    """The dimensions of the mesh that cut `p`, first cut first."""
    plain, later = [], []
    for axis, placement in enumerate(p.placements):
        kind = type(placement).__name__
        if kind == "Shard":
            plain.append(axis)
        elif kind == "_StridedShard":
            inner = [i for i in range(axis + 1, p.device_mesh.ndim) if p.placements[i].is_shard(placement.dim)]
            if placement.split_factor != math.prod(p.device_mesh.size(i) for i in inner):
                raise ValueError(f"a tensor of shape {tuple(p.shape)} is placed as {p.placements}, which is no box")
            later.append(axis)
        elif not placement.is_replicate():
            raise ValueError(f"a tensor of shape {tuple(p.shape)} is placed as {placement}, which is no box")
    return plain + later
