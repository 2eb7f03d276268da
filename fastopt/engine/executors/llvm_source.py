"""The LLVM code of a program: functions that each do one thing to a range of tensors or of chunks of tensors.

    scalars_K(first tensor, last tensor, tables)    the scalars per parameter that pass K needs
    sweep_K(first chunk, last chunk, tables)        pass K over the elements of these chunks
    totals_K(first tensor, last tensor, tables)     what the chunks of a tensor found in pass K, together
    whole(first tensor, last tensor, tables)        all of this, tensor by tensor, while a tensor is in the cache

`tables` are 64-bit words, addresses of arrays or numbers, in the order of `TABLES`:

    addresses [n_places, n_tensors], sizes, rows [n_tensors] int64      where tensors lie, their elements, their row
    chunks [n_tensors + 1] int64                                        the first chunk of each tensor
    tensors, starts [n_chunks] int64                                    a chunk: of which tensor, from which element on
    slots [n_slots, n_rows], values [n_values, n_tensors] float64       numbers of the step; scalars per parameter
    partials [n_reductions, n_chunks] float64                           what each chunk adds to a reduction

They are `nounwind`: without tables for exceptions, which the unwinder of the process would look through for every C++
exception in any thread.

Sums are formed in float64, lane by lane and then chunk by chunk. The order is always the same, so two runs give the
same bits, with any number of threads.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from ..recording.program import Phase, Program, Slot, Value
from .llvm_lanes import COMPUTED, STORED, Formulas, Function, Lanes

#: Elements per chunk, which one thread works on at a time, and elements that one round of a loop works on.
CHUNK, WIDTH = 1 << 13, 16
TABLES = (
    "addresses", "sizes", "rows", "chunks", "tensors", "starts", "slots", "values", "partials",
    "n_tensors", "n_rows", "n_chunks",
)  # fmt: skip


class Layout:
    """Where the tables of a program keep what.

    Attributes:
        places: the rows of `addresses`.
        values: the rows of `values`, by node: everything that is one scalar per parameter.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.places = tuple(dict.fromkeys([*program.inputs, *(out.place for out in program.outputs)]))
        self.values = {i: k for k, i in enumerate(i for i, node in enumerate(program.nodes) if not node.whole)}

    def counted(self, phase: Phase) -> list[int]:
        """The reductions of a pass that its chunks add to, in the order of the rows of `partials`."""
        return [i for i in phase.reductions if self.program.nodes[i].op != "count"]

    def sweeps(self, phase: Phase) -> bool:
        """Whether a pass does anything to elements."""
        return bool(phase.stores or self.counted(phase))


def source_of(layout: Layout) -> tuple[str, list[str]]:
    """The module with the functions of every pass, and their names."""
    function, parts = Function(), {}
    for k, phase in enumerate(layout.program.phases):
        if phase.scalars or phase.scalar_stores:
            parts[f"scalars_{k}"] = _Scalars(layout, phase, function).text(f"scalars_{k}")
        if layout.sweeps(phase):
            parts[f"sweep_{k}"] = _Sweep(layout, phase, function).text(f"sweep_{k}")
        if phase.reductions:
            parts[f"totals_{k}"] = _Totals(layout, phase, function).text(f"totals_{k}")
    names = list(parts)
    parts["whole"] = _whole(names)
    return "\n".join([*sorted(function.intrinsics), *parts.values()]) + "\n", list(parts)


class _Loop:
    """What the functions share: access to the tables, for the tensor `%t` with row `%row` of numbers."""

    def __init__(self, layout: Layout, phase: Phase, function: Function) -> None:
        self.layout, self.phase, self.nodes = layout, phase, layout.program.nodes
        self.function, self.start = function, list[str]()
        self.once = Lanes(function, 1, self.start)

    def entry(self, table: str, scalar: str, index: str) -> str:
        """The entry of a table."""
        pointer = self.once.let(f"getelementptr {scalar}, ptr %{table}, i64 {index}")
        return self.once.let(f"load {scalar}, ptr {pointer}, align 8")

    def in_row(self, row: int, width: str, column: str) -> str:
        """The index of a column in a row of a table that is `width` wide."""
        return self.once.let(f"add i64 {column}, {self.once.let(f'mul i64 {row}, {width}')}")

    def address(self, place: str) -> str:
        """The pointer to the tensor at a place."""
        word = self.entry("addresses", "i64", self.in_row(self.layout.places.index(place), "%n_tensors", "%t"))
        return self.once.let(f"inttoptr i64 {word} to ptr")

    def put(self, i: int, x: str) -> None:
        """Note a scalar per parameter in the table."""
        index = self.in_row(self.layout.values[i], "%n_tensors", "%t")
        pointer = self.once.let(f"getelementptr double, ptr %values, i64 {index}")
        self.once.block.append(f"store double {x}, ptr {pointer}, align 8")

    def number(self, x: Slot | Value) -> tuple[str, str]:
        """A slot, or a scalar per parameter from the table, as register and type."""
        if isinstance(x, Slot):
            return self.entry("slots", "double", self.in_row(x.index, "%n_rows", "%row")), "double"
        row = self.layout.values[x.index]
        kept = self.entry("values", "double", self.in_row(row, "%n_tensors", "%t"))
        scalar = COMPUTED[self.nodes[x.index].dtype]
        return self.once.convert(kept, "double", scalar), scalar


