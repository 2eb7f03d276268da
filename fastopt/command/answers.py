"""What all commands have in common: errors of one sentence, an answer that is no, JSON on request."""

from __future__ import annotations

from typing import NoReturn

import click


class Failed(click.ClickException):
    """It could not be done. Shown as one sentence."""

    exit_code = 2


def say_no() -> NoReturn:
    """End with the exit code for an answer that is no."""
    raise click.exceptions.Exit(1)


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
