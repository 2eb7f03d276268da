"""`fastopt doctor`."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator, Sequence

import click
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..command.answers import Number, as_json, say_no
from ..command.printing import console, print_json, say
from .collectives import collectives
from .findings import Finding, summary
from .hardware import hardware
from .software import software
from .steps import steps
from .stores import stores

_COLOURS = {"ok": "green", "note": "yellow", "broken": "bold red"}


@click.command()
@click.option("--no-ranks", is_flag=True, help="Leave out the test of collectives, which starts processes.")
@click.option("--ranks", type=click.IntRange(2), default=2, show_default=True, help="How many ranks it starts.")
@click.option("--timeout", type=Number(1), default=60.0, show_default=True, help="Seconds that the ranks have.")
@click.option("--url", help="Also save, load and remove a small checkpoint under this URL.")
@as_json
def doctor(no_ranks: bool, ranks: int, timeout: float, url: str | None, as_json: bool) -> None:
    """Say what is installed, which executor will run on each device and why, and what is broken.

    Makes small steps, saves a small checkpoint in the temporary folder, and lets two ranks on this machine talk to each
    other under torchrun. Exit codes: 0 all is well; 1 something is broken.

    \b
    Examples:
      fastopt doctor
      fastopt doctor --json --no-ranks
      fastopt doctor --url s3://bucket/run1
    """
    areas: dict[str, Callable[[], Iterator[Finding]]] = {
        "looking at packages": software,
        "looking at devices": hardware,
        "stepping": steps,
        "saving and loading": lambda: stores(url),
    }
    if not no_ranks:
        areas[f"starting {ranks} ranks"] = lambda: collectives(ranks, timeout)
    findings: list[Finding] = []
    for what, area in areas.items():
        with _busy(what):
            findings += area()
    if as_json:
        print_json(summary(findings))
    else:
        _print(findings)
    if any(finding.state == "broken" for finding in findings):
        say_no()


@contextlib.contextmanager
def _busy(what: str) -> Iterator[None]:
    """Shows on a terminal what takes time."""
    if not sys.stderr.isatty():
        yield
        return
    with Console(stderr=True).status(what):
        yield


def _print(findings: Sequence[Finding]) -> None:
    table = Table.grid(padding=(0, 2))
    for _ in range(4):
        table.add_column(overflow="fold")  # a long path is worth its end
    area = ""
    for finding in findings:
        table.add_row(
            Text(finding.area if finding.area != area else "", style="bold"),
            Text(finding.name),
            Text(finding.state, style=_COLOURS[finding.state]),
            Text(finding.text),
        )
        area = finding.area
    console().print(table)
    broken = [finding for finding in findings if finding.state == "broken"]
    for finding in broken:
        if finding.detail:
            say(f"\n{finding.area}, {finding.name}:\n{finding.detail}")
    say(f"\nbroken: {'; '.join(f.name for f in broken)}" if broken else "\nnothing is broken")
