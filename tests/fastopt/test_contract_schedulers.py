"""Every learning-rate scheduler of torch, the ones that cycle momentum too, and averaged weights."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as L
from torch.optim.swa_utils import SWALR, AveragedModel

from fastopt import SGD, Adam, Optimizer, sgd_step

from .samples import Case, assert_same, backward, every_optimizer, model, tensors, train

Make = Callable[[torch.optim.Optimizer], Any]
SCHEDULERS: dict[str, Make] = {
    "LambdaLR": lambda o: L.LambdaLR(o, lambda e: 0.9**e),
    "MultiplicativeLR": lambda o: L.MultiplicativeLR(o, lambda e: 0.9),
    "StepLR": lambda o: L.StepLR(o, 2),
    "MultiStepLR": lambda o: L.MultiStepLR(o, [1, 3]),
    "ConstantLR": lambda o: L.ConstantLR(o, 0.5, 2),
    "LinearLR": lambda o: L.LinearLR(o, 0.1, total_iters=3),
    "ExponentialLR": lambda o: L.ExponentialLR(o, 0.7),
    "PolynomialLR": lambda o: L.PolynomialLR(o, 6, 2.0),
    "CosineAnnealingLR": lambda o: L.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: L.CosineAnnealingWarmRestarts(o, 2),
    "SequentialLR": lambda o: L.SequentialLR(o, [L.LinearLR(o, 0.1, total_iters=2), L.ExponentialLR(o, 0.5)], [2]),
    "ChainedScheduler": lambda o: L.ChainedScheduler([L.ConstantLR(o, 0.5, 2), L.ExponentialLR(o, 0.5)]),
    "OneCycleLR": lambda o: L.OneCycleLR(o, [0.1, 0.3], total_steps=10),
    "CyclicLR": lambda o: L.CyclicLR(o, 0.01, 0.1, step_size_up=2),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def rates(opt: torch.optim.Optimizer) -> list[float]:
    """The learning rate and the momentum of each group."""
    return [float(x) for g in opt.param_groups for x in (g["lr"], g["betas"][0] if "betas" in g else g["momentum"])]


def run(opt: torch.optim.Optimizer, m: torch.nn.Module, sched: Any, steps: int) -> list[float]:
    """The rates after each of `steps` steps, one after the other."""
    found: list[float] = []
    for seed in range(steps):
        backward(m, seed)
        opt.step()
        opt.zero_grad()
        sched.step()
        found += rates(opt)
    return found


@pytest.mark.parametrize("name", SCHEDULERS)
def test_the_rates_are_those_that_torchs_optimizers_get(name: str) -> None:
    m, n = model(), model()
    ours = Adam([m[0].parameters(), m[2].parameters()], lr=[0.1, 0.2], betas=(0.9, 0.99))
    theirs = torch.optim.AdamW([{"params": n[0].parameters(), "lr": 0.1}, {"params": n[2].parameters(), "lr": 0.2}])
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # such as the wrong order of steps
        assert run(ours, m, SCHEDULERS[name](ours), 6) == pytest.approx(run(theirs, n, SCHEDULERS[name](theirs), 6))


@every_optimizer
@pytest.mark.parametrize("name", ["SequentialLR", "OneCycleLR", "CyclicLR"])
@pytest.mark.filterwarnings("ignore:.*built with mom=0")
def test_every_optimizer_takes_them_and_steps_with_them(case: Case, name: str) -> None:
    m, n = model(), model()
    opt = case([m[0].parameters(), m[2].parameters()], lr=[0.1, 0.2])
    by_hand = case([n[0].parameters(), n[2].parameters()], lr=[0.1, 0.2])
    sched = SCHEDULERS[name](opt)
    for seed in range(5):
        for i in range(2):
            by_hand.hypers[i]["lr"] = opt.param_groups[i]["lr"]
            by_hand.hypers[i]["mom"] = opt.hypers[i]["mom"]
        train(m, opt, [seed])
        train(n, by_hand, [seed])
        sched.step()
    assert_same(m.parameters(), n.parameters())
    assert all("initial_lr" in h for h in opt.hypers)


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
def test_cycled_momentum_reaches_the_average(name: str) -> None:
    for cls in (SGD, Adam):
        params = tensors((3,))
        opt = cls([params, tensors((2,), seed=1)], lr=0.1, mom=0.9)
        sched = SCHEDULERS[name](opt)
        before = opt.hypers[0]["mom"]
        params[0].grad = torch.ones(3)
        opt.step()
        sched.step()
        assert opt.hypers[0]["mom"] != before
        average = opt.state[params[0]]["grad_avg"].clone()
        opt.step()
        m = opt.hypers[0]["mom"]
        new = 1 - m if cls is Adam else 1.0
        torch.testing.assert_close(opt.state[params[0]]["grad_avg"], m * average + new * torch.ones(3))


@every_optimizer
def test_reduce_on_plateau(case: Case) -> None:
    opt = case(tensors((2,)), lr=0.5)
    sched = L.ReduceLROnPlateau(opt, factor=0.1, patience=1)
    for loss in (1.0, 1.0, 1.0, 1.0):
        sched.step(loss)
    assert opt.hypers[0]["lr"] == pytest.approx(0.05)


@every_optimizer
def test_a_tensor_lr_is_filled_in_place(case: Case) -> None:
    lr = torch.tensor(0.5)
    m = model()
    opt = case(m.parameters(), lr=lr)
    sched = L.ExponentialLR(opt, 0.5)
    for seed in range(3):
        train(m, opt, [seed])
        sched.step()
        assert opt.param_groups[0]["lr"] is lr
    assert lr.item() == pytest.approx(0.0625)


@every_optimizer
def test_resume_with_the_scheduler_built_first(case: Case) -> None:
    m = model()
    opt = case(m.parameters(), lr=0.1)
    sched = L.CosineAnnealingLR(opt, 10)
    for seed in range(3):
        train(m, opt, [seed])
        sched.step()
    saved = copy.deepcopy((m.state_dict(), opt.state_dict(), sched.state_dict()))
    n = model()
    again = case(n.parameters(), lr=0.1)
    resumed = L.CosineAnnealingLR(again, 10)
    n.load_state_dict(saved[0])
    again.load_state_dict(saved[1])
    resumed.load_state_dict(saved[2])
    for seed in range(3, 7):
        train(m, opt, [seed])
        train(n, again, [seed])
        sched.step()
        resumed.step()
    assert_same(m.parameters(), n.parameters())
    assert rates(opt) == rates(again)


def test_a_group_added_after_a_scheduler_was_built() -> None:
    a, b = tensors((2,), (3,))
    opt = SGD([a], lr=0.5)
    L.ExponentialLR(opt, 0.5)
    opt.add_param_group({"params": [b], "lr": 0.25})
    sched = L.ExponentialLR(opt, 0.5)
    opt.step()
    sched.step()
    assert [g["lr"] for g in opt.param_groups] == [0.25, 0.125]


def test_a_chain_of_the_seeds_names_needs_cycle_momentum_off() -> None:
    opt = Optimizer(tensors((2,)), sgd_step, lr=0.1)
    with pytest.raises(ValueError, match="momentum"):
        L.OneCycleLR(opt, 0.1, total_steps=5)
    sched = L.OneCycleLR(opt, 0.1, total_steps=5, cycle_momentum=False)
    opt.step()
    sched.step()
    assert opt.hypers[0]["lr"] != 0.1


@every_optimizer
def test_averaged_weights(case: Case) -> None:
    m = model()
    opt = case(m.parameters(), lr=0.1)
    averaged = AveragedModel(m)
    sched = SWALR(opt, swa_lr=0.01, anneal_epochs=2)
    seen = []
    for seed in range(3):
        train(m, opt, [seed])
        averaged.update_parameters(m)
        seen.append([p.detach().clone() for p in m.parameters()])
        sched.step()
    assert opt.hypers[0]["lr"] == pytest.approx(0.01)
    assert opt.param_groups[0]["swa_lr"] == 0.01
    for i, p in enumerate(averaged.module.parameters()):
        torch.testing.assert_close(p, torch.stack([s[i] for s in seen]).mean(0))
