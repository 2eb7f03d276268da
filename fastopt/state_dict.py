"""`state_dict` and `load_state_dict`: torch's shape out, torch's and fastai's shape in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from copy import deepcopy
from typing import TYPE_CHECKING, Any, cast

from torch import Tensor

from .bare import bare_optimizer
from .engine.describe import attribute, keywords
from .engine.master import MASTER
from .hypers import Group, same_tensor_everywhere
from .spread import shown_state
from .state import FLAGS, ParamState, flags_of

if TYPE_CHECKING:
    from .optimizer import Optimizer

_MEMBERS = ("params", "param_names")

#: States of torch's optimizers, with those that are their like here.
_TORCHS = {"exp_avg": "grad_avg", "exp_avg_sq": "sqr_avg", "square_avg": "sqr_avg", "momentum_buffer": "grad_avg"}


def make_state_dict(opt: Optimizer) -> dict[str, Any]:
    """State and groups of `opt` in torch's shape, with new containers around the live tensors."""
    for pre_hook in opt._optimizer_state_dict_pre_hooks.values():
        pre_hook(opt)
    packed = pack(opt.param_groups, shown_state(opt.state))
    for post_hook in opt._optimizer_state_dict_post_hooks.values():
        packed = post_hook(opt, packed) or packed
    return packed


def pack(groups: list[Group], state: Mapping[Any, Mapping[str, Any]]) -> dict[str, Any]:
    """`{'state': {id: ...}, 'param_groups': ...}` where a parameter's id is its position over all groups."""
    members = [p for group in groups for p in group["params"]]
    entries = {i: state[p] for i, p in enumerate(members) if state.get(p)}
    packed_groups, start = [], 0
    for group in groups:
        stop = start + len(group["params"])
        own = {k: list(v) if isinstance(v, list) else v for k, v in group.items() if k != "params"}
        packed_groups.append({**own, "params": list(range(start, stop))})
        start = stop
    if entries and all(entry.keys() <= FLAGS for entry in entries.values()):
        # PyTorch's checkpoint helpers take an optimizer for stateless only if all or none of its parameters are here
        entries = {i: entries.get(i, {}) for i in range(start)}
    return {"state": {i: dict(entry) for i, entry in entries.items()}, "param_groups": packed_groups}


def load_state_dict(opt: Optimizer, state_dict: Mapping[str, Any]) -> None:
    """Replace state, hyper-parameters and freezing of `opt`; nothing changes if `state_dict` does not fit."""
    opt = bare_optimizer(opt)
    found = resolved(opt, state_dict)
    if not isinstance(found, Mapping):
        raise TypeError(f"load_state_dict takes what state_dict() gave, got a {type(found).__name__}")
    state_dict = dict(found)
    for pre_hook in opt._optimizer_load_state_dict_pre_hooks.values():
        state_dict = pre_hook(opt, state_dict) or state_dict
    if "hypers" in state_dict:
        state_dict = _from_fastai(opt, state_dict)
    if not {"state", "param_groups"} <= state_dict.keys():
        raise ValueError(
            f"a state dict has the keys 'state' and 'param_groups' (or fastai's 'state' and 'hypers'), "
            f"this one has {sorted(map(str, state_dict))}"
        )
    saved_groups = _checked_groups(state_dict["param_groups"])
    params = match_params(opt.param_groups, saved_groups)
    state = _loaded_state(opt, state_dict["state"], params)
    groups = [_loaded_group(live, saved) for live, saved in zip(opt.param_groups, saved_groups, strict=True)]
    for i, group in enumerate(groups):
        opt._check_group(group, i)
    changed = [i for i, g in enumerate(groups) if bool(g.get("frozen")) or bool(g.get("frozen")) != opt.is_frozen(i)]
    opt._check_freezable(changed)
    _keep_lr_tensors(opt.param_groups, groups)
    opt.state, opt.param_groups = state, groups
    opt._watch_groups()
    for i in changed:
        opt._freeze_group(i, groups[i].get("frozen", False))
    for post_hook in opt._optimizer_load_state_dict_post_hooks.values():
        post_hook(opt)


