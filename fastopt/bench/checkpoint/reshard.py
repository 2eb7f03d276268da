"""Loading on another number of ranks than saved."""

from __future__ import annotations

import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint
from torch.multiprocessing.spawn import spawn

from ... import Adam
from ...checkpoint import load, save
from .competitors import dcp, dtensors, raw
from .folders import fresh_folder, remove_folder
from .measuring import measured, read_raw
from .settings import Settings
from .state import STATES, Bag, held, job, shapes_of

Run = tuple[Callable[[], Any], int]
"""What is measured, and the bytes of its result if these are new memory."""


def reshard(settings: Settings, rows: dict[str, Any]) -> None:
    """What two ranks saved, loaded by one process: the floor reads the same bytes from two files."""
    opt = job(settings)
    state = dtensors(opt, settings)
    ours, theirs, plain = fresh_folder(settings), fresh_folder(settings), fresh_folder(settings)
    save(ours, step=1, opt=opt)
    dcp(theirs, state, False)["save"]()
    raw(plain, opt)["save"]()
    dist.barrier()
    if dist.get_rank() == 0:
        rows["reshard"] = alone(settings, ours, theirs, plain)
    dist.barrier()
    for place in (ours, theirs, plain):
        remove_folder(place)


def alone(settings: Settings, ours: Path, theirs: Path, plain: Path) -> dict[str, Any]:
    """One process of its own, since this one belongs to a process group."""
    with tempfile.TemporaryDirectory() as folder:
        result = Path(folder) / "result.json"
        spawn(_alone, (settings, ours, theirs, plain, result), nprocs=1)  # type: ignore[no-untyped-call]
        found: dict[str, Any] = json.loads(result.read_text())
    return found


def _alone(_: int, settings: Settings, ours: Path, theirs: Path, plain: Path, result: Path) -> None:
    torch.set_num_threads(settings.threads)
    dist.init_process_group("gloo", init_method=f"file://{result}.store", rank=0, world_size=1)
    opt = whole_state(settings)
    total = sum(t.nbytes for t in held(opt))
    runs = loads(settings, opt, total, ours, theirs, plain)
    times: dict[str, list[tuple[float, int]]] = {}
    for _ in range(settings.rounds + 1):
        for name, (run, new) in runs.items():
            times.setdefault(name, []).append(measured(run, new))
    medians = {name: statistics.median(t for t, _ in each[1:]) for name, each in times.items()}
    medians["raw, new memory"] *= 2  # half of the bytes were read
    memory = {name: statistics.median(m for _, m in each[1:]) / total for name, each in times.items()}
    rows = {
        name: {
            "seconds": seconds,
            "of floor": medians["raw, new memory" if name == "fastopt" else "raw"] / seconds,
            "memory": memory[name],
        }
        for name, seconds in medians.items()
    }
    result.write_text(json.dumps(rows))
    dist.destroy_process_group()


def whole_state(settings: Settings) -> Adam:
    """What two ranks had in halves, in one process."""
    model = Bag(shapes_of(settings), "cpu")
    opt = Adam(model.named_parameters(), lr=1e-3)
    for p in model.parameters():
        opt.state[p] = {key: torch.zeros(p.shape) for key in STATES} | {"step": 1}
    return opt


def loads(settings: Settings, opt: Adam, total: int, ours: Path, theirs: Path, plain: Path) -> dict[str, Run]:
    """Everybody's way to load `total` bytes of state."""
    module: Any = torch.distributed.checkpoint
    shapes = shapes_of(settings)
    state = {f"{key}.{name}": torch.zeros(shape) for name, shape in shapes.items() for key in STATES}
    files = sorted(plain.iterdir())
    cut = files[0].stat().st_size // 4
    flat = torch.zeros(total // 4)
    halves = [flat[:cut], flat[cut:]]

    def read_both() -> None:
        for file, half in zip(files, halves, strict=True):
            read_raw(file, [half])

    def load_anew() -> None:
        opt.clear_state()
        load(ours, opt=opt, rng=False)

    return {
        "raw": (read_both, 0),
        "DCP": (lambda: module.load(state, storage_reader=module.FileSystemReader(theirs)), 0),
        "fastopt in place": (lambda: load(ours, opt=opt, staging=0, rng=False), 0),
        "fastopt, checked during": (lambda: load(ours, opt=opt, check="during", rng=False), 0),
        "fastopt by copies": (lambda: load(ours, opt=opt, staging=1 << 60, rng=False), 0),
        "raw, new memory": (lambda: read_raw(files[0], [torch.empty(total // 8)]), total // 2),
        "fastopt": (load_anew, 0),
    }
