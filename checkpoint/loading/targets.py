"""The live objects that a checkpoint is loaded into: a model, and whatever has a state dict of plain values.

See [Note: copies or in place].
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...bare import bare_model
from ...pieces import Box
from ..contents import dtensors
from ..contents.gather import made_of_others
from ..format.dtypes import DTYPES
from ..format.records import Manifest, model_key
from ..format.values import decode
from ..io.hostmemory import in_large_pages
from .matching import listed, reorder
from .reading import Wanted

# [Note: copies or in place]
# Nothing live may change before every rank has read and verified all that it needs. What is not there yet, such as the
# states of a new optimizer, is read once, into the memory that it then keeps. What is there already is either read into
# copies beside it, on its device, which take its place when all ranks are done (once through the file, twice the
# memory), or verified without being kept and then read again into place (twice through the file, which the second time
# is in the page cache; no memory). Every target offers both: `fresh` is to be read before the agreement; `again` only
# to be verified before it, and read after it, or, where the user has chosen so, only read after it.


class ModelTarget:
    """A model's parameters and buffers, as its state dict names them.

    Without `strict`, `problems` are notes, and what does not fit stays as it is. `cast`: floating-point tensors may be
    stored in another floating-point dtype.
    """

    what = "model"

    def __init__(self, manifest: Manifest, model: nn.Module, strict: bool = True, cast: bool = False) -> None:
        self.manifest, self.model, self.strict, self.cast = manifest, bare_model(model), strict, cast
        self.live: dict[str, Any] = dict(self.model.state_dict(keep_vars=True))
        self.source: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        self.wants: dict[str, Wanted] = {}
        self.fresh: list[Wanted] = []
        self.again: list[Wanted] = []
        self.in_place: set[str] = set()
        self.problems = self._match()

    def _match(self) -> list[str]:
        part = self.manifest.model
        if part is None:
            return ["it holds no model"]
        stored = {name: name for name in part.tensors} | part.aliases
        tensors = {name: value for name, value in self.live.items() if isinstance(value, Tensor)}
        self.source = {name: stored[name] for name in tensors if name in stored}
        self.values = {name: decode(v, name) for name, v in part.values.items() if name in self.live}
        problems = listed("missing in the checkpoint", [n for n in self.live if n not in stored | part.values])
        problems += listed("unexpected in the checkpoint", [n for n in stored | part.values if n not in self.live])
        wrong = []
        for name, source in list(self.source.items()):
            entry, value = self.manifest.tensors[model_key(source)], tensors[name]
            if entry.shape != tuple(value.shape) or not self._dtype_fits(DTYPES[entry.dtype], value.dtype):
                mine = f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
                wrong.append(f"{name} (stored {_named(entry.dtype)} {entry.shape}, live {mine})")
                del self.source[name]
        problems += listed("of another shape or dtype", wrong)
        closed = {name: why for name in self.source if (why := not_writable(tensors[name])) is not None}
        for name in closed:
            del self.source[name]
        problems += listed("live tensors that cannot be loaded into", [f"{n} ({why})" for n, why in closed.items()])
        return problems + self._untied(tensors)

    def _dtype_fits(self, stored: Any, live: Any) -> bool:
        return stored is live or (self.cast and stored.is_floating_point and live.is_floating_point)

    def _untied(self, tensors: dict[str, Tensor]) -> list[str]:
        """Live names of one tensor that are two in the checkpoint: it can only get what is stored under the first."""
        first: dict[int, str] = {}
        split = []
        for name, source in list(self.source.items()):
            other = first.setdefault(id(tensors[name]), name)
            if self.source[other] != source:
                split.append(f"{other} and {name}")
                del self.source[name]
        return listed("one tensor in the model, two in the checkpoint", split)

    @property
    def copied_bytes(self) -> Counter[torch.device]:
        """Bytes of copies of what is live, on each device, if all of it is read into copies."""
        copies: Counter[torch.device] = Counter()
        for source, name in {source: name for name, source in self.source.items()}.items():
            entry = self.manifest.tensors[model_key(source)]
            size = int(entry.shards.sizes.sum()) * DTYPES[entry.dtype].itemsize
            copies[local_part(self.live[name]).device] += size
        return copies

    def plan(self, in_place: bool) -> None:
        """Set `fresh` and `again`."""
        own = {id(t) for t in (*self.model.parameters(), *self.model.buffers())}
        places: dict[str, dict[int, tuple[Box, Tensor]]] = {}
        for name, source in self.source.items():
            live = self.live[name]
            box = box_here(live, name)
            if in_place and id(live) in own:
                self.in_place.add(name)
                places.setdefault(source, {})[id(live)] = (box, local_part(live))
            elif source not in self.wants:
                dtype = DTYPES[self.manifest.tensors[model_key(source)].dtype]
                copy = in_large_pages(torch.empty(box.shape, dtype=dtype, device=local_part(live).device))
                self.wants[source] = Wanted(model_key(source), [box], [copy])
        self.fresh = list(self.wants.values())
        self.again = [
            Wanted(model_key(source), [box for box, _ in found.values()], [part for _, part in found.values()])
            for source, found in places.items()
        ]

    def finish(self) -> None:
        """Load the copies and the other entries, through the module's own load_state_dict."""
        state: dict[str, Any] = dict(self.values)
        for name, source in self.source.items():
            if name not in self.in_place:
                data = self.wants[source].buffers[0]
                live = self.live[name]
                state[name] = dtensors.like(live, data) if dtensors.is_one(live) else data
        self.model.load_state_dict(state, strict=self.strict and not self.in_place)


