"""The chart of a step result: a panel per model, a line per rule, a dot per optimizer, the floor as a bar."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..svg import BLUE, GRAY, GREEN, ORANGE, PURPLE, YELLOW, plain, pyplot, save
from .models import MODELS
from .results import Result, Row
from .rivals import FUSED, OURS

COLOURS = {
    OURS: BLUE,
    FUSED: ORANGE,
    "torch foreach": YELLOW,
    "HeavyBall": PURPLE,
    "pytorch-optimizer": GREEN,
    "loop": GRAY,
}
FLOOR = "floor"


def draw(result: Result, path: Path) -> None:
    """Write the chart as SVG, the same bytes for the same result; without matplotlib say so and write nothing."""
    rows = [row for row in result.rows if row.groups == 1]
    models = list(dict.fromkeys(row.model for row in rows))
    heights = [len({row.rule for row in rows if row.model == model}) + 1.2 for model in models]
    with pyplot() as plt:
        if plt is None:
            return
        size = (8, 0.24 * sum(heights) + 0.4 * len(models) + 0.5)
        figure, axes = plt.subplots(
            len(models), 1, figsize=size, height_ratios=heights, squeeze=False, layout="constrained"
        )
        for axis, model in zip(axes[:, 0], models, strict=True):
            _panel(axis, model, [row for row in rows if row.model == model])
        _key(figure, [FLOOR, *(who for who in COLOURS if any(row.who == who for row in rows))])
        figure.supxlabel(f"ms per step, one parameter group, {result.device}", color=GRAY, fontsize=9)
        save(figure, path)
        plt.close(figure)


def _panel(axis: Any, model: str, rows: Sequence[Row]) -> None:
    """One model: a line per rule, from the floor to the slowest."""
    from matplotlib.ticker import LogLocator, NullLocator

    rules = list(dict.fromkeys(row.rule for row in rows))
    for y, rule in enumerate(rules):
        line = [row for row in rows if row.rule == rule]
        floor = line[0].floor_ms
        ends = [row.step_ms for row in line] + ([floor] if floor else [])
        axis.plot([min(ends), max(ends)], [y, y], color=GRAY, lw=0.6, alpha=0.5, zorder=1)
        if floor:
            axis.plot([floor, floor], [y - 0.35, y + 0.35], color=GRAY, lw=2, zorder=2)
        for row in line:
            ours = row.who == OURS
            axis.plot(row.step_ms, y, "o", ms=6.5 if ours else 5, color=COLOURS[row.who], zorder=4 if ours else 3)
            if ours:
                beside = axis.get_yaxis_transform()
                axis.text(1.01, y, f"{row.step_ms:.3g} ms", transform=beside, va="center", color=COLOURS[OURS])
    axis.set(xscale="log", ylim=(len(rules) - 0.4, -0.6), yticks=range(len(rules)), yticklabels=rules)
    axis.set_title(f"{model}, {len(MODELS[model]()):,} tensors" if model in MODELS else model, loc="left", fontsize=10)
    axis.title.set_color(GRAY)
    plain(axis)
    axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axis.xaxis.set_major_formatter("{x:g}")
    axis.xaxis.set_minor_locator(NullLocator())


def _key(figure: Any, names: Sequence[str]) -> None:
    """The names in their colours, above the panels."""
    from matplotlib.lines import Line2D

    bar: dict[str, Any] = {"marker": "|", "ms": 9, "mew": 2}
    dot: dict[str, Any] = {"marker": "o", "ms": 6}
    handles = [
        Line2D([], [], ls="", color=COLOURS.get(name, GRAY), label=name, **(bar if name == FLOOR else dot))
        for name in names
    ]
    figure.legend(handles=handles, loc="outside upper left", ncols=len(names), frameon=False, labelcolor="linecolor",
                  handletextpad=0.1, columnspacing=1.2)  # fmt: skip
