"""The source of a pass as one loop over the elements, for Numba to compile for the CPU.

Every operation is rounded, and fused, as torch's CPU kernels do it, with one exception: torch's square root comes from
a vector library and may be off by the last bit, ours is exact. So results are those of `eager` but for that bit.
A program with functions that a processor does not have (exp, log, tanh, ...) runs in blocks of torch's operations.
"""

from __future__ import annotations

from typing import Any

import torch

from .program import Node, Phase, Program, Slot, Value

#: Elements that one thread works on at a time. Small enough that scratch memory for a chunk comes from the heap.
CHUNK = 1 << 13

_FORMS = {
    "mul": "{0} * {1}",
    "div": "{0} / {1}",
    "rsub": "{1} - {0}",
    "maximum": "larger({0}, {1})",
    "minimum": "smaller({0}, {1})",
    "rsqrt": "one / sqrt({0})",
    "reciprocal": "one / {0}",
    "sqrt": "sqrt({0})",
    "square": "{0} * {0}",
    "abs": "abs({0})",
    "neg": "-{0}",
    "sign": "sign({0})",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "lerp": "lerp({0}, {1}, {2})",
    "where": "({1} if {0} else {2})",
    "full": "{0}",
    "expand": "{0}",
}
_POWERS = {0.5: "sqrt({0})", 1.0: "{0}", 2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}"}
_OTHERS = {"input", "add", "sub", "addcmul", "addcdiv", "clamp", "cast", "convert", "pow"}
_SUMS = {"sum", "sum_of_squares", "count"}

HEADER = """
@njit(inline="always")
def larger(x, y):
    return x if x > y or x != x else y

@njit(inline="always")
def smaller(x, y):
    return x if x < y or x != x else y

@njit(inline="always")
def sign(x):
    return one if x > 0 else (-one if x < 0 else one - one)

@njit(inline="always")
def lerp(x, y, w):
    return fma(w, y - x, x) if abs(w) < half else fma(w - one, y - x, y)

@njit(fastmath={"reassoc", "nsz"})
def sum_of(x, n):
    total = 0.0
    for i in range(n):
        total += x[i]
    return total

@njit(fastmath={"reassoc", "nsz"})
def some_squares(x, first, last):
    total = one - one
    for i in range(first, last):
        total += x[i] * x[i]
    return total

@njit
def sum_of_squares(x, n):
    total = 0.0
    for first in range(0, n, 1024):
        total += some_squares(x, first, min(n, first + 1024))
    return total
"""


def supported(program: Program) -> bool:
    """Whether all of a program can run this way: one float dtype, and operations that are exact."""
    return dtype_of(program) is not None and all(_supported(program, node) for node in program.nodes)


def dtype_of(program: Program) -> torch.dtype | None:
    """The one floating dtype of whole values, float32 or float64; None if there is none or several."""
    dtypes = {node.dtype for node in program.nodes if node.whole} - {torch.bool}
    dtypes |= {out.dtype for out in program.outputs if out.whole}
    return dtypes.pop() if len(dtypes) == 1 and dtypes <= {torch.float32, torch.float64} else None


def _supported(program: Program, node: Node) -> bool:
    if not node.whole:
        return node.op not in ("amax", "amin")
    if node.op == "pow":
        return float(node.args[1]) in _POWERS
    arguments = [program.nodes[i] for i in node.values()]
    if node.op not in ("where", "cast", "convert") and any(x.dtype == torch.bool for x in arguments):
        return False
    return node.op in _FORMS or node.op in _OTHERS


def source_of(program: Program, phase: Phase, places: list[str], scalars: list[int]) -> str:
    """A function `sweep` that makes one pass.

    Args:
        program, phase: what to compute.
        places: the rows of `addresses`.
        scalars: the rows of `values`, by node.
    """
    return _Writer(program, phase, places, scalars).text()


