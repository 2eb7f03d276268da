"""More of what users of other sharded optimizers have complained about, beside test_complaints.py: here it is right.

The number of the thread stands in the name of the test. The references are one process with the averaged gradients.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

import fastopt
from fastopt.checkpoint import CheckpointError, load, save
from fastopt.distributed import shard

from .problems import Model, assert_same_run, feed, members, set_average
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


@pytest.mark.filterwarnings("ignore:Freezing 3 groups")
def test_deepspeed_4055_a_group_in_which_nothing_trains(ranks: Any) -> None:
    ranks(2).run(frozen_for, [3, 1, 3, 1], torch.float32)


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


def layers() -> nn.ModuleList:
    return nn.ModuleList(nn.Linear(4, 4) for _ in range(60))


def moved(rank: int, world_size: int, groups: int) -> list[str]:
    model = layers()
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
