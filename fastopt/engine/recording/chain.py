"""One chain of cbs and its recordings: which program, and which scalars, a parameter of this kind steps with.

The *kind* of a parameter is all that a recording depends on beside numbers: dtypes, device, which states exist and
what they are, the types of the hypers. Per kind there are one or more recordings, because numbers may decide where
the cbs go (RAdam's first steps); each knows from its guards whether it is good for given numbers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..describe import cb_name, required
from ..master import MASTER, has_master
from .columns import ColumnEvaluate
from .numbers import Evaluate, Number
from .program import Output, Program, pruned
from .reads import Read, reads_of, unchanged
from .recorder import FLOATS, NotRecordable, RecordedTensor, Recorder

#: How many recordings of one kind are kept; the oldest goes.
_KEPT = 16

#: How often a kind that was refused is tried again: other numbers may lead the cbs elsewhere.
_ATTEMPTS = 8

Kind = tuple[Any, ...]
GRAD, PARAM = "grad", "p"


@dataclass(frozen=True, eq=False)
class Recorded:
    """A recording.

    Attributes:
        program: what happens to the tensors.
        evaluate: (hypers, state) -> (row of scalars, new Python entries of the state); None where it does not apply.
        evaluate_columns: the same for columns of hypers and state, see `columns`.
        created: the states that this step creates, in order.
    """

    program: Program
    evaluate: Evaluate
    evaluate_columns: ColumnEvaluate
    created: tuple[str, ...]


class Row(tuple[Any, ...]):
    """The scalars of one recording for one combination of numbers, with the new Python entries of the state.

    Attributes:
        recorded: the recording.
        states: the new Python entries of the state.
        kind: of the parameters that step with this row.
    """

    recorded: Recorded
    states: dict[str, Any]
    kind: Kind


class Chain:
    """The recordings of one chain.

    Args:
        cbs: the callbacks.
    """

    def __init__(self, cbs: Sequence[Callable[..., Any]]) -> None:
        self.cbs = tuple(cbs)
        self.refusal: str | None = None
        self._reads: list[Read] = []
        self._recorded: dict[Kind, list[Recorded]] = {}
        self._refused: dict[Kind, list[str]] = {}
        self._programs: dict[Program, Program] = {}
        self._scan()

    def _scan(self) -> None:
        self._reads, self.refusal = [], None
        try:
            for cb in self.cbs:
                if hasattr(cb, "step_all"):
                    raise NotRecordable(f"{cb_name(cb)} steps on all parameters at once")
                self._reads += reads_of(cb)
        except NotRecordable as refusal:
            self.refusal = str(refusal)

    def refresh(self) -> bool:
        """Forget all recordings if something that the cbs read outside of their arguments has changed; tells if so."""
        if unchanged(self._reads):
            return False
        self._recorded.clear()
        self._refused.clear()
        self._scan()
        return True

    def lookup(self, kind: Kind, p: Tensor, hypers: Mapping[str, Any], state: Mapping[str, Any]) -> Row | str:
        """The scalars of a step for a parameter of this kind with these numbers, or why there are none.

        Args:
            kind: `kind_of` the parameter.
            p: an example of the kind.
            hypers: of its group.
            state: of the parameter.
        """
        if self.refusal is not None:
            return self.refusal
        row = self.known(kind, hypers, state)
        if row is not None:
            return row
        refusals = self._refused.setdefault(kind, [])
        if len(refusals) == _ATTEMPTS:
            return refusals[-1]
        try:
            recorded = self._record(p, hypers, state)
        except NotRecordable as refusal:
            refusals.append(str(refusal))
            return str(refusal)
        values = recorded.evaluate(hypers, state)
        if values is None:  # a guard on a nan
            return "a number of the chain is not equal to itself"
        known = self._recorded.setdefault(kind, [])
        known.append(recorded)
        del known[:-_KEPT]
        return _row(recorded, kind, *values)

    def known(self, kind: Kind, hypers: Mapping[str, Any], state: Mapping[str, Any]) -> Row | None:
        """As `lookup`, from the recordings that there are; of the state only the numbers are looked at."""
        for recorded in self.recordings(kind):
            values = recorded.evaluate(hypers, state)
            if values is not None:
                return _row(recorded, kind, *values)
        return None

    def recordings(self, kind: Kind) -> Sequence[Recorded]:
        """What was recorded for parameters of this kind, one for each way that their numbers led so far."""
        return self._recorded.get(kind, ())

    def programs(self) -> tuple[Program, ...]:
        """The different programs recorded so far."""
        return tuple(self._programs)

    def _record(self, p: Tensor, hypers: Mapping[str, Any], state: Mapping[str, Any]) -> Recorded:
        recorder = Recorder(p.device, zero_dim=p.ndim == 0)
        given = {name: _hyper_leaf(recorder, name, value) for name, value in hypers.items()}
        seen = Seen(recorder, p, state)
        param = seen.param
        before = {key: _state_leaf(recorder, p, key, value) for key, value in state.items() if key != MASTER}
        now = dict(before)
        for cb in self.cbs:
            recorder.cb = cb_name(cb)
            arguments = {**now, **given}
            if any(name not in arguments for name in required(cb)):
                recorder.refuse("an argument is missing")
            try:
                result = cb(param, **arguments)
            except NotRecordable:
                raise
            except Exception as error:
                recorder.refuse(f"raised {type(error).__name__}: {error}")
            if recorder.refusal is not None:  # the cb caught it
                raise NotRecordable(recorder.refusal)
            if isinstance(result, dict):
                for key, value in result.items():
                    for name, own in (("parameter", param), ("gradient", seen.grad)):
                        if isinstance(value, RecordedTensor) and value.cell is own.cell:
                            recorder.refuse(f"the state {key!r} is the {name} itself, not a copy")
                now.update(result)
        recorder.cb = "the chain"
        return self._finish(recorder, seen, before, now)

    def _finish(self, recorder: Recorder, seen: Seen, before: Mapping[str, Any], now: Mapping[str, Any]) -> Recorded:
        outputs = seen.outputs()
        numbers: dict[str, Any] = {}
        taken: dict[int, str] = {}
        for key, value in now.items():
            if isinstance(value, Tensor):
                made = value if isinstance(value, RecordedTensor) else recorder.constant_tensor(value)
                if id(made.cell) in taken:
                    recorder.refuse(f"the states {key!r} and {taken[id(made.cell)]!r} are the same tensor")
                if made.cell.constant:
                    recorder.refuse(f"the state {key!r} is a hyper-parameter's tensor")
                taken[id(made.cell)] = key
                output = _state_output(recorder, key, before.get(key), made)
                outputs += [] if output is None else [output]
            elif key not in before or value is not before[key]:
                if not (type(value) is Number or value is None or isinstance(value, bool | int | float | str)):
                    recorder.refuse(f"a {type(value).__name__} in the state")
                numbers[key] = value
        program, slots = pruned(recorder.nodes, outputs, [recorder.tape.text(x) for x in recorder.slots])
        program = self._programs.setdefault(program, program)
        values = [recorder.slots[i] for i in slots]
        return Recorded(
            program,
            recorder.tape.evaluator(values, numbers),
            recorder.tape.column_evaluator(values, numbers),
            tuple(key for key in now if key not in before),
        )


def _row(recorded: Recorded, kind: Kind, values: tuple[Any, ...], states: dict[str, Any]) -> Row:
    row = Row(values)
    row.recorded, row.kind, row.states = recorded, kind, states
    return row


def _number(x: Any) -> bool:
    return isinstance(x, int | float) and not isinstance(x, bool)


def _hyper_number(x: Any) -> bool:
    """Whether a hyper is a number, perhaps one of numpy's, as some schedules write."""
    return _number(x) or isinstance(x, np.floating | np.integer)


