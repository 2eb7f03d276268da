"""The curves of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from .metrics import steps_of


def draw_curves(lines: list[dict[str, Any]], baseline: float, path: str) -> str:
    """Draw training and validation in bits per byte, the baseline and the rates; returns a sentence on what was done.

    `lines` as `read_metrics` returns them.
    """
    steps = steps_of(lines)
    if not steps:
        return "no curves: the metrics hold no step"
    try:
        import matplotlib
    except ImportError:
        return "no curves: matplotlib is not installed (pip install matplotlib, or the project's extra [plot])"
    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, (top, bottom) = plt.subplots(2, 1, sharex=True, figsize=(9, 7), height_ratios=(3, 1), layout="constrained")
    x = [line["step"] for line in steps]
    top.plot(x, [line["loss"] / math.log(2) for line in steps], lw=0.8, alpha=0.7, label="train")
    judged = [line for line in steps if line["val_bpb"] is not None]
    top.plot([line["step"] for line in judged], [line["val_bpb"] for line in judged], "o-", label="validation")
    top.axhline(baseline, color="gray", ls="--", label=f"byte frequencies ({baseline:.2f})")
    for line in lines:
        if line.get("event") == "resume":
            for axis in (top, bottom):
                axis.axvline(line["step"], color="tab:red", ls=":", lw=1)
            top.text(line["step"], top.get_ylim()[1], f" resumed on {line['world_size']}", va="top", color="tab:red")
    top.set(ylabel="bits per byte", ylim=(0, None))
    top.legend()
    for group in range(len(steps[-1]["lr"])):
        bottom.plot(x, [line["lr"][group] for line in steps], lw=1)
    bottom.set(xlabel="step", ylabel="learning rate, per group")
    try:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(path, dpi=120)
    except (OSError, ValueError) as error:  # the run itself has gone well: no reason to fail
        return f"no curves: --plot {path} cannot be drawn: {error}"
    finally:
        plt.close(figure)
    return f"curves: {path}"
