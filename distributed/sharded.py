"""The optimizer that `shard` makes: the user's chain on the slices that this rank owns."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, NoReturn

import torch
from torch import Tensor, nn

from ..base import outside_compile
from ..checks import check_clip
from ..engine import Engine
from ..optimizer import Optimizer
from ..spread import Sharers, part_of, part_of_grad
from ..state import ParamState
from .around import take_in
from .checks.agreement import Agreement
from .checks.consistency import agree_fully
from .checks.diverged import LOADED, refuse_diverged, state_numbers
from .checks.other_dimensions import Along
from .communication.collectives import Ranks
from .communication.lane import Lane
from .gradients.clipping import teach_clipping
from .gradients.grad_scaler import Found, teach_grad_scaler, unscale
from .gradients.in_backward import InBackward, refused
from .gradients.local_gradients import Gradients, LocalGradients
from .gradients.norm import clip_factor, total_norm
from .gradients.zero_grad import teach_module
from .ownership.layout import Layout
from .ownership.places import ParamSpec
from .ownership.tensor_parallel import Spread
from .parameters.buckets import Buffers
from .parameters.gathering import Gathering
from .parameters.lookup import Lookup
from .parameters.members import about_groups, specs_of
from .parameters.readers import teach_modules_and_averages
from .pipeline import Pipeline
from .reduced import ReducedGradients
from .running import RunsParts

StateDict = dict[str, Any]


class ShardedOptimizer(RunsParts):
    """An optimizer whose state is spread over the ranks of a process group. Made by `fastopt.distributed.shard`.

    `param_groups`, `hypers`, freezing and `set_hyper` are those of the optimizer it was made from (`opt.opt`): all
    parameters, on every rank. `opt.state[p]` is this rank's part: 1-d slices of what is shaped like `p`, and all of the
    rest. Every rank must make the same calls with the same hyper-parameters; `step` checks that they do.

    In stage 2 a gradient leaves `p.grad` as soon as it is made, and `step` uses it up.
    """

    #: What a step on a parameter costs, see `shard`.
    cost: Callable[[Tensor], float] | None = None
    #: Whether parameters come back under the next forward pass; False lets `step` wait for them.
    overlap: bool = True
    #: Compares hypers with the ranks that share parameters beside those of `shard`.
    along: Along = Along()

    def __init__(
        self,
        opt: Optimizer,
        model: nn.Module,
        ranks: Ranks,
        layout: Layout,
        params: Sequence[Tensor],
        stage: Literal[1, 2],
        reduce_dtype: torch.dtype | None = None,
        step_in_backward: bool = False,
        check_gradients: bool = True,
    ) -> None:
        torch.optim.Optimizer.__init__(self, [{"params": []}], opt.defaults)
        self.opt = opt
        self.model = model
        self.stage = stage
        self._ranks = ranks
        self._lane = Lane.beside(params) if stage == 2 and ranks.world_size > 1 else Lane(None)
        self._buffers = Buffers(layout, ranks.rank, params, ranks.transport)
        self._agreement = Agreement(self, ranks, self._buffers)
        self._consolidated = None
        self._sliced: dict[tuple[int, ...], tuple[ParamState, int, list[tuple[int, list[Tensor], list[Any]]]]] = {}
        self._index = {id(p): i for i, p in enumerate(params)}
        self._spread = Spread(params)
        self._engines: dict[Sharers, Engine] = {}
        for flat in self._buffers.buckets:
            ranks.broadcast(flat.flat)
        self._gradients: Gradients = (
            LocalGradients(ranks, self._buffers, self._agreement, check_gradients)
            if stage == 1
            else ReducedGradients(ranks, self._buffers, self._agreement, reduce_dtype, self._lane)
        )
        self._gathering = Gathering(ranks, self._buffers, model, averages=stage == 2, on_load=self._note_load)
        self._lookup = Lookup(model, self._buffers)
        self._pipeline = Pipeline(self._lane, self._buffers, self._gradients, self._gathering, self._run)
        self._in_backward: InBackward | None = None
        if step_in_backward and isinstance(self._gradients, ReducedGradients):
            about = self._lane, self._buffers, self._gathering, self._agreement
            self._in_backward = InBackward(*about, self._run, lambda: self._beside)
            self._gradients.in_backward = self._in_backward
        self._keep_own_state()
        teach_grad_scaler()
        teach_modules_and_averages()
        teach_module(self if stage == 2 else None)
        if stage == 2:
            teach_clipping(self)
        take_in(opt, with_gradients=stage == 2)

    # ---- stepping

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient on any rank and is not frozen. Collective.

        Args:
            closure: computes the loss anew and returns it; called once, with gradients enabled, before anything else.

        Returns:
            What `closure` returned, None without one.

        Raises:
            RanksDiffer: on all ranks, before anything moves, if hyper-parameters or freezing differ between ranks, or
                in stage 1 gradients that nobody has averaged.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._step_slices()
        return loss

    @outside_compile
    @torch.no_grad()
    def _step_slices(self) -> None:
        if self._in_backward is not None:
            self._in_backward.check()
            stepping = self._gradients.settle("step")
            self._look_up(stepping)
            self._gathering.begun()
        else:
            stepping = self._gradients.settle("step")
            if self._agreement.unsure:
                self._compare_loaded()
            self._look_up(stepping)
            if self._only_recorded or (self.stage == 2 and self._agreement.late):
                problem = self._not_recorded(stepping) if self._only_recorded else None
                self._agreement.ask("step", False, problem)
            self._pipeline.step(stepping, self._separable, self._beside)
        self._note_changed(stepping)
        self._gradients.consumed()
        self._consolidated = None
        self._agreement.stepped()
        if self.along.groups:
            self.along.stepped(self._agreement.used(), self._agreement.settings)
        if not self.overlap:
            self.synchronize()
        self.opt._opt_called = True  # type: ignore[attr-defined]  # what a scheduler built on it looks for

    def _note_changed(self, stepping: Sequence[int]) -> None:
        """Let autograd refuse a backward pass through what was computed before, which would read the new values."""
        changed = [self._buffers.params[i] for i in stepping]
        parts = map(part_of, changed) if self._spread.groups else ()
        torch.autograd.graph.increment_version([*changed, *parts])

    def _look_up(self, stepping: Sequence[int]) -> None:
        """Raise if a parameter without a gradient has been replaced in the model, now or (on this rank only) later."""
        if len(stepping) < len(self._agreement.stepping()):
            self._lookup.idle(self._agreement.stepping().difference(stepping))
        if self._gradients.lacking:
            self._agreement.found = self._agreement.found or self._lookup.lacking(self._gradients.lacking)

    def _compare_loaded(self) -> None:
        """Compare what some rank has loaded. Collective."""
        self.synchronize()
        names = {id(p): spec.name for spec, p in zip(self.layout.params, self._buffers.params, strict=True)}
        tensors = {f"parameter {names[id(p)]!r}": part_of(p).detach() for p in self._buffers.params}
        numbers = state_numbers(self.state, names) if self.layout.kind == "even" else {}
        refuse_diverged(self._ranks.gather_everywhere, numbers, tensors, LOADED)
        self._agreement.unsure = False

    def prepare_replay(self) -> NoReturn:
        """Refuse: a sharded step is no sequence of kernels alone.

        Raises:
            RuntimeError: always.
        """
        raise RuntimeError(
            "a sharded step agrees with other ranks on the host, which no CUDA graph can capture: capture the forward "
            "and the backward pass, or use fully_shard, whose optimizer needs no shard()"
        )

    def synchronize(self) -> None:
        """Wait until the parameters that the last step has moved are complete on this rank.

        Modules of the model wait by themselves when they are called, and so do `model.parameters()`,
        `model.state_dict()`, `model.load_state_dict()`, copying or pickling a module, `AveragedModel`, freezing and the
        next step. Call this before anything else reads or writes a parameter, such as a function that is given
        `layer.weight`, or a loop over the groups of an optimizer; or pass `shard(..., overlap=False)`.
        """
        self._gathering.synchronize()

    def _freeze_group(self, i: int, frozen: bool | str) -> None:
        self.synchronize()  # a change of freezing is when DistributedDataParallel is built anew, which reads parameters
        super()._freeze_group(i, frozen)

    # ---- gradients

    def zero_grad(self, set_to_none: bool | None = None) -> None:
        """Drop or zero the gradients, reduced ones too. See `Optimizer.zero_grad`.

        Raises:
            RuntimeError: the step has been made in backward and `step` has not been called.
        """
        self._refuse_before_step("zero_grad()")
        super().zero_grad(set_to_none)
        self._gradients.clear()

    def holds_only(self, params: set[int]) -> bool:
        """Whether all its parameters are among `params`, given by their ids."""
        return self._index.keys() <= params

    def forget_gradients(self) -> None:
        """Drop reduced gradients, which are not in `p.grad`; `model.zero_grad()` calls it, see zero_grad.py."""
        self._refuse_before_step("zero_grad()")
        self._gradients.clear()

    @property
    def taken(self) -> bool:
        """Whether this rank holds reduced gradients, which are not in `p.grad`."""
        return self._gradients.taken

    def has_taken(self, params: Iterable[Tensor]) -> bool:
        """Whether this rank holds reduced gradients, and any of `params` that is among its own has none in `p.grad`."""
        return self._gradients.taken and any(p.grad is None and id(p) in self._index for p in params)

    def _refuse_before_step(self, what: str) -> None:
        """Raise if the step has been made in backward and `step` has not been called."""
        if self._in_backward is not None and self._in_backward.stepped and not self._gradients.in_round:
            raise refused(f"{what} before opt.step()", "Call opt.step() after every synchronised backward pass")

    def no_sync(self) -> AbstractContextManager[None]:
        """Gradients of backward passes inside stay local and add up in `p.grad`; the next pass outside reduces them.

        In stage 1 reducing is up to the model (use DistributedDataParallel's own `no_sync`), and this does nothing.
        """
        if isinstance(self._gradients, ReducedGradients):
            return self._gradients.paused()
        return contextlib.nullcontext()

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients so that the norm of all of them together is at most `max_norm`. Collective.

        Gradients of frozen parameters do not count. A parameter without a gradient on this rank counts as zero here.

        Returns:
            The norm before clipping, of the averaged gradients, a 0-d tensor.

        Raises:
            TypeError, ValueError: `max_norm` is no number from 0 on, or `norm_type` not positive.
            RuntimeError: the optimizer steps in backward.
        """
        check_clip(max_norm, norm_type)
        if self._in_backward is not None:
            raise refused("clip_grad_norm_()", "Bound what the step does in the chain")
        present = self._gradients.settle("clip_grad_norm_")
        device = next((p.device for p in self._buffers.params), torch.device("cpu"))
        with self._lane.inside():
            parts = self._by_sharers(present, self._gradients.held(present))
            total = total_norm(parts, float(norm_type), self._ranks, self._spread, device).float()
            self._gradients.scale(present, clip_factor(total, max_norm))
        return self._lane.bring(total)

    def _by_sharers(self, present: Sequence[int], held: list[Tensor]) -> dict[Sharers, list[Tensor]]:
        """This rank's gradients by the process groups that share them: all of `held`, where nobody does."""
        if not self._spread.groups:
            return {(): held}
        split = self._spread.split(present)
        slices = {sharers: self._gradients.slices(some) for sharers, some in split.items()}
        return {sharers: [part for part in some if part is not None] for sharers, some in slices.items()}

    @torch.no_grad()
    def unscale_grads_(self, inv_scale: Tensor, found_inf: Tensor, in_place: Callable[[], Found]) -> Found:
        """What `GradScaler.unscale_` calls, see grad_scaler.py. Collective: an inf on one rank is one on all."""
        if self._in_backward is not None:
            raise refused("GradScaler, which unscales gradients and skips steps,", "Train in bfloat16 without a scaler")
        active = self._gradients.settle("unscale_")
        with self._lane.inside():
            if self.stage == 2:
                found = unscale(self._gradients.held(active), inv_scale, found_inf)
            elif self._spread.groups:
                grads = [grad for p in self._buffers.params if (grad := part_of_grad(p)) is not None]
                found = unscale(grads, inv_scale, found_inf)
            else:
                found = torch.stack([found_inf, *(f.to(found_inf.device) for f in in_place().values())]).amax(0)
            found = self._spread.largest(self._ranks.largest(found), self._spread.groups)
        return {found.device: self._lane.bring(found)}

    # ---- state and groups

    def _note_load(self) -> None:
        self._agreement.loaded = True

    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over state, hyper-parameters and freezing, see `HoldsParts.load_state_dict`.

        Raises:
            RuntimeError: the step has been made in backward and `step` has not been called.
            ValueError: groups, members, names, shapes or pieces differ from what this rank holds.
        """
        self._refuse_before_step("load_state_dict()")
        self._agreement.loaded = True
        super().load_state_dict(state_dict)

    def clear_state(self) -> None:
        """Forget all training state; the marks `force_train` and `do_wd` stay.

        Raises:
            RuntimeError: the step has been made in backward and `step` has not been called.
        """
        self._refuse_before_step("clear_state()")
        self._agreement.loaded = True
        super().clear_state()

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; its parameters get buckets of their own. Collective. They must be in the model."""
        if self._within is None:
            return
        index = len(self.param_groups)
        params: list[Tensor] = []
        specs: list[ParamSpec] = []
        problem: Exception | None = None
        try:
            self.opt.add_param_group(param_group)
            params = list(self.param_groups[index]["params"])
            specs = [spec for spec in specs_of(self, self.model, self._ranks, self.cost) if spec.group == index]
            report = about_groups(self.opt, specs)
        except Exception as error:
            problem, report = error, {"problem": str(error)}
        try:
            agree_fully(self._ranks, report)
            if problem:
                raise problem
        except Exception:
            del self.param_groups[index:]
            raise
        self._extend(self.layout.extended(specs), params)

    def _extend(self, layout: Layout, params: Sequence[Tensor]) -> None:
        """Take in the parameters of a new group."""
        self.synchronize()
        first = len(self._buffers.buckets)
        self._index.update({id(p): len(self._buffers.params) + j for j, p in enumerate(params)})
        self._buffers.extend(layout, params)
        self._spread.extend(params)
        if self._spread.groups != self.along.groups:
            self.along = Along(self._spread.groups)
        for flat in self._buffers.buckets[first:]:
            self._ranks.broadcast(flat.flat)
        self._gradients.watch()
        self._gathering.watch()
        self._pipeline.grown()
        self._sliced.clear()
        self._agreement.grown(len(params))
