"""The source of the Triton kernels of a program.

A pass is one kernel over a table of chunks; a chunk is `BLOCK` elements of one tensor. The addresses of the tensors,
their sizes and the rows of scalars lie in tables on the device, so one launch steps any number of tensors and groups:

    addresses [n_places, n_tensors] int64, sizes [n_tensors] int64, rows [n_tensors] int32
    chunk_tensor [n_chunks] int32, chunk_number [n_chunks] int32
    scalars [n_slots, n_rows], values [n_values, n_tensors] (the scalars per parameter) float64,
    totals [n_reductions, n_tensors] float64

A pass that ends in reductions writes one partial result per chunk; a second kernel, one program per tensor, adds those
up in a fixed order and computes the scalars per parameter, so two runs give the same bits. Arithmetic is float32, or
float64 if a tensor is, and float64 for scalars per parameter; results are rounded where they are stored. Multiplication
and addition are fused exactly where torch's own kernels fuse them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch

from ..recording.program import REDUCTIONS, Phase, Program, Slot, Value

#: Elements per chunk, and threads / 32 of the program that works on it.
BLOCK, WARPS = 1024, 4

_TYPES = {
    torch.float32: "tl.float32",
    torch.float64: "tl.float64",
    torch.bfloat16: "tl.bfloat16",
    torch.float16: "tl.float16",
    torch.bool: "tl.int1",
}
_HEADER = """import triton
import triton.language as tl
from fastopt.engine.executors import triton_math as m
"""
_CONSTANTS = {"inf": "float('inf')", "-inf": "float('-inf')", "nan": "float('nan')"}
_PLAIN = {
    "mul": "{0} * {1}",
    "rsub": "{1} - {0}",
    "maximum": "m.maximum({0}, {1})",
    "minimum": "m.minimum({0}, {1})",
    "rsqrt": "tl.rsqrt({0})",
    "square": "{0} * {0}",
    "abs": "tl.abs({0})",
    "sign": "m.sign({0})",
    "exp": "tl.exp({0})",
    "log": "tl.log({0})",
    "log1p": "m.log1p({0})",
    "expm1": "m.expm1({0})",
    "tanh": "m.tanh({0})",
    "sigmoid": "m.sigmoid({0})",
    "neg": "-{0}",
    "relu": "m.maximum({0}, 0.0)",
    "floor": "tl.floor({0})",
    "ceil": "tl.ceil({0})",
    "isnan": "{0} != {0}",
    "isfinite": "tl.abs({0}) < float('inf')",
    "isinf": "tl.abs({0}) == float('inf')",
    "logical_not": "{0} == 0",
    "bitwise_not": "{0} == 0",
    "eq": "{0} == {1}",
    "ne": "{0} != {1}",
    "lt": "{0} < {1}",
    "le": "{0} <= {1}",
    "gt": "{0} > {1}",
    "ge": "{0} >= {1}",
    "logical_and": "({0} != 0) & ({1} != 0)",
    "logical_or": "({0} != 0) | ({1} != 0)",
    "logical_xor": "({0} != 0) ^ ({1} != 0)",
    "bitwise_and": "{0} & {1}",
    "bitwise_or": "{0} | {1}",
    "bitwise_xor": "{0} ^ {1}",
    "lerp": "m.lerp({0}, {1}, {2})",
    "softplus": "m.softplus({0}, {1}, {2})",
}
_POWERS = {-1.0: "1.0 / {0}", -0.5: "tl.rsqrt({0})", 1.0: "{0}", 2.0: "{0} * {0}", 3.0: "{0} * {0} * {0}"}


class Layout:
    """Where the tables of a program keep what.

    Attributes:
        places: the rows of `addresses`.
        values: the rows of `values`, by node: scalars per parameter that do not follow from the slots alone.
        totals: the rows of `totals`, by node.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.double = any(node.whole and node.dtype == torch.float64 for node in program.nodes)
        outs = [out.place for out in program.outputs]
        self.places = tuple(dict.fromkeys([*program.inputs, *outs]))
        self.values = {i: k for k, i in enumerate(i for i in self._scalars() if not self.is_free(i))}
        reductions = (i for i, node in enumerate(program.nodes) if node.op in REDUCTIONS)
        self.totals = {i: k for k, i in enumerate(reductions)}

    def _scalars(self) -> Iterator[int]:
        return (i for i, n in enumerate(self.program.nodes) if not n.whole and n.op not in REDUCTIONS)

    def is_free(self, i: int) -> bool:
        """Whether a scalar per parameter follows from the slots alone, so that it can be computed anywhere."""
        node = self.program.nodes[i]
        return not node.whole and node.op not in (*REDUCTIONS, "input") and all(map(self.is_free, node.values()))

    def stage(self, k: int) -> bool:
        """Whether there is anything to do per tensor before pass `k`."""
        phase = self.program.phases[k]
        return bool((k and self.program.phases[k - 1].reductions) or phase.scalar_stores or self._kept(phase))

    def _kept(self, phase: Phase) -> list[int]:
        return [i for i in phase.scalars if i in self.values]


