"""What is given to `save` and `load` is looked at before anything is done with it."""

from __future__ import annotations

import numbers
from typing import Any

from torch import nn

from .errors import CheckpointError


def check_objects(model: Any, opt: Any, method: str, **others: Any) -> None:
    """Raise CheckpointError where `model` is no module, `opt` no optimizer, or another one has no `method`."""
    if model is not None and not isinstance(model, nn.Module):
        raise CheckpointError(f"model is a torch.nn.Module, got {_a(model)}")
    if opt is not None and not (hasattr(opt, "param_groups") and hasattr(opt, "state_dict")):
        raise CheckpointError(f"opt is an optimizer, got {_a(opt)}")
    for name, holder in others.items():
        if holder is not None and not hasattr(holder, method):
            raise CheckpointError(f"{name} is something with {method}(), got {_a(holder)}")


def check_whole_number(name: str, value: Any, least: int, what: str) -> None:
    """Raise unless `value` is None or a whole number from `least` on.

    Raises:
        TypeError: it is no whole number.
        ValueError: it is too small.
    """
    if value is None:
        return
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise TypeError(f"{name} is {what}, got {value!r}")
    if int(value) < least:
        raise ValueError(f"{name} is {what}, got {value}")


def _a(thing: Any) -> str:
    return f"{'an' if type(thing).__name__[0] in 'AEIOUaeiou' else 'a'} {type(thing).__name__}"
