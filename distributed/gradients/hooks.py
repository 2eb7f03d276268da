"""Hooks that hear of gradients: one for each parameter, that of the optimizer that was made last."""

from __future__ import annotations

import weakref
from typing import Any, Protocol

from torch import Tensor
from torch.utils.weak import WeakTensorKeyDictionary

_hooks: Any = WeakTensorKeyDictionary()


class Hears(Protocol):
    """What is told of gradients."""

    def arrived(self, param: int) -> None:
        """Autograd has put a gradient into the parameter's `.grad`."""


def call_when_made(p: Tensor, who: weakref.ref[Any], param: int) -> None:
    """Call `who().arrived(param)` whenever autograd has put a gradient into `p.grad`, and nobody else any more.

    `who` is not kept alive. A parameter that requires no gradient now gets the hook too.
    """

    def arrived(_: Tensor) -> None:
        alive: Hears | None = who()
        if alive is not None:
            alive.arrived(param)

    required = p.requires_grad
    p.requires_grad_(True)
    if p in _hooks:
        _hooks[p].remove()
    _hooks[p] = p.register_post_accumulate_grad_hook(arrived)  # type: ignore[no-untyped-call]
    p.requires_grad_(required)
