"""Steps like the last one: the same tensors in the same cohorts, only with other numbers.

Sorting the parameters of a step into cohorts looks at every parameter and its state. Nearly always nothing has changed
since the last step but numbers and gradients. That is noticed from counters of changes (groups and states count
theirs, see `watched`) and by looking at where each tensor lies (see `look`); a state that counts nothing is looked
through entry by entry.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from itertools import repeat
from operator import is_, itemgetter
from typing import Any

import numpy as np
from torch import Tensor

from ...state import Entry, ParamState
from ...watched import Watch, watch_of
from ..recording.chain import Chain, Kind, Row, hypers_kind, kinds_of_states
from ..recording.columns import NoColumn, column, columns, evaluate_columns, row_of
from ..recording.program import Program
from ..recording.recorder import NotRecordable
from ..work import GroupWork
from .look import Looked, grads_of, same, same_members
from .plan import Cohort

_GroupKind = tuple[list[str], list[type], Kind | None]

#: Types of the numbers that a step may leave in the states, and what they count as: columns hold floats.
_NUMBERS: dict[type, type] = {int: int, float: float, np.ndarray: float}


class SteadyCohort:
    """What one cohort looked like after its last step.

    Where its numbers lead the cbs along another way that was recorded before (Lookahead's k-th step), it steps with
    that program.

    Args:
        cohort: as it has stepped.
        chain: the recordings.
        by_column: compute the scalars of many rows by columns, for an executor that takes `cohort.table`.
    """

    def __init__(self, cohort: Cohort, chain: Chain, by_column: bool) -> None:
        self.cohort, self.by_column, self._chain = cohort, by_column, chain
        self._by_program = {cohort.program: cohort}
        states = cohort.states
        self.usable = (
            len(set(map(tuple, states))) == 1
            and _only_numbers(row.states for row in cohort.rows)
            and all(_numbers_of_kind(row) for row in cohort.rows)
        )
        if not self.usable:
            return
        self.entries = len(states[0])
        keys = list(states[0])
        whole = [key for key in keys if isinstance(states[0][key], Tensor)]
        self.tensors = {key: list(map(itemgetter(key), states)) for key in whole}
        self.numbers = [
            {key: states[i][key] for key in keys if key not in whole} for i in cohort.first_of_row()
        ]  # of each row
        self.hypers = list(cohort.hypers)
        self._columns: tuple[dict[str, Any], dict[str, Any]] | None = None
        self._next: Any = None
        self._recorded = cohort.rows[0].recorded  # the last that was right for columns
        self.owner: ParamState | None = watch_of(states, Entry)  # type: ignore[assignment]
        self._changes = self.owner.changes if self.owner is not None else 0
        cohort.looked = Looked(cohort.params, {f"state {key}": found for key, found in self.tensors.items()})
        cohort.storing = self._store

    def unchanged(self) -> bool:
        """Whether the parameters, states and gradients are those of the last step, gradients perhaps elsewhere."""
        if self.owner is not None:
            if self.owner.changes != self._changes:
                return False
        elif not self._same_entries():
            return False
        assert self.cohort.looked is not None
        return self.cohort.looked.again(states=self.owner is None or self.owner.handed_out)

    def excuse(self, owner: ParamState, changes: int) -> None:
        """Leave `changes` of `owner` out of account: a step of other parameters has made them."""
        if owner is self.owner:
            self._changes += changes

    def _same_entries(self) -> bool:
        """Whether every state has the entries that the last step left, looked at one by one."""
        states, row_index = self.cohort.states, self.cohort.row_index
        try:
            if set(map(len, states)) != {self.entries}:
                return False
            for key, tensors in self.tensors.items():
                if not all(map(is_, map(itemgetter(key), states), tensors)):
                    return False
            for key in self.numbers[0]:
                values = [numbers[key] for numbers in self.numbers]
                expected = values * len(states) if len(values) == 1 else [values[k] for k in row_index]
                if list(map(itemgetter(key), states)) != expected:
                    return False
        except KeyError:
            return False
        return True

    def set_hypers(self, hypers: Mapping[int, dict[str, Any]]) -> None:
        """Take other values of the hypers, by group."""
        now = [hypers[group] for group in self.cohort.groups]
        if all(all(map(is_, a.values(), b.values())) for a, b in zip(now, self.hypers, strict=True)):
            return
        self.hypers = self.cohort.hypers = now
        if self._columns is not None:
            try:
                self._columns = columns(now), self._columns[1]
            except (NoColumn, KeyError):
                self._leave_columns()

    def put_hypers(self, found: Mapping[str, list[Any]]) -> None:
        """Take other values of some hypers, by name with one value per group of the optimizer."""
        for name, values in found.items():
            now = [values[group] for group in self.cohort.groups]
            for hypers, value in zip(self.hypers, now, strict=True):
                hypers[name] = value
            if self._columns is not None:
                try:
                    self._columns = {**self._columns[0], name: column(now)}, self._columns[1]
                except NoColumn:
                    self._leave_columns()

    def renew(self) -> bool:
        """Compute the scalars for the numbers of this step; False where another recording is needed."""
        if self.by_column and len(self.cohort.rows) > 1 and self._renew_columns():
            return True
        self._leave_columns()
        rows = []
        for old, hypers, numbers in zip(self.cohort.rows, self.hypers, self.numbers, strict=True):
            row = self._chain.known(old.kind, hypers, numbers)
            if row is None:
                return False
            rows.append(row)
        program = rows[0].recorded.program
        if any(row.recorded.program is not program or row.recorded.created for row in rows):
            return False
        if not all(map(_same_types, (row.states for row in rows), self.numbers)) or not self._take(program):
            return False
        self.cohort.rows, self.cohort.table = rows, None
        return True

    def _take(self, program: Program) -> bool:
        """Step with this program from now on; False if it makes new tensors."""
        if program is self.cohort.program:
            return True
        if any(out.fresh for out in program.outputs):
            return False
        if program not in self._by_program:
            self._by_program[program] = self.cohort.with_program(program)
        self.cohort = self._by_program[program]
        self.cohort.hypers = self.hypers
        return True

    def _renew_columns(self) -> bool:
        kind = self.cohort.rows[0].kind
        if self._columns is None:
            if any(row.kind != kind for row in self.cohort.rows):
                return False
            try:
                self._columns = columns(self.hypers), columns(self.numbers)
            except (NoColumn, KeyError):
                return False
        last = self._recorded
        others = (recorded for recorded in self._chain.recordings(kind) if recorded is not last)
        for recorded in (last, *others):
            found = evaluate_columns(recorded.evaluate_columns, *self._columns, len(self.hypers))
            if found is not None and _same_types(found[1], self._columns[1]):
                if recorded.created or not self._take(recorded.program):
                    return False
                self.cohort.table, self._next = found
                self._recorded = recorded
                return True
        return False

    def _leave_columns(self) -> None:
        """Keep the numbers row by row again."""
        if self._columns is not None:
            numbers = self._columns[1]
            self.numbers = [{key: row_of(x, k) for key, x in numbers.items()} for k in range(len(self.numbers))]
            self._columns = None

    def _store(self) -> None:
        """Note the numbers that the step leaves, and let them be written into the states when those are read."""
        if self.cohort.table is not None and self._columns is not None:
            self._columns = self._columns[0], {**self._columns[1], **self._next}
        else:
            self.numbers = [{**old, **row.states} for old, row in zip(self.numbers, self.cohort.rows, strict=True)]
        if self.owner is None:
            self._write()
        else:
            self.owner.defer(self, self._write)

    def _write(self) -> None:
        """Write the numbers into the states."""
        states, row_index = self.cohort.states, self.cohort.row_index
        for key in self.numbers[0]:
            if self._columns is not None:
                values = self._columns[1][key]
                values = values.tolist() if isinstance(values, np.ndarray) else [values]
            else:
                values = [numbers[key] for numbers in self.numbers]
            each = repeat(values[0]) if len(values) == 1 else [values[k] for k in row_index]
            deque(map(dict.__setitem__, states, repeat(key), each), maxlen=0)


def _only_numbers(states: Any) -> bool:
    """Whether a step puts nothing but ints and floats into the states beside tensors: a bool, a string or None is part
    of the kind of a parameter."""
    return all(type(value) in (int, float) for state in states for value in state.values())


def _numbers_of_kind(row: Row) -> bool:
    """Whether the numbers that a step leaves have the types of those before it: the next has the same kind then."""
    before = kinds_of_states(row.kind)
    return all(before.get(key) is type(value) for key, value in row.states.items())


def _same_types(states: Mapping[str, Any], numbers: Mapping[str, Any]) -> bool:
    """Whether a step puts nothing but ints and floats into the states, in place of such."""
    for key, value in states.items():
        kind = _NUMBERS.get(type(value))
        if kind is None or kind is not _NUMBERS.get(type(numbers.get(key))):
            return False
    return True


class Steady:
    """The cohorts of the last step, to be used again if this step is like it.

    Made after a step in which everything was recorded.

    Args:
        work: the work of that step.
        cohorts: made of it.
        chain, by_column: as for `SteadyCohort`.
    """

    def __init__(self, work: Sequence[GroupWork], cohorts: Sequence[Cohort], chain: Chain, by_column: bool) -> None:
        # without cohorts nothing would notice that a frozen parameter is marked `force_train`
        self.reusable = bool(cohorts) and not any(
            cohort.split or any(out.fresh for out in cohort.program.outputs) or row.recorded.created
            for cohort in cohorts
            for row in cohort.rows
        )
        if not self.reusable:
            return
        self._members = [(group.index, group.params, group.states) for group in work]
        self._kinds = {group.index: _kind(group.hypers) for group in work}
        self.steady = [SteadyCohort(cohort, chain, by_column) for cohort in cohorts]
        self.reusable = all(each.usable for each in self.steady)

    def fits(self, work: Sequence[GroupWork]) -> bool:
        """Whether this is the work of the last step but for numbers; takes over its hypers."""
        if len(work) != len(self._members):
            return False
        for group, (index, params, states) in zip(work, self._members, strict=True):
            if group.index != index or not same(group.params, params) or not same(group.states, states):
                return False
        return self.set_hypers({group.index: group.hypers for group in work})

    def set_hypers(self, hypers: Mapping[int, dict[str, Any]]) -> bool:
        """Take other values of the hypers, by group; False if they differ in more than numbers."""
        if any(not _same_kind(hypers[i], kind) for i, kind in self._kinds.items()):
            return False
        for each in self.steady:
            each.set_hypers(hypers)
        return True

    def put_hypers(self, found: Mapping[str, list[Any]]) -> bool:
        """Take other values of some hypers, by name with one value per group; False if more than numbers differ."""
        for i, (names, types, full) in self._kinds.items():
            if full is not None:
                return False
            for name, values in found.items():
                if name not in names or type(values[i]) is not types[names.index(name)]:
                    return False
        for each in self.steady:
            each.put_hypers(found)
        return True

    def cohorts(self) -> list[Cohort] | None:
        """The cohorts with the numbers of this step, None if it differs from the last one in more than numbers."""
        if all(each.unchanged() for each in self.steady) and all(each.renew() for each in self.steady):
            return [each.cohort for each in self.steady]
        return None

    def excuse(self, owner: ParamState, changes: int) -> None:
        """Leave `changes` of `owner` out of account: a step of other parameters has made them."""
        for each in self.steady:
            each.excuse(owner, changes)

    def stepping(self) -> dict[int, list[Any]]:
        """The parameters that stepped, by group."""
        return {index: params for index, params, _ in self._members}


class Whole:
    """That all groups of an optimizer are as they were in its last step, known from their counter of changes.

    Args:
        groups: its groups, which count their changes in one place.
        watch: that place.
        idle: parameters of groups that are not frozen that had no gradient.
    """

    def __init__(self, groups: Sequence[Any], watch: Watch, state: ParamState, idle: list[Tensor]) -> None:
        self._groups, self._watch, self._state, self._idle = list(groups), watch, state, idle
        self._changes = watch.changes
        self._lists = [group["params"] for group in groups]
        self._members = [p for members in self._lists for p in members]
        self._switches = _switches(groups)

    def holds(self, groups: Sequence[Any], state: ParamState) -> bool:
        """Whether the same parameters are there to step, with perhaps other hypers."""
        return (
            state is self._state
            and same(groups, self._groups)
            and (not self.hypers_changed() or self._same_but_for_hypers())
            and same_members(self._lists, self._members)
            and all(map(is_, map(grads_of, self._idle), repeat(None)))
        )

    def hypers_changed(self) -> bool:
        """Whether something was written to a group."""
        return self._changes != self._watch.changes

    def written(self) -> list[str | None]:
        """The entries of the groups that were set since the last step; None for changes of other sorts."""
        return self._watch.written_since(self._changes)

    def take_hypers(self) -> None:
        """The hypers as they are now have been taken over."""
        self._changes = self._watch.changes

    def _same_but_for_hypers(self) -> bool:
        groups = self._groups
        return all(map(is_, map(itemgetter("params"), groups), self._lists)) and self._switches == _switches(groups)


def _switches(groups: Sequence[Any]) -> list[Any]:
    """What of each group decides how it steps, beside its hypers."""
    return [(group.get("frozen"), group.get("capturable")) for group in groups]


def _kind(hypers: Mapping[str, Any]) -> _GroupKind:
    """The kind of a group's hypers in a form that is compared quickly: names, types, and what else counts."""
    numbers = all(isinstance(v, int | float) and not isinstance(v, bool) for v in hypers.values())
    return list(hypers), list(map(type, hypers.values())), None if numbers else hypers_kind(hypers)


def _same_kind(hypers: Mapping[str, Any], kind: _GroupKind) -> bool:
    names, types, full = kind
    if list(hypers) != names or list(map(type, hypers.values())) != types:
        return False
    try:
        return full is None or hypers_kind(hypers) == full
    except NotRecordable:
        return False
