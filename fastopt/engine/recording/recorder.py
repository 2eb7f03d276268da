"""Tensors that write down what is done to them.

A `RecordedTensor` stands for a tensor of any parameter of a group: the parameter, its gradient or a state. It is a
`torch.Tensor` without data, so `isinstance` says so, and torch hands us every function, method, operator and attribute
that it is used with. What we know becomes a node of the program; everything else raises `NotRecordable`.

Changing a tensor in place gives its *cell* a new value; `.data` and `.detach()` share the cell.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import torch
from torch import Tensor

from .numbers import Number, Tape
from .ops import ALIASES, LITERALS, OPS
from .program import Node, Slot, Value

FLOATS = frozenset({torch.float32, torch.float64, torch.bfloat16, torch.float16})


class NotRecordable(Exception):
    """A chain does something that a program cannot express; the text says what."""


class Cell:
    """A tensor of the recording: its present value, and the place that it came from, if any."""

    __slots__ = ("constant", "place", "value")

    def __init__(self, value: int, place: str | None = None, constant: bool = False) -> None:
        self.value, self.place, self.constant = value, place, constant


class Recorder:
    """Collects the nodes of one recording.

    Args:
        device: of the parameter, its gradient and its state.
        zero_dim: whether the parameter has no dimensions, which changes torch's rules for mixed dtypes.
    """

    def __init__(self, device: torch.device, zero_dim: bool = False) -> None:
        self.tape = Tape(self.refuse)
        self.device = device
        self.nodes: list[Node] = []
        self.slots: list[Any] = []
        self.refusal: str | None = None
        self.cb = ""
        self.zero_dim = zero_dim
        self._known: dict[Node, int] = {}
        self._slot_of: dict[Any, int] = {}

    def refuse(self, what: str) -> NoReturn:
        """Give up: `what` cannot be recorded. Remembered, should the cb catch the exception."""
        self.refusal = self.refusal or f"{self.cb}: {what}"
        raise NotRecordable(self.refusal)

    # ---- nodes

    def node(self, op: str, args: Iterable[Any], dtype: torch.dtype, whole: bool) -> int:
        """The number of the node with these operands; the same one if it is there already."""
        node = Node(op, tuple(args), dtype, whole)
        if node not in self._known:
            self._known[node] = len(self.nodes)
            self.nodes.append(node)
        return self._known[node]

    def input(self, place: str, dtype: torch.dtype, whole: bool, constant: bool = False) -> RecordedTensor:
        """The tensor that is read from `place`."""
        return self.tensor(Cell(self.node("input", (place,), dtype, whole), place, constant))

    def tensor(self, cell: Cell) -> RecordedTensor:
        """A handle on a cell."""
        return RecordedTensor.make(self, cell)

    def new(self, value: int) -> RecordedTensor:
        """A handle on a new tensor with this value."""
        return self.tensor(Cell(value))

    def slot(self, number: Any) -> Slot | float | int | bool:
        """A number as an operand: itself if it is a common constant, else a slot of the row of scalars."""
        if type(number) is not Number and (isinstance(number, bool) or number in LITERALS):
            return number  # type: ignore[no-any-return]
        key = ("x", number.index) if type(number) is Number else (type(number), repr(number))
        if key not in self._slot_of:
            self._slot_of[key] = len(self.slots)
            self.slots.append(number)
        return Slot(self._slot_of[key])

    def operand(self, x: Any) -> Any:
        """An argument of an operation as an operand of a node."""
        if isinstance(x, RecordedTensor):
            return Value(x.cell.value)
        if isinstance(x, Tensor):
            return Value(self.constant_tensor(x).cell.value)
        if x is None:
            return None
        if type(x) is Number or isinstance(x, int | float):
            return self.slot(x)
        self.refuse(f"a {type(x).__name__} as an operand")

    def constant_tensor(self, x: Tensor) -> RecordedTensor:
        """A 0-d tensor that the cb made of a number."""
        if x.ndim or x.device.type != "cpu" or type(x) is not Tensor or x.requires_grad:
            self.refuse(f"a tensor of shape {tuple(x.shape)} that is no state of the parameter")
        return self.new(self.node("scalar", (self.slot(x.item()),), x.dtype, False))

    def _like(self, i: int) -> Tensor:
        """A tensor with the dtype of node `i`, for torch's rules; empty, since on the meta device Dynamo comes in."""
        node = self.nodes[i]
        return torch.empty((0,) if node.whole and not self.zero_dim else (), dtype=node.dtype, device="cpu")

    def call(self, op: str, operands: Iterable[Any]) -> RecordedTensor:
        """Record one operation of `OPS`; its dtype is what torch gives."""
        fixed = OPS[op].fixed
        plain = [
            float(x) if i in fixed and type(x) is Number else x for i, x in enumerate(operands)
        ]  # a number that is part of the structure is fixed
        if any(i < len(plain) and isinstance(plain[i], Tensor) for i in fixed):
            self.refuse(f"{op} with a tensor as operand {fixed[0] + 1}")
        args = [x if i in fixed else self.operand(x) for i, x in enumerate(plain)]
        shown = [
            self._like(a.index) if isinstance(a, Value) else x.value if type(x) is Number else x
            for a, x in zip(args, plain, strict=True)
        ]
        try:
            dtype = OPS[op].run(*shown).dtype
        except (RuntimeError, TypeError, NotImplementedError) as error:
            self.refuse(f"{op} with {', '.join(type(x).__name__ for x in plain)} ({str(error).splitlines()[0]})")
        whole = any(self.nodes[a.index].whole for a in args if isinstance(a, Value))
        return self.new(self.node(op, args, dtype, whole))

    def cast(self, x: RecordedTensor, dtype: torch.dtype, op: str = "cast") -> RecordedTensor:
        """`x` in another dtype; `x` itself if it has it. The cb asked for it where `op` is `convert`, so executors
        that compute with more bits round there."""
        node = self.nodes[x.cell.value]
        return x if node.dtype == dtype else self.new(self.node(op, (Value(x.cell.value),), dtype, node.whole))

    def full(self, like: RecordedTensor, value: Any, dtype: torch.dtype | None) -> RecordedTensor:
        """A new tensor like another, filled with a number."""
        node = self.nodes[like.cell.value]
        op = "full" if node.whole else "scalar"
        return self.new(self.node(op, (self.slot(value),), dtype or node.dtype, node.whole))

    def reduce(self, op: str, x: RecordedTensor, dtype: torch.dtype | None = None) -> RecordedTensor:
        """One scalar per parameter, from all elements of `x`."""
        node = self.nodes[x.cell.value]
        if not node.whole:
            self.refuse(f"a {op.replace('_', ' ')} over one number")
        if node.dtype not in FLOATS:  # torch counts those in integers
            self.refuse(f"a {op.replace('_', ' ')} of {node.dtype}")
        return self.new(self.node(op, (Value(x.cell.value),), dtype or node.dtype, False))

    def count(self, dtype: torch.dtype) -> RecordedTensor:
        """The number of elements of the parameter."""
        return self.new(self.node("count", (), dtype, False))

    # ---- changes in place

    def write(self, target: RecordedTensor, value: RecordedTensor) -> RecordedTensor:
        """Give the cell of `target` the value of `value`, in its own dtype."""
        old, new = self.nodes[target.cell.value], self.nodes[value.cell.value]
        if target.cell.constant:
            self.refuse("a hyper-parameter changed in place")
        if new.whole and not old.whole:
            self.refuse("a change in place of one number by a whole tensor")
        if not torch.can_cast(new.dtype, old.dtype):
            self.refuse(f"{new.dtype} written into {old.dtype}")
        value = self.cast(value, old.dtype)
        if old.whole and not new.whole:
            value = self.new(self.node("expand", (Value(value.cell.value),), old.dtype, True))
        target.cell.value = value.cell.value
        return target


