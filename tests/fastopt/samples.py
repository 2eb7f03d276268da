"""What the tests of this folder share: every optimizer as a case, parameters with gradients, and a small model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastopt import SGD, Adam, Lamb, Larc, Lookahead, Optimizer, OptimWrapper, QHAdam, RAdam, Ranger, RMSProp


@dataclass(frozen=True)
class Case:
    """One optimizer to test: how to build it, and the hypers that make it a case of its own."""

    name: str
    build: Callable[..., Optimizer]
    hypers: Mapping[str, Any] = field(default_factory=dict)

    def __call__(self, params: Any, **hypers: Any) -> Optimizer:
        return self.build(params, **{**self.hypers, **hypers})

    def __str__(self) -> str:
        return self.name


def lookahead_sgd(params: Any, k: int = 2, alpha: float = 0.5, **hypers: Any) -> Optimizer:
    """Lookahead around SGD, which synchronises within a few steps."""
    return Lookahead(SGD(params, **hypers), k=k, alpha=alpha)


def lookahead_rmsprop(params: Any, **hypers: Any) -> Optimizer:
    """Lookahead around RMSProp, where PyTorch's name `alpha` means something else than Lookahead's."""
    return Lookahead(RMSProp(params, **hypers), k=2)


def wrapped_adamw(params: Any, lr: Any = 1e-3, wd: float = 0.01, **hypers: Any) -> Optimizer:
    """torch's AdamW inside OptimWrapper."""
    return OptimWrapper(params, opt=torch.optim.AdamW, lr=lr, weight_decay=wd, **hypers)


NATIVE = [
    Case("SGD", SGD),
    Case("SGD-mom", SGD, {"mom": 0.9, "wd": 0.1}),
    Case("SGD-l2", SGD, {"mom": 0.9, "wd": 0.1, "decouple_wd": False}),
    Case("RMSProp", RMSProp),
    Case("RMSProp-mom", RMSProp, {"mom": 0.8, "wd": 0.1}),
    Case("Adam", Adam),
    Case("RAdam", RAdam, {"sqr_mom": 0.9}),
    Case("RAdam-beta", RAdam, {"sqr_mom": 0.9, "beta": 50.0}),
    Case("QHAdam", QHAdam, {"wd": 0.1}),
    Case("Larc", Larc, {"wd": 0.1}),
    Case("Larc-noclip", Larc, {"mom": 0.0, "clip": False}),
    Case("Lamb", Lamb, {"wd": 0.1}),
    Case("Ranger", Ranger, {"k": 3, "sqr_mom": 0.9}),
    Case("Lookahead-SGD", lookahead_sgd, {"mom": 0.9}),
    Case("Lookahead-RMSProp", lookahead_rmsprop),
]
ALL = [*NATIVE, Case("OptimWrapper-AdamW", wrapped_adamw)]

CLASSES = [SGD, RMSProp, Adam, RAdam, QHAdam, Larc, Lamb, Ranger]

every_class = pytest.mark.parametrize("cls", CLASSES, ids=lambda c: c.__name__)
every_native = pytest.mark.parametrize("case", NATIVE, ids=str)
every_optimizer = pytest.mark.parametrize("case", ALL, ids=str)


def seeded(seed: int = 0) -> torch.Generator:
    """A random generator of its own, so that tests do not depend on their order."""
    return torch.Generator().manual_seed(seed)


def tensors(
    *shapes: Sequence[int], seed: int = 0, dtype: torch.dtype = torch.float32, requires_grad: bool = False
) -> list[Tensor]:
    """One random tensor per shape."""
    g = seeded(seed)
    return [
        torch.randn(tuple(s), generator=g, dtype=torch.float64).to(dtype).requires_grad_(requires_grad) for s in shapes
    ]


def give_grads(params: Iterable[Tensor], seed: int) -> None:
    """A random gradient for each parameter, the same for the same seed."""
    g = seeded(1000 + seed)
    for p in params:
        p.grad = torch.randn(p.shape, generator=g, dtype=torch.float64).to(p.dtype)


def run_steps(opt: torch.optim.Optimizer, params: Sequence[Tensor], seeds: Iterable[int]) -> None:
    """One step per seed, each on gradients made from it."""
    for seed in seeds:
        give_grads(params, seed)
        opt.step()


def values(params: Iterable[Tensor]) -> list[Tensor]:
    """Copies of the parameters."""
    return [p.detach().clone() for p in params]


def assert_same(ours: Iterable[Tensor], theirs: Iterable[Tensor]) -> None:
    """Bit for bit the same."""
    for a, b in zip(ours, theirs, strict=True):
        assert torch.equal(a, b), (a, b)


def assert_moved(ours: Iterable[Tensor], before: Iterable[Tensor]) -> None:
    """Every tensor has changed."""
    for a, b in zip(ours, before, strict=True):
        assert not torch.equal(a, b)


def model(seed: int = 0) -> nn.Sequential:
    """Two layers, so that there are several parameters of several shapes."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2))


def batch(seed: int = 0, n: int = 8) -> tuple[Tensor, Tensor]:
    """Inputs and targets for `model`."""
    g = seeded(seed)
    return torch.randn(n, 4, generator=g), torch.randn(n, 2, generator=g)


def backward(m: nn.Module, seed: int) -> Tensor:
    """Gradients of the mean square error on one batch; returns the loss."""
    x, y = batch(seed)
    loss = nn.functional.mse_loss(m(x), y)
    torch.autograd.backward(loss)
    return loss


def train(m: nn.Module, opt: torch.optim.Optimizer, seeds: Iterable[int]) -> None:
    """An ordinary loop, one step per seed."""
    for seed in seeds:
        backward(m, seed)
        opt.step()
        opt.zero_grad()
