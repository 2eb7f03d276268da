"""The operations of programs: how a call of torch is brought into one form, and how torch runs that form.

An operation has its operands in one fixed order, so that every executor reads them the same way:
`x.add_(y, alpha=a)`, `torch.add(x, y, alpha=a)` and `x += a * y` written out all have operands `(x, y, a)`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F


class Op(NamedTuple):
    """One elementwise operation.

    Attributes:
        bind: takes the arguments of a call, gives the operands in order; a TypeError where it does not know them.
        run: what torch does with these operands; takes `out=` if `takes_out`.
        takes_out: whether `run` can write into a given tensor.
        fixed: positions of operands that are part of the structure, not slots.
    """

    bind: Callable[..., tuple[Any, ...]]
    run: Callable[..., Any]
    takes_out: bool = True
    fixed: tuple[int, ...] = ()


def _unary(input: Any) -> tuple[Any, ...]:
    return (input,)


def _binary(input: Any, other: Any) -> tuple[Any, ...]:
    return input, other


def _scaled(input: Any, other: Any, *, alpha: Any = 1) -> tuple[Any, ...]:
    return input, other, alpha


def _products(input: Any, tensor1: Any, tensor2: Any, *, value: Any = 1) -> tuple[Any, ...]:
    return input, tensor1, tensor2, value


def _div(input: Any, other: Any, *, rounding_mode: None = None) -> tuple[Any, ...]:
    if rounding_mode is not None:
        raise TypeError("rounding_mode")
    return input, other


def _clamp(input: Any, min: Any = None, max: Any = None) -> tuple[Any, ...]:
    return input, min, max


def _softplus(input: Any, beta: Any = 1, threshold: Any = 20) -> tuple[Any, ...]:
    return input, beta, threshold


def _run_softplus(x: Any, beta: Any, threshold: Any) -> Any:
    return F.softplus(x, beta, threshold)


def _run_where(condition: Any, x: Any, y: Any) -> Any:
    return torch.where(condition, x, y)


_UNARY = [
    "sqrt",
    "rsqrt",
    "square",
    "abs",
    "sign",
    "exp",
    "log",
    "log1p",
    "expm1",
    "tanh",
    "sigmoid",
    "neg",
    "reciprocal",
    "relu",
    "floor",
    "ceil",
    "isnan",
    "isfinite",
    "isinf",
    "logical_not",
    "bitwise_not",
]
_BINARY = [
    "mul",
    "maximum",
    "minimum",
    "eq",
    "ne",
    "lt",
    "le",
    "gt",
    "ge",
    "logical_and",
    "logical_or",
    "logical_xor",
    "bitwise_and",
    "bitwise_or",
    "bitwise_xor",
]
_WITHOUT_OUT = {"relu", "isnan", "isfinite", "isinf"}

OPS: dict[str, Op] = {
    **{name: Op(_unary, getattr(torch, name), name not in _WITHOUT_OUT) for name in _UNARY},
    **{name: Op(_binary, getattr(torch, name)) for name in _BINARY},
    "add": Op(_scaled, lambda x, y, a, **out: torch.add(x, y, alpha=a, **out)),
    "sub": Op(_scaled, lambda x, y, a, **out: torch.sub(x, y, alpha=a, **out)),
    "rsub": Op(_binary, lambda x, y: torch.rsub(x, y), takes_out=False),
    "div": Op(_div, torch.div),
    "pow": Op(lambda input, exponent: (input, exponent), torch.pow, fixed=(1,)),
    "addcmul": Op(_products, lambda x, y, z, a, **out: torch.addcmul(x, y, z, value=a, **out)),
    "addcdiv": Op(_products, lambda x, y, z, a, **out: torch.addcdiv(x, y, z, value=a, **out)),
    "lerp": Op(lambda input, end, weight: (input, end, weight), torch.lerp),
    "clamp": Op(_clamp, lambda x, low, high, **out: torch.clamp(x, low, high, **out)),
    "where": Op(lambda condition, input, other: (condition, input, other), _run_where, takes_out=False),
    "softplus": Op(_softplus, _run_softplus, takes_out=False),
}

#: Other spellings, also of Python's operators where they do not arrive under the plain name.
ALIASES = {
    "multiply": "mul",
    "__mul__": "mul",
    "__rmul__": "mul",
    "__imul__": "mul_",
    "divide": "div",
    "true_divide": "div",
    "__truediv__": "div",
    "__div__": "div",
    "__itruediv__": "div_",
    "__idiv__": "div_",
    "subtract": "sub",
    "__add__": "add",
    "__radd__": "add",
    "__iadd__": "add_",
    "__sub__": "sub",
    "__isub__": "sub_",
    "__rsub__": "rsub",
    "__pow__": "pow",
    "__ipow__": "pow_",
    "negative": "neg",
    "__neg__": "neg",
    "absolute": "abs",
    "__abs__": "abs",
    "sgn": "sign",
    "clip": "clamp",
    "greater": "gt",
    "greater_equal": "ge",
    "less": "lt",
    "less_equal": "le",
    "not_equal": "ne",
    "__eq__": "eq",
    "__ne__": "ne",
    "__lt__": "lt",
    "__le__": "le",
    "__gt__": "gt",
    "__ge__": "ge",
    "__and__": "bitwise_and",
    "__rand__": "bitwise_and",
    "__iand__": "bitwise_and_",
    "__or__": "bitwise_or",
    "__ror__": "bitwise_or",
    "__ior__": "bitwise_or_",
    "__xor__": "bitwise_xor",
    "__invert__": "bitwise_not",
}

#: Numbers that are written into generated code. All others are slots, so that a new value needs no new code.
LITERALS = frozenset({-1.0, 0.0, 0.5, 1.0, 2.0})


def run_node(op: str, operands: list[Any], dtype: torch.dtype, like: torch.Tensor | None) -> torch.Tensor:
    """The value of one node by torch itself. `like` gives shape and device to a node that has no tensor operand.

    Besides the operations of `OPS` there are `cast` and `convert` (x), `full` (value), `expand` (a scalar per
    parameter) and `scalar` (value).
    """
    if op in ("cast", "convert"):
        return operands[0].to(dtype)  # type: ignore[no-any-return]
    if op == "full":
        assert like is not None
        return torch.full_like(like, operands[0], dtype=dtype)
    if op == "expand":
        assert like is not None
        return torch.empty_like(like, dtype=dtype).copy_(operands[0])
    if op == "scalar":
        assert like is not None
        return torch.full((), operands[0], dtype=dtype, device=like.device)
    return OPS[op].run(*operands)  # type: ignore[no-any-return]
