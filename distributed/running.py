"""How a sharded optimizer runs its chain: on slices of parameters, or on the whole ones that a rank owns."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..engine import Choice, Engine, GroupWork, Needs, Reduce, chain_needs, undeclared
from ..spread import Sharers, is_spread, part_of, show
from ..state import ParamState
from .gradients.local_gradients import Gradients
from .ownership.tensor_parallel import Spread
from .parameters.buckets import KEPT
from .state.holding import HoldsParts

_Sliced = tuple[ParamState, int, list[tuple[int, list[Tensor], list[Any]]]]


class RunsParts(HoldsParts):
    """An optimizer that steps the part of each rank."""

    _gradients: Gradients
    _spread: Spread
    _engines: dict[Sharers, Engine]
    _sliced: dict[tuple[int, ...], _Sliced]

    @property
    def engine(self) -> tuple[Choice, ...]:
        """Which executor runs each group on this rank, and why."""
        if self.layout.kind == "whole":
            return self.opt.engine
        work = self._slices(range(len(self.layout.params)))
        return self.opt.runner.choices(self.cbs, work, recorded=self._only_recorded)

    @property
    def needs(self) -> Needs:
        """What the chain must see of a parameter, see `Optimizer.needs`; `'whole'` in a layout of whole parameters."""
        if self.layout.kind == "whole":
            return "whole"
        return self.opt.runner.needs(self.cbs, self._slices(range(len(self.layout.params))))

    @property
    def _separable(self) -> bool:
        """Whether the chain steps each parameter without a look at others."""
        if self.layout.kind == "whole":
            return not any(hasattr(cb, "step_all") for cb in self.cbs)
        return chain_needs(self.cbs) == "elementwise"

    @property
    def _beside(self) -> bool:
        """Whether a step may go beside what the model does next: it runs kernels of the engine, on numbers."""
        tensors = any(isinstance(value, Tensor) for group in self.param_groups for value in group.values())
        return self.opt.runner.recorded and self._separable and not tensors

    def _run(self, stepping: Sequence[int], part: int) -> None:
        """Run the chain on what this rank owns of some parameters."""
        if self.layout.kind == "whole":
            self._run_whole(stepping, part)
        else:
            self._run_slices(stepping, part)

    def _run_slices(self, stepping: Sequence[int], part_of_step: int) -> None:
        """Run the chain on this rank's slices, empty ones too: states and their keys are then alike on all ranks."""
        parts = [self._buffers.slice(i) for i in stepping]
        for part, grad in zip(parts, self._gradients.slices(stepping), strict=True):
            self._give(part, torch.zeros_like(part) if grad is None else grad)
        recorded = self._only_recorded
        try:
            if not recorded and chain_needs(self.cbs) != "norm":
                self.opt.run(self._slices(stepping), part=part_of_step)
                return
            for sharers, some in self._spread.split(stepping).items():
                engine, work = self._engine_for(sharers), self._slices(some)
                reduce = self._reduce(sharers)
                self.opt.run_tensors(work, reduce, recorded=recorded, engine=engine, part=part_of_step)
        finally:
            for part in parts:
                part.grad = None

    def _engine_for(self, sharers: Sharers) -> Engine:
        """The optimizer's own engine for the first parameters, one more for each further set of sharers."""
        if sharers not in self._engines:
            new = Engine(self.opt.runner.name, self.opt.master_weights) if self._engines else self.opt.runner
            self._engines[sharers] = new
        return self._engines[sharers]

    def _run_whole(self, stepping: Sequence[int], part_of_step: int) -> None:
        """Run the chain on the parameters that this rank owns."""
        work, before = [], []
        for group, members in self._by_group([i for i in stepping if self.layout.owner(i) == self.rank]):
            params = [self._buffers.params[i] for i in members]
            for p, grad in zip(params, self._gradients.slices(members), strict=True):
                before.append((p, p.grad))
                self._give(p, torch.zeros_like(p) if grad is None else show(p, grad.view(part_of(p).shape)))
            work.append(self._work(group, members, params))
        try:
            if work:
                self.opt.run(work, part=part_of_step)
        finally:
            for p, grad in before:
                p.grad = None
                if p.grad_dtype != p.dtype:
                    p.grad_dtype = p.dtype
                p.grad = grad

    def _give(self, p: Tensor, grad: Tensor) -> None:
        """Make `grad` the gradient of `p`. More precise sums stay so where the chain steps on a master copy."""
        if grad.dtype == p.dtype:
            p.grad = grad
        elif not self.opt.master_weights or is_spread(p):
            p.grad = grad.to(p.dtype)
        else:
            p.grad_dtype = None
            p.grad = grad

    def _slices(self, params: Iterable[int]) -> list[GroupWork]:
        """The work on this rank's slices of `params`."""
        key, changes = tuple(params), self.state.changes
        known = self._sliced.get(key)
        if known is None or known[0] is not self.state or known[1] != changes:
            if len(self._sliced) >= 4 * KEPT:
                self._sliced.clear()
            found = []
            for group, members in self._by_group(key):
                states = [self.state[self._buffers.params[i]] for i in members]
                found.append((group, [self._buffers.slice(i) for i in members], states))
            known = self._sliced[key] = self.state, changes, found
        return [self.opt.group_work(group, slices, states) for group, slices, states in known[2]]

    @property
    def _only_recorded(self) -> bool:
        """Whether the chain may step slices only because its recording says so: not all cbs declare what they need."""
        return self.layout.kind == "even" and bool(undeclared(self.cbs))

    def _not_recorded(self, stepping: Iterable[int]) -> str | None:
        """Why the chain cannot step slices now although its first recording could; None if it can."""
        why = self.opt.runner.not_on_slices(self.cbs, self._slices(stepping))
        return why and (
            f"this step cannot be made on slices of parameters: {why}. What {', '.join(undeclared(self.cbs))} must see "
            f"of a parameter was found by recording, which now fails: declare it (cb.needs = 'elementwise', 'norm' or "
            f"'whole'), or pass shard(..., layout='whole')"
        )

    def _by_group(self, stepping: Iterable[int]) -> list[tuple[int, list[int]]]:
        """The parameters `stepping` by group."""
        groups: dict[int, list[int]] = {}
        for i in stepping:
            groups.setdefault(self.layout.params[i].group, []).append(i)
        return sorted(groups.items())

    def _work(self, group: int, members: list[int], tensors: list[Tensor]) -> GroupWork:
        return self.opt.group_work(group, tensors, [self.state[self._buffers.params[i]] for i in members])

    def _reduce(self, sharers: Sharers) -> Reduce | None:
        """Sums partial sums over the ranks, and over those that share parameters beside them; None if all is here."""
        if self._ranks.alone and not sharers:
            return None
        device = next((p.device for p in self._buffers.params), torch.device("cpu"))
        return lambda partial: self._spread.sum(self._ranks.sum(partial.to(device)), sharers).to(partial.device)
