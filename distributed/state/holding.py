"""What a sharded optimizer holds, and how it shows that: state, state dict, boxes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.distributed as dist
from torch import Tensor

from ...bare import bare_optimizer
from ...base import outside_compile
from ...engine.describe import attribute
from ...engine.master import MASTER
from ...hypers import Group
from ...pieces import Box, NamedState
from ...spread import show
from ...state import ParamState, flags_of
from ...state_dict import load_state_dict, pack
from ..around import AroundOptimizer
from ..communication.collectives import Ranks
from ..communication.lane import Lane
from ..ownership.layout import Layout
from ..parameters.buckets import Buffers
from .sharded_state import Held, consolidate, tensor_bytes

StateDict = dict[str, Any]


class HoldsParts(AroundOptimizer):
    """An optimizer of whose state each rank holds a part."""

    _ranks: Ranks
    _buffers: Buffers
    _lane: Lane
    _index: dict[int, int]
    _consolidated: dict[int, dict[str, Any]] | None
    _known: tuple[Layout, dict[int, Held]] | None = None

    # ---- who takes part

    @property
    def layout(self) -> Layout:
        """Who owns what."""
        return self._buffers.layout

    @property
    def process_group(self) -> dist.ProcessGroup | None:
        """The ranks that share the state; None without an initialised process group."""
        return self._ranks.group

    @property
    def rank(self) -> int:
        """This process's number in the process group."""
        return self._ranks.rank

    @property
    def world_size(self) -> int:
        """Number of ranks that share the state."""
        return self._ranks.world_size

    # ---- state

    @property  # type: ignore[override]
    def state(self) -> ParamState:
        """The state of this rank's parts, see `Optimizer.state`. What is read is that after the last step."""
        if self._within is not None and self._lane.stepped:
            self._lane.join()
        return super().state

    @state.setter
    def state(self, state: ParamState) -> None:
        AroundOptimizer.state.fset(self, state)  # type: ignore[attr-defined]

    def _held(self, p: Tensor) -> Held:
        """How this rank holds the state of `p`. Worked out once per layout."""
        if self._known is None or self._known[0] is not self.layout:
            self._known = self.layout, {}
        index, known = self._index[id(p)], self._known[1]
        if index not in known or known[index].device != p.device:
            known[index] = Held(self.layout, self.rank, index, p.device, self._ranks.copy)
        return known[index]

    @property
    def _shaped(self) -> set[str]:
        """Keys of states that the chain says, or its recordings show, are shaped like their parameter."""
        told = {name for cb in self.cbs for name in attribute(cb, "like_param", ())}
        return told | self.opt.program().whole_states() | {MASTER}

    def _keep_own_state(self) -> None:
        """Cut whole states down to what this rank owns."""
        shaped = self._shaped
        for p, entry in list(self.state.items()):
            held = self._held(p)
            own = entry if held.owned else flags_of(entry)
            self.state[p] = {key: held.take(key, value, key in shaped) for key, value in own.items()}

    def _load_value(self, p: Any, key: str, value: Any, group: Group) -> Any:
        """One value of a loaded state as this rank holds it."""
        like_param = isinstance(value, Tensor) and key in self._shaped
        return self.opt._load_value(p, key, self._held(p).take(key, value, like_param), group)

    def _drop_foreign_state(self) -> None:
        """Keep nothing but marks of parameters that other ranks own."""
        for p, entry in list(self.state.items()):
            if not self._held(p).owned:
                self.state[p] = flags_of(entry)

    def boxes(self, p: Tensor, shape: tuple[int, ...]) -> list[Box]:
        """Which boxes of a state of `p` with global `shape` this rank holds."""
        return self._held(p).boxes(tuple(shape))

    def held_elsewhere(self, p: Tensor) -> bool:
        """Whether an earlier rank holds the same part of the DTensor `p` of the model."""
        return bool(self.rank or self._ranks.copy)

    def param_names(self) -> dict[Any, str]:
        """The model's fully-qualified names by parameter."""
        return {p: spec.name for spec, p in zip(self.layout.params, self._buffers.params, strict=True)}

    def state_bytes(self) -> int:
        """Bytes of the state tensors on this rank."""
        return tensor_bytes(self.state)

    def clear_state(self) -> None:
        """Forget all training state; the marks `force_train` and `do_wd` stay."""
        bare_optimizer(self)._consolidated = None
        super().clear_state()

    def consolidate_state_dict(self, to: int = 0) -> None:
        """Bring the whole state to rank `to`, where `state_dict()` then shows whole tensors until the next step.

        Collective. The memory of rank `to` must hold all of the state; a checkpoint needs no such thing.

        Raises:
            ValueError: there is no rank `to`.
        """
        if not 0 <= to < self.world_size:
            raise ValueError(f"to={to} is no rank of {self.world_size}")
        bare_optimizer(self)._consolidated = consolidate(self._ranks, self.layout, self._buffers.params, self.state, to)

    @outside_compile
    def state_dict(self) -> StateDict:
        """State and groups in torch's shape, on every rank and without communication.

        What is spread over the ranks is a tuple of `Piece`, this rank's boxes of it, possibly none; other tensors and
        numbers are as they are. It also knows the parameters' names and shapes. After `consolidate_state_dict` the
        state is whole on the rank asked for.
        """
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        shown: dict[Any, Mapping[str, Any]] = {}
        for i, p in enumerate(self._buffers.params):
            if self._consolidated is not None:
                shown[p] = {key: show(p, value) for key, value in self._consolidated.get(i, {}).items()}
            elif p in self.state and (held := self._held(p)).owned:
                shown[p] = {key: held.show(value) for key, value in self.state[p].items()}
        packed = pack(self.param_groups, shown)
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            packed = post_hook(self, packed) or packed
        return NamedState(packed, [(spec.name, spec.whole, spec.dtype) for spec in self.layout.params])

    @outside_compile
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over state, hyper-parameters and freezing. Each state is a whole tensor or this rank's pieces of it.

        Every rank must load the same thing. Nothing changes on this rank if anything does not fit.

        Raises:
            ValueError: groups, members, names, shapes or pieces differ from what this rank holds.
        """
        load_state_dict(self, state_dict)  # type: ignore[arg-type]  # has all that it asks an Optimizer for
        self._drop_foreign_state()
        bare_optimizer(self)._consolidated = None

    def _watch_groups(self) -> None:
        """Leave that to the optimizer within, whose groups these are."""
        self.opt._watch_groups()

    def __getstate__(self) -> dict[str, Any]:
        raise TypeError(
            "a sharded optimizer is tied to its process group and cannot be copied or pickled: "
            "save it with fastopt.checkpoint, or copy its state_dict()"
        )
