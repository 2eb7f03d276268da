"""What users of other sharded optimizers have complained about, one test for each: here it is right.

The number of the thread stands in the name of the test. The references are one process with the averaged gradients.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastopt
from fastopt.checkpoint import CheckpointError, load, save
from fastopt.distributed import RanksDiffer, shard
from fastopt.distributed.plan import plan

from ..fastopt.test_parts import local_only
from .muon import muon
from .problems import Model, assert_same_run, average, feed, gradient, members, set_average
from .test_wire import SHAPES, backward, counted


def pair(make: Any, dtype: torch.dtype = torch.float32, shapes: Any = None) -> tuple[Any, Any]:
    """The same optimizer of the same model twice: sharded, and in one process."""
    model, reference = (Model(shapes, [dtype]) if shapes else Model(dtypes=[dtype]) for _ in range(2))
    return shard(make(model.param_groups()), model, bucket_bytes=100), make(reference.param_groups())


def both_step(opt: Any, plain: Any, step: int, rank: int, world_size: int) -> None:
    feed(opt, 2, step, rank, world_size)
    set_average(plain, step, world_size)
    for each in (opt, plain):
        each.step()
        each.zero_grad(set_to_none=True)


def frozen_for(rank: int, world_size: int, schedule: list[int], dtype: torch.dtype) -> None:
    opt, plain = pair(lambda g: fastopt.Adam(g, lr=0.1), dtype)
    for step, first in enumerate(schedule):
        for each in (opt, plain):
            each.freeze_to(first)
        both_step(opt, plain, step, rank, world_size)
    assert_same_run(opt, plain, f"frozen {schedule}")


def test_pytorch_186998_unfreezing_what_was_frozen_at_first_in_low_precision(ranks: Any) -> None:
    ranks(2).run(frozen_for, [2, 2, 0, 0], torch.bfloat16)


def test_deepspeed_1767_freezing_and_unfreezing_in_the_middle(ranks: Any) -> None:
    ranks(2).run(frozen_for, [0, 0, 2, 2, 0, 1, 0], torch.float32)


@pytest.mark.filterwarnings("ignore:Freezing 3 groups")
def test_deepspeed_4055_a_group_in_which_nothing_trains(ranks: Any) -> None:
    ranks(2).run(frozen_for, [3, 1, 3, 1], torch.float32)


def no_state(rank: int, world_size: int) -> None:
    opt, _ = pair(lambda g: fastopt.Adam(g, lr=0.1))
    opt.freeze_to(2)
    feed(opt, 2, 0, rank, world_size)
    opt.step()
    trained = {id(p) for p in opt.param_groups[2]["params"]}
    assert {id(p) for p in opt.state if opt.state[p]} == trained
    own = sum(
        stop - start
        for start, stop in (
            opt.layout.interval(i, rank) for i in range(len(opt.layout.params) - 2, len(opt.layout.params))
        )
    )
    assert opt.state_bytes() == 2 * 4 * own


def test_deepspeed_2615_a_frozen_group_has_no_state(ranks: Any) -> None:
    ranks(2).run(no_state)


def frozen_state_is_saved(rank: int, world_size: int, url: str) -> None:
    opt, plain = pair(lambda g: fastopt.Adam(g, lr=0.1))
    both_step(opt, plain, 0, rank, world_size)
    for each in (opt, plain):
        each.freeze_to(2)
    both_step(opt, plain, 1, rank, world_size)
    save(url, step=2, model=opt.model, opt=opt)
    again, _ = pair(lambda g: fastopt.Adam(g, lr=0.7))
    load(url, model=again.model, opt=again)
    assert [again.is_frozen(i) for i in range(3)] == [True, True, False]
    assert [p.requires_grad for p in members(again)] == [p.requires_grad for p in members(opt)]
    for each in (again, plain):
        each.unfreeze()
    both_step(again, plain, 2, rank, world_size)
    assert_same_run(again, plain, "resumed")


def test_pytorch_192202_the_state_of_frozen_parameters_is_saved(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(frozen_state_is_saved, str(tmp_path))


def resumed_as_it_was(rank: int, world_size: int, url: str) -> None:
    """Built frozen, unfrozen, saved; the new run is built frozen again."""
    opt, _ = pair(lambda g: fastopt.Adam(g, lr=0.1))
    opt.freeze()
    opt.unfreeze()
    save(url, step=1, model=opt.model, opt=opt)
    again, plain = pair(lambda g: fastopt.Adam(g, lr=0.1))
    again.freeze()
    load(url, model=again.model, opt=again)
    both_step(again, plain, 0, rank, world_size)
    assert_same_run(again, plain, "everything trains")


def test_lightning_21901_resuming_does_not_freeze_again(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(resumed_as_it_was, str(tmp_path))


def without_gradient(rank: int, world_size: int) -> None:
    opt, plain = pair(lambda g: fastopt.Adam(g, lr=0.1, wd=0.1))
    both_step(opt, plain, 0, rank, world_size)
    opt.synchronize()
    still = [p.detach().clone() for p in members(opt)]
    moments = copy.deepcopy([dict(opt.state[p]) for p in members(opt)])
    feed(opt, 2, 1, rank, world_size)
    for i, p in enumerate(members(opt)):
        if i % 2:
            p.grad = None
    opt.step()
    opt.synchronize()
    for i, (p, before, state) in enumerate(zip(members(opt), still, moments, strict=True)):
        if i % 2:
            assert torch.equal(p, before)
            assert all(torch.equal(torch.as_tensor(opt.state[p][k]), torch.as_tensor(v)) for k, v in state.items())


def test_fairscale_605_a_parameter_without_a_gradient_does_not_move(ranks: Any) -> None:
    ranks(2).run(without_gradient)


def unused_on_one_rank(rank: int, world_size: int) -> None:
    opt, plain = pair(lambda g: fastopt.Adam(g, lr=0.1))
    for step in range(3):
        for i, (p, q) in enumerate(zip(members(opt), members(plain), strict=True)):
            having = [r for r in range(world_size) if (i + r + step) % 2]
            p.grad = gradient(step, i, rank, p.detach()) if rank in having else None
            q.grad = average(step, i, having, world_size, q.detach()) if having else None
        for each in (opt, plain):
            each.step()
            each.zero_grad(set_to_none=True)
    assert_same_run(opt, plain, "unused on one rank")


def test_pytorch_158719_a_parameter_that_one_rank_does_not_use(ranks: Any) -> None:
    ranks(2).run(unused_on_one_rank)


def saving_moves_nothing(rank: int, world_size: int, url: str) -> int:
    opt, plain = pair(lambda g: fastopt.Adam(g, lr=0.1))
    both_step(opt, plain, 0, rank, world_size)
    opt.synchronize()
    with counted() as calls:
        save(url, step=1, model=opt.model, opt=opt)
    names = {name for name, size in calls if size > 64}
    assert names <= {"control", "all_gather_object", "gather_object", "broadcast_object_list"}, calls
    shown = [
        piece
        for entry in opt.state_dict()["state"].values()
        for v in entry.values()
        if isinstance(v, tuple)
        for piece in v
    ]
    return sum(piece.data.numel() for piece in shown)


def test_pytorch_68181_saving_brings_no_state_together(ranks: Any, tmp_path: Path) -> None:
    written = ranks(2).run(saving_moves_nothing, str(tmp_path))
    assert sum(written) == 2 * sum(p.numel() for p in Model().parameters())  # megatron#659: nor is padding saved


def other_world_size(rank: int, world_size: int, url: str, saving: bool) -> None:
    opt, plain = pair(lambda g: fastopt.Adam(g, lr=0.1))
    set_average(plain, 0, 2)
    plain.step()
    if saving:
        feed(opt, 2, 0, rank, world_size)
        opt.step()
        save(url, step=1, model=opt.model, opt=opt)
    else:
        load(url, model=opt.model, opt=opt)
        both_step(opt, plain, 1, rank, world_size)
        assert_same_run(opt, plain, f"on {world_size} ranks")


def test_pytorch_65650_and_megatron_659_resuming_on_other_numbers_of_ranks(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(other_world_size, str(tmp_path), True)
    ranks(3).run(other_world_size, str(tmp_path), False)


def test_areal_1468_moments_are_not_dropped_in_silence(tmp_path: Path) -> None:
    opt, _ = pair(lambda g: fastopt.Adam(g, lr=0.1))
    save(str(tmp_path), step=1, model=opt.model)
    with pytest.raises(CheckpointError, match="holds no optimizer"):
        load(str(tmp_path), model=opt.model, opt=opt)


def groups_keep_their_hypers(rank: int, world_size: int) -> None:
    opt, plain = pair(lambda g: fastopt.Adam(g, lr=0.1, mom=[0.8, 0.9, 0.95], wd=[0.0, 0.1, 0.2]))
    both_step(opt, plain, 0, rank, world_size)
    opt.consolidate_state_dict()
    for each in (opt, opt.opt):
        assert [group["betas"][0] for group in each.param_groups] == [0.8, 0.9, 0.95]
    assert [group["weight_decay"] for group in opt.state_dict()["param_groups"]] == [0.0, 0.1, 0.2]
    assert [group["lr"] for group in opt.param_groups] == [0.1, 0.1 / 2, 0.1 / 3]


def test_pytorch_143828_groups_keep_their_hypers(ranks: Any) -> None:
    ranks(2).run(groups_keep_their_hypers)


def moved(rank: int, world_size: int, groups: int) -> list[str]:
    model = nn.ModuleList(nn.Linear(4, 4) for _ in range(60))
    params = list(model.parameters())
    size = len(params) // groups
    cut = [params[i * size : (i + 1) * size] for i in range(groups)]
    opt = shard(fastopt.Adam(cut, lr=slice(1e-3, 1e-1) if groups > 1 else 0.1), model)
    feed(opt, 2, 0, rank, world_size)
    opt.step()
    feed(opt, 2, 1, rank, world_size)
    with counted() as calls:
        opt.step()
        opt.synchronize()
    return [name for name, _ in calls]


def test_deepspeed_2125_many_groups_cost_what_one_costs(ranks: Any) -> None:
    one = ranks(2).run(moved, 1)
    assert one == ranks(2).run(moved, 120)
    # deepspeed#5758: gradients are reduce-scattered and parameters gathered, as promised, and nothing else
    assert set(one[0]) <= {"reduce_scatter", "all_gather", "control"}
    assert {"reduce_scatter", "all_gather"} <= set(one[0])


def test_pytorch_134191_dtensors_are_stepped_without_dispatch(ranks: Any) -> None:
    ranks(2).run(local_only)


def bytes_moved(rank: int, world_size: int) -> None:
    model = Model(SHAPES)
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model)
    sizes: list[int] = []
    for _ in range(2):
        with counted() as calls:
            backward(model)
            opt.step()
            opt.zero_grad()
            opt.synchronize()
        sizes = [n for name, n in calls if name in ("reduce_scatter", "all_gather")]
        assert "all_reduce" not in {name for name, _ in calls}
        assert "broadcast" not in {name for name, _ in calls}
    # Every gradient and every parameter once, and the headers.
    whole = 2 * 4 * sum(p.numel() for p in model.parameters())
    assert whole <= sum(sizes) < whole + 4096


def test_deepspeed_5758_no_all_reduce_where_a_reduce_scatter_is_promised(ranks: Any) -> None:
    ranks(2).run(bytes_moved)


def needs_more_than_slices(rank: int, world_size: int) -> None:
    for name, make in {"lamb": lambda g: fastopt.Lamb(g, lr=0.1), "muon": muon}.items():
        opt, plain = pair(make)
        for step in range(3):
            both_step(opt, plain, step, rank, world_size)
        assert_same_run(opt, plain, name, exact=name == "muon")


def test_deepspeed_490_and_7807_lamb_and_muon_on_partitions(ranks: Any) -> None:
    ranks(3).run(needs_more_than_slices)


def one_norm(rank: int, world_size: int) -> None:
    for norm_type in (2.0, 1.0, float("inf")):
        # torch's own norm does not take parameters without elements
        opt, plain = pair(lambda g: fastopt.Adam(g, lr=0.1), shapes=(((3, 5), (7,)), ((5,), (4, 6))))
        feed(opt, 2, 0, rank, world_size)
        set_average(plain, 0, world_size)
        got = opt.clip_grad_norm_(0.1, norm_type)
        want = nn.utils.clip_grad_norm_(members(plain), 0.1, norm_type)
        assert type(got) is Tensor
        torch.testing.assert_close(got, want, rtol=1e-6, atol=0)
        assert opt.clip_grad_norm_(1e9, norm_type).item() == pytest.approx(0.1, rel=1e-4)  # it has clipped
        ours = plain.clip_grad_norm_(1e9, norm_type).item()
        assert ours == pytest.approx(0.1, rel=1e-4)


def test_llmc_524_and_pytorch_170862_the_norm_is_that_of_all_gradients(ranks: Any) -> None:
    ranks(2).run(one_norm)


def other_rate(rank: int, world_size: int) -> str:
    opt, _ = pair(lambda g: fastopt.Adam(g, lr=0.1))
    opt.set_hyper("lr", 0.1 if rank else 0.2)
    feed(opt, 2, 0, rank, world_size)
    with pytest.raises(RanksDiffer) as caught:
        opt.step()
    return str(caught.value)


def test_nanochat_857_a_rate_that_differs_between_ranks_is_an_error(ranks: Any) -> None:
    for text in ranks(2).run(other_rate):
        assert "hyper 'lr' of group 0: 0.2 on rank 0; 0.1 on rank 1" in text


def other_order(rank: int, world_size: int) -> str:
    model = Model()
    groups = model.param_groups()
    if rank:
        groups = [groups[1], groups[0], groups[2]]
    with pytest.raises(RanksDiffer) as caught:
        shard(fastopt.Adam(groups), model)
    return str(caught.value)


def test_megatron_1515_an_order_of_groups_that_differs_is_an_error(ranks: Any) -> None:
    for text in ranks(2).run(other_order):
        assert "params[0] of group 0" in text


class Tied(nn.Module):
    """An embedding of 7 rows that is the output too: two and three ranks share it unevenly."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.embed, self.out = nn.Embedding(7, 3), nn.Linear(3, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.embed(x))


