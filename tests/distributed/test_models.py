"""Sharding among the things that a training script has: DDP, schedulers, hooks, tied weights, dtypes, odd groups."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

import fastopt
from fastopt.distributed import ShardedOptimizer, shard

from .problems import EVERY, Model, Shape, assert_same, assert_same_run, feed, members, set_average


def run(sharded: Any, plain: Any, stage: int, steps: range, rank: int, world_size: int) -> None:
    """Step both on the same averages."""
    for step in steps:
        feed(sharded, stage, step, rank, world_size)
        set_average(plain, step, world_size)
        sharded.step()
        plain.step()
        sharded.zero_grad(set_to_none=True)
        plain.zero_grad(set_to_none=True)


# ---- shapes, dtypes and groups

ODD: dict[str, tuple[tuple[tuple[Shape, ...], ...], tuple[torch.dtype, ...]]] = {
    "more ranks than elements": ((((1,), (2,)), ((),)), ()),
    "an empty group": ((((3, 2),), (), ((5,),)), ()),
    "nothing but empty parameters in a group": ((((0, 3), (0,)), ((7,),)), ()),
    "two dtypes": ((((9,), (4, 3), (5,)), ((6, 2), (3,))), (torch.float32, torch.bfloat16)),
    "thousands of elements": ((((1000, 37), (513,)), ((1001,),)), ()),
}


def odd(rank: int, world_size: int) -> None:
    for what, (shapes, dtypes) in ODD.items():
        for name in ("adam", "lookahead", "adamw", "lamb"):
            if name == "lamb" and dtypes:
                continue
            for stage in (1, 2):
                model, reference = Model(shapes, dtypes), Model(shapes, dtypes)
                sharded = shard(EVERY[name](model.param_groups()), model, stage=stage)
                plain = EVERY[name](reference.param_groups())
                run(sharded, plain, stage, range(4), rank, world_size)
                assert_same_run(sharded, plain, f"{what}: {name}, stage {stage}", exact=name != "lamb")


@pytest.mark.parametrize("world_size", [2, 4])
def test_odd_parameters_and_groups(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(odd)


class Tied(nn.Module):
    """An output layer that shares its weight with the embedding."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(5)
        self.embed = nn.Embedding(7, 5)
        self.hidden = nn.Linear(5, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.hidden(self.embed(x))))


def tied(rank: int, world_size: int) -> dict[str, int]:
    model, reference = Tied(), Tied()
    sharded, plain = (
        shard(fastopt.Adam(model.parameters(), lr=0.1), model),
        fastopt.Adam(reference.parameters(), lr=0.1),
    )
    for step in range(3):
        token = [torch.tensor([(step + r) % 7, (3 * r) % 7]) for r in range(world_size)]
        model(token[rank]).square().sum().backward()
        for each in range(world_size):
            (reference(token[each]).square().sum() / world_size).backward()
        sharded.step()
        plain.step()
        plain.zero_grad()
        for p, q in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)
    assert model.out.weight is model.embed.weight
    return {name: p.numel() for p, name in sharded.param_names().items()}


def test_tied_weights_are_one_parameter(ranks: Any) -> None:
    assert ranks(3).run(tied) == [{"embed.weight": 35, "hidden.weight": 25, "hidden.bias": 5}] * 3


def test_storage_of_a_transposed_parameter_is_fine() -> None:
    model = nn.Module()
    model.weight = nn.Parameter(torch.arange(6.0).view(2, 3).t())
    opt = shard(fastopt.SGD(model.parameters(), lr=1.0), model)
    model.weight.grad = torch.ones(3, 2)
    opt.step()
    assert torch.equal(model.weight, torch.tensor([[0.0, 3.0], [1.0, 4.0], [2.0, 5.0]]) - 1)


def rank_0_rules(rank: int, world_size: int) -> list[float]:
    """Parameters, other parameters and buffers take rank 0's values."""
    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), nn.Linear(3, 2))
    with torch.no_grad():
        for tensor in [*model.parameters(), model[1].running_mean, model[1].num_batches_tracked]:
            tensor.fill_(rank + 1)
    shard(fastopt.SGD(model[0].parameters(), lr=0.1), model)
    means = [float(t.double().mean()) for t in model.state_dict().values()]
    return [*means[:5], float(model[1].num_batches_tracked)]


