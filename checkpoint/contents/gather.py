"""What of a model and an optimizer goes into a checkpoint, under which names. Local: no collective, no file."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from ...bare import bare_model
from ...pieces import Box, NamedState, Piece, Shape
from ..errors import CheckpointError
from ..format.datafile import Item
from ..format.dtypes import dtype_name
from ..format.records import file_key, model_key, rng_key, state_key
from ..format.values import Json, encode
from . import dtensors

PARAMS_ONLY = frozenset({"params", "param_names"})


@dataclass
class Snapshot:
    """What this rank has to save. `about` is JSON by section (model, opt, state), to be compared between ranks.

    `shared`: tensors that this rank holds whole, and others may hold too. `own`: boxes that only this rank holds.
    `frozen`: the keys of what belongs to parameters that are not trained.
    A tensor in `about["model"]` is `[kind, dtype, shape]`, of kind shared, first (rank 0 has the say) or pieces.
    A state in `about["state"]` is `[kind, ...]`: `["shared", dtype, shape]`, `["pieces"]` or `["value", encoded]`.
    """

    about: dict[str, Json] = field(default_factory=lambda: {"model": None, "opt": None, "state": {}})
    shared: dict[str, Tensor] = field(default_factory=dict)
    own: list[Item] = field(default_factory=list)
    frozen: set[str] = field(default_factory=set)

    @property
    def own_bytes(self) -> int:
        """Bytes that this rank writes in any case."""
        return sum(item.nbytes for item in self.own)


def take_model(snapshot: Snapshot, model: nn.Module, opt: Any = None) -> None:
    """Add the model's state dict: tied tensors once, with their further names beside.

    An optimizer that spreads over other ranks than a DTensor's mesh knows which of them hold the same part.
    """
    take_tensors(snapshot, bare_model(model).state_dict(keep_vars=True), getattr(opt, "held_elsewhere", None))


def take_tensors(
    snapshot: Snapshot, state_dict: Mapping[str, Any], elsewhere: Callable[[Tensor], bool] | None = None
) -> None:
    """Add the entries of a model's state dict; DTensors of which `elsewhere` says so are written by other ranks."""
    tensors: dict[str, Json] = {}
    aliases: dict[str, str] = {}
    values: dict[str, Json] = {}
    first_name: dict[int, str] = {}
    for name, value in state_dict.items():
        if type(name) is not str:
            raise CheckpointError(f"the names of a state dict are text, got {name!r}")
        if not isinstance(value, Tensor):
            values[name] = encode(value, f"model value {name!r}")
        elif id(value) in first_name:
            aliases[name] = first_name[id(value)]
        else:
            first_name[id(value)] = name
            if dtensors.is_one(value) and elsewhere is not None and elsewhere(value):
                kind = "pieces"
            else:
                kind = _take_tensor(snapshot, model_key(name), value.detach(), f"model tensor {name!r}")
            if kind == "shared" and not isinstance(value, nn.Parameter):
                kind = "first"  # running statistics differ between ranks: never a mixture
            tensors[name] = [kind, dtype_name(value.dtype, name), list(value.shape)]
            if isinstance(value, nn.Parameter) and not value.requires_grad:
                snapshot.frozen.add(model_key(name))
    snapshot.about["model"] = {"tensors": tensors, "order": list(tensors), "aliases": aliases, "values": values}


def _take_tensor(snapshot: Snapshot, key: str, value: Tensor, where: str) -> str:
    """Add a tensor; the answer is its kind: shared (whole, maybe also elsewhere) or pieces (of a DTensor)."""
    if dtensors.is_one(value):
        for box, local in dtensors.written_here(value, where):
            _take_piece(snapshot, key, tuple(value.shape), box, local, where)
        return "pieces"
    _check_plain(key, value, where)
    snapshot.shared[key] = value
    return "shared"


def made_of_others(value: Tensor) -> bool:
    """Whether `value` is of a class that only looks like a tensor and keeps its data in others."""
    return type(value).__torch_dispatch__ is not Tensor.__torch_dispatch__


