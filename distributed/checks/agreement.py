"""What the ranks of a sharded optimizer must agree on: see [Note: agreement] in consistency.py."""

from __future__ import annotations

import marshal
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import Any, NoReturn

import torch.distributed as dist
from torch import Tensor

from ...base import _BaseOptimizer
from ...state import Entry, ParamState
from ..communication.collectives import Ranks
from ..parameters.buckets import Buffers
from ..wires.header import PLACES, Place, Verdict, encode
from .consistency import BOTH_WAYS, agree, both_ways, digest, disagree, equal_everywhere

Hypers = list[list[tuple[str, Any]]]

_MEMBERS = ("params", "param_names")

LATE = 100
"""Steps for which a message compares hypers, after one whose hypers were set between backward and step."""


class Agreement:
    """Checks that the ranks do the same thing in the same way.

    Attributes:
        steps: how many steps have been made.
        loaded: whether parameters or states have been loaded on this rank, or cleared, and no other has been told yet.
        unsure: whether any rank has told so: parameters and states may differ.
        found: what is wrong on this rank, found too late for the last step.
        active: the parameters that step if they have a gradient, as the ranks have last agreed.
        late: in how many more steps a message compares what they use; the same on all ranks.
    """

    def __init__(self, opt: _BaseOptimizer, ranks: Ranks, buffers: Buffers) -> None:
        self._opt, self._ranks, self._buffers = opt, ranks, buffers
        self._stepping: tuple[Any, frozenset[int]] | None = None
        self._counted: tuple[ParamState, int, object] | None = None
        self._counts = False
        self._spared: tuple[Any, list[int]] | None = None
        self.steps = 0
        self.loaded = self.unsure = False
        self.found: str | None = None
        self.active = self.stepping()
        self.late = 0
        self._told: bytes | None = None
        self._unchecked: tuple[int, Hypers] | None = None
        self._used: tuple[int, list[list[Any]]] | None = None

    def stepping(self) -> frozenset[int]:
        """The parameters that step now if they have a gradient, by their index in the layout."""
        key = [group.get("frozen") for group in self._opt.param_groups], len(self._buffers.params), self._marks
        if self._stepping is None or self._stepping[0] != key:
            self._stepping = key, self._find_stepping()
        return self._stepping[1]

    @property
    def _marks(self) -> object:
        """The same object as before unless a mark may have changed: states count what is written to them."""
        state = self._opt.state
        if not isinstance(state, ParamState):
            return object()
        if self._counted is None or self._counted[0] is not state or self._counted[1] != state.changes:
            self._counts = all(type(entry) is Entry for entry in state.values())
            self._counted = state, state.changes, object()
        return self._counted[2] if self._counts else object()

    def _find_stepping(self) -> frozenset[int]:
        params = self._buffers.params
        frozen = [self._opt.is_frozen(i) for i in range(len(self._opt.param_groups))]
        return frozenset(
            i
            for i, spec in enumerate(self._buffers.layout.params)
            if not frozen[spec.group] or self._opt.steps_on(spec.group, params[i])
        )

    def steps_on(self, param: int) -> bool:
        """Whether one parameter steps now if it has a gradient."""
        return self._opt.steps_on(self._buffers.layout.params[param].group, self._buffers.params[param])

    def grown(self, count: int) -> None:
        """Note that all ranks have taken in `count` parameters more, at the end."""
        first = len(self._buffers.params) - count
        self.active |= {i for i in self.stepping() if i >= first}

    # ---- without a collective of its own

    def header(self, place: Place, problem: str | None, changed: bool) -> list[int]:
        """What this rank says in the first header of a round (see header.py)."""
        self._told = self._hypers_digest()
        active = self.stepping() if changed else self.active
        problem = problem or self.misuse()
        activity = digest((self._who, self.steps, sorted(active)))
        loaded, self.loaded = self.loaded, False
        return encode(place, changed, problem is not None, activity, self._told, self._unchecked is not None, loaded)

    def accept(self, verdict: Verdict) -> None:
        """Note that the headers of all ranks were alike."""
        if verdict.same_hypers:
            self._unchecked = None
        if verdict.late:
            self.late = LATE

    def noted(self, verdict: Verdict) -> Verdict:
        """Note what any rank has loaded."""
        self.unsure |= verdict.loaded
        return verdict

    def stepped(self) -> None:
        """Note a step. Hypers that have changed since they were told are told once more, in the next round."""
        if not self._ranks.alone:
            stored = self._stored()
            if self._told is not None and self._hypers_digest(stored) != self._told:
                self._unchecked = self.steps, self._hypers()
            self._used = self.steps, stored
        self._told = None
        self.steps += 1
        self.late = max(0, self.late - 1)

    # ---- with a message of its own

    def ask(
        self,
        place: Place,
        waiting: bool,
        problem: str | None,
        more: Sequence[int] = (),
        cleared: bool = False,
    ) -> tuple[bool, bool, bool, list[int]]:
        """Exchange a message of its own, after which the ranks agree on what is active.

        Args:
            place: where this rank is.
            waiting: whether it has gradients to reduce.
            problem: why its gradients cannot be used.
            more: numbers from 0 to 255 to be told beside, as many on all ranks.
            cleared: whether it has forgotten gradients since its last round.

        Returns:
            Whether any rank is in a backward pass, is `waiting`, has `cleared`, and the largest of `more`.

        Raises:
            RanksDiffer: on all ranks. Hypers may differ while a rank is in a backward pass.
            RuntimeError: there is a problem, and one rank only.
        """
        active = self.stepping()
        problem = self.misuse() or problem
        facts = (problem, self._who, self.steps, sorted(active), self._undecayed())
        at = [place == each for each in PLACES]
        hypers = (self._hypers(), self._unchecked)
        changed = self._told is not None and self._hypers_digest() != self._told
        late = LATE if changed or self._unchecked is not None else self.late
        told = [*at, waiting, cleared, self.loaded, late, *more, *both_ways(hypers)]
        heard = agree(self._ranks, facts, told, lambda: self.report(place, problem))
        n = len(PLACES)
        in_round, *elsewhere, any_waiting, any_cleared, any_loaded = map(bool, heard[: n + 3])
        self.unsure, self.loaded = self.unsure or any_loaded, False
        self.late = heard[n + 3]
        alike = equal_everywhere(heard[-BOTH_WAYS:])
        if sum(elsewhere) > 1 or not (alike or in_round):
            self.disagree(place, problem)
        if problem:
            raise RuntimeError(problem)
        self.active = active
        if alike:
            self._unchecked, self._told = None, self._hypers_digest()
        return in_round, any_waiting, any_cleared, heard[n + 4 : n + 4 + len(more)]

    def disagree(self, place: Place, problem: str | None) -> NoReturn:
        """Raise what differs. Collective: all ranks have seen that something does."""
        report = self.report(place, problem or self.misuse())
        self._unchecked = self._used = None
        disagree(self._ranks, report)

    def report(self, place: Place, problem: str | None) -> dict[str, Any]:
        """What is compared, in words."""
        active = self.stepping()
        told: dict[str, Any] = {"problem": problem} if problem else {}
        told["the optimizer"] = self._who
        told["where they are"] = f"{place}, after {self.steps} steps"
        for i, values in enumerate(self._hypers()):
            told[f"group {i}"] = "frozen" if self._opt.is_frozen(i) else "not frozen"
            told.update({f"hyper {name!r} of group {i}": value for name, value in values})
        for step, i, name, value in self._used_hypers():
            told[f"hyper {name!r} of group {i} in step {step}"] = value
        undecayed = set(self._undecayed())
        for i, spec in enumerate(self._buffers.layout.params):
            told[f"whether {spec.name!r} steps"] = i in active
            told[f"do_wd of {spec.name!r}"] = i not in undecayed
        return told

    # ---- what is compared

    @property
    def _who(self) -> str:
        """Which optimizer this is: ranks may have several, and reach them in different orders."""
        params = self._buffers.layout.params
        return f"of {len(params)} parameters, {params[0].name!r} to {params[-1].name!r}"

    def _hypers(self) -> Hypers:
        """The hypers of all groups as they are compared and shown."""
        return [
            [(name, _shown(value)) for name, value in sorted(self._opt.hypers_of(i).items())]
            for i in range(len(self._opt.param_groups))
        ]

    def settings(self) -> dict[str, Any]:
        """Hypers and freezing, subject to value."""
        told: dict[str, Any] = {}
        for i, values in enumerate(self._hypers()):
            told[f"the freezing of group {i}"] = self._opt.param_groups[i].get("frozen", False)
            told.update({f"hyper {name!r} of group {i}": value for name, value in values})
        return told

    def used(self) -> bytes:
        """A digest of the hypers and of the freezing that a step now uses."""
        return self._hypers_digest()

    def _used_hypers(self) -> Iterator[tuple[int, int, str, Any]]:
        """The hypers that the last step has used: its number, group, name and value."""
        step, stored = self._used or (0, [])
        for i, (group, values) in enumerate(zip(self._opt.param_groups, stored, strict=False)):
            names = [name for name in group if name not in _MEMBERS]
            if len(names) == len(values):
                hypers = self._opt._names.hypers(dict(zip(names, values, strict=True)))
                yield from ((step, i, name, _shown(value)) for name, value in sorted(hypers.items()))

    def _stored(self) -> list[list[Any]]:
        """What the groups store beside their parameters."""
        return [[value for name, value in group.items() if name not in _MEMBERS] for group in self._opt.param_groups]

    def _hypers_digest(self, stored: list[list[Any]] | None = None) -> bytes:
        """A digest of hypers and of marks that act like them, and of those that are still to be checked.

        Made in every step, so it is of the groups as they are stored: of anything in them but the parameters.
        """
        stored = self._stored() if stored is None else stored
        try:
            return digest(marshal.dumps((stored, self._undecayed(), self._unchecked), 2))
        except ValueError:  # tensors, or values of a type of their own
            return digest((self._hypers(), self._undecayed(), self._unchecked))

    def _undecayed(self) -> list[int]:
        """The parameters that are marked `do_wd=False`."""
        key = self._marks, len(self._buffers.params)
        if self._spared is None or self._spared[0] != key:
            self._spared = key, self._find_undecayed()
        return self._spared[1]

    def _find_undecayed(self) -> list[int]:
        state = self._opt.state
        params = self._buffers.params
        return [i for i, p in enumerate(params) if p in state and not state[p].get("do_wd", True)]

    def misuse(self) -> str | None:
        """What has been done to the parameters that sharding cannot follow."""
        if self.found:
            return self.found
        if self._ranks.group is None and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            return (
                "shard() was called before the process group was initialised, so each rank would train by itself: call "
                "torch.distributed.init_process_group() before shard()"
            )
        displaced = self._buffers.displaced()
        if displaced:
            return (
                f"the memory of {', '.join(map(repr, displaced[:5]))} was replaced after shard() (p.data = ..., "
                f"model.to(...), another shard()): move the model before sharding (with Accelerate, prepare it), "
                f"and write into parameters with copy_"
            )
        sizes = [len(group["params"]) for group in self._opt.param_groups]
        count = Counter(spec.group for spec in self._buffers.layout.params)
        known = [count[i] for i in range(len(sizes))]
        if sizes != known:
            return f"the groups had {known} parameters when they were sharded and have {sizes}: use add_param_group"
        return None


def _shown(value: Any) -> Any:
    return value.tolist() if isinstance(value, Tensor) else value
