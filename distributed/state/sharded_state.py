"""State of a sharded optimizer, between what a rank holds (1-d slices) and what a state dict shows (pieces).

In an `even` layout a state shaped like its parameter is held as the owned interval of its flattened form; anything else
(0-d tensors, numbers) is held by every rank. In a `whole` layout the owner holds everything, the others only the marks
that the user has set.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...pieces import Box, Flat, Piece, Pieces
from ...spread import part_of
from ..communication.collectives import Ranks
from ..ownership.layout import Layout


class Held:
    """How the state of one parameter looks on one rank.

    Args:
        layout: who owns what.
        rank: whose view this is.
        param: the parameter's index.
        device: where it lives.
        copy: which of several equal copies this is, in hybrid sharding.
    """

    def __init__(self, layout: Layout, rank: int, param: int, device: torch.device, copy: int = 0) -> None:
        self.spec = layout.params[param]
        self.device = device
        self.copy = copy or (0 if self.spec.part is None else self.spec.part.copy)
        self.whole = layout.kind == "whole"
        self.interval = layout.interval(param, rank)
        self.owned = not self.whole or layout.owner(param) == rank
        self._layout, self._param, self._rank = layout, param, rank
        self._boxes = layout.boxes(param, rank)

    def boxes(self, shape: tuple[int, ...]) -> list[Box]:
        """The boxes that this rank holds of a state of `shape`, see `Layout.boxes`."""
        if shape == self.spec.whole:
            return list(self._boxes)
        return self._layout.boxes(self._param, self._rank, shape)

    def is_cut(self, value: Any) -> bool:
        """Whether a held value is this rank's part of something shaped like the parameter."""
        return (
            not self.whole
            and isinstance(value, Tensor)
            and value.ndim == 1
            and value.numel() == self.interval[1] - self.interval[0]
        )

    def show(self, value: Any) -> Any:
        """A held value as the state dict shows it: pieces of what is distributed, the rest as it is."""
        spec, shape = self.spec, tuple(getattr(value, "shape", ()))
        if self.is_cut(value):
            shape = spec.shape
            shown = Pieces(Piece(spec.name, spec.whole, box, part, self.copy) for box, part in self._cut(value))
        elif self.whole and isinstance(value, Tensor) and value.ndim:
            whole, box = (spec.whole, spec.box) if shape == spec.shape else (shape, Box.whole(shape))
            shown = Pieces([Piece(spec.name, whole, box, value, self.copy)])
        else:
            return value
        if self._layout.world_size == 1 and spec.part is None:
            shown.only = value.view(shape)
        return shown

    def _cut(self, flat: Tensor) -> Iterator[tuple[Box, Tensor]]:
        """This rank's boxes, each with its view of the held interval."""
        at = 0
        for box in self._boxes:
            yield box, flat[at : at + box.numel].view(box.shape)
            at += box.numel

    def take(self, key: str, value: Any, like_param: bool) -> Any:
        """A value of a state dict (a whole tensor or this rank's pieces of one) as it is held.

        Args:
            key: its name in the state.
            value: what the state dict has.
            like_param: whether the chain says that it is shaped like its parameter, which tells the state of a 0-d
                parameter from a number.

        Raises:
            ValueError: pieces that are not exactly this rank's part of the parameter.
        """
        if not self.owned:
            return value
        if isinstance(value, Tensor):
            value = part_of(value)
            if value.shape == self.spec.whole and value.shape != self.spec.shape:
                value = value[self.spec.box.slices].clone()
            if not self.whole and value.shape == self.spec.shape and (value.ndim or like_param):
                return value.reshape(-1)[slice(*self.interval)].to(self.device, copy=True)
            return value
        if isinstance(value, tuple) and all(isinstance(piece, Piece) for piece in value):
            return self._join(key, value)
        return value

    def _join(self, key: str, pieces: Sequence[Piece]) -> Tensor:
        """This rank's part out of `pieces`, which must be that part, in any order."""
        for piece in pieces:
            if piece.name != self.spec.name:
                raise ValueError(f"{key!r} of {self.spec.name!r} was given a piece of {piece.name!r}")
        if self.whole:
            if len(pieces) != 1 or pieces[0].box not in (Box.whole(pieces[0].shape), self.spec.box):
                raise ValueError(f"{key!r} of {self.spec.name!r} needs one piece that is all of it, got {len(pieces)}")
            return pieces[0].data.to(self.device)
        given = {piece.box: piece for piece in pieces if piece.shape == self.spec.whole}
        missing = [box for box in self._boxes if box not in given]
        if missing or len(given) != len(pieces) or len(given) != len(self._boxes):
            raise ValueError(
                f"{key!r} of {self.spec.name!r} (shape {self.spec.whole}): this rank holds the boxes {self._boxes}, "
                f"but was given {[piece.box for piece in pieces]} of shape {[piece.shape for piece in pieces]}"
            )
        if isinstance(pieces, Flat) and [piece.box for piece in pieces] == self._boxes:
            return pieces.flat.to(self.device)
        parts = [given[box].data.reshape(-1).to(self.device) for box in self._boxes]
        return torch.cat(parts) if parts else torch.zeros(0, dtype=self.spec.dtype, device=self.device)


