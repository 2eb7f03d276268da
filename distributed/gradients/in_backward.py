"""Stepping in backward: each bucket steps as soon as it is reduced, and is on its way back while backward goes on.

[Note: stepping in backward]
When a bucket is reduced, all its gradients have been made, so backward has read its parameters for the last time. Its
step and its gather then run beside the rest of the backward pass, and `opt.step()` has nothing left to do but to count.
The first buckets wait until `LAG` more have been launched: by then the header of the first one has come, which says
that the ranks agree, without a wait of the host. Nothing moves on any rank before that.

What comes after the gradients can no longer play a part: clipping, a `GradScaler` that skips the step, another
learning rate, gradients of another synchronised pass. Each is refused. Passes under `no_sync()` come before.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from ..checks.agreement import Agreement
from ..communication.lane import Lane
from ..parameters.buckets import Buffers
from ..parameters.gathering import Gathering
from ..wires.wire import Wire, wire_of

LAG = 3
"""How many buckets are launched at least before the first one steps."""

STEPS = 4
"""In about how many steps of several buckets: each costs the host a fraction of a millisecond."""

ALREADY = (
    "the step has been made in backward (shard(..., step_in_backward=True)), and more gradients have come before "
    "opt.step(): call opt.step() after each synchronised backward pass, and put all passes before it under no_sync()"
)


class InBackward:
    """Steps buckets, and knows what the step has been made with.

    Args:
        lane: where to queue it.
        run: runs the chain on parameters; its second argument tells the parts of a step apart.
        beside: whether a step may be queued in the lane.
    """

    def __init__(
        self,
        lane: Lane,
        buffers: Buffers,
        gathering: Gathering,
        agreement: Agreement,
        run: Callable[[Sequence[int], int], None],
        beside: Callable[[], bool],
    ) -> None:
        self._lane, self._buffers, self._gathering, self._agreement = lane, buffers, gathering, agreement
        self._run, self._beside = run, beside
        self._with: dict[str, Any] | None = None
        self._wires: dict[int, tuple[tuple[int, ...], Wire]] = {}
        self.stepped = False

    def opened(self) -> str | None:
        """A round of reductions begins; why it cannot."""
        if self.stepped:
            return ALREADY
        self._gathering.synchronize()
        self._gathering.plan()
        self._with = self._agreement.settings()
        return None

    def step(self, present: Mapping[int, Sequence[int]]) -> list[Wire]:
        """Step the parameters of some buckets, by their number; what is then to be gathered."""
        params = [i for members in present.values() for i in members]
        if not params:
            return []
        self.stepped = True
        part = min(present)
        if self._lane and self._beside():
            with self._lane.inside():
                self._run(params, part)
            self._lane.stepped = True
        else:
            self._lane.join()
            self._run(params, part)
        return [self._wire(index, tuple(members)) for index, members in present.items() if members]

    def _wire(self, bucket: int, params: tuple[int, ...]) -> Wire:
        """The wire that brings `params` of a bucket to all ranks; the last one of each bucket is kept."""
        known = self._wires.get(bucket)
        if known is None or known[0] != params:
            wire = wire_of(self._buffers.buckets[bucket].bucket, frozenset(params))
            assert wire is not None
            known = self._wires[bucket] = params, wire
        return known[1]

    def gather(self, wires: Sequence[Wire]) -> None:
        """Begin to bring buckets that have stepped to all ranks. Collective."""
        with self._lane.inside():
            for wire in wires:
                self._gathering.begin(wire)

    def check(self) -> None:
        """Raise if what the step was made with is something else by now."""
        if not self.stepped or self._with is None:
            return
        now = self._agreement.settings()
        for subject in [*self._with, *(new for new in now if new not in self._with)]:
            then, value = self._with.get(subject, "nothing"), now.get(subject, "nothing")
            if then != value:
                raise RuntimeError(
                    f"{subject} was {then} when the step was made in backward, and is {value} now: with "
                    f"shard(..., step_in_backward=True) set it before the backward pass, or after opt.step()"
                )

    def done(self) -> None:
        """The step is counted, or what is left of it is given up."""
        self.stepped, self._with = False, None


def refused(what: str, instead: str) -> RuntimeError:
    """The error of a call that stepping in backward gives up."""
    return RuntimeError(
        f"{what} comes too late: shard(..., step_in_backward=True) steps while backward makes the gradients. "
        f"{instead}, or leave step_in_backward out"
    )
