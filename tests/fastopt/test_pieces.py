"""Boxes and pieces: an interval of a flattened tensor is covered exactly, in order, by few boxes."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastopt import Box, Piece
from fastopt.pieces import cut_interval, interval_boxes

shapes = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def intervals(draw: Any) -> tuple[tuple[int, ...], int, int]:
    shape = draw(shapes)
    n = math.prod(shape)
    start = draw(st.integers(0, n))
    return shape, start, draw(st.integers(start, n))


@given(intervals())
def test_boxes_cover_the_interval_in_order(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    numbers = torch.arange(math.prod(shape)).view(shape)
    boxes = interval_boxes(shape, start, stop)
    assert all(box.fits(shape) and box.numel > 0 for box in boxes)
    found = [i for box in boxes for i in numbers[box.slices].flatten().tolist()]
    assert found == list(range(start, stop))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


@given(intervals())
def test_pieces_view_the_data(case: tuple[tuple[int, ...], int, int]) -> None:
    shape, start, stop = case
    whole = torch.arange(math.prod(shape))
    flat = whole[start:stop]
    pieces = cut_interval("w", shape, start, stop, flat)
    rebuilt = torch.full(shape, -1)
    for piece in pieces:
        assert (piece.name, piece.shape) == ("w", shape)
        rebuilt[piece.box.slices] = piece.data
        assert piece.data.untyped_storage().data_ptr() == whole.untyped_storage().data_ptr()
    wanted = torch.full((math.prod(shape),), -1)
    wanted[start:stop] = flat
    assert torch.equal(rebuilt.flatten(), wanted)


@given(shapes, st.data())
def test_intersections(shape: tuple[int, ...], data: st.DataObject) -> None:
    def box() -> Box:
        offset = tuple(data.draw(st.integers(0, n)) for n in shape)
        return Box(offset, tuple(data.draw(st.integers(0, n - o)) for o, n in zip(offset, shape, strict=True)))

    a, b = box(), box()
    mask = torch.zeros(2, *shape, dtype=torch.bool)
    mask[0][a.slices] = True
    mask[1][b.slices] = True
    both = mask[0] & mask[1]
    common = a.intersect(b)
    assert (common.numel if common else 0) == int(both.sum())
    assert common == b.intersect(a)
    if common:
        assert both[common.slices].all()
        local = common.relative_to(a)
        assert torch.equal(mask[1][a.slices][local.slices], mask[1][common.slices])


def test_the_whole() -> None:
    box = Box.whole(torch.Size([2, 3]))
    assert (box.offset, box.shape, box.stop, box.numel) == ((0, 0), (2, 3), (2, 3), 6)
    assert Box.whole(()).numel == 1
    assert interval_boxes((2, 3), 0, 6) == [box]
    assert interval_boxes((), 0, 1) == [Box.whole(())]
    assert hash(box) == hash(Box.whole((2, 3)))


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda: Box((0,), (1, 2)), "one offset per dimension"),
        (lambda: Box((-1,), (2,)), "negative"),
        (lambda: Box((0,), (-2,)), "negative"),
        (lambda: Box((0,), (1,)).intersect(Box((0, 0), (1, 1))), "1 and 2 dimensions"),
        (lambda: Piece("w", (2,), Box((1,), (2,)), torch.zeros(2)), "'w'"),
        (lambda: Piece("w", (2, 2), Box((1,), (1,)), torch.zeros(1)), "'w'"),
        (lambda: Piece("w", (4,), Box((0,), (2,)), torch.zeros(3)), r"'w'.*\(3,\)"),
        (lambda: interval_boxes((2, 3), 4, 7), "4:7"),
        (lambda: interval_boxes((2, 3), 3, 2), "3:2"),
        (lambda: cut_interval("w", (4,), 0, 3, torch.zeros(2)), "0:3 of 'w' needs 3"),
        (lambda: cut_interval("w", (4,), 0, 4, torch.zeros(2, 2)), "'w'"),
    ],
)
def test_refused(make: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make()
