"""A live optimizer that a checkpoint is loaded into."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...pieces import Box, Flat, Piece, Shape
from ..contents import dtensors
from ..contents.gather import PARAMS_ONLY, boxes_of, names_by_group, own_names
from ..errors import CheckpointError
from ..format.dtypes import DTYPES
from ..format.records import Manifest, state_key
from ..format.values import decode
from ..io.hostmemory import in_large_pages
from .matching import GroupMatch, listed, match_groups, missing_options
from .reading import Wanted
from .targets import box_here, local_part

#: Entries of a group that a checkpoint may lack: its members, and where counts are kept.
_NOT_NEEDED = PARAMS_ONLY | {"capturable"}


class OptTarget:
    """An optimizer's groups, hyper-parameters and states. See [Note: copies or in place].

    Without `strict`, `problems` are notes, and what does not fit stays as it is. `cast`: floating-point states may be
    stored in another floating-point dtype than the live ones have.
    """

    what = "optimizer"

    def __init__(
        self, manifest: Manifest, opt: Any, model: nn.Module | None, strict: bool = True, cast: bool = False
    ) -> None:
        self.manifest, self.opt, self.strict, self.cast = manifest, opt, strict, cast
        self.names = names_by_group(opt, model, has_positions(manifest))
        self.own_names = own_names(opt)
        self.params: list[Tensor] = [p for group in opt.param_groups for p in group["params"]]
        self.match = GroupMatch()
        self.fresh: list[Wanted] = []
        self.again: list[Wanted] = []
        self._now: dict[str, Any] = {}
        self._committing = False
        self._found: list[_Found] = []
        self._skip: set[str] = set()
        self._kept: set[tuple[int, str]] = set()
        self.problems = self._match()

    @property
    def stored_groups(self) -> int:
        """Number of groups in the checkpoint."""
        return len(self.manifest.opt.groups) if self.manifest.opt else 0

    def _match(self) -> list[str]:
        part = self.manifest.opt
        if part is None:
            return ["it holds no optimizer"]
        # a tied parameter may go by another of its names
        aliases = self.manifest.model.aliases if self.manifest.model else {}
        self.names = [[n if n in part.params else aliases.get(n, n) for n in group] for group in self.names]
        flat = self._flat
        problems = listed("parameters missing in the checkpoint's optimizer", [n for n in flat if n not in part.params])
        live = set(flat)
        problems += listed(
            "parameters unexpected in the checkpoint's optimizer",
            [n for group in part.groups for n in group.params if n not in live],
        )
        stored = [part.params.get(name) for name in flat]
        wrong = {
            n: f"{n} (stored {shape}, live {tuple(p.shape)})"
            for n, shape, p in zip(flat, stored, self.params, strict=True)
            if shape is not None and shape != tuple(p.shape)
        }
        self._skip = set(wrong)
        no_memory = [n for n, p in zip(flat, self.params, strict=True) if p.is_meta]
        problems += listed("parameters on the meta device (give them memory first)", no_memory)
        problems += listed("parameters of another shape", list(wrong.values()))
        self.match = match_groups(self.names, part.groups)
        if problems and self.strict:
            return problems
        needed = [key for key in self.opt.defaults if key not in _NOT_NEEDED]
        lacking = missing_options(self.match, needed, self.opt.param_groups)
        problems += self.match.problems
        problems += listed("hyper-parameters missing in the checkpoint (of another optimizer?)", lacking)
        return problems + listed("states of another dtype (cast=True rounds them)", self._look())

    @property
    def _flat(self) -> list[str]:
        return [name for group in self.names for name in group]

    # ---- what to read

    def _look(self) -> list[str]:
        """For every state: what this rank holds of it in the checkpoint, and what is live of it now.

        Returns the states whose dtype is another and may not be changed.
        """
        part = self.manifest.opt
        assert part is not None
        self._now = self.opt.state_dict()
        live = self._now["state"]
        wrong = []
        for number, name in enumerate(self._flat):
            if name in part.states and name not in self._skip:
                for key in part.states[name].tensors:
                    param = self.params[number]
                    stored = self.manifest.tensors[state_key(name, key)]
                    boxes = self._boxes(param, stored.shape)
                    now = live.get(number, {}).get(key)
                    dtype = DTYPES[stored.dtype]
                    mine = _dtype(now) or dtype
                    if mine is not dtype and not (self.cast and mine.is_floating_point and dtype.is_floating_point):
                        wrong.append(f"{key} of {name} (stored {dtype}, live {mine})".replace("torch.", ""))
                        self._kept.add((number, key))
                        continue
                    places = _places(now, boxes, mine)
                    self._found.append(_Found(number, key, state_key(name, key), boxes, places, mine))
        return wrong

    @property
    def copied_bytes(self) -> Counter[torch.device]:
        """Bytes of copies of what is live, on each device, if all of it is read into copies."""
        copies: Counter[torch.device] = Counter()
        for found in self._found:
            for place in found.live or ():
                copies[place.device] += place.nbytes
        return copies

    def plan(self, in_place: bool) -> None:
        """Set `fresh` and `again`."""
        for found in self._found:
            stored = self.manifest.tensors[found.stored]
            want = Wanted(found.stored, found.boxes)
            if in_place and found.live is not None:
                found.again = True
                self.again.append(want)
                continue
            part = local_part(self.params[found.number]).detach()
            if stored.shape and self._is_whole(found, part):
                new = torch.empty_like(part, dtype=found.dtype)  # with its strides
                found.buffers = want.buffers = [in_large_pages(new)]
                self.fresh.append(want)
                continue
            device = part.device if stored.shape else torch.device("cpu")
            new = torch.empty(sum(b.numel for b in found.boxes), dtype=found.dtype, device=device)
            found.flat = in_large_pages(new)
            want.buffers = _views(found.flat, found.boxes)
            self.fresh.append(want)
            found.buffers = want.buffers

    def _is_whole(self, found: _Found, part: Tensor) -> bool:
        """Whether a state is one tensor, like `part`, its parameter. Steps give other bits where strides are others."""
        return found.boxes == [Box.whole(tuple(part.shape))] and not hasattr(self.opt, "held_elsewhere")

    def _boxes(self, param: Tensor, shape: Shape) -> list[Box]:
        if self._goes_along(param, shape):
            return [box_here(param, "a parameter")]
        if not shape:  # whoever does not hold a number drops it
            return [Box.whole(shape)]
        return boxes_of(self.opt, param, shape)

    def _goes_along(self, param: Tensor, shape: Shape) -> bool:
        """Whether a state of `shape` is laid out as its parameter, a DTensor: unless other ranks hold some of it."""
        return not hasattr(self.opt, "held_elsewhere") and dtensors.is_one(param) and tuple(param.shape) == shape

    # ---- what to load

    def state_dict(self) -> dict[str, Any]:
        """The state dict to load: torch's shape, with whole tensors or tuples of this rank's pieces."""
        part = self.manifest.opt
        assert part is not None
        flat = self._flat
        now = self._now
        state: dict[int, dict[str, Any]] = {}
        for number, name in enumerate(flat):
            if name in part.states and name not in self._skip:
                values = part.states[name].values
                state[number] = {key: decode(value, f"{key} of {name}") for key, value in values.items()}
            elif name not in part.params or name in self._skip:
                state[number] = now["state"].get(number, {})
        for number, key in self._kept:
            state[number][key] = now["state"][number][key]
        for found in self._found:
            value = _kept(now["state"][found.number][found.key]) if found.again else self._value(found)
            state[found.number][found.key] = value
        groups, first = [], 0
        for live, members, options in zip(self.opt.param_groups, self.names, self.match.options, strict=True):
            loaded = {key: decode(value, key) for key, value in options.items()}
            kept = {} if self.strict else {key: v for key, v in live.items() if key not in PARAMS_ONLY}
            group = {**kept, **loaded, "params": list(range(first, first + len(members)))}
            if "param_names" in live:
                group["param_names"] = list(live["param_names"])
            groups.append(group)
            first += len(members)
        return {"state": state, "param_groups": groups}

    def _value(self, found: _Found) -> Any:
        param, shape = self.params[found.number], self.manifest.tensors[found.stored].shape
        if self._goes_along(param, shape):
            return dtensors.like(param, found.buffers[0])
        # a sharded optimizer takes a copy of its part of a whole tensor, but keeps the memory of pieces
        in_pieces = hasattr(self.opt, "held_elsewhere") and shape == tuple(param.shape) != ()
        if found.boxes == [Box.whole(shape)] and not in_pieces:
            return found.buffers[0]
        name = self.own_names.get(id(param), self._flat[found.number])
        pieces = (Piece(name, shape, box, data) for box, data in zip(found.boxes, found.buffers, strict=True))
        return Flat(pieces, found.flat)

    def commit(self) -> None:
        """Load into the live optimizer. What is read in place keeps its values until it has been read."""
        if self.manifest.opt is None:
            return
        self._committing = True
        self.opt.load_state_dict(self.state_dict())

    def roll_back(self) -> None:
        """Load what was there before `commit`."""
        if self._committing:
            self.opt.load_state_dict(self._now)

    def aim(self) -> None:
        """Point `again` at the memory that the optimizer holds after `commit`."""
        self._now = {}
        taken = [(found, want) for found, want in zip((f for f in self._found if f.again), self.again, strict=True)]
        states = self.opt.state
        moved = [(found, want) for found, want in taken if not found.is_in(states.get(self.params[found.number], {}))]
        for found, want in taken:
            want.buffers = list(found.live or ())
        now = self.opt.state_dict()["state"] if moved else {}
        for found, want in moved:
            places = _places(now[found.number][found.key], found.boxes, None)
            if places is None:
                raise CheckpointError(f"the optimizer did not keep {found.key!r} of {self._flat[found.number]!r}")
            want.buffers = places


class _Found:
    """A state in the checkpoint: of parameter `number`, under `key` in its state and `stored` in the manifest.

    boxes: what this rank holds of it. live: the memory of these boxes now, None where there is none. dtype: that it
    has, or will have, in the optimizer.
    """

    def __init__(
        self, number: int, key: str, stored: str, boxes: list[Box], live: list[Tensor] | None, dtype: torch.dtype
    ) -> None:
        self.number, self.key, self.stored, self.boxes, self.live = number, key, stored, boxes, live
        self.dtype = dtype
        self.again = False
        self.flat = torch.empty(0)
        self.buffers: list[Tensor] = []

    def is_in(self, state: Mapping[str, Any]) -> bool:
        """Whether a parameter's state, as the optimizer itself holds it, still has the memory of `live`."""
        if not self.live:
            return True
        value = state.get(self.key)
        if not isinstance(value, Tensor):
            return False
        here = local_part(value)
        return here.data_ptr() == self.live[0].data_ptr() and here.nbytes == sum(part.nbytes for part in self.live)


