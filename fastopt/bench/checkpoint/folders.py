"""The folders that checkpoints go to."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import torch.distributed as dist

from .settings import Settings


def fresh_folder(settings: Settings) -> Path:
    """A new empty folder, the same on all ranks."""
    name = [tempfile.mkdtemp(dir=settings.folder) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    return Path(name[0])


def remove_folder(place: Path) -> None:
    """Remove it, when all ranks are done with it."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(place)
        os.sync()
    dist.barrier()