def test_all_ranks_start_with_rank_0s_model(ranks: Any) -> None:
    assert ranks(3).run(rank_0_rules) == [[1.0] * 6] * 3


# ---- the rest of a training script


def network() -> nn.Sequential:
    torch.manual_seed(11)
    return nn.Sequential(nn.Linear(4, 9), nn.Tanh(), nn.Linear(9, 2))


def with_ddp(rank: int, world_size: int) -> list[str]:
    model, reference = network(), network()
    wrapped = DistributedDataParallel(model)
    sharded = shard(fastopt.Lamb(model.parameters(), lr=0.1), wrapped, stage=1)
    plain = fastopt.Lamb(reference.parameters(), lr=0.1)
    for step in range(4):
        batches = [torch.randn(5, 4, generator=torch.Generator().manual_seed(9 * step + r)) for r in range(world_size)]
        wrapped(batches[rank]).square().mean().backward()
        reference(torch.cat(batches)).square().mean().backward()
        norm = sharded.clip_grad_norm_(0.2)
        torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.2), rtol=1e-5, atol=0)
        sharded.step()
        plain.step()
        sharded.zero_grad()
        plain.zero_grad()
    for p, q in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-6)
    with pytest.raises(ValueError, match=r"stage 2 averages gradients itself: pass model\.module"):
        shard(fastopt.Lamb(model.parameters(), lr=0.1), wrapped)
    return list(sharded.param_names().values())


def test_stage_1_with_distributed_data_parallel(ranks: Any) -> None:
    assert ranks(2).run(with_ddp) == [["0.weight", "0.bias", "2.weight", "2.bias"]] * 2


def scheduled(rank: int, world_size: int) -> None:
    for on_inner in (False, True):
        model, reference = Model(), Model()
        inner, plain = fastopt.Adam(model.param_groups(), lr=0.1), fastopt.Adam(reference.param_groups(), lr=0.1)
        early = LambdaLR(inner, lambda step: 0.9**step) if on_inner else None
        sharded = shard(inner, model)
        late = early or LambdaLR(sharded, lambda step: 0.9**step)
        schedulers = [late, LambdaLR(plain, lambda step: 0.9**step)]
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            for step in range(4):
                run(sharded, plain, 2, range(step, step + 1), rank, world_size)
                for scheduler in schedulers:
                    scheduler.step()
        assert_same_run(sharded, plain, f"scheduler on the {'inner' if on_inner else 'sharded'} optimizer")
    model, reference = Model(), Model()
    sharded = shard(fastopt.Adam(model.param_groups(), lr=0.1), model)
    plain = fastopt.Adam(reference.param_groups(), lr=0.1)
    cycles = [OneCycleLR(opt, max_lr=0.2, total_steps=6) for opt in (sharded, plain)]
    for step in range(5):
        run(sharded, plain, 2, range(step, step + 1), rank, world_size)
        for cycle in cycles:
            cycle.step()
    assert_same_run(sharded, plain, "one cycle, which moves betas too")


def test_schedulers_on_either_optimizer(ranks: Any) -> None:
    ranks(2).run(scheduled)


def test_it_is_a_torch_optimizer_with_hooks() -> None:
    model = network()
    opt = shard(fastopt.Adam(model.parameters(), lr=0.1), model)
    assert isinstance(opt, torch.optim.Optimizer)
    assert isinstance(opt, ShardedOptimizer)
    calls: list[str] = []
    opt.register_step_pre_hook(lambda *_: calls.append("pre"))
    opt.register_step_post_hook(lambda *_: calls.append("post"))
    opt.step()
    assert calls == ["pre", "post"]
    assert opt.hypers[0] == {"lr": 0.1, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-5, "wd": 0.01}
    opt.hypers[0]["mom"] = 0.5
    assert opt.opt.param_groups[0]["betas"] == (0.5, 0.99)
    with torch.autograd.profiler.profile() as profile:
        opt.step()
        opt.zero_grad()
    names = {event.key for event in profile.key_averages()}
    assert "Optimizer.step#ShardedOptimizer.step" in names


