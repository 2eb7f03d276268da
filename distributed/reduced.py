"""Stage 2: gradients leave `p.grad` as they are made, are summed over the ranks, and each rank keeps its own part.

[Note: rounds]
All gradients of one synchronised backward pass are reduced in one *round*: one collective per active bucket, in one
fixed order (last bucket first, as backward makes gradients from the end), whatever gradients exist. A bucket is
launched when all its active parameters have a gradient and its predecessors are launched; the end of the backward pass
launches the rest, with zeros for what is missing. So the collectives of a round depend only on what the ranks have
agreed on before (see [Note: agreement] in consistency.py), never on which part of a model a rank has used.

A backward pass inside another one (checkpointing with `use_reentrant=True`) belongs to the round of the outer one.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterable, Iterator, Set
from contextlib import contextmanager

import torch
from torch import Tensor

from ..spread import is_spread, part_of_grad
from .checks.agreement import Agreement
from .communication.collectives import Ranks
from .communication.lane import Lane
from .gradients.hooks import call_when_made
from .gradients.in_backward import ALREADY, LAG, STEPS, InBackward
from .gradients.local_gradients import sparse
from .gradients.reductions import Reductions
from .gradients.rounds import Part, Round, inside_another_backward
from .parameters.buckets import Buffers
from .wires.header import Place, Verdict, decode
from .wires.wire import Wire


class ReducedGradients(Reductions):
    """This rank holds the averaged gradient of its own elements only.

    Args:
        ranks: who takes part.
        buffers: the parameters.
        agreement: knows which parameters are active on all ranks.
        dtype: of the sums over the ranks; None takes that of the gradients and leaves the order to the backend.
        lane: where parts are made and kept, see lane.py.
    """

    def __init__(
        self, ranks: Ranks, buffers: Buffers, agreement: Agreement, dtype: torch.dtype | None, lane: Lane
    ) -> None:
        super().__init__(ranks, buffers, dtype, lane)
        self._agreement = agreement
        self._seen: set[int] = set()
        self.lacking: Set[int] = frozenset()
        self._round: Round | None = None
        self._last: Round | None = None
        self._rounds = 0
        self._left_over = False
        self._settled: list[int] | None = None
        self._problem: str | None = None
        self._asking = False
        self._cleared = False
        self._watched = 0
        self.syncing = True
        self.in_backward: InBackward | None = None
        self.watch()

    def watch(self) -> None:
        """Put a hook on every parameter that autograd can reach, frozen ones included: they may be unfrozen later."""
        me = weakref.ref(self)
        for i, p in enumerate(self._buffers.params[self._watched :], start=self._watched):
            if p.is_leaf and p.is_floating_point():
                call_when_made(p, me, i)
        self._watched = len(self._buffers.params)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Gradients of backward passes inside stay in `p.grad`."""
        before, self.syncing = self.syncing, False
        try:
            yield
        finally:
            self.syncing = before
            self._left_over, self._settled = True, None

    @property
    def in_round(self) -> bool:
        """Whether a backward pass is under way, or has failed."""
        return self._round is not None

    # ---- in a backward pass

    def arrived(self, param: int) -> None:
        """Autograd has put a gradient into the parameter's `.grad`."""
        if not self.syncing:
            return
        now = self._round
        if now is None or torch._C._current_graph_task_id() not in now.tasks:
            now = self._enter(param)
        waits_for = None if now is None else now.waits_for.get(param)
        if now is None or waits_for is None:
            return
        if param not in waits_for:
            # A second one from the same pass, when the first may be under way: it goes with the next round.
            self._left_over = True
            if self.in_backward is not None:
                self._problem = self._problem or ALREADY
            return
        waits_for.discard(param)
        if not waits_for:
            with torch.no_grad():
                while now.to_launch and not now.to_launch[0][1]:
                    self._launch_next(now)

    def _enter(self, param: int) -> Round | None:
        """The round of the backward pass that is running; None if it has not come to anything active."""
        task = torch._C._current_graph_task_id()
        now: Round | None = self._round
        if now is not None and task in now.tasks:
            return now
        if not self._agreement.steps_on(param):
            return now
        inner = inside_another_backward()
        if now is not None and now.tasks and not inner and task > max(now.tasks):
            with torch.no_grad():
                self._close()  # of a pass whose end nobody has told
                self._verdict()
            now = None
        if now is None:
            with torch.no_grad():
                now = self._open("backward")
        if now is not None:
            now.tasks.add(task)
            if not inner:
                torch.autograd.Variable._execution_engine.queue_callback(self._backward_ended)
        return now

    @torch.no_grad()
    def _backward_ended(self) -> None:
        self._close()
        verdict = self._verdict()
        problem = self._problem
        disagree = verdict is not None and self._apart(verdict)
        if problem or disagree:
            self.clear()
        if disagree:
            self._agreement.disagree("backward", problem)
        if problem:
            raise RuntimeError(problem)

    def _apart(self, verdict: Verdict) -> bool:
        """Whether the ranks cannot go on. Hypers are a matter of the step, wherever that is made."""
        hypers = self.in_backward is not None and not verdict.same_hypers
        return verdict.problem or not verdict.same_activity or hypers

    # ---- rounds

    def _open(self, place: Place) -> Round | None:
        """Begin a round, once the ranks agree on what is active; None where nothing is, and no message is due."""
        self._problem = self._problem or sparse(self._buffers)
        if self.in_backward is not None:
            self._problem = self._problem or self.in_backward.opened()
        if not self._must_ask and self._agreement.stepping() != self._agreement.active:
            self._change(place)
        if self._must_ask and place == "backward":
            self._ask_in_backward()
        wires = self._buffers.reducing(self._agreement.active)
        self._left_over, self._settled = False, None
        self._cleared = False  # what follows is not to be forgotten; ranks that were apart have just told each other
        if not wires:
            return None
        # Autograd brings nothing for a parameter that requires no gradient: its bucket waits for the end.
        params = self._buffers.params
        coming = {i for i in self._agreement.active if params[i].requires_grad}
        expected = [coming.intersection(wire.params) for wire in wires]
        leading = [] if self._ranks.alone else self._agreement.header(place, self._problem, changed=False)
        self._round = Round(place, wires, expected, leading)
        self._rounds += 1
        return self._round

    @property
    def _must_ask(self) -> bool:
        """Whether the ranks exchange a message before what they do next: all of them know, or nothing is active."""
        return not self._ranks.alone and (self._asking or not self._buffers.reducing(self._agreement.active))

    def _ask_in_backward(self) -> None:
        """Exchange a message; if the ranks disagree, the gradients are dropped."""
        problem = self._problem
        try:
            self._ask("backward", False, problem)
        except RuntimeError:
            self.clear()
            raise

    def _ask(self, place: Place, waiting: bool, problem: str | None) -> tuple[bool, bool]:
        """Exchange a message. What another rank has forgotten since the last round is forgotten here, too."""
        in_round, any_waiting, cleared, _ = self._agreement.ask(place, waiting, problem, cleared=self._cleared)
        self._cleared = False
        if cleared:
            self._land_all()
            self._parts.clear()
            self._seen.clear()
        return in_round, any_waiting

    def _change(self, place: Place) -> None:
        """Agree on another set of active parameters, in the shape of the first collective of the old one."""
        agreement = self._agreement
        if self._ranks.alone:
            agreement.active = agreement.stepping()
            return
        wires = self._buffers.reducing(agreement.active)
        reading = self._send_nothing(wires[0], agreement.header(place, self._problem, changed=True))
        verdict = self._agreement.noted(decode(reading.get()))
        if verdict.same_activity and not verdict.unchanged and not verdict.problem:
            agreement.active = agreement.stepping()
            self._asking = self._asking or len(verdict.places) > 1
            return
        if verdict.unchanged:
            for wire in wires[1:]:
                self._send_nothing(wire, [])
        problem = self._problem
        self.clear()
        agreement.disagree(place, problem)

    def _close(self) -> None:
        """Launch the rest of the round."""
        now = self._round
        while now is not None and now.to_launch:
            self._launch_next(now)
        if now is not None:
            self._pass_on()
            if self.in_backward is not None:
                self._step_rest(now, self.in_backward)
            self._last, self._round = now, None

    def _launch_next(self, now: Round) -> None:
        """Start to reduce the next bucket in order, with what is in `p.grad`."""
        first = now.first
        wire, _ = now.to_launch.popleft()
        sources = self._taken(wire)
        self._seen.update(sources)
        reduction = self._send(wire, sources, now.leading if first else [])
        if first and not self._ranks.alone:
            now.reading = self._read(wire, reduction)
        enough = now.launched > LAG and len(self._parts) >= now.total // STEPS
        if self.in_backward is not None and enough and self._may_step(now):
            self.in_backward.gather(self._step_landed(self.in_backward))

    def _may_step(self, now: Round) -> bool:
        """Whether the ranks agree that the buckets of a round step: the same on all of them."""
        if now.may_step is None:
            if now.reading is None:
                now.may_step = self._problem is None and self._agreement.misuse() is None
            else:
                verdict = decode(now.reading.get())
                now.may_step = verdict.same_activity and verdict.same_hypers and not verdict.problem
        return now.may_step

    def _step_rest(self, now: Round, stepper: InBackward) -> None:
        """Step what has not stepped at the end of a round, and gather the buckets that are needed first first."""
        if not self._may_step(now):
            return
        wires = self._step_landed(stepper)
        self._land_all()
        wires += self._step_landed(stepper)
        stepper.gather(sorted(wires, key=lambda wire: wire.bucket.index))

    def _step_landed(self, stepper: InBackward) -> list[Wire]:
        """Step all buckets that have landed; what is then to be gathered."""
        present: dict[int, list[int]] = {}
        for index, part in self._parts.items():
            with self._lane.inside():
                part.ready()
            present[index] = self._present_of(part, self._agreement.active)
        wires = stepper.step(present)
        self._parts.clear()
        return wires

    def _taken(self, wire: Wire) -> dict[int, Tensor]:
        """The gradients of active parameters, flat, no longer in `p.grad`."""
        params, active = self._buffers.params, self._agreement.active
        found: dict[int, Tensor] = {}
        for i in wire.params:
            p = params[i]
            grad = p.grad
            if grad is None or i not in active:
                continue
            if grad.layout != torch.strided:
                self._problem = sparse(self._buffers)
                grad = None
            elif is_spread(p):
                try:
                    grad = part_of_grad(p)
                except ValueError as error:
                    self._problem, grad = f"{self._buffers.layout.params[i].name!r}: {error}", None
            p.grad = None
            if grad is not None:
                found[i] = grad.reshape(-1)
        return found

    def _verdict(self) -> Verdict | None:
        """What the headers of the last round say; None where it had none."""
        last = self._last
        if last is None or last.reading is None:
            return None
        verdict = self._agreement.noted(decode(last.reading.get()))
        if len(verdict.places) > 1:
            self._asking = True
        elif verdict.same_activity:
            self._agreement.accept(verdict)
        return verdict

    # ---- at a step

    @torch.no_grad()
    def settle(self, place: Place) -> list[int]:
        """The active parameters with a gradient on any rank. See [Note: agreement] in consistency.py."""
        active = self._agreement.stepping()
        if self._settled is not None and active == self._agreement.active and not self._left_over:
            return self._settled
        self._close()
        try:
            if self._ranks.alone:
                self._settle_alone(place)
            else:
                self._meet(place)
            if self._problem:
                raise RuntimeError(self._problem)
        finally:
            self._problem = None
        self._settled = present = self._present()
        return present

    def _settle_alone(self, place: Place) -> None:
        self._problem = self._problem or self._agreement.misuse()
        if not self._problem and (not self._rounds or self._waiting(self._agreement.stepping())):
            self._open(place)
            self._close()
        self._agreement.active = self._agreement.stepping()

    def _meet(self, place: Place) -> None:
        """Come to an agreement with all ranks that nothing is left to be reduced, and that they are at `place`."""
        agreement = self._agreement
        while True:
            if self._must_ask:
                in_round, waiting = self._ask(place, self._waiting(agreement.stepping()), self._problem)
                if not in_round and not waiting:
                    self._asking = False
                    return
                self._asking = True
                self._open(place)
                self._close()
                continue
            if agreement.stepping() != agreement.active:
                self._change(place)
                continue
            if not self._rounds or self._waiting(agreement.active):
                self._open(place)
                self._close()
            verdict = self._verdict()
            if verdict is not None and self._agreed(verdict, place):
                return

    def _agreed(self, verdict: Verdict, place: Place) -> bool:
        """Whether the headers leave nothing to be asked."""
        apart = len(verdict.places - {"backward"}) > 1
        if self._apart(verdict) or apart:
            self._asking = True
            self._agreement.disagree(place, self._problem)
        self._asking = self._asking or not verdict.same_hypers
        return not self._asking

    def _waiting(self, active: Iterable[int]) -> bool:
        """Whether there is something that no round has taken along: after passes under `no_sync()`, or by hand.

        `active` is what the next round takes, which may not have been agreed on yet.
        """
        return self._left_over or any(self._buffers.params[i].grad is not None for i in active)

    def _present(self) -> list[int]:
        """The active parameters with a gradient on any rank; the flags are read only where some are missing here."""
        active = self._agreement.active
        if not self._ranks.alone and not active <= self._seen:
            self._land_all()
            for part in self._parts.values():
                self._seen.update(self._present_of(part, active))
        return sorted(self._seen & active)

    def _present_of(self, part: Part, active: Set[int]) -> list[int]:
        """The active parameters of one bucket with a gradient on any rank."""
        mine = [i for i in part.wire.params if i in active]
        if not self._ranks.alone and not self._seen.issuperset(mine):
            with self._lane.inside():
                flags = dict(zip(part.wire.params, part.flags().tolist(), strict=True))
            self.lacking |= {i for i in mine if i not in self._seen and flags[i] > 0}
            return sorted(i for i in mine if i in self._seen or flags[i] > 0)
        return sorted(i for i in mine if i in self._seen)

    def consumed(self) -> None:
        """Free the gradients: what has stepped is not needed again."""
        self._land_all()
        self._parts.clear()
        self._seen.clear()
        self.lacking = frozenset()
        self._last, self._rounds, self._cleared = None, 0, False
        self._settled, self._left_over = None, False
        if self.in_backward is not None:
            self.in_backward.done()

    def clear(self) -> None:
        """Forget the gradients and a round that a failed backward pass has left open.

        The other ranks may have come further in it, or may not have failed: the rest of its collectives is made first.
        """
        if self.in_backward is None and not self._ranks.watch.failed:
            with torch.no_grad():
                self._close()
        self._drop_all()
        self._round, self._problem = None, None
        cleared = self._cleared or self._rounds > 0
        self.consumed()
        self._cleared = cleared
