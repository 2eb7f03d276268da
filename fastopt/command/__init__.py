"""The command `fastopt`. A new sub-command is an entry in COMMANDS."""

from __future__ import annotations

import sys
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NamedTuple

import click

from .. import __version__
from .answers import Failed
from .ending import ended_by_others


class Place(NamedTuple):
    """Where the click command of a sub-command is, and what it does in one line."""

    module: str
    name: str
    short: str


COMMANDS = {
    "bench": Place("fastopt.bench.command", "bench", "Time steps, sharded training and checkpoints."),
    "checkpoint": Place("fastopt.checkpoint.command", "checkpoint", "Look at checkpoints, check them, convert them."),
    "doctor": Place("fastopt.doctor.command", "doctor", "Say what is installed, what will run, and what is broken."),
    "plan": Place("fastopt.distributed.command", "plan", "Say what sharding a model will cost, without any ranks."),
}
"""The sub-commands. Their modules import torch, so each is imported only when it runs."""


class Commands(click.Group):
    """A group whose commands are names and short helps, which help and completion show, until one of them runs."""

    @ended_by_others()
    def make_context(self, *args: Any, **kwargs: Any) -> click.Context:
        """Read the options; --help and --version end here."""
        return super().make_context(*args, **kwargs)

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command. What the system refuses is one sentence."""
        if isinstance(sys.stdout, TextIOWrapper) and sys.stdout.errors == "strict":
            sys.stdout.reconfigure(errors="backslashreplace")  # a path may hold what the terminal cannot show
        try:
            with ended_by_others():
                return super().invoke(ctx)
        except OSError as error:
            raise Failed(f"{type(error).__name__}: {error}") from error

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """The command that `args` start with, itself, and the rest of them."""
        name, _, rest = super().resolve_command(ctx, args)
        if name is None:
            return name, None, rest
        try:
            command = getattr(import_module(COMMANDS[name].module), COMMANDS[name].name)
        except ModuleNotFoundError as error:
            raise Failed(f"{error}, which fastopt needs: pip install it, or fastopt again") from error
        return name, command if isinstance(command, click.Command) else None, rest


@click.command(
    cls=Commands,
    commands=[click.Command(name, short_help=place.short) for name, place in COMMANDS.items()],
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.version_option(__version__, message="%(version)s")
def main() -> None:
    """fastopt: optimizers, sharding and checkpoints for PyTorch.

    \b
    Example:  fastopt doctor
    """
