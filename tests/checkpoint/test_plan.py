"""Plans over boxes, against brute force on small arrays of element numbers."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastopt import Box
from fastopt.checkpoint import CheckpointError
from fastopt.checkpoint.contents import plan
from fastopt.checkpoint.format.shards import check_cover

shapes = st.lists(st.integers(1, 6), min_size=0, max_size=4).map(tuple)


@st.composite
def box_in(draw: st.DrawFn, shape: tuple[int, ...]) -> Box:
    """A box inside `shape`, with elements."""
    starts = [draw(st.integers(0, n - 1)) for n in shape]
    stops = [draw(st.integers(start + 1, n)) for start, n in zip(starts, shape, strict=True)]
    return Box(tuple(starts), tuple(b - a for a, b in zip(starts, stops, strict=True)))


@st.composite
def tiling(draw: st.DrawFn, shape: tuple[int, ...], cuts: int = 6) -> list[Box]:
    """Boxes that cover `shape` once, by cutting boxes in two again and again."""
    boxes = [Box.whole(shape)]
    for _ in range(draw(st.integers(0, cuts))):
        number = draw(st.integers(0, len(boxes) - 1))
        box = boxes[number]
        long = [d for d, n in enumerate(box.shape) if n > 1]
        if not long:
            continue
        axis = draw(st.sampled_from(long))
        at = draw(st.integers(1, box.shape[axis] - 1))
        left, right = list(box.shape), list(box.shape)
        left[axis], right[axis] = at, box.shape[axis] - at
        moved = list(box.offset)
        moved[axis] += at
        boxes[number : number + 1] = [Box(box.offset, tuple(left)), Box(tuple(moved), tuple(right))]
    return draw(st.permutations(boxes))


def numbers(shape: tuple[int, ...]) -> np.ndarray:
    """The flat index of every element."""
    return np.arange(math.prod(shape)).reshape(shape)


@given(st.data())
def test_a_tiling_is_accepted_and_a_changed_one_refused(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    boxes = data.draw(tiling(shape))
    check_cover("w", shape, boxes)
    victim = data.draw(st.integers(0, len(boxes) - 1))
    with pytest.raises(CheckpointError, match=r"w: \d+ of the"):
        check_cover("w", shape, boxes[:victim] + boxes[victim + 1 :])
    with pytest.raises(CheckpointError, match="overlap"):
        check_cover("w", shape, [*boxes, boxes[victim]])


@given(st.data())
def test_any_boxes_are_judged_as_by_counting(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    boxes = data.draw(st.lists(box_in(shape), max_size=5))
    count = np.zeros(shape, dtype=int)
    for box in boxes:
        count[box.slices] += 1
    if (count == 1).all():
        check_cover("w", shape, boxes)
    else:
        with pytest.raises(CheckpointError):
            check_cover("w", shape, boxes)


def test_boxes_outside_and_of_other_dimensions_are_refused() -> None:
    for box in (Box((1,), (2,)), Box((0, 0), (1, 2))):
        with pytest.raises(CheckpointError, match="outside shape"):
            check_cover("w", (2,), [box])


def test_empty_boxes_count_for_nothing() -> None:
    check_cover("w", (0, 3), [])
    check_cover("w", (0, 3), [Box((0, 0), (0, 3))] * 2)
    check_cover("w", (2,), [Box((0,), (2,)), Box((1,), (0,))])


@given(st.data())
def test_cut_boxes_are_the_box_in_order(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    box = data.draw(box_in(shape))
    limit = data.draw(st.integers(1, 20))
    cuts = plan.cut_box(box, limit)
    assert all(cut.numel <= limit for cut in cuts)
    whole = numbers(shape)
    joined = np.concatenate([whole[cut.slices].reshape(-1) for cut in cuts])
    assert joined.tolist() == whole[box.slices].reshape(-1).tolist()


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 3000), max_size=3), st.sampled_from([1, 2, 4, 8])), max_size=20),
    st.lists(st.integers(0, 1 << 22), min_size=1, max_size=9),
)
def test_shared_tensors_are_written_once_and_evenly(sizes: list[tuple[list[int], int]], load: list[int]) -> None:
    tensors = [plan.Whole(f"t{i}", tuple(shape), size) for i, (shape, size) in enumerate(sizes)]
    todo = plan.share_out(tensors, load)
    assert todo == plan.share_out(tensors, load)
    for tensor in tensors:
        boxes = [box for rank in todo for key, box in rank if key == tensor.key]
        check_cover(tensor.key, tensor.shape, boxes)
        assert boxes, "a tensor without elements is written too"
    size = {tensor.key: tensor.itemsize for tensor in tensors}
    total = [n + sum(box.numel * size[key] for key, box in rank) for n, rank in zip(load, todo, strict=True)]
    largest = max((box.numel * size[key] for rank in todo for key, box in rank), default=0)
    fair = sum(total) / len(total)
    assert largest <= 2 * max(fair, 1 << 20)
    assert max(total) <= max(*load, fair + largest, 0)


def test_only_holders_write_a_tensor_that_not_all_hold() -> None:
    tensors = [plan.Whole("a", (9,), 4, holders=(2,)), plan.Whole("b", (9,), 4, holders=(1, 2))]
    assert plan.share_out(tensors, [0, 0, 0]) == [[], [("b", Box((0,), (9,)))], [("a", Box((0,), (9,)))]]


def test_a_tensor_of_several_shares_is_cut_in_rows() -> None:
    todo = plan.share_out([plan.Whole("a", (4096, 1024), 4)], [0, 0, 0])
    assert [sum(box.numel for _, box in rank) for rank in todo] == [1398784, 1398784, 1396736]
    assert all(box.shape[1] == 1024 for rank in todo for _, box in rank)


@settings(deadline=None)
@given(st.data())
def test_packed_parts_are_small_and_name_nothing_twice(data: st.DataObject) -> None:
    boxes = []
    for number in range(data.draw(st.integers(0, 6))):
        shape = data.draw(shapes)
        itemsize = data.draw(st.sampled_from([1, 2, 4, 8]))
        boxes += [(f"t{number}", box, itemsize) for box in data.draw(tiling(shape, 3))]
    limit = data.draw(st.integers(8, 200))
    parts = plan.pack(boxes, limit)
    for part in parts:
        assert part
        assert sum(item.nbytes for item in part) <= limit
        assert len({item.key for item in part}) == len(part)
        widths = [item.itemsize for item in part]
        assert widths == sorted(widths, reverse=True)
    for source, (key, box, _) in enumerate(boxes):
        cuts = [item for part in parts for item in part if item.source == source]
        assert {item.key for item in cuts} <= {key}
        check_cover(key, box.shape, [item.box.relative_to(box) for item in cuts])


@given(st.data())
def test_the_blocks_read_hold_what_is_wanted_and_little_else(data: st.DataObject) -> None:
    shape = data.draw(shapes)
    whole, itemsize, block = numbers(shape), 2, data.draw(st.sampled_from([16, 32, 64]))
    begins, at, uses = [96, 64], [96, 64], []
    wanted = data.draw(box_in(shape))
    elements: dict[tuple[int, int], int] = {}
    for box in data.draw(tiling(shape)):
        file = data.draw(st.integers(0, 1))
        at[file] += 2 * data.draw(st.integers(0, 20))
        for i, number in enumerate(whole[box.slices].reshape(-1).tolist()):
            elements[file, at[file] + i * itemsize] = number
        common = box.intersect(wanted)
        if common:
            uses.append(plan.Use(7, file, at[file], box, common, itemsize))
        at[file] += box.numel * itemsize
    got: dict[tuple[int, int], int] = {}
    wanted_numbers = set(whole[wanted.slices].reshape(-1).tolist())
    requests = plan.reads(uses, list(zip(begins, at, strict=True)), block)
    for read in requests:
        assert begins[read.file] <= read.start < read.stop <= at[read.file]
        assert (read.start - begins[read.file]) % block == 0
        assert read.stop == at[read.file] or (read.stop - begins[read.file]) % block == 0
        for use in read.uses:
            start, stop = max(read.start, use.at), min(read.stop, use.stop)
            flat = np.concatenate([whole[box.slices].reshape(-1) for box in use.boxes(start, stop)])
            assert flat.tolist() == [elements[read.file, i] for i in range(start, stop, itemsize)]
        for i in range(read.start, read.stop):
            assert (read.file, i) not in got, "no byte is read twice"
            got[read.file, i] = elements.get((read.file, i), -1)
    assert wanted_numbers <= set(got.values())
    for file, begin in enumerate(begins):  # a block between two that are needed may be read with them, no other
        needed = sorted({(i - begin) // block for (f, i), n in elements.items() if f == file and n in wanted_numbers})
        taken = sorted({(i - begin) // block for f, i in got if f == file})
        assert set(needed) <= set(taken)
        assert all(n in needed or (n - 1 in needed and n + 1 in needed) for n in taken)


def test_neighbours_are_read_together_up_to_a_limit() -> None:
    mib = 1 << 20
    box = Box((0,), (6 * mib // 4,))
    uses = [plan.Use(i, 0, 4096 + 6 * mib * i, box, box, 4) for i in range(4)]
    uses.append(plan.Use(9, 0, 4096 + 100 * mib, Box((0,), (mib // 4,)), Box((0,), (mib // 4,)), 4))
    requests = plan.reads(uses[::-1], [(4096, 4096 + 200 * mib)], mib)
    assert [(read.start - 4096, read.stop - 4096) for read in requests] == [
        (0, 16 * mib),
        (16 * mib, 24 * mib),
        (100 * mib, 101 * mib),
    ]
    assert [[use.target for use in read.uses] for read in requests] == [[0, 1, 2], [2, 3], [9]]


def test_a_tensor_that_may_not_be_cut_stays_whole() -> None:
    whole = plan.Whole("model/a", (4096, 1024), 4, cut=False)
    assert sorted(map(len, plan.share_out([whole], [0, 0, 0]))) == [0, 0, 1]
    box = Box.whole(whole.shape)
    assert [[item.box for item in part] for part in plan.pack([("model/a", box, 4)], 100, cut=False)] == [[box]]


def test_blocks_grow_with_the_checkpoint() -> None:
    assert plan.block_bytes(0) == 256 << 10
    assert plan.block_bytes(16 << 30) == 256 << 10
    assert plan.block_bytes(64 << 30) == 1 << 20
    assert plan.block_bytes(1 << 50) == 16 << 20


def test_a_plan_for_many_ranks_is_quick_enough_to_be_used() -> None:
    rows = [Box((8 * i, 0), (8, 1000)) for i in range(1024)]
    check_cover("w", (8192, 1000), rows)
    columns = [Box((0, 8 * i), (2, 8)) for i in range(1024)]
    check_cover("w", (2, 8192), columns)
