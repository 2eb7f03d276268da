"""The value that sharding and checkpoints share: a *piece*, a named box of a tensor with its data.

A tensor is known by its name, its global shape and its dtype. What one process holds of it is a list of boxes;
a box together with the local data is a piece. Everything here is pure: no process group, no file.
"""

from __future__ import annotations

import copy
import math
from collections import OrderedDict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Box:
    """An axis-aligned part of a tensor: `offset` of its first element and its `shape`, one entry per dimension."""

    offset: Shape
    shape: Shape

    def __post_init__(self) -> None:
        if len(self.offset) != len(self.shape):
            raise ValueError(f"a box needs one offset per dimension, got offset {self.offset} and shape {self.shape}")
        if min((*self.offset, *self.shape), default=0) < 0:
            raise ValueError(f"a box has no negative numbers, got offset {self.offset} and shape {self.shape}")

    @classmethod
    def whole(cls, shape: Shape | torch.Size) -> Box:
        """The box that is all of a tensor of `shape`."""
        return cls((0,) * len(shape), tuple(shape))

    @property
    def numel(self) -> int:
        """Number of elements."""
        return math.prod(self.shape)

    @property
    def stop(self) -> Shape:
        """One past the last index, per dimension."""
        return tuple(o + n for o, n in zip(self.offset, self.shape, strict=True))

    @property
    def slices(self) -> tuple[slice, ...]:
        """The index that cuts this box out of the whole tensor."""
        return tuple(slice(o, o + n) for o, n in zip(self.offset, self.shape, strict=True))

    def fits(self, shape: Shape | torch.Size) -> bool:
        """Whether the box lies inside a tensor of `shape`."""
        return len(shape) == len(self.shape) and all(e <= n for e, n in zip(self.stop, shape, strict=True))

    def intersect(self, other: Box) -> Box | None:
        """The common part, in global coordinates; None where the boxes share no element."""
        if len(self.shape) != len(other.shape):
            raise ValueError(f"boxes of {len(self.shape)} and {len(other.shape)} dimensions do not intersect")
        start = tuple(max(a, b) for a, b in zip(self.offset, other.offset, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        shape = tuple(b - a for a, b in zip(start, stop, strict=True))
        return None if any(n <= 0 for n in shape) else Box(start, shape)

    def relative_to(self, origin: Box) -> Box:
        """The same box in coordinates whose zero is the first element of `origin`."""
        return Box(tuple(a - b for a, b in zip(self.offset, origin.offset, strict=True)), self.shape)

    def inside(self, origin: Box) -> Box:
        """A box in coordinates whose zero is the first element of `origin`, in those of `origin`."""
        return Box(tuple(a + b for a, b in zip(self.offset, origin.offset, strict=True)), self.shape)


@dataclass(frozen=True, eq=False)
class Piece:
    """A box of the tensor that belongs to the parameter `name`, with the local data (`data.shape == box.shape`).

    `shape` is the global shape of the tensor. A state of an optimizer is a tuple of pieces where it is sharded. Where
    several processes hold the same box, `copy` counts them: a checkpoint is written from copy 0.
    """

    name: str
    shape: Shape
    box: Box
    data: Tensor
    copy: int = 0

    def __post_init__(self) -> None:
        if not self.box.fits(self.shape):
            raise ValueError(f"the piece of {self.name!r} at {self.box} is not inside shape {self.shape}")
        got = tuple(self.data.shape)
        if got != self.box.shape:
            raise ValueError(f"the piece of {self.name!r} has a box of shape {self.box.shape} and data of shape {got}")


class Pieces(tuple[Piece, ...]):
    """This rank's pieces of one state, as a sharded optimizer's state dict shows them.

    Attributes:
        only: the whole state, where no other rank holds any of it. They are pickled as that, and else not at all.
    """

    only: Tensor | None = None

    def whole(self, key: str) -> Tensor:
        """The state `key`, if one piece is all of it.

        Raises:
            ValueError: it is a part of it.
        """
        if len(self) == 1 and self[0].box == Box.whole(self[0].shape):
            return self[0].data
        of = f" of {self[0].name!r}" if self else ""
        raise ValueError(
            f"the state {key!r}{of} is the part of one rank: call consolidate_state_dict() on all ranks before "
            f"state_dict(), or save with fastopt.checkpoint.save, which loads into any optimizer"
        )

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self.only is not None:
            return self.only.__reduce_ex__(protocol)  # type: ignore[no-untyped-call]
        of = f" of {self[0].name!r}" if self else ""
        raise TypeError(
            f"a state{of} is spread over the ranks, and a pickle (torch.save) would keep one rank's part: call "
            f"opt.consolidate_state_dict() on all ranks before opt.state_dict(), or save with fastopt.checkpoint.save"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Pieces:
        made = Pieces(copy.deepcopy(piece, memo) for piece in self)
        made.only = copy.deepcopy(self.only, memo)
        return made

    def __create_write_items__(self, fqn: str, value: object) -> list[Any]:
        # What torch.distributed.checkpoint asks of values that say themselves how they are saved.
        raise TypeError(
            f"{fqn!r} is spread over the ranks, and torch.distributed.checkpoint.save would keep one rank's part: "
            "save with fastopt.checkpoint.save, or the whole state after opt.consolidate_state_dict()"
        )


class Flat(tuple[Piece, ...]):
    """Pieces whose data are views, one after the other, of `flat` `[n]`, which whoever is given them may keep."""

    flat: Tensor

    def __new__(cls, pieces: Iterable[Piece], flat: Tensor) -> Flat:
        made = super().__new__(cls, pieces)
        made.flat = flat
        return made


class NamedState(dict[str, Any]):
    """A state dict of an optimizer that also knows its parameters: `params` has name, global shape and dtype of each.

    The order is that of the numbers by which the state dict calls them. A plain copy of it no longer knows, nor one
    built as `type(state)(entries)`, which others do with any kind of dict, nor a pickled one: that is a mapping of a
    kind which `torch.load(weights_only=True)` takes.
    """

    params: list[tuple[str, Shape, torch.dtype]]

    def __init__(self, packed: Mapping[str, Any], params: Iterable[tuple[str, Shape, torch.dtype]] = ()) -> None:
        super().__init__(packed)
        self.params = list(params)

    def __reduce__(self) -> tuple[Any, ...]:
        return OrderedDict, (), None, None, iter(self.items())

    def __deepcopy__(self, memo: dict[int, Any]) -> NamedState:
        return NamedState(copy.deepcopy(dict(self), memo), self.params)


def interval_boxes(shape: Shape | torch.Size, start: int, stop: int) -> list[Box]:
    """The boxes that make up elements `start` to `stop` of a row-major tensor of `shape`, in that order.

    At most `2 * len(shape) - 1` boxes. Each is contiguous in the flattened tensor, and so is their sequence: the data
    of the interval, cut at the boxes' sizes, is the data of the boxes.
    """
    return list(_interval_boxes(tuple(shape), start, stop))


@lru_cache(maxsize=1 << 12)  # all states of a parameter are cut alike
def _interval_boxes(shape: Shape, start: int, stop: int) -> list[Box]:
    if not 0 <= start <= stop <= math.prod(shape):
        raise ValueError(f"the interval {start}:{stop} is not inside a tensor of shape {shape}")
    if start == stop:
        return []
    if not shape:
        return [Box((), ())]
    inner = shape[1:]
    row = math.prod(inner)
    first, last = start // row, (stop - 1) // row
    if first == last and (start % row or stop % row):
        return [_under(first, box) for box in interval_boxes(inner, start - first * row, stop - first * row)]
    boxes: list[Box] = []
    if start % row:
        boxes += [_under(first, box) for box in interval_boxes(inner, start - first * row, row)]
        first += 1
    full_stop = stop // row
    if full_stop > first:
        boxes.append(Box((first, *(0,) * len(inner)), (full_stop - first, *inner)))
    if stop % row:
        boxes += [_under(full_stop, box) for box in interval_boxes(inner, 0, stop - full_stop * row)]
    return boxes


def _under(index: int, box: Box) -> Box:
    """`box` of row `index` as a box of the tensor with one more leading dimension."""
    return Box((index, *box.offset), (1, *box.shape))


def cut_interval(name: str, shape: Shape | torch.Size, start: int, stop: int, flat: Tensor) -> tuple[Piece, ...]:
    """Pieces of elements `start:stop` of a tensor of parameter `name`; `flat` `[stop - start]` is viewed, no copy."""
    got = tuple(flat.shape)
    if got != (stop - start,):
        raise ValueError(f"the interval {start}:{stop} of {name!r} needs {stop - start} elements, got shape {got}")
    pieces, at = [], 0
    for box in interval_boxes(shape, start, stop):
        pieces.append(Piece(name, tuple(shape), box, flat[at : at + box.numel].view(box.shape)))
        at += box.numel
    return tuple(pieces)
