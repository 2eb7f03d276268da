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

from .chain import GRAD, PARAM
from .native import compiled_already, native

#: What looking again finds: nothing new; gradients elsewhere that are otherwise like the last; anything else.
SAME, MOVED, OTHER = 0, 1, 2

grads_of = attrgetter("grad")
_PLAIN = {Tensor, torch.nn.Parameter}


def same_members(lists: list[list[Any]], members: list[Any]) -> bool:
    """Whether `lists`, one after the other, have the same objects as `members`."""
    compiled = compiled_already()
    if compiled is not None:
        return bool(compiled.same_members(lists, members))
    return sum(map(len, lists)) == len(members) and all(map(is_, chain.from_iterable(lists), members))


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
        self.params = list(params)
        self.states = dict(states)
        self.places = {place: i for i, place in enumerate((PARAM, GRAD, *states))}
        self.addresses = np.zeros((len(self.places), len(self.params)), np.int64)
        self.version = 0
        self._eyes = _Eyes(self.params)
        self._look()
        self._steps = 0

    def at(self, place: str) -> NDArray[np.int64] | None:
        """The addresses of the tensors at a place, None if it was not looked at."""
        row = self.places.get(place)
        return None if row is None else self.addresses[row]

    def again(self) -> bool:
        """Look again: whether all is as it was but for gradients that are elsewhere and otherwise like the last."""
        self._better_eyes()
        found = self._look()
        self.version += any(found)
        return found[1] != OTHER and not any(found[:1] + found[2:])

    def _look(self) -> list[int]:
        """What is new, by place."""
        tensors = [self._eyes.tensors(x, self.addresses[i]) for i, x in self._rows()]
        return [tensors[0], self._eyes.gradients(self.addresses[1]), *tensors[1:]]

    def _rows(self) -> list[tuple[int, list[Tensor]]]:
        return [(0, self.params), *enumerate(self.states.values(), 2)]

    def _better_eyes(self) -> None:
        """Take the compiled functions once the same tensors have stepped often enough to be worth compiling for."""
        self._steps += 1
        if type(self._eyes) is _Eyes and self._steps % _OFTEN == 0 and len(self.params) >= _MANY:
            compiled = native()
            if compiled is not None:
                self._eyes = _NativeEyes(self.params, compiled)
                self._look()


#: From this many parameters on, and this many steps with the same tensors, compiled functions do the looking.
_MANY, _OFTEN = 32, 16


class _Eyes:
    """Looks at tensors one by one, in passes over lists that run in C."""

    def __init__(self, params: list[Tensor]) -> None:
        self.params = params
        # weak, because gradients that are dropped after the step must free their memory
        self._grads: list[Any] = []
        self._dtype = params[0].dtype if params[0].grad is None else params[0].grad.dtype
        self._flat: list[bool] = []

    def tensors(self, tensors: list[Tensor], addresses: NDArray[np.int64]) -> int:
        """Put where `tensors` lie into `addresses`."""
        now = np.fromiter(map(Tensor.data_ptr, tensors), np.int64, len(tensors))
        same = np.array_equal(now, addresses)
        if tensors is self.params:
            flat = list(map(Tensor.is_contiguous, tensors))
            same = same and flat == self._flat
            self._flat = flat
        addresses[:] = now
        return SAME if same else OTHER

    def gradients(self, addresses: NDArray[np.int64]) -> int:
        """Put where the gradients lie into `addresses`."""
        grads = list(map(grads_of, self.params))
        try:
            now = np.fromiter(map(Tensor.data_ptr, grads), np.int64, len(grads))
        except (TypeError, RuntimeError):  # a gradient is missing, or has no address
            return OTHER
        same_objects = len(self._grads) == len(grads) and all(map(is_, grads, map(call, self._grads)))
        moved = not np.array_equal(now, addresses)
        addresses[:] = now
        if same_objects:
            return OTHER if moved else SAME  # moved by `p.grad.data = ...`, to who knows what
        if not self._alike(grads):
            return OTHER
        self._grads = list(map(ref, grads))
        return MOVED if moved else SAME

    def _alike(self, grads: Sequence[Tensor]) -> bool:
        """Whether these are ordinary contiguous tensors of the dtype that the last ones had."""
        return (
            set(map(type, grads)) <= _PLAIN
            and all(map(is_, map(attrgetter("dtype"), grads), repeat(self._dtype)))
            and all(map(is_, map(attrgetter("layout"), grads), repeat(torch.strided)))
            and all(map(Tensor.is_contiguous, grads))
            and not any(map(Tensor.is_neg, grads))
            and all(self._flat)
        )


class _NativeEyes(_Eyes):
    """Looks with compiled functions. A kind is a digest of dtype, sizes and strides of an ordinary tensor."""

    def __init__(self, params: list[Tensor], compiled: Any) -> None:
        super().__init__(params)
        self._look_at: Callable[..., int] = compiled.tensors
        self._look_at_grads: Callable[..., int] = compiled.gradients
        self._kinds: dict[int, NDArray[np.int64]] = {}
        self._grad_kinds = np.zeros(len(params), np.int64)

    def tensors(self, tensors: list[Tensor], addresses: NDArray[np.int64]) -> int:
        kinds = self._kinds.get(id(tensors))
        if kinds is None:
            kinds = self._kinds[id(tensors)] = np.zeros(len(tensors), np.int64)
        return OTHER if self._look_at(tensors, addresses, kinds) else SAME

    def gradients(self, addresses: NDArray[np.int64]) -> int:
        return self._look_at_grads(self.params, addresses, self._grad_kinds)
