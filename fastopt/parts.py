"""Steps of DTensors: on this process's part of them, as ordinary tensors, without DTensor's dispatch.

An elementwise chain cannot tell a part from a whole, and a chain's norms are added up over the processes that share a
parameter. So the engine works on the parts, and so does `opt.state`; what has the shape of the part is shown as a
DTensor placed like the parameter in `state_dict()`.

A chain that needs whole parameters gets them, gathered one after the other on every process: right, and as slow as that
sounds. A wrapped torch optimizer gets the DTensors themselves, with torch's own rules for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engine import Engine, GroupWork, Reduce, undeclared
from .spread import (
    PLAIN,
    Sharers,
    cut_as,
    entire_of,
    hold_parts,
    is_spread,
    part_of,
    part_of_grad,
    sharers_of,
    show,
    take,
)

if TYPE_CHECKING:
    from .optimizer import Optimizer


def any_spread(work: Iterable[GroupWork]) -> bool:
    """Whether there is a DTensor among the parameters of `work`."""
    return any(not set(map(type, each.params)) <= PLAIN and any(map(is_spread, each.params)) for each in work)


def part_work(work: Sequence[GroupWork]) -> list[GroupWork]:
    """The same work on parts."""
    return [GroupWork(w.index, w.group, w.hypers, list(map(part_of, w.params)), w.states) for w in work]


@dataclass
class _Group:
    """The parameters of one group that have stepped, and what belongs to them; good while they stay the same.

    Attributes:
        params, states: as in the work.
        parts: of the parameters, plain ones included.
        spread: those that are DTensors, with their parts and layouts.
    """

    params: list[Any]
    states: list[dict[str, Any]]
    parts: list[Tensor]
    spread: list[Any]
    spread_parts: list[Tensor]
    specs: list[Any]

    @classmethod
    def of(cls, w: GroupWork) -> _Group:
        """What is to be kept of `w`. Takes states over that somebody else has put there."""
        for p, state in zip(w.params, w.states, strict=True):
            hold_parts(state, p)
        spread: list[Any] = [p for p in w.params if is_spread(p)]
        parts = list(map(part_of, w.params))
        return cls(w.params, w.states, parts, spread, list(map(_local, spread)), list(map(_spec, spread)))

    def fits(self, w: GroupWork) -> bool:
        """Whether `w` has the same parameters with the same parts, and states that hold parts."""
        return (
            _same(w.params, self.params)
            and _same(w.states, self.states)
            and _same(list(map(_local, self.spread)), self.spread_parts)
            and not any(map(_is_spread_type, set(map(type, chain.from_iterable(map(dict.values, self.states))))))
        )

    def grads(self) -> list[Tensor | None]:
        """The parts of the gradients of DTensors, placed as their parameters are."""
        grads = list(map(_grad, self.spread))
        if set(map(type, grads)) == set(map(type, self.spread)):
            parts = list(map(_local, grads))
            if _same(list(map(_spec, grads)), self.specs) and set(map(type, parts)) == {Tensor}:
                return parts
        return list(map(part_of_grad, self.spread))


_local, _spec, _grad = attrgetter("_local_tensor"), attrgetter("_spec"), attrgetter("grad")


def _same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two lists hold the same objects."""
    return len(a) == len(b) and all(map(is_, a, b))


def _is_spread_type(kind: type) -> bool:
    return kind is not Tensor and issubclass(kind, Tensor) and hasattr(kind, "device_mesh")


