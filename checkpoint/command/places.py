"""What the commands have in common: where a checkpoint is, and what happens on an error."""

from __future__ import annotations

import functools
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import click

from ...command.answers import Failed
from ..errors import CheckpointError

_STEP = re.compile(r"(?P<root>|.*/)step-(?P<step>[0-9]{8,19})/*")


@dataclass(frozen=True)
class Place:
    """The root of a run's checkpoints, and a step or None."""

    root: str
    step: int | None


def place(url: str, step: int | None = None) -> Place:
    """The place that an argument URL and an option --step name."""
    match = _STEP.fullmatch(url)
    if match is None:
        return Place(url, step)
    named = int(match["step"])
    if step is not None and step != named:
        raise click.UsageError(f"the URL names step {named}, --step another: {step}")
    return Place(match["root"] or ".", named)


def command(function: Callable[..., Any]) -> Callable[..., Any]:
    """A command whose errors of storage and checkpoint are one sentence, without a traceback."""

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except CheckpointError as error:
            raise Failed(str(error)) from error
        except BrokenPipeError:  # who reads has enough: `| head`
            raise
        except (OSError, ImportError) as error:
            raise Failed(f"{type(error).__name__}: {error}") from error

    return run


url = click.argument("url")
step = click.option("--step", type=click.IntRange(0), help="The step; by default the newest.")
