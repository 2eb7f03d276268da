"""Dynamic loss scaling: `torch.amp.GradScaler` on gradients that no longer are in `p.grad`.

The scaler looks for gradients in one method, `_unscale_grads_`, which PyTorch's own sharded scaler overrides too. From
the first `shard` on, that method asks an optimizer that holds its gradients elsewhere to unscale them itself.

There is no public way to that. `_step_supports_amp_scaling` would hand scale and inf to `step`, but the inf is looked
for in `p.grad` by the same method, and unscaling before clipping does not come to the optimizer at all.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.amp.grad_scaler import GradScaler

Found = dict[torch.device, Tensor]


@runtime_checkable
class HoldsGradients(Protocol):
    """An optimizer that unscales its gradients itself."""

    def unscale_grads_(self, inv_scale: Tensor, found_inf: Tensor, in_place: Any) -> Found:
        """Multiply all gradients with `inv_scale`; gives 1 for each device where any rank has an inf or NaN, else 0.

        `in_place` does it to what is in `p.grad`.
        """


_in_place = GradScaler._unscale_grads_


def _unscale_grads_(
    self: GradScaler, optimizer: torch.optim.Optimizer, inv_scale: Tensor, found_inf: Tensor, allow_fp16: bool
) -> Found:
    def in_place() -> Found:
        return _in_place(self, optimizer, inv_scale, found_inf, allow_fp16)

    if isinstance(optimizer, HoldsGradients):
        return optimizer.unscale_grads_(inv_scale, found_inf, in_place)
    return in_place()


def teach_grad_scaler() -> None:
    """Let every `GradScaler` of this process ask."""
    GradScaler._unscale_grads_ = _unscale_grads_  # type: ignore[method-assign]


def unscale(tensors: list[Tensor], inv_scale: Tensor, found_inf: Tensor) -> Tensor:
    """Multiply `tensors` with `inv_scale`, in few kernels; 1 on `found_inf`'s device if any is not finite."""
    total = found_inf
    for device, dtype in {(t.device, t.dtype): None for t in tensors}:
        here = [t for t in tensors if (t.device, t.dtype) == (device, dtype)]
        found = torch.zeros_like(found_inf, device=device)
        torch._amp_foreach_non_finite_check_and_unscale_(here, found, inv_scale.to(device))
        total = torch.maximum(total, found.to(total.device))
    return total
