"""The reference executor: parameter by parameter, each callback is called as it is."""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from functools import partial
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from ..cohorts.look import count_change
from ..describe import attribute, cb_name, needs_of, not_taken, required
from ..master import MASTER, StandIn, has_master
from ..reductions import across_processes
from ..work import GroupWork, Reduce


def run_eager(cbs: Sequence[Callable[..., Any]], work: Sequence[GroupWork], reduce: Reduce | None = None) -> None:
    """Run the chain on every tensor of `work`.

    Args:
        cbs: the chain. A cb with a method `step_all` is called once with all of the work instead.
        work: groups with their tensors and states.
        reduce: sums over processes, where the tensors are slices; every process must then pass the same list of groups
            with the same number of tensors.
    """
    masters: list[StandIn] = []
    tensors = [
        (_seen(p, state, masters), state, group)
        for group in work
        for p, state in zip(group.params, group.states, strict=True)
    ]
    for alone, part in groupby(cbs, lambda cb: _sees_all_at_once(cb, reduce)):
        chain = list(part)
        if not alone:
            for p, state, group in tensors:
                for cb in chain:
                    _call(cb, p, state, group.hypers, group.index)
            continue
        for cb in chain:
            if hasattr(cb, "step_all"):
                cb.step_all(work)
            elif reduce is not None:
                calls = [partial(_call, cb, p, state, group.hypers, group.index) for p, state, group in tensors]
                across_processes(calls, reduce)
    for master in masters:
        master.finish()
    count_change([p for group in work for p in group.params])


def check_dense(cbs: Sequence[Callable[..., Any]], work: Sequence[GroupWork]) -> None:
    """Raise a RuntimeError where a gradient is sparse and a cb is declared `dense`; nothing has changed then."""
    refusing = {cb_name(cb): dense for cb in cbs if (dense := attribute(cb, "dense", False))}
    if not refusing:
        return
    for group in work:
        for p in group.params:
            if p.grad is None or p.grad.layout is torch.strided:
                continue
            for name, dense in refusing.items():
                if dense is not True and not group.hypers.get(dense):
                    continue
                also = f" with {dense}={group.hypers[dense]}" if dense is not True else ""
                raise RuntimeError(
                    f"a parameter of shape {tuple(p.shape)} in group {group.index} has a sparse gradient, which "
                    f"{name}{also} cannot take: use dense gradients (Embedding(sparse=False)), SGD, or "
                    f"OptimWrapper(params, opt=torch.optim.SparseAdam)"
                )


def _seen(p: Tensor, state: MutableMapping[str, Any], masters: list[StandIn]) -> Tensor:
    """What the cbs see as the parameter `p`; adds to `masters` where that is its master copy."""
    if not has_master(p, state):
        return p
    master = StandIn(p, state)
    masters.append(master)
    return master.param


def _sees_all_at_once(cb: Callable[..., Any], reduce: Reduce | None) -> bool:
    """Whether `cb` runs over all tensors before the next one starts, instead of the chain over one tensor."""
    return hasattr(cb, "step_all") or (reduce is not None and needs_of(cb) == "norm")


def _call(cb: Callable[..., Any], p: Tensor, state: dict[str, Any], hypers: dict[str, Any], group: int) -> None:
    """Call `cb` for one parameter and merge a returned dict into its state. A hyper wins over a state of its name."""
    given = {**state, **hypers}
    given.pop(MASTER, None)
    missing = [name for name in required(cb) if name not in given]
    if missing:
        raise TypeError(
            f"{cb_name(cb)} needs {', '.join(map(repr, missing))} in group {group}: neither a hyper-parameter "
            f"({', '.join(hypers) or 'none'}) nor a state from an earlier callback ({', '.join(state) or 'none'}). "
            f"Pass it to the optimizer, or put the stat that makes it before {cb_name(cb)}."
        )
    unknown = not_taken(cb, given)
    if unknown:
        raise TypeError(
            f"{cb_name(cb)} has no argument {', '.join(map(repr, unknown))}, but is given all hyper-parameters and "
            f"states of the parameter: add **kwargs for those that it does not use"
        )
    result = cb(p, **given)
    if isinstance(result, dict):
        state.update(result)
