"""Everything at once, through real forward and backward passes, against one process: bit for bit.

Sixty steps by default, as many as `FASTOPT_STRESS_STEPS` says.
"""

from __future__ import annotations

import os
import random
from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import Optimizer
from fastopt.distributed import shard

from .problems import ELEMENTWISE, Model, assert_same_run, gradient, members

STEPS = int(os.environ.get("FASTOPT_STRESS_STEPS", "60"))


class Called(Model):
    """A model that is called, so that parameters come back under its forward pass."""

    def forward(self, step: int, rank: int, used: list[bool]) -> Tensor | None:
        """A loss whose gradient is exactly `gradient(step, i, rank)` for every parameter in use that trains."""
        terms = [
            (p * gradient(step, i, rank, p.detach())).sum()
            for i, p in enumerate(p for group in self.groups for p in group)
            if used[i] and p.requires_grad
        ]
        return sum(terms[1:], terms[0]) if terms else None


def reaches(opt: Optimizer, used: list[bool]) -> bool:
    """Whether a backward pass comes to any parameter that trains: some require a gradient and do not step."""
    where = [i for i, group in enumerate(opt.param_groups) for _ in group["params"]]
    return any(u and p.requires_grad and opt.steps_on(i, p) for u, p, i in zip(used, members(opt), where, strict=True))


def anything(
    rank: int,
    world_size: int,
    name: str,
    seed: int,
    steps: int = STEPS,
    how: Mapping[str, Any] | None = None,
    device: str = "cpu",
) -> None:
    """Random freezing, marks, rates and accumulation, alike on all ranks; gradients and whole passes that some lack."""
    rng = random.Random(seed)
    model, reference = Called().to(device), Called().to(device)
    sizes = {"bucket_bytes": rng.choice([60, 150, 2**20])}
    sharded = shard(ELEMENTWISE[name](model.param_groups()), model, **sizes, **(how or {}))
    plain = ELEMENTWISE[name](reference.param_groups())
    count = len(members(plain))
    for step in range(steps):
        marked, mark = rng.randrange(count), rng.choice(["force_train", "do_wd"])
        setting = rng.random() < 0.5
        first = rng.randrange(4)
        rate = rng.choice([0.1, 0.01, 0.02])
        for opt in (sharded, plain):
            if step % 7 == 0:
                opt.state[members(opt)[marked]].update({mark: setting})
            if step % 5 == 0:
                opt.freeze_to(min(first, 2))
            opt.set_hyper("lr", rate)
        passes = rng.choice([1, 1, 2, 3])
        uses = [[[rng.random() < 0.8 for _ in range(count)] for _ in range(world_size)] for _ in range(passes)]
        # Ranks make equally many synchronised passes, except for those that make none.
        anywhere = all(reaches(plain, used) for each in uses for used in each)
        for part, used in enumerate(uses):
            number = step * 10 + part
            synced = part == passes - 1 or (anywhere and rng.random() < 0.3)
            for each in range(world_size):
                whole = reference(number, each, used[each])
                if whole is not None:
                    # Averages over a power of two are exact, whenever they are divided.
                    (whole / world_size).backward()
            own = model(number, rank, used[rank])
            if own is not None and synced:
                own.backward()
            elif own is not None:
                with sharded.no_sync():
                    own.backward()
        if rng.random() < 0.1:
            sharded.zero_grad()
            plain.zero_grad()
        if rng.random() < 0.2:
            for opt in (sharded, plain):
                opt.set_hyper("lr", rate / 2)  # after backward has told the others of another one
        sharded.step()
        plain.step()
        sharded.zero_grad()
        plain.zero_grad()
    assert_same_run(sharded, plain, f"{name}, seed {seed}")


@pytest.mark.parametrize(("world_size", "name"), [(2, "adam"), (2, "adamw"), (2, "ranger"), (4, "adam")])
def test_anything(ranks: Any, world_size: int, name: str) -> None:
    ranks(world_size).run(anything, name, 17 + world_size, timeout=100 + 2 * STEPS)
    assert torch.is_grad_enabled()