def _take_piece(snapshot: Snapshot, key: str, shape: Shape, box: Box, data: Tensor, where: str) -> None:
    _check_plain(key, data, where)
    if not box.numel:
        return
    snapshot.own.append(Item(key, dtype_name(data.dtype, where), shape, box, data.detach()))


def _check_plain(key: str, value: Tensor, where: str) -> None:
    if value.is_meta or value.layout is not torch.strided or value.is_quantized:
        raise CheckpointError(f"{where} has no plain data to save (device {value.device}, layout {value.layout})")
    if made_of_others(value):
        raise CheckpointError(f"{where} is a {type(value).__name__}, which keeps its data in other tensors: save those")
    dtype_name(value.dtype, where)
    if file_key(key) == "__metadata__":
        raise CheckpointError(f"{where}: safetensors files have no room for a tensor of that name")
    try:
        key.encode()
    except UnicodeEncodeError:
        raise CheckpointError(f"{where}: the name {key!r} is not valid unicode") from None


def take_optimizer(snapshot: Snapshot, opt: Any, model: nn.Module | None) -> None:
    """Add groups, hyper-parameters and states, by parameter name."""
    names = names_by_group(opt, model)
    params = [p for group in opt.param_groups for p in group["params"]]
    flat = [name for group in names for name in group]
    by_name = dict(zip(flat, params, strict=True))
    known = {name: (tuple(p.shape), p.dtype) for name, p in by_name.items()}
    _take_packed(snapshot, opt.state_dict(), names, known, lambda name, shape: boxes_of(opt, by_name[name], shape))


def take_state_dict(snapshot: Snapshot, state_dict: Mapping[str, Any]) -> None:
    """Add a state dict: of an optimizer where it has `state` and `param_groups`, else of a model."""
    if set(state_dict) != {"state", "param_groups"}:
        take_tensors(snapshot, state_dict)
        return
    groups = state_dict["param_groups"]
    if isinstance(state_dict, NamedState) and state_dict.params:
        known = [(name, (shape, dtype)) for name, shape, dtype in state_dict.params]
        names = [[known[number][0] for number in group["params"]] for group in groups]
        _take_packed(snapshot, state_dict, names, dict(known), None)
        return
    numbers = itertools.count()
    names = [[str(next(numbers)) for _ in group["params"]] for group in groups]
    if all("param_names" in group for group in groups):
        names = [list(group["param_names"]) for group in groups]
    _take_packed(snapshot, state_dict, names, {name: None for group in names for name in group}, None)


def _take_packed(
    snapshot: Snapshot,
    state_dict: Mapping[str, Any],
    names: list[list[str]],
    params: Mapping[str, tuple[Shape, torch.dtype] | None],
    boxes: Callable[[str, Shape], list[Box]] | None,
) -> None:
    """Add a state dict of an optimizer: by parameter name the shape and dtype where they are known; `boxes` says what
    this rank holds of a state of a shape, where somebody knows."""
    groups = []
    name_of: dict[int, str] = {}
    for i, (group, members) in enumerate(zip(state_dict["param_groups"], names, strict=True)):
        name_of |= dict(zip(group["params"], members, strict=True))
        options = {k: encode(v, f"group {i} {k!r}") for k, v in group.items() if k not in PARAMS_ONLY}
        groups.append({"params": members, "options": options})
    snapshot.about["opt"] = {
        "params": {n: None if p is None else list(p[0]) for n, p in params.items()},
        "dtypes": {n: None if p is None else dtype_name(p[1], f"parameter {n!r}") for n, p in params.items()},
        "groups": groups,
    }
    for number, state in state_dict["state"].items():
        if number not in name_of:
            raise CheckpointError(f"the optimizer's state has an entry {number!r} that belongs to no parameter")
        name = name_of[number]
        about = {key: _take_state(snapshot, boxes, name, key, value) for key, value in state.items()}
        snapshot.about["state"][name] = about
    for group, members in zip(state_dict["param_groups"], names, strict=True):
        if group.get("frozen"):
            snapshot.frozen |= {model_key(name) for name in members}
            for name in members:
                snapshot.frozen |= {state_key(name, key) for key in snapshot.about["state"].get(name, ())}