class RecordedTensor(Tensor):
    """See the module's text. Made by a `Recorder` only."""

    recorder: Recorder
    cell: Cell
    of_grad: RecordedTensor | None

    @staticmethod
    def make(recorder: Recorder, cell: Cell) -> RecordedTensor:
        """A handle on `cell`."""
        dtype = recorder.nodes[cell.value].dtype
        made = Tensor._make_subclass(RecordedTensor, torch.empty((), dtype=dtype, device="meta"))
        made.recorder, made.cell, made.of_grad = recorder, cell, None
        return made

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return record_call(func, args, kwargs or {})

    def __repr__(self) -> str:  # type: ignore[override]
        return f"RecordedTensor({self.recorder.nodes[self.cell.value].op})"

    def __getattr__(self, name: str) -> Any:
        if name in ("full_tensor", "_local_tensor") or name.startswith("__"):  # how one asks for a DTensor
            raise AttributeError(name)
        self.recorder.refuse(f"attribute {name!r} of a tensor")


def record_call(func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch calls for `func(*args, **kwargs)` with a recorded tensor or number among the arguments."""
    from .methods import METHODS

    found = next((x for x in (*args, *kwargs.values()) if isinstance(x, RecordedTensor)), None)
    numbers = (x for x in (*args, *kwargs.values()) if type(x) is Number)
    name = getattr(func, "__name__", str(func))
    if found is None:
        next(numbers).tape.refuse(f"torch.{name} of a number")
    recorder = found.recorder
    if name in ("__get__", "__set__", "__delete__"):
        name = f"{name} {func.__self__.__name__}"  # type: ignore[attr-defined]
    name = ALIASES.get(name, name)
    inplace = name.endswith("_") and not name.endswith("__")
    plain = ALIASES.get(name[:-1], name[:-1]) if inplace else name
    try:
        if name in METHODS:
            return METHODS[name](recorder, *args, **kwargs)
        if plain in METHODS and inplace:
            return recorder.write(args[0], METHODS[plain](recorder, *args, **kwargs))
        if plain in OPS:
            result = recorder.call(plain, OPS[plain].bind(*args, **kwargs))
            return recorder.write(args[0], result) if inplace else result
    except (TypeError, AttributeError) as error:
        recorder.refuse(f"{name} with these arguments ({error})")
    recorder.refuse(f"{name.replace('__get__ ', '.').replace('__set__ ', 'setting .')} of a tensor")
