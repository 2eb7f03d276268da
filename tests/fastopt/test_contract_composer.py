"""What Composer's Trainer does with an optimizer; Composer itself wants a torch below 2.7.1."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_optimizer_state_dict, set_optimizer_state_dict
from torch.optim.lr_scheduler import LambdaLR

from fastopt import Adam

from .samples import assert_same, model, values

OPTIONS = StateDictOptions(full_state_dict=True, cpu_offload=True)
#: What makes Adam torch's AdamW.
AS_TORCHS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


def start(cls: Any) -> tuple[nn.Module, Any, LambdaLR]:
    m = model()
    opt = cls(m.parameters(), **AS_TORCHS)
    return m, opt, LambdaLR(opt, lambda step: 1 / (1 + step))


def train_batch(m: nn.Module, opt: torch.optim.Optimizer, seed: int) -> tuple[Any, dict[str, float]]:
    """One batch in two microbatches, in a closure that takes what it is given and returns a number."""
    width = next(m.parameters()).shape[1]
    x = torch.randn(8, width, generator=torch.Generator().manual_seed(seed))
    losses: dict[str, float] = {"total": 0.0}

    def microbatches(loss_dict: dict[str, float] = losses, **kwargs: Any) -> float:
        opt.zero_grad(set_to_none=True)
        total = torch.zeros(())
        for part in x.split(4):
            loss: Tensor = m(part).square().mean() / 2
            loss.backward()
            total += loss.detach()
        loss_dict["total"] += total.item()
        return total.item()

    return opt.step(closure=microbatches), losses


def test_closures_schedule_and_checkpoint() -> None:
    m, opt, schedule = start(Adam)
    n, plain, rates = start(torch.optim.AdamW)
    for seed in range(3):
        returned, losses = train_batch(m, opt, seed)
        assert returned == losses["total"] > 0  # evaluated once
        train_batch(n, plain, seed)
        schedule.step()
        rates.step()
    torch.testing.assert_close(values(m.parameters()), values(n.parameters()))

    resumed, other, behind = start(Adam)
    resumed.load_state_dict(m.state_dict())
    saved = copy.deepcopy(get_optimizer_state_dict(m, opt, options=OPTIONS))  # the file between them
    set_optimizer_state_dict(resumed, other, saved, options=OPTIONS)
    behind.load_state_dict(schedule.state_dict())
    for seed in range(3, 6):
        for each, its, steps in ((m, opt, schedule), (resumed, other, behind)):
            train_batch(each, its, seed)
            steps.step()
    assert_same(m.parameters(), resumed.parameters())