def _take_state(
    snapshot: Snapshot, boxes_here: Callable[[str, Shape], list[Box]] | None, name: str, key: Any, value: Any
) -> Json:
    where = f"state {key!r} of {name!r}"
    if type(key) is not str:
        raise CheckpointError(f"{where}: the keys of a state must be strings")
    stored = state_key(name, key)
    if isinstance(value, tuple) and all(isinstance(piece, Piece) for piece in value):
        for piece in value:
            if not piece.copy:
                _take_piece(snapshot, stored, piece.shape, piece.box, piece.data, where)
        return ["pieces"]
    if not isinstance(value, Tensor):
        return ["value", encode(value, where)]
    if boxes_here is not None and not dtensors.is_one(value):
        boxes = boxes_here(name, tuple(value.shape))
        if boxes != [Box.whole(value.shape)]:  # a whole copy of a sharded state, as after consolidating
            for box in boxes:
                _take_piece(snapshot, stored, tuple(value.shape), box, value[box.slices], where)
            return ["pieces"]
    kind = _take_tensor(snapshot, stored, value, where)
    return ["pieces"] if kind == "pieces" else [kind, dtype_name(value.dtype, where), list(value.shape)]


def take_rng(snapshot: Snapshot, rank: int, states: Mapping[str, Tensor]) -> None:
    """Add the random generators of this rank."""
    for name, state in states.items():
        shape = tuple(state.shape)
        snapshot.own.append(Item(rng_key(rank, name), "U8", shape, Box.whole(shape), state))


def boxes_of(opt: Any, param: Tensor, shape: Shape) -> list[Box]:
    """The boxes that this rank holds of a state of `shape` of `param`: all of it, unless the optimizer knows better."""
    ask = getattr(opt, "boxes", None)
    return [Box.whole(shape)] if ask is None else list(ask(param, shape))


def names_by_group(opt: Any, model: nn.Module | None, positions: bool = False) -> list[list[str]]:
    """The names of the parameters of each group: the model's where it has them, else the optimizer's own.

    With `positions` the number of a parameter over all groups is its name, unless the names are numbers themselves.
    Raises CheckpointError where a parameter has no name, or two have the same.
    """
    known = {} if model is None else names_in(bare_model(model))
    own = own_names(opt)
    names = [[known.get(id(p), own.get(id(p))) for p in group["params"]] for group in opt.param_groups]
    if positions and not all(name is not None and name.isdecimal() for group in names for name in group):
        numbers = itertools.count()
        return [[str(next(numbers)) for _ in group] for group in names]
    nameless = [
        f"number {j} of group {i} (shape {tuple(opt.param_groups[i]['params'][j].shape)})"
        for i, group in enumerate(names)
        for j, name in enumerate(group)
        if name is None
    ]
    if nameless:
        raise CheckpointError(
            f"{len(nameless)} parameters of the optimizer have no name, the first is {nameless[0]}: pass the model="
            f" they belong to, or build the optimizer from model.named_parameters()"
        )
    flat = [name for group in names for name in group]
    twice = sorted({str(name) for name in flat if flat.count(name) > 1}) if len(set(flat)) < len(flat) else []
    if twice:
        raise CheckpointError(f"several parameters of the optimizer have the same name: {', '.join(twice[:10])}")
    return [[str(name) for name in group] for group in names]


def names_in(model: nn.Module) -> dict[int, str]:
    """The names of parameters by `id`, as the state dict has them: without wrappers for activation checkpointing."""
    known = {id(p): name for name, p in model.named_parameters()}
    if any("_checkpoint_wrapped_module" in name for name in known.values()):
        for name, value in reversed(model.state_dict(keep_vars=True).items()):
            if id(value) in known:
                known[id(value)] = name
    return known


def own_names(opt: Any) -> dict[int, str]:
    """The names that the optimizer itself has for its parameters, by `id` of the parameter."""
    ask = getattr(opt, "param_names", None)
    if callable(ask):
        return {id(p): name for p, name in ask().items()}
    return {
        id(p): name
        for group in opt.param_groups
        for p, name in zip(group["params"], _listed(group.get("param_names")), strict=False)
    }


def _listed(names: Iterable[str] | None) -> Iterable[str]:
    return () if names is None else names
