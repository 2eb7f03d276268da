"""Learning-rate schedules, as torch's LR schedulers over the optimizer's parameter groups."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, OneCycleLR

from .recipes import has_momentum


def rate_factor(schedule: str, step: int, steps: int, warmup: int) -> float:
    """What the peak rate is multiplied by in step `step` (from 0) of `steps`: a linear rise, then a fall."""
    warmup = min(warmup, steps)
    if step < warmup:
        return (step + 1) / warmup
    done = min((step - warmup) / max(steps - warmup, 1), 1.0)
    falls = {"constant": 1.0, "linear": 1 - done, "cosine": (1 + math.cos(math.pi * done)) / 2}
    return falls[schedule]


def build_scheduler(
    opt: torch.optim.Optimizer, schedule: str, *, steps: int, warmup: int, last: int = -1
) -> LRScheduler:
    """The scheduler of a run of `steps` steps, `last + 1` of which are made (as torch's `last_epoch`)."""
    if schedule == "one-cycle":
        return _one_cycle(opt, steps, warmup, last)
    return LambdaLR(opt, lambda step: rate_factor(schedule, step, steps, warmup), last_epoch=last)


def _one_cycle(opt: torch.optim.Optimizer, steps: int, warmup: int, last: int) -> LRScheduler:
    """Smith and Topin's policy (arXiv:1708.07120): the rate rises and falls, momentum goes the other way."""
    peaks = [_peak(group) for group in opt.param_groups]
    moves = all(has_momentum(group) for group in opt.param_groups)
    high = [_momentum(group) for group in opt.param_groups] if moves else 0.95
    low = [0.9 * value for value in high] if isinstance(high, list) else 0.85
    return OneCycleLR(
        opt,
        max_lr=peaks,
        total_steps=max(steps, 2) + 1,  # torch steps the scheduler once after the last optimizer step too
        pct_start=min(warmup / steps, 0.9) if warmup else 0.25,
        cycle_momentum=moves,
        base_momentum=low,
        max_momentum=high,
        last_epoch=last,
    )


def _peak(group: dict[str, Any]) -> float:
    return float(group.get("max_lr", group["lr"]))


def _momentum(group: dict[str, Any]) -> float:
    if "max_momentum" in group:
        return float(group["max_momentum"])
    return float(group["betas"][0] if "betas" in group else group["momentum"])
