"""From the work of a step to cohorts: parameters that step with the same program, each with its row of scalars."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..recording.chain import GRAD, PARAM, Chain, Row, hypers_kind, kind_of
from ..recording.program import Program
from ..recording.recorder import NotRecordable
from ..work import GroupWork
from .look import Looked


class Cohort:
    """Parameters that step with one program.

    Attributes:
        program: what happens to each.
        params, states: the tensors, with `.grad` set, and their live states.
        rows: the different rows of scalars.
        row_index: for each parameter, which row is its.
        hypers: of the group of each row.
        groups: the index of the group of each row.
        fresh: for each place that the step creates, the new tensors; empty until `make_fresh`.
        table: the scalars `[n_slots, n_rows]`, instead of those in `rows`, where they were computed by columns.
        looked: where its tensors lie, where that is looked at in every step.
        storing: what stores the numbers of the states after a step, instead of `store`.
        split: whether only some of the parameters could go through the kernels.
        kept: what the executor keeps about this cohort from step to step.
    """

    def __init__(self, program: Program) -> None:
        self.program = program
        self.params: list[Tensor] = []
        self.states: list[dict[str, Any]] = []
        self.rows: list[Row] = []
        self.row_index: list[int] = []
        self.hypers: list[dict[str, Any]] = []
        self.groups: list[int] = []
        self.fresh: dict[str, list[Tensor]] = {}
        self.table: NDArray[np.float64] | None = None
        self.looked: Looked | None = None
        self.storing: Callable[[], None] | None = None
        self.split = False
        self.kept: Any = None
        self._firsts: list[int] | None = None

    def first_of_row(self) -> list[int]:
        """For each row, the first parameter that has it."""
        if self._firsts is None:
            first: dict[int, int] = {}
            for i, k in enumerate(self.row_index):
                first.setdefault(k, i)
            self._firsts = [first[k] for k in range(len(self.rows))]
        return self._firsts

    def part(self, indices: Sequence[int]) -> Cohort:
        """The cohort of some of the parameters."""
        cohort = Cohort(self.program)
        cohort.rows, cohort.hypers = self.rows, self.hypers
        cohort.params = [self.params[i] for i in indices]
        cohort.states = [self.states[i] for i in indices]
        cohort.row_index = [self.row_index[i] for i in indices]
        cohort.fresh = {place: [made[i] for i in indices] for place, made in self.fresh.items()}
        return cohort

    def with_program(self, program: Program) -> Cohort:
        """The same parameters for another program; its scalars are still to be set."""
        cohort = Cohort(program)
        cohort.params, cohort.states, cohort.row_index = self.params, self.states, self.row_index
        cohort.rows, cohort.hypers, cohort.groups = self.rows, self.hypers, self.groups
        cohort.looked, cohort.storing = self.looked, self.storing
        return cohort

    def scalars(self) -> NDArray[np.float64]:
        """The rows of scalars as `[n_slots, n_rows]`."""
        if self.table is not None:
            return self.table
        return np.array([tuple(row) for row in self.rows], np.float64).reshape(len(self.rows), -1).T

    def addresses(self, place: str) -> NDArray[np.int64]:
        """Where the tensors at a place of the program lie, one per parameter."""
        known = self.looked.at(place) if self.looked is not None else None
        if known is not None:
            return known
        return np.fromiter(map(Tensor.data_ptr, self.tensors(place)), np.int64, len(self.params))

    def row_of(self, i: int) -> Row:
        """The scalars of parameter `i`."""
        return self.rows[self.row_index[i]]

    def tensors(self, place: str) -> list[Tensor]:
        """The tensors at a place of the program, one per parameter."""
        if place in self.fresh:
            return self.fresh[place]
        if place == PARAM:
            return self.params
        if place == GRAD:
            return [p.grad for p in self.params]  # type: ignore[misc]
        where, _, name = place.partition(" ")
        if where == "state":
            return [state[name] for state in self.states]
        return [self.hypers[k][name] for k in self.row_index]

    def tensor(self, i: int, place: str) -> Tensor:
        """The tensor of parameter `i` at a place of the program."""
        if place in self.fresh:
            return self.fresh[place][i]
        if place == PARAM:
            return self.params[i].detach()
        if place == GRAD:
            grad = self.params[i].grad
            assert grad is not None
            return grad.detach()
        where, _, name = place.partition(" ")
        entries = self.states[i] if where == "state" else self.hypers[self.row_index[i]]
        found: Tensor = entries[name]
        return found

    def is_whole(self, place: str) -> bool:
        """Whether the tensors at a place have the parameter's shape, rather than one element."""
        node = self.program.inputs.get(place)
        if node is not None and place not in self.fresh:
            return self.program.nodes[node].whole
        return place in (PARAM, GRAD) or any(out.whole for out in self.program.outputs if out.place == place)

    def is_flat(self, i: int) -> bool:
        """Whether all tensors of parameter `i` are laid out alike, without gaps."""
        whole = [self.tensor(i, place) for place in self.places if self.is_whole(place)]
        if all(x.is_contiguous() for x in whole):
            return True
        return all(x.stride() == whole[0].stride() for x in whole) and _dense(whole[0])

    @property
    def places(self) -> list[str]:
        """All places that the program reads or writes."""
        return list(dict.fromkeys([*self.program.inputs, *(out.place for out in self.program.outputs)]))

    def make_fresh(self) -> None:
        """Make the tensors that the step creates; they are not filled yet."""
        for out in self.program.outputs:
            if out.fresh and out.place not in self.fresh:
                self.fresh[out.place] = [_new(p, out.dtype, out.whole) for p in self.params]

    def store(self) -> None:
        """Put new tensors and numbers into the states, in the order in which the cbs return them."""
        if self.storing is not None:
            self.storing()
            return
        if not self.fresh:
            for state, k in zip(self.states, self.row_index, strict=True):
                state.update(self.rows[k].states)
            return
        for i, (state, k) in enumerate(zip(self.states, self.row_index, strict=True)):
            row = self.rows[k]
            new = dict(row.states) | {place.removeprefix("state "): made[i] for place, made in self.fresh.items()}
            order = [key for key in new if key not in row.recorded.created] + list(row.recorded.created)
            state.update({key: new[key] for key in order})