class _Writer:
    def __init__(self, program: Program, phase: Phase, places: list[str], scalars: list[int]) -> None:
        self.program, self.phase, self.places, self.scalars = program, phase, places, scalars
        self.slots: set[int] = set()
        self.used: set[int] = set()

    def text(self) -> str:
        nodes = self.program.nodes
        inner = [f"v{i} = a{self.places.index(place)}[i]" for place, i in self.phase.loads]
        inner += [f"v{i} = {self._formula(nodes[i])}" for i in self.phase.nodes]
        inner += [f"a{self.places.index(o.place)}[i] = {self._operand(Value(o.value))}" for o in self.phase.stores]
        sums = [(j, n) for j, n in enumerate(self.phase.reductions) if nodes[n].op != "count"]
        inner += [f"w{j}[i] = {self._operand(Value(next(nodes[n].values())))}" for j, n in sums]
        places = {p for p, _ in self.phase.loads} | {o.place for o in self.phase.stores}
        outer = [f"a{r} = pointer(addresses[{r}, t] + start * SIZE)" for r, p in enumerate(self.places) if p in places]
        outer += [f"s{i} = scalars[{i}, row]" for i in sorted(self.slots)]
        outer += [f"v{i} = values[{self.scalars.index(i)}, t]" for i in sorted(self.used)]
        outer += [f"w{j} = empty(CHUNK, real)" for j, _ in sums]
        lines = [
            '@njit(parallel=True, error_model="numpy", nogil=True)',
            "def sweep(addresses, sizes, rows, chunk_tensor, chunk_number, scalars, values, partials):",
            "    for c in prange(len(chunk_tensor)):",
            "        t = chunk_tensor[c]",
            "        row = rows[t]",
            "        start = chunk_number[c] * CHUNK",
            "        n = min(CHUNK, sizes[t] - start)",
            *(f"        {line}" for line in outer),
            "        for i in range(n):",
            *(f"            {line}" for line in inner or ["pass"]),
            *(
                f"        partials[{j}, c] = {'sum_of' if nodes[n].op == 'sum' else 'sum_of_squares'}(w{j}, n)"
                for j, n in sums
            ),
        ]
        return HEADER + "\n" + "\n".join(lines) + "\n"

    def _operand(self, x: Any) -> str:
        if isinstance(x, Slot):
            self.slots.add(x.index)
            return f"s{x.index}"
        if isinstance(x, Value):
            if not self.program.nodes[x.index].whole:
                self.used.add(x.index)
            return f"v{x.index}"
        return f"real({float(x)!r})"

    def _formula(self, node: Node) -> str:
        args = ["" if x is None else self._operand(x) for x in node.args]
        if node.op in _FORMS:
            return _FORMS[node.op].format(*args)
        if node.op == "pow":
            return _POWERS[float(node.args[1])].format(args[0])
        if node.op in ("cast", "convert"):
            return f"{args[0]} != 0" if node.dtype == torch.bool else f"real({args[0]})"
        return str(getattr(self, f"_{node.op}")(node, *args))

    def _add(self, node: Node, x: str, y: str, scale: str) -> str:
        return f"{x} + {y}" if node.args[2] == 1 else f"fma({y}, {scale}, {x})"

    def _sub(self, node: Node, x: str, y: str, scale: str) -> str:
        return f"{x} - {y}" if node.args[2] == 1 else f"fma(-{y}, {scale}, {x})"

    def _addcmul(self, node: Node, x: str, y: str, z: str, scale: str) -> str:
        return f"fma({y if node.args[3] == 1 else f'{scale} * {y}'}, {z}, {x})"

    def _addcdiv(self, node: Node, x: str, y: str, z: str, scale: str) -> str:
        return f"{x} + {y if node.args[3] == 1 else f'({scale} * {y})'} / {z}"

    def _clamp(self, node: Node, x: str, low: str, high: str) -> str:
        raised = f"({low} if {x} < {low} else {x})" if low else x
        return f"({high} if {raised} > {high} else {raised})" if high else raised
