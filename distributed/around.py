"""An optimizer around another one, whose chain, hyper-parameters and freezing it shows as its own."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NoReturn
from weakref import WeakSet

from ..around import Around
from ..engine import Needs
from ..hypers import HyperNames
from ..optimizer import Optimizer


class AroundOptimizer(Around):
    """What is forwarded to the optimizer within, `self.opt`, beside groups and state."""

    opt: Optimizer

    @property
    def inner(self) -> Optimizer:
        """The optimizer within, also `self.opt`."""
        return self.opt

    @property
    def cbs(self) -> tuple[Callable[..., Any], ...]:
        """The chain."""
        return self.opt.cbs

    @property
    def hp_map(self) -> Mapping[str, str]:  # type: ignore[override]  # not to be assigned here
        """Stored names to hypers."""
        return {} if self._within is None else self.opt.hp_map

    @property
    def _names(self) -> HyperNames:
        return self.opt._names

    @property
    def _freeze_to(self) -> int:
        return self.opt._freeze_to

    @_freeze_to.setter
    def _freeze_to(self, n: int) -> None:
        self.opt._freeze_to = n

    @property
    def train_bn(self) -> bool:
        """Kept for the reader, see `Optimizer`."""
        return self.opt.train_bn

    @property
    def needs(self) -> Needs:
        """What the chain must see of a parameter."""
        return self.opt.needs

    def _check_hyper(self, name: str, value: Any, group: int) -> None:
        self.opt._check_hyper(name, value, group)

    def set_hypers(self, **kwargs: Any) -> None:
        """Set hyper-parameters in every group: one value, one per group, or a slice."""
        self.opt.set_hypers(**kwargs)


_taken_in: WeakSet[Optimizer] = WeakSet()


def take_in(opt: Optimizer, with_gradients: bool = False) -> None:
    """Note that `opt` is now within another optimizer, and refuse what that one does for it.

    Args:
        with_gradients: whether that one takes gradients out of `p.grad`: clipping would find none.
    """
    _taken_in.add(opt)
    if with_gradients:
        opt.clip_grad_norm_ = _refuse("clip_grad_norm_")  # type: ignore[method-assign]
    opt.register_step_pre_hook(_refuse("step"))
    opt.register_state_dict_pre_hook(_refuse("state_dict"))
    opt.register_load_state_dict_pre_hook(_refuse("load_state_dict"))


def is_within(opt: Optimizer) -> bool:
    """Whether `opt` has been taken in."""
    return opt in _taken_in


def _refuse(what: str) -> Callable[..., NoReturn]:
    """A hook before method `what`, or in its place, of an optimizer that has been sharded and holds a part only."""

    def refused(*_: Any, **__: Any) -> NoReturn:
        raise RuntimeError(f"this optimizer has been sharded: call {what}() of the optimizer that shard() gave")

    return refused
