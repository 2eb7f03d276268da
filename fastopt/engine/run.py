"""The engine of one optimizer: records its chain, lets the executor of each device run it, and tells what it did."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..hypers import Group
from ..state import Entry, ParamState
from ..watched import watch_of
from .choice import DEFAULT, NOT_COMPILED, WITHOUT_LLVM, Choice, requested
from .cohorts.look import count_change
from .cohorts.plan import Cohort, make_cohorts
from .cohorts.steady import Steady, Whole
from .describe import Needs, attribute, cb_name, chain_needs, keywords, larger, undeclared
from .executors.blocks import run_blocks
from .executors.eager import check_dense, run_eager
from .executors.llvm_compile import llvm_is_there
from .executors.llvm_run import can_run, run_llvm
from .executors.triton_run import TritonRuns, interpreted, triton_is_there
from .master import add_masters
from .recording.chain import PARAM, Chain
from .recording.program import Program
from .work import GroupWork, Reduce

_LISTS = frozenset({"params", "param_names"})

#: Why a recording does not do for slices.
NOT_ADDITIVE = "a reduction that cannot be added up over processes"

#: Why a chain that can be recorded runs `eager`.
AS_IT_IS = "on CPUs, where it is not compiled, a chain with norms or few operations is faster as it is than in blocks"

#: Operations on tensors from which on blocks that stay in the cache are worth it.
_MANY = 6

#: Steps as it is after which a chain is looked at again: its numbers may lead it elsewhere, as those of RAdam do.
_AGAIN = 32


class Engine:
    """Runs the chain of one optimizer.

    Args:
        name: of the executor to use; None or empty takes the best one for each device.
        masters: give low-precision parameters a master copy before their first step.
    """

    def __init__(self, name: str | None = None, masters: bool = False) -> None:
        self.name, self.masters = name, masters
        self._chain: Chain | None = None
        self._ran: dict[int, Choice] = {}
        self._used: dict[int, str] = {}
        self._triton: dict[tuple[Hashable, torch.device], TritonRuns] = {}
        self._steady: dict[Hashable, Steady] = {}
        self._whole: Whole | None = None
        #: Whether everything in the last step was recorded, so that no cb has received a tensor of the state.
        self.recorded = False
        self._known_to_move = False
        self._as_it_is = 0  # how many more steps the chain runs as it is

    def run(
        self,
        cbs: Sequence[Callable[..., Any]],
        work: Sequence[GroupWork],
        reduce: Reduce | None = None,
        *,
        recorded: bool = False,
        part: Hashable = None,
    ) -> None:
        """Run the chain on all of the work, in place; the other arguments are those of `run_eager`.

        Args:
            recorded: the tensors are slices, and that this is right is known from the recording only.
            part: which part of a step this is, where it is made in several: what was found out about the work of a part
                is kept for the same part of the next step.

        Raises:
            RuntimeError: `recorded`, and something would have to run as it is. Nothing has changed then.
        """
        self._run(cbs, work, reduce, launch=True, recorded=recorded, part=part)

    def needs(self, cbs: Sequence[Callable[..., Any]], work: Sequence[GroupWork]) -> Needs:
        """What the chain must see of a sharded parameter, as far as the hypers and states of `work` tell.

        Where a cb does not say, its recording does: it needs norms if it reduces, all of a parameter if it cannot be
        recorded, else any part.
        """
        if not undeclared(cbs):
            return chain_needs(cbs)
        declared = chain_needs([cb for cb in cbs if attribute(cb, "needs", None) is not None])
        if declared == "whole" or self.not_on_slices(cbs, work) is not None:
            return "whole"
        cohorts, _ = make_cohorts(self._chain_of(cbs), work)
        if not cohorts:
            return "whole"
        return larger(declared, "norm" if any(map(_reduces, cohorts)) else "elementwise")

    def not_on_slices(self, cbs: Sequence[Callable[..., Any]], work: Sequence[GroupWork]) -> str | None:
        """Why a chain whose cbs do not all say what they need cannot step slices now; None if its recording can."""
        name, reason = requested(self.name)
        if name == "eager":
            return f"the executor eager does not record ({reason})"
        cohorts, refused = make_cohorts(self._chain_of(cbs), work)
        if refused:
            return refused[0][1]
        if any(not cohort.program.additive for cohort in cohorts):
            return NOT_ADDITIVE
        return None

    def prepare_replay(self, cbs: Sequence[Callable[..., Any]], work: Sequence[GroupWork]) -> None:
        """Do all of a step but the kernels, which a CUDA graph then replays.

        Raises:
            RuntimeError: no graph has captured a step, or this step differs from it in more than numbers.
        """
        self._run(cbs, work, None, launch=False)

    def _run(
        self,
        cbs: Sequence[Callable[..., Any]],
        work: Sequence[GroupWork],
        reduce: Reduce | None,
        launch: bool,
        recorded: bool = False,
        part: Hashable = None,
    ) -> None:
        name, reason = requested(self.name)
        self.recorded = False
        if name == "eager":
            check_dense(cbs, work)
            _only_recorded(recorded, reason)
            self._add_masters(work)
            _only_kernels_replay(launch)
            run_eager(cbs, work, reduce)
            self._note(work, "eager", reason)
            return
        chain = self._chain_of(cbs)
        steady = self._steady.get(part)
        again = steady.cohorts() if steady is not None and steady.fits(work) else None
        if again is not None:
            self.recorded = True
            self._execute(again, name, reduce, launch, part)
            return
        check_dense(cbs, work)
        self._steady.pop(part, None)
        self._whole = None
        self._forget_steps_of(work)
        owner = next((state.owner for group in work for state in group.states if isinstance(state, Entry)), None)
        changes = 0 if owner is None else owner.changes
        self._add_masters(work)
        if self._as_it_is and name is None and not recorded and launch and _on_cpu(work):
            self._as_it_is -= 1
            run_eager(cbs, work, reduce)
            self._note(work, "eager", AS_IT_IS)
            return
        cohorts, refused = make_cohorts(chain, work)
        if not self._known_to_move:
            self._known_to_move = True
            _warn_of_no_effect(cbs, cohorts, refused)
        _only_kernels_replay(launch or not refused)
        if name is None and not recorded and _better_as_it_is(cohorts):
            self._as_it_is = _AGAIN
            run_eager(cbs, work, reduce)
            self._note(work, "eager", AS_IT_IS)
            return
        if (recorded or reduce is not None) and (refused or any(not cohort.program.additive for cohort in cohorts)):
            why = refused[0][1] if refused else NOT_ADDITIVE
            _only_recorded(recorded, why)
            run_eager(cbs, work, reduce)  # in full, so that all processes make the same calls of `reduce`
            self._note(work, "eager", why)
            return
        ran = self._execute(cohorts, name, reduce, launch, part)
        self._used |= {index: executor for executor, some in ran for cohort in some for index in cohort.groups}
        if refused:  # all of the work where nothing was recorded, for a cb may step on everything at once
            run_eager(cbs, [group for group, _ in refused] if cohorts else work, reduce)
        self._note(work, None, reason, refused, name)
        self.recorded = not refused
        if not refused:
            if owner is not None:
                for other in self._steady.values():
                    other.excuse(owner, owner.changes - changes)
            found = Steady(work, cohorts, chain, set(self._used.values()) == {"triton"})
            if found.reusable:
                self._steady[part] = found

    def _forget_steps_of(self, work: Sequence[GroupWork]) -> None:
        """Forget other parts that have stepped any of these parameters: their numbers go on without being told."""
        stepping = {id(p) for group in work for p in group.params}
        for part, steady in list(self._steady.items()):
            if any(id(p) in stepping for params in steady.stepping().values() for p in params):
                del self._steady[part]

    def _add_masters(self, work: Sequence[GroupWork]) -> None:
        if self.masters:
            add_masters(work)

    def repeat(
        self,
        cbs: Sequence[Callable[..., Any]],
        groups: Sequence[Group],
        state: ParamState,
        hypers_of: Callable[[int], dict[str, Any]],
        new_hypers: Callable[[Sequence[str | None]], dict[str, list[Any]] | None],
        launch: bool = True,
    ) -> bool:
        """Make a step of a whole optimizer if it is like the last one; tells whether it was made.

        Args:
            cbs: the chain.
            groups, state: of the optimizer, as in `expect`.
            hypers_of: the hypers of a group, by its index.
            new_hypers: the hypers that entries of the groups hold, by name with a value per group; None if it takes
                `hypers_of` to know.
            launch: as for `TritonRuns.run`.
        """
        whole, name = self._whole, requested(self.name)[0]
        if whole is None or name == "eager" or not whole.holds(groups, state):
            return False
        self._chain_of(cbs)
        steady = self._steady.get(None)
        if steady is None:
            return False
        if whole.hypers_changed():
            written = whole.written()
            if not _are_plain(groups, written):
                self._whole = None
                return False
            found = new_hypers(written)
            taken = found is not None and steady.put_hypers(found)
            if not taken and not steady.set_hypers({i: hypers_of(i) for i in steady.stepping()}):
                return False
        whole.take_hypers()
        cohorts = steady.cohorts()
        if cohorts is None:
            return False
        self._execute(cohorts, name, None, launch)
        return True

    def expect(self, groups: Sequence[Group], state: ParamState, idle: list[Tensor]) -> None:
        """Note that the last step was one of a whole optimizer, so that `repeat` can make the next.

        Args:
            groups: all of the optimizer.
            state: of all parameters.
            idle: the parameters of groups that are not frozen that did not step.
        """
        watch = watch_of(groups)
        if None in self._steady and watch is not None and _are_plain(groups, [None]):
            self._whole = Whole(groups, watch, state, idle)

    def _execute(
        self, cohorts: list[Cohort], name: str | None, reduce: Reduce | None, launch: bool, part: Hashable = None
    ) -> list[tuple[str, list[Cohort]]]:
        """Let the executor of each device run its cohorts. Returns which one ran which."""
        used: list[tuple[str, list[Cohort]]] = []
        for device, here in _by_device(cohorts).items():
            executor = executor_of(here, name)
            if executor == "triton":
                if (part, device) not in self._triton:
                    self._triton[part, device] = TritonRuns()
                self._triton[part, device].run(here, reduce, launch)
            else:
                _only_kernels_replay(launch)
                with torch.no_grad():
                    (run_llvm if executor == "llvm" else run_blocks)(here, reduce)
            for cohort in here:
                if _moves(cohort):
                    count_change(cohort.params)
            used.append((executor, here))
        return used

    def programs(self) -> tuple[Program, ...]:
        """The programs that the chain has been recorded as."""
        return () if self._chain is None else self._chain.programs()

    def choices(
        self, cbs: Sequence[Callable[..., Any]], work: Sequence[GroupWork], *, recorded: bool = False
    ) -> tuple[Choice, ...]:
        """Which executor runs each group, and why: what was done in the last step, else what would be done.

        `recorded` is that of `run`.
        """
        missing = [group for group in work if group.index not in self._ran]
        name, reason = requested(self.name)
        expected: dict[int, Choice] = {}
        if missing and name != "eager":
            cohorts, refused = make_cohorts(self._chain_of(cbs), missing)
            if name is None and not recorded and _better_as_it_is(cohorts):
                return tuple(self._ran.get(g.index) or Choice(g.index, "eager", AS_IT_IS) for g in work)
            why = {group.index: text for group, text in refused}
            parts = _by_device(cohorts).values()
            used = {i: executor_of(part, name) for part in parts for cohort in part for i in cohort.groups}
            expected = {g.index: _choice(g.index, why.get(g.index), name, reason, used) for g in missing}
        elif missing:
            expected = {g.index: Choice(g.index, "eager", reason) for g in missing}
        return tuple(self._ran.get(g.index) or expected[g.index] for g in work)

    def _chain_of(self, cbs: Sequence[Callable[..., Any]]) -> Chain:
        if (
            self._chain is None
            or len(self._chain.cbs) != len(cbs)
            or any(a is not b for a, b in zip(self._chain.cbs, cbs, strict=True))
        ):
            self._chain = Chain(cbs)
            self._steady.clear()
            self._as_it_is = 0
        if self._chain.refresh():
            self._steady.clear()
        return self._chain

    def _note(
        self,
        work: Sequence[GroupWork],
        executor: str | None,
        reason: str,
        refused: Sequence[tuple[GroupWork, str]] = (),
        name: str | None = None,
    ) -> None:
        why = {group.index: text for group, text in refused}
        for group in work:
            if executor is not None:
                self._ran[group.index] = Choice(group.index, executor, reason)
            else:
                self._ran[group.index] = _choice(group.index, why.get(group.index), name, reason, self._used)


def _only_recorded(recorded: bool, why: str) -> None:
    if recorded:
        raise RuntimeError(f"slices of parameters can be stepped by what is recorded only, but {why}")


def _moves(cohort: Cohort) -> bool:
    """Whether its parameters are written to."""
    return any(out.place == PARAM for out in cohort.program.outputs)


def _warn_of_no_effect(cbs: Sequence[Callable[..., Any]], cohorts: Sequence[Cohort], refused: Sequence[Any]) -> None:
    """Say so where a chain has a learning rate and its first step, all of it recorded, moves no parameter."""
    moves = refused or any(map(_moves, cohorts))
    if cohorts and not moves and (asking := next((cb for cb in cbs if "lr" in keywords(cb)), None)) is not None:
        warnings.warn(
            f"this step has moved no parameter, though {cb_name(asking)} asks for lr: change p in place, as by "
            f"p.data.sub_(...); p = p - ... only gives a name to a new tensor",
            stacklevel=2,
        )


def _reduces(cohort: Cohort) -> bool:
    return any(phase.reductions for phase in cohort.program.phases)


def _on_cpu(work: Sequence[GroupWork]) -> bool:
    return all(p.device.type == "cpu" for group in work for p in group.params)


def _operations(cohort: Cohort) -> int:
    return sum(node.whole and node.op != "input" for node in cohort.program.nodes)


def _are_plain(groups: Sequence[Group], keys: Sequence[str | None]) -> bool:
    """Whether these entries of the groups, all of them with None, change only by being replaced. The lists of
    parameters are looked through in every step."""
    if None in keys:
        kinds = {type(value) for group in groups for key, value in group.items() if key not in _LISTS}
    else:
        kinds = {type(group.get(key)) for key in keys if key is not None and key not in _LISTS for group in groups}
    return all(issubclass(kind, bool | int | float | str | None | tuple) for kind in kinds)


def _only_kernels_replay(possible: bool) -> None:
    if not possible:
        raise RuntimeError("only steps of the executor triton can be captured and replayed, see opt.engine")


def _better_as_it_is(cohorts: Sequence[Cohort]) -> bool:
    """Whether a recorded chain is slower than its cbs: on the CPU in blocks, with norms or hardly any operations.

    Depends on the chain and the devices alone, so that all processes of a sharded step decide alike.
    """
    if not cohorts or any(cohort.params[0].device.type != "cpu" for cohort in cohorts):
        return False
    in_blocks = executor_of(cohorts, None) == "foreach"
    return in_blocks and (any(map(_reduces, cohorts)) or all(_operations(cohort) < _MANY for cohort in cohorts))


def _choice(index: int, refusal: str | None, name: str | None, reason: str, used: Mapping[int, str]) -> Choice:
    if refusal is not None:
        return Choice(index, "eager", refusal)
    if used.get(index) == "foreach" and reason == DEFAULT:
        return Choice(index, "foreach", NOT_COMPILED if llvm_is_there() else WITHOUT_LLVM)
    if name is not None and used.get(index, name) != name:
        return Choice(index, used[index], f"{name}, {reason}, cannot run it here")
    return Choice(index, used.get(index, "eager"), reason if index in used else "it has no parameters")


def executor_of(cohorts: Sequence[Cohort], name: str | None) -> str:
    """The name of the executor for cohorts on one device; `name` is the one that was asked for.

    Sizes play no part, so that slices of a parameter run as the whole does, whatever the number of processes.
    """
    executor = executor_for(cohorts[0].params[0].device.type, name)
    return "foreach" if executor == "llvm" and not all(can_run(cohort.program) for cohort in cohorts) else executor


def executor_for(device: str, name: str | None) -> str:
    """The executor for tensors on `device`, going by what is installed; `name` is the one that was asked for."""
    if name == "eager":
        return name
    if name in (None, "triton") and triton_is_there() and (device == "cuda" or (name and interpreted())):
        return "triton"
    if name in (None, "llvm") and device == "cpu" and llvm_is_there():
        return "llvm"
    return "foreach"


def _by_device(cohorts: list[Cohort]) -> dict[torch.device, list[Cohort]]:
    """The cohorts of each device."""
    devices: dict[torch.device, list[Cohort]] = {}
    if len(cohorts) == 1:
        return {cohorts[0].params[0].device: cohorts}
    for cohort in cohorts:
        devices.setdefault(cohort.params[0].device, []).append(cohort)
    return devices
