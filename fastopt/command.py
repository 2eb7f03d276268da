"""The command `fastopt`. A new group of sub-commands is one line in COMMANDS."""

from __future__ import annotations

from importlib import import_module

import click

COMMANDS = {
    "checkpoint": "fastopt.checkpoint.command:checkpoint",
}
"""For each sub-command the module and the click command in it; the module is imported when it is asked for."""


class Commands(click.Group):
    """A group whose commands are those of COMMANDS."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Their names."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command of that name."""
        if cmd_name not in COMMANDS:
            return None
        module, name = COMMANDS[cmd_name].split(":")
        command = getattr(import_module(module), name)
        return command if isinstance(command, click.Command) else None


@click.command(cls=Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="fastopt", message="%(version)s")
def main() -> None:
    """fastopt: optimizers, sharding and checkpoints for PyTorch.

    \b
    Example:  fastopt checkpoint ls /data/run1
    """
