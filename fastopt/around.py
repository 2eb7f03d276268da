"""An optimizer around another one: groups and state are those of the optimizer within."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, ClassVar

import torch

from .base import _BaseOptimizer
from .hypers import Group
from .optimizer import Optimizer
from .state import ParamState


class Around(_BaseOptimizer):
    """Reads groups and state from `opt`, which replaces both when it loads a state dict itself.

    There is one truth, so a scheduler may be built on either. The base class writes groups and state while it is set
    up, when there is no `opt` yet: that is ignored.
    """

    opt: torch.optim.Optimizer

    @property
    def _within(self) -> torch.optim.Optimizer | None:
        """`opt` once there is one; also on a proxy that has the attributes of this object but not its `__dict__`."""
        return getattr(self, "opt", None)

    @property
    def param_groups(self) -> list[Group]:
        """The groups of the optimizer within."""
        within = self._within
        return [] if within is None else within.param_groups

    @param_groups.setter
    def param_groups(self, groups: list[Group]) -> None:
        if self._within is not None:
            self.opt.param_groups = groups

    @property  # type: ignore[override]
    def state(self) -> ParamState:
        """The state of the optimizer within, with the marks `force_train` and `do_wd`."""
        within = self._within
        if within is None:
            return ParamState()
        if not isinstance(within.state, ParamState):
            within.state = ParamState(within.state)
        return within.state

    @state.setter
    def state(self, state: ParamState) -> None:
        if self._within is not None:
            self.opt.state = state


class AroundChain(Around, Optimizer):
    """An optimizer around another one that steps with a chain of its own."""

    _kept: ClassVar[tuple[str, ...]] = (*Optimizer._kept, "opt", "_hp_map")
    _hp_map: Mapping[str, str]

    def _adopt(self, opt: torch.optim.Optimizer, cbs: tuple[Callable[..., Any], ...]) -> None:
        """Set up this object around `opt`, with `cbs` as its chain."""
        self.cbs = cbs
        torch.optim.Optimizer.__init__(self, [{"params": []}], dict(opt.defaults))
        self.train_bn, self._engine = getattr(opt, "train_bn", True), getattr(opt, "_engine", None)
        self.master_weights = getattr(opt, "master_weights", False)
        self.opt = opt

    @property
    def hp_map(self) -> Mapping[str, str]:  # type: ignore[override]  # no constant of the class here
        """Stored names to hypers."""
        return getattr(self, "_hp_map", {})

    def _watch_groups(self) -> None:
        """Leave that to the optimizer within, whose groups these are."""
        if isinstance(self.opt, Optimizer):
            self.opt._watch_groups()

    def __getstate__(self) -> dict[str, Any]:
        kept = super().__getstate__()
        return {k: v for k, v in kept.items() if k not in ("state", "param_groups")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.opt = state["opt"]
        super().__setstate__(state)
