"""torch.compile(opt.step): the same numbers, without compiling anything anew as hypers and state move."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch._dynamo

from fastopt import Adam

from .samples import Case, assert_same, backward, every_optimizer, model


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@every_optimizer
def test_25_compiled_steps_with_a_moving_tensor_lr(case: Case) -> None:
    m, n = model(), model()
    lr, other = torch.tensor(0.05), torch.tensor(0.05)
    one, two = case(m.parameters(), lr=lr), case(n.parameters(), lr=other)
    graphs: list[Any] = []

    def counting(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    compiled = torch.compile(one.step, backend=counting)
    after_two = 0
    for seed in range(25):
        backward(m, seed)
        backward(n, seed)
        compiled()
        two.step()
        one.zero_grad()
        two.zero_grad()
        for rate in (lr, other):
            rate.mul_(0.9)
        if seed == 1:
            after_two = len(graphs)
    assert_same(m.parameters(), n.parameters())
    assert len(graphs) == after_two


def test_compiled_together_with_the_scheduler_and_number_lr() -> None:
    m, n = model(), model()
    one, two = Adam(m.parameters(), lr=0.05), Adam(n.parameters(), lr=0.05)
    scheds = [torch.optim.lr_scheduler.ExponentialLR(o, 0.9) for o in (one, two)]

    @torch.compile(backend="eager")
    def step() -> None:
        one.step()
        one.zero_grad()

    for seed in range(12):
        backward(m, seed)
        backward(n, seed)
        step()
        two.step()
        two.zero_grad()
        for sched in scheds:
            sched.step()
    assert_same(m.parameters(), n.parameters())
    assert one.hypers == two.hypers


def test_a_compiled_model_and_step() -> None:
    """Names and parameters are those of the model within."""
    m, n = model(), model()
    one, two = Adam(n.named_parameters(), lr=0.05), Adam(m.parameters(), lr=0.05)
    compiled = torch.compile(n, backend="aot_eager")
    step = torch.compile(one.step, backend="aot_eager")
    for seed in range(6):
        backward(compiled, seed)
        step()
        one.zero_grad()
        backward(m, seed)
        two.step()
        two.zero_grad()
    for p, q in zip(n.parameters(), m.parameters(), strict=True):
        torch.testing.assert_close(p, q)
    again = Adam(compiled.parameters(), lr=0.5)
    again.load_state_dict(one.state_dict())
    assert again.hypers == one.hypers
