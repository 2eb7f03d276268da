"""What the ranks of a sharded optimizer tell each other before they reduce, clip or step.

See [Note: agreement] in consistency.py.
"""

from __future__ import annotations

from collections import Counter
from typing import Any, Literal, Protocol, get_args

from torch import Tensor

from ..base import _BaseOptimizer
from .buckets import Buffers
from .collectives import Ranks
from .consistency import BOTH_WAYS, agree, both_ways, disagree, equal_everywhere

Place = Literal["backward", "clip_grad_norm_", "step"]
PLACES: tuple[Place, ...] = get_args(Place)


class Waiting(Protocol):
    """What is asked of the gradients. Parameters are known by their index in the layout."""

    def has(self, param: int) -> bool:
        """Whether the parameter has had a gradient on this rank."""

    def unreduced(self, param: int) -> bool:
        """Whether a gradient waits for a round."""

    def reduce(self) -> None:
        """Make a round that the ranks have agreed on, with what is unreduced on this rank. Collective."""

    @property
    def problem(self) -> str | None:
        """Why the gradients cannot be used, None if they can."""


class Agreement:
    """Checks that the ranks do the same thing in the same way.

    Attributes:
        steps: how many steps have been made.
    """

    def __init__(self, opt: _BaseOptimizer, ranks: Ranks, buffers: Buffers) -> None:
        self._opt, self._ranks, self._buffers = opt, ranks, buffers
        self.steps = 0

    def stepping(self) -> list[bool]:
        """For each parameter whether it steps if it has a gradient."""
        specs = self._buffers.layout.params
        return [self._opt.steps_on(spec.group, p) for spec, p in zip(specs, self._buffers.params, strict=True)]

    def settle(self, place: Place, gradients: Waiting, problem: str | None = None) -> list[int]:
        """The parameters that step now, once all ranks are at `place` and no gradient is left to be reduced.

        Rounds of ranks that are still in a backward pass are joined. `problem` is why this rank cannot go on.
        """
        while True:
            stepping = self.stepping()
            has = [steps and gradients.has(i) for i, steps in enumerate(stepping)]
            waiting = any(steps and gradients.unreduced(i) for i, steps in enumerate(stepping))
            in_round, any_waiting, any_has = self._ask(place, stepping, has, waiting, problem or gradients.problem)
            if not in_round and not any_waiting:
                return [i for i, there in enumerate(any_has) if there]
            gradients.reduce()

    def start_round(self, problem: str | None) -> None:
        """Check in a backward pass that every rank reduces the same buckets. Hypers may still change until the step."""
        self._ask("backward", self.stepping(), [False] * len(self._buffers.params), False, problem)

    def _ask(
        self, place: Place, stepping: list[bool], has: list[bool], waiting: bool, problem: str | None
    ) -> tuple[bool, bool, list[bool]]:
        """Whether any rank is in a backward pass, whether any has gradients to reduce, and which gradients any has."""
        groups = range(len(self._opt.param_groups))
        problem = self._misuse() or problem
        frozen = [self._opt.is_frozen(i) for i in groups]
        hypers = [self._hypers(i) for i in groups]
        undecayed = [self._opt.state.get(p, {}).get("do_wd", True) for p in self._buffers.params]

        def report() -> dict[str, Any]:
            told: dict[str, Any] = {"problem": problem} if problem else {}
            told["where they are"] = f"{place}, after {self.steps} steps"
            for i, values in enumerate(hypers):
                told[f"group {i}"] = "frozen" if frozen[i] else "not frozen"
                told.update({f"hyper {name!r} of group {i}": value for name, value in values})
            for i, spec in enumerate(self._buffers.layout.params):
                told[f"whether {spec.name!r} steps"] = stepping[i]
                told[f"do_wd of {spec.name!r}"] = undecayed[i]
            return told

        facts = (problem, self.steps, frozen, stepping, undecayed)
        at = [place == each for each in PLACES]
        heard = agree(self._ranks, facts, [*at, waiting, *has, *both_ways(hypers)], report)
        in_round, clipping, in_step, any_waiting = map(bool, heard[:4])
        same_hypers = equal_everywhere(heard[-BOTH_WAYS:]) or in_round
        if (clipping and in_step) or not same_hypers:
            disagree(self._ranks, report())
        if problem:
            raise RuntimeError(problem)
        return in_round, any_waiting, [bool(each) for each in heard[4:-BOTH_WAYS]]

    def _hypers(self, group: int) -> list[tuple[str, Any]]:
        """The hypers of a group as they are compared and shown."""
        values = sorted(self._opt.hypers_of(group).items())
        return [(name, value.tolist() if isinstance(value, Tensor) else value) for name, value in values]

    def _misuse(self) -> str | None:
        """What has been done to the parameters that sharding cannot follow."""
        displaced = self._buffers.displaced()
        if displaced:
            return (
                f"the memory of {', '.join(map(repr, displaced[:5]))} was replaced after shard() (p.data = ..., "
                f"model.to(...)): move the model before sharding, and write into parameters with copy_"
            )
        sizes = [len(group["params"]) for group in self._opt.param_groups]
        count = Counter(spec.group for spec in self._buffers.layout.params)
        known = [count[i] for i in range(len(sizes))]
        if sizes != known:
            return f"the groups had {known} parameters when they were sharded and have {sizes}: use add_param_group"
        return None
