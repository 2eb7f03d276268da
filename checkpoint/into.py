"""The live objects that a checkpoint is loaded into: what each needs, what does not fit, and the change itself."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

from torch import Tensor, nn

from ..pieces import Box, Piece, Shape
from . import sharded_tensor
from .dtypes import DTYPES
from .gather import PARAMS_ONLY, boxes_of, names_by_group, own_names, unwrap
from .reading import Wanted
from .records import Group, Manifest, model_key, state_key
from .values import decode

_SHOWN = 20
_PER_GROUP = frozenset({"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})


def _report(what: str, names: Sequence[str]) -> list[str]:
    """One line for a list of names, none for an empty one."""
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"]


class ModelTarget:
    """A model's parameters and buffers, as its state dict names them."""

    def __init__(self, manifest: Manifest, model: nn.Module) -> None:
        self.model = unwrap(model)
        self.live: dict[str, Any] = dict(self.model.state_dict(keep_vars=True))
        self.source: dict[str, str] = {}
        self.values: dict[str, Any] = {}
        self.wants: dict[str, Wanted] = {}
        self.problems = self._match(manifest)

    def _match(self, manifest: Manifest) -> list[str]:
        part = manifest.model
        if part is None:
            return ["it holds no model"]
        stored = {name: name for name in part.tensors} | part.aliases
        tensors = {name: value for name, value in self.live.items() if isinstance(value, Tensor)}
        self.source = {name: stored[name] for name in tensors if name in stored}
        self.values = {name: decode(value, name) for name, value in part.values.items()}
        problems = _report("missing in the checkpoint", [n for n in self.live if n not in stored | part.values])
        problems += _report("unexpected in the checkpoint", [n for n in stored | part.values if n not in self.live])
        wrong = []
        for name, source in self.source.items():
            entry, value = manifest.tensors[model_key(source)], tensors[name]
            if entry.shape != tuple(value.shape) or DTYPES[entry.dtype] is not value.dtype:
                mine = f"{value.dtype} {tuple(value.shape)}".removeprefix("torch.")
                wrong.append(f"{name} (stored {_named(entry.dtype)} {entry.shape}, live {mine})")
        problems += _report("of another shape or dtype", wrong)
        return problems + self._untied(tensors)

    def _untied(self, tensors: dict[str, Tensor]) -> list[str]:
        """Live names of one tensor that are two in the checkpoint."""
        first: dict[int, str] = {}
        split = []
        for name, source in self.source.items():
            other = first.setdefault(id(tensors[name]), name)
            if self.source[other] != source:
                split.append(f"{other} and {name}")
        return _report("one tensor in the model, two in the checkpoint", split)

    def wanted(self) -> list[Wanted]:
        """What this rank needs: whole tensors, or its box of a DTensor."""
        for name, source in self.source.items():
            self.wants[source] = Wanted(model_key(source), [_box_here(self.live[name], name)])
        return list(self.wants.values())

    def commit(self) -> None:
        """Copy into the live tensors, through the module's own load_state_dict."""
        state: dict[str, Any] = dict(self.values)
        for name, source in self.source.items():
            state[name] = _whole_or_like(self.live[name], self.wants[source].buffers[0])
        self.model.load_state_dict(state, strict=True)


