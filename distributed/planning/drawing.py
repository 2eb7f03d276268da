"""Who owns what of a plan, as lines of text and as a figure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ..ownership.fully_shard_rows import Rows
from ..ownership.layout import Layout
from ..ownership.places import Bucket, ParamSpec
from .costs import Plan

_CELLS = 48
_DIGITS = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_LINES = 6


def size(count: float) -> str:
    """Bytes to read: `25.0 MiB`."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1000 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def owners_text(plan: Plan) -> Iterator[str]:
    """Lines: which rank owns which part of the first and last buckets, and what the first and last rank own."""
    layout = plan.layout
    if plan.ranks <= len(_DIGITS):
        yield f"who owns what: each of {_CELLS} cells of a bucket is the number of its rank ({_DIGITS[:11]}..)"
    else:
        yield f"who owns what: rank 0 to {plan.ranks - 1:,} from left to right, in each bucket"
    for index in _ends(len(layout.buckets)):
        yield "  ..." if index is None else f"  {_bucket_text(layout, layout.buckets[index])}"
    for rank in dict.fromkeys((0, plan.ranks - 1)):
        yield from _rank_text(plan, rank)


def _ends(n: int) -> list[int | None]:
    """The first and last of `n` numbers, with None for those between."""
    return list(range(n)) if n <= 2 * _LINES else [*range(_LINES), None, *range(n - _LINES, n)]


def _bucket_text(layout: Layout, bucket: Bucket) -> str:
    names = [layout.params[bucket.entries[i].param].name for i in (0, -1)]
    what = names[0] if names[0] == names[1] else f"{names[0]} .. {names[1]}"
    total = size(bucket.numel * bucket.dtype.itemsize)
    return f"bucket {bucket.index:<4} {total:>10}  |{_cells(bucket)}|  {what}"


def _cells(bucket: Bucket) -> str:
    """The bucket as a bar: the owner's number in every cell, or how large one rank's part is where there are many."""
    if bucket.owned is None and bucket.world_size > len(_DIGITS):
        part = size(bucket.numel // bucket.world_size * bucket.dtype.itemsize)
        return f" {part} each ".center(_CELLS, "-")
    if bucket.world_size > len(_DIGITS):
        return f" owners: {len(bucket.owned or ())} ".center(_CELLS, "-")
    at = [(2 * i + 1) * bucket.numel // (2 * _CELLS) for i in range(_CELLS)]
    return "".join(_DIGITS[owner_of(bucket, element)] for element in at)


def owner_of(bucket: Bucket, element: int) -> int:
    """The rank that owns an element of the bucket's flat buffer."""
    if bucket.owned is not None:
        return next((r.rank for r in bucket.owned if r.start <= element < r.stop), 0)
    segment = next((s for s in bucket.segments if s.start <= element < s.stop), bucket.segments[-1])
    share = max((segment.stop - segment.start) // bucket.world_size, 1)
    return min((element - segment.start) // share, bucket.world_size - 1)


def _rank_text(plan: Plan, rank: int) -> Iterator[str]:
    layout = plan.layout
    held = [(spec, *layout.interval(i, rank)) for i, spec in enumerate(plan.params)]
    held = [(spec, start, stop) for spec, start, stop in held if stop > start]
    share = sum(stop - start for _, start, stop in held)
    yield f"  rank {rank} owns {share:,} elements in {len(held)} of {len(plan.params)} parameters"
    for spec, start, stop in held[:3]:
        part = "all of it" if (start, stop) == (0, spec.numel) else f"elements {start:,} to {stop:,} of {spec.numel:,}"
        yield f"    {spec.name} {list(spec.shape)}: {part}"
    if len(held) > 3:
        yield f"    and of {len(held) - 3} more"
    if any(stage.stage == 3 for stage in plan.stages):
        yield f"  rank {rank} of stage 3: {_rows_of(plan.params, rank, plan.ranks)}"


def _rows_of(params: Sequence[ParamSpec], rank: int, ranks: int) -> str:
    """The rows of the first parameters that a rank has under `fully_shard`."""
    told = []
    for spec in params[:3]:
        cut = Rows.of(spec, ranks)
        start, stop = (min(n * cut.chunk, cut.rows) for n in (rank, rank + 1))
        told.append(f"{spec.name} rows {start:,} to {stop:,}" if stop > start else f"{spec.name} none")
    return ", ".join(told) + (", ..." if len(params) > 3 else "")


# ---- a figure


def plot(plan: Plan, path: Path) -> None:
    """Write a figure: memory per stage, elements per rank, and the owners of every bucket.

    Raises:
        ModuleNotFoundError: matplotlib is missing.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (memory, load, owners) = pyplot.subplots(3, 1, figsize=(9, 10), constrained_layout=True)
    _plot_memory(memory, plan)
    for stage in plan.stages:
        load.step(range(plan.ranks), stage.elements, where="mid", label=f"stage {stage.stage} ({stage.kind})")
    load.set(xlabel="rank", ylabel="elements stepped", ylim=(0, None), title="work of each rank")
    load.legend()
    image = owners.imshow(_picture(plan), aspect="auto", interpolation="nearest", cmap="viridis", vmin=0)
    owners.set(xlabel="position in the bucket (%)", ylabel="bucket", title=f"owners, {plan.layout.kind} layout")
    figure.colorbar(image, ax=owners, label="rank")
    figure.suptitle(f"{plan.elements:,} parameters on {plan.ranks:,} ranks, {plan.optimizer}")
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def _plot_memory(axes: Any, plan: Plan) -> None:
    labels = [f"stage {stage.stage}" for stage in plan.stages]
    bottom = [0.0] * len(labels)
    for part in ("parameters", "gradients", "state", "passing"):
        heights = [getattr(stage.memory, part) / 2**30 for stage in plan.stages]
        axes.bar(labels, heights, bottom=bottom, label=part)
        bottom = [a + b for a, b in zip(bottom, heights, strict=True)]
    axes.set(ylabel="GiB", title="memory of the rank that holds most, without activations")
    axes.legend()


def _picture(plan: Plan) -> list[list[int]]:
    """For at most 200 buckets, evenly chosen: the owner at each hundredth."""
    buckets = plan.layout.buckets[:: -(-len(plan.layout.buckets) // 200)]
    return [[owner_of(bucket, (2 * i + 1) * bucket.numel // 200) for i in range(100)] for bucket in buckets]