class ValuesTarget:
    """Anything with a state_dict of plain values: the scheduler, the loss scaler, the position in the data.

    values: what was stored, or nothing.
    homes: for each live group the stored group that it comes from, of `stored` many; empty where nothing is known.
    """

    def __init__(
        self,
        what: str,
        values: Sequence[Any],
        live: Any,
        strict: bool,
        homes: Sequence[int | None] = (),
        stored: int = 0,
    ) -> None:
        self.what, self.live = what, live
        self.state: list[Any] = []
        self.before: list[Any] = []
        if not values:
            self.problems = [f"it holds no {what}"]
            return
        now, state = live.state_dict(), decode(values[0], what)
        known = state if isinstance(state, dict) else {}
        lacking = [str(key) for key in now if key not in known] if isinstance(now, dict) else []
        self.problems = listed(f"entries missing in the checkpoint's {what} (of another kind?)", lacking)
        if strict or not lacking:
            self.state = [reorder(state, homes, stored, now) if homes else state]

    def commit(self) -> None:
        """Load into the live object."""
        for state in self.state:
            self.before = [copy.deepcopy(self.live.state_dict())]
            self.live.load_state_dict(state)

    def roll_back(self) -> None:
        """Load what was there before `commit`."""
        for state in self.before:
            self.live.load_state_dict(state)


def box_here(value: Tensor, where: str) -> Box:
    """The box of `value` that this rank holds: all of it, unless it is a DTensor."""
    return dtensors.box_here(value, where) if dtensors.is_one(value) else Box.whole(value.shape)


def not_writable(live: Tensor) -> str | None:
    """Why nothing can be stored in a live tensor, None where it can."""
    if live.is_meta:
        return "on the meta device: give it memory first, as by to_empty(device=...)"
    if live.is_inference() and not torch.is_inference_mode_enabled():
        return "made in inference mode: load in it, too"
    if live.is_conj() or live.is_neg():
        return "a view that conjugates or negates: resolve it first"
    part = local_part(live)
    if made_of_others(part):
        return f"a {type(part).__name__}, which keeps its data in other tensors: load into those"
    if any(size > 1 and stride == 0 for size, stride in zip(part.shape, part.stride(), strict=True)):
        return "several of its elements share memory, as after expand: clone it"
    return None


def local_part(value: Any) -> Tensor:
    """The memory of `value` on this rank."""
    part: Tensor = value.to_local() if dtensors.is_one(value) else value
    return part.detach()


def _named(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")
