"""What Lightning and Accelerate hand back for a model or an optimizer stands for the one within.

Lightning's wrappers of optimizers call methods of ours with themselves as `self`: what such a method assigns would stay
in the wrapper, and the optimizer that steps would not know.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

_FABRIC = ("lightning.fabric.wrappers", "lightning_fabric.wrappers")
_LIGHTNING = ("lightning.pytorch.core.optimizer", "pytorch_lightning.core.optimizer")
_OPTIMIZERS = (*_FABRIC, *_LIGHTNING, "accelerate.optimizer")


def bare_optimizer(opt: Any) -> Any:
    """The optimizer itself, in whatever wrappers of Lightning, Fabric and Accelerate."""
    while type(opt).__module__ in _OPTIMIZERS and isinstance(opt.optimizer, torch.optim.Optimizer):
        opt = opt.optimizer
    return opt


def bare_model(model: nn.Module) -> nn.Module:
    """The user's module inside DistributedDataParallel, torch.compile and Fabric, which only prefix the names."""
    while True:
        wraps = isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel)
        inner = getattr(model, "module" if wraps or type(model).__module__ in _FABRIC else "_orig_mod", None)
        if not isinstance(inner, nn.Module):
            return model
        model = inner