def grows(rank: int, world_size: int) -> None:
    for name in ("adam", "adamw", "lamb"):
        for stage in (1, 2):
            model, reference = Model(), Model()
            *first, last = model.param_groups()
            *also, final = reference.param_groups()
            sharded, plain = shard(EVERY[name](first), model, stage=stage), EVERY[name](also)
            sharded.freeze_to(1)
            plain.freeze_to(1)
            run(sharded, plain, stage, range(2), rank, world_size)
            sharded.add_param_group(last)
            plain.add_param_group(final)
            sharded.unfreeze()
            plain.unfreeze()
            run(sharded, plain, stage, range(2, 5), rank, world_size)
            assert_same_run(sharded, plain, f"{name}, stage {stage}", exact=name != "lamb")


def test_add_param_group_after_sharding(ranks: Any) -> None:
    ranks(3).run(grows)


def in_subgroups(rank: int, world_size: int) -> list[float]:
    """Ranks 0 and 2 share one optimizer; rank 1 has one of its own."""
    pair, single = dist.new_group([0, 2]), dist.new_group([1])
    mine = single if rank == 1 else pair
    for name in ("adam", "adamw"):
        model, reference = Model(), Model()
        sharded = shard(EVERY[name](model.param_groups()), model, group=mine)
        plain = EVERY[name](reference.param_groups())
        run(sharded, plain, 2, range(3), sharded.rank, sharded.world_size)
        assert sharded.process_group is mine
        assert_same_run(sharded, plain, f"{name} of {sharded.world_size} of three ranks")
    if rank == 1:
        with pytest.raises(ValueError, match="rank 1 is not a member"):
            shard(EVERY["adam"](Model().param_groups()), Model(), group=pair)
    return [float(sharded.world_size)]


def test_a_process_group_of_some_ranks(ranks: Any) -> None:
    assert ranks(3).run(in_subgroups) == [[2.0], [1.0], [2.0]]


def checkpointed(rank: int, world_size: int) -> None:
    """Activation checkpointing, a layer used twice, and the same model compiled by nobody."""
    from torch.utils.checkpoint import checkpoint

    for reentrant in (False, True):
        torch.manual_seed(2)
        layer, head = nn.Linear(4, 4), nn.Linear(4, 1)
        model = nn.ModuleList([layer, head])
        torch.manual_seed(2)
        reference = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 1)])
        sharded = shard(fastopt.SGD(model.parameters(), lr=0.1), model, bucket_bytes=16)
        plain = fastopt.SGD(reference.parameters(), lr=0.1)
        for step in range(3):
            xs = [torch.randn(3, 4, generator=torch.Generator().manual_seed(7 * step + r)) for r in range(world_size)]
            x = xs[rank].requires_grad_()
            for _ in range(2):
                x = checkpoint(lambda y: torch.tanh(layer(y)), x, use_reentrant=reentrant)  # noqa: B023
            head(x).sum().backward()
            for other in xs:
                y = torch.tanh(reference[0](torch.tanh(reference[0](other.detach()))))
                (reference[1](y).sum() / world_size).backward()
            sharded.step()
            plain.step()
            sharded.zero_grad()
            plain.zero_grad()
            for p, q in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
                assert_same(p.detach(), q.detach(), f"reentrant={reentrant}", exact=False)


def test_activation_checkpointing_of_a_layer_that_is_used_twice(ranks: Any) -> None:
    ranks(2).run(checkpointed)


def test_the_last_optimizer_gets_the_gradients() -> None:
    model = network()
    first = shard(fastopt.SGD(model.parameters(), lr=0.1), model)
    again = shard(fastopt.SGD(model.parameters(), lr=0.1), model)
    model(torch.ones(1, 4)).sum().backward()
    before = [p.detach().clone() for p in members(again)]
    again.step()
    assert not any(map(torch.equal, before, members(again)))
    with pytest.raises(RuntimeError, match="was replaced after shard"):
        first.step()
