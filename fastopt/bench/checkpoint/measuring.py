"""Time and memory of work on all ranks, and the raw access to files that sets the floor."""

from __future__ import annotations

import gc
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


def resident() -> tuple[int, int]:
    """Bytes resident now, and at most since the peak was reset (`clear_refs`)."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) << 10, int(fields["VmHWM"].split()[0]) << 10


def measured(work: Callable[[], Any], result_bytes: int = 0) -> tuple[float, int]:
    """Seconds of the slower rank, and the growth of memory on this one beyond the bytes of the result."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()[0]
    dist.barrier()
    start = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - start)
    grown = resident()[1] - before - result_bytes
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item(), grown


def write_raw(path: Path, tensors: list[Tensor]) -> None:
    """All bytes, then fsync."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    for tensor in tensors:
        view = memoryview(tensor.view(torch.uint8).numpy().data)
        while view:
            view = view[os.write(handle, view) :]
    os.fsync(handle)
    os.close(handle)


def read_raw(path: Path, tensors: list[Tensor], threads: int = 1) -> None:
    """All bytes, into `tensors`; each thread reads its share of every tensor."""
    views = [memoryview(tensor.view(torch.uint8).numpy().data) for tensor in tensors]
    starts = [0, *accumulate(len(view) for view in views)]

    def share(thread: int) -> None:
        with open(path, "rb", buffering=0) as file:
            for start, whole in zip(starts, views, strict=False):
                first, last = (len(whole) * k // threads for k in (thread, thread + 1))
                view, at = whole[first:last], start + first
                while view:
                    n = os.preadv(file.fileno(), [view], at)
                    view, at = view[n:], at + n

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(share, range(threads)))