def resolved(opt: Any, state_dict: Mapping[str, Any]) -> Mapping[str, Any]:
    """The state dict itself, or what one that is not in memory yet (with a method `for_optimizer`) reads for `opt`."""
    fit = getattr(state_dict, "for_optimizer", None)
    return state_dict if fit is None else cast("Mapping[str, Any]", fit(opt))


def _checked_groups(saved: Any) -> list[Mapping[str, Any]]:
    """The groups of a state dict, if they are such."""
    groups = list(saved) if isinstance(saved, Iterable) else None
    if groups is None:
        raise ValueError(f"'param_groups' of a state dict is a list of groups, here it is a {type(saved).__name__}")
    for i, group in enumerate(groups):
        if not isinstance(group, Mapping) or "params" not in group:
            raise ValueError(f"group {i} of the state dict has no 'params'")
    return groups


def match_params(groups: list[Group], saved_groups: list[Mapping[str, Any]]) -> dict[Any, Any]:
    """The live parameter of every id in `saved_groups`: by name where both sides have names, else by position.

    Raises:
        ValueError: the groups or their members differ; the message names group and parameters.
    """
    if len(groups) != len(saved_groups):
        raise ValueError(f"the state dict has {len(saved_groups)} parameter groups, the optimizer has {len(groups)}")
    matched: dict[Any, Any] = {}
    for i, (live, saved) in enumerate(zip(groups, saved_groups, strict=True)):
        ids, names, saved_names = list(saved["params"]), live.get("param_names"), saved.get("param_names")
        if len(ids) != len(live["params"]):
            raise ValueError(
                f"group {i} of the state dict has {len(ids)} parameters, group {i} of the optimizer "
                f"{len(live['params'])}{_name_difference(names, saved_names)}"
            )
        if names and saved_names:
            if set(names) != set(saved_names):
                raise ValueError(f"group {i} has other parameters{_name_difference(names, saved_names)}")
            by_name = dict(zip(names, live["params"], strict=True))
            matched.update({id_: by_name[name] for id_, name in zip(ids, saved_names, strict=True)})
        else:
            matched.update(zip(ids, live["params"], strict=True))
    return matched


def _name_difference(live: Iterable[str] | None, saved: Iterable[str] | None) -> str:
    """What two lists of names do not share, as the end of a sentence; empty without names."""
    if not live or not saved:
        return ""
    live, saved = set(live), set(saved)
    return f": only in the state dict {sorted(saved - live)}, only in the optimizer {sorted(live - saved)}"


def _loaded_state(opt: Optimizer, saved: Mapping[Any, Mapping[str, Any]], params: Mapping[Any, Any]) -> ParamState:
    """The new state: saved entries by parameter; marks that the user has set stay where the saved entry has none."""
    members = [(i, j, p) for i, group in enumerate(opt.param_groups) for j, p in enumerate(group["params"])]
    where = {id(p): f"params[{j}] of group {i}" for i, j, p in members}
    group_of = {id(p): opt.param_groups[i] for i, _, p in members}
    asked = {name for cb in opt.cbs for name in keywords(cb)}
    foreign = {theirs for theirs, ours in _TORCHS.items() if ours in asked and theirs not in asked}
    shaped = {MASTER, *(name for cb in opt.cbs for name in attribute(cb, "like_param", ()))}
    state = ParamState.of((p, marks) for p, entry in opt.state.items() if (marks := flags_of(entry)))
    if not isinstance(saved, Mapping):
        raise ValueError(f"'state' of a state dict is a dict by parameter, here it is a {type(saved).__name__}")
    for id_, entry in saved.items():
        if id_ not in params:
            raise ValueError(f"the state dict has state of parameter {id_!r}, which is in none of its groups")
        if not isinstance(entry, Mapping):
            raise ValueError(f"the state of parameter {id_!r} is a {type(entry).__name__}, expected a dict")
        p = params[id_]
        for key, value in entry.items():
            if key in foreign:
                raise ValueError(
                    f"the state {key!r} of parameter {id_!r} is that of a torch optimizer, {type(opt).__name__} has "
                    f"{_TORCHS[key]!r}: begin with a new state, or keep torch's optimizer in fastopt.OptimWrapper"
                )
            if key in shaped and isinstance(value, Tensor) and value.shape != p.shape:
                raise ValueError(
                    f"{key!r} of parameter {id_!r} has shape {tuple(value.shape)} in the state dict, but "
                    f"{where[id(p)]} has shape {tuple(p.shape)}"
                )
        state[p].update({key: _load_value(opt, p, key, value, group_of[id(p)]) for key, value in entry.items()})
    return state


