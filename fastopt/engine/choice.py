"""Which executor runs a chain, and why."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

from .eager import run_eager
from .work import GroupWork, Reduce

#: Environment variable that names the executor of every optimizer that does not name its own.
VARIABLE = "FASTOPT_ENGINE"


class Executor(Protocol):
    """Runs a chain of callbacks on the tensors of a step, in place."""

    def __call__(
        self, cbs: Sequence[Callable[..., Any]], work: Sequence[GroupWork], reduce: Reduce | None = None
    ) -> None: ...


class Choice(NamedTuple):
    """The executor of one parameter group."""

    group: int
    executor: str
    reason: str


_EXECUTORS: dict[str, Executor] = {"eager": run_eager}


def choose(name: str | None) -> tuple[str, Executor, str]:
    """Name, function and reason of the executor for `name`; None asks the environment, then takes the best there is.

    Raises:
        ValueError: there is no executor of that name.
    """
    reason = "chosen by engine="
    if name is None:
        name, reason = os.environ.get(VARIABLE), f"chosen by {VARIABLE}"
    if not name:
        name, reason = "eager", "the only executor there is"
    if name not in _EXECUTORS:
        raise ValueError(f"engine {name!r} ({reason}) does not exist: choose from {', '.join(_EXECUTORS)}")
    return name, _EXECUTORS[name], reason
