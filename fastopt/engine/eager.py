"""The reference executor: each callback is called as it is, parameter by parameter."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor

from .describe import cb_name, needs_of, required
from .reductions import across_processes
from .work import GroupWork, Reduce


def run_eager(cbs: Sequence[Callable[..., Any]], work: Sequence[GroupWork], reduce: Reduce | None = None) -> None:
    """Run the chain on every tensor of `work`.

    Args:
        cbs: the chain. A cb with a method `step_all` is called once with all of the work instead.
        work: groups with their tensors and states.
        reduce: sums over processes, where the tensors are slices; every process must then pass the same list of groups
            with the same number of tensors.
    """
    for cb in cbs:
        if hasattr(cb, "step_all"):
            cb.step_all(work)
            continue
        calls = [
            partial(_call, cb, p, state, group.hypers, group.index)
            for group in work
            for p, state in zip(group.params, group.states, strict=True)
        ]
        if reduce is not None and needs_of(cb) == "norm":
            across_processes(calls, reduce)
        else:
            for call in calls:
                call()


def _call(cb: Callable[..., Any], p: Tensor, state: dict[str, Any], hypers: dict[str, Any], group: int) -> None:
    """Call `cb` for one parameter and merge a returned dict into its state. A hyper wins over a state of its name."""
    given = {**state, **hypers}
    missing = [name for name in required(cb) if name not in given]
    if missing:
        raise TypeError(
            f"{cb_name(cb)} needs {', '.join(map(repr, missing))} in group {group}: neither a hyper-parameter "
            f"({', '.join(hypers) or 'none'}) nor a state from an earlier callback ({', '.join(state) or 'none'}). "
            f"Pass it to the optimizer, or put the stat that makes it before {cb_name(cb)}."
        )
    result = cb(p, **given)
    if isinstance(result, dict):
        state.update(result)
