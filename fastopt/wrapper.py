"""Any torch optimizer as a chain of one callback, with the interface of the optimizers here."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor

from .around import AroundChain
from .cbs import LOOKAHEAD_STATES
from .engine import GroupWork
from .groups import check_groups, collect_groups
from .hypers import Group, HyperNames, group_values, hyper_names, pytorch_hp_map
from .optimizer import _evaluate
from .state import FLAGS, ParamState

# States of a parameter that the wrapped optimizer must not see: many ask `if not state:` to make theirs.
_NOT_TORCHS = FLAGS | LOOKAHEAD_STATES


class TorchStep:
    """A callback that lets a torch optimizer step on all the work at once.

    It sees the parameters of the work only: those marked `do_wd=False` in a group of their own without weight decay.
    """

    needs = "whole"
    __name__ = "torch_step"

    def __init__(self, opt: torch.optim.Optimizer) -> None:
        self.opt = opt

    def __call__(self, p: Tensor, **kwargs: Any) -> None:
        raise TypeError("a wrapped torch optimizer steps on all parameters at once, not on one")

    def step_all(self, work: Sequence[GroupWork]) -> None:
        """Step the torch optimizer on the parameters of `work`."""
        with self._only(work):
            self.opt.step()

    def step_with(self, closure: Callable[[], Any], work: Sequence[GroupWork]) -> Any:
        """The same for an optimizer such as LBFGS that evaluates the closure itself. Returns its value."""
        with self._only(work):
            return self.opt.step(closure)

    @contextmanager
    def _only(self, work: Sequence[GroupWork]) -> Iterator[None]:
        """While inside, the torch optimizer's groups and states are those of `work`, without marks."""
        groups, state = self.opt.param_groups, self.opt.state
        members = [w.group["params"] for w in work]
        entries = [(p, entry) for w in work for p, entry in zip(w.params, w.states, strict=True)]
        spare = {id(p) for p, entry in entries if entry.get("do_wd") is False}
        hidden = [{key: entry.pop(key) for key in _NOT_TORCHS & entry.keys()} for _, entry in entries]
        undecayed = []
        for w in work:
            spared = {id(p) for p in w.params} & spare if "weight_decay" in w.group else set()
            w.group["params"] = [p for p in w.params if id(p) not in spared]
            if spared:
                undecayed.append({**w.group, "params": [p for p in w.params if id(p) in spared], "weight_decay": 0})
        self.opt.param_groups = [w.group for w in work] + undecayed
        self.opt.state = ParamState([(p, entry) for p, entry in entries if entry])
        try:
            yield
        finally:
            made = self.opt.state
            self.opt.param_groups, self.opt.state = groups, state
            for w, params in zip(work, members, strict=True):
                w.group["params"] = params
            for (p, entry), marks in zip(entries, hidden, strict=True):
                if p in made and made[p] is not entry:
                    entry.update(made[p])
                entry.update(marks)


