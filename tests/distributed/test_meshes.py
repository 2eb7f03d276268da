"""Process groups and device meshes: a dimension of a mesh, and hybrid sharding on two, against one process."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

import fastopt
from fastopt.checkpoint import load, save
from fastopt.distributed import RanksDiffer, shard
from fastopt.distributed.communication.collectives import control_group
from fastopt.distributed.communication.copy_transport import SLOTS
from fastopt.distributed.communication.transport import GroupTransport

from ..ranks import run_ranks
from .muon import muon
from .problems import EVERY, Model, assert_same_run, average, feed, gradient, members, set_average
from .test_stress import Called
from .test_wire import BYTES, SHAPES, backward, counted

MESH = ("replicate", "shard")


def same_as_one_process(
    rank: int, world_size: int, shape: tuple[int, ...], names: list[str], transport: Literal["copy"] | None = None
) -> None:
    mesh = init_device_mesh("cpu", shape, mesh_dim_names=MESH[-len(shape) :])
    for name in names:
        build = muon if name == "muon" else EVERY[name]
        for stage in (1, 2):
            model, reference = Model(), Model()
            with torch.no_grad():  # rank 0's values count on every copy
                for p in model.parameters():
                    p.add_(float(rank))
            how: dict[str, Any] = {"stage": stage, "transport": transport, "bucket_bytes": 100}
            opt = shard(build(model.param_groups()), model, group=mesh, **how)
            plain = build(reference.param_groups())
            assert (opt.world_size, opt.rank) == (shape[-1], rank % shape[-1])
            for step, first in enumerate((0, 1, 2, 0)):
                for each in (opt, plain):
                    each.freeze_to(first)
                feed(opt, stage, step, rank, world_size)
                set_average(plain, step, world_size)
                if step == 1:
                    got, want = opt.clip_grad_norm_(0.5), torch.nn.utils.clip_grad_norm_(active(plain), 0.5)
                    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
                opt.step()
                plain.step()
                for each in (opt, plain):
                    each.zero_grad(set_to_none=True)
            # Clipping multiplies by a norm that was summed in another order.
            assert_same_run(opt, plain, f"{name}, stage {stage} on a mesh {shape}", exact=False)


def active(opt: fastopt.Optimizer) -> list[torch.Tensor]:
    return [p for i, group in enumerate(opt.param_groups) if not opt.is_frozen(i) for p in group["params"]]


@pytest.mark.parametrize("shape", [(2, 2), (4, 1), (1, 4), (4,)], ids=str)
def test_a_mesh_equals_one_process(ranks: Any, shape: tuple[int, ...]) -> None:
    ranks(4).run(same_as_one_process, shape, ["adam", "lamb", "muon"], timeout=120)


def passes_of_some(rank: int, world_size: int) -> None:
    """Rank 0 makes no backward pass, the others make two: it hears of them one after the other, when it steps."""
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=MESH)
    model, reference = Called(), Called()
    opt = shard(EVERY["adam"](model.param_groups()), model, group=mesh)
    plain = EVERY["adam"](reference.param_groups())
    used = [True] * len(members(plain))
    for step in range(2):
        for part in range(2):
            for each in range(1, world_size):
                loss = reference(2 * step + part, each, used)
                assert loss is not None
                (loss / world_size).backward()
            own = model(2 * step + part, rank, used)
            assert own is not None
            if rank:
                own.backward()
        for both in (opt, plain):
            both.step()
            both.zero_grad()
    assert_same_run(opt, plain, "passes of some ranks", exact=False)


def test_a_rank_of_a_mesh_without_a_backward_pass(ranks: Any) -> None:
    ranks(4).run(passes_of_some, timeout=40)


class LateWork:
    """A collective whose result is there when it has been waited for, and not before."""

    def __init__(self, work: Any, then: Callable[[], None]) -> None:
        self._work, self._then = work, then
        self.done = False

    def wait(self) -> None:
        if not self.done:
            self._work.wait()
            self._then()
            self.done = True


class Late(GroupTransport):
    """What `CopyTransport` may do, on the CPU: results come late, and what is sent lies in slots used again."""

    def __init__(self, group: dist.ProcessGroup, devices: set[torch.device]) -> None:
        super().__init__(group)
        self._slots: list[Tensor] = [torch.empty(0)] * SLOTS
        self._users: list[LateWork | None] = [None] * SLOTS
        self._turn = 0
        self.used = 0

    def passing(self, numel: int, like: Tensor) -> Tensor:
        self._turn = (self._turn + 1) % SLOTS
        user = self._users[self._turn]
        assert user is None or user.done, "a slot is filled again before it has been read"
        if self._slots[self._turn].numel() < numel:
            self._slots[self._turn] = like.new_empty(numel)
        return self._slots[self._turn][:numel].fill_(float("nan"))

    def reduce_scatter(self, mine: Tensor, full: Tensor) -> LateWork:
        found = torch.empty_like(mine)
        work = super().reduce_scatter(found, full.clone())
        mine.fill_(float("nan"))
        late = self._users[self._turn] = LateWork(work, lambda: mine.copy_(found))  # type: ignore[func-returns-value]
        self.used += 1
        return late

    def all_gather(self, fulls: Sequence[Tensor], mines: Sequence[Tensor]) -> LateWork:
        found = [torch.empty_like(full) for full in fulls]
        work = super().all_gather(found, [mine.clone() for mine in mines])
        self.used += 1
        return LateWork(work, lambda: torch._foreach_copy_(list(fulls), found))  # type: ignore[func-returns-value]


def late_in_hybrid(rank: int, world_size: int, shape: tuple[int, int]) -> int:
    """Copies inside the shards of a mesh, and all-reduces across, that must wait for them."""
    module = sys.modules["fastopt.distributed.shard"]
    transports: list[Late] = []

    def copies(group: dist.ProcessGroup, devices: set[torch.device]) -> Late:
        transports.append(Late(group, devices))
        return transports[-1]

    before, module.copies = module.copies, copies  # type: ignore[attr-defined]
    try:
        same_as_one_process(rank, world_size, shape, ["adam", "lamb"], "copy")
    finally:
        module.copies = before  # type: ignore[attr-defined]
    return sum(transport.used for transport in transports)


def test_copies_inside_a_hybrid_mesh_are_waited_for(ranks: Any) -> None:
    assert min(ranks(4).run(late_in_hybrid, (2, 2), timeout=120)) > 50


def accumulated(rank: int, world_size: int, dtype: torch.dtype, reduce_dtype: torch.dtype | None = None) -> None:
    """Missing gradients on some ranks, two rounds: exact sums over all copies."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=MESH)
    model, reference = Model(dtypes=[dtype]), Model(dtypes=[dtype])
    opt, plain = (
        shard(fastopt.SGD(model.parameters(), lr=0.5), model, group=mesh, reduce_dtype=reduce_dtype),
        fastopt.SGD(reference.parameters(), lr=0.5),
    )
    for step in range(2):
        for i, (p, q) in enumerate(zip(members(opt), members(plain), strict=True)):
            having = [r for r in range(4) if (r + i + step) % 3] if i else []
            p.grad = gradient(step, i, rank, p.detach()) if rank in having else None
            q.grad = average(step, i, having, 4, q.detach()) if having else None
        opt.step()
        plain.step()
    for p, q in zip(members(opt), members(plain), strict=True):
        assert torch.equal(p, q)


