"""Where the tensors of a cohort lie, looked at in every step: what has moved since the last one?

Only tensors themselves know whether they have moved (`p.data = ...`, a new gradient), so each is asked in every step.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain, repeat
from operator import attrgetter, call, is_
from typing import Any
from weakref import ref

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..recording.chain import GRAD, PARAM
from .native import compiled_already, native

#: What looking again finds: nothing new; gradients elsewhere that are otherwise like the last; anything else.
SAME, MOVED, OTHER = 0, 1, 2

grads_of = attrgetter("grad")
_dtype_of = attrgetter("dtype")
_PLAIN = {Tensor, torch.nn.Parameter}


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects."""
    compiled = compiled_already()
    if compiled is not None and type(a) is type(b) is list:
        return a is b or bool(compiled.same_members([a], b))
    return a is b or (len(a) == len(b) and all(map(is_, a, b)))


def same_members(lists: list[list[Any]], members: list[Any]) -> bool:
    """Whether `lists`, one after the other, have the same objects as `members`."""
    compiled = compiled_already()
    if compiled is not None:
        return bool(compiled.same_members(lists, members))
    return sum(map(len, lists)) == len(members) and all(map(is_, chain.from_iterable(lists), members))


def count_change(tensors: list[Tensor]) -> None:
    """Count a change of each tensor: a backward pass that needs it as it was then raises, as after torch's own writes.

    Whoever writes to memory by its address, or through `.data`, has to tell autograd.
    """
    compiled = compiled_already()
    if compiled is not None:
        compiled.count_change(tensors)
    else:
        torch.autograd.graph.increment_version(tensors)


class Looked:
    """The addresses of all tensors of a cohort as they were when last looked at.

    Args:
        params: with their gradients set.
        states: the tensors of each state, one per parameter, by place.

    Attributes:
        places: the rows of `addresses`.
        addresses: `[n_places, n_params]`.
        version: counts how often an address was another than the time before.
    """

    def __init__(self, params: Sequence[Tensor], states: Mapping[str, list[Tensor]]) -> None:
        self.params, self.states = list(params), list(states.values())
        self.places = {place: i for i, place in enumerate((PARAM, GRAD, *states))}
        self.addresses = np.zeros((len(self.places), len(self.params)), np.int64)
        self.version = 0
        self._steps = 0
        self._lost = False
        self.use(Eyes(self.params, self.states))

    def use(self, eyes: Eyes) -> None:
        """Look with these from now on."""
        self._eyes = eyes
        eyes.look(self.addresses, states=True)

    def at(self, place: str) -> NDArray[np.int64] | None:
        """The addresses of the tensors at a place, None if it was not looked at."""
        row = self.places.get(place)
        return None if row is None else self.addresses[row]

    def again(self, states: bool = True) -> bool:
        """Look again: whether all is as it was but for gradients that are elsewhere and otherwise like the last.

        Once it is not, it never is again: eyes only tell what is new since they last looked.

        Args:
            states: look at the states too; not needed where nobody else can have touched them.
        """
        if self._lost:
            return False
        self._steps += 1
        found = self._eyes.look(self.addresses, states)
        if found == MOVED and self._meet():
            found = OTHER
        self.version += found != SAME
        self._lost = found == OTHER
        if self._steps % _OFTEN == 0 and type(self._eyes) is Eyes and len(self.params) >= MANY:
            self._better_eyes()
        return not self._lost

    def _meet(self) -> bool:
        """Whether a gradient lies where its parameter or a state of it lies."""
        grads = self.addresses[1]
        return any(((row == grads) & (grads != 0)).any() for i, row in enumerate(self.addresses) if i != 1)

    def _better_eyes(self) -> None:
        """Take the compiled functions from the next step on if they are there by now."""
        compiled = native()
        if compiled is not None:
            self.use(NativeEyes(self.params, self.states, compiled))


#: From this many parameters on, and this many steps with the same tensors, compiled functions do the looking.
MANY, _OFTEN = 32, 16


class Eyes:
    """Looks at tensors one by one, in passes over lists that run in C."""

    def __init__(self, params: list[Tensor], states: list[list[Tensor]]) -> None:
        self.params, self.states = params, states
        # weak, because gradients that are dropped after the step must free their memory
        self._grads: list[Any] = []
        self._dtype = params[0].dtype if params[0].grad is None else params[0].grad.dtype
        # of the parameters: another tensor may come to lie where the last one lay, such as the first half of it
        self._flat: list[bool] = []
        self._sizes: list[int] = []
        self._dtypes: list[torch.dtype] = []

    def look(self, addresses: NDArray[np.int64], states: bool) -> int:
        """Put where everything lies into `addresses`, and tell what is new; the states only if asked."""
        rows = [(0, self.params), *(enumerate(self.states, 2) if states else ())]
        tensors = [_take(x, addresses[i]) for i, x in rows]
        alike = self._look_at_params()
        grads = self._look_at_grads(addresses[1])
        return grads if all(tensors) and alike else OTHER

    def _look_at_params(self) -> bool:
        """Whether the parameters are what they were, wherever they lie."""
        before = self._flat, self._sizes, self._dtypes
        self._flat = list(map(Tensor.is_contiguous, self.params))
        self._sizes = list(map(Tensor.numel, self.params))
        self._dtypes = list(map(_dtype_of, self.params))
        return before == (self._flat, self._sizes, self._dtypes)

    def _look_at_grads(self, addresses: NDArray[np.int64]) -> int:
        grads = list(map(grads_of, self.params))
        try:
            same_place = _take(grads, addresses)
        except (TypeError, RuntimeError):  # a gradient is missing, or has no address
            return OTHER
        if len(self._grads) == len(grads) and all(map(is_, grads, map(call, self._grads))):
            # moved by `p.grad.data = ...`, to who knows what; or `p.grad.t_()`
            return SAME if same_place and all(map(Tensor.is_contiguous, grads)) else OTHER
        if not self._alike(grads):
            return OTHER
        self._grads = list(map(ref, grads))
        return SAME if same_place else MOVED

    def _alike(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are ordinary contiguous tensors of the dtype that the last ones had."""
        return (
            set(map(type, grads)) <= _PLAIN
            and all(map(is_, map(_dtype_of, grads), repeat(self._dtype)))
            and list(map(Tensor.numel, grads)) == self._sizes
            and all(map(is_, map(attrgetter("layout"), grads), repeat(torch.strided)))
            and all(map(Tensor.is_contiguous, grads))
            and not any(map(Tensor.is_neg, grads))
            and all(self._flat)
        )


def _take(tensors: list[Tensor], addresses: NDArray[np.int64]) -> bool:
    """Put where `tensors` lie into `addresses`; whether they lay there."""
    now = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
    same = np.array_equal(now, addresses)
    addresses[:] = now
    return same


class NativeEyes(Eyes):
    """Looks with a compiled function. It keeps the kind of each parameter and gradient: its dtype, sizes, strides."""

    def __init__(self, params: list[Tensor], states: list[list[Tensor]], compiled: Any) -> None:
        super().__init__(params, states)
        self._look: Callable[..., int] = compiled.look
        self._kinds = np.zeros((2, len(params)), np.int64)

    def look(self, addresses: NDArray[np.int64], states: bool) -> int:
        if states:
            return self._look(self.params, self.states, addresses, self._kinds)
        return self._look(self.params, [], addresses[:2], self._kinds)
