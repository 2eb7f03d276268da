"""How the charts look: SVG without a background, in colours that can be read on white and on black."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

GRAY = "#7d7d7d"
BLUE, ORANGE, YELLOW, PURPLE, GREEN = "#2f81f7", "#d9730d", "#c9a227", "#a855c7", "#3fa35b"


@contextmanager
def pyplot() -> Iterator[Any]:
    """`matplotlib.pyplot` in this style; None, with a sentence printed, where it is not installed."""
    try:
        import matplotlib
    except ImportError:
        print("no chart: matplotlib is not installed (pip install matplotlib, or the project's extra [plot])")
        yield None
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    style: Any = {"svg.hashsalt": "fastopt", "svg.fonttype": "none", "text.color": GRAY, "font.size": 9}
    with matplotlib.rc_context(style):
        yield plt


def plain(axis: Any) -> None:
    """Nothing around `axis` but its lower edge and faint vertical lines."""
    axis.tick_params(colors=GRAY, which="both", length=3)
    axis.grid(axis="x", color=GRAY, alpha=0.2, lw=0.5)
    axis.set_axisbelow(True)
    for side, spine in axis.spines.items():
        spine.set_visible(side == "bottom")
        spine.set_color(GRAY)


def save(figure: Any, path: Path) -> None:
    """Write `figure`, the same bytes for the same content."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, format="svg", transparent=True, metadata={"Date": None})