def source_of(layout: Layout) -> str:
    """The module with the kernels `pass_k` and `stage_k` of every pass."""
    phases = layout.program.phases
    parts = [_HEADER]
    for k, phase in enumerate(phases):
        parts.append(_pass_source(layout, k, phase))
        if layout.stage(k):
            parts.append(_stage_source(layout, k, phase))
    return "\n\n".join(parts) + "\n"


class _Writer:
    """Writes the statements for the nodes of one kernel; `vector` where values have one element per thread."""

    def __init__(self, layout: Layout, vector: bool) -> None:
        self.layout, self.nodes, self.vector = layout, layout.program.nodes, vector
        self.double = layout.double or not vector
        self.type = "tl.float64" if self.double else "tl.float32"
        self.lines: list[str] = []
        self._defined: set[str] = set()

    def line(self, text: str) -> None:
        self.lines.append(f"    {text}")

    def define(self, name: str, text: str) -> str:
        """`name = text`, once."""
        if name not in self._defined:
            self._defined.add(name)
            self.line(f"{name} = {text}")
        return name

    def slot(self, index: int) -> str:
        return self.define(f"s{index}", f"tl.load(scalars + {index} * n_rows + row).to({self.type})")

    def value(self, i: int) -> str:
        """The variable of node `i`; a scalar per parameter is read or computed where it is not there yet."""
        name, node = f"v{i}", self.nodes[i]
        if name in self._defined or node.whole:
            return name
        if node.op in REDUCTIONS:
            return self.define(name, f"tl.load(totals + {self.layout.totals[i]} * n_tensors + t).to({self.type})")
        if self.layout.is_free(i):
            return self.compute(i)
        stored = f"tl.load(values + {self.layout.values[i]} * n_tensors + t)"
        return self.define(name, f"{stored} != 0" if node.dtype == torch.bool else f"{stored}.to({self.type})")

    def operand(self, x: Any, arithmetic: bool = True) -> str:
        if isinstance(x, Slot):
            return self.slot(x.index)
        if isinstance(x, Value):
            name = self.value(x.index)
            return f"{name}.to({self.type})" if arithmetic and self.nodes[x.index].dtype == torch.bool else name
        return _CONSTANTS.get(repr(float(x)), repr(float(x)))

    def compute(self, i: int) -> str:
        """Define node `i` from its operands."""
        return self.define(f"v{i}", self._formula(i))

    def _formula(self, i: int) -> str:
        node = self.nodes[i]
        if node.op in ("full", "scalar", "expand"):
            x = self.operand(node.args[0])
            return f"tl.zeros([BLOCK], {self.type}) + {x}" if self.vector and node.whole else f"{x} + 0.0"
        if node.op == "where":
            condition = self.operand(node.args[0], arithmetic=False)
            return f"tl.where({condition}, {self.operand(node.args[1])}, {self.operand(node.args[2])})"
        logical = node.op.startswith(("bitwise", "logical"))
        args = [None if x is None else self.operand(x, arithmetic=not logical) for x in node.args]
        if node.op in _PLAIN:
            return _PLAIN[node.op].format(*args)
        return str(getattr(self, f"_{node.op}")(node, args))

    def _add(self, node: Any, args: list[Any]) -> str:
        return f"{args[0]} + {args[1]}" if node.args[2] == 1 else f"tl.fma({args[1]}, {args[2]}, {args[0]})"

    def _sub(self, node: Any, args: list[Any]) -> str:
        return f"{args[0]} - {args[1]}" if node.args[2] == 1 else f"tl.fma({args[1]}, -{args[2]}, {args[0]})"

    def _addcmul(self, node: Any, args: list[Any]) -> str:
        scaled = args[1] if node.args[3] == 1 else f"{args[3]} * {args[1]}"
        return f"tl.fma({scaled}, {args[2]}, {args[0]})"

    def _addcdiv(self, node: Any, args: list[Any]) -> str:
        quotient = self._quotient(args[1], args[2])
        return f"{args[0]} + {quotient}" if node.args[3] == 1 else f"tl.fma({quotient}, {args[3]}, {args[0]})"

    def _quotient(self, x: str, y: str) -> str:
        return f"({x} / {y})" if self.double else f"tl.div_rn({x}, {y})"

    def _div(self, node: Any, args: list[Any]) -> str:
        if not isinstance(node.args[1], Value):  # as torch does on CUDA
            return f"{args[0]} * (1.0 / {args[1]})"
        return self._quotient(args[0], args[1])

    def _reciprocal(self, node: Any, args: list[Any]) -> str:
        return f"1.0 / {args[0]}"

    def _sqrt(self, node: Any, args: list[Any]) -> str:
        return f"tl.sqrt({args[0]})" if self.double else f"tl.sqrt_rn({args[0]})"

    def _clamp(self, node: Any, args: list[Any]) -> str:
        x = args[0] if args[1] is None else f"m.maximum({args[0]}, {args[1]})"
        return x if args[2] is None else f"m.minimum({x}, {args[2]})"

    def _pow(self, node: Any, args: list[Any]) -> str:
        exponent = float(node.args[1])
        if exponent == 0.5:
            return self._sqrt(node, args)
        if exponent == 0.0:
            return f"{args[0]} * 0.0 + 1.0"
        return _POWERS.get(exponent, f"m.power({{0}}, {exponent!r})").format(args[0])

    def _cast(self, node: Any, args: list[Any]) -> str:
        x = next(node.values())
        if node.dtype == torch.bool and self.nodes[x].dtype != torch.bool:
            return f"{args[0]} != 0"
        return f"{args[0]} + 0.0"

    def _convert(self, node: Any, args: list[Any]) -> str:
        if node.dtype == torch.bool:
            return self._cast(node, args)
        return f"{args[0]}.to({_TYPES[node.dtype]}).to({self.type})"

    def pointer(self, place: str, dtype: torch.dtype) -> str:
        row = self.layout.places.index(place)
        name = f"a{row}"
        self.define(name, f"tl.load(addresses + {row} * n_tensors + t).to(tl.pointer_type({_TYPES[dtype]}))")
        return name


