"""Which executor was asked for, and which one runs a group."""

from __future__ import annotations

import os
from typing import NamedTuple

#: Environment variable that names the executor of every optimizer that does not name its own.
VARIABLE = "FASTOPT_ENGINE"

#: `eager` calls the cbs as they are; the others run what was recorded: `foreach` on any device, `llvm` on CPUs,
#: `triton` on CUDA. Where one of those two cannot, `foreach` runs, which is also what there is without them.
EXECUTORS = ("eager", "foreach", "llvm", "triton")

#: Why an executor runs that nobody has asked for by name.
DEFAULT = "the default for its device"
NOT_COMPILED = f"{DEFAULT}, as it has an operation or dtype that is not compiled"
WITHOUT_LLVM = f"{DEFAULT} without compiled loops; for these on CPUs `pip install fastopt[cpu]`"


class Choice(NamedTuple):
    """The executor of one parameter group, and why it is that one."""

    group: int
    executor: str
    reason: str


def requested(name: str | None) -> tuple[str | None, str]:
    """The executor that `name` or else the environment asks for, and who asked; None for the best one there is.

    Raises:
        ValueError: there is no executor of that name.
    """
    reason = "chosen by engine="
    if name is None:
        name, reason = os.environ.get(VARIABLE), f"chosen by {VARIABLE}"
    if not name:
        return None, DEFAULT
    if name not in EXECUTORS:
        raise ValueError(f"engine {name!r} ({reason}) does not exist: choose from {', '.join(EXECUTORS)}")
    return name, reason
