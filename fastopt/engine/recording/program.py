"""What a chain does to one parameter, as a small immutable graph, and how it splits into passes over the data.

The graph is structural: it holds no numbers that change from step to step. Those are *slots*, filled at run time.
A value is *whole* where it has one element per element of the parameter, else it is one scalar per parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch

#: Reductions: their argument is whole, their value is one scalar per parameter. `count` is the number of elements.
REDUCTIONS = frozenset({"sum", "sum_of_squares", "amax", "amin", "count"})
#: Reductions whose partial results may be added up, over blocks and over processes.
ADDITIVE = frozenset({"sum", "sum_of_squares", "count"})


@dataclass(frozen=True, slots=True)
class Value:
    """An operand: the value of node `index`."""

    index: int


@dataclass(frozen=True, slots=True)
class Slot:
    """An operand: number `index` of the row of scalars that a step brings."""

    index: int


Operand = Value | Slot | float | int | bool | None


@dataclass(frozen=True)
class Node:
    """One operation. `op` is `input` (its argument is the place, such as `p` or `grad_avg`) or a name of `ops.OPS`."""

    op: str
    args: tuple[Any, ...]
    dtype: torch.dtype
    whole: bool

    def values(self) -> Iterator[int]:
        """The nodes it reads."""
        return (x.index for x in self.args if isinstance(x, Value))


@dataclass(frozen=True)
class Output:
    """Where a value goes: `p`, `grad` or the name of a state; `dtype` and `whole` are those of the place."""

    place: str
    value: int
    dtype: torch.dtype
    whole: bool
    fresh: bool


@dataclass(frozen=True)
class Phase:
    """One pass over the elements, and the scalars per parameter that must be there before it starts.

    Attributes:
        scalars: nodes that are one scalar per parameter, in order, computed before the pass from the reductions before.
        loads: (place, node) pairs: what is read, and which value it then has.
        nodes: whole nodes to compute, in order.
        reductions: reductions over the values of this pass.
        stores: what is written at its end.
        scalar_stores: states of one scalar per parameter that are written.
    """

    scalars: tuple[int, ...]
    loads: tuple[tuple[str, int], ...]
    nodes: tuple[int, ...]
    reductions: tuple[int, ...]
    stores: tuple[Output, ...]
    scalar_stores: tuple[Output, ...]


@dataclass(frozen=True)
class Program:
    """The graph. Two recordings with equal programs run as the same code.

    Attributes:
        nodes: in order of evaluation.
        outputs: what is written where; an output that writes back what was read is left out.
        n_slots: length of the row of scalars.
        slot_texts: how the cbs compute each slot, for prints; no part of equality.
    """

    nodes: tuple[Node, ...]
    outputs: tuple[Output, ...]
    n_slots: int
    slot_texts: tuple[str, ...] = field(compare=False, default=())

    @cached_property
    def _hash(self) -> int:
        return hash((self.nodes, self.outputs, self.n_slots))

    def __hash__(self) -> int:
        return self._hash

    @cached_property
    def inputs(self) -> dict[str, int]:
        """The places that are read, with their nodes."""
        return {node.args[0]: i for i, node in enumerate(self.nodes) if node.op == "input"}

    @cached_property
    def levels(self) -> tuple[int, ...]:
        """For each node, in which pass it can be computed first."""
        levels: list[int] = []
        for node in self.nodes:
            level = max((levels[i] for i in node.values()), default=0)
            levels.append(level + (node.op in REDUCTIONS))
        return tuple(levels)

    @cached_property
    def phases(self) -> tuple[Phase, ...]:
        """The passes."""
        return tuple(_split(self))

    @property
    def additive(self) -> bool:
        """Whether all reductions can be added up over processes."""
        return all(node.op in ADDITIVE for node in self.nodes if node.op in REDUCTIONS)

    def bytes_per_element(self) -> tuple[int, int]:
        """Bytes read and written per element of the parameter, all passes together."""
        read = sum(self.nodes[i].dtype.itemsize for phase in self.phases for _, i in phase.loads)
        written = sum(out.dtype.itemsize for phase in self.phases for out in phase.stores)
        return read, written

    def __str__(self) -> str:
        from .printing import program_text

        return program_text(self)


class Programs(tuple[Program, ...]):
    """The different programs of one chain; prints them all."""

    def whole_states(self) -> set[str]:
        """The names of the states that are written with one element per element of the parameter."""
        outputs = (out for program in self for out in program.outputs if out.whole)
        return {out.place.removeprefix("state ") for out in outputs if out.place.startswith("state ")}

    def __str__(self) -> str:
        return "\n\n".join(map(str, self)) or "nothing is recorded: no step was made, or the chain runs as it is"


def pruned(nodes: list[Node], outputs: list[Output], slot_texts: list[str]) -> tuple[Program, list[int]]:
    """A program of what the outputs need only, renumbered, and the old numbers of the slots that are left."""
    needed: set[int] = set()
    todo = [out.value for out in outputs]
    while todo:
        i = todo.pop()
        if i not in needed:
            needed.add(i)
            todo.extend(nodes[i].values())
    order = sorted(needed)
    new = {old: i for i, old in enumerate(order)}
    slots: dict[int, int] = {}

    def renumbered(x: Any) -> Any:
        if isinstance(x, Value):
            return Value(new[x.index])
        if isinstance(x, Slot):
            return Slot(slots.setdefault(x.index, len(slots)))
        return x

    kept = tuple(
        Node(node.op, tuple(map(renumbered, node.args)), node.dtype, node.whole) for node in (nodes[i] for i in order)
    )
    outs = tuple(Output(o.place, new[o.value], o.dtype, o.whole, o.fresh) for o in outputs)
    return Program(kept, outs, len(slots), tuple(slot_texts[i] for i in slots)), list(slots)


def _split(program: Program) -> Iterator[Phase]:
    """The passes of `program`: a pass ends where a reduction is needed."""
    nodes, levels = program.nodes, program.levels
    last = max(levels, default=0)
    early = _early_outputs(program, last)
    at = {out: (levels[out.value] if out in early else last) for out in program.outputs if out.whole}
    for k in range(last + 1):
        stored = {out.value: out.place for out, level in at.items() if level < k and _exact(program, out)}
        stores = tuple(out for out, level in at.items() if level == k)
        reductions = tuple(i for i, n in enumerate(nodes) if n.op in REDUCTIONS and levels[i] == k + 1)
        roots = [out.value for out in stores] + [j for i in reductions for j in nodes[i].values()]
        needed = _needed(program, roots, stored)
        loads = [(stored[i], i) for i in needed if i in stored]
        loads += [
            (nodes[i].args[0], i) for i in needed if nodes[i].op == "input" and nodes[i].whole and i not in stored
        ]
        loaded = {i for _, i in loads}
        yield Phase(
            scalars=tuple(i for i, n in enumerate(nodes) if not n.whole and n.op not in REDUCTIONS and levels[i] == k),
            loads=tuple(loads),
            nodes=tuple(i for i in needed if nodes[i].whole and i not in loaded),
            reductions=reductions,
            stores=stores,
            scalar_stores=tuple(o for o in program.outputs if not o.whole and levels[o.value] == k),
        )


def _exact(program: Program, out: Output) -> bool:
    """Whether reading the place back gives the value itself, not a rounded one."""
    return program.nodes[out.value].dtype == out.dtype and program.nodes[out.value].whole


def _needed(program: Program, roots: Iterable[int], stop: Iterable[int]) -> list[int]:
    """The nodes that `roots` need, in order, not looking behind `stop`; scalars per parameter are left out."""
    stops, found, todo = set(stop), set(), list(roots)
    while todo:
        i = todo.pop()
        if i not in found and program.nodes[i].whole:
            found.add(i)
            if i not in stops:
                todo.extend(program.nodes[i].values())
    return sorted(found)


def _early_outputs(program: Program, last: int) -> set[Output]:
    """The outputs that may be written before the last pass: no later pass reads what was in their place before."""
    levels, nodes = program.levels, program.nodes
    early = {out for out in program.outputs if out.whole and levels[out.value] < last}
    while True:
        late: set[Output] = set()
        for k in range(1, last + 1):
            stored = {out.value for out in early if levels[out.value] < k and _exact(program, out)}
            roots = [o.value for o in program.outputs if o.whole and (o not in early or levels[o.value] >= k)]
            roots += [j for i, n in enumerate(nodes) if n.op in REDUCTIONS and levels[i] > k for j in n.values()]
            reads = _needed(program, roots, stored)
            old = {nodes[i].args[0] for i in reads if nodes[i].op == "input" and i not in stored}
            late |= {out for out in early if levels[out.value] < k and out.place in old}
        if not late:
            return early
        early -= late
