"""The chart of a sharding result: what an iteration takes beside forward and backward."""

from __future__ import annotations

from pathlib import Path

from ..svg import BLUE, GRAY, ORANGE, plain, pyplot, save
from .results import Result
from .rivals import COMPUTE


def draw(result: Result, path: Path) -> None:
    """Write the chart as SVG, the same bytes for the same result; without matplotlib say so and write nothing."""
    with pyplot() as plt:
        if plt is None:
            return
        rows = sorted((row for row in result.rows if row.who != COMPUTE), key=lambda row: row.iteration_ms)
        figure, axis = plt.subplots(figsize=(8, 0.32 * len(rows) + 1), layout="constrained")
        for y, row in enumerate(rows):
            ours = row.who.startswith("fastopt")
            shown = max(row.exposed_ms, 0.0)
            axis.barh(y, row.iteration_ms - shown, color=GRAY, alpha=0.35, height=0.7)
            axis.barh(y, shown, left=row.iteration_ms - shown, color=BLUE if ours else ORANGE, height=0.7)
            times = row.iteration_ms / row.compute_ms
            axis.text(row.iteration_ms, y, f" {row.iteration_ms:.1f} ms, {times:.2f}x", va="center")
        axis.set(yticks=range(len(rows)), yticklabels=[row.who for row in rows], ylim=(len(rows) - 0.4, -0.6))
        axis.set_xlim(0, 1.25 * max(row.iteration_ms for row in rows))
        plain(axis)
        compute = f"gray: forward and backward alone; {result.world_size} x {result.device}, {result.model}"
        axis.set_xlabel(f"ms per iteration ({compute})", color=GRAY)
        save(figure, path)
        plt.close(figure)
