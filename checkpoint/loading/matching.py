"""What of a checkpoint goes where in the live model and optimizer, by name, and what does not fit. Pure.

See [Note: groups by their members].
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from ..format.records import Group
from ..format.values import Json

# [Note: groups by their members]
# Group numbers mean nothing: a live group gets the hyper-parameters of the stored groups that its parameters were in.
# Where these are several that differ there is no answer, and a strict load refuses; one that is not strict leaves the
# hyper-parameters that differ as they are in the live group.

_SHOWN = 20
_PER_GROUP = frozenset({"base_lrs", "_last_lr", "lr_lambdas", "min_lrs", "max_lrs", "base_momentums", "max_momentums"})


def listed(what: str, names: Sequence[str]) -> list[str]:
    """One line for a list of names, none for an empty one."""
    if not names:
        return []
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return [f"{what}: {', '.join(names[:_SHOWN])}{more}"]


@dataclass
class GroupMatch:
    """For each live group its `options` (encoded hyper-parameters to set) and `homes`, the number of the stored group
    that it comes from (None for one that comes from none); `undecided` are the hyper-parameters without an answer, and
    `problems` say so."""

    options: list[dict[str, Json]] = field(default_factory=list)
    homes: list[int | None] = field(default_factory=list)
    undecided: list[list[str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)


def match_groups(live: Sequence[Sequence[str]], stored: Sequence[Group]) -> GroupMatch:
    """Where the hyper-parameters of each live group, given by the names of its members, come from."""
    home_of = {name: number for number, group in enumerate(stored) for name in group.params}
    empty = [number for number, group in enumerate(stored) if not group.params]
    match = GroupMatch()
    for number, members in enumerate(live):
        homes = sorted({home_of[name] for name in members if name in home_of})
        if not members and empty:
            homes = [empty.pop(0)]
        options = [stored[home].options for home in homes]
        differing = sorted(
            {key for other in options for key in {*options[0], *other} if _unlike(key, options[0], other)}
        )
        if differing:
            values = "; ".join(f"{key}: {[each.get(key) for each in options]}" for key in differing)
            match.problems.append(
                f"group {number} of the optimizer has parameters of groups {homes} of the checkpoint, which differ in "
                f"{values}"
            )
        match.options.append({k: v for k, v in options[0].items() if k not in differing} if options else {})
        match.homes.append(homes[0] if homes else None)
        match.undecided.append(differing)
    return match


def _unlike(key: str, a: Mapping[str, Json], b: Mapping[str, Json]) -> bool:
    return (key in a) != (key in b) or (key in a and a[key] != b[key])


def missing_options(match: GroupMatch, needed: Iterable[str], live: Sequence[Mapping[str, Any]]) -> list[str]:
    """Hyper-parameters that the live groups have and the stored ones lack, as of an optimizer of another kind."""
    needed = list(needed)
    return [
        f"{key} of group {number}"
        for number, options in enumerate(match.options)
        if match.homes[number] is not None
        for key in needed
        if key not in options and key in live[number] and key not in match.undecided[number]
    ]


def reorder(state: Any, homes: Sequence[int | None], stored: int, live: Any = None) -> Any:
    """A torch scheduler's state dict (nested ones too) with its lists per group in the order of the live groups.

    homes: for each live group the stored group that it comes from, one of `stored`; `live` is the scheduler's state
    dict now, for groups that come from none.
    """
    if isinstance(state, list):
        beside = live if isinstance(live, list) and len(live) == len(state) else [None] * len(state)
        return [reorder(item, homes, stored, other) for item, other in zip(state, beside, strict=True)]
    if type(state) is not dict:
        return state
    ordered: dict[Any, Any] = {}
    for key, value in state.items():
        now = live.get(key) if isinstance(live, dict) else None
        if key in _PER_GROUP and isinstance(value, list) and len(value) == stored:
            mine: list[Any] = now if isinstance(now, list) and len(now) == len(homes) else [None] * len(homes)
            ordered[key] = [mine[i] if home is None else value[home] for i, home in enumerate(homes)]
        else:
            ordered[key] = reorder(value, homes, stored, now)
    return ordered
