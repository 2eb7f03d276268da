"""`torch.nn.utils.clip_grad_norm_` of reduced gradients is refused: it would find none, and clip nothing in silence.

From the first `shard` in stage 2 on, the function within it that scales gradients asks the sharded optimizers. They
cannot clip for it: it does not say which norm was asked for.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor
from torch.nn.utils import clip_grad

_NAME = "_clip_grads_with_norm_"  # a private name: where there is none, nothing is refused
_clip = getattr(clip_grad, _NAME, None)
_holders: WeakSet[TakesGradients] = WeakSet()


class TakesGradients(Protocol):
    """An optimizer that takes gradients out of `p.grad` in backward."""

    def has_taken(self, params: Iterable[Tensor]) -> bool:
        """Whether it holds gradients, and any of `params` that is its own has none any more."""


def _clip_or_refuse(parameters: Any, *args: Any, **kwargs: Any) -> Any:
    params = [parameters] if isinstance(parameters, Tensor) else list(parameters)
    if any(holder.has_taken(params) for holder in _holders):
        raise RuntimeError(
            "torch.nn.utils.clip_grad_norm_ finds no gradients of parameters that are sharded in stage 2, which have "
            "been reduced and are not in p.grad: call clip_grad_norm_(max_norm) of the optimizer that shard() gave"
        )
    assert _clip is not None
    return _clip(params, *args, **kwargs)


def teach_clipping(holder: TakesGradients) -> None:
    """Let `torch.nn.utils.clip_grad_norm_` of this process ask `holder`, too."""
    _holders.add(holder)
    if _clip is not None:
        setattr(clip_grad, _NAME, _clip_or_refuse)