class OptimWrapper(AroundChain):
    """A torch optimizer with `hypers`, `freeze_to`, `force_train`, `do_wd` and the rest of this interface.

    `OptimWrapper(torch_optimizer)` takes a built one, `OptimWrapper(params, opt=torch.optim.AdamW, lr=...)` builds it.
    Groups and state are the torch optimizer's own (`wrapper.opt`), so schedulers work on either.

    Args:
        params: parameters in any form, or a built torch optimizer.
        opt: a torch optimizer, or something that makes one of `(params, **kwargs)`.
        hp_map: names of hypers by torch's names, instead of `pytorch_hp_map`.
        convert_groups: False hands `params` to `opt` untouched.
        **kwargs: for `opt`; hyper-parameters may be one number, one per group, or a slice.

    Raises:
        ValueError: neither or both of `params` and a built optimizer.
        TypeError: `opt` is neither a torch optimizer nor something that can be called.
    """

    _kept: ClassVar[tuple[str, ...]] = (*AroundChain._kept, "_warned")

    def __init__(
        self,
        params: Any = None,
        opt: torch.optim.Optimizer | Callable[..., torch.optim.Optimizer] | Mapping[str, str] | None = None,
        hp_map: Mapping[str, str] | None = None,
        convert_groups: bool = True,
        **kwargs: Any,
    ) -> None:
        if isinstance(params, torch.optim.Optimizer) and (opt is None or isinstance(opt, Mapping)):
            params, opt, hp_map = None, params, opt if isinstance(opt, Mapping) else hp_map
        if params is None and opt is None:
            raise ValueError(
                "Both `params` and `opt` cannot be None: pass a torch optimizer, or params and opt=a class."
            )
        if isinstance(opt, torch.optim.Optimizer):
            if params is not None or kwargs:
                raise ValueError("Tried using both `params` and a built optimizer. Just pass in `opt`.")
        elif callable(opt):
            opt = _build(params, opt, convert_groups, kwargs)
        else:
            raise TypeError(f"opt is a {type(opt).__name__}, not a torch optimizer or something that makes one")
        self._hp_map = dict(pytorch_hp_map if hp_map is None else hp_map)
        self._adopt(opt, (TorchStep(opt),))
        self.defaults = opt.defaults
        opt.state = ParamState(opt.state)
        self._warned: set[str] = set()

    @property
    def _names(self) -> HyperNames:
        return hyper_names(tuple(self.hp_map.items()), spread_all=True)

    def _per_group(self, k: str, v: Any) -> dict[str, list[Any]]:
        """As everywhere; a hyper that the torch optimizer lacks is ignored with one warning."""
        name = k if k in self.hp_map.values() else self.hp_map.get(k, k)
        if not self.param_groups or self._names.known(name, self.param_groups[0]):
            return super()._per_group(k, v)
        if name not in self._warned:
            self._warned.add(name)
            warnings.warn(f"{type(self.opt).__name__} has no hyper-parameter {name!r}: it is ignored", stacklevel=4)
        return {}

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group to the torch optimizer, with hypers under either name."""
        if self._within is None:
            return
        (group,) = collect_groups([dict(param_group)])
        check_groups([*self.param_groups, group])
        entries = self._complete(group, self.defaults)
        self.opt.add_param_group(_pairs({**group, **entries}))

    def _step(self, closure: Callable[[], Any] | None) -> Any:
        if not evaluates_closure(self.opt):
            return super()._step(closure)
        if closure is None:
            raise TypeError(f"{type(self.opt).__name__} evaluates the loss itself: call step(closure)")
        torch_step = next(cb for cb in self.cbs if isinstance(cb, TorchStep))
        work = [
            self.group_work(i, params, [self.state[p] for p in params])
            for i, group in enumerate(self.param_groups)
            if (params := [p for p in group["params"] if self.steps_on(i, p)])
        ]
        return torch_step.step_with(closure, work) if work else _evaluate(closure)

    def _load_value(self, p: Any, key: str, value: Any, group: Group) -> Any:
        """Torch's own rules for loaded tensors: dtype and device of the parameter, the step count as torch has it."""
        if not isinstance(value, Tensor):
            return value
        return self._process_value_according_to_param_policy(p, value, 0, [{**group, "params": [0]}], key)


def _build(
    params: Any, make: Callable[..., torch.optim.Optimizer], convert_groups: bool, kwargs: dict[str, Any]
) -> torch.optim.Optimizer:
    """The torch optimizer of `make`, with one value per group where a hyper-parameter is a slice or a collection."""
    if not convert_groups:
        return make(params, **kwargs)
    groups = collect_groups(params)
    single: dict[str, Any] = {}
    for name, value in kwargs.items():
        if isinstance(value, slice | list):
            for group, one in zip(groups, group_values(name, value, len(groups)), strict=True):
                group.setdefault(name, one)
            single[name] = groups[-1][name]
        else:
            single[name] = value
    return make([_pairs(group) for group in groups], **single)


def _pairs(group: Group) -> Group:
    """A group as torch takes it: named parameters as `(name, parameter)` pairs."""
    names = group.pop("param_names", None)
    return {**group, "params": list(zip(names, group["params"], strict=True))} if names else group


def evaluates_closure(opt: torch.optim.Optimizer) -> bool:
    """Whether `opt.step` cannot do without a closure."""
    parameters = inspect.signature(opt.step).parameters
    return "closure" in parameters and parameters["closure"].default is inspect.Parameter.empty
