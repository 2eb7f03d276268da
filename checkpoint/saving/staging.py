"""Copies of what is to be saved, in one buffer that is used again for every save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from ..format.datafile import Item
from ..format.dtypes import in_use
from ..io.hostmemory import host_memory

_ALIGN = 64  # bytes


class Staging:
    """Memory on the CPU for copies of tensors: pinned where CUDA is in use, grown when needed, at most `limit` bytes.

    What was staged last is overwritten by the next `copy`.
    """

    def __init__(self, limit: int | None = None) -> None:
        self.limit = limit
        self._buffer: Tensor | None = None

    @property
    def nbytes(self) -> int:
        """Bytes set aside."""
        return 0 if self._buffer is None else self._buffer.numel()

    def fitting(self, items: Sequence[Item]) -> tuple[list[Item], list[Item]]:
        """`items` in two: those for which there is room, and those that must be written from where they are."""
        fits: list[Item] = []
        others: list[Item] = []
        total = 0
        for item in items:
            room = self.limit is None or total + _padded(item) <= self.limit
            (fits if room else others).append(item)
            total += _padded(item) if room else 0
        return fits, others

    def copy(self, items: Sequence[Item]) -> list[Item]:
        """The items with copies of their data. When it returns, the originals may change."""
        buffer = self._room(sum(_padded(item) for item in items))
        copies, at = [], 0
        for item in items:
            source = item.data.detach().resolve_conj().resolve_neg()  # the CPU would do so before the copy has ended
            target = buffer[at : at + item.nbytes].view(source.dtype).view(source.shape)
            target.copy_(source, non_blocking=True)
            copies.append(replace(item, data=target))
            at += _padded(item)
        for device in {item.data.device for item in items if item.data.is_cuda}:
            torch.cuda.synchronize(device)
        return copies

    def _room(self, size: int) -> Tensor:
        if self._buffer is None or self._buffer.numel() < size:
            self._buffer = None  # the old one first, so that there are never two
            self._buffer = host_memory(size, pin=in_use("cuda"))
        return self._buffer

    def free(self) -> None:
        """Give the memory back."""
        self._buffer = None


def _padded(item: Item) -> int:
    return -(-item.nbytes // _ALIGN) * _ALIGN
