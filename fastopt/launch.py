"""How modules of this package are started in processes of their own, alone or as ranks of torchrun on this machine."""

from __future__ import annotations

import os
import sys
from pathlib import Path


def alone(module: str, *arguments: str) -> list[str]:
    """The command that runs `module` in a new process, see `environment`."""
    return [sys.executable, "-m", module, *arguments]


def ranks(n: int, module: str, *arguments: str) -> list[str]:
    """The command that runs `module` on `n` ranks, see `environment`."""
    return alone("torch.distributed.run", "--standalone", f"--nproc-per-node={n}", "--module", module, *arguments)


def environment(**more: str) -> dict[str, str]:
    """That of this process and `more`, in which a new process finds this very package, installed or not."""
    path = [str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), **more}
