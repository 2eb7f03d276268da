"""How the commands show things: tables and text on stdout, progress on stderr where that is a terminal."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

_WIDE = 200  # columns where nobody says how many there are, so that programs get a row per line


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command how it ends."""
        raise  # the error that this is called for


def console() -> Console:
    """Writes to stdout as it is now."""
    terminal = sys.stdout.isatty()
    return _Console(file=sys.stdout, width=None if terminal else _WIDE, highlight=False, soft_wrap=not terminal)


def say(text: str) -> None:
    """A line of plain text. A narrow terminal wraps it; what is copied from there is still one line."""
    console().print(Text(text), soft_wrap=True)


def print_json(value: Any) -> None:
    """One JSON document. Numbers that JSON does not have are text there: "inf", "-inf", "nan"."""
    print(json.dumps(_strict(value), indent=2, allow_nan=False))


def _strict(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _strict(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_strict(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def print_table(columns: Sequence[str], rows: Sequence[Sequence[Any]], title: str | None = None) -> None:
    """A table; columns of numbers (`int`, `float` and `Size`) to the right."""
    table = Table(box=box.SIMPLE, title=title, title_justify="left", pad_edge=False, show_edge=False)
    for number, column in enumerate(columns):
        right = bool(rows) and all(isinstance(row[number], int | float | Size) for row in rows)
        table.add_column(column, justify="right" if right else "left", overflow="fold")
    for row in rows:
        table.add_row(*(Text(_text(cell)) for cell in row))
    console().print(table)


def _text(cell: Any) -> str:
    return f"{cell:,}" if type(cell) is int else "" if cell is None else str(cell)


class Size(int):
    """Bytes, shown with a unit."""

    def __str__(self) -> str:
        number, units = float(self), ["B", "kB", "MB", "GB", "TB", "PB"]
        while number >= 999.5 and len(units) > 1:
            number /= 1000
            units.pop(0)
        return f"{int(self)} B" if units[0] == "B" else f"{number:.3g} {units[0]}"


@contextmanager
def progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """A function to be called with bytes done and in all; draws a bar on a terminal."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task(what, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)
