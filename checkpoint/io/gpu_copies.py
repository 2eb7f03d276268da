"""The way of bytes between files and tensors on GPUs: through a few MiB of pinned memory, used again and again.

See [Note: on the way to a GPU].
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from .pagecache import IN_CACHE

# [Note: on the way to a GPU]
# A GPU takes bytes from pinned memory by itself, while the processor reads and checks the next ones. Pinning costs more
# than reading does, and what is pinned is lost to everybody else; so there are two small blocks for each thread, one
# to be read into while the other is copied from. A block is read into again when the copies from it have ended.
# Copies are queued on the stream that is current where the load was called: after all that the caller has queued there
# and before all that it will queue. The threads of a load would have the default stream instead, which waits for
# nobody. At the end, be it an error, the streams are waited for, so that no copy is on its way any more.
# What is more than a copy (to another dtype, to other strides, of a part only) goes to the GPU as it is and the rest is
# done there, on the same stream: a copy that has to rearrange on the CPU would not be from pinned memory.
# The way back, of a save that is not staged, is alike. But whoever gets a chunk may keep it for a while, so the memory
# of one is PyTorch's to give to a later one, when nobody has it any more.

PIECE = 4 * IN_CACHE  # bytes of a block
_IN_TURN = 2


class Devices:
    """The GPUs that tensors are on, and of each the stream that is current in the thread that makes this."""

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        found = {tensor.device for tensor in tensors if tensor.is_cuda}
        self._streams = {device: torch.cuda.current_stream(device) for device in found}
        self._pin = bool(found)

    def __bool__(self) -> bool:
        return bool(self._streams)

    def straight(self, tensor: Tensor) -> bool:
        """Whether a file can be read into the memory of `tensor`."""
        return tensor.device.type == "cpu"

    def enter(self) -> None:
        """Make these streams current in this thread, which must end with the work: no other stream is put back.

        Putting one back could be the first use of a GPU that belongs to another process.
        """
        for stream in self._streams.values():
            torch.cuda.set_stream(stream)

    def memory(self, size: int) -> Tensor:
        """New memory on the CPU of `size` bytes, pinned where there are GPUs and the system has as much to give."""
        if self._pin:
            try:
                return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=True)
            except RuntimeError as error:
                self._pin = False
                warnings.warn(f"a checkpoint is copied without pinned memory, more slowly: {error}", stacklevel=2)
        return torch.empty(size, dtype=torch.uint8, device="cpu")

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Copy, in the course of the stream where one of the two is on a GPU. No views that conjugate or negate."""
        target.copy_(source, non_blocking=bool({target.device, source.device} & self._streams.keys()))

    def bring(self, source: Tensor, device: torch.device) -> Tensor:
        """`source` on `device`: itself where it is there, else a copy as by `copy`."""
        return source.to(device, non_blocking=device in self._streams)

    def mark(self, devices: Iterable[torch.device]) -> list[Any]:
        """What is to be waited for (`synchronize()`) until all that has been queued on `devices` so far has ended."""
        streams = (self._streams[device] for device in devices if device in self._streams)
        return [stream.record_event(torch.cuda.Event(blocking=True)) for stream in streams]  # type: ignore[no-untyped-call]

    def wait(self) -> None:
        """Until all that has been queued has ended, on all of them even where one of them has failed."""
        with ExitStack() as each:
            for stream in self._streams.values():
                each.callback(stream.synchronize)


class Blocks:
    """Blocks of at most PIECE bytes that take turns: number n and number n + 2 are the same memory.

    Before bytes are put into number n, `free(n)`; after copies from it, `copied(n)`.
    """

    def __init__(self, devices: Devices, size: int) -> None:
        self._devices, self._size = devices, min(size, PIECE)
        turns = _IN_TURN if devices else 1
        self._memory: list[Tensor | None] = [None] * turns
        self._copies: list[list[Any]] = [[] for _ in range(turns)]
        self.first = 0  # the number that the next user begins with

    def memory(self, number: int) -> Tensor:
        """The bytes of block `number`, which need not be free."""
        turn = number % len(self._memory)
        found = self._memory[turn]
        if found is None:
            found = self._memory[turn] = self._devices.memory(self._size)
        return found

    def free(self, number: int) -> None:
        """Wait until the copies from block `number` have ended."""
        turn = number % len(self._memory)
        for copy in self._copies[turn]:
            copy.synchronize()
        self._copies[turn] = []

    def copied(self, number: int, devices: Collection[torch.device]) -> None:
        """Copies from block `number` to these devices have been queued."""
        self._copies[number % len(self._memory)] += self._devices.mark(devices)
