"""The scalars of many rows at once: each number is a column over the rows, or one number where all rows agree.

500 groups that differ in their learning rate cost a few numpy operations per step instead of 500 evaluations. Only
operations whose results are those of Python's own numbers to the bit are done on whole columns; powers and divisions
with remainder go through Python element by element.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

#: (hypers, state) as columns -> (values, new python states) as columns, None where a guard does not hold for all rows.
ColumnEvaluate = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]


class NoColumn(Exception):
    """These values do not make a column: the rows have to be evaluated one by one."""


def column(values: Sequence[Any]) -> Any:
    """One value per row as a column.

    Raises:
        NoColumn: the rows differ in something other than floats.
    """
    first = values[0]
    if all(value is first for value in values):
        return first
    if type(first) in (tuple, list):
        if any(type(value) is not type(first) or len(value) != len(first) for value in values):
            raise NoColumn
        return type(first)(column(items) for items in zip(*values, strict=True))
    if isinstance(first, Tensor) or any(type(value) is not type(first) for value in values):
        raise NoColumn
    if type(first) is float:
        made = np.array(values, np.float64)
        bits = made.view(np.int64)
        return first if (bits == bits[0]).all() else made
    if all(value == first for value in values):
        return first
    raise NoColumn


def columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One column for each name that the rows have in common."""
    return {name: column([row[name] for row in rows]) for name in rows[0]}


def row_of(column: Any, k: int) -> Any:
    """The value of row `k`."""
    return column[k].item() if isinstance(column, np.ndarray) else column


def evaluate_columns(
    evaluate: ColumnEvaluate, hypers: Mapping[str, Any], state: Mapping[str, Any], n_rows: int
) -> tuple[NDArray[np.float64], dict[str, Any]] | None:
    """The scalars `[n_slots, n_rows]` and the new numbers of the state; None where rows must go one by one."""
    try:
        with np.errstate(divide="raise", invalid="raise", over="ignore", under="ignore"):
            found = evaluate(hypers, state)
            table = np.empty((0 if found is None else len(found[0]), n_rows))
            for slot, value in enumerate(() if found is None else found[0]):
                table[slot] = value
    except (ArithmeticError, ValueError, TypeError):  # Python's numbers say what is wrong, row by row
        return None
    if found is None or any(isinstance(x, np.ndarray) and x.dtype != np.float64 for x in found[1].values()):
        return None
    return table, found[1]


def _each(op: Callable[[Any, Any], Any]) -> Callable[[Any, Any], Any]:
    """`op` of Python's numbers, element by element."""

    def apply(x: Any, y: Any) -> Any:
        if not isinstance(x, np.ndarray) and not isinstance(y, np.ndarray):
            return op(x, y)
        xs, ys = np.broadcast_arrays(x, y)
        return np.array([op(a, b) for a, b in zip(xs.tolist(), ys.tolist(), strict=True)], np.float64)

    return apply


def _divide(x: Any, y: Any) -> Any:
    """`x / y`, which is an error wherever Python says so: numpy finds that infinity by zero is infinity."""
    if not (y.all() if isinstance(y, np.ndarray) else y):
        raise ZeroDivisionError
    return x / y


def log(x: float) -> float:
    """The natural logarithm of a number that is not negative; -inf for 0, as torch has it."""
    return math.log(x) if x else -math.inf


def _each_log(x: Any) -> Any:
    return np.array(list(map(log, x.tolist()))) if isinstance(x, np.ndarray) else log(x)


def _all(found: Any) -> bool:
    """Whether a comparison holds in all rows."""
    return bool(found.all() if isinstance(found, np.ndarray) else found)


def _any(found: Any) -> bool:
    """Whether a comparison holds in any row."""
    return bool(found.any() if isinstance(found, np.ndarray) else found)


#: What the generated function calls where an operation on whole columns would differ from Python's.
SCOPE: dict[str, Any] = {
    "divide": _divide,
    "each_pow": _each(operator.pow),
    "each_floordiv": _each(operator.floordiv),
    "each_mod": _each(operator.mod),
    "each_log": _each_log,
    "all_": _all,
    "any_": _any,
}
