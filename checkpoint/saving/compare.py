"""Whether the ranks are saving the same thing: what they say is compared, and the first difference named. Pure."""

from __future__ import annotations

from ..errors import CheckpointError
from ..format.records import state_key
from ..format.values import Json


def merge_states(ranks: list[Json]) -> tuple[dict[str, dict[str, Json]], dict[str, tuple[int, ...]]]:
    """What all ranks together say about states, and for each shared one who holds it (nothing where all agree)."""
    if len(ranks) == 1:
        return ranks[0], {}
    merged: dict[str, dict[str, Json]] = {}
    holders: dict[str, tuple[int, ...]] = {}
    first: dict[str, int] = {}
    for rank, states in enumerate(ranks):
        for name, state in states.items():
            for key, about in state.items():
                stored = state_key(name, key)
                known = merged.setdefault(name, {}).setdefault(key, about)
                first.setdefault(stored, rank)
                if {known[0], about[0]} == {"shared", "pieces"}:  # one rank holds all there is, as after consolidating
                    known = known if known[0] == "shared" else about
                    merged[name][key] = known
                elif known != about:
                    raise CheckpointError(
                        f"ranks disagree on the state {key!r} of {name!r}: {_short(known)} on rank {first[stored]}, "
                        f"{_short(about)} on rank {rank}"
                    )
                if about[0] == "shared":
                    holders[stored] = (*holders.get(stored, ()), rank)
    return merged, holders


_ADVICE = {"scheduler": " (what it is given, such as a loss, must be averaged over the ranks before)"}


def compare(what: str, values: list[Json]) -> None:
    """Raise CheckpointError that says where the values of the ranks differ first."""
    for rank, value in enumerate(values):
        found = _difference(values[0], value, what)
        if found:
            where, a, b = found
            told = f"ranks disagree on {where}: {_short(a)} on rank 0, {_short(b)} on rank {rank}"
            raise CheckpointError(told + _ADVICE.get(what, ""))


def _difference(a: Json, b: Json, where: str) -> tuple[str, Json, Json] | None:
    if isinstance(a, dict) and isinstance(b, dict):
        for key in [*a, *(k for k in b if k not in a)]:
            if key not in a or key not in b:
                return f"{where} {key!r}", "there" if key in a else "missing", "there" if key in b else "missing"
            if found := _difference(a[key], b[key], f"{where} {key!r}"):
                return found
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for i, (x, y) in enumerate(zip(a, b, strict=True)):
            if found := _difference(x, y, f"{where} {i}"):
                return found
    elif a != b or type(a) is not type(b):
        return where, a, b
    return None


def _short(value: Json) -> str:
    text = str(value)
    return text if len(text) <= 200 else text[:197] + "..."
