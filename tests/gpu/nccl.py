"""Meshes of GPUs over NCCL, for ranks whose default process group is one of Gloo."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh


def nccl_mesh(rank: int, shape: tuple[int, ...] = (), names: tuple[str, ...] | None = None) -> DeviceMesh:
    """The mesh of all ranks in this shape, a line by default; takes this rank's GPU."""
    torch.cuda.set_device(rank)
    mesh = torch.arange(dist.get_world_size()).reshape(shape or -1)
    mine = []
    for dim in range(mesh.ndim):
        for line in mesh.movedim(dim, -1).reshape(-1, mesh.shape[dim]).tolist():
            group = dist.new_group(line, backend="nccl")
            if rank in line:
                mine.append(group)
    if mesh.ndim == 1:
        return DeviceMesh.from_group(mine[0], "cuda", mesh_dim_names=names)
    return DeviceMesh.from_group(mine, "cuda", mesh=mesh, mesh_dim_names=names)
