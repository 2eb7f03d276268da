"""Checkpoints: named boxes in safetensors files, saved and loaded by any number of processes.

    fastopt.checkpoint.save("/data/run1", step=1000, model=model, opt=opt, scheduler=scheduler, extra={"epoch": 3})
    resumed = fastopt.checkpoint.load("/data/run1", model=model, opt=opt, scheduler=scheduler)

Any fsspec URL will do. The format is described in docs/checkpoint-format.md.
"""

from .catalog import Entry, latest, steps
from .checkpointer import Checkpointer
from .errors import CheckpointError, StorageError
from .loading import Checkpoint, load
from .opening import open
from .retention import prune
from .saving import save
from .verifying import Verified, verify

__all__ = [
    "Checkpoint",
    "CheckpointError",
    "Checkpointer",
    "Entry",
    "StorageError",
    "Verified",
    "latest",
    "load",
    "open",
    "prune",
    "save",
    "steps",
    "verify",
]
