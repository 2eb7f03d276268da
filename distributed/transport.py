"""How bytes move between ranks: one small interface, and what `torch.distributed` offers behind it.

Copies between the GPUs of a node (copying.py) are another transport behind it. A transport allocates the buffers that
it moves, so they can be memory that the other ranks reach.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

# PyTorch 2.13 has renamed both; 2.11 has the old names only.
_reduce_scatter: Callable[..., Any] = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
_all_gather: Callable[..., Any] = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class Work(Protocol):
    """A collective under way."""

    def wait(self) -> Any:
        """Wait for it; on CUDA let the current stream wait."""


class Transport(Protocol):
    """Collectives that start at once and are waited for later. All tensors are flat and contiguous."""

    def empty(self, numel: int, like: Tensor) -> Tensor:
        """Memory for a buffer of `numel` elements beside `like` that stays, not initialised. Collective."""

    def passing(self, numel: int, like: Tensor) -> Tensor:
        """The same for a buffer that is sent once. Collective."""

    def reduce_scatter(self, mine: Tensor, full: Tensor) -> Work:
        """Sum `full` over the ranks; each gets its equal part in `mine`. `full` may be overwritten."""

    def all_gather(self, full: Tensor, mine: Tensor) -> Work:
        """Bring the `mine` of all ranks together in `full`, of which it may be this rank's part."""

    def all_to_all(self, received: Tensor, sent: Tensor, receives: Sequence[int], sends: Sequence[int]) -> Work:
        """Send `sends[r]` elements of `sent` to each rank `r`, and receive `receives[r]` from it."""


class GroupTransport:
    """The collectives of a process group, over its backend (NCCL or Gloo)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group

    def empty(self, numel: int, like: Tensor) -> Tensor:
        """Ordinary memory."""
        return torch.empty(numel, dtype=like.dtype, device=like.device)

    def passing(self, numel: int, like: Tensor) -> Tensor:
        """Ordinary memory."""
        return torch.empty(numel, dtype=like.dtype, device=like.device)

    def reduce_scatter(self, mine: Tensor, full: Tensor) -> Work:
        """One collective."""
        work: Work = _reduce_scatter(mine, full, group=self._group, async_op=True)
        return work

    def all_gather(self, full: Tensor, mine: Tensor) -> Work:
        """One collective, in place where `mine` lies in `full`."""
        work: Work = _all_gather(full, mine, group=self._group, async_op=True)
        return work

    def all_to_all(self, received: Tensor, sent: Tensor, receives: Sequence[int], sends: Sequence[int]) -> Work:
        """One collective."""
        work: Work = dist.all_to_all_single(
            received, sent, list(receives), list(sends), group=self._group, async_op=True
        )
        return work
