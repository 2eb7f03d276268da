"""Parameters that are DTensors: steps on this rank's part of them, as ordinary tensors, without DTensor's dispatch.

`fully_shard` and the plans of `torch.distributed.tensor.parallel` make DTensors: a tensor that is spread over a mesh of
processes, of which each holds a *part*. An elementwise chain cannot tell a part from a whole, and the norms of a chain
are added up over the processes that share a parameter. So the engine works on the parts, and so does `opt.state`; what
has the shape of the part is shown as a DTensor placed like the parameter in `state_dict()`.

A chain that needs whole parameters gets them, gathered one after the other on every process: right, and as slow as that
sounds. A wrapped torch optimizer gets the DTensors themselves, with torch's own rules for them.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from operator import attrgetter, is_
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .engine import Engine, GroupWork, Reduce, undeclared
from .pieces import Box

if TYPE_CHECKING:
    from .optimizer import Optimizer

_PLAIN = frozenset({Tensor, torch.nn.Parameter})

#: The process groups over which a parameter is cut; none where every process has all of it.
Sharers = tuple[Any, ...]


def is_spread(x: Any) -> bool:
    """Whether `x` is a DTensor."""
    return type(x) not in _PLAIN and isinstance(x, Tensor) and hasattr(x, "device_mesh")


def any_spread(work: Iterable[GroupWork]) -> bool:
    """Whether there is a DTensor among the parameters of `work`."""
    return any(not set(map(type, each.params)) <= _PLAIN and any(map(is_spread, each.params)) for each in work)


def part_of(x: Any) -> Any:
    """This process's part of a DTensor, the same object every time; anything else as it is."""
    return x._local_tensor if is_spread(x) else x


def sharers_of(p: Any) -> Sharers:
    """The process groups of the dimensions of the mesh that cut `p`. Copies on other dimensions do not count.

    Raises:
        ValueError: a parameter that is a sum still to be made (`Partial`).
    """
    if not is_spread(p):
        return ()
    if any(placement.is_partial() for placement in p.placements):
        raise ValueError(f"a parameter of shape {tuple(p.shape)} is placed as {p.placements}: redistribute it first")
    mesh = p.device_mesh
    cut = [i for i, placement in enumerate(p.placements) if not placement.is_replicate() and mesh.size(i) > 1]
    return tuple(mesh.get_group(i) for i in cut)


def part_of_grad(p: Any) -> Tensor | None:
    """This process's part of the gradient of `p`, placed as `p` is.

    A gradient that is placed otherwise, such as the sum still to be made of a layer norm under sequence parallelism,
    is redistributed first, which is collective over the mesh of `p`.
    """
    grad = p.grad
    if grad is None or not is_spread(p):
        return grad  # type: ignore[no-any-return]
    if not is_spread(grad) or grad.device_mesh != p.device_mesh:
        where = grad.device_mesh if is_spread(grad) else "no mesh"
        raise ValueError(f"the gradient of a parameter of shape {tuple(p.shape)} on {p.device_mesh} is on {where}")
    if grad.placements != p.placements:
        p.grad = grad = grad.redistribute(p.device_mesh, p.placements)
    local = grad._local_tensor
    return local.wait() if hasattr(local, "wait") else local  # type: ignore[no-any-return]


# ---- stepping


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
            _hold_parts(state, p)
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
            entire = _entire(p.detach()) if is_spread(p) else p
            grad = _entire(p.grad)
            entire.grad = grad
            held = {key: _entire(show(p, value)) for key, value in state.items()}
            opt.run_tensors([GroupWork(w.index, w.group, w.hypers, [entire], [held])], engine=engine)
            if is_spread(p):
                part_of(p).copy_(_cut(p, entire))
                part_of(p.grad).copy_(_cut(p, grad))
                held = {key: take(p, value) for key, value in held.items()}
            state.update(held)


def _entire(x: Any) -> Any:
    """All of a DTensor, as a tensor of its own; anything else as it is."""
    return x.full_tensor().clone() if is_spread(x) else x


def _cut(p: Any, entire: Tensor) -> Tensor:
    """The part of `entire` that this process holds of `p`."""
    from torch.distributed.tensor import DTensor, Replicate

    copies = DTensor.from_local(entire, p.device_mesh, [Replicate()] * p.device_mesh.ndim, run_check=False)
    return copies.redistribute(p.device_mesh, p.placements).to_local()


def _sum_over(sharers: Sharers) -> Reduce | None:
    """Sums over the processes of all the groups; None where there are none."""
    if not sharers:
        return None

    def total(partial: Tensor) -> Tensor:
        for group in sharers:
            torch.distributed.all_reduce(partial, group=group)
        return partial

    return total


# ---- norms of gradients


