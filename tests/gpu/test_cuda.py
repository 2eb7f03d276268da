"""Every optimizer on one GPU: equal to the same run on the CPU, without a host wait in the step."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import fastopt

from ..distributed.problems import EVERY, Model, set_average

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@pytest.mark.parametrize("name", EVERY)
def test_equals_the_cpu(name: str) -> None:
    models = Model(), Model().cuda()
    optimizers = [EVERY[name](model.param_groups()) for model in models]
    for step in range(8):
        for opt in optimizers:
            set_average(opt, step, 1)
            opt.freeze_to(1 if step < 3 else 0)
            opt.step()
    for (path, p), q in zip(models[0].named_parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(q.cpu(), p, rtol=1e-5, atol=1e-6, msg=lambda text, path=path: f"{path}: {text}")


@pytest.mark.parametrize("name", [name for name in EVERY if name != "adamw"])
def test_no_host_wait(name: str) -> None:
    model = Model().cuda()
    opt = EVERY[name](model.param_groups())
    for step in range(3):
        set_average(opt, step, 1)
        opt.step()
    set_average(opt, 3, 1)
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.step()
        opt.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_learning_rate_on_the_gpu() -> None:
    rate = torch.tensor(0.1, device="cuda")
    weights = [nn.Parameter(torch.ones(5, device="cuda")) for _ in range(2)]
    optimizers = [fastopt.Adam([weights[0]], lr=rate), fastopt.Adam([weights[1]], lr=0.1)]
    for step in range(4):
        rate.fill_(0.1 / (step + 1))
        optimizers[1].set_hyper("lr", 0.1 / (step + 1))
        for w, opt in zip(weights, optimizers, strict=True):
            w.grad = torch.full_like(w, step - 1.5)
            opt.step()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)