def _pass_source(layout: Layout, k: int, phase: Phase) -> str:
    """The kernel `pass_k`. The body is there twice: for full chunks, where nothing needs a mask, and for others."""
    names = "addresses, scalars, values, partials, t, row, start, left, chunk, n_tensors, n_rows, n_chunks"
    arguments = f"{names}, BLOCK: tl.constexpr, ALIGN: tl.constexpr"
    parts = [_jit("pass", k, full, _pass_body(layout, phase, full), arguments) for full in (True, False)]
    call = f"({names}, BLOCK, ALIGN)"
    parts.append(
        f"""@triton.jit(do_not_specialize=["n_tensors", "n_rows", "n_chunks"])
def pass_{k}(addresses, sizes, rows, chunk_tensor, chunk_number, scalars, values, partials, n_tensors, n_rows, n_chunks,
             BLOCK: tl.constexpr, ALIGN: tl.constexpr):
    chunk = tl.program_id(0)
    t = tl.load(chunk_tensor + chunk)
    row = tl.load(rows + t)
    start = tl.load(chunk_number + chunk).to(tl.int64) * BLOCK
    left = tl.load(sizes + t) - start
    if left >= BLOCK:
        pass_{k}_full{call}
    else:
        pass_{k}_rest{call}"""
    )
    return "\n\n\n".join(parts)


def _jit(kind: str, k: int, full: bool, body: list[str], arguments: str) -> str:
    name = f"{kind}_{k}_{'full' if full else 'rest'}"
    return "\n".join(["@triton.jit", f"def {name}({arguments}):", *(body or ["    pass"])])


