"""The schedules, against their formulas, on a torch optimizer."""

from __future__ import annotations

import math

import pytest
import torch

from scripts.job.schedule import build_scheduler, rate_factor


def optimizer(kind: type[torch.optim.Optimizer] = torch.optim.SGD, **hypers: float) -> torch.optim.Optimizer:
    parameters = [torch.nn.Parameter(torch.zeros(2)) for _ in range(2)]
    return kind([{"params": [p], "lr": lr} for p, lr in zip(parameters, (0.1, 1.0), strict=True)], **hypers)


def rates(schedule: str, steps: int, warmup: int, opt: torch.optim.Optimizer | None = None) -> list[list[float]]:
    """The rate of each group in each step."""
    opt = opt or optimizer()
    scheduler = build_scheduler(opt, schedule, steps=steps, warmup=warmup)
    seen = []
    for _ in range(steps):
        seen.append([group["lr"] for group in opt.param_groups])
        opt.step()
        scheduler.step()
    return seen


def test_warm_up_then_each_fall():
    for t in range(4):
        assert rate_factor("cosine", t, 12, 4) == (t + 1) / 4
    for t in range(4, 12):
        done = (t - 4) / 8
        assert rate_factor("constant", t, 12, 4) == 1
        assert rate_factor("linear", t, 12, 4) == pytest.approx(1 - done)
        assert rate_factor("cosine", t, 12, 4) == pytest.approx(0.5 + 0.5 * math.cos(math.pi * done))
    assert rate_factor("linear", 5, 3, 10) == 0  # a warm-up longer than the run


def test_groups_keep_their_proportion():
    for slow, fast in rates("cosine", 10, 3):
        assert fast == pytest.approx(10 * slow)


def test_one_cycle_rises_to_the_peak_falls_and_moves_momentum_the_other_way():
    opt = optimizer(torch.optim.Adam, betas=(0.9, 0.99))
    seen = [fast for _, fast in rates("one-cycle", 20, 5, opt)]
    top = seen.index(max(seen))
    assert 3 <= top <= 6
    assert max(seen) == pytest.approx(1, rel=0.05)
    assert seen == sorted(seen[:top]) + sorted(seen[top:], reverse=True)
    assert seen[-1] < 0.05
    assert opt.param_groups[0]["betas"][1] == 0.99


def test_one_cycle_leaves_an_optimizer_without_momentum_alone():
    opt = optimizer()
    rates("one-cycle", 6, 2, opt)
    assert opt.param_groups[0]["momentum"] == 0


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine", "one-cycle"])
def test_a_scheduler_that_starts_late_is_where_the_other_one_came(schedule: str):
    whole = rates(schedule, 12, 3)
    opt = optimizer()
    build_scheduler(opt, schedule, steps=12, warmup=3)  # leaves the peaks in the groups, as a new run does
    build_scheduler(opt, schedule, steps=12, warmup=3, last=6)
    assert [group["lr"] for group in opt.param_groups] == pytest.approx(whole[7])
