"""Where the parts of a tensor are: short in the manifest, exact in memory."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastopt import Box
from fastopt.checkpoint import CheckpointError
from fastopt.checkpoint.format.manifest import _intervals
from fastopt.checkpoint.format.shards import Shards
from fastopt.distributed.ownership.layout import Layout
from fastopt.distributed.ownership.places import ParamSpec

from .test_plan import box_in, numbers, shapes, tiling


def even(shape: tuple[int, ...], ranks: int, share: int) -> list[tuple[int, int, int]]:
    """`(rank, start, count)` of boxes when every rank has `share` elements: cut at rows, as in the data files."""
    import torch

    layout = Layout.even([ParamSpec("w", shape, torch.float32, 0)], ranks, 1 << 40)
    found = []
    for rank in range(ranks):
        for part, box in enumerate(layout.boxes(0, rank)):
            start = int(np.ravel_multi_index(box.offset, shape))
            found.append((part * ranks + rank, start, box.numel))
    return found


@pytest.mark.parametrize(
    ("shape", "most"), [((2048, 2048), 1), ((5632, 2048), 8), ((768, 2304), 20), ((50257, 768), 60)]
)
def test_a_thousand_ranks_are_a_few_rows(shape: tuple[int, ...], most: int) -> None:
    parts = even(shape, 1024, 0)
    shards = Shards.intervals(shape, *zip(*parts, strict=True))
    shards.check("w")
    rows = shards.rows()
    assert len(rows) <= most
    assert _intervals(rows, "w", shape, 5000) == shards


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4)), min_size=1, max_size=60), st.data())
def test_any_rows_come_back(gaps: list[tuple[int, int]], data: st.DataObject) -> None:
    file, start, columns = -1, 0, []
    for gap, count in gaps:
        file += 1 + gap
        columns.append((file, start, count))
        start += count
    order = data.draw(st.permutations(columns)) if data.draw(st.booleans()) else columns
    shards = Shards.intervals((start,), *zip(*order, strict=True))
    shards.check("w")
    assert _intervals(shards.rows(), "w", (start,), file + 1) == shards


@given(st.data())
def test_what_meets_a_box_is_found_with_its_place(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    boxes = data.draw(tiling(shape))
    shards = Shards.of_boxes(shape, range(len(boxes)), boxes)
    shards.check("w")
    shards = shards.placed(np.full(len(boxes), 64))
    wanted = data.draw(box_in(shape))
    whole = numbers(shape)
    found: list[int] = []
    for shard, common in shards.meeting(wanted, 2):
        assert (shard.at, shard.box) == (64, boxes[shard.file])
        found += whole[common.slices].reshape(-1).tolist()
    assert sorted(found) == sorted(whole[wanted.slices].reshape(-1).tolist())


def test_intervals_of_several_boxes_are_found_box_by_box() -> None:
    shards = Shards.intervals((4, 5), [0, 1], [0, 7], [7, 13]).placed(np.array([100, 200]))
    found = [(shard.file, shard.at, shard.box) for shard, _ in shards.meeting(Box.whole((4, 5)), 4)]
    assert found == [
        (0, 100, Box((0, 0), (1, 5))),
        (0, 120, Box((1, 0), (1, 2))),
        (1, 200, Box((1, 2), (1, 3))),
        (1, 212, Box((2, 0), (2, 5))),
    ]


@given(st.data())
def test_intervals_are_judged_as_by_counting(data: st.DataObject) -> None:
    total = data.draw(st.integers(0, 12))
    parts = data.draw(st.lists(st.tuples(st.integers(0, total), st.integers(0, total)), max_size=4))
    parts = [(a, min(n, total - a)) for a, n in parts]
    count = np.zeros(total, dtype=int)
    for start, n in parts:
        count[start : start + n] += 1
    shards = Shards.intervals((total,), range(len(parts)), [a for a, _ in parts], [n for _, n in parts])
    if (count == 1).all() and all(n for _, n in parts):
        shards.check("w")
    elif not (count == 1).all():
        with pytest.raises(CheckpointError, match="w: "):
            shards.check("w")
    assert int(shards.sizes.sum()) == sum(n for _, n in parts)
    assert math.prod(shards.shape) == total
