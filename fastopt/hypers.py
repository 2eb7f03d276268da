"""Hyper-parameters: how values become one per group, and the live views under the callbacks' names.

The stored truth is `param_groups`, with PyTorch's names (`betas`, `momentum`, `weight_decay`). A *name map* such as
`{'betas__0': 'mom', 'weight_decay': 'wd'}` says which stored entry carries which hyper; `betas__0` is item 0 of the
tuple `betas`. Views translate on every access and hold nothing themselves.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, MutableMapping, MutableSequence, Sequence
from functools import lru_cache
from operator import itemgetter
from typing import Any, TypeVar, overload

from torch import Tensor

T = TypeVar("T")
Group = dict[str, Any]

#: What a hyper-parameter may be given as: one value, one per group, or a slice over the groups.
Hyper = float | Tensor | Sequence[float] | slice

#: PyTorch's names on the left, the names that callbacks use on the right.
pytorch_hp_map = {
    "momentum": "mom",
    "weight_decay": "wd",
    "alpha": "sqr_mom",
    "betas__0": "mom",
    "betas__1": "sqr_mom",
}

# Entries of a group that are not hyper-parameters: its members, its freezing, and torch's implementation switches.
_SWITCHES = ("foreach", "fused", "maximize", "differentiable", "capturable", "decoupled_weight_decay")
_BOOKKEEPING = frozenset(("params", "param_names", "frozen", "name", *_SWITCHES))
# Those of them that nothing may overwrite as if they were hyper-parameters.
_RESERVED = frozenset({"params", "param_names", "frozen"})


def check_name(name: str) -> None:
    """Raise a ValueError if `name` is that of a part of the group which is no hyper-parameter."""
    if name in _RESERVED:
        raise ValueError(f"{name!r} is no hyper-parameter: assign opt.param_lists, or call freeze_to or set_freeze")


def detuplify_pg(d: Mapping[str, Any]) -> Group:
    """The entries of a torch parameter group without `params`, every tuple `name` spread into `name__0`, `name__1`.

    Examples:
        >>> detuplify_pg({"lr": 0.01, "betas": (0.9, 0.99), "params": [1, 2]})
        {'lr': 0.01, 'betas__0': 0.9, 'betas__1': 0.99}
    """
    spread: Group = {}
    for key, value in d.items():
        if key == "params":
            continue
        if isinstance(value, list | tuple):
            spread.update({f"{key}__{i}": item for i, item in enumerate(value)})
        else:
            spread[key] = value
    return spread


def set_item_pg(pg: MutableMapping[str, Any], k: str, v: Any) -> MutableMapping[str, Any]:
    """Set entry `k` of a torch parameter group; `name__i` replaces item `i` of the tuple `name`. Returns `pg`.

    Examples:
        >>> set_item_pg({"betas": (0.9, 0.99)}, "betas__1", 0.999)
        {'betas': (0.9, 0.999)}
    """
    name, separator, index = k.partition("__")
    if not separator:
        pg[k] = v
        return pg
    if name not in pg or not index.isdigit() or int(index) >= len(pg[name]):
        raise KeyError(f"{k!r} names no item of a tuple in this parameter group, which has {sorted(pg)}")
    items = list(pg[name])
    items[int(index)] = v
    pg[name] = tuple(items)
    return pg


class HyperNames:
    """Translation between the entries of a stored group and the hypers' names.

    Args:
        hp_map: stored name (`weight_decay`, `betas__0`) to hyper (`wd`, `mom`).
        spread_all: spread every tuple of a group, not only those that `hp_map` names (what `OptimWrapper` needs).
    """

    def __init__(self, hp_map: Mapping[str, str], spread_all: bool = False) -> None:
        self.hp_map = dict(hp_map)
        self.spread_all = spread_all
        self._tuples = {stored.partition("__")[0] for stored in hp_map if "__" in stored}
        self._plans: dict[tuple[str, ...], list[tuple[str, str, list[str] | None]]] = {}

    def hypers(self, group: Mapping[str, Any]) -> Group:
        """The hypers of a stored group, by their own names."""
        found: Group = {}
        for key, name, items in self._plan(tuple(group)):
            value = group[key]
            if items is not None and isinstance(value, list | tuple):
                names = items if len(items) == len(value) else self._item_names(key, len(value))
                found.update(zip(names, value, strict=True))
            else:
                found[name] = value
        return found

    def columns(self, groups: Sequence[Mapping[str, Any]], keys: Iterable[str | None]) -> dict[str, list[Any]] | None:
        """The hypers that the entries `keys` hold, by their own names, with one value per group.

        None where an entry is no hyper, or not one hyper alone, or missing somewhere: `hypers` tells those apart.
        """
        found: dict[str, list[Any]] = {}
        for key in keys:
            if key is None or key in _BOOKKEEPING or self._is_spread(key):
                return None
            name = self.hp_map.get(key, key)
            others = {name, *(stored.partition("__")[0] for stored, hyper in self.hp_map.items() if hyper == name)}
            if any(other in group for other in others - {key} for group in groups):
                return None
            try:
                found[name] = list(map(itemgetter(key), groups))
            except KeyError:
                return None
        return found

    def _plan(self, keys: tuple[str, ...]) -> list[tuple[str, str, list[str] | None]]:
        """For each hyper of a group with these keys: its key, its name, and the names of its items if it is spread."""
        plan = self._plans.get(keys)
        if plan is None:
            plan = self._plans[keys] = [
                (key, self.hp_map.get(key, key), self._item_names(key, 2) if self._is_spread(key) else None)
                for key in keys
                if key not in _BOOKKEEPING
            ]
        return plan

    def _is_spread(self, key: str) -> bool:
        return self.spread_all or key in self._tuples

    def _item_names(self, key: str, n: int) -> list[str]:
        return [self.hp_map.get(f"{key}__{i}", f"{key}__{i}") for i in range(n)]

    def stored_name(self, name: str, group: Mapping[str, Any]) -> str:
        """Where hyper `name` lives in `group`: `mom` -> `betas__0` or `momentum`; an unknown name is its own place."""
        places = [stored for stored, hyper in self.hp_map.items() if hyper == name]
        present = [stored for stored in places if stored.partition("__")[0] in group]
        return (present or [name])[0]

    def known(self, name: str, group: Mapping[str, Any]) -> bool:
        """Whether `group` has the hyper `name`."""
        return self.stored_name(name, group).partition("__")[0] in group

    def to_hypers(self, given: Mapping[str, Any]) -> Group:
        """Entries in either spelling by the hypers' own names.

        Raises:
            ValueError: a hyper is given in both, or a tuple has not one number for each of its hypers.
        """
        hypers: Group = {}
        for key, value in given.items():
            items = [name for stored, name in self.hp_map.items() if stored.startswith(f"{key}__")]
            found = {self.hp_map.get(key, key): value}
            if items:
                whole = isinstance(value, list | tuple) and not any(isinstance(v, list | tuple) for v in value)
                if not whole or len(value) != len(items):
                    raise ValueError(f"{key}={value!r}, expected one number for each of {', '.join(items)}")
                found = dict(zip(items, value, strict=True))
            for name in found:
                if name in hypers or (name != key and name in given):
                    raise ValueError(f"{key!r} and {name!r} are the same hyper-parameter: give one of them")
            hypers.update(found)
        return hypers

    def to_stored(self, given: Mapping[str, Any], defaults: Mapping[str, Any]) -> Group:
        """Entries in either spelling as stored entries; `defaults` completes tuples of which some items are given."""
        stored: Group = {}
        tuples: dict[str, dict[int, Any]] = {}
        spelled = {hyper: place for place, hyper in self.hp_map.items()}
        for key, value in given.items():
            name, separator, index = spelled.get(key, key).partition("__")
            if name != key and name in given:
                raise ValueError(f"{key!r} and {name!r} are the same hyper-parameter: give one of them")
            if separator and name in self._tuples:
                tuples.setdefault(name, {})[int(index)] = value
            elif key in self._tuples and not self.spread_all and not self._fits(key, value):
                wanted = [hyper for place, hyper in self.hp_map.items() if place.startswith(f"{key}__")]
                raise ValueError(f"{key}={value!r}, expected one number for each of {', '.join(wanted)}")
            else:
                stored[name + separator + index] = value
        for name, items in tuples.items():
            whole = dict(enumerate(defaults.get(name, ()))) | items
            stored[name] = tuple(whole[i] for i in sorted(whole))
        return stored

    def _fits(self, key: str, value: Any) -> bool:
        """Whether a value of the tuple `key` has an item for each of its hypers."""
        return isinstance(value, list | tuple) and len(value) == sum(x.startswith(f"{key}__") for x in self.hp_map)


@lru_cache(maxsize=64)
def hyper_names(hp_map: tuple[tuple[str, str], ...], spread_all: bool = False) -> HyperNames:
    """`HyperNames` of the items of a name map."""
    return HyperNames(dict(hp_map), spread_all)


def plain(value: Any, keep_tensor: bool = False) -> Any:
    """A numpy scalar, a 0-d array or a 0-d tensor (unless `keep_tensor`) as a Python number, all else as it is."""
    if getattr(value, "ndim", None) != 0 or (keep_tensor and isinstance(value, Tensor)):
        return value
    return value.item()


def group_values(name: str, value: Any, n_groups: int) -> list[Any]:
    """One value of hyper `name` per group.

    A number (also a numpy scalar or a 0-d array), a bool, a string, a mapping or a 0-d tensor is the same for every
    group. A collection has one value per group, or one for all. `slice(a, b)` is a geometric progression from `a` to
    `b`; `slice(b)` gives `b` to the last group and `b / 10` to the ones before.

    Raises:
        ValueError: the collection has another length than `n_groups`, or the slice cannot be spread.
    """
    if isinstance(value, slice):
        return _spread(name, value, n_groups)
    if isinstance(value, Tensor):
        values = [value] * n_groups if value.ndim == 0 and name == "lr" else value.tolist()
    elif hasattr(value, "tolist"):  # numpy scalars and arrays
        values = value.tolist()
    elif isinstance(value, Iterable) and not isinstance(value, str | bytes | Mapping):
        values = [plain(v, keep_tensor=name == "lr") for v in value]
        if len(values) == 1:
            values = values * n_groups
    else:
        values = value
    if not isinstance(values, list):
        return [values] * n_groups
    if len(values) != n_groups:
        raise ValueError(
            f"Trying to set {len(values)} values for {name} but there are {n_groups} parameter groups: "
            f"give one number, or one per group."
        )
    return values


def _spread(name: str, value: slice, n_groups: int) -> list[float]:
    """`slice(a, b)` or `slice(b)` as one number per group."""
    start, stop = plain(value.start), plain(value.stop)
    if value.step is not None or any(isinstance(end, str | bytes) for end in (start, stop)):
        raise ValueError(f"{name}={value} is no slice(last) or slice(first, last) of numbers")
    if stop is None:
        raise ValueError(f"{name}={value} needs an end: slice(last) or slice(first, last)")
    if not start:
        return [stop / 10] * (n_groups - 1) + [stop]
    if n_groups == 1:
        return [stop]
    if start * stop <= 0:
        raise ValueError(f"{name}={value} is spread geometrically, which needs two numbers of the same sign")
    ratio = (stop / start) ** (1 / (n_groups - 1))
    return [start * ratio**i for i in range(n_groups)]


class HyperView(MutableMapping[str, Any]):
    """The hypers of one group as a live mapping: reads and writes go to the group that is in the optimizer now."""

    def __init__(self, group: Callable[[], Group], names: HyperNames) -> None:
        self._group = group
        self._names = names

    def __getitem__(self, name: str) -> Any:
        hypers = self._names.hypers(self._group())
        if name in hypers:
            return hypers[name]
        if name in _BOOKKEEPING:
            raise KeyError(name)
        return self._group()[name]

    def __setitem__(self, name: str, value: Any) -> None:
        check_name(name)
        group = self._group()
        set_item_pg(group, self._names.stored_name(name, group), plain(value, keep_tensor=True))

    def __delitem__(self, name: str) -> None:
        stored = self._names.stored_name(name, self._group())
        if stored not in self._group() or stored in _BOOKKEEPING:
            raise KeyError(f"hyper-parameter {name!r} cannot be removed from this group")
        del self._group()[stored]

    def __iter__(self) -> Iterator[str]:
        return iter(self._names.hypers(self._group()))

    def __len__(self) -> int:
        return len(self._names.hypers(self._group()))

    def __repr__(self) -> str:
        return repr(self._names.hypers(self._group()))

    def __reduce__(self) -> tuple[Any, ...]:
        return dict, (dict(self),)  # a copy is a snapshot


class GroupsView(MutableSequence[T]):
    """A live sequence with one item per parameter group, read and written through two functions of the index."""

    def __init__(self, length: Callable[[], int], get: Callable[[int], T], put: Callable[[int, T], None]) -> None:
        self._length, self._get, self._put = length, get, put

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> MutableSequence[T]: ...
    def __getitem__(self, index: int | slice) -> T | MutableSequence[T]:
        positions = range(len(self))[index]
        return self._get(positions) if isinstance(positions, int) else [self._get(i) for i in positions]

    def __setitem__(self, index: Any, value: Any) -> None:
        positions = range(len(self))[index]
        if isinstance(positions, int):
            return self._put(positions, value)
        values = list(value)
        if len(values) != len(positions):
            raise ValueError(f"{len(positions)} parameter groups cannot take {len(values)} values")
        for i, item in zip(positions, values, strict=True):
            self._put(i, item)
        return None

    def __delitem__(self, index: Any) -> None:
        raise TypeError("parameter groups cannot be removed through this view; assign opt.param_groups")

    def insert(self, index: int, value: T) -> None:
        """Refused: a group comes with `add_param_group`."""
        raise TypeError("parameter groups are added with opt.add_param_group({'params': ...})")

    def __len__(self) -> int:
        return self._length()

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Iterable) or isinstance(other, str):
            return NotImplemented
        theirs = list(other)
        return len(self) == len(theirs) and all(a is b or a == b for a, b in zip(self, theirs, strict=True))

    __hash__ = None  # type: ignore[assignment]  # a live view, like a list

    def __repr__(self) -> str:
        return repr(list(self))

    def __reduce__(self) -> tuple[Any, ...]:
        return list, (list(self),)  # a copy is a snapshot


def same_tensor_everywhere(groups: Sequence[Group], key: str) -> bool:
    """Whether several groups share one tensor object under `key`, as after `Adam(groups, lr=torch.tensor(0.1))`."""
    values = [g.get(key) for g in groups]
    return len(values) > 1 and isinstance(values[0], Tensor) and all(v is values[0] for v in values)
