"""Checkpoints: named boxes in safetensors files, saved and loaded by any number of processes.

    fastopt.checkpoint.save("/data/run1", step=1000, model=model, opt=opt, scheduler=scheduler, extra={"epoch": 3})
    resumed = fastopt.checkpoint.load("/data/run1", model=model, opt=opt, scheduler=scheduler)

Any fsspec URL will do. The format is described in docs/checkpoint-format.md.
"""

from .catalog import Entry, latest, steps
from .checkpointer import Checkpointer
from .errors import CheckpointError, StorageError
from .loading.loading import Checkpoint, load
from .loading.opening import open
from .offline.consolidation import consolidate
from .offline.difference import Difference, diff
from .offline.export import export_hf
from .retention import prune
from .saving.saving import save
from .verifying import Verified, verify

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "Difference",
    "Entry",
    "StorageError",
    "Verified",
    "consolidate",
    "diff",
    "export_hf",
    "latest",
    "load",
    "open",
    "prune",
    "save",
    "steps",
    "verify",
]