def _hyper_leaf(recorder: Recorder, name: str, value: Any) -> Any:
    """What stands for one hyper while recording."""
    if _hyper_number(value):
        return recorder.tape.leaf(f"hypers[{name!r}]", name, value)
    if isinstance(value, tuple | list):
        items = (recorder.tape.leaf(f"hypers[{name!r}][{i}]", f"{name}[{i}]", x) for i, x in enumerate(value))
        return type(value)(items)
    if isinstance(value, Tensor) and value.device.type == "cpu":
        number = recorder.tape.leaf(f"hypers[{name!r}].item()", name, value.item())
        made = recorder.new(recorder.node("scalar", (recorder.slot(number),), value.dtype, False))
        made.cell.constant = True
        return made
    if isinstance(value, Tensor):
        if value.device != recorder.device:
            recorder.refuse(f"the hyper-parameter {name!r} is on {value.device}, a parameter on {recorder.device}")
        return recorder.input(f"hyper {name}", value.dtype, False, constant=True)
    return value


def _state_leaf(recorder: Recorder, p: Tensor, key: str, value: Any) -> Any:
    """What stands for one entry of the state while recording."""
    if _number(value):
        return recorder.tape.leaf(f"state[{key!r}]", key, value)
    if isinstance(value, Tensor):
        return recorder.input(f"state {key}", value.dtype, whole=value.shape == p.shape)
    return value


class Seen:
    """The parameter and its gradient as the cbs see them while they are recorded.

    That is the master copy where there is one, with the gradient in its dtype; else the two themselves.
    """

    def __init__(self, recorder: Recorder, p: Tensor, state: Mapping[str, Any]) -> None:
        self._recorder = recorder
        self._dtypes = {PARAM: p.dtype, GRAD: _grad_of(p).dtype}
        self._place = f"state {MASTER}" if has_master(p, state) else PARAM
        dtype = p.dtype if self._place == PARAM else state[MASTER].dtype
        self.param = recorder.input(self._place, dtype, True)
        grad = recorder.input(GRAD, self._dtypes[GRAD], True)
        self.grad = grad if self._place == PARAM else recorder.cast(grad, dtype)
        self.param.of_grad = self.grad
        self._before = self.param.cell.value, self.grad.cell.value

    def outputs(self) -> list[Output]:
        """What is written back because it has changed."""
        before_param, before_grad = self._before
        places = [] if self.param.cell.value == before_param else list(dict.fromkeys([self._place, PARAM]))
        outputs = [self._output(place, self.param) for place in places]
        return outputs if self.grad.cell.value == before_grad else [*outputs, self._output(GRAD, self.grad)]

    def _output(self, place: str, x: RecordedTensor) -> Output:
        made = self._recorder.cast(x, self._dtypes.get(place, self._recorder.nodes[x.cell.value].dtype))
        return Output(place, made.cell.value, self._recorder.nodes[made.cell.value].dtype, True, False)


