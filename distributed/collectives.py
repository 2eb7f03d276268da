"""The collectives that sharding uses, each behind one small method, and the same methods where there is one rank.

Tensors of parameters and gradients go over the group's own backend (NCCL or Gloo). What the ranks tell each other about
themselves (do we agree, which gradients exist) goes over Gloo on CPU memory: it never waits for a device.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .layout import Bucket, Region

ProcessGroup = dist.ProcessGroup

# PyTorch 2.13 has renamed both; 2.11 has the old names only.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Pending:
    """A collective under way; `wait` returns when its result may be used (on CUDA: by what is enqueued next)."""

    def __init__(self, works: list[Any]) -> None:
        self._works = works

    def wait(self) -> None:
        """Wait for all of it."""
        for work in self._works:
            work.wait()
        self._works = []


@dataclass
class Ranks:
    """This process's seat among the ranks that share an optimizer: its number, their number, and how to reach them.

    `group` is None where no process group is initialised: one rank, and no method communicates.
    """

    rank: int = 0
    world_size: int = 1
    group: ProcessGroup | None = None
    control: ProcessGroup | None = field(default=None, repr=False)

    @classmethod
    def of(cls, group: ProcessGroup | None = None) -> Ranks:
        """The ranks of `group` (of all processes by default). Collective over `group`."""
        if not (dist.is_available() and dist.is_initialized()):
            if group is not None:
                raise ValueError("a process group was given, but torch.distributed is not initialised")
            return cls()
        group = dist.group.WORLD if group is None else group
        assert group is not None
        rank = dist.get_rank(group)
        if rank < 0:
            raise ValueError(f"rank {dist.get_rank()} is not a member of the process group given to shard()")
        world_size = dist.get_world_size(group)
        if world_size == 1:
            return cls(0, 1, group)
        return cls(rank, world_size, group, _control_group(group))

    @property
    def alone(self) -> bool:
        """Whether there is nobody to talk to."""
        return self.world_size == 1

    def reaches(self, device: torch.device) -> bool:
        """Whether the group's backend moves tensors of `device`."""
        return self.alone or device.type in _device_types(self.group)

    def _global(self, rank: int) -> int:
        """The number that `torch.distributed` knows rank `rank` of the group by."""
        assert self.group is not None
        return dist.get_global_rank(self.group, rank)

    def _group_for(self, tensor: Tensor) -> ProcessGroup | None:
        """The group that moves `tensor`: counts and buffers may be on the CPU beside a model on GPUs."""
        return self.group if self.reaches(tensor.device) else self.control

    def broadcast(self, tensor: Tensor) -> None:
        """Overwrite `tensor` with rank 0's."""
        if self.alone or not tensor.numel():
            return
        data = tensor.detach()
        whole = data if data.is_contiguous() else data.contiguous()
        dist.broadcast(whole, self._global(0), group=self._group_for(data))
        if whole is not data:
            data.copy_(whole)

    def sum(self, tensor: Tensor) -> Tensor:
        """`tensor` summed over the ranks, in place."""
        if not self.alone:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def largest(self, tensor: Tensor) -> Tensor:
        """`tensor` maximised over the ranks, in place."""
        if not self.alone:
            dist.all_reduce(tensor, op=dist.ReduceOp.MAX, group=self.group)
        return tensor

    def reduce_bucket(self, bucket: Bucket, full: Tensor) -> tuple[Tensor, Pending]:
        """Sum the flat gradient `full` `[bucket.numel]` over the ranks; gives this rank's region, once waited for.

        `full` must live until then; its contents are undefined afterwards.
        """
        region = bucket.region(self.rank)
        if self.alone or not bucket.numel:
            return full[region.start : region.stop], Pending([])
        if bucket.owned is None:
            mine = full.new_empty(region.numel)
            return mine, Pending([_reduce_scatter(mine, full, group=self.group, async_op=True)])
        works = [
            dist.reduce(full[r.start : r.stop], self._global(r.rank), group=self.group, async_op=True)
            for r in _filled(bucket)
        ]
        return full[region.start : region.stop], Pending(works)

    def gather_bucket(self, bucket: Bucket, flat: Tensor) -> Pending:
        """Fill the flat buffer `flat` `[bucket.numel]` in place from the regions of their owners."""
        if self.alone or not bucket.numel:
            return Pending([])
        if bucket.owned is None:
            region = bucket.region(self.rank)
            mine = flat[region.start : region.stop]
            return Pending([_all_gather(flat, mine, group=self.group, async_op=True)])
        return Pending(
            [
                dist.broadcast(flat[r.start : r.stop], self._global(r.rank), group=self.group, async_op=True)
                for r in _filled(bucket)
            ]
        )

    def largest_bytes(self, message: Tensor) -> Tensor:
        """The byte-wise maximum over the ranks of a uint8 CPU tensor, in place (the control message of a step)."""
        if not self.alone:
            dist.all_reduce(message, op=dist.ReduceOp.MAX, group=self.control)
        return message

    def gather_objects(self, thing: Any) -> list[Any]:
        """Every rank's `thing`, in the order of the ranks."""
        if self.alone:
            return [thing]
        things: list[Any] = [None] * self.world_size
        dist.all_gather_object(things, thing, group=self.control)
        return things

    def gather_parts(self, mine: Tensor, sizes: list[int], to: int) -> list[Tensor] | None:
        """The 1-d tensors of all ranks (`sizes[r]` elements on rank `r`) on rank `to`, None on the others."""
        if self.alone:
            return [mine]
        longest = max(sizes)
        if not longest:
            return [mine] * self.world_size if self.rank == to else None
        padded = mine.new_zeros(longest)
        padded[: mine.numel()] = mine
        parts = [torch.empty_like(padded) for _ in sizes] if self.rank == to else None
        dist.gather(padded, parts, dst=self._global(to), group=self._group_for(mine))
        return None if parts is None else [part[:n] for part, n in zip(parts, sizes, strict=True)]

    def move(self, tensor: Tensor, source: int, to: int) -> None:
        """Bring `tensor` from rank `source` into `tensor` of rank `to`; both call it, nobody else has to."""
        if source == to:
            return
        if self.rank == source:
            dist.send(tensor.contiguous(), self._global(to), group=self._group_for(tensor))
        elif self.rank == to:
            dist.recv(tensor, self._global(source), group=self._group_for(tensor))


def _filled(bucket: Bucket) -> list[Region]:
    """The regions of a `whole` bucket that hold something."""
    return [region for region in bucket.owned or () if region.numel]


def _device_types(group: ProcessGroup | None) -> set[str]:
    """The device types that `group` has a backend for."""
    config = dist.get_backend_config(group)
    return {part.partition(":")[0] for part in config.split(",")}


def _control_group(group: ProcessGroup) -> ProcessGroup:
    """A group of the same ranks that moves CPU memory: `group` itself where it can, else a Gloo group beside it."""
    if "cpu" in _device_types(group):
        return group
    members = dist.get_process_group_ranks(group)
    made = dist.new_group(members, backend="gloo", use_local_synchronization=True)
    assert isinstance(made, ProcessGroup)
    return made