class _Scalars(_Loop):
    """The scalars of each parameter before a pass."""

    def __init__(self, layout: Layout, phase: Phase, function: Function) -> None:
        super().__init__(layout, phase, function)
        self.known: dict[int, str] = {}

    def operand(self, x: Any, scalar: str) -> str:
        if isinstance(x, Value) and x.index in self.known:
            return self.once.convert(self.known[x.index], COMPUTED[self.nodes[x.index].dtype], scalar)
        if isinstance(x, Slot | Value):
            return self.once.convert(*self.number(x), scalar)
        return self.once.constant(float(x), scalar)

    def text(self, name: str) -> str:
        """The function."""
        formulas = Formulas(self.once, self.nodes, self.operand)
        for i in self.phase.scalars:
            node = self.nodes[i]
            if node.op == "input":
                self.known[i] = self.once.load(self.address(node.args[0]), node.dtype)
            else:
                self.known[i] = formulas.compute(node)
            self.put(i, self.once.convert(self.known[i], COMPUTED[node.dtype], "double"))
        for out in self.phase.scalar_stores:
            self.once.store(self.operand(Value(out.value), COMPUTED[out.dtype]), self.address(out.place), out.dtype)
        return _over_tensors(name, self.start)


class _Totals(_Loop):
    """The reductions of each parameter, from what its chunks have found."""

    def text(self, name: str) -> str:
        """The function: for each tensor a loop over its chunks."""
        counted, inner = self.layout.counted(self.phase), list[str]()
        lanes = Lanes(self.function, 1, inner)
        none = [lanes.constant(_NEUTRAL.get(self.nodes[i].op, 0.0), "double") for i in counted]
        sums = []
        for k, i in enumerate(counted):
            index = lanes.let(f"add i64 %c, {lanes.let(f'mul i64 {k}, %n_chunks')}")
            found = lanes.let(f"getelementptr double, ptr %partials, i64 {index}")
            found = lanes.let(f"load double, ptr {found}, align 8")
            sums.append(lanes.combine(self.nodes[i].op, f"%sum{k}", found, "double"))
        kept: list[str] = []
        self.once = Lanes(self.function, 1, kept)
        for i in self.phase.reductions:
            if i in counted:
                self.put(i, f"%total{counted.index(i)}")
            else:
                self.put(i, self.once.let(f"uitofp i64 {self.entry('sizes', 'i64', '%t')} to double"))
        return _over_tensors(
            name,
            [
                "%at.c = getelementptr i64, ptr %chunks, i64 %t",
                "%c.first = load i64, ptr %at.c, align 8",
                "%at.end = getelementptr i64, ptr %at.c, i64 1",
                "%c.end = load i64, ptr %at.end, align 8",
                "%any.c = icmp slt i64 %c.first, %c.end",
                "br i1 %any.c, label %chunk, label %chunks.done",
                "chunk:",
                "%c = phi i64 [ %c.first, %tensor ], [ %c.next, %chunk ]",
                *_phis("sum", "double", none, "tensor", sums, "chunk"),
                *inner,
                "%c.next = add i64 %c, 1",
                "%more.c = icmp slt i64 %c.next, %c.end",
                "br i1 %more.c, label %chunk, label %chunks.done",
                "chunks.done:",
                *_phis("total", "double", none, "tensor", sums, "chunk"),
                *kept,
            ],
            end="chunks.done",
        )