def _dtype(value: Any) -> torch.dtype | None:
    """The dtype of a value of a state dict, None where it is no tensor."""
    first = value[0].data if isinstance(value, tuple) and value and isinstance(value[0], Piece) else value
    return first.dtype if isinstance(first, Tensor) else None


def _places(value: Any, boxes: Sequence[Box], dtype: torch.dtype | None) -> list[Tensor] | None:
    """The memory of `boxes` in a value of a state dict, None where it holds something else (or another dtype)."""
    if isinstance(value, Tensor):
        found = [local_part(value)] if len(boxes) == 1 and tuple(local_part(value).shape) == boxes[0].shape else None
    elif isinstance(value, tuple) and all(isinstance(piece, Piece) for piece in value):
        data = {piece.box: piece.data for piece in value}
        found = [data[box] for box in boxes] if set(data) == set(boxes) else None
    else:
        return None
    return found if found is not None and all(dtype in (None, t.dtype) and t.ndim for t in found) else None


def _kept(value: Any) -> Any:
    """A value of a state dict such that loading it keeps its memory: pieces that follow each other as `Flat`."""
    if not isinstance(value, tuple) or not value:
        return value
    parts = [piece.data for piece in value]
    at = parts[0].data_ptr()
    for part in parts:
        if part.data_ptr() != at or not part.is_contiguous():
            return value
        at += part.nbytes
    total = sum(part.numel() for part in parts)
    return Flat(value, torch.as_strided(parts[0], (total,), (1,), parts[0].storage_offset()))


def _views(flat: Tensor, boxes: Sequence[Box]) -> list[Tensor]:
    views, at = [], 0
    for box in boxes:
        views.append(flat[at : at + box.numel].view(box.shape))
        at += math.prod(box.shape)
    return views


def has_positions(manifest: Manifest) -> bool:
    """Whether the names in the checkpoint are mere positions, as of an optimizer without names."""
    part = manifest.opt
    return part is not None and all(name == str(i) for i, name in enumerate(part.params))
