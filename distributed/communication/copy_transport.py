"""A transport of copies between GPUs that reach each other's memory, as over NVLink: copy engines move the bytes.

[Note: copies]
NCCL moves bytes with kernels, which hold multiprocessors while they wait for other ranks and for the wire, and the
model's matrix products are slower for it. Here buckets lie in *symmetric memory*, which every rank of the node has
mapped, and a rank fetches what it wants from the others by copies, which no multiprocessor takes part in. A barrier of
one small block before the copies says that all ranks have filled their buffers, one after them that they may write into
these again.

Buffers that are sent once are taken in turns from `SLOTS` pieces of symmetric memory, which stay. Parts of unequal
length (a layout of whole parameters) go over the group's backend.
All ranks issue the same barriers in the same order, so that none of them waits for one that has not been issued.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from .transport import GroupTransport, Work

SLOTS = 2
"""Buffers for gradients that are under way: as many as may be alive at once, see reductions.py."""

PATIENCE = timedelta(minutes=10)
"""After this time a barrier gives up, and with it the process, as collectives of NCCL do."""


class Copied:
    """Copies under way."""

    def __init__(self, done: torch.cuda.Event) -> None:
        self._done = done

    def wait(self) -> None:
        """Let the current stream wait for them."""
        torch.cuda.current_stream().wait_event(self._done)


class CopyTransport(GroupTransport):
    """Copies between the GPUs of one group.

    Args:
        group: its ranks, all of them on one node.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        super().__init__(group)
        self._symmetric = group
        self._rank, self._world_size = dist.get_rank(group), dist.get_world_size(group)
        self._device = torch.device("cuda", torch.cuda.current_device())
        self._shared: dict[int, Any] = {}
        self._slots: list[Tensor | None] = [None] * SLOTS
        self._turn = 0
        self._stream: Any = torch.cuda.Stream(self._device, priority=-1)  # type: ignore[no-untyped-call]
        self._peers: dict[tuple[int, int, int, int, torch.dtype], Tensor] = {}

    def empty(self, numel: int, like: Tensor) -> Tensor:
        """Symmetric memory. Collective."""
        if not numel or like.device != self._device:
            return super().empty(numel, like)
        from torch.distributed import _symmetric_memory as symmetric

        made: Tensor = symmetric.empty(numel, dtype=like.dtype, device=self._device)
        try:
            handle = symmetric.rendezvous(made, self._symmetric)
        except RuntimeError as error:
            raise RuntimeError(
                "transport='copy' needs GPUs that reach each other's memory: pass a group of the ranks of one node, or "
                "a mesh of two dimensions (nodes, GPUs of a node), or leave transport out"
            ) from error
        self._shared[made.untyped_storage().data_ptr()] = handle
        return made

    def passing(self, numel: int, like: Tensor) -> Tensor:
        """The next slot; its last contents must have been waited for."""
        if not numel or like.device != self._device:
            return super().passing(numel, like)
        size = numel * like.dtype.itemsize
        self._turn = (self._turn + 1) % SLOTS
        slot = self._slots[self._turn]
        if slot is None or slot.numel() < size:
            slot = self._slots[self._turn] = self.empty(size, like.new_empty(0, dtype=torch.uint8))
        return slot[:size].view(like.dtype)

    def reduce_scatter(self, mine: Tensor, full: Tensor) -> Work:
        """The parts are fetched and summed in the precision of a kernel, not in that of the wire."""
        handle = self._handle(full)
        if handle is None:
            return super().reduce_scatter(mine, full)
        received = full.new_empty(full.numel())
        self._fetch(handle, received, full, mine.numel())
        torch.sum(received.view(self._world_size, -1), dim=0, out=mine)
        return self._done()

    def all_gather(self, fulls: Sequence[Tensor], mines: Sequence[Tensor]) -> Work:
        """In place, in buffers that lie together; the copies run beside what the current stream is given next."""
        handle = self._handle(fulls[0])
        together = all(self._handle(full) is handle for full in fulls)
        both = list(zip(fulls, mines, strict=True))
        in_place = all(self._part(full, self._rank, mine.numel()).data_ptr() == mine.data_ptr() for full, mine in both)
        if handle is None or not together or not in_place:
            return super().all_gather(fulls, mines)
        self._barrier(handle)
        self._stream.wait_stream(torch.cuda.current_stream(self._device))
        with torch.cuda.stream(self._stream):
            for full, mine in both:
                size = mine.numel()
                for other in self._others():
                    peer = self._peer(handle, full, other, other * size, size)
                    self._part(full, other, size).copy_(peer, non_blocking=True)
            self._barrier(handle)
            return self._done()

    def all_to_all(self, received: Tensor, sent: Tensor, receives: Sequence[int], sends: Sequence[int]) -> Work:
        """Equal parts are fetched."""
        handle = self._handle(sent)
        if handle is None or len({*receives, *sends}) != 1:
            return super().all_to_all(received, sent, receives, sends)
        self._fetch(handle, received, sent, receives[0])
        return self._done()

    def _fetch(self, handle: Any, received: Tensor, full: Tensor, size: int) -> None:
        """Bring this rank's part of `full` from all ranks, one after the other into `received`."""
        self._barrier(handle)
        own = self._part(full, self._rank, size)
        self._part(received, self._rank, size).copy_(own, non_blocking=True)
        for other in self._others():
            peer = self._peer(handle, full, other, self._rank * size, size)
            self._part(received, other, size).copy_(peer, non_blocking=True)
        self._barrier(handle)

    def _others(self) -> list[int]:
        """The other ranks; no two ranks begin with the same one."""
        return [(self._rank + step) % self._world_size for step in range(1, self._world_size)]

    def _handle(self, full: Tensor) -> Any:
        """What reaches the other ranks' memory of a buffer; None where it is not symmetric."""
        return self._shared.get(full.untyped_storage().data_ptr())

    def _peer(self, handle: Any, full: Tensor, other: int, start: int, size: int) -> Tensor:
        """Elements `start` to `start + size` of what `full` is on another rank."""
        at = int(full.storage_offset()) + start
        key = full.untyped_storage().data_ptr(), other, at, size, full.dtype
        if key not in self._peers:
            self._peers[key] = handle.get_buffer(other, (size,), full.dtype, storage_offset=at)
        return self._peers[key]

    def _part(self, full: Tensor, rank: int, size: int) -> Tensor:
        return full[rank * size : (rank + 1) * size]

    def _barrier(self, handle: Any) -> None:
        """Let the current stream wait until all ranks' streams have come here."""
        handle.barrier(channel=0, timeout_ms=int(PATIENCE.total_seconds() * 1000))

    def _done(self) -> Copied:
        done: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
        done.record()
        return Copied(done)


def copies(group: dist.ProcessGroup, devices: set[torch.device]) -> CopyTransport:
    """A transport of copies for parameters on `devices`.

    Raises:
        ValueError: they are not on this process's GPU.
    """
    if devices != {torch.device("cuda", torch.cuda.current_device() if torch.cuda.is_available() else 0)}:
        where = ", ".join(sorted(map(str, devices)))
        raise ValueError(
            f"transport='copy' moves memory between GPUs, one per rank: the parameters are on {where}; move the model "
            f"to the GPU of torch.cuda.set_device"
        )
    return CopyTransport(group)