class _Sweep(_Loop):
    """One pass over the elements."""

    def __init__(self, layout: Layout, phase: Phase, function: Function) -> None:
        super().__init__(layout, phase, function)
        self.numbers: dict[Any, tuple[str, str]] = {}
        self.spread: dict[tuple[Any, str, int], str] = {}
        self.pointers: dict[str, str] = {}

    def text(self, name: str) -> str:
        """The function: in each chunk a loop over `WIDTH` elements at once and one over the elements that are left."""
        for place, dtype in self._places().items():
            offset = self.once.let(f"mul i64 %start, {dtype.itemsize}")
            self.pointers[place] = self.once.let(f"getelementptr i8, ptr {self.address(place)}, i64 {offset}")
        counted = self.layout.counted(self.phase)
        ops = [self.nodes[i].op for i in counted]
        wide, many = self._round(WIDTH, counted, "%i")
        rest, one = self._round(1, counted, "%j")
        across: list[str] = []
        lanes = Lanes(self.function, WIDTH, across)
        sums = [lanes.across(op, f"%wide{k}", "double") for k, op in enumerate(ops)]
        none = [lanes.constant(_NEUTRAL.get(op, 0.0), "double") for op in ops]
        vector = lanes.type("double")
        return f"""
define void @{name}(i64 %first, i64 %last, ptr %tables) nounwind {{
entry:
  {_lines(_tables())}
  %any = icmp slt i64 %first, %last
  br i1 %any, label %chunk, label %done
chunk:
  %c = phi i64 [ %first, %entry ], [ %c.next, %chunk.done ]
  %at.t = getelementptr i64, ptr %tensors, i64 %c
  %t = load i64, ptr %at.t, align 8
  %at.start = getelementptr i64, ptr %starts, i64 %c
  %start = load i64, ptr %at.start, align 8
  %at.size = getelementptr i64, ptr %sizes, i64 %t
  %size = load i64, ptr %at.size, align 8
  %at.row = getelementptr i64, ptr %rows, i64 %t
  %row = load i64, ptr %at.row, align 8
  %left = sub i64 %size, %start
  %short = icmp slt i64 %left, {CHUNK}
  %n = select i1 %short, i64 %left, i64 {CHUNK}
  %n.wide = and i64 %n, -{WIDTH}
  {_lines(self.start)}
  %any.wide = icmp sgt i64 %n.wide, 0
  br i1 %any.wide, label %wide, label %wide.done
wide:
  %i = phi i64 [ 0, %chunk ], [ %i.next, %wide ]
  {_lines(_phis("wide.sum", vector, none, "chunk", many, "wide"))}
  {_lines(wide)}
  %i.next = add i64 %i, {WIDTH}
  %more.wide = icmp slt i64 %i.next, %n.wide
  br i1 %more.wide, label %wide, label %wide.done
wide.done:
  {_lines(_phis("wide", vector, none, "chunk", many, "wide"))}
  {_lines(across)}
  %any.rest = icmp slt i64 %n.wide, %n
  br i1 %any.rest, label %rest, label %chunk.done
rest:
  %j = phi i64 [ %n.wide, %wide.done ], [ %j.next, %rest ]
  {_lines(_phis("rest.sum", "double", sums, "wide.done", one, "rest"))}
  {_lines(rest)}
  %j.next = add i64 %j, 1
  %more.rest = icmp slt i64 %j.next, %n
  br i1 %more.rest, label %rest, label %chunk.done
chunk.done:
  {_lines(_phis("total", "double", sums, "wide.done", one, "rest"))}
  {_lines(self._keep(len(counted)))}
  %c.next = add i64 %c, 1
  %more = icmp slt i64 %c.next, %last
  br i1 %more, label %chunk, label %done
done:
  ret void
}}"""

    def _places(self) -> dict[str, torch.dtype]:
        loads = {place: self.nodes[i].dtype for place, i in self.phase.loads}
        return loads | {out.place: out.dtype for out in self.phase.stores}

    def _round(self, width: int, counted: Sequence[int], index: str) -> tuple[list[str], list[str]]:
        """The instructions for `width` elements from `index` on, and the registers of the reductions after them."""
        block: list[str] = []
        lanes = Lanes(self.function, width, block)
        known: dict[int, str] = {}

        def operand(x: Any, scalar: str) -> str:
            if isinstance(x, Value) and x.index in known:
                return lanes.convert(known[x.index], COMPUTED[self.nodes[x.index].dtype], scalar)
            if isinstance(x, Slot | Value):
                return self._in_all_lanes(x, scalar, width)
            return lanes.constant(float(x), scalar)

        def pointer(place: str, dtype: torch.dtype) -> str:
            return lanes.let(f"getelementptr {STORED[dtype]}, ptr {self.pointers[place]}, i64 {index}")

        formulas = Formulas(lanes, self.nodes, operand)
        for place, i in self.phase.loads:
            known[i] = lanes.load(pointer(place, self.nodes[i].dtype), self.nodes[i].dtype)
        for i in self.phase.nodes:
            known[i] = formulas.compute(self.nodes[i])
        for out in self.phase.stores:
            lanes.store(operand(Value(out.value), COMPUTED[out.dtype]), pointer(out.place, out.dtype), out.dtype)
        sums = []
        for k, i in enumerate(counted):
            x, before = operand(self.nodes[i].args[0], "double"), f"%{'rest' if width == 1 else 'wide'}.sum{k}"
            if self.nodes[i].op == "sum_of_squares":
                sums.append(lanes.intrinsic("fma", "double", x, x, before))
            else:
                sums.append(lanes.combine(self.nodes[i].op, before, x, "double"))
        return block, sums

    def _in_all_lanes(self, x: Slot | Value, scalar: str, width: int) -> str:
        """A number of the step or a scalar per parameter, read before the loops of the chunk."""
        key = (x, scalar, width)
        if key not in self.spread:
            if x not in self.numbers:
                self.numbers[x] = self.number(x)
            one = self.once.convert(*self.numbers[x], scalar)
            self.spread[key] = Lanes(self.function, width, self.start).spread(one, scalar)
        return self.spread[key]

    def _keep(self, n: int) -> list[str]:
        """Put the partial results of the chunk into their table."""
        block: list[str] = []
        lanes = Lanes(self.function, 1, block)
        for k in range(n):
            index = lanes.let(f"add i64 %c, {lanes.let(f'mul i64 {k}, %n_chunks')}")
            block.append(
                f"store double %total{k}, ptr {lanes.let(f'getelementptr double, ptr %partials, i64 {index}')}"
            )
        return block


