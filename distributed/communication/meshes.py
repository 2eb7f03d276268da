"""Where a rank sits: from a process group, or a device mesh of one or two dimensions, to its `Ranks`.

[Note: hybrid sharding]
On a mesh of two dimensions the state is spread over the second one, and the first one holds copies: with nodes of
eight GPUs a mesh of (nodes, 8) keeps gathers and reduce-scatters inside a node. A part of a gradient is reduced inside
first, and its sum is all-reduced over the ranks that have the same part in the other copies; so every copy steps with
the same numbers. Messages in which ranks agree go to all ranks of the mesh.

    mesh      shard ->    rank 0 | rank 1 | rank 2 | rank 3      copy 0: each a quarter of the state
    replicate             rank 4 | rank 5 | rank 6 | rank 7      copy 1: the same quarters
"""

from __future__ import annotations

import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

from .collectives import ProcessGroup, Ranks, control_group


def seat(group: ProcessGroup | DeviceMesh | None) -> Ranks:
    """The ranks of a process group (of all processes by default) or of a mesh. Collective over them.

    Raises:
        ValueError: this process is not among them, or the mesh has more than two dimensions.
    """
    if not isinstance(group, DeviceMesh):
        return Ranks.of(group)
    if group.get_coordinate() is None:
        raise ValueError(f"rank {dist.get_rank()} is not in the mesh given to shard()")
    if group.ndim == 1:
        return Ranks.of(group.get_group())
    if group.ndim != 2:
        raise ValueError(
            f"a mesh for shard() has one dimension, or two (copies, shards), this one has {group.ndim}: "
            f"pass the dimensions that hold different data, such as mesh['dp']"
        )
    ranks = Ranks.of(group.get_group(1))
    if group.size(0) == 1:
        return ranks
    members = [int(rank) for rank in group.mesh.flatten().tolist()]
    ranks.group = group.get_group(1)
    ranks.copies, ranks.replicas, ranks.beside = group.size(0), group.get_group(0), ranks.control
    ranks.control = control_group(ranks.group, members)
    return ranks