class OptTarget:
    """An optimizer's groups, hyper-parameters and states."""

    what = "optimizer"

    def __init__(self, manifest: Manifest, opt: Any, model: nn.Module | None) -> None:
        self.manifest, self.opt = manifest, opt
        self.names = names_by_group(opt, model)
        self.own_names = own_names(opt)
        self.params: list[Tensor] = [p for group in opt.param_groups for p in group["params"]]
        self.groups: list[Group] = []
        self.order: list[int] = []
        self.wants: list[tuple[int, str, Wanted]] = []
        self.before: dict[str, Any] | None = None
        self.problems = self._match()

    def _match(self) -> list[str]:
        part = self.manifest.opt
        if part is None:
            return ["it holds no optimizer"]
        # a tied parameter may go by another of its names
        aliases = self.manifest.model.aliases if self.manifest.model else {}
        self.names = [[n if n in part.params else aliases.get(n, n) for n in group] for group in self.names]
        flat = [name for group in self.names for name in group]
        problems = _report(
            "parameters missing in the checkpoint's optimizer", [n for n in flat if n not in part.params]
        )
        live = set(flat)
        problems += _report(
            "parameters unexpected in the checkpoint's optimizer",
            [n for group in part.groups for n in group.params if n not in live],
        )
        shapes = [
            (n, part.params[n], tuple(p.shape)) for n, p in zip(flat, self.params, strict=True) if n in part.params
        ]
        wrong = [f"{n} (stored {stored}, live {shape})" for n, stored, shape in shapes if stored != shape]
        problems += _report("parameters of another shape", wrong)
        return problems or self._match_groups(part.groups)

    def _match_groups(self, stored: Sequence[Group]) -> list[str]:
        """Pair groups by their members, whatever the order."""
        by_members: dict[frozenset[str], list[int]] = {}
        for number, group in enumerate(stored):
            by_members.setdefault(frozenset(group.params), []).append(number)
        unlike = []
        for i, members in enumerate(self.names):
            same = by_members.get(frozenset(members))
            if same:
                self.order.append(same.pop(0))
            else:
                unlike.append(_where_members_are(i, members, stored))
        problems = _report("groups with other members", unlike)
        if len(stored) != len(self.names):
            problems.append(f"the checkpoint has {len(stored)} parameter groups, the optimizer {len(self.names)}")
        if problems:
            return problems
        self.groups = [stored[number] for number in self.order]
        return self._match_options()

    def _match_options(self) -> list[str]:
        needed = [key for key in self.opt.defaults if key not in PARAMS_ONLY]
        lacking = [
            f"{key} of group {i}"
            for i, group in enumerate(self.groups)
            for key in needed
            if key not in group.options and key in self.opt.param_groups[i]
        ]
        return _report("hyper-parameters missing in the checkpoint (of another optimizer?)", lacking)

    def wanted(self) -> list[Wanted]:
        """What this rank holds of every state."""
        part = self.manifest.opt
        assert part is not None
        for number, name in enumerate(name for group in self.names for name in group):
            if name in part.states:
                for key in part.states[name].tensors:
                    stored = state_key(name, key)
                    boxes = self._boxes(self.params[number], self.manifest.tensors[stored].shape)
                    self.wants.append((number, key, Wanted(stored, boxes)))
        return [want for _, _, want in self.wants]

    def _boxes(self, param: Tensor, shape: Shape) -> list[Box]:
        if _goes_along(param, shape):
            return [_box_here(param, "a parameter")]
        if not shape:  # whoever does not hold a number drops it
            return [Box.whole(shape)]
        return boxes_of(self.opt, param, shape)

    def state_dict(self) -> dict[str, Any]:
        """The state dict to load: torch's shape, with whole tensors or tuples of this rank's pieces."""
        part = self.manifest.opt
        assert part is not None
        flat = [name for group in self.names for name in group]
        state: dict[int, dict[str, Any]] = {}
        for number, name in enumerate(flat):
            if name in part.states:
                values = part.states[name].values
                state[number] = {key: decode(value, f"{key} of {name}") for key, value in values.items()}
        for number, key, want in self.wants:
            state[number][key] = self._value(flat[number], self.params[number], want)
        groups, first = [], 0
        for live, members, group in zip(self.opt.param_groups, self.names, self.groups, strict=True):
            options = {key: decode(value, key) for key, value in group.options.items()}
            options["params"] = list(range(first, first + len(members)))
            if "param_names" in live:
                options["param_names"] = list(live["param_names"])
            groups.append(options)
            first += len(members)
        return {"state": state, "param_groups": groups}

    def _value(self, name: str, param: Tensor, want: Wanted) -> Any:
        shape = self.manifest.tensors[want.key].shape
        if _goes_along(param, shape):
            return sharded_tensor.like(param, want.buffers[0])
        if want.boxes == [Box.whole(shape)]:
            return want.buffers[0]
        name = self.own_names.get(id(param), name)
        return tuple(Piece(name, shape, box, data) for box, data in zip(want.boxes, want.buffers, strict=True))

    def commit(self) -> None:
        """Load into the live optimizer."""
        self.before = self.opt.state_dict()
        self.opt.load_state_dict(self.state_dict())

    def roll_back(self) -> None:
        """Load what was there before `commit`."""
        if self.before is not None:
            self.opt.load_state_dict(self.before)


class SchedulerTarget:
    """Anything with a state_dict of plain values, such as a torch LRScheduler.

    `order` has for each live group the number of the stored group that it is; empty where they are the same.
    """

    what = "scheduler"

    def __init__(self, manifest: Manifest, scheduler: Any, order: Sequence[int]) -> None:
        self.scheduler = scheduler
        self.before: Any = None
        self.problems: list[str] = []
        if manifest.scheduler is None:
            self.problems = ["it holds no scheduler"]
            return
        self.state = reorder(decode(manifest.scheduler, "scheduler"), order)
        lacking = [str(key) for key in scheduler.state_dict() if key not in self.state]
        self.problems = _report("entries missing in the checkpoint's scheduler (of another kind?)", lacking)

    def wanted(self) -> list[Wanted]:
        """Nothing: its values are in the manifest."""
        return []

    def commit(self) -> None:
        """Load into the live scheduler."""
        self.before = copy.deepcopy(self.scheduler.state_dict())
        self.scheduler.load_state_dict(self.state)

    def roll_back(self) -> None:
        """Load what was there before `commit`."""
        if self.before is not None:
            self.scheduler.load_state_dict(self.before)


def reorder(state: Any, order: Sequence[int]) -> Any:
    """A torch scheduler's state dict (nested ones too), its lists per group put in the order of the live groups."""
    if isinstance(state, list):
        return [reorder(item, order) for item in state]
    if type(state) is not dict:
        return state
    return {
        key: [value[i] for i in order]
        if key in _PER_GROUP and isinstance(value, list) and len(value) == len(order)
        else reorder(value, order)
        for key, value in state.items()
    }


def _where_members_are(number: int, members: Sequence[str], stored: Sequence[Group]) -> str:
    """Say how a live group differs from the stored ones."""
    of = {name: i for i, group in enumerate(stored) for name in group.params}
    homes = sorted({of[name] for name in members})
    if len(homes) > 1:
        return f"group {number} of the optimizer is spread over groups {homes} of the checkpoint"
    if not homes:
        return f"group {number} of the optimizer is empty"
    others = [name for name in stored[homes[0]].params if name not in set(members)]
    shown = ", ".join(others[:_SHOWN])
    return f"group {number} of the optimizer lacks {shown}, which group {homes[0]} of the checkpoint has"


def _goes_along(param: Tensor, shape: Shape) -> bool:
    """Whether a state of `shape` is laid out as its parameter, a DTensor."""
    return sharded_tensor.is_one(param) and tuple(param.shape) == shape


def _box_here(value: Tensor, where: str) -> Box:
    return sharded_tensor.box_here(value, where) if sharded_tensor.is_one(value) else Box.whole(value.shape)


def _whole_or_like(live: Tensor, data: Tensor) -> Tensor:
    return sharded_tensor.like(live, data) if sharded_tensor.is_one(live) else data


def _named(dtype: str) -> str:
    return str(DTYPES[dtype]).removeprefix("torch.")
