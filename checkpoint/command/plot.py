"""Which rank wrote which part of what, as a picture: a row per rank, as long as its bytes."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import CheckpointError
from ..format.dtypes import DTYPES
from ..format.records import Manifest, part_of, rank_of

_MANY = 4000  # pieces that are drawn one by one; more of them are added up by part


@dataclass(frozen=True)
class Bar:
    """A stretch of a rank's row: bytes `start` to `start + size`; `old` where it lies in an earlier step's folder."""

    rank: int
    part: str
    key: str
    start: int
    size: int
    old: bool


def bars(manifest: Manifest) -> list[Bar]:
    """The stretches of all rows, each rank's in the order of its files."""
    found: list[tuple[int, int, int, str, int, bool]] = []
    for key, tensor in manifest.tensors.items():
        shards, itemsize = tensor.shards, DTYPES[tensor.dtype].itemsize
        for number, at, count in zip(shards.file.tolist(), shards.at.tolist(), shards.sizes.tolist(), strict=True):
            file = manifest.files[number]
            found.append((rank_of(file.name), number, at, key, count * itemsize, file.step != manifest.step))
    if len(found) > _MANY:
        together: dict[tuple[int, str, bool], int] = {}
        for rank, _, _, key, size, old in found:
            together[rank, part_of(key), old] = together.get((rank, part_of(key), old), 0) + size
        found = [(rank, 0, 0, part, size, old) for (rank, part, old), size in sorted(together.items())]
    rows: dict[int, int] = {}
    made = []
    for rank, _, _, key, size, old in sorted(found):
        start = rows.get(rank, 0)
        rows[rank] = start + size
        made.append(Bar(rank, part_of(key), key, start, size, old))
    return made


def draw_ranks(manifest: Manifest, file: str) -> None:
    """Draw `bars` into `file`. CheckpointError where matplotlib is missing."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise CheckpointError("plots need matplotlib: pip install 'fastopt[plot]'") from error
    found = bars(manifest)
    ranks = 1 + max((bar.rank for bar in found), default=0)
    longest = max((bar.start + bar.size for bar in found), default=1)
    figure = Figure(figsize=(10, min(12, 1.8 + 0.35 * ranks)), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    parts = list(dict.fromkeys(part_of(key) for key in sorted(manifest.tensors)))
    for number, part in enumerate(parts):
        for old in (False, True):
            mine = [bar for bar in found if bar.part == part and bar.old is old]
            if not mine:
                continue
            axes.barh(
                [bar.rank for bar in mine],
                [bar.size / 1e6 for bar in mine],
                left=[bar.start / 1e6 for bar in mine],
                height=0.8,
                color=f"C{number % 10}",
                edgecolor="white" if ranks <= 64 else "none",
                linewidth=0.5,
                hatch="//" if old else None,
                label=f"{part}, of an earlier step" if old else part,
            )
    for bar in found:
        if bar.size > 0.012 * longest * (len(bar.key) + 2) and ranks <= 32:
            axes.text((bar.start + bar.size / 2) / 1e6, bar.rank, bar.key, ha="center", va="center", fontsize=7)
    axes.invert_yaxis()
    axes.yaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="MB", ylabel="rank", title=f"step {manifest.step}: what each of {manifest.world_size} ranks wrote")
    axes.spines[["top", "right"]].set_visible(False)
    figure.legend(loc="outside lower center", ncols=min(5, max(1, len(parts))), frameon=False)
    figure.savefig(file, dpi=120)
