"""Parameters that are DTensors of a tensor parallel plan: `shard` cuts this rank's part of them.

[Note: tensor parallel]
On a mesh of (dp, tp) a plan has cut, or copied, each parameter over tp, and `shard` spreads the state of these parts
over dp. A rank's part is an ordinary tensor, so buckets, wires and slices know of nothing else. The ranks along tp have
layouts of their own, which lie alike, for every part gets the room of the largest. What is of the whole parameter again
are norms, which are added up over tp after dp, the boxes of the state in a checkpoint, and an inf for the loss scaler.

                 tp 0        tp 1
    dp 0      | a a a a | | A A A A |        the rows of one weight: tp 0 has `a`, tp 1 has `A`
    dp 1      | a a a a | | A A A A |        state: dp 0 holds the first half of its part, dp 1 the second

Every rank of a line along tp has the same gradients missing and makes the same calls: they compute one thing together.
Hypers and freezing are compared along it now and then, see other_dimensions.py.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ...pieces import Box, Shape
from ...spread import Sharers, box_of, is_spread, part_of, sharers_of


@dataclass(frozen=True)
class PartOf:
    """Which part of a whole tensor a parameter of a layout is.

    Attributes:
        shape: of the whole.
        box: this part of it.
        room: elements of the largest part that any rank has.
        copy: which of several equal copies this is; a checkpoint is written from copy 0.
    """

    shape: Shape
    box: Box
    room: int
    copy: int = 0


def meshes_of(params: Iterable[Any]) -> list[Any]:
    """The meshes over which some of `params` are spread."""
    found: list[Any] = []
    for p in params:
        if is_spread(p) and p.device_mesh not in found:
            found.append(p.device_mesh)
    return found


def part_in_whole(p: Any, meshes: Sequence[Any]) -> PartOf | None:
    """Which part of `p` this rank has; None where it has all of it, and is the first to do so.

    Args:
        p: a parameter.
        meshes: of all parameters of the model. A plain parameter is one of several copies along them.
    """
    if not is_spread(p):
        shape = tuple(p.shape)
        copy = next((copy for mesh in meshes if (copy := _number(mesh, range(mesh.ndim)))), 0)
        return PartOf(shape, Box.whole(shape), p.numel(), copy) if copy else None
    largest = list(p.shape)
    for axis, placement in enumerate(p.placements):
        if placement.is_shard():
            largest[placement.dim] = -(-largest[placement.dim] // p.device_mesh.size(axis))
    copies = [axis for axis, placement in enumerate(p.placements) if placement.is_replicate()]
    return PartOf(tuple(p.shape), box_of(p), math.prod(largest), _number(p.device_mesh, copies))


def _number(mesh: Any, axes: Iterable[int]) -> int:
    """This rank's number among those that differ along `axes` of the mesh."""
    number = 0
    for axis in axes:
        number = number * mesh.size(axis) + mesh.get_coordinate()[axis]
    return number


def why_not(p: Any, group: dist.ProcessGroup | None) -> str | None:
    """Why a DTensor cannot be spread over `group` too; None if it can."""
    mesh = p.device_mesh
    others = set(mesh.mesh.flatten().tolist()) & set(dist.get_process_group_ranks(group)) - {dist.get_rank()}
    if others or mesh.get_coordinate() is None:
        return (
            f"is a DTensor over {mesh}, which has ranks of the group that shard() spreads over. Under fully_shard an "
            f"optimizer of fastopt takes it as it is, without shard(). For a tensor parallel plan use two dimensions "
            f"of one mesh: parallelize_module(model, mesh['tp'], plan) and shard(opt, model, group=mesh['dp'])"
        )
    if any(placement.is_partial() for placement in p.placements):
        return f"is a sum that is still to be made ({p.placements}): redistribute it first"
    if not part_of(p).is_contiguous():
        return "is a DTensor whose part on this rank is not contiguous"
    return None


class Spread:
    """Which of the parameters of an optimizer different processes share beside the ranks of `shard`, and how.

    Args:
        params: by their index in the layout.
    """

    def __init__(self, params: Iterable[Tensor] = ()) -> None:
        self._sharers: list[Sharers] = []
        self.extend(params)

    def extend(self, params: Iterable[Tensor]) -> None:
        """Take in more parameters."""
        self._sharers += map(sharers_of, params)
        self.groups = tuple(dict.fromkeys(group for sharers in self._sharers for group in sharers))

    def split(self, params: Iterable[int]) -> dict[Sharers, list[int]]:
        """`params` by the process groups that share them, in the order in which they come, alike on all ranks."""
        found: dict[Sharers, list[int]] = {}
        for i in params:
            found.setdefault(self._sharers[i], []).append(i)
        return found

    def sum(self, tensor: Tensor, sharers: Sharers) -> Tensor:
        """`tensor` summed over all of `sharers`, in place."""
        for group in sharers:
            dist.all_reduce(tensor, group=group)
        return tensor

    def largest(self, tensor: Tensor, sharers: Sharers) -> Tensor:
        """`tensor` maximised over all of `sharers`, in place."""
        for group in sharers:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=group)
        return tensor