def tied(rank: int, world_size: int) -> None:
    model, reference = Tied(), Tied()
    opt = shard(fastopt.Adam(model.parameters(), lr=0.1), model)
    plain = fastopt.Adam(reference.parameters(), lr=0.1)
    x = torch.arange(7)
    for _ in range(3):
        for net, each in ((model, opt), (reference, plain)):
            nn.functional.cross_entropy(net(x), x).backward()
            each.step()
            each.zero_grad()
    opt.synchronize()
    assert model.out.weight is model.embed.weight
    torch.testing.assert_close(model.out.weight, reference.out.weight, rtol=1e-5, atol=1e-6)
    assert len(opt.layout.params) == 1


def test_pytorch_176076_tied_weights_and_uneven_shards(ranks: Any) -> None:
    ranks(3).run(tied)


def empty_parts(rank: int, world_size: int) -> None:
    shapes = (((1,), (2,)), ((1,),))
    opt, plain = pair(lambda g: fastopt.Lamb(g, lr=0.1), shapes=shapes)
    for step in range(3):
        both_step(opt, plain, step, rank, world_size)
    assert_same_run(opt, plain, "fewer elements than ranks", exact=False)
    feed(opt, 2, 3, rank, world_size)
    members(opt)[0].grad.fill_(float("inf") if rank == 0 else 1.0)
    assert not torch.isfinite(opt.clip_grad_norm_(1.0))  # on all ranks, those without elements too


