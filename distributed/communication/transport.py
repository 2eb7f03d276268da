"""How bytes move between ranks: one small interface, and what `torch.distributed` offers behind it.

Copies between the GPUs of a node (copy_transport.py) are another transport behind it. A transport allocates the buffers
that it moves, so they can be memory that the other ranks reach.

[Note: names in Gloo]
The two worker threads of a Gloo process group note the name of the last collective that they have finished in one
string, without a lock. Names of up to 15 characters lie in the string itself, and a torn one harms nobody. That of the
coalesced all-gather is longer and lies on the heap: two workers that are done at the same time free it twice, and the
process dies of it (seen with PyTorch 2.13). So over Gloo nothing coalesced is used: what several buffers get comes in
one buffer, as it does within Gloo's own coalesced gather, and is copied to its places when it is waited for.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import AllgatherOptions, ReduceScatterOptions


def _reduce_scatter(group: Any, mine: Tensor, full: Tensor) -> Work:
    """The group's own method: there are many buckets, and `dist.reduce_scatter_tensor` takes as long again."""
    options = ReduceScatterOptions()
    options.asyncOp = True
    # PyTorch 2.13 has renamed this and what follows; 2.11 has the old names only.
    call = getattr(group, "reduce_scatter_single", None) or group._reduce_scatter_base
    work: Work = call(mine, full, options)
    return work


def _all_gather(group: Any, full: Tensor, mine: Tensor) -> Work:
    call = getattr(group, "all_gather_single", None) or group._allgather_base
    work: Work = call(full, mine, _gathering())
    return work


def over_gloo(group: Any, device: torch.device) -> bool:
    """Whether what lies on `device` goes over Gloo."""
    return bool(group._get_backend(device).name() == "gloo")


def _all_gather_several(group: Any, fulls: Sequence[Tensor], mines: Sequence[Tensor]) -> Work:
    """As `_all_gather` for each of several buffers, in one collective."""
    if over_gloo(group, fulls[0].device):
        return _Together(group, fulls, mines)
    call = getattr(group, "all_gather_single_coalesced", None) or group.allgather_into_tensor_coalesced
    work: Work = call(list(fulls), list(mines), _gathering())
    return work


class WaitedOnce:
    """A collective of Gloo, whose `wait` may write the result: anew each time, on the stream of whoever waits.

    Here the first wait does, and later ones wait for what it has written.
    """

    def __init__(self, work: Work, device: torch.device) -> None:
        self._work, self._device = work, device
        self._waited = False
        self._written: Any = None

    def wait(self) -> None:
        """Wait for it; on CUDA let the current stream wait."""
        if not self._waited:
            self._work.wait()
            self._waited = True
            if self._device.type == "cuda":
                self._written = torch.cuda.Event()  # type: ignore[no-untyped-call]
                self._written.record(torch.cuda.current_stream(self._device))
        elif self._written is not None:
            torch.cuda.current_stream(self._device).wait_event(self._written)


class _Together:
    """One gather of what several buffers get, see [Note: names in Gloo]."""

    def __init__(self, group: Any, fulls: Sequence[Tensor], mines: Sequence[Tensor]) -> None:
        self._fulls, self._sizes = fulls, [mine.numel() for mine in mines]
        mine = torch.cat(list(mines))
        self._received = mine.new_empty(group.size(), mine.numel())
        self._work = _all_gather(group, self._received.view(-1), mine)

    def wait(self) -> None:
        """Wait for it, and bring everything to its place."""
        self._work.wait()
        for full, part in zip(self._fulls, self._received.split_with_sizes(self._sizes, 1), strict=True):
            full.view(part.shape).copy_(part)


def _gathering() -> AllgatherOptions:
    options = AllgatherOptions()
    options.asyncOp = True
    return options


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

    def all_gather(self, fulls: Sequence[Tensor], mines: Sequence[Tensor]) -> Work:
        """Bring each of `mines` of all ranks together in its place in `fulls`, of which it may be this rank's part."""

    def all_to_all(self, received: Tensor, sent: Tensor, receives: Sequence[int], sends: Sequence[int]) -> Work:
        """Send `sends[r]` elements of `sent` to each rank `r`, and receive `receives[r]` from it."""


class GroupTransport:
    """The collectives of a process group, over its backend (NCCL or Gloo)."""

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self._group = group or (dist.group.WORLD if dist.is_available() and dist.is_initialized() else None)

    def empty(self, numel: int, like: Tensor) -> Tensor:
        """Ordinary memory."""
        return torch.empty(numel, dtype=like.dtype, device=like.device)

    def passing(self, numel: int, like: Tensor) -> Tensor:
        """Ordinary memory."""
        return torch.empty(numel, dtype=like.dtype, device=like.device)

    def reduce_scatter(self, mine: Tensor, full: Tensor) -> Work:
        """One collective."""
        return self._started(_reduce_scatter(self._group, mine, full), mine)

    def all_gather(self, fulls: Sequence[Tensor], mines: Sequence[Tensor]) -> Work:
        """One collective, in place where `mines` lie in `fulls`: NCCL makes one launch of it, Gloo one message."""
        if len(fulls) == 1:
            return self._started(_all_gather(self._group, fulls[0], mines[0]), fulls[0])
        return self._started(_all_gather_several(self._group, fulls, mines), fulls[0])

    def all_to_all(self, received: Tensor, sent: Tensor, receives: Sequence[int], sends: Sequence[int]) -> Work:
        """One collective."""
        work: Work = dist.all_to_all_single(
            received, sent, list(receives), list(sends), group=self._group, async_op=True
        )
        return self._started(work, received)

    def _started(self, work: Work, result: Tensor) -> Work:
        """`work`, as it may be waited for: more than once, on several streams."""
        return WaitedOnce(work, result.device) if over_gloo(self._group, result.device) else work
