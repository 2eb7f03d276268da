"""What a run of the sharding benchmark found, as a table and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..values import made, write_beside
from .trace import Kernels

GIB = 2**30


@dataclass
class Row:
    """One way to train, on the slowest or fullest rank.

    Attributes:
        iteration_ms: median of an iteration, without waiting for the device in between.
        compute_ms: that of forward and backward alone, in the same turns.
        ours_ms: that of our stage 2 in the same turns.
        host_ms: until an iteration has been enqueued, the device idle before.
        resident_bytes: between iterations; None on the CPU.
        peak_bytes: in an iteration; None on the CPU.
        sent_bytes: by a rank in an iteration, see `trace.wire`; None where that does not know.
        collectives: in an iteration.
        kernels: where the device's time goes; None unless profiled.
    """

    who: str
    iteration_ms: float
    compute_ms: float
    host_ms: float
    resident_bytes: int | None
    peak_bytes: int | None
    sent_bytes: float | None
    collectives: int
    kernels: Kernels | None = None
    ours_ms: float | None = None

    @property
    def exposed_ms(self) -> float:
        """What an iteration takes beside forward and backward: communication and steps that are not hidden."""
        return self.iteration_ms - self.compute_ms


@dataclass
class Result:
    """A run of the benchmark."""

    device: str
    world_size: int
    versions: dict[str, str]
    model: str
    parameters: int
    tokens: int
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    @property
    def about(self) -> tuple[Any, ...]:
        """What two results must have in common, so that their rows may stand in one table."""
        return self.device, self.world_size, self.versions, self.model, self.parameters, self.tokens

    def take(self, rows: Iterable[Row]) -> None:
        """Add the rows of those that are not in it."""
        known = {row.who for row in self.rows}
        self.rows += [row for row in rows if row.who not in known]


def write(result: Result, path: Path) -> None:
    """Write `result` as JSON, with the tables beside it as Markdown."""
    write_beside(result, page(result), path)


def read(path: Path) -> Result:
    """The result in a file that `write` made.

    Raises:
        ValueError: the file is no result of this benchmark.
    """
    try:
        found = json.loads(path.read_text())
        return made(Result, {**found, "rows": [_row(row) for row in found["rows"]]})  # type: ignore[no-any-return]
    except (KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no result of `fastopt bench zero`: {error!r}") from error


def _row(values: dict[str, Any]) -> Any:
    kernels = values.get("kernels")
    return made(Row, {**values, "kernels": kernels and made(Kernels, kernels)})


HEAD = (
    "| who | ms/iteration | of compute | of stage 2 | exposed ms | host ms | resident GiB | peak GiB | sent GB "
    "| collectives |",
    "| --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
)


def line(row: Row) -> str:
    """The line of the table for a row."""
    memory = (f"{n / GIB:.2f}" if n is not None else "" for n in (row.resident_bytes, row.peak_bytes))
    of_ours = f"{row.iteration_ms / row.ours_ms:.3f}" if row.ours_ms else ""
    sent = "" if row.sent_bytes is None else f"{row.sent_bytes / 1e9:.3f}"
    return (
        f"| {row.who} | {row.iteration_ms:.2f} | {row.iteration_ms / row.compute_ms:.3f} | {of_ours} "
        f"| {row.exposed_ms:.2f} | {row.host_ms:.1f} | {' | '.join(memory)} | {sent} "
        f"| {row.collectives} |"
    )


def kernel_lines(rows: list[Row]) -> list[str]:
    """The table of where the device's time goes."""
    profiled = [(row.who, row.kernels) for row in rows if row.kernels is not None]
    kinds = sorted({kind for _, kernels in profiled for kind in kernels.by_kind})
    lines = [
        f"| who | {' | '.join(kinds)} | busy | idle | nccl hidden |",
        f"| --- |{' ---: |' * (len(kinds) + 3)}",
    ]
    for who, k in profiled:
        times = " | ".join(f"{k.by_kind.get(kind, 0):.2f}" for kind in kinds)
        lines.append(f"| {who} | {times} | {k.busy_ms:.2f} | {k.idle_ms:.2f} | {k.hidden:.0%} |")
    return lines


def page(result: Result) -> str:
    """The whole result as Markdown."""
    versions = ", ".join(f"{name} {version}" for name, version in result.versions.items())
    parts = [
        f"# {result.world_size} x {result.device}: time of an iteration",
        "Written by `fastopt bench zero`; [what the columns mean](zero.md).",
        f"{result.model}, {result.parameters / 1e6:,.1f} million parameters, {result.tokens:,} tokens per rank and "
        f"iteration; {versions}.",
        "\n".join([*HEAD, *map(line, result.rows)]),
    ]
    if any(row.kernels is not None for row in result.rows):
        parts += ["Of the first rank's device, in ms per iteration:", "\n".join(kernel_lines(result.rows))]
    return "\n\n".join([*parts, *result.notes]) + "\n"