class Parts:
    """Runs the chain of one optimizer on DTensors, and keeps what stays the same from step to step.

    Norms of parameters that different processes share are added up by engines of their own.
    """

    def __init__(self) -> None:
        self._groups: dict[int, _Group] = {}
        self._engines: dict[Sharers | None, Engine] = {}
        self._sharers: dict[int, list[tuple[Sharers, list[Tensor], list[dict[str, Any]]]]] = {}

    def run(self, opt: Optimizer, work: Sequence[GroupWork], launch: bool = True) -> None:
        """Step the parameters of `work`, which have gradients.

        Args:
            launch: False prepares the replay of a captured step, see `Engine.prepare_replay`.

        Raises:
            RuntimeError: without `launch`, a step that cannot be replayed.
        """
        if any(hasattr(cb, "step_all") for cb in opt.cbs):  # a torch optimizer has its own ways with DTensors
            _step_or_prepare(opt, opt.runner, list(work), None, False, launch)
            return
        groups = [self._group(w) for w in work]
        grads = [group.grads() for group in groups]
        parts = [
            GroupWork(w.index, w.group, w.hypers, group.parts, group.states)
            for w, group in zip(work, groups, strict=True)
        ]
        needs = opt.runner.needs(opt.cbs, parts)
        if needs == "whole" and not launch:
            raise RuntimeError("a chain that needs whole parameters gathers DTensors one by one: not to be replayed")
        if needs == "whole":
            _run_gathered(opt, work, self._engine(opt, None))
            return
        recorded = bool(undeclared(opt.cbs))
        try:
            for group, given in zip(groups, grads, strict=True):
                for part, grad in zip(group.spread_parts, given, strict=True):
                    part.grad = grad
            if needs == "elementwise":
                _step_or_prepare(opt, opt.runner, parts, None, recorded, launch)
                return
            for sharers, some in self._by_sharers(parts).items():
                _step_or_prepare(opt, self._engine(opt, sharers), some, _sum_over(sharers), recorded, launch)
        finally:
            for group in groups:
                for part in group.spread_parts:
                    part.grad = None

    def _group(self, w: GroupWork) -> _Group:
        known = self._groups.get(w.index)
        if known is None or not known.fits(w):
            known = self._groups[w.index] = _Group.of(w)
            self._sharers.pop(w.index, None)
        return known

    def _engine(self, opt: Optimizer, sharers: Sharers | None) -> Engine:
        """The engine for parameters of these sharers; the optimizer's own for the first, one for gathered ones."""
        if sharers not in self._engines:
            first = sharers is not None and opt.runner not in self._engines.values()
            name = opt.runner.name if sharers is not None else "eager"
            self._engines[sharers] = opt.runner if first else Engine(name, opt.master_weights)
        return self._engines[sharers]

    def _by_sharers(self, parts: Sequence[GroupWork]) -> dict[Sharers, list[GroupWork]]:
        """The work by the process groups that share the parameters. Alike on all processes of a mesh."""
        found: dict[Sharers, list[GroupWork]] = {}
        for w in parts:
            if w.index not in self._sharers:
                self._sharers[w.index] = _cut_by_sharers(self._groups[w.index])
            for sharers, tensors, states in self._sharers[w.index]:
                found.setdefault(sharers, []).append(GroupWork(w.index, w.group, w.hypers, tensors, states))
        return found


def _step_or_prepare(
    opt: Optimizer, engine: Engine, work: list[GroupWork], reduce: Reduce | None, recorded: bool, launch: bool
) -> None:
    """Run the chain on ordinary tensors, or all of it but the kernels, which a CUDA graph replays."""
    if launch:
        opt.run_tensors(work, reduce, recorded=recorded, engine=engine)
    else:
        engine.prepare_replay(opt.cbs, work)


def _cut_by_sharers(group: _Group) -> list[tuple[Sharers, list[Tensor], list[dict[str, Any]]]]:
    """Parts and states of a group for each set of process groups that share some of its parameters."""
    found: dict[Sharers, tuple[list[Tensor], list[dict[str, Any]]]] = {}
    for p, part, state in zip(group.params, group.parts, group.states, strict=True):
        parts, states = found.setdefault(sharers_of(p), ([], []))
        parts.append(part)
        states.append(state)
    return [(sharers, *lists) for sharers, lists in found.items()]


def _run_gathered(opt: Optimizer, work: Sequence[GroupWork], engine: Engine) -> None:
    """Run the chain on whole parameters, one after the other, on every process alike, and keep the parts.

    Collective over the mesh of each parameter. Needs the memory of one whole parameter with its gradient and state.
    """
    for w in work:
        for p, state in zip(w.params, w.states, strict=True):
            entire = entire_of(p.detach()) if is_spread(p) else p
            grad = entire_of(p.grad)
            entire.grad = grad
            held = {key: entire_of(show(p, value)) for key, value in state.items()}
            opt.run_tensors([GroupWork(w.index, w.group, w.hypers, [entire], [held])], engine=engine)
            if is_spread(p):
                part_of(p).copy_(cut_as(p, entire))
                part_of(p.grad).copy_(cut_as(p, grad))
                held = {key: take(p, value) for key, value in held.items()}
            state.update(held)


def _sum_over(sharers: Sharers) -> Reduce | None:
    """Sums over the processes of all the groups; None where there are none."""
    if not sharers:
        return None

    def total(partial: Tensor) -> Tensor:
        for group in sharers:
            torch.distributed.all_reduce(partial, group=group)
        return partial

    return total
