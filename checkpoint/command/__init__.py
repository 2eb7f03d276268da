"""`fastopt checkpoint`: look at checkpoints, check them, and make others of them."""

from __future__ import annotations

import click

from .cleaning import prune
from .looking import ls, show
from .making import consolidate, export_hf
from .reading import diff, verify

__all__ = ["checkpoint"]


@click.group()
def checkpoint() -> None:
    """Look at checkpoints, check them, and make others of them.

    URL is the folder of a run, or that of one step in it (/data/run1/step-00001000): a path, s3://..., or anything else
    that fsspec knows. Without a step it is the newest complete checkpoint; verify takes the newest, damaged or not.
    Exit codes: 0 all is well; 1 the answer is no (damaged, different, nothing there); 2 it could not be done, and a
    sentence says why.

    \b
    Example:  fastopt checkpoint verify s3://bucket/run1
    """


for command in (ls, show, verify, diff, consolidate, prune, export_hf):
    checkpoint.add_command(command)
