"""What the engine keeps from step to step must not hold memory that the user has given up."""

from __future__ import annotations

import gc
import weakref

import torch

from fastopt import Adam


def test_dropped_gradients_are_freed() -> None:
    ps = [torch.ones(4, requires_grad=True) for _ in range(3)]
    opt = Adam(ps, engine="foreach")
    for _ in range(4):
        for p in ps:
            p.grad = torch.ones(4)
        opt.step()
        held = [weakref.ref(p.grad.untyped_storage()) for p in ps]
        grads = [weakref.ref(p.grad) for p in ps]
        opt.zero_grad()
        gc.collect()
        assert all(r() is None for r in [*held, *grads])


def test_new_gradients_of_another_kind_are_noticed() -> None:
    """A gradient at the address of the last one may still differ from it."""
    p, q = (torch.arange(6.0).reshape(2, 3).clone().requires_grad_() for _ in range(2))
    ours, theirs = Adam([p], lr=0.1, engine="foreach"), Adam([q], lr=0.1, engine="eager")
    memory = torch.arange(6.0)
    for i in range(5):
        for x in (p, q):
            x.grad = memory.view(3, 2).t() if i % 2 else memory.view(2, 3)
        ours.step()
        theirs.step()
        assert torch.equal(p, q)
