"""The calls on recorded tensors that are more than one elementwise operation: attributes, casts, copies, reductions."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from .numbers import Number
from .recorder import FLOATS, Cell, RecordedTensor, Recorder

_ACCUMULATE = {torch.bfloat16: torch.float32, torch.float16: torch.float32}


def _data(r: Recorder, x: RecordedTensor) -> RecordedTensor:
    return r.tensor(x.cell)


def _grad(r: Recorder, x: RecordedTensor) -> RecordedTensor | None:
    return x.of_grad


def _set_data(r: Recorder, x: RecordedTensor, value: Any) -> None:
    """`p.data -= x` ends in this, with the same tensor; another one would be a new place."""
    if not isinstance(value, RecordedTensor) or value.cell is not x.cell:
        r.refuse("another tensor put into .data")


def _set_grad(r: Recorder, x: RecordedTensor, value: Any) -> None:
    """`p.grad += x` ends in this, with the same tensor."""
    if not isinstance(value, RecordedTensor) or x.of_grad is None or value.cell is not x.of_grad.cell:
        r.refuse("another tensor put into .grad")


def _clone(r: Recorder, x: RecordedTensor, *, memory_format: Any = None) -> RecordedTensor:
    return r.new(x.cell.value)


def _to(r: Recorder, x: RecordedTensor, *args: Any, **kwargs: Any) -> RecordedTensor:
    """`to(dtype)`, `to(device)`, `to(device, dtype)`, `to(tensor)`: a recorded tensor is on its parameter's device."""
    dtype = x.dtype
    for value in (*args, *(v for k, v in kwargs.items() if k in ("dtype", "device", "other"))):
        if isinstance(value, torch.dtype):
            dtype = value
        elif isinstance(value, Tensor):
            dtype = value.dtype
        elif isinstance(value, torch.device | str | int) and torch.device(value).type != r.device.type:
            r.refuse(f"a move to {value}")
    made = r.cast(x, dtype, "convert")
    return r.new(made.cell.value) if kwargs.get("copy") else made


def _caster(dtype: torch.dtype) -> Callable[..., RecordedTensor]:
    return lambda r, x, **kwargs: r.cast(x, dtype, "convert")


def _filled(value: Any) -> Callable[..., RecordedTensor]:
    def like(r: Recorder, x: RecordedTensor, *, dtype: Any = None, device: Any = None, **layout: Any) -> RecordedTensor:
        if device is not None and torch.device(device).type != r.device.type:
            r.refuse(f"a new tensor on {device}")
        return r.full(x, value, dtype)

    return like


def _full_like(r: Recorder, x: RecordedTensor, fill_value: Any, **kwargs: Any) -> RecordedTensor:
    return _filled(fill_value)(r, x, **kwargs)


def _copy_(r: Recorder, x: RecordedTensor, other: Any, non_blocking: bool = False) -> RecordedTensor:
    if not isinstance(other, RecordedTensor):
        other = r.constant_tensor(other) if isinstance(other, Tensor) else r.full(x, other, None)
    # torch copies between any two dtypes; what is lost is the cb's intention
    return r.write(x, r.cast(other, x.dtype))


def _fill_(r: Recorder, x: RecordedTensor, value: Any) -> RecordedTensor:
    return _copy_(r, x, value)


def _zero_(r: Recorder, x: RecordedTensor) -> RecordedTensor:
    return r.write(x, r.full(x, 0, None))


def _rdiv(r: Recorder, x: RecordedTensor, other: Any) -> RecordedTensor:
    """`other / x`, which torch computes as x.reciprocal() * other."""
    return r.call("mul", (r.call("reciprocal", (x,)), other))


def _rpow(r: Recorder, x: RecordedTensor, base: Any) -> RecordedTensor:
    """`base ** x` for a number, such as `mom**step` with a step count on the device."""
    if isinstance(base, Tensor) or base < 0:
        r.refuse(f"{'a tensor' if isinstance(base, Tensor) else 'a negative number'} to the power of a tensor")
    return r.call("exp", (r.call("mul", (x, r.tape.apply("log", base))),))


def _where(r: Recorder, condition: Any, *values: Any, **named: Any) -> RecordedTensor:
    """`torch.where(c, x, y)` and `x.where(c, y)`, whose condition is found by its dtype."""
    x, y = (*values, *(named[k] for k in ("input", "other") if k in named))
    if isinstance(condition, Tensor) and condition.dtype != torch.bool and isinstance(x, Tensor):
        condition, x = x, condition
    return r.call("where", (condition, x, y))


def _clamp_min(r: Recorder, x: RecordedTensor, min: Any) -> RecordedTensor:
    return r.call("clamp", (x, min, None))


def _clamp_max(r: Recorder, x: RecordedTensor, max: Any) -> RecordedTensor:
    return r.call("clamp", (x, None, max))


