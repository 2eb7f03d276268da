"""Loading into tensors that are there already, on a CPU or a GPU."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...checkpoint import load, save
from .folders import fresh_folder, remove_folder
from .measuring import measured, read_raw, write_raw
from .settings import Settings
from .state import held, job


def live(settings: Settings, rows: dict[str, Any]) -> None:
    """Warm loads in place, beside the least that this takes: reading the bytes, and on a GPU copying them there."""
    opt = job(settings)
    tensors = held(opt)
    on_host = [t.to("cpu").pin_memory() for t in tensors] if settings.device == "cuda" else tensors
    place = fresh_folder(settings)
    file = Path(place) / f"{dist.get_rank()}.bin"
    write_raw(file, on_host)
    save(place / "ours", step=1, opt=opt)

    def raw() -> None:
        read_raw(file, on_host)
        if settings.device == "cuda":
            for tensor, host in zip(tensors, on_host, strict=True):
                tensor.copy_(host, non_blocking=True)
            torch.cuda.synchronize()

    runs = {
        "raw": raw,
        "fastopt in place": lambda: load(place / "ours", opt=opt, staging=0),
        "fastopt, checked during": lambda: load(place / "ours", opt=opt, check="during"),
    }
    times: dict[str, list[float]] = {}
    for turn in range(settings.rounds + 1):
        for name, run in runs.items():
            seconds = measured(run)[0]
            if turn:  # the first round finds cold memory
                times.setdefault(name, []).append(seconds)
    remove_folder(place)
    medians = {name: statistics.median(each) for name, each in times.items()}
    rows["live"] = {
        name: {"seconds": seconds, "of floor": medians["raw"] / seconds} for name, seconds in medians.items()
    } | {"bytes of a rank": sum(t.nbytes for t in tensors)}
