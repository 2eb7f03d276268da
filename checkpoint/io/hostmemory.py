"""New memory of the CPU: in large pages, and pinned where a GPU copies to it.

See [Note: the price of new memory].
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import mmap
import os
import sys
import warnings
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from .processors import processors

# [Note: the price of new memory]
# The system brings in new memory a page at a time, when it is first used. In pages of 4 KiB that takes two to five
# times as long as filling it from the page cache, so large ones (2 MiB) are asked for; it is a request, nothing more.
# What PyTorch pins comes from cudaHostAlloc, page after page on one thread, and its size is rounded up to a power of
# two: 17 GiB took 12 s and 32 GiB on the host of an H200, for which the training loop would stand still at its first
# save. Large pages brought in by four threads and registered afterwards took 0.8 s, and 17 GiB.
# A child that is forked gets zeros there instead of a share: sharing would make the parent's next write go to another
# page than the one that the GPU knows.

_LARGE = 2 << 20  # bytes of a large page
_AT_ONCE = 64 << 20  # bytes brought in by one call: few enough pages that PyTorch adds no threads of its own
_WIPE_ON_FORK = 18  # MADV_WIPEONFORK, since Linux 4.14; Python's mmap module does not name it
_PORTABLE = 1  # cudaHostRegisterPortable: pinned for all GPUs
_LIBC = ctypes.CDLL(None) if sys.platform == "linux" else None


def advise(address: int, size: int, advice: int) -> bool:
    """The system call madvise: whether it was taken. Unlike mmap.madvise it lets other threads run meanwhile."""
    return _LIBC is not None and _LIBC.madvise(ctypes.c_void_p(address), ctypes.c_size_t(size), advice) == 0


def in_large_pages(new: Tensor) -> Tensor:
    """`new`, for whose memory large pages have been asked for, if it is on the CPU: before anything is stored there."""
    memory = new.untyped_storage()
    if new.device.type == "cpu" and memory.nbytes() >= _LARGE and _LIBC is not None:
        first = memory.data_ptr() // mmap.PAGESIZE * mmap.PAGESIZE  # whole pages, so that neighbours become one range
        stop = -(-(memory.data_ptr() + memory.nbytes()) // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(first, stop - first, mmap.MADV_HUGEPAGE)
    return new


def host_memory(size: int, pin: bool) -> Tensor:
    """`size` bytes of new memory on the CPU, pinned if `pin`; a warning, and not pinned, where the system refuses that.

    It is given back when no tensor has it any more. Raises MemoryError where there is not as much.
    """
    if not size or _LIBC is None:
        return torch.empty(size, dtype=torch.uint8, device="cpu", pin_memory=pin)
    try:
        memory = _Memory(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    except OSError as error:
        if error.errno != errno.ENOMEM:
            raise
        raise MemoryError(f"the system has no {size} bytes of memory for copies") from error
    found = torch.frombuffer(memory, dtype=torch.uint8)
    in_large_pages(found)
    if pin:
        memory.pin(found)
    return found


class _Memory(mmap.mmap):
    """Private memory of this process, which a GPU may know of until it is given back."""

    _pinned_at: int | None = None
    _process = 0

    def pin(self, whole: Tensor) -> None:
        """Pin what lies here, all of which is `whole`. No copy may be on its way when the last tensor lets go of it."""
        address = whole.data_ptr()
        advise(address, len(self), _WIPE_ON_FORK)
        # by writing: MADV_POPULATE_WRITE takes twice as long; where the system gives no more threads, CUDA does it
        with contextlib.suppress(RuntimeError), ThreadPoolExecutor(processors()) as pool:
            for part in whole.tensor_split(tuple(range(_AT_ONCE, len(whole), _AT_ONCE))):
                pool.submit(part[:: mmap.PAGESIZE].zero_)
        runtime = _runtime()
        answer = runtime.cudaHostRegister(address, len(self), _PORTABLE)
        if int(answer):
            _forget_error()
            why = runtime.cudaGetErrorString(answer)
            warnings.warn(f"{len(self)} bytes for copies cannot be pinned, they are slower: {why}", stacklevel=4)
            return
        self._pinned_at, self._process = address, os.getpid()

    def __del__(self) -> None:
        if self._pinned_at is not None and self._process == os.getpid() and not sys.is_finalizing():
            _runtime().cudaHostUnregister(self._pinned_at)


def _runtime() -> Any:
    return torch.cuda.cudart()  # type: ignore[no-untyped-call]


def _forget_error() -> None:
    """CUDA remembers that something failed, and the next kernel of anybody would be told of it: let it be this one."""
    try:
        torch.ones(1, device="cuda").add_(1)  # what sets memory to 0 may be no kernel
    except RuntimeError:
        return
