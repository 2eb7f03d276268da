"""Every optimizer, sharded, on odd parameters: saved on N ranks and continued on M, as if it had never stopped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastopt import SGD, Adam, Lamb, Larc, Lookahead, OptimWrapper, QHAdam, RAdam, RMSProp, ranger
from fastopt.checkpoint import load, save
from fastopt.distributed import shard

from ..ranks import RankPool

Ranks = Callable[[int], RankPool]


def wrapped(params: Any, lr: Any) -> OptimWrapper:
    """A torch optimizer behind the library's interface."""
    return OptimWrapper(params, torch.optim.AdamW, lr=lr)


def ahead(params: Any, lr: Any) -> Lookahead:
    """Slow weights every second step, so that a checkpoint falls between two of them."""
    return Lookahead(SGD(params, lr=lr, mom=0.9), k=2)


KINDS: dict[str, Any] = {
    "sgd": lambda params, lr: SGD(params, lr=lr, mom=0.9, wd=0.01),
    "rmsprop": RMSProp,
    "adam": Adam,
    "radam": RAdam,
    "qhadam": QHAdam,
    "lookahead": ahead,
    "ranger": ranger,
    "wrapped": wrapped,
    "larc": Larc,
    "lamb": Lamb,
}


class Odd(nn.Module):
    """Parameters of several dtypes, 0-d, empty, tied, transposed, with fewer rows than ranks, and with odd names."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)

        def random(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator)

        values = {
            "a/b": random(7, 5),
            "größe 重み": random(11),
            "scalar": random(1)[0],
            "none": random(0, 4),
            "narrow": random(6, 3).bfloat16(),
            "wide": random(3, 2).double(),
            "turned": random(4, 9).t(),
            "cube": random(2, 3, 5),
        }
        for name, value in values.items():
            self.register_parameter(name, nn.Parameter(value))
        self.body = nn.Linear(5, 5, bias=False)
        self.tied = self.body

    def loss(self, number: int) -> Tensor:
        """A number whose gradient reaches every parameter, the same on every rank."""
        total = torch.zeros(())
        for at, p in enumerate(self.parameters()):
            total = total + ((p.float() - 0.1 * (number + at)) ** 2).sum() * (0.5 + 0.1 * at)
        return total


def job(kind: str, seed: int, stage: int) -> tuple[Odd, Any]:
    """A model and its sharded optimizer over two groups."""
    model = Odd(seed)
    params = list(model.parameters())
    return model, shard(KINDS[kind]([params[:3], params[3:]], lr=[0.01, 0.02]), model, stage=stage)


def train(model: Odd, opt: Any, numbers: range) -> None:
    """A step for each number."""
    for number in numbers:
        model.loss(number).backward()
        opt.step()
        opt.zero_grad()


def weights(model: Odd) -> dict[str, list[Any]]:
    """All parameters, exactly."""
    return {name: p.detach().double().tolist() for name, p in model.named_parameters()}


def start(rank: int, world: int, root: str) -> dict[str, Any]:
    """For every optimizer three steps, a checkpoint, and three steps more; the weights at the end."""
    ends = {}
    for kind in KINDS:
        model, opt = job(kind, 0, 1 + world % 2)
        train(model, opt, range(3))
        save(f"{root}/{kind}", step=world, model=model, opt=opt)
        train(model, opt, range(3, 6))
        ends[kind] = weights(model)
    return ends


def go_on(rank: int, world: int, root: str, number: int) -> dict[str, Any]:
    """For every optimizer: load the checkpoint of `number` ranks, three steps; the weights at the end.

    An even number of ranks loads into an optimizer without states, an odd one overwrites those that it has.
    """
    ends = {}
    for kind in KINDS:
        model, opt = job(kind, 9, 1 + world % 2)
        if world % 2:
            train(model, opt, range(1))
        load(f"{root}/{kind}", model=model, opt=opt, step=number, check="during" if world % 2 else "before")
        train(model, opt, range(3, 6))
        ends[kind] = weights(model)
    return ends


never_stopped: dict[int, dict[str, Any]] = {}
"""By the number of ranks that saved: where they got to."""


@pytest.mark.parametrize(("n", "m"), [(2, 2), (5, 1), (1, 3), (3, 5), (5, 2)])
def test_goes_on_as_if_it_had_never_stopped(n: int, m: int, ranks: Ranks, tmp_path_factory: Any) -> None:
    root: Path = tmp_path_factory.getbasetemp() / "every-optimizer"
    if n not in never_stopped:
        never_stopped[n] = ranks(n).run(start, str(root))[0]
    results = ranks(m).run(go_on, str(root), n)
    assert all(result == results[0] for result in results)
    for kind in KINDS:
        expected, got = never_stopped[n][kind], results[0][kind]
        if n == m:
            assert got == expected, kind
            continue
        for name in expected:  # another number of ranks rounds means and norms otherwise
            digits = 1e-2 if name == "narrow" else 1e-5
            a, b = (torch.tensor(values[name], dtype=torch.float64) for values in (got, expected))
            assert torch.allclose(a, b, rtol=digits, atol=digits), (kind, name, a, b)
