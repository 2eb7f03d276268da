"""What all commands have in common: errors of one sentence, an answer that is no, JSON on request."""

from __future__ import annotations

import math
from typing import Any, NoReturn

import click


class Failed(click.ClickException):
    """It could not be done. Shown as one sentence."""

    exit_code = 2


def say_no() -> NoReturn:
    """End with the exit code for an answer that is no."""
    raise click.exceptions.Exit(1)


class Number(click.FloatRange):
    """A finite number in a range."""

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """The number; `nan`, which is in every range, and `inf` are none."""
        found = float(super().convert(value, param, ctx))
        if not math.isfinite(found):
            self.fail(f"{value} is not a finite number.", param, ctx)
        return found


as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON, for programs.")