def grad_norm(params: Iterable[Any], norm_type: float) -> tuple[Tensor, list[Tensor]]:
    """The norm of all gradients of `params` together, 0-d, float64; and this process's part of each gradient.

    One small all-reduce for each dimension of a mesh that cuts parameters.

    Raises:
        ValueError: `norm_type` is not positive.
    """
    if not norm_type > 0:
        raise ValueError(f"norm_type is a positive number or inf, got {norm_type}")
    by_sharers: dict[Sharers, list[Tensor]] = {}
    for p in params:
        grad = part_of_grad(p)
        if grad is not None:
            by_sharers.setdefault(sharers_of(p), []).append(grad)
    every = [grad for grads in by_sharers.values() for grad in grads]
    if not every:
        return torch.zeros((), dtype=torch.float64), []
    device, inf = every[0].device, norm_type == float("inf")
    totals = []
    for sharers, grads in by_sharers.items():
        norms = [torch.linalg.vector_norm(g, norm_type, dtype=torch.float64).to(device) for g in grads if g.numel()]
        parts = torch.stack(norms) if norms else torch.zeros(1, dtype=torch.float64, device=device)
        total = parts.amax() if inf else parts.pow(norm_type).sum()
        for group in sharers:
            op = torch.distributed.ReduceOp.MAX if inf else torch.distributed.ReduceOp.SUM
            torch.distributed.all_reduce(total, op=op, group=group)
        totals.append(total)
    together = torch.stack(totals)
    return (together.amax() if inf else together.sum().pow(1 / norm_type)), every


# ---- states


def _hold_parts(state: dict[str, Any], p: Any) -> None:
    """Put the parts of DTensors, and of whole tensors, in their place in the state of `p`."""
    if is_spread(p):
        for key, value in state.items():
            if isinstance(value, Tensor) and (held := take(p, value)) is not value:
                state[key] = held


def show(p: Any, value: Any) -> Any:
    """A state of `p` as the state dict has it: a DTensor placed as `p` is, where it is shaped like this part of `p`."""
    if not is_spread(p) or not isinstance(value, Tensor) or is_spread(value) or not value.ndim:
        return value
    if value.shape != part_of(p).shape:
        return value
    spread: Any = type(p)
    return spread.from_local(value, p.device_mesh, p.placements, run_check=False, shape=p.shape, stride=p.stride())


def take(p: Any, value: Any) -> Any:
    """A state of `p` as it is held: this process's part of a DTensor, or of a whole tensor of the shape of `p`.

    Raises:
        ValueError: it lies on another mesh.
    """
    if not is_spread(p) or not isinstance(value, Tensor) or not value.ndim or value.shape != p.shape:
        return value
    if not is_spread(value):
        return value if value.shape == part_of(p).shape else _cut(p, value).clone()
    spread: Any = value
    if spread.device_mesh != p.device_mesh:
        raise ValueError(
            f"a state on {spread.device_mesh} was given to a parameter of shape {tuple(p.shape)} on {p.device_mesh}"
        )
    if spread.placements != p.placements:
        spread = spread.redistribute(p.device_mesh, p.placements)
    return spread._local_tensor


def shown_state(state: Mapping[Any, Mapping[str, Any]]) -> Mapping[Any, Mapping[str, Any]]:
    """A state by parameter as the state dict has it."""
    if not any(map(is_spread, state)):
        return state
    return {p: {key: show(p, value) for key, value in entry.items()} for p, entry in state.items()}


def box_of(p: Any) -> Box:
    """The box of the DTensor `p` that this process holds; maybe without elements.

    Dimensions are cut as `torch.chunk` cuts them, in the order of the mesh's dimensions; where `fully_shard` has cut
    what a tensor parallel plan had cut before (`_StridedShard`), its dimension of the mesh comes after the others.

    Raises:
        ValueError: other placements.
    """
    offset, shape = [0] * p.ndim, list(p.shape)
    coordinate = p.device_mesh.get_coordinate()
    for axis in _order_of_cuts(p):
        dim = p.placements[axis].dim % p.ndim
        chunk = -(-shape[dim] // p.device_mesh.size(axis))
        start = min(chunk * coordinate[axis], shape[dim])
        offset[dim] += start
        shape[dim] = min(chunk, shape[dim] - start)
    return Box(tuple(offset), tuple(shape))


def _order_of_cuts(p: Any) -> list[int]:
    """The dimensions of the mesh that cut `p`, first cut first."""
    plain, later = [], []
    for axis, placement in enumerate(p.placements):
        kind = type(placement).__name__
        if kind == "Shard":
            plain.append(axis)
        elif kind == "_StridedShard":
            inner = [i for i in range(axis + 1, p.device_mesh.ndim) if p.placements[i].is_shard(placement.dim)]
            if placement.split_factor != math.prod(p.device_mesh.size(i) for i in inner):
                raise ValueError(f"a tensor of shape {tuple(p.shape)} is placed as {p.placements}, which is no box")
            later.append(axis)
        elif not placement.is_replicate():
            raise ValueError(f"a tensor of shape {tuple(p.shape)} is placed as {placement}, which is no box")
    return plain + later