# ---- reductions over the whole parameter


def _over_all(r: Recorder, dim: Any, keepdim: Any) -> None:
    if dim not in (None, ()) or keepdim:
        r.refuse("a reduction over some dimensions only")


def _sum(r: Recorder, x: RecordedTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    _over_all(r, dim, keepdim)
    return r.reduce("sum", r.cast(x, dtype) if dtype else x)


def _mean(r: Recorder, x: RecordedTensor, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Any:
    _over_all(r, dim, keepdim)
    wide = _ACCUMULATE.get(dtype or x.dtype, dtype or x.dtype)
    total = r.reduce("sum", r.cast(x, dtype) if dtype else x, wide)
    return r.cast(r.call("div", (total, r.count(wide))), dtype or x.dtype)


def _norm(r: Recorder, x: RecordedTensor, p: Any = "fro", dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    _over_all(r, dim, keepdim)
    dtype = kwargs.get("dtype") or x.dtype
    p = 2 if p in ("fro", None) else float(p)
    if p == 1:
        return _sum(r, r.call("abs", (x,)), dtype=kwargs.get("dtype"))
    if p == float("inf"):
        return r.cast(r.reduce("amax", r.call("abs", (x,))), dtype)
    if p != 2:
        r.refuse(f"a norm of order {p}")
    return r.cast(r.call("sqrt", (r.reduce("sum_of_squares", x, torch.float64),)), dtype)


def _vector_norm(r: Recorder, x: RecordedTensor, ord: Any = 2, dim: Any = None, **kwargs: Any) -> Any:
    return _norm(r, x, ord, dim, **kwargs)


def _extreme(op: str) -> Callable[..., Any]:
    def extreme(r: Recorder, x: RecordedTensor, *others: Any, **named: Any) -> Any:
        if len(others) == 1 and isinstance(others[0], Tensor):
            return r.call({"amax": "maximum", "amin": "minimum"}[op], (x, others[0]))
        _over_all(r, others[0] if others else named.get("dim"), named.get("keepdim", False))
        return r.reduce(op, x)

    return extreme


def recorded_norm(x: RecordedTensor, mean: bool) -> RecordedTensor:
    """The L2 norm or (`mean`) the root mean square over the whole parameter, at least float32."""
    r = x.recorder
    dtype = torch.promote_types(x.dtype, torch.float32)
    norm = r.cast(r.call("sqrt", (r.reduce("sum_of_squares", x, torch.float64),)), dtype)
    if not mean:
        return norm
    size = r.call("clamp", (r.count(torch.float64), 1, None))
    return r.call("div", (norm, r.cast(r.call("sqrt", (size,)), dtype)))


METHODS: dict[str, Callable[..., Any]] = {
    "__get__ data": _data,
    "detach": _data,
    "detach_": lambda r, x: x,
    "contiguous": lambda r, x, **kwargs: r.tensor(x.cell),
    "__set__ data": _set_data,
    "__get__ grad": _grad,
    "__set__ grad": _set_grad,
    "__get__ dtype": lambda r, x: r.nodes[x.cell.value].dtype,
    "__get__ device": lambda r, x: r.device,
    "__get__ is_cuda": lambda r, x: r.device.type == "cuda",
    "__get__ is_cpu": lambda r, x: r.device.type == "cpu",
    "__get__ is_sparse": lambda r, x: False,
    "__get__ layout": lambda r, x: torch.strided,
    "is_complex": lambda r, x: False,
    "is_floating_point": lambda r, x: r.nodes[x.cell.value].dtype in FLOATS,
    "clone": _clone,
    "to": _to,
    "float": _caster(torch.float32),
    "double": _caster(torch.float64),
    "half": _caster(torch.float16),
    "bfloat16": _caster(torch.bfloat16),
    "bool": _caster(torch.bool),
    "type_as": lambda r, x, other: r.cast(x, other.dtype, "convert"),
    "zeros_like": _filled(0),
    "empty_like": _filled(0),
    "ones_like": _filled(1),
    "full_like": _full_like,
    "copy_": _copy_,
    "fill_": _fill_,
    "zero_": _zero_,
    "__rdiv__": _rdiv,
    "__rtruediv__": _rdiv,
    "__rpow__": _rpow,
    "where": _where,
    "clamp_min": _clamp_min,
    "clamp_max": _clamp_max,
    "sum": _sum,
    "mean": _mean,
    "norm": _norm,
    "linalg_vector_norm": _vector_norm,
    "linalg_norm": _vector_norm,
    "amax": _extreme("amax"),
    "amin": _extreme("amin"),
    "max": _extreme("amax"),
    "min": _extreme("amin"),
}

__all__ = ["METHODS", "Cell", "Number", "recorded_norm"]