def consolidate(
    ranks: Ranks, layout: Layout, params: Sequence[Tensor], state: Mapping[Any, Mapping[str, Any]], to: int
) -> dict[int, dict[str, Any]] | None:
    """A copy of the whole state by parameter index on rank `to`, None on the others. Collective, one tensor at a time.

    In hybrid sharding the first copy's rank `to` gets it.

    Raises:
        RuntimeError: ranks have state of different parameters or under different keys.
    """
    told = [_outline(Held(layout, ranks.rank, i, p.device), state.get(p, {})) for i, p in enumerate(params)]
    outlines = ranks.gather_objects(told)
    whole: dict[int, dict[str, Any]] = {}
    for i, p in enumerate(params):
        source = layout.owner(i) if layout.kind == "whole" else to
        told_of = [outline[i] for outline in outlines]
        if layout.kind == "even" and any(each.keys() != told_of[source].keys() for each in told_of):
            name, keys = layout.params[i].name, [list(each) for each in told_of]
            raise RuntimeError(f"the ranks hold different states of {name!r}, by rank: {keys}")
        for key, part in told_of[source].items():
            mine = state.get(p, {}).get(key)
            if part.kind == "cut":
                value = _assemble(ranks, layout, i, mine, [each[key].value for each in told_of], to)
            elif part.kind == "tensor":
                value = _fetch(ranks, mine, part, source, to, p.device if part.beside else torch.device("cpu"))
            else:
                value = part.value
            whole.setdefault(i, {})[key] = value
    return whole if ranks.rank == to and not ranks.copy else None


class _Part(NamedTuple):
    """What a rank tells of one state: `cut` or `tensor` with its shape and dtype, or a plain `value`.

    `beside` says whether a tensor is where its parameter is, rather than on the CPU.
    """

    kind: str
    shape: tuple[int, ...]
    value: Any
    beside: bool = True


def _outline(held: Held, entry: Mapping[str, Any]) -> dict[str, _Part]:
    """What this rank holds of one parameter's state."""

    def part(value: Any) -> _Part:
        if isinstance(value, Tensor):
            beside = value.device.type == held.device.type
            return _Part("cut" if held.is_cut(value) else "tensor", tuple(value.shape), value.dtype, beside)
        return _Part("value", (), value)

    return {key: part(value) for key, value in entry.items()} if held.owned else {}


def _fetch(ranks: Ranks, mine: Any, part: _Part, source: int, to: int, device: torch.device) -> Tensor | None:
    """A copy on rank `to` of the tensor that `source` holds whole."""
    if ranks.rank not in (source, to):
        return None
    value = mine.clone() if ranks.rank == source else torch.empty(part.shape, dtype=part.value, device=device)
    ranks.move(value, source, to)
    return value


def _assemble(
    ranks: Ranks, layout: Layout, param: int, mine: Any, dtypes: Sequence[torch.dtype], to: int
) -> Tensor | None:
    """The whole of a state that the ranks hold slices of, on rank `to`; the dtype is known to ranks with elements."""
    intervals = [layout.interval(param, rank) for rank in range(ranks.world_size)]
    sizes = [stop - start for start, stop in intervals]
    dtype = next((d for d, n in zip(dtypes, sizes, strict=True) if n), dtypes[0])
    parts = ranks.gather_parts(mine.to(dtype), sizes, to)
    return None if parts is None else torch.cat(parts).view(layout.params[param].shape)


def tensor_bytes(state: Mapping[Any, Mapping[str, Any]]) -> int:
    """Bytes of all tensors in a state."""
    tensors = (v for entry in state.values() for v in entry.values() if isinstance(v, Tensor))
    return sum(t.numel() * t.element_size() for t in tensors)