def _load_value(opt: Optimizer, p: Any, key: str, value: Any, group: Group) -> Any:
    """A loaded value, nested dicts included, as `opt` keeps it for `p` of `group`."""
    if isinstance(value, Mapping):
        return {k: _load_value(opt, p, k, v, group) for k, v in value.items()}
    return opt._load_value(p, key, value, group)


def _loaded_group(live: Group, saved: Mapping[str, Any]) -> Group:
    """The live group with the saved entries; members and names stay, an entry that was not saved keeps its value."""
    members = {k: live[k] for k in _MEMBERS if k in live}
    names = {"param_names": list(saved["param_names"])} if "param_names" in saved else {}
    kept = {k: v for k, v in live.items() if k not in _MEMBERS and k != "frozen"}
    taken = {k: deepcopy(v) for k, v in saved.items() if k not in _MEMBERS}
    if not taken.get("frozen", True):
        del taken["frozen"]
    return {**kept, **taken, **names, **members}


def _keep_lr_tensors(live: list[Group], loaded: list[Group]) -> None:
    """Where the live lr is a tensor it stays that object (schedulers and graphs hold it) and takes the loaded value."""
    taking = [i for i, group in enumerate(live) if isinstance(group.get("lr"), Tensor)]
    values = {i: _number(loaded[i]["lr"], f"lr of group {i} of the state dict") for i in taking}
    differ = same_tensor_everywhere(live, "lr") and len(set(values.values())) > 1
    for i in taking:
        lr = live[i]["lr"]
        loaded[i]["lr"] = lr.clone() if differ else lr
        loaded[i]["lr"].fill_(values[i])


def _number(value: Any, what: str) -> float:
    try:
        return float(value)
    except (TypeError, ValueError):
        raise ValueError(f"{what} is {value!r}, expected a number") from None


def _from_fastai(opt: Optimizer, saved: Mapping[str, Any]) -> dict[str, Any]:
    """fastai's `{'state': [per parameter], 'hypers': [per group]}`, with Lookahead's extra keys, in torch's shape."""
    hypers, entries = [dict(h) for h in saved["hypers"]], [dict(entry) for entry in saved["state"]]
    sizes = [len(group["params"]) for group in opt.param_groups]
    if len(hypers) != len(sizes):
        raise ValueError(f"the state dict has hypers of {len(hypers)} groups, the optimizer has {len(sizes)} groups")
    if len(entries) != sum(sizes):
        raise ValueError(f"the state dict has state of {len(entries)} parameters, the optimizer has {sum(sizes)}")
    if saved.get("slow_weights") is not None:
        slow = [weights for group in saved["slow_weights"] for weights in group]
        entries = [{**e, "slow_weights": w, "count": saved["count"]} for e, w in zip(entries, slow, strict=True)]
    known = {i: entry for i, entry in enumerate(entries) if entry}
    groups: list[Group] = []
    for i, (h, group) in enumerate(zip(hypers, opt.param_groups, strict=True)):
        start = sum(sizes[:i])
        entries_of_group = {**opt._names.to_stored(h, group), "params": list(range(start, start + sizes[i]))}
        groups.append({**entries_of_group, "frozen": opt.is_frozen(i)})  # fastai saves no freezing
    return {"state": known, "param_groups": groups}
