"""Every optimizer on one GPU: equal to the same run on the CPU, without a host wait in the step."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt

from ..distributed.problems import EVERY, Model, gradient, set_average

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

#: Optimizers by what a captured step of theirs needs: counts, both ways of a decision, norms.
CAPTURABLE: dict[str, Any] = {
    "adam": fastopt.Adam,
    "radam": fastopt.RAdam,
    "qhadam": fastopt.QHAdam,
    "lamb": fastopt.Lamb,
    "larc": fastopt.Larc,
    "ranger": fastopt.ranger,
    "lookahead": lambda params, **kwargs: fastopt.Lookahead(fastopt.SGD(params, mom=0.9, **kwargs), k=3),
}


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


def plain_adam(params: list[nn.Parameter], rate: Tensor) -> torch.optim.Optimizer:
    """fastopt's defaults in torch's AdamW, whose steps can be captured too."""
    hypers: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-5, "weight_decay": 0.01}
    return torch.optim.AdamW(params, lr=rate, capturable=True, **hypers)


@pytest.mark.parametrize("name", CAPTURABLE)
def test_a_captured_step_goes_on_by_itself(name: str) -> None:
    """Replays without `prepare_replay`, with a moving rate on the GPU: as in float64 on the CPU, step by step."""
    build = CAPTURABLE[name]
    params = [nn.Parameter(torch.linspace(-1, 1, n, device="cuda").reshape(-1, 1)) for n in (3, 2000)]
    exact = [nn.Parameter(p.detach().double().cpu()) for p in params]
    rate = torch.tensor(0.1, device="cuda")
    opt, reference = build(params, lr=rate, capturable=True), build(exact, lr=0.1, engine="eager")
    for p in params:
        p.grad = torch.zeros_like(p)

    def feed(step: int) -> None:
        rate.fill_(0.1 / (step + 1))
        reference.set_hyper("lr", float(rate))
        for i, (p, q) in enumerate(zip(params, exact, strict=True)):
            q.grad = gradient(step, i, 0, q.detach())
            assert p.grad is not None
            p.grad.copy_(q.grad)

    for step in range(3):
        feed(step)
        opt.step()
        reference.step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        opt.step()
    assert {choice.executor for choice in opt.engine} == {"triton"}
    for step in range(3, 15):
        feed(step)
        graph.replay()
        reference.step()
        for p, q in zip(params, exact, strict=True):
            torch.testing.assert_close(p.cpu().double(), q, rtol=1e-5, atol=1e-6, msg=lambda t, s=step: f"{s}: {t}")
            for key, value in reference.state[q].items():
                if key in ("step", "count"):
                    assert opt.state[p][key].item() == value == step + 1


def test_a_captured_step_beside_that_of_torch() -> None:
    """The same loop with torch's AdamW, word for word."""
    results = []
    for build in (plain_adam, lambda params, rate: fastopt.Adam(params, lr=rate, capturable=True)):
        rate = torch.tensor(0.1, device="cuda")
        params = [nn.Parameter(torch.linspace(-1, 1, 40, device="cuda"))]
        opt = build(params, rate)
        schedule = torch.optim.lr_scheduler.ExponentialLR(opt, 0.9)
        params[0].grad = torch.zeros_like(params[0])
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for step in range(3):
                params[0].grad.copy_(gradient(step, 0, 0, params[0].detach()))
                opt.step()
                schedule.step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            opt.step()
        for step in range(3, 9):
            params[0].grad.copy_(gradient(step, 0, 0, params[0].detach()))
            graph.replay()
            schedule.step()
        assert opt.param_groups[0]["lr"] is rate
        results.append((params[0].detach().cpu(), rate.item(), opt.state[params[0]]["step"].item()))
    torch.testing.assert_close(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1:] == results[1][1:]


def test_a_chain_that_runs_as_it_is_can_be_captured() -> None:
    """A callback that no recording can express, in a capturable group: its own operations are what is replayed."""

    def sorting_step(p: Tensor, lr: Tensor, step: Tensor, **kwargs: Any) -> None:
        assert p.grad is not None
        p.data.addcmul_(p.grad.sort().values, -lr / step)

    rate = torch.tensor(0.1, device="cuda")
    w, exact = nn.Parameter(torch.ones(5, device="cuda")), torch.ones(5, dtype=torch.float64)
    w.grad = torch.zeros(5, device="cuda")
    opt = fastopt.Optimizer([w], [fastopt.step_stat, sorting_step], lr=rate, capturable=True)
    graph = torch.cuda.CUDAGraph()
    for step in range(8):
        rate.fill_(0.1 / (step + 1))
        w.grad.copy_(gradient(step, 0, 0, w.detach()))
        exact -= rate.item() / (step + 1) * w.grad.cpu().double().sort().values
        if step < 3:
            opt.step()
            continue
        if step == 3:
            with torch.cuda.graph(graph):
                opt.step()
        graph.replay()
        torch.testing.assert_close(w.detach().cpu().double(), exact, rtol=1e-5, atol=1e-6)
    assert {choice.executor for choice in opt.engine} == {"eager"}


def test_a_whole_iteration_in_a_graph() -> None:
    """Forward, backward and step, whose gradients lie in the memory of the graph; beside the same without one."""
    captured, plain = nn.Linear(8, 3), nn.Linear(8, 3)
    plain.load_state_dict(captured.state_dict())
    captured, plain = captured.cuda(), plain.double()
    rate = torch.tensor(0.01, device="cuda")
    opt, reference = fastopt.Adam(captured.parameters(), lr=rate, capturable=True), fastopt.Adam(plain.parameters())
    x = torch.zeros(16, 8, device="cuda")

    def feed(step: int) -> None:
        x.copy_(torch.randn(16, 8, generator=torch.Generator().manual_seed(step)))
        rate.fill_(0.01 / (step + 1))
        reference.zero_grad()
        plain(x.cpu().double()).square().mean().backward()
        reference.set_hyper("lr", rate.item())
        reference.step()

    def iteration() -> None:
        opt.zero_grad()
        captured(x).square().mean().backward()
        opt.step()

    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for step in range(3):
            feed(step)
            iteration()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        iteration()
    for step in range(3, 12):
        feed(step)
        graph.replay()
        for p, q in zip(captured.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p.cpu().double(), q, rtol=1e-4, atol=1e-5, msg=lambda t, s=step: f"{s}: {t}")
