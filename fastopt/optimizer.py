"""The optimizer: a chain of callbacks that steps the parameters of its groups."""

from __future__ import annotations

import difflib
import warnings
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from .base import _BaseOptimizer, outside_compile, tensors_of
from .capturable import CAPTURABLE, Counted, check_capturable, counts_to_device, on_device
from .checks import check_clip
from .engine import Choice, Engine, GroupWork, Needs, Programs, Reduce, chain_defaults, keywords, requested, undeclared
from .groups import check_groups, collect_groups
from .hypers import Group, group_values, pytorch_hp_map
from .norms import grad_norm
from .parts import Parts, any_spread, part_work
from .pieces import Pieces
from .spread import take
from .state import ParamState, warn_of_states_left
from .state_dict import load_state_dict, make_state_dict
from .watched import Watch, Watched

StateDict = dict[str, Any]


class Optimizer(_BaseOptimizer):
    """Updates `params` with a chain of callbacks.

    Args:
        params: a tensor, tensors, `(name, tensor)` pairs, or groups of those as lists or as torch's dicts.
        cbs: one callback or several, called in order for each parameter that has a gradient as
            `cb(p, **state_of_p, **hypers_of_its_group)`; a returned dict is merged into the state.
        train_bn: kept for the reader of `opt.train_bn`; what trains is decided by `force_train`.
        engine: executor to run the chain with; by default the best one there is (see `opt.engine`).
        master_weights: step on a float32 copy of each parameter in bfloat16 or float16, kept as `master` in its state,
            and write the rounded result to the parameter. The copy is made at the first step: to set a parameter by
            hand after that, remove its `master` too.
        capturable: count steps on the device, so that a step captured in a CUDA graph is right when it is replayed
            without `prepare_replay`. A learning rate that moves is then a 0-d tensor on the device, `fill_`ed. Costs a
            launch per step. Kept in the groups, where it may also stand by itself.
        **defaults: hyper-parameters, over those in the callbacks' `defaults`: one number, one per group, or a slice.

    Raises:
        TypeError, ValueError: parameters, groups or hyper-parameters that cannot be used, named in the message.

    Examples:
        >>> import torch
        >>> from fastopt import Optimizer, sgd_step
        >>> p, q = torch.ones(2), torch.ones(2)
        >>> p.grad = q.grad = torch.tensor([1.0, 2.0])
        >>> opt = Optimizer([[p], [q]], sgd_step, lr=slice(0.1, 0.2))
        >>> opt.step()
        >>> p, q
        (tensor([0.9000, 0.8000]), tensor([0.8000, 0.6000]))
    """

    _kept: ClassVar[tuple[str, ...]] = (
        "_freeze_to",
        "cbs",
        "train_bn",
        "master_weights",
        "_engine",
        "_warned_momentum",
    )
    _warned_momentum = False
    _replaced = 0
    _counted: Counted | None = None
    cbs: tuple[Callable[..., Any], ...]

    def __init__(
        self,
        params: Any,
        cbs: Callable[..., Any] | Iterable[Callable[..., Any]] | None,
        train_bn: bool = True,
        *,
        engine: str | None = None,
        master_weights: bool = False,
        capturable: bool = False,
        **defaults: Any,
    ) -> None:
        self.cbs = _as_chain(cbs)
        self.train_bn, self.master_weights = train_bn, master_weights
        self._engine = engine
        requested(engine)
        groups = collect_groups(params)
        if capturable is not False:
            defaults[CAPTURABLE] = capturable
        hypers = {**chain_defaults(self.cbs), **self._names.to_hypers(defaults)}
        self._warn_of_typos(defaults)
        values = {name: group_values(name, value, len(groups)) for name, value in hypers.items()}
        # a group added later takes the last group's value: it is a new head more often than a new stem
        last = {name: per_group[-1] for name, per_group in values.items()}
        stored_defaults = self._names.to_stored(last, {})
        for i, group in enumerate(groups):
            own = {name: per_group[i] for name, per_group in values.items()}
            group.update(self._complete(group, self._names.to_stored(own, {})))
        super().__init__(groups, stored_defaults)
        self.state = ParamState()

    def _complete(self, group: Group, defaults: Group) -> Group:
        """`group` in stored names, with `defaults` where it says nothing itself. Empties what it takes from `group`."""
        own = {k: group.pop(k) for k in list(group) if k not in ("params", "param_names")}
        complete = {**defaults, **self._names.to_stored(own, defaults)}
        check_capturable(complete)
        self._warn_of_unread(complete)
        return complete

    def _warn_of_unread(self, group: Group) -> None:
        """Say so where a group has a hyper under PyTorch's name while callbacks ask for it under the other one only."""
        unread = [(key, name) for key, name in pytorch_hp_map.items() if key in group and key not in self.hp_map]
        asked = {argument for cb in self.cbs for argument in keywords(cb)} if unread else set()
        for key, name in unread:
            if name in asked and key not in asked:
                warnings.warn(
                    f"{key}={group[key]!r} has no effect: the callbacks ask for {name!r}. Pass it as {name!r}, "
                    f"or build the optimizer in a class that has hp_map = {{{key!r}: {name!r}}}",
                    stacklevel=4,
                )

    def _warn_of_typos(self, given: Iterable[str]) -> None:
        """Say so where a hyper that no callback asks for is spelled nearly like one that some do."""
        asked = {argument for cb in self.cbs for argument in keywords(cb)}
        for name in given:
            near = difflib.get_close_matches(name, asked, n=1, cutoff=0.8) if name not in {*asked, *self.hp_map} else []
            if near and near[0] not in given:
                warnings.warn(f"no callback asks for {name!r}, did you mean {near[0]!r}?", stacklevel=3)

    @outside_compile
    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add one group, `{'params': ..., 'lr': ...}`; hyper-parameters that it lacks take the optimizer's defaults."""
        if not isinstance(param_group, Mapping):
            raise TypeError(f"a parameter group is a dict with 'params', got a {type(param_group).__name__}")
        (group,) = collect_groups([dict(param_group)])
        group.update(self._complete(group, self.defaults))
        self._check_group(group, len(self.param_groups))
        check_groups([*self.param_groups, group])
        self.param_groups.append(Watched(self._watch, group))

    @property
    def _watch(self) -> Watch:
        """Counts the changes of the groups."""
        if "_watch_of_groups" not in self.__dict__:
            self._watch_of_groups = Watch()
        return self._watch_of_groups

    def _watch_groups(self) -> None:
        """Let all groups count their changes."""
        for i, group in enumerate(self.param_groups):
            if not isinstance(group, Watched) or group.watch is not self._watch:
                self.param_groups[i] = Watched(self._watch, group)

    @property
    def needs(self) -> Needs:
        """What the chain must see of a sharded parameter: `'elementwise'`, `'norm'` or `'whole'`.

        The callbacks declare it. Those that do not are recorded, with the present hyper-parameters, and it follows from
        what they do; whole parameters are for what cannot be recorded.
        """
        return self.runner.needs(self.cbs, part_work(self._everything()))

    @property
    def engine(self) -> tuple[Choice, ...]:
        """Which executor runs each group, and why: `eager` where a callback cannot be recorded."""
        work = self._everything()
        if not any_spread(work):
            return self.runner.choices(self.cbs, work)
        if self.needs == "whole":
            return tuple(Choice(w.index, "eager", "it needs whole parameters, and these are DTensors") for w in work)
        return self.runner.choices(self.cbs, part_work(work), recorded=bool(undeclared(self.cbs)))

    def program(self) -> Programs:
        """What the chain has been recorded as in the steps so far; print it to see what runs."""
        return Programs(self.runner.programs())

    @outside_compile
    @torch.no_grad()
    def prepare_replay(self) -> None:
        """Bring the hyper-parameters and step counts of the next step to the GPU, before a CUDA graph replays a step.

        After a few ordinary steps capture one with `torch.cuda.graph`, which changes nothing. From then on
        `opt.prepare_replay(); graph.replay()` makes a step. Gradients must stay where they were. Parameters may be
        DTensors, whose gradients must be placed as they are.

        Raises:
            RuntimeError: no graph has captured a step, or this one runs other kernels (RAdam's first steps, Lookahead's
                k-th, another group frozen).
        """
        if self._repeat(launch=False):
            return
        work = list(self._work())
        if any_spread(work):
            self._parts.run(self, work, launch=False)
        else:
            self.runner.prepare_replay(self.cbs, work)

    @property
    def runner(self) -> Engine:
        """What records and runs the chain of this optimizer."""
        if "_made_runner" not in self.__dict__:
            self._made_runner = Engine(self._engine, self.master_weights)
        return self._made_runner

    @property
    def _parts(self) -> Parts:
        """What steps parameters that are DTensors."""
        if "_made_parts" not in self.__dict__:
            self._made_parts = Parts()
        return self._made_parts

    def _everything(self) -> list[GroupWork]:
        """The work if all parameters had gradients."""
        work = []
        for i, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if isinstance(p, Tensor)]
            work.append(self.group_work(i, params, [self.state[p] for p in params]))
        return work

    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update every parameter that has a gradient and is not frozen.

        Args:
            closure: computes the loss anew and returns it; called once, with gradients enabled, before anything else.

        Returns:
            What `closure` returned, None without one.
        """
        return self._step(closure)

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        loss = _evaluate(closure)
        self._step_groups()
        return loss

    @outside_compile
    def _step_groups(self) -> None:
        """Step everything that has a gradient and is not frozen."""
        if not self._repeat(launch=True):
            self._step_anew()

    @torch.no_grad()
    def _step_anew(self) -> None:
        """Step whatever is there now, like the last step or not."""
        state = self.state if isinstance(self.state, ParamState) else None
        reads = 0 if state is None else state.reads
        replaced = self._watch.written.get("params", 0)
        if replaced != self._replaced:
            self._replaced = replaced
            warn_of_states_left(self.param_groups, self.state)
        work = list(self._work())
        if any(isinstance(value, str) for group in self.param_groups for value in group.values()):
            self._check_all_hypers()  # before the groups ahead of it have stepped
        try:
            self.run(work)
        except TypeError:
            self._check_all_hypers()  # what schedulers and others wrote into the groups
            raise
        self._counted = counts_to_device(work, self.state, self._counted)
        if state is not None and not any_spread(work):
            self.runner.expect(self.param_groups, state, list(self._idle()))
            state.own_reads += (state.reads - reads) * self.runner.recorded

    def _check_all_hypers(self) -> None:
        """Raise if a hyper of any group cannot be one."""
        for i, group in enumerate(self.param_groups):
            self._check_group(group, i)

    def _repeat(self, launch: bool) -> bool:
        """Make a step that is like the last one, with kernels or without; tells whether it was made."""
        state = self.state
        if not isinstance(state, ParamState):  # somebody has put another mapping in its place
            return False
        reads = state.reads
        made = self.runner.repeat(self.cbs, self.param_groups, state, self._hypers_to_run, self._new_hypers, launch)
        state.own_reads += state.reads - reads  # no cb was called
        return made

    def _work(self) -> Iterator[GroupWork]:
        """The groups with the parameters that step now."""
        for i, group in enumerate(self.param_groups):
            params = [p for p in group["params"] if getattr(p, "grad", None) is not None and self.steps_on(i, p)]
            if params:
                yield self.group_work(i, params, [self.state[p] for p in params])

    def _idle(self) -> Iterator[Tensor]:
        """The parameters that would step if they had gradients."""
        for i, group in enumerate(self.param_groups):
            yield from (p for p in tensors_of(group) if p.grad is None and self.steps_on(i, p))

    def group_work(self, i: int, params: list[Tensor], states: list[Any]) -> GroupWork:
        """The work of group `i` on `params` (its parameters or slices of them) with their live `states`."""
        return GroupWork(i, self.param_groups[i], self._hypers_to_run(i), params, states)

    @outside_compile
    @torch.no_grad()
    def run(
        self, work: list[GroupWork], reduce: Reduce | None = None, *, recorded: bool = False, part: Hashable = None
    ) -> None:
        """Run the chain on `work`, which may be slices of parameters; `reduce` then sums over the processes.

        Args:
            work: the tensors to step.
            reduce: see `run_eager`.
            recorded: refuse to run anything as it is, see `Engine.run`.
            part: which part of a step this is, where it is made in several, see `Engine.run`.
        """
        if any_spread(work):
            self._parts.run(self, work)
        else:
            self.run_tensors(work, reduce, recorded=recorded, part=part)

    def run_tensors(
        self,
        work: list[GroupWork],
        reduce: Reduce | None = None,
        *,
        recorded: bool = False,
        engine: Engine | None = None,
        part: Hashable = None,
    ) -> None:
        """As `run`, where DTensors are no more than tensors with rules of their own; `engine` instead of the usual."""
        (engine or self.runner).run(self.cbs, work, reduce, recorded=recorded, part=part)

    @torch.no_grad()
    def clip_grad_norm_(self, max_norm: float, norm_type: float = 2.0) -> Tensor:
        """Scale the gradients of all parameters that step so that their norm together is at most `max_norm`.

        Parameters may be DTensors: the norm is that of whole gradients, at the price of one small all-reduce for each
        dimension of a mesh that cuts them. Gradients of frozen parameters do not count.

        Returns:
            The norm before clipping, a 0-d tensor on the device of the gradients.

        Raises:
            TypeError, ValueError: `max_norm` is no number from 0 on, or `norm_type` not positive.
        """
        check_clip(max_norm, norm_type)
        stepping = [p for i, group in enumerate(self.param_groups) for p in group["params"] if self.steps_on(i, p)]
        total, grads = grad_norm([p for p in stepping if isinstance(p, Tensor)], float(norm_type))
        factor = (max_norm / (total + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(factor.to(grad.device))
        return total.float()

    def _hypers_to_run(self, i: int) -> dict[str, Any]:
        """The hypers of group `i` for a step."""
        hypers = self.hypers_of(i)
        self._warn_of_ignored_momentum(hypers)
        return hypers

    def _new_hypers(self, keys: Sequence[str | None]) -> dict[str, list[Any]] | None:
        """The hypers of all groups that entries `keys` hold, None if one has to look at the groups one by one."""
        return None if "momentum" in keys else self._names.columns(self.param_groups, keys)

    def _warn_of_ignored_momentum(self, hypers: Mapping[str, Any]) -> None:
        """Say once that a momentum set later has no effect on a chain that was built without (mom=0)."""
        if self._warned_momentum or "momentum" not in self.hp_map or hypers.get("mom", 0) == 0:
            return
        if not any("mom" in keywords(cb) or hasattr(cb, "step_all") for cb in self.cbs):
            self._warned_momentum = True
            warnings.warn(
                f"{type(self).__name__} was built with mom=0, so its chain keeps no average of the gradient and the "
                f"momentum that is set now has no effect: build it with a momentum other than 0",
                stacklevel=9,
            )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self._watch_groups()

    @outside_compile
    def state_dict(self) -> StateDict:
        """State and groups in torch's shape, `{'state': {id: {...}}, 'param_groups': [...]}`.

        The containers are new; the tensors are the live ones. A frozen group has `'frozen': True`.
        """
        return make_state_dict(self)

    @outside_compile
    def load_state_dict(self, state_dict: StateDict) -> None:
        """Take over state, hyper-parameters and freezing from `state_dict`, in torch's or in fastai's shape.

        Parameters are matched by name where both sides have names, else by position. Tensors keep their dtype and move
        to the device of their parameter. Nothing changes if anything does not fit.

        Raises:
            ValueError: groups, members, names or shapes differ.
        """
        load_state_dict(self, state_dict)

    def _load_value(self, p: Any, key: str, value: Any, group: Group) -> Any:
        """One value of a loaded state as it is kept for `p` of `group`: tensors on its device, step counts as ints, or
        in a capturable group as tensors there."""
        if isinstance(value, Pieces):
            value = value.whole(key)
        if isinstance(value, Tensor):
            if key == "step" and value.numel() == 1:
                return on_device(float(value), p) if group.get(CAPTURABLE) else int(value)
            return take(p, value.to(p.device)) if isinstance(p, Tensor) else value
        return value


def _as_chain(cbs: Callable[..., Any] | Iterable[Callable[..., Any]] | None) -> tuple[Callable[..., Any], ...]:
    """The callbacks as a tuple; a TypeError names what cannot be called."""
    if cbs is not None and not callable(cbs) and not isinstance(cbs, Iterable):
        raise TypeError(f"cbs is a {type(cbs).__name__}, not a function of a parameter or several")
    chain = () if cbs is None else (cbs,) if callable(cbs) else tuple(cbs)
    for i, cb in enumerate(chain):
        if not callable(cb):
            raise TypeError(f"cbs[{i}] is a {type(cb).__name__}, not a function of a parameter")
    return chain


def _evaluate(closure: Callable[[], Any] | None) -> Any:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()
