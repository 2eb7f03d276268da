"""Writes LLVM instructions for the operations of a program, on one element or on several side by side.

Every operation is rounded, and fused, as torch's CPU kernels do it, with one exception: torch's square root comes from
a vector library and may be off by the last bit, ours is exact. As nothing is left to the compiler's taste, an element
has the same bits wherever it lies in its tensor, on every processor and with any number of threads.

bfloat16 and float16 are computed in float32 and rounded where they are stored.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from typing import Any

import torch

from ..recording.program import REDUCTIONS, Node

#: How a dtype lies in memory, and the type that it is computed in.
STORED = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "i16",
    torch.float16: "half",
    torch.bool: "i8",
}
COMPUTED = {
    torch.float32: "float",
    torch.float64: "double",
    torch.bfloat16: "float",
    torch.float16: "float",
    torch.bool: "i1",
}
_BITS = {"float": "f32", "double": "f64"}
_COMPARISONS = {"eq": "oeq", "ne": "une", "lt": "olt", "le": "ole", "gt": "ogt", "ge": "oge"}
_TESTS = frozenset({"isnan", "isinf", "isfinite"})
_PLAIN = frozenset({"input", "full", "expand", "scalar", "cast", "convert", "where"})
#: Powers that torch computes as something simpler than a power.
POWERS = frozenset({-2.0, -1.0, -0.5, 0.5, 1.0, 2.0, 3.0})


class Function:
    """What the blocks of one function share: numbers of registers, and the intrinsics to declare."""

    def __init__(self) -> None:
        self.intrinsics: set[str] = set()
        self._count = 0

    def register(self) -> str:
        """A name that is not used yet."""
        self._count += 1
        return f"%x{self._count}"


class Lanes:
    """Appends instructions on `width` elements at once to `block`."""

    def __init__(self, function: Function, width: int, block: list[str]) -> None:
        self.function, self.width, self.block = function, width, block

    def let(self, text: str) -> str:
        """A new register with this value."""
        name = self.function.register()
        self.block.append(f"{name} = {text}")
        return name

    def type(self, scalar: str) -> str:
        """The type of `width` values side by side."""
        return scalar if self.width == 1 else f"<{self.width} x {scalar}>"

    def constant(self, x: float, scalar: str) -> str:
        """A number as an operand."""
        if scalar == "i1":
            one = "true" if x else "false"
        elif scalar.startswith("i"):
            one = str(int(x))
        else:
            rounded = torch.tensor(x, dtype=torch.float32).item() if scalar == "float" else x
            one = f"0x{struct.pack('>d', rounded).hex().upper()}"
        return one if self.width == 1 else f"<{', '.join([f'{scalar} {one}'] * self.width)}>"

    def spread(self, x: str, scalar: str) -> str:
        """One value in all lanes."""
        if self.width == 1:
            return x
        vector = self.type(scalar)
        first = self.let(f"insertelement {vector} poison, {scalar} {x}, i64 0")
        return self.let(f"shufflevector {vector} {first}, {vector} poison, <{self.width} x i32> zeroinitializer")

    def convert(self, x: str, old: str, new: str) -> str:
        """A value in another type; a bool says whether it is not zero."""
        if old == new:
            return x
        if new == "i1":
            return self.compare("une", x, self.constant(0.0, old), old)
        if {old, new} == {"half", "double"}:  # in two steps, as processors do it
            return self.convert(self.convert(x, old, "float"), "float", new)
        how = "uitofp" if old == "i1" else "fpext" if old == "half" or new == "double" else "fptrunc"
        return self.let(f"{how} {self.type(old)} {x} to {self.type(new)}")

    def binary(self, name: str, x: str, y: str, scalar: str) -> str:
        return self.let(f"{name} {self.type(scalar)} {x}, {y}")

    def compare(self, how: str, x: str, y: str, scalar: str) -> str:
        return self.let(f"fcmp {how} {self.type(scalar)} {x}, {y}")

    def select(self, condition: str, x: str, y: str, scalar: str) -> str:
        vector = self.type(scalar)
        return self.let(f"select {self.type('i1')} {condition}, {vector} {x}, {vector} {y}")

    def intrinsic(self, name: str, scalar: str, *args: str) -> str:
        """Call `llvm.name` on operands of one type."""
        vector = self.type(scalar)
        full = f"@llvm.{name}.{'' if self.width == 1 else f'v{self.width}'}{_BITS[scalar]}"
        self.function.intrinsics.add(f"declare {vector} {full}({', '.join([vector] * len(args))})")
        return self.let(f"call {vector} {full}({', '.join(f'{vector} {x}' for x in args)})")

    # ---- memory

    def load(self, pointer: str, dtype: torch.dtype) -> str:
        """The elements from `pointer` on, in the type that they are computed in."""
        stored = STORED[dtype]
        x = self.let(f"load {self.type(stored)}, ptr {pointer}, align 1")
        if dtype == torch.bfloat16:
            wide = self.let(f"zext {self.type('i16')} {x} to {self.type('i32')}")
            return self._float_of(self.binary("shl", wide, self.constant(16, "i32"), "i32"))
        if dtype == torch.bool:
            return self.let(f"icmp ne {self.type('i8')} {x}, {self.constant(0, 'i8')}")
        return self.convert(x, stored, COMPUTED[dtype])

    def store(self, x: str, pointer: str, dtype: torch.dtype) -> None:
        """Put elements, in the type that they are computed in, where `pointer` says."""
        stored = STORED[dtype]
        if dtype == torch.bfloat16:
            x = self._bfloat_of(x)
        elif dtype == torch.bool:
            x = self.let(f"zext {self.type('i1')} {x} to {self.type('i8')}")
        else:
            x = self.convert(x, COMPUTED[dtype], stored)
        self.block.append(f"store {self.type(stored)} {x}, ptr {pointer}, align 1")

    def rounded(self, x: str, dtype: torch.dtype) -> str:
        """A value as it would be after being stored."""
        if dtype == torch.bfloat16:
            wide = self.let(f"zext {self.type('i16')} {self._bfloat_of(x)} to {self.type('i32')}")
            return self._float_of(self.binary("shl", wide, self.constant(16, "i32"), "i32"))
        if dtype == torch.float16:
            return self.convert(self.convert(x, "float", "half"), "half", "float")
        return x

    def _float_of(self, bits: str) -> str:
        return self.let(f"bitcast {self.type('i32')} {bits} to {self.type('float')}")

    def _bfloat_of(self, x: str) -> str:
        """The upper half of the bits of a float, rounded to nearest, ties to even."""
        bits = self.let(f"bitcast {self.type('float')} {x} to {self.type('i32')}")
        sixteen, one = self.constant(16, "i32"), self.constant(1, "i32")
        odd = self.binary("and", self.binary("lshr", bits, sixteen, "i32"), one, "i32")
        bias = self.binary("add", odd, self.constant(0x7FFF, "i32"), "i32")
        upper = self.binary("lshr", self.binary("add", bits, bias, "i32"), sixteen, "i32")
        nan = self.compare("uno", x, x, "float")
        kept = self.select(nan, self.constant(0x7FC0, "i32"), upper, "i32")
        return self.let(f"trunc {self.type('i32')} {kept} to {self.type('i16')}")

    # ---- reductions

    def combine(self, op: str, x: str, y: str, scalar: str) -> str:
        """Two partial results of a reduction as one."""
        if op in ("amax", "amin"):
            return self.extreme("maximum" if op == "amax" else "minimum", x, y, scalar)
        return self.binary("fadd", x, y, scalar)

    def across(self, op: str, x: str, scalar: str) -> str:
        """The partial results in all lanes as one, halving by halving."""
        width = self.width
        while width > 1:
            whole, width = f"<{width} x {scalar}>", width // 2
            low, high = (", ".join(f"i32 {i + at}" for i in range(width)) for at in (0, width))
            if width == 1:
                parts = [self.let(f"extractelement {whole} {x}, i64 {i}") for i in (0, 1)]
            else:
                parts = [
                    self.let(f"shufflevector {whole} {x}, {whole} poison, <{width} x i32> <{lanes}>")
                    for lanes in (low, high)
                ]
            x = Lanes(self.function, width, self.block).combine(op, parts[0], parts[1], scalar)
        return x

    def extreme(self, op: str, x: str, y: str, scalar: str) -> str:
        """The larger (`maximum`) or smaller one, nan if either is."""
        first = self.compare("ogt" if op == "maximum" else "olt", x, y, scalar)
        nan = self.compare("uno", x, x, scalar)
        return self.select(self.binary("or", first, nan, "i1"), x, y, scalar)


class Formulas:
    """The nodes of a program as instructions.

    Args:
        lanes: where the instructions go.
        nodes: of the program.
        operand: (operand, scalar type) -> the register or constant that holds it.
    """

    def __init__(self, lanes: Lanes, nodes: tuple[Node, ...], operand: Callable[[Any, str], str]) -> None:
        self.lanes, self.nodes, self.operand = lanes, nodes, operand

    def compute(self, node: Node) -> str:
        """The value of a node, in the type that its dtype is computed in."""
        op, result = node.op, COMPUTED[node.dtype]
        if op in ("full", "expand", "scalar", "cast", "convert"):
            x = self.operand(node.args[0], result)
            return self.lanes.rounded(x, node.dtype) if op == "convert" else x
        if op == "where":
            x, y = (self.operand(a, result) for a in node.args[1:])
            return self.lanes.select(self.operand(node.args[0], "i1"), x, y, result)
        kind, _, word = op.partition("_")
        if kind in ("logical", "bitwise"):
            bits = [self.operand(x, "i1") for x in node.args]
            if word == "not":
                return self.lanes.binary("xor", bits[0], self.lanes.constant(1, "i1"), "i1")
            return self.lanes.binary(word, bits[0], bits[1], "i1")
        scalar = result if result != "i1" else compared_in(self.nodes, node)
        args = ["" if x is None else self.operand(x, scalar) for x in node.args]
        if op in _COMPARISONS:
            return self.lanes.compare(_COMPARISONS[op], args[0], args[1], scalar)
        return str(getattr(self, f"_{op}")(node, scalar, *args))

    def _number(self, x: float, scalar: str) -> str:
        return self.lanes.constant(x, scalar)

    def _mul(self, node: Node, scalar: str, x: str, y: str) -> str:
        return self.lanes.binary("fmul", x, y, scalar)

    def _div(self, node: Node, scalar: str, x: str, y: str) -> str:
        return self.lanes.binary("fdiv", x, y, scalar)

    def _rsub(self, node: Node, scalar: str, x: str, y: str) -> str:
        return self.lanes.binary("fsub", y, x, scalar)

    def _add(self, node: Node, scalar: str, x: str, y: str, scale: str) -> str:
        if node.args[2] == 1:
            return self.lanes.binary("fadd", x, y, scalar)
        return self.lanes.intrinsic("fma", scalar, y, scale, x)

    def _sub(self, node: Node, scalar: str, x: str, y: str, scale: str) -> str:
        if node.args[2] == 1:
            return self.lanes.binary("fsub", x, y, scalar)
        return self.lanes.intrinsic("fma", scalar, self._neg(node, scalar, y), scale, x)

    def _addcmul(self, node: Node, scalar: str, x: str, y: str, z: str, scale: str) -> str:
        scaled = y if node.args[3] == 1 else self.lanes.binary("fmul", scale, y, scalar)
        return self.lanes.intrinsic("fma", scalar, scaled, z, x)

    def _addcdiv(self, node: Node, scalar: str, x: str, y: str, z: str, scale: str) -> str:
        scaled = y if node.args[3] == 1 else self.lanes.binary("fmul", scale, y, scalar)
        return self.lanes.binary("fadd", x, self.lanes.binary("fdiv", scaled, z, scalar), scalar)

    def _lerp(self, node: Node, scalar: str, x: str, y: str, weight: str) -> str:
        """From the nearer end: x + w (y - x) or y - (1 - w) (y - x)."""
        lanes = self.lanes
        near = lanes.compare("olt", self._abs(node, scalar, weight), self._number(0.5, scalar), scalar)
        other = lanes.binary("fsub", weight, self._number(1.0, scalar), scalar)
        factor, end = lanes.select(near, weight, other, scalar), lanes.select(near, x, y, scalar)
        return lanes.intrinsic("fma", scalar, factor, lanes.binary("fsub", y, x, scalar), end)

    def _maximum(self, node: Node, scalar: str, x: str, y: str) -> str:
        return self.lanes.extreme("maximum", x, y, scalar)

    def _minimum(self, node: Node, scalar: str, x: str, y: str) -> str:
        return self.lanes.extreme("minimum", x, y, scalar)

    def _clamp(self, node: Node, scalar: str, x: str, low: str, high: str) -> str:
        if low:
            x = self.lanes.select(self.lanes.compare("olt", x, low, scalar), low, x, scalar)
        if high:
            x = self.lanes.select(self.lanes.compare("ogt", x, high, scalar), high, x, scalar)
        return x

    def _relu(self, node: Node, scalar: str, x: str) -> str:
        return self._clamp(node, scalar, x, self._number(0.0, scalar), "")

    def _sqrt(self, node: Node, scalar: str, x: str) -> str:
        return self.lanes.intrinsic("sqrt", scalar, x)

    def _rsqrt(self, node: Node, scalar: str, x: str) -> str:
        return self._reciprocal(node, scalar, self._sqrt(node, scalar, x))

    def _reciprocal(self, node: Node, scalar: str, x: str) -> str:
        return self.lanes.binary("fdiv", self._number(1.0, scalar), x, scalar)

    def _square(self, node: Node, scalar: str, x: str) -> str:
        return self.lanes.binary("fmul", x, x, scalar)

    def _abs(self, node: Node, scalar: str, x: str) -> str:
        return self.lanes.intrinsic("fabs", scalar, x)

    def _floor(self, node: Node, scalar: str, x: str) -> str:
        return self.lanes.intrinsic("floor", scalar, x)

    def _ceil(self, node: Node, scalar: str, x: str) -> str:
        return self.lanes.intrinsic("ceil", scalar, x)

    def _neg(self, node: Node, scalar: str, x: str) -> str:
        return self.lanes.let(f"fneg {self.lanes.type(scalar)} {x}")

    def _sign(self, node: Node, scalar: str, x: str) -> str:
        zero = self._number(0.0, scalar)
        below = self.lanes.compare("olt", x, zero, scalar)
        negative = self.lanes.select(below, self._number(-1.0, scalar), zero, scalar)
        above = self.lanes.compare("ogt", x, zero, scalar)
        return self.lanes.select(above, self._number(1.0, scalar), negative, scalar)

    def _isnan(self, node: Node, scalar: str, x: str) -> str:
        return self.lanes.compare("uno", x, x, scalar)

    def _isinf(self, node: Node, scalar: str, x: str) -> str:
        return self.lanes.compare("oeq", self._abs(node, scalar, x), self._number(float("inf"), scalar), scalar)

    def _isfinite(self, node: Node, scalar: str, x: str) -> str:
        return self.lanes.compare("olt", self._abs(node, scalar, x), self._number(float("inf"), scalar), scalar)

    def _pow(self, node: Node, scalar: str, x: str, _: str) -> str:
        exponent = float(node.args[1])
        if abs(exponent) == 0.5:
            return (self._sqrt if exponent > 0 else self._rsqrt)(node, scalar, x)
        power = x
        for _again in range(int(abs(exponent)) - 1):
            power = self.lanes.binary("fmul", power, x, scalar)
        return power if exponent > 0 else self._reciprocal(node, scalar, power)


def compared_in(nodes: tuple[Node, ...], node: Node) -> str:
    """The type in which a comparison is made: that of the tensors, of scalars per parameter if there is no tensor."""
    values = [nodes[i] for i in node.values()]
    deciding = [x for x in values if x.whole] or values
    return "double" if any(x.dtype == torch.float64 for x in deciding) else "float"


def supported(nodes: tuple[Node, ...]) -> bool:
    """Whether all nodes can be written: operations that a processor has, on floats and bools."""
    return all(_supported(nodes, node) for node in nodes)


def _supported(nodes: tuple[Node, ...], node: Node) -> bool:
    if node.dtype not in STORED:
        return False
    if node.op == "pow":
        return float(node.args[1]) in POWERS
    if node.op.startswith("bitwise"):
        return all(nodes[i].dtype == torch.bool for i in node.values())
    if node.op in REDUCTIONS or node.op in _PLAIN or node.op in _COMPARISONS or node.op.startswith("logical"):
        return True
    return hasattr(Formulas, f"_{node.op}") and (node.dtype != torch.bool or node.op in _TESTS)