def test_missing_gradients_count_as_zero_over_all_copies(ranks: Any) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        ranks(4).run(accumulated, dtype)
    ranks(4).run(accumulated, torch.bfloat16, torch.float32)


def collectives(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=MESH)
    model = Model(SHAPES)
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model, group=mesh)
    total = sum(BYTES)
    for _ in range(2):
        with counted() as calls:
            backward(model)
            opt.step()
            opt.zero_grad()
    sent = {name: [n for each, n in calls if each == name] for name, _ in calls}
    header = sum(sent["reduce_scatter"]) - total
    assert 0 < header < 4096
    assert sum(sent["all_gather"]) == total
    # Between the copies goes half a bucket each: what this rank holds.
    assert sum(sent["all_reduce"]) == (total + header) // 2
    assert opt.state_bytes() == 2 * total // 2


def test_copies_exchange_only_what_a_rank_holds(ranks: Any) -> None:
    ranks(4).run(collectives)


def differing(rank: int, world_size: int) -> str:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=MESH)
    model = Model()
    opt = shard(fastopt.SGD(model.parameters(), lr=0.1), model, group=mesh)
    if rank == 3:
        opt.set_hyper("lr", 0.2)
    feed(opt, 2, 0, rank, world_size)
    with pytest.raises(RanksDiffer) as caught:
        opt.step()
    return str(caught.value)


