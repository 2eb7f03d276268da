"""A program as text: what will run, the bytes that it moves, and the least time that follows from them."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from .program import Slot, Value

if TYPE_CHECKING:
    from .program import Node, Phase, Program

_INFIX = {
    "mul": "*", "div": "/", "eq": "==", "ne": "!=", "lt": "<", "le": "<=", "gt": ">", "ge": ">=",
    "bitwise_and": "&", "bitwise_or": "|", "bitwise_xor": "^", "pow": "**",
}  # fmt: skip
#: Bytes per second that the floor is given for, that of one H100's memory.
_REFERENCE = 3e12


def program_text(program: Program) -> str:
    """One line per operation, pass by pass."""
    read, written = program.bytes_per_element()
    n_passes = len(program.phases)
    floor = (read + written) / _REFERENCE * 1e12
    lines = [
        f"program: {n_passes} pass{'es' if n_passes > 1 else ''}, {program.n_slots} scalars; reads {read} B and "
        f"writes {written} B per element, so at 3 TB/s at least {floor:.2f} ms per 10^9 elements"
    ]
    lines += [f"  s{i} = {text}" for i, text in enumerate(program.slot_texts)]
    for k, phase in enumerate(program.phases):
        lines.append(f"  pass {k + 1}")
        lines += [f"    {line}" for line in _phase_lines(program, phase)]
    return "\n".join(lines)


def _phase_lines(program: Program, phase: Phase) -> Iterator[str]:
    for i in phase.scalars:
        yield f"v{i} = {_formula(program.nodes[i])}   # {_dtype(program.nodes[i])}, one per parameter"
    for out in phase.scalar_stores:
        yield f"{out.place} <- v{out.value}"
    for place, i in phase.loads:
        yield f"v{i} = read {place}   # {_dtype(program.nodes[i])}"
    for i in phase.nodes:
        yield f"v{i} = {_formula(program.nodes[i])}   # {_dtype(program.nodes[i])}"
    for out in phase.stores:
        yield f"write {out.place}{' (new)' if out.fresh else ''} <- v{out.value}"
    for i in phase.reductions:
        yield f"v{i} = {_formula(program.nodes[i])} over the parameter"


def _dtype(node: Node) -> str:
    return str(node.dtype).removeprefix("torch.")


def _operand(x: Any) -> str:
    return f"v{x.index}" if isinstance(x, Value) else f"s{x.index}" if isinstance(x, Slot) else repr(x)


def _formula(node: Node) -> str:
    args = [_operand(x) for x in node.args]
    if node.op == "input":
        return f"read {node.args[0]}"
    if node.op in ("add", "sub"):
        scaled = args[1] if node.args[2] == 1 else f"{args[2]} * {args[1]}"
        return f"{args[0]} {'+' if node.op == 'add' else '-'} {scaled}"
    if node.op in ("addcmul", "addcdiv"):
        sign = "*" if node.op == "addcmul" else "/"
        scale = "" if node.args[3] == 1 else f"{args[3]} * "
        return f"{args[0]} + {scale}{args[1]} {sign} {args[2]}"
    if node.op in _INFIX:
        return f"{args[0]} {_INFIX[node.op]} {args[1]}"
    return f"{node.op}({', '.join(args)})"
