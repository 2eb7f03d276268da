"""What a run of the step benchmark found, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from ..values import made, write_beside


@dataclass
class Row:
    """One optimizer on one model. Times in milliseconds, of the host in microseconds; None is what was not measured."""

    model: str
    groups: int
    rule: str
    who: str
    step_ms: float
    host_us: float
    host_new_us: float | None = None
    first_ms: float | None = None
    floor_ms: float | None = None
    share: float | None = None
    against_fused: float | None = None
    engine: str = ""


@dataclass
class FirstStep:
    """Milliseconds of the first step of a fresh process, with empty caches on disk and with those that it left."""

    model: str
    rule: str
    empty_ms: float
    cached_ms: float


@dataclass
class Result:
    """A run of the benchmark."""

    device: str
    versions: dict[str, str]
    copy_gb_per_s: float
    threads: int
    rows: list[Row] = field(default_factory=list)
    first: list[FirstStep] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def write(result: Result, path: Path) -> None:
    """Write `result` as JSON, with the table beside it as Markdown."""
    write_beside(result, page(result), path)


def read(path: Path) -> Result:
    """The result in a file that `write` made.

    Raises:
        ValueError: the file is no result of this benchmark.
    """
    try:
        found = json.loads(path.read_text())
        rows = [made(Row, row) for row in found.pop("rows")]
        first = [made(FirstStep, row) for row in found.pop("first", [])]
        return made(Result, {**found, "rows": rows, "first": first})  # type: ignore[no-any-return]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of `fastopt bench step`: {error!r}") from error


def page(result: Result) -> str:
    """The whole result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    parts = [
        f"# {result.device}: time of a step",
        "Written by `fastopt bench step`; [what the columns mean](step.md).",
        f"{versions}, {result.threads} threads; copy {result.copy_gb_per_s:.0f} GB/s.",
        "\n".join([*HEAD, *lines(result.rows)]),
    ]
    if result.first:
        parts += ["First step of a fresh process:", "\n".join([*FIRST_HEAD, *first_lines(result.first)])]
    return "\n\n".join([*parts, *result.notes]) + "\n"


HEAD = (
    "| model | groups | rule | who | ms/step | floor ms | of floor | x torch fused | host us | host us, new grads "
    "| first step ms |",
    "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)
FIRST_HEAD = ("| model | rule | empty cache, ms | cached on disk, ms |", "| --- | --- | ---: | ---: |")


def lines(rows: Iterable[Row]) -> list[str]:
    """One line of the table per row."""
    return [
        f"| {r.model} | {r.groups} | {r.rule} | {f'{r.who} ({r.engine})' if r.engine else r.who} | {r.step_ms:.3f} "
        f"| {_number(r.floor_ms, 3)} | {_number(r.share, 2)} | {_number(r.against_fused, 2)} | {r.host_us:.0f} "
        f"| {_number(r.host_new_us, 0)} | {_number(r.first_ms, 0)} |"
        for r in rows
    ]


def first_lines(rows: Iterable[FirstStep]) -> list[str]:
    """One line of the table of first steps per row."""
    return [f"| {r.model} | {r.rule} | {r.empty_ms:.0f} | {r.cached_ms:.0f} |" for r in rows]


def _number(value: float | None, digits: int) -> str:
    return "" if value is None else f"{value:.{digits}f}"