def _pass_body(layout: Layout, phase: Phase, full: bool) -> list[str]:
    nodes, w = layout.program.nodes, _Writer(layout, vector=True)
    mask = "" if full else ", mask=inside"
    w.line("i = tl.arange(0, BLOCK)")
    if not full:
        w.line("inside = i < left")
    dtypes = {place: nodes[n].dtype for place, n in phase.loads} | {out.place: out.dtype for out in phase.stores}
    for place, dtype in dtypes.items():
        name = w.pointer(place, dtype)
        w.line(f"{name} = tl.multiple_of({name}, ALIGN) + start")
    for place, n in phase.loads:
        other = mask and f"{mask}, other=0.0"
        w.define(f"v{n}", f"tl.load({w.pointer(place, nodes[n].dtype)} + i{other}).to({w.type})")
    for n in phase.nodes:
        w.compute(n)
    for out in phase.stores:
        stored = w.value(out.value)
        if not nodes[out.value].whole:
            stored = f"tl.zeros([BLOCK], {w.type}) + {stored}"
        w.line(f"tl.store({w.pointer(out.place, out.dtype)} + i, ({stored}).to({_TYPES[out.dtype]}){mask})")
    counted = [n for n in phase.reductions if nodes[n].op != "count"]
    for j, n in enumerate(counted):
        x = f"v{next(nodes[n].values())}"
        neutral = {"amax": "float('-inf')", "amin": "float('inf')"}.get(nodes[n].op, "0.0")
        kept = x if full else f"tl.where(inside, {x}, {neutral})"
        w.line(f"tl.store(partials + {j} * n_chunks + chunk, {_reduced(nodes[n].op, kept)})")
    return w.lines


def _reduced(op: str, x: str) -> str:
    if op == "sum_of_squares":
        return f"tl.sum(({x}) * ({x}), 0)"
    if op == "sum":
        return f"tl.sum({x}, 0)"
    return f"tl.reduce({x}, 0, m.{'maximum' if op == 'amax' else 'minimum'})"


def _stage_source(layout: Layout, k: int, phase: Phase) -> str:
    """The kernel `stage_k`: one program per tensor.

    `ADD` adds up the partial results of the pass before into `totals`, `SCALARS` computes the scalars per parameter
    from them: both in one launch, unless the totals are summed over processes between.
    """
    nodes, w = layout.program.nodes, _Writer(layout, vector=False)
    adding = list(_totals_lines(layout, layout.program.phases[k - 1].reductions)) if k else []
    for n in phase.scalars:
        if n not in layout.values:
            continue
        if nodes[n].op == "input":
            pointer = w.pointer(nodes[n].args[0], nodes[n].dtype)
            w.define(f"v{n}", f"tl.load({pointer}).to({w.type})")
        else:
            w.compute(n)
        w.line(f"tl.store(values + {layout.values[n]} * n_tensors + t, ({w.operand(Value(n))}) + 0.0)")
    for out in phase.scalar_stores:
        w.line(f"tl.store({w.pointer(out.place, out.dtype)}, ({w.operand(Value(out.value))}).to({_TYPES[out.dtype]}))")
    lines = [
        '@triton.jit(do_not_specialize=["n_tensors", "n_rows", "n_chunks"])',
        f"def stage_{k}(addresses, sizes, rows, first_chunk, scalars, values, partials, totals, n_tensors, n_rows,",
        "            n_chunks, ADD: tl.constexpr, SCALARS: tl.constexpr, WIDE: tl.constexpr):",
        "    t = tl.program_id(0)",
        "    row = tl.load(rows + t)",
        "    if ADD:",
        *(f"    {line}" for line in adding or ["    pass"]),
        "        tl.debug_barrier()",
        "    if SCALARS:",
        *(f"    {line}" for line in w.lines or ["    pass"]),
    ]
    return "\n".join(lines)


def _totals_lines(layout: Layout, reductions: Iterable[int]) -> Iterator[str]:
    """Add up the partial results of one tensor in a fixed order, in float64."""
    nodes, j = layout.program.nodes, 0
    yield "    first = tl.load(first_chunk + t)"
    yield "    last = tl.load(first_chunk + t + 1)"
    for n in reductions:
        op, row = nodes[n].op, layout.totals[n]
        if op == "count":
            yield f"    tl.store(totals + {row} * n_tensors + t, tl.load(sizes + t).to(tl.float64))"
            continue
        neutral = {"amax": "float('-inf')", "amin": "float('inf')"}.get(op, "0.0")
        pick = {"amax": "m.maximum(sum{0}, x{0})", "amin": "m.minimum(sum{0}, x{0})"}.get(op, "sum{0} + x{0}")
        yield f"    sum{n} = tl.full([WIDE], {neutral}, tl.float64)"
        yield "    for c in range(first, last, WIDE):"
        yield "        i = c + tl.arange(0, WIDE)"
        yield f"        x{n} = tl.load(partials + {j} * n_chunks + i, mask=i < last, other={neutral}).to(tl.float64)"
        yield f"        sum{n} = {pick.format(n)}"
        total = _reduced("sum" if op == "sum_of_squares" else op, f"sum{n}")
        yield f"    tl.store(totals + {row} * n_tensors + t, {total})"
        j += 1
