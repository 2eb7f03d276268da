"""Which executor runs a step on each device, found by making steps, whose results are compared with `eager`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from .. import Adam, Lamb, Optimizer
from .findings import Finding, sentence

CHAINS: dict[str, Callable[..., Optimizer]] = {"Adam": Adam, "Lamb": Lamb}
"""An elementwise chain and one with norms."""


def steps() -> Iterator[Finding]:
    """One finding per chain and device."""
    for device in ("cpu", *(f"cuda:{index}" for index in range(torch.cuda.device_count()))):
        for name in CHAINS:
            yield step(name, device)


def step(name: str, device: str) -> Finding:
    """What runs the chain on the device, and whether it does so rightly."""
    what = f"{name} on {device}"
    try:
        after, choice = _stepped(CHAINS[name], device, None)
        expected, _ = _stepped(CHAINS[name], device, "eager")
    except Exception as error:  # a compiler or a driver may raise anything
        return Finding("steps", what, "broken", sentence(error))
    text = f"{choice.executor}: {choice.reason}"
    if not torch.allclose(after, expected, rtol=1e-4, atol=1e-6):
        off = (after - expected).abs().max().item()
        return Finding("steps", what, "broken", f"{text}; but its parameters are {off:.1e} off those of eager")
    return Finding("steps", what, "ok", text)


def _stepped(make: Callable[..., Optimizer], device: str, engine: str | None) -> tuple[Tensor, Any]:
    """Parameters after three steps, and who made them."""
    generator = torch.Generator().manual_seed(0)
    values, grads = (torch.randn(3, 1000, generator=generator).to(device) for _ in range(2))
    p = torch.nn.Parameter(values[0].clone())
    opt = make([p], lr=0.1, engine=engine)
    for grad in grads:
        p.grad = grad.clone()
        opt.step()
    return p.detach(), opt.engine[0]