def test_fairscale_180_and_pytorch_99174_ranks_without_elements_and_inf_on_one(ranks: Any) -> None:
    ranks(3).run(empty_parts)


def uneven_global_shapes(rank: int, world_size: int) -> None:
    torch.manual_seed(0)
    model = nn.Linear(4, 7)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    opt = fastopt.Lookahead(fastopt.Adam(model.parameters(), lr=0.1), k=1)
    model(torch.ones(2, 4)).sum().backward()
    opt.step()
    for i, shape in enumerate([(7, 4), (7,)]):
        for key in ("grad_avg", "slow_weights"):
            state = opt.state_dict()["state"][i][key]
            assert state.shape == shape
            assert state.full_tensor().shape == shape


def test_miles_credit_416_states_of_uneven_shards_know_their_global_shape(ranks: Any) -> None:
    ranks(3).run(uneven_global_shapes)


def memory_and_setup(rank: int, world_size: int) -> None:
    model = nn.ModuleList(nn.Linear(16, 16) for _ in range(50))
    with counted() as calls:
        opt = shard(fastopt.Adam(model.parameters(), lr=0.1), model)
    # Set-up takes a few messages and one broadcast per bucket, not per parameter.
    assert sum(name == "broadcast" for name, _ in calls) == len(opt.layout.buckets)
    assert len(calls) <= len(opt.layout.buckets) + 6
    one, two = plan(model, world_size, stages=[1, 2]).stages
    assert two.memory.gradients <= one.memory.gradients // world_size + 64 * len(two.sizes)
    assert two.memory.state == one.memory.state


def test_deepspeed_7677_and_1302_setting_up_is_cheap_and_stage_2_holds_less(ranks: Any) -> None:
    ranks(2).run(memory_and_setup)
