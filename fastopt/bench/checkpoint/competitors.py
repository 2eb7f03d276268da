"""The others: each saves to and loads from a folder of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint

from .measuring import read_raw, write_raw
from .settings import Settings
from .state import STATES, held, shapes_of


def dtensors(opt: Any, settings: Settings) -> dict[str, Any]:
    """The same amount of state as DTensors, cut along the first dimension."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made: dict[str, Any] = {}
    for name, shape in shapes_of(settings).items():
        local = list(torch.empty(shape[0]).chunk(mesh.size()))[mesh.get_local_rank()].shape[0]
        for key in STATES:
            data = torch.randn(local, *shape[1:])
            stride = torch.empty(shape, device="meta").stride()
            made[f"{key}.{name}"] = DTensor.from_local(
                data, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
            )
    return made


def raw(place: Path, opt: Any) -> dict[str, Callable[[], Any]]:
    """os.write and fsync; reading into the same memory."""
    tensors = held(opt)
    file = place / f"{dist.get_rank()}.bin"
    return {"save": lambda: write_raw(file, tensors), "load": lambda: read_raw(file, tensors)}


def torch_save(place: Path, opt: Any) -> dict[str, Callable[[], Any]]:
    """One torch.save per rank, synced."""
    file = place / f"{dist.get_rank()}.pt"

    def write() -> None:
        with open(file, "wb") as opened:
            torch.save(held(opt), opened)
            opened.flush()
            os.fsync(opened.fileno())

    return {"save": write, "load": lambda: torch.load(file)}


def dcp(place: Path, state: dict[str, Any], hugging_face: bool) -> dict[str, Callable[[], Any]]:
    """torch.distributed.checkpoint with its own or with the safetensors writer."""
    module: Any = torch.distributed.checkpoint
    if hugging_face:
        writer = module.HuggingFaceStorageWriter(str(place), save_distributed=True)
        reader = module.HuggingFaceStorageReader(str(place))
    else:
        writer, reader = module.FileSystemWriter(place), module.FileSystemReader(place)
    return {
        "save": lambda: module.save(state, storage_writer=writer),
        "load": lambda: module.load(state, storage_reader=reader),
    }
