"""How long a save in the background holds the training loop."""

from __future__ import annotations

import statistics
from typing import Any

import torch
from torch import Tensor

from ...checkpoint import Checkpointer
from .folders import fresh_folder, remove_folder
from .measuring import measured
from .settings import Settings
from .state import held, job


def stall(settings: Settings, rows: dict[str, Any]) -> None:
    """How long an asynchronous save holds the loop, beside a plain copy of this rank's tensors.

    `first` is what the medians leave out: the first save also sets the memory for its copies aside. Beside it how long
    PyTorch takes for as much (on a GPU pinned) memory, and the first copy to it.
    """
    opt = job(settings)
    tensors = held(opt)
    pinned = settings.device == "cuda"
    buffers: list[Tensor] = []

    def set_aside() -> None:
        buffers[:] = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t in tensors]

    def copy() -> None:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        if pinned:
            torch.cuda.synchronize()

    aside = measured(set_aside)[0]
    copies, stalls, totals = [], [], []
    place = fresh_folder(settings)
    with Checkpointer(place, keep_last=1, reuse=False) as checkpoints:
        for step in range(settings.rounds + 1):
            copies.append(measured(copy)[0])
            stalls.append(measured(lambda step=step: checkpoints.save(step, opt=opt))[0])  # type: ignore[misc]
            totals.append(stalls[-1] + measured(checkpoints.wait)[0])
    remove_folder(place)
    medians = [statistics.median(each[1:]) for each in (copies, stalls, totals)]
    rows["stall"] = dict(zip(("copy", "stall", "until written"), medians, strict=True))
    rows["stall"] |= {"x copy": medians[1] / medians[0], "bytes": sum(t.nbytes for t in tensors)}
    rows["stall"]["first"] = {"torch's memory": aside, "copy": copies[0], "stall": stalls[0]}
