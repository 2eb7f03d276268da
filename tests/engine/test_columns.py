"""Scalars by columns against the same evaluated row by row."""

from __future__ import annotations

import math
import operator
from typing import Any, NoReturn

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastopt.engine.recording.columns import NoColumn, column, columns, evaluate_columns, row_of
from fastopt.engine.recording.numbers import Tape

numbers = st.floats(-4, 4) | st.sampled_from([0.0, -0.0, 1e-300, 1e300, math.inf])
BINARY = {"+": operator.add, "-": operator.sub, "*": operator.mul, "/": operator.truediv, "**": operator.pow,
          "//": operator.floordiv, "%": operator.mod}  # fmt: skip


def _refuse(reason: str) -> NoReturn:
    raise AssertionError(reason)


def _same(a: Any, b: Any) -> bool:
    return type(a) is type(b) and (np.float64(a).tobytes() == np.float64(b).tobytes() or a != a)


@settings(deadline=None, max_examples=150)
@given(
    st.lists(st.tuples(numbers, numbers), min_size=2, max_size=6), st.sampled_from(sorted(BINARY)), st.integers(1, 5)
)
@example(rows=[(-1.5, -1.5), (-1.5, -1.5)], op="**", step=1)  # a complex number
@example(rows=[(0.0, 1.0), (math.inf, 0.0)], op="/", step=1)
def test_columns_are_the_rows_to_the_bit(rows: list[tuple[float, float]], op: str, step: int) -> None:
    tape = Tape(_refuse)
    x, y = tape.leaf("hypers['x']", "x", 1.5), tape.leaf("hypers['y']", "y", 2.5)
    count = tape.leaf("state['step']", "step", step) + 1
    made = BINARY[op](x, y)
    values = [made, -made * x, abs(y) ** count, 1 - x]
    by_row, by_column = tape.evaluator(values, {"step": count}), tape.column_evaluator(values, {"step": count})
    hypers = [{"x": a, "y": b} for a, b in rows]
    found = evaluate_columns(by_column, columns(hypers), {"step": step}, len(rows))
    try:
        expected = [by_row(each, {"step": step}) for each in hypers]
    except (ArithmeticError, TypeError):
        assert found is None
        return
    if found is None:  # it may always leave it to the rows
        return
    table, state = found
    assert state == {"step": step + 1}
    for k, row in enumerate(expected):
        assert row is not None
        if not any(isinstance(value, complex) for value in row[0]):
            assert all(_same(float(value), table[slot, k].item()) for slot, value in enumerate(row[0])), (rows, op)


def test_a_guard_must_hold_for_every_row() -> None:
    tape = Tape(_refuse)
    wd, step = tape.leaf("hypers['wd']", "wd", 0.1), tape.leaf("state['step']", "step", 3)
    assert wd != 0
    assert step > 2
    evaluate = tape.column_evaluator([wd], {})
    some = columns([{"wd": 0.1}, {"wd": 0.2}])
    assert evaluate_columns(evaluate, some, {"step": 7}, 2) is not None
    assert evaluate_columns(evaluate, some, {"step": 2}, 2) is None
    assert evaluate_columns(evaluate, columns([{"wd": 0.1}, {"wd": 0.0}]), {"step": 7}, 2) is None


def test_what_makes_a_column() -> None:
    assert column([0.5, 0.5]) == 0.5
    assert column([3, 3]) == 3
    assert column([(0.9, 1), (0.9, 1)]) == (0.9, 1)
    assert isinstance(column([0.0, -0.0]), np.ndarray)
    made = column([(0.9, 0.5), (0.8, 0.5)])
    assert made[1] == 0.5
    assert [row_of(made[0], k) for k in range(2)] == [0.9, 0.8]
    for values in ([1, 2], [1, 1.0], [True, 1], ["a", "b"], [(1.0,), (1.0, 2.0)], [None, 0.0]):
        with pytest.raises(NoColumn):
            column(values)
