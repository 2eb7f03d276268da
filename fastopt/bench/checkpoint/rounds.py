"""Save and load on as many ranks as saved, everybody in turns."""

from __future__ import annotations

import gc
import statistics
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ...checkpoint import load, save
from ...checkpoint.io.processors import processors
from .competitors import dcp, dtensors, raw, torch_save
from .folders import fresh_folder, remove_folder
from .measuring import measured, read_raw
from .settings import Settings
from .state import held, job


def rounds(settings: Settings, rows: dict[str, Any]) -> None:
    """Save and warm load of all competitors, in turns."""
    opt = job(settings)
    mine = sum(t.nbytes for t in held(opt))
    state = dtensors(opt, settings)
    gc.freeze()
    rows["bytes of a rank"] = mine
    rows["threads of a load"] = threads = processors(settings.ranks)
    times: dict[str, list[float]] = {}
    memory: dict[str, list[int]] = {}

    def note(name: str, result: tuple[float, int]) -> None:
        times.setdefault(name, []).append(result[0])
        memory.setdefault(name, []).append(result[1])

    def turn_of(name: str, place: Path) -> None:
        if name == "fastopt":
            note("fastopt save", measured(lambda: save(place, step=1, opt=opt)))
            note("fastopt load in place", measured(lambda: load(place, opt=opt, staging=0)))
            note("fastopt load, checked during", measured(lambda: load(place, opt=opt, check="during")))
            note("fastopt load by copies", measured(lambda: load(place, opt=opt, staging=1 << 60)))
            note("fastopt load", measured(lambda: (opt.clear_state(), load(place, opt=opt))))
            return
        if name.startswith("DCP"):
            tools = dcp(place, state, name == "DCP HF")
        else:
            tools = raw(place, opt) if name == "raw" else torch_save(place, opt)
        note(f"{name} save", measured(tools["save"]))
        note(f"{name} load", measured(tools["load"]))
        if name == "raw":
            file = place / f"{dist.get_rank()}.bin"
            sizes = [t.numel() for t in held(opt)]
            note("raw load, new memory", measured(lambda: read_raw(file, [torch.empty(n) for n in sizes]), mine))
            if threads > 1:
                note("raw load, our threads", measured(lambda: read_raw(file, held(opt), threads)))

    for turn in range(settings.rounds + 1):
        for name in ("raw", "torch.save", "DCP", "DCP HF", "fastopt"):
            place = fresh_folder(settings)
            turn_of(name, place)
            remove_folder(place)
        if turn == 0:  # the first round finds cold memory
            times.clear()
            memory.clear()
            gc.freeze()  # all has been imported and made: looking through it would take longer than what is measured
    for name, seconds in times.items():
        floor = (
            "raw save" if "save" in name.split() else "raw load, new memory" if name == "fastopt load" else "raw load"
        )
        rows[name] = {
            "seconds": statistics.median(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "of floor": statistics.median(times[floor]) / statistics.median(seconds),
            "memory": statistics.median(memory[name]) / mine,
        }
