"""Where the gradients of a step meet: in DDP (stages 0 and 1), or in the sharded optimizer itself (stage 2)."""

from __future__ import annotations

import gc
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from .ranks import Ranks

if TYPE_CHECKING:
    from fastopt import Optimizer


class Parallel:
    """A model and its optimizer over the ranks. `opt` is the plain optimizer, or a sharded one from stage 1 on."""

    def __init__(self, model: nn.Module, opt: Optimizer, stage: int, ranks: Ranks) -> None:
        self.model, self.ranks = model, ranks
        self.stage = stage if ranks.world > 1 else 0
        self.opt: Any = opt
        if self.stage:
            from fastopt.distributed import shard

            self.opt = shard(opt, model, stage=self.stage)
        self.uses_ddp = ranks.world > 1 and self.stage < 2
        self._forward: nn.Module = model
        self.rewire()

    def rewire(self) -> None:
        """Follow a change of `requires_grad`: DDP looks at it only when it is built, so it is built anew."""
        if not self.uses_ddp:
            return
        self._forward = self.model
        gc.collect()  # the old DDP must be gone: its reducer holds hooks on the parameters
        devices = [self.ranks.device.index] if self.ranks.device.type == "cuda" else None
        self._forward = DistributedDataParallel(self.model, device_ids=devices)

    def forward(self, rows: Tensor) -> Tensor:
        """The summed loss of `rows`, in nats, with whatever the backward pass needs to average gradients."""
        loss: Tensor = self._forward(rows)
        return loss

    def local(self) -> AbstractContextManager[Any]:
        """Inside, backward passes add up on this rank and nothing is exchanged: for all micro-batches but the last."""
        if self.uses_ddp:
            assert isinstance(self._forward, DistributedDataParallel)
            return self._forward.no_sync()
        context: AbstractContextManager[Any] = self.opt.no_sync() if self.stage == 2 else nullcontext()
        return context

    def clip(self, max_norm: float) -> None:
        """Scale the averaged gradient, taken over all ranks and parameters, down to a norm of `max_norm`."""
        if self.stage:
            self.opt.clip_grad_norm_(max_norm)
        else:
            nn.utils.clip_grad_norm_((p for p in self.model.parameters() if p.requires_grad), max_norm)

    def state_bytes(self) -> int:
        """Bytes of optimizer state that this rank holds."""
        if self.stage:
            return int(self.opt.state_bytes())
        values = (value for state in self.opt.state.values() for value in state.values())
        return sum(value.nbytes for value in values if isinstance(value, torch.Tensor))
