"""Numbers that remember how they were made, so that one recording of a chain serves every group and every step.

A cb computes with hyper-parameters and Python numbers of the state: `1 - mom**step`. While it is recorded it receives
a `Number` for each: it has the real value, and every operation on it is written on a `Tape`. Where the cb lets a
number decide (`if wd != 0`, `count % k == 0`) or takes it out of our sight (`math.sqrt(x)`, `range(n)`), the tape
notes a guard. The tape then becomes one Python function that evaluates the same operations in the same order for other
values of the inputs, and answers None where a guard does not hold: then the chain has to be recorded anew.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NoReturn, cast

from .columns import SCOPE, ColumnEvaluate, log

#: How the generated function computes each operation.
_FORMS = {
    "+": "{0} + {1}",
    "-": "{0} - {1}",
    "*": "{0} * {1}",
    "/": "{0} / {1}",
    "//": "{0} // {1}",
    "%": "{0} % {1}",
    "**": "{0} ** {1}",
    "neg": "-{0}",
    "abs": "abs({0})",
    "<": "{0} < {1}",
    "<=": "{0} <= {1}",
    ">": "{0} > {1}",
    ">=": "{0} >= {1}",
    "==": "{0} == {1}",
    "!=": "{0} != {1}",
    "bool": "bool({0})",
    "log": "log({0})",
}
#: The same over columns of numbers, where it differs.
_COLUMN_FORMS = {
    "/": "divide({0}, {1})",
    "//": "each_floordiv({0}, {1})",
    "%": "each_mod({0}, {1})",
    "**": "each_pow({0}, {1})",
    "bool": "({0} != 0)",
    "log": "each_log({0})",
}
#: What an operation gives now.
_COMPUTE: dict[str, Callable[..., Any]] = {
    "+": operator.add,
    "-": operator.sub,
    "*": operator.mul,
    "/": operator.truediv,
    "//": operator.floordiv,
    "%": operator.mod,
    "**": operator.pow,
    "neg": operator.neg,
    "abs": operator.abs,
    "<": operator.lt,
    "<=": operator.le,
    ">": operator.gt,
    ">=": operator.ge,
    "==": operator.eq,
    "!=": operator.ne,
    "bool": bool,
    "log": log,
}

#: Evaluates a tape: (hypers, state) -> (values, new python states), or None where a guard does not hold.
Evaluate = Callable[[Mapping[str, Any], Mapping[str, Any]], tuple[tuple[Any, ...], dict[str, Any]] | None]
Plain = bool | int | float


class Tape:
    """The operations on the numbers of one recording, in order.

    Args:
        refuse: gives up the recording, with a reason.
    """

    def __init__(self, refuse: Callable[[str], NoReturn]) -> None:
        self.refuse = refuse
        self._lines: list[str] = []
        self._column_lines: list[str] = []
        self._texts: list[str] = []
        self._known: dict[str, int] = {}
        self._values: list[Any] = []
        self._constants: dict[str, Any] = {}

    def leaf(self, source: str, text: str, value: Plain) -> Number:
        """A number that is read from `source`, an expression over `hypers` and `state`; `text` names it in prints."""
        return self._number(source, text, value)

    def constant(self, value: Plain) -> str:
        """The name of a constant in the generated function."""
        for name, known in self._constants.items():
            if known is value or (type(known) is type(value) and repr(known) == repr(value)):
                return name
        name = f"k{len(self._constants)}"
        self._constants[name] = value
        return name

    def apply(self, op: str, *operands: Any) -> Number:
        """The number `op(*operands)`."""
        value = _COMPUTE[op](*(_value(x) for x in operands))
        source = _FORMS[op].format(*(self._name(x) for x in operands))
        text = _FORMS[op].format(*(self.text(x) for x in operands))
        by_column = _column_form(op).format(*(self._name(x) for x in operands))
        return self._number(source, f"({text})" if len(operands) > 1 else text, value, by_column)

    def decide(self, op: str, *operands: Any) -> bool:
        """The truth of `op(*operands)`, which must come out the same whenever this recording is used."""
        outcome = bool(_COMPUTE[op](*(_value(x) for x in operands)))
        names = [self._name(x) for x in operands]
        self._guard(
            f"if {'not ' if outcome else ''}({_FORMS[op].format(*names)}): return None",
            f"if {'not all_' if outcome else 'any_'}({_column_form(op).format(*names)}): return None",
        )
        return outcome

    def fix(self, number: Number) -> Plain:
        """The value of `number`, which must be the same whenever this recording is used."""
        name, constant = self._name(number), self.constant(number.value)
        self._guard(f"if {name} != {constant}: return None", f"if any_({name} != {constant}): return None")
        return number.value

    def text(self, operand: Any) -> str:
        """The operand as a formula over the names of hypers and states."""
        return self._texts[operand.index] if _is_number(operand) else repr(operand)

    def evaluator(self, values: Sequence[Any], states: Mapping[str, Any]) -> Evaluate:
        """A function that computes `values` and `states`, which are numbers of this tape or plain ones."""
        return cast(Evaluate, self._function(self._lines, values, states, {"log": log}))

    def column_evaluator(self, values: Sequence[Any], states: Mapping[str, Any]) -> ColumnEvaluate:
        """The same for columns of numbers."""
        return cast(ColumnEvaluate, self._function(self._column_lines, values, states, SCOPE))

    def _function(
        self, lines: Sequence[str], values: Sequence[Any], states: Mapping[str, Any], scope: Mapping[str, Any]
    ) -> Any:
        row = "".join(f"{self._name(x)}, " for x in values)
        new = ", ".join(f"{key!r}: {self._name(x)}" for key, x in states.items())
        body = "\n    ".join([*lines, f"return ({row}), {{{new}}}"])
        known = {**scope, **self._constants}
        exec(f"def evaluate(hypers, state):\n    {body}", known)
        return known["evaluate"]

    def _number(self, source: str, text: str, value: Plain, by_column: str | None = None) -> Number:
        index = self._known.get(source)
        if index is None:
            index = self._known[source] = len(self._texts)
            self._lines.append(f"x{index} = {source}")
            self._column_lines.append(f"x{index} = {by_column or source}")
            self._texts.append(text)
        return Number(self, index, value)

    def _guard(self, line: str, by_column: str) -> None:
        if line not in self._lines:
            self._lines.append(line)
            self._column_lines.append(by_column)

    def _name(self, operand: Any) -> str:
        return f"x{operand.index}" if _is_number(operand) else self.constant(operand)


def _column_form(op: str) -> str:
    return _COLUMN_FORMS.get(op, _FORMS[op])


def _is_number(x: Any) -> bool:
    return type(x) is Number


def _value(x: Any) -> Any:
    return x.value if type(x) is Number else x


def _known(x: Any) -> bool:
    return type(x) is Number or isinstance(x, int | float)


class Number:
    """A real number with its place on a tape. Passes for an int or float in `isinstance`, but is none to C code."""

    __slots__ = ("index", "tape", "value")

    def __init__(self, tape: Tape, index: int, value: Plain) -> None:
        self.tape, self.index, self.value = tape, index, value

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.value)

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Torch functions see this where a number comes first: the recording tensor beside it takes the call."""
        from .recorder import record_call

        return record_call(func, args, kwargs or {})

    def __array__(self, *args: Any, **kwargs: Any) -> Any:
        import numpy

        return numpy.asarray(self.tape.fix(self))

    def __add__(self, other: Any) -> Any:
        return self.tape.apply("+", self, other) if _known(other) else NotImplemented

    def __radd__(self, other: Any) -> Any:
        return self.tape.apply("+", other, self) if _known(other) else NotImplemented

    def __sub__(self, other: Any) -> Any:
        return self.tape.apply("-", self, other) if _known(other) else NotImplemented

    def __rsub__(self, other: Any) -> Any:
        return self.tape.apply("-", other, self) if _known(other) else NotImplemented

    def __mul__(self, other: Any) -> Any:
        return self.tape.apply("*", self, other) if _known(other) else NotImplemented

    def __rmul__(self, other: Any) -> Any:
        return self.tape.apply("*", other, self) if _known(other) else NotImplemented

    def __truediv__(self, other: Any) -> Any:
        return self.tape.apply("/", self, other) if _known(other) else NotImplemented

    def __rtruediv__(self, other: Any) -> Any:
        return self.tape.apply("/", other, self) if _known(other) else NotImplemented

    def __floordiv__(self, other: Any) -> Any:
        return self.tape.apply("//", self, other) if _known(other) else NotImplemented

    def __rfloordiv__(self, other: Any) -> Any:
        return self.tape.apply("//", other, self) if _known(other) else NotImplemented

    def __mod__(self, other: Any) -> Any:
        return self.tape.apply("%", self, other) if _known(other) else NotImplemented

    def __rmod__(self, other: Any) -> Any:
        return self.tape.apply("%", other, self) if _known(other) else NotImplemented

    def __pow__(self, other: Any, modulo: None = None) -> Any:
        return self.tape.apply("**", self, other) if _known(other) and modulo is None else NotImplemented

    def __rpow__(self, other: Any) -> Any:
        return self.tape.apply("**", other, self) if _known(other) else NotImplemented

    def __neg__(self) -> Number:
        return self.tape.apply("neg", self)

    def __pos__(self) -> Number:
        return self

    def __abs__(self) -> Number:
        return self.tape.apply("abs", self)

    def __bool__(self) -> bool:
        return self.tape.decide("bool", self)

    def __lt__(self, other: Any) -> Any:
        return self.tape.decide("<", self, other) if _known(other) else NotImplemented

    def __le__(self, other: Any) -> Any:
        return self.tape.decide("<=", self, other) if _known(other) else NotImplemented

    def __gt__(self, other: Any) -> Any:
        return self.tape.decide(">", self, other) if _known(other) else NotImplemented

    def __ge__(self, other: Any) -> Any:
        return self.tape.decide(">=", self, other) if _known(other) else NotImplemented

    def __eq__(self, other: object) -> Any:
        return self.tape.decide("==", self, other) if _known(other) else NotImplemented

    def __ne__(self, other: object) -> Any:
        return self.tape.decide("!=", self, other) if _known(other) else NotImplemented

    # From here on the value leaves our sight: it is fixed for this recording.

    def __hash__(self) -> int:
        return hash(self.tape.fix(self))

    def __float__(self) -> float:
        return float(self.tape.fix(self))

    def __int__(self) -> int:
        return int(self.tape.fix(self))

    def __index__(self) -> int:
        value = self.tape.fix(self)
        if not isinstance(value, int):
            raise TypeError(f"'{type(value).__name__}' object cannot be interpreted as an integer")
        return value

    def __round__(self, digits: int | None = None) -> Any:
        return round(self.tape.fix(self), digits)

    def __trunc__(self) -> int:
        return int(self.tape.fix(self))

    def __floor__(self) -> int:
        return int(self.tape.fix(self) // 1)

    def __ceil__(self) -> int:
        return -int(-self.tape.fix(self) // 1)

    def __str__(self) -> str:
        return str(self.tape.fix(self))

    def __format__(self, spec: str) -> str:
        return format(self.tape.fix(self), spec)

    def __repr__(self) -> str:
        return f"Number({self.tape.text(self)} = {self.value!r})"

    def is_integer(self) -> bool:
        """As of int and float."""
        return float(self.tape.fix(self)).is_integer()