_NEUTRAL = {"amax": float("-inf"), "amin": float("inf")}


def _phis(name: str, kind: str, a: Sequence[str], from_a: str, b: Sequence[str], from_b: str) -> list[str]:
    """One register per reduction: `a` when coming from the first block, `b` when coming from the second."""
    pairs = enumerate(zip(a, b, strict=True))
    return [f"%{name}{k} = phi {kind} [ {x}, %{from_a} ], [ {y}, %{from_b} ]" for k, (x, y) in pairs]


def _lines(lines: Sequence[str]) -> str:
    return "\n  ".join(lines)


def _tables() -> list[str]:
    """The registers of the tables."""
    lines = []
    for i, name in enumerate(TABLES):
        lines.append(f"%at.{name} = getelementptr i64, ptr %tables, i64 {i}")
        lines.append(f"%{name} = load {'i64' if name.startswith('n_') else 'ptr'}, ptr %at.{name}, align 8")
    return lines


def _over_tensors(name: str, body: Sequence[str], end: str = "tensor") -> str:
    """A function that does the same for each tensor `%t`. `end` is the block in which `body` ends."""
    return f"""
define void @{name}(i64 %first, i64 %last, ptr %tables) nounwind {{
entry:
  {_lines(_tables())}
  %any = icmp slt i64 %first, %last
  br i1 %any, label %tensor, label %done
tensor:
  %t = phi i64 [ %first, %entry ], [ %t.next, %{end} ]
  %at.row = getelementptr i64, ptr %rows, i64 %t
  %row = load i64, ptr %at.row, align 8
  {_lines(body)}
  %t.next = add i64 %t, 1
  %more = icmp slt i64 %t.next, %last
  br i1 %more, label %tensor, label %done
done:
  ret void
}}"""


def _whole(names: Sequence[str]) -> str:
    """The function that calls the others in turn for each tensor."""
    calls = [
        f"call void @{name}(i64 {'%c, i64 %c.end' if name.startswith('sweep') else '%t, i64 %t.end'}, ptr %tables)"
        for name in names
    ]
    return _over_tensors(
        "whole",
        [
            "%t.end = add i64 %t, 1",
            "%at.c = getelementptr i64, ptr %chunks, i64 %t",
            "%c = load i64, ptr %at.c, align 8",
            "%at.end = getelementptr i64, ptr %at.c, i64 1",
            "%c.end = load i64, ptr %at.end, align 8",
            *calls,
        ],
    )
