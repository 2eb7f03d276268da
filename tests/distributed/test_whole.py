"""Chains that need whole parameters: one owner each, balanced by cost, equal to one process bit for bit."""

from __future__ import annotations

import inspect
from typing import Any

import pytest
import torch
from torch import nn

from fastopt import Optimizer, OptimWrapper
from fastopt.distributed import Layout, ParamSpec, RanksDiffer, shard

from .muon import muon, newton_schulz, newton_schulz_flops
from .problems import Model, assert_same_run, feed, set_average

MATRICES = (((6, 4), (3, 8)), ((5, 5), (2, 9), (7, 2)))


def same_as_one_process(rank: int, world_size: int, name: str, steps: int = 4) -> None:
    def build(groups: Any) -> Optimizer:
        return muon(groups) if name == "muon" else OptimWrapper(groups, opt=getattr(torch.optim, name), lr=0.1)

    shapes = MATRICES if name == "Muon" else (*MATRICES, ((7,), ()))
    for stage in (1, 2):
        model, reference = Model(shapes), Model(shapes)
        opt = shard(build(model.param_groups()), model, stage=stage, cost=newton_schulz_flops)
        plain = build(reference.param_groups())
        assert opt.layout.kind == "whole"
        for step in range(steps):
            for each in (opt, plain):
                each.freeze_to(step % 2)
            feed(opt, stage, step, rank, world_size)
            set_average(plain, step, world_size)
            opt.step()
            plain.step()
            for each in (opt, plain):
                each.zero_grad(set_to_none=True)
        assert_same_run(opt, plain, f"{name}, stage {stage}, {world_size} ranks")


@pytest.mark.parametrize("world_size", [2, 3])
def test_a_muon_made_of_callbacks(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(same_as_one_process, "muon")


def test_its_iteration_makes_singular_values_of_about_one() -> None:
    values = torch.linalg.svdvals(newton_schulz(torch.randn(6, 9, generator=torch.Generator().manual_seed(0)), 5))
    assert 0.5 < values.min() <= values.max() < 1.3


IMPOSSIBLE = {
    "LBFGS": "couples all parameters and evaluates the loss itself",
    "SparseAdam": "sparse gradients, which have no slices",
}
TORCHS = sorted(
    name
    for name, kind in vars(torch.optim).items()
    if inspect.isclass(kind) and issubclass(kind, torch.optim.Optimizer) and kind is not torch.optim.Optimizer
)


def every_torch_optimizer(rank: int, world_size: int) -> list[str]:
    done = [name for name in TORCHS if name not in IMPOSSIBLE]
    for name in done:
        same_as_one_process(rank, world_size, name, steps=3)
    return done


def test_every_optimizer_of_torch(ranks: Any) -> None:
    done = ranks(2).run(every_torch_optimizer, timeout=120)[0]
    assert set(done) | set(IMPOSSIBLE) == set(TORCHS)
    assert len(done) >= 12


@pytest.mark.parametrize("name", sorted(IMPOSSIBLE))
def test_what_cannot_be_sharded_says_why(name: str) -> None:
    model = nn.Linear(2, 2)
    with pytest.raises(TypeError, match=f"{name}.*{IMPOSSIBLE[name]}"):
        shard(OptimWrapper(model.parameters(), opt=getattr(torch.optim, name)), model)


# ---- owners by cost


def test_owners_are_balanced_by_cost_not_by_size() -> None:
    # One long vector that costs nothing, and four square matrices.
    specs = [ParamSpec("long", (10_000,), torch.float32, 0, cost=1)]
    specs += [ParamSpec(f"m{i}", (10, 10), torch.float32, 0, cost=100) for i in range(4)]
    owners = [Layout.whole(specs, 2).owner(i) for i in range(5)]
    assert sorted(owners[1:]) == [0, 0, 1, 1]
    plain = Layout.whole([ParamSpec(s.name, s.shape, s.dtype, 0) for s in specs], 2)
    assert len({plain.owner(i) for i in range(1, 5)}) == 1


def costs(rank: int, world_size: int) -> None:
    model = Model(MATRICES)
    opt = shard(muon(model.param_groups()), model, cost=newton_schulz_flops)
    assert [spec.cost for spec in opt.layout.params] == [newton_schulz_flops(p) for p in model.parameters()]
    extra = nn.Parameter(torch.randn(3, 3))
    model.add_module("extra", nn.ParameterList([extra]))
    opt.add_param_group({"params": [extra]})
    assert opt.layout.params[-1].cost == newton_schulz_flops(extra)
    other = Model(MATRICES)
    with pytest.raises(RanksDiffer, match="cost"):
        shard(muon(other.param_groups()), other, cost=lambda p: rank)


def test_the_cost_function_of_shard(ranks: Any) -> None:
    ranks(2).run(costs)
    model = nn.Linear(2, 2)
    with pytest.raises(ValueError, match="the cost of 'weight' is -1"):
        shard(muon(model.parameters()), model, cost=lambda p: -1)
