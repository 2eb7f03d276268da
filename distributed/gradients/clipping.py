"""`torch.nn.utils.clip_grad_norm_` of reduced gradients is refused: it would find none, and clip nothing in silence.

From the first `shard` in stage 2 on, the function within it that scales gradients asks the sharded optimizers. They
cannot clip for it: it does not say which norm was asked for. `clip_grad_value_` without gradients is an error of
PyTorch's that does not say why; here it does.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol
from weakref import WeakSet

from torch import Tensor
from torch.nn.utils import clip_grad

# Private names: where there is none, nothing is refused.
_NAME = "_clip_grads_with_norm_"
_clip = getattr(clip_grad, _NAME, None)
_SORTS = "_group_tensors_by_device_and_dtype"
_sort = getattr(clip_grad, _SORTS, None)
_holders: WeakSet[TakesGradients] = WeakSet()


class TakesGradients(Protocol):
    """An optimizer that takes gradients out of `p.grad` in backward."""

    @property
    def taken(self) -> bool:
        """Whether this rank holds reduced gradients."""

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


def _sort_or_refuse(lists: Any, *args: Any, **kwargs: Any) -> Any:
    if lists and not lists[0] and any(holder.taken for holder in _holders):
        raise RuntimeError(
            "there are no gradients to clip in p.grad: those of parameters that are sharded in stage 2 have been "
            "reduced, and are not clipped by value. Clamp them in the first callback of the chain, clip their norm "
            "with clip_grad_norm_(max_norm) of the optimizer that shard() gave, or use stage=1"
        )
    assert _sort is not None
    return _sort(lists, *args, **kwargs)


def teach_clipping(holder: TakesGradients) -> None:
    """Let `torch.nn.utils.clip_grad_norm_` of this process ask `holder`, too."""
    _holders.add(holder)
    if _clip is not None:
        setattr(clip_grad, _NAME, _clip_or_refuse)
    if _sort is not None:
        setattr(clip_grad, _SORTS, _sort_or_refuse)
