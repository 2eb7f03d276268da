"""Compares what should be the same on all ranks, but need not be: parameters, and numbers in the state."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import Tensor

from .averaged import sketch
from .checksums import checksums
from .consistency import compare, digest

DIVERGED = (
    "these replicas have diverged: go on from a checkpoint, or take over rank 0's values "
    "(torch.distributed.broadcast(p.detach(), 0) of each parameter)"
)

LOADED = (
    "load_state_dict() of the model or the optimizer, or clear_state(), was not called alike on all ranks since the "
    "last step: call it on every rank, with the same contents"
)


def refuse_diverged(
    gather: Callable[[Any], list[Any]],
    settings: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    advice: str,
    numbers: Sequence[int] | None = None,
) -> None:
    """Refuse what differs between ranks. Collective; one small message where all is alike.

    Args:
        gather: gives what each rank gives to it.
        settings: values, by what they are.
        tensors: by what they are; compared bit for bit.
        advice: what to do.
        numbers: of the ranks, from 0 without.

    Raises:
        RanksDiffer: on all ranks.
    """
    told = {**settings, **checksums(tensors)}
    if len(set(gather(digest(sorted(told.items()))))) == 1:
        return
    first, *others = gather(told)
    differ = {what for other in others for what in first | other if first.get(what) != other.get(what)}
    shown = {what: _shown(tensors[what]) if what in tensors else told[what] for what in told if what in differ}
    compare(gather(shown), numbers, advice)


def state_numbers(state: Mapping[Any, Mapping[str, Any]], names: Mapping[int, str]) -> dict[str, str]:
    """The numbers in the state of each parameter, such as that of its steps."""
    return {
        f"{key!r} of {names.get(id(p), '?')!r}": repr(value)
        for p, entry in state.items()
        for key, value in entry.items()
        if isinstance(value, int | float)
    }


def _shown(x: Tensor) -> str:
    """Some numbers of a tensor, and its checksum."""
    numbers = f"{sketch({0: x})[0]}, " if x.is_floating_point() and x.element_size() > 1 else ""
    return f"{numbers}checksum {checksums({'': x})['']}"
