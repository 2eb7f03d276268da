"""From what a user passes as `params` to a list of torch-style group dicts."""

from __future__ import annotations

import numbers
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from .hypers import Group


def collect_groups(params: Any) -> list[Group]:
    """Parameter groups as a list of dicts with `params` (a new list) and, where parameters are named, `param_names`.

    Accepts a tensor, an iterable of tensors or of `(name, tensor)` pairs (one group), an iterable of such iterables
    (one group each; a tensor among them is a group of one), or torch's `[{'params': ..., 'lr': ...}]`.

    Raises:
        TypeError: something that is no parameter, group or name.
        ValueError: no parameters at all, a parameter twice, names for some parameters only.
    """
    if isinstance(params, Tensor):
        return [{"params": [params]}]
    items = list(_iterable(params, "params"))
    if not items:
        used_up = " (a generator such as model.parameters() is used up after the first time)"
        hint = used_up if isinstance(params, Iterator) else ""
        raise ValueError(f"the optimizer got no parameters: `params` is empty{hint}")
    if any(_is_group(item) for item in items):
        groups = [_one_group(item, f"group {i}") for i, item in enumerate(items)]
    else:
        groups = [_one_group(items, "params")]
    check_groups(groups)
    return groups


def check_groups(groups: list[Group]) -> None:
    """Raise a ValueError if a parameter stands twice in `groups`, a name twice in one, or if only some have names."""
    seen: dict[int, str] = {}
    for i, group in enumerate(groups):
        for j, p in enumerate(group["params"]):
            if not isinstance(p, Tensor):
                continue
            if id(p) in seen:
                raise ValueError(
                    f"a parameter of shape {tuple(p.shape)} stands twice, as {seen[id(p)]} and as params[{j}] of "
                    f"group {i}: each parameter belongs to one group, once"
                )
            seen[id(p)] = f"params[{j}] of group {i}"
        names: list[str] = group.get("param_names", [])
        if twice := sorted(name for name, n in Counter(names).items() if n > 1):
            raise ValueError(f"group {i} has several parameters named {', '.join(map(repr, twice))}")
    named = ["param_names" in group for group in groups]
    if any(named) and not all(named):
        raise ValueError(
            f"groups {[i for i, n in enumerate(named) if n]} come with parameter names and groups "
            f"{[i for i, n in enumerate(named) if not n]} without: name all or none"
        )


def _one_group(item: Any, where: str) -> Group:
    """One group from a torch-style dict, a tensor, or an iterable of parameters."""
    if isinstance(item, Mapping):
        if "params" not in item:
            raise TypeError(f"{where} is a dict without 'params', it has {sorted(map(str, item))}")
        group: Group = {**item, **_members(item["params"], where)}
        names = group.get("param_names")
        if names is not None and len(names) != len(group["params"]):
            raise ValueError(f"{where} has {len(group['params'])} params and {len(names)} param_names")
        return group
    return _members(item, where)


def _members(params: Any, where: str) -> Group:
    """`{'params': [...]}` and, for `(name, tensor)` pairs, `param_names`."""
    items = [params] if isinstance(params, Tensor) else list(_iterable(params, where))
    pairs = [_is_named(item) for item in items]
    if any(pairs) and not all(pairs):
        raise ValueError(f"{where} mixes (name, parameter) pairs and bare parameters: name all or none")
    members = [item[1] for item in items] if any(pairs) else items
    for j, p in enumerate(members):
        _check_member(p, f"params[{j}] of {where}")
    if any(pairs):
        return {"params": members, "param_names": [item[0] for item in items]}
    return {"params": members}


def _check_member(p: Any, where: str) -> None:
    """A parameter is a leaf tensor; a plain number is let through (it has no gradient and never steps)."""
    if isinstance(p, Tensor):
        if not (p.is_leaf or p.retains_grad):
            raise ValueError(f"{where} is the result of a computation (a non-leaf tensor), which cannot be optimized")
    elif not isinstance(p, numbers.Number):
        raise TypeError(f"{where} is a {type(p).__name__}, not a tensor")


def _is_named(item: Any) -> bool:
    return isinstance(item, tuple) and len(item) == 2 and isinstance(item[0], str)


def _is_group(item: Any) -> bool:
    """Whether an element of `params` is a group: a dict or a collection that is no tensor and no named pair."""
    if isinstance(item, Tensor | str) or _is_named(item):
        return False
    return isinstance(item, Mapping | Iterable)


def _iterable(params: Any, where: str) -> Iterable[Any]:
    """`params` itself if its order is meaningful; a TypeError that says what to pass otherwise."""
    if isinstance(params, nn.Module) and not isinstance(params, nn.ParameterList):
        raise TypeError(f"{where} is a module: pass its parameters(), or lists of them for several groups")
    if isinstance(params, set | frozenset):
        raise TypeError(f"{where} is a set, whose order changes between runs: pass a list")
    if isinstance(params, str | bytes | Mapping) or not isinstance(params, Iterable):
        raise TypeError(f"{where} is a {type(params).__name__}, not parameters or groups of parameters")
    return params