def _state_output(recorder: Recorder, key: str, before: Any, x: RecordedTensor) -> Output | None:
    """Where a state that is a tensor goes: into the tensor that is there, if it is like it, or into a new one."""
    place, node = f"state {key}", recorder.nodes[x.cell.value]
    if node.op == "input" and node.args[0] == place:
        return None
    if isinstance(before, RecordedTensor):
        assert before.cell.place == place
        origin = next(n for n in recorder.nodes if n.op == "input" and n.args[0] == place)
        if origin.dtype != node.dtype or not (origin.whole == node.whole or recorder.zero_dim):
            recorder.refuse(f"the state {key!r} changes its dtype or shape")
        return Output(place, x.cell.value, node.dtype, origin.whole, False)
    return Output(place, x.cell.value, node.dtype, node.whole, True)


# ---- kinds


def hypers_kind(hypers: Mapping[str, Any]) -> Kind:
    """The part of the kind that a group's hypers make.

    Raises:
        NotRecordable: a hyper is neither a number, a bool, a string, None, a 0-d tensor nor a tuple of numbers.
    """
    return tuple((name, _hyper_kind(name, value)) for name, value in hypers.items())


def _hyper_kind(name: str, value: Any) -> Any:
    if _hyper_number(value):
        return type(value)
    if value is None or isinstance(value, bool | str):
        return ("is", value)
    if type(value) in (tuple, list) and all(map(_number, value)):
        return (type(value), tuple(map(type, value)))
    if type(value) is Tensor and value.ndim == 0 and value.dtype in FLOATS and not value.requires_grad:
        return (value.dtype, value.device)
    raise NotRecordable(f"the hyper-parameter {name!r} is a {type(value).__name__}")


def kind_of(p: Tensor, state: Mapping[str, Any]) -> Kind:
    """The part of the kind that a parameter with its gradient and state makes.

    Raises:
        NotRecordable: something that a program cannot work on.
    """
    grad = _grad_of(p)
    if type(p) not in _PLAIN or type(grad) not in _PLAIN:
        raise NotRecordable(f"a parameter is a {type(p).__name__} with a gradient that is a {type(grad).__name__}")
    if p.dtype not in FLOATS or grad.dtype not in FLOATS:
        raise NotRecordable(f"a parameter is {p.dtype} with a gradient of {grad.dtype}")
    if grad.layout is not torch.strided or p.layout is not torch.strided:
        raise NotRecordable("a gradient is sparse")
    if grad.is_neg() or p.is_neg():
        raise NotRecordable("a gradient is a view that stands for its negative")
    if grad.shape != p.shape or grad.device != p.device:
        raise NotRecordable("a gradient differs from its parameter in shape or device")
    kinds = [(k, _state_kind(p, k, v)) for k, v in state.items()]
    _check_apart(p, state)
    return (p.dtype, grad.dtype, p.device, p.ndim == 0, *kinds)


def kinds_of_states(kind: Kind) -> dict[str, Any]:
    """What the states were in the kind of a row, by name: the type of a number, or what `_state_kind` says."""
    _, (_, _, _, _, *states) = kind
    return dict(states)


def _check_apart(p: Tensor, state: Mapping[str, Any]) -> None:
    """Raise where two tensors of a parameter are one: a cb that changes one would change the other."""
    named = [("the parameter", p), ("the gradient", p.grad), *((f"the state {k!r}", v) for k, v in state.items())]
    seen: dict[int, str] = {}
    for name, x in named:
        if isinstance(x, Tensor) and x.numel() and (at := x.data_ptr()):
            if at in seen:
                raise NotRecordable(f"{name} lies where {seen[at]} lies")
            seen[at] = name


def _grad_of(p: Tensor) -> Tensor:
    """The gradient, or before the first backward pass what it will probably be like."""
    return p if p.grad is None else p.grad


_PLAIN = (Tensor, torch.nn.Parameter)


def _state_kind(p: Tensor, key: str, value: Any) -> Any:
    if isinstance(value, Tensor):
        if type(value) is not Tensor or value.requires_grad or value.is_complex() or value.layout is not torch.strided:
            raise NotRecordable(f"the state {key!r} is not an ordinary tensor")
        if value.device != p.device or (value.shape != p.shape and value.ndim):
            raise NotRecordable(f"the state {key!r} has another shape or device than its parameter")
        return (value.dtype, value.shape == p.shape)
    if _number(value):
        return type(value)
    if value is None or isinstance(value, bool | str):
        return ("is", value)
    raise NotRecordable(f"the state {key!r} is a {type(value).__name__}")