def _new(p: Tensor, dtype: torch.dtype, whole: bool) -> Tensor:
    if whole:
        return torch.empty_like(p, dtype=dtype, requires_grad=False)
    return torch.empty((), dtype=dtype, device=p.device)


def _dense(x: Tensor) -> bool:
    """Whether the elements of `x` fill one piece of memory, in whatever order."""
    return bool(torch.ops.aten.is_non_overlapping_and_dense(x))


def make_cohorts(chain: Chain, work: Sequence[GroupWork]) -> tuple[list[Cohort], list[tuple[GroupWork, str]]]:
    """The cohorts of the work, and what cannot be recorded: parts of its groups, with the reason."""
    cohorts: dict[Program, dict[Any, Cohort]] = {}
    refused: list[tuple[GroupWork, str]] = []
    for group in work:
        reasons: dict[str, GroupWork] = {}
        rows: dict[Any, tuple[Cohort, int] | str] = {}
        for p, state in zip(group.params, group.states, strict=True):
            found = _find(chain, group, p, state, cohorts, rows)
            if isinstance(found, str):
                part = reasons.setdefault(found, GroupWork(group.index, group.group, group.hypers, [], []))
                part.params.append(p)
                part.states.append(state)
                continue
            cohort, row = found
            cohort.params.append(p)
            cohort.states.append(state)
            cohort.row_index.append(row)
        refused += [(part, reason) for reason, part in reasons.items()]
    return [cohort for by_device in cohorts.values() for cohort in by_device.values()], refused


def _find(
    chain: Chain,
    group: GroupWork,
    p: Tensor,
    state: dict[str, Any],
    cohorts: dict[Program, dict[Any, Cohort]],
    rows: dict[Any, tuple[Cohort, int] | str],
) -> tuple[Cohort, int] | str:
    """The cohort and row of one parameter, or why it has none."""
    try:
        kind = kind_of(p, state)
        numbers = tuple(v for v in state.values() if isinstance(v, int | float))
        key = (kind, numbers)
        if key in rows:
            return rows[key]
        row = chain.lookup((hypers_kind(group.hypers), kind), p, group.hypers, state)
    except NotRecordable as refusal:
        return str(refusal)
    if isinstance(row, str):
        rows[key] = row
        return row
    program = row.recorded.program
    cohort = cohorts.setdefault(program, {}).setdefault(p.device, Cohort(program))
    cohort.rows.append(row)
    cohort.hypers.append(group.hypers)
    cohort.groups.append(group.index)
    rows[key] = cohort, len(cohort.rows) - 1
    return rows[key]
