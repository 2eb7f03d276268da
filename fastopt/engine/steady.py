"""Steps like the last one: the same tensors in the same cohorts, only with other numbers.

Sorting the parameters of a step into cohorts looks at every parameter and its state. Nearly always nothing has changed
since the last step but numbers and gradients, and this is noticed in a few passes over lists that run in C. Whatever
could make a difference is looked at in every step: that a list has the same parameters, a parameter the same memory,
a state the same entries with the same tensors and the numbers that the last step left there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import attrgetter, call, is_, itemgetter
from typing import Any
from weakref import ref

import torch
from torch import Tensor

from .chain import GRAD, PARAM, Kind, Row, hypers_kind
from .plan import Cohort
from .recorder import NotRecordable
from .work import GroupWork

grads_of = attrgetter("grad")
_GroupKind = tuple[list[str], list[type], Kind | None]
_PLAIN = {Tensor, torch.nn.Parameter}


def same(a: Sequence[Any], b: Sequence[Any]) -> bool:
    """Whether two sequences hold the same objects."""
    return a is b or (len(a) == len(b) and all(map(is_, a, b)))


class Members:
    """The parameters of each group that stepped last, with their states, where that was all of the group.

    The state is asked for its `version`, which changes when another dict becomes the state of a parameter.
    """

    def __init__(self) -> None:
        self._known: dict[int, tuple[list[Any], Any, int, list[Any]]] = {}
        #: For each group looked at in this step: its list of parameters, their gradients, and where these lie.
        self.grads: dict[int, tuple[list[Any], list[Tensor], list[int]]] = {}

    def last(self, i: int, params: Sequence[Any], state: Any) -> tuple[list[Any], list[Any]] | None:
        """The parameters of group `i`, which are `params`, and their states; None if that has to be looked up."""
        known = self._known.get(i)
        if known is None or known[1] is not state or known[2] != state.version or not same(params, known[0]):
            return None
        grads = list(map(grads_of, known[0]))
        try:
            self.grads[i] = known[0], grads, list(map(Tensor.data_ptr, grads))
        except (TypeError, RuntimeError):  # a gradient is missing, or has no address
            return None
        return known[0], known[3]

    def take_grads(self, work: Sequence[GroupWork]) -> tuple[list[Tensor], list[int]] | None:
        """The gradients of all the work, and where they lie, if `last` has just looked at them."""
        found = [self.grads.pop(group.index, None) for group in work]
        grads: list[Tensor] = []
        addresses: list[int] = []
        for group, known in zip(work, found, strict=True):
            if known is None or known[0] is not group.params:
                return None
            grads += known[1]
            addresses += known[2]
        return grads, addresses

    def note(self, i: int, params: Sequence[Any], state: Any, stepping: list[Any], states: list[Any]) -> None:
        """What was looked up for group `i`."""
        if hasattr(state, "version") and same(params, stepping):
            self._known[i] = stepping, state, state.version, states
        else:
            self._known.pop(i, None)


class SteadyCohort:
    """What one cohort looked like after its last step."""

    def __init__(self, cohort: Cohort, groups: Sequence[int]) -> None:
        self.cohort = cohort
        self.group_of_row = groups
        # weak, because gradients that are dropped after the step must free their memory
        grads = list(map(grads_of, cohort.params))
        self.grads = list(map(ref, grads))
        self.grad_dtype = grads[0].dtype
        same_kinds = len(set(map(tuple, cohort.states))) == len(set(map(attrgetter("dtype"), grads))) == 1
        self.usable = same_kinds and _numbers_stay_numbers(cohort)
        if not self.usable:
            return
        self.entries = len(cohort.states[0])
        self.tensors = {key: list(map(itemgetter(key), cohort.states)) for key in self._keys(tensors=True)}
        self.numbers = {key: list(map(itemgetter(key), cohort.states)) for key in self._keys(tensors=False)}
        cohort.addresses = self._look(list(map(Tensor.data_ptr, grads)))

    def _keys(self, tensors: bool) -> list[str]:
        return [key for key, value in self.cohort.states[0].items() if isinstance(value, Tensor) == tensors]

    def _look(self, at_grads: list[int]) -> dict[str, list[int]]:
        """Where every tensor lies now, by place; the gradients lie at `at_grads`."""
        where = {PARAM: list(map(Tensor.data_ptr, self.cohort.params)), GRAD: at_grads}
        return where | {f"state {key}": list(map(Tensor.data_ptr, x)) for key, x in self.tensors.items()}

    def unchanged(self, looked: tuple[list[Tensor], list[int]] | None = None) -> bool:
        """Whether the parameters, states and gradients are those of the last step, gradients perhaps elsewhere.

        Args:
            looked: the gradients and where they lie, if that is known.
        """
        states, cohort = self.cohort.states, self.cohort
        try:
            if set(map(len, states)) != {self.entries}:
                return False
            for key, tensors in self.tensors.items():
                if not all(map(is_, map(itemgetter(key), states), tensors)):
                    return False
            for key, numbers in self.numbers.items():
                if list(map(itemgetter(key), states)) != numbers:
                    return False
            if looked is None:
                grads = list(map(grads_of, cohort.params))
                looked = grads, list(map(Tensor.data_ptr, grads))
            grads, at_grads = looked
            same_grads = all(map(is_, grads, map(call, self.grads)))
            if not same_grads:
                if not _alike(grads, cohort, self.grad_dtype):
                    return False
                self.grads = list(map(ref, grads))
            now = self._look(at_grads)
        except (KeyError, TypeError):  # a state or a gradient is gone
            return False
        for place, addresses in now.items():
            if addresses != cohort.addresses[place] and (place != GRAD or same_grads):
                return False
        cohort.addresses = now
        return True

    def renew(self, works: Mapping[int, GroupWork]) -> bool:
        """Compute the rows of scalars for the numbers of this step; False where another recording is needed."""
        rows, hypers = [], []
        for old, group, first in zip(self.cohort.rows, self.group_of_row, self.cohort.first_of_row(), strict=True):
            values = old.recorded.evaluate(works[group].hypers, self.cohort.states[first])
            if values is None:
                return False
            row = Row(values[0])
            row.recorded, row.states = old.recorded, values[1]
            rows.append(row)
            hypers.append(works[group].hypers)
        self.cohort.rows, self.cohort.hypers = rows, hypers
        return True

    def after(self) -> None:
        """Note the numbers that the step has left in the states."""
        cohort = self.cohort
        self.usable = _numbers_stay_numbers(cohort)
        for key in self.numbers:
            if key in cohort.rows[0].states:
                values = [row.states[key] for row in cohort.rows]
                one = len(values) == 1
                self.usable = self.usable and set(map(type, values)) == set(map(type, self.numbers[key]))
                self.numbers[key] = values * len(cohort.params) if one else [values[k] for k in cohort.row_index]


def _numbers_stay_numbers(cohort: Cohort) -> bool:
    """Whether the step has put nothing but ints and floats into the states beside tensors: a bool, a string or None
    is part of the kind of a parameter, and so is the type of a number."""
    return all(type(value) in (int, float) for row in cohort.rows for value in row.states.values())


def _alike(grads: Sequence[Tensor], cohort: Cohort, dtype: torch.dtype) -> bool:
    """Whether new gradients are of the same kind as the last ones: ordinary, contiguous tensors of the same dtype."""
    return (
        set(map(type, grads)) <= _PLAIN
        and all(map(is_, map(attrgetter("dtype"), grads), repeat(dtype)))
        and all(map(is_, map(attrgetter("layout"), grads), repeat(torch.strided)))
        and all(map(Tensor.is_contiguous, grads))
        and all(map(Tensor.is_contiguous, cohort.params))
    )


class Steady:
    """The cohorts of the last step, to be used again if this step is like it.

    Made after a step in which everything was recorded.
    """

    def __init__(self, work: Sequence[GroupWork], cohorts: Sequence[Cohort]) -> None:
        self.reusable = not any(cohort.split or row.recorded.created for cohort in cohorts for row in cohort.rows)
        if not self.reusable:
            return
        self._members = [(group.index, group.params, group.states) for group in work]
        self._kinds = [_kind(group) for group in work]
        self._cohorts = [SteadyCohort(cohort, cohort.groups) for cohort in cohorts]

    def cohorts(self, work: Sequence[GroupWork], members: Members) -> list[Cohort] | None:
        """The cohorts with the numbers of this step, None if it differs from the last one in more than numbers."""
        if not self.reusable or len(work) != len(self._members):
            return None
        for group, (index, params, states), kind in zip(work, self._members, self._kinds, strict=True):
            if group.index != index or not same(group.params, params) or not same(group.states, states):
                return None
            if not _same_kind(group.hypers, kind):
                return None
        works = {group.index: group for group in work}
        # one cohort has the parameters of all groups in their order
        looked = members.take_grads(work) if len(self._cohorts) == 1 else None
        if all(known.usable and known.unchanged(looked) for known in self._cohorts) and all(
            known.renew(works) for known in self._cohorts
        ):
            return [known.cohort for known in self._cohorts]
        return None

    def after(self) -> None:
        """Note what the step has left behind."""
        for known in self._cohorts:
            known.after()


def _kind(group: GroupWork) -> _GroupKind:
    """The kind of a group's hypers in a form that is compared quickly: names, types, and what else counts."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in group.hypers.values())
    return list(group.hypers), list(map(type, group.hypers.values())), None if numbers else hypers_kind(group.hypers)


def _same_kind(hypers: Mapping[str, Any], kind: _GroupKind) -> bool:
    names, types, full = kind
    if list(hypers) != names or list(map(type, hypers.values())) != types:
        return False
    try:
        return full is None or hypers_kind(hypers) == full
    except NotRecordable:
        return False