def test_a_difference_in_another_copy_is_told_to_all(ranks: Any) -> None:
    for text in ranks(4).run(differing):
        assert "hyper 'lr' of group 0" in text
        assert "0.2 on rank 3" in text


def part_of_a_mesh(rank: int, world_size: int) -> None:
    """Two groups of two ranks, each with a model of its own: one dimension of a mesh."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("task", "dp"))
    model, reference = Model(), Model()
    opt = shard(fastopt.Adam(model.parameters(), lr=0.1), model, group=mesh["dp"])
    plain = fastopt.Adam(reference.parameters(), lr=0.1)
    mine = [2 * (rank // 2), 2 * (rank // 2) + 1]
    for step in range(3):
        feed(opt, 2, step, rank, world_size)
        for i, q in enumerate(members(plain)):
            q.grad = average(step, i, mine, 2, q.detach())
        opt.step()
        plain.step()
    for p, q in zip(members(opt), members(plain), strict=True):
        assert torch.equal(p, q)
    with pytest.raises(ValueError, match="this one has 3"):
        shard(fastopt.Adam(Model().parameters()), Model(), group=init_device_mesh("cpu", (2, 2, 1)))


def test_one_dimension_of_a_mesh(ranks: Any) -> None:
    ranks(4).run(part_of_a_mesh)


def saved(rank: int, world_size: int, url: str) -> list[torch.Tensor]:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=MESH)
    model = Model()
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model, group=mesh)
    feed(opt, 2, 0, rank, world_size)
    opt.step()
    save(url, step=1, model=model, opt=opt)
    other = Model()
    again = shard(fastopt.Adam(other.param_groups(), lr=0.3), other, group=mesh)
    load(url, model=other, opt=again)
    for each in (opt, again):
        feed(each, 2, 1, rank, world_size)
        each.step()
    for p, q in zip(members(opt), members(again), strict=True):
        assert torch.equal(p, q)
    dist.barrier()
    return [p.detach().clone() for p in members(opt)]


def test_a_checkpoint_of_hybrid_sharding(ranks: Any, tmp_path: Path) -> None:
    found = ranks(4).run(saved, str(tmp_path))
    model = Model()
    opt = fastopt.Adam(model.param_groups(), lr=0.3)
    load(str(tmp_path), model=model, opt=opt)
    set_average(opt, 1, 4)
    opt.step()
    for weights in found:
        for p, q in zip(weights, members(opt), strict=True):
            assert torch.equal(p, q)


def control_beside_other_groups(rank: int, world_size: int) -> float:
    dist.new_group([0])  # after which the two ranks are in different numbers of groups
    group = control_group(dist.group.WORLD, range(world_size))
    total = torch.tensor(float(rank + 1))
    dist.all_reduce(total, group=group)
    return float(total)


def test_ranks_in_different_numbers_of_groups() -> None:
    """What carries messages beside NCCL is made on all ranks, however many groups each is in."""
    assert run_ranks(control_beside_other_groups, 2, timeout=60) == [3.0, 3.0]
