"""Loading into tensors that are there already, on a CPU or a GPU."""

from __future__ import annotations

import gc
import statistics
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...checkpoint import load, save
from ...checkpoint.io.processors import processors
from .folders import fresh_folder, remove_folder
from .measuring import measured, read_raw, write_raw
from .settings import Settings
from .state import held, job


def live(settings: Settings, rows: dict[str, Any]) -> None:
    """Warm loads in place, beside the least that this takes: reading the bytes, and on a GPU copying them there.

    `seconds` are medians, `first` is the turn that the medians leave out: it finds cold memory, and on a GPU pins some.
    """
    opt = job(settings)
    tensors = held(opt)
    on_gpu = settings.device == "cuda"
    on_host = [t.to("cpu").pin_memory() for t in tensors] if on_gpu else tensors
    place = fresh_folder(settings)
    file = Path(place) / f"{dist.get_rank()}.bin"
    write_raw(file, on_host)
    save(place / "ours", step=1, opt=opt)

    threads = processors(settings.ranks)

    def read(threads: int = 1) -> None:
        read_raw(file, on_host, threads)

    def copy() -> None:
        for tensor, host in zip(tensors, on_host, strict=True):
            tensor.copy_(host, non_blocking=True)
        torch.cuda.synchronize()

    def both() -> None:
        read()
        if on_gpu:
            copy()

    runs: dict[str, Callable[[], Any]] = {"raw": both}
    if on_gpu:
        runs |= {"raw read": read, "copy from pinned memory": copy}
    if threads > 1:
        runs["raw read, our threads"] = lambda: read(threads)
    runs |= {
        "fastopt in place": lambda: load(place / "ours", opt=opt, staging=0),
        "fastopt, checked during": lambda: load(place / "ours", opt=opt, check="during"),
        "fastopt, by copies": lambda: load(place / "ours", opt=opt, staging=1 << 60),
    }
    gc.freeze()  # see `rounds`
    times: dict[str, list[float]] = {}
    grown: dict[str, int] = {}
    pinned: dict[str, int] = {}
    for _ in range(settings.rounds + 1):
        for name, run in runs.items():
            before = pinned_bytes()
            seconds, growth = measured(run)
            times.setdefault(name, []).append(seconds)
            grown[name] = max(growth, grown.get(name, 0))
            pinned[name] = pinned.get(name, 0) + pinned_bytes() - before
    remove_folder(place)
    total = sum(t.nbytes for t in tensors)
    medians = {name: statistics.median(each[1:]) for name, each in times.items()}
    rows["live"] = {
        name: {
            "seconds": seconds,
            "first": times[name][0],
            "of floor": medians["raw"] / seconds,
            "memory": grown[name] / total,
            "pinned": pinned[name],
        }
        for name, seconds in medians.items()
    } | {"bytes of a rank": total, "threads of a load": threads}


def pinned_bytes() -> int:
    """Bytes of pinned memory that PyTorch holds for this process, used or not."""
    if not torch.cuda.is_available():
        return 0
    stats = torch.cuda.host_memory_stats()  # of the two names the older releases have the first for what is held
    return max(int(stats.get(f"{name}_bytes.current", 0)) for name in ("reserved", "allocated"))
