"""What values hyper-parameters of the named optimizers, and arguments of methods, may have."""

from __future__ import annotations

from collections.abc import Collection
from operator import index
from typing import Any

from torch import Tensor

_NOT_NEGATIVE = frozenset({"lr", "wd", "eps", "mom", "sqr_mom", "beta", "trust_coeff", "nu_1", "nu_2", "alpha"})

#: Options of torch's optimizers that make another rule of them, and that nothing here has.
_OF_TORCH = frozenset({"amsgrad", "centered", "dampening", "differentiable", "maximize", "nesterov"})


def check_hyper(optimizer: str, name: str, value: Any, group: int, below_one: Collection[str] = ("sqr_mom",)) -> None:
    """Raise if `value` cannot be hyper `name` of a group. `below_one` names those that must be less than 1.

    Raises:
        TypeError: it is no number.
        ValueError: it is negative, not a number (nan), 1 and more where only less makes sense, or an option of torch's
            that would have no effect.
    """
    if name in _OF_TORCH and value:
        raise ValueError(
            f"{optimizer}: {name} of group {group} is {value!r}, which has no effect here: leave it out, or keep "
            f"torch's optimizer in fastopt.OptimWrapper"
        )
    if name not in _NOT_NEGATIVE and name != "k":
        return
    if isinstance(value, Tensor) and value.numel() == 1:
        return  # reading it back would wait for its device
    if not isinstance(value, int | float) or isinstance(value, bool):
        raise TypeError(f"{optimizer}: {name} of group {group} is {value!r}, expected a number")
    if name == "k":
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{optimizer}: k of group {group} is {value!r}, expected a whole number from 1 on")
    elif not value >= 0:
        raise ValueError(f"{optimizer}: {name} of group {group} is {value!r}, expected a number >= 0")
    elif name in below_one and value >= 1:
        raise ValueError(f"{optimizer}: {name} of group {group} is {value!r}, expected a number below 1")


def check_clip(max_norm: Any, norm_type: Any) -> None:
    """Raise if gradients cannot be clipped to `max_norm`, measured by `norm_type`.

    Raises:
        TypeError: they are no numbers.
        ValueError: `max_norm` is negative or not a number (nan), `norm_type` not positive.
    """
    for name, value in (("max_norm", max_norm), ("norm_type", norm_type)):
        if isinstance(value, str | bytes) or not hasattr(value, "__float__"):
            raise TypeError(f"{name} is {value!r}, expected a number")
    if not isinstance(max_norm, Tensor) and not max_norm >= 0:
        raise ValueError(f"max_norm is {max_norm!r}, expected a number >= 0")
    if not norm_type > 0:
        raise ValueError(f"norm_type is a positive number or inf, got {norm_type}")


def group_number(n: Any, what: str) -> int:
    """`n` as the number of a group, which `what` was given.

    Raises:
        TypeError: it is no whole number.
    """
    try:
        return index(n)
    except TypeError:
        raise TypeError(f"{what} takes the number of a group, got {n!r}") from None
