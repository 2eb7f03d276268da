"""What goes over the wire, counted collective by collective, and what each rank holds, against the formulas."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

import fastopt
from fastopt.distributed import shard
from fastopt.distributed.communication import transport

from .problems import EVERY, Model, feed, members

WATCHED = {
    transport: ("_reduce_scatter", "_all_gather", "_all_gather_several"),
    dist: (
        *("all_reduce", "reduce", "broadcast", "gather", "scatter", "all_gather", "all_gather_object", "all_to_all"),
        *("all_to_all_single", "gather_object", "broadcast_object_list", "send", "recv", "barrier", "reduce_scatter"),
    ),
}
LARGER = {"_reduce_scatter": 2, "_all_gather": 1, "_all_gather_several": 1}
"""Which argument is the whole buffer (or several), of which (N-1)/N go out from every rank."""


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives called inside, as (name, bytes of the whole buffer); control messages are uint8."""
    calls: list[tuple[str, int]] = []
    patch = pytest.MonkeyPatch()

    def spy(name: str, real: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            buffer = args[LARGER.get(name, 0)]
            if name == "_all_gather_several":
                before = len(calls)
                work = real(*args, **kwargs)
                if len(calls) == before:  # over Gloo it is a gather of one buffer, which has been counted
                    calls.append(("all_gather", sum(each.nbytes for each in buffer)))
                return work
            size = buffer.numel() * buffer.element_size() if isinstance(buffer, Tensor) else -1
            control = isinstance(buffer, Tensor) and buffer.dtype == torch.uint8
            calls.append(("control" if control else name.strip("_"), size))
            return real(*args, **kwargs)

        return called

    for module, names in WATCHED.items():
        for name in names:
            patch.setattr(module, name, spy(name, getattr(module, name)))
    try:
        yield calls
    finally:
        patch.undo()


SHAPES = (((8, 8), (16,)), ((32, 4),), ((64,), (8, 2)))
BYTES = [4 * 80, 4 * 128, 4 * 80]
"""Of each group; multiples of 4 ranks x 16 bytes, so that nothing is padded."""


def backward(model: Model) -> None:
    total = sum(p.square().sum() for p in model.parameters() if p.requires_grad)
    assert isinstance(total, Tensor)
    total.backward()


def header(world_size: int, flags: int, first: bool = True) -> int:
    """Bytes that the headers of all parts of a float32 bucket add: a flag per parameter, and the digests."""
    # Four places, five flags, two digests of 32 bits and their complements; in units of 16 bytes.
    numbers = flags + (4 + 5 + 2 * 2 * 32 if first else 0)
    return world_size * 16 * -(-numbers // 4)


def counts_of_a_step(rank: int, world_size: int) -> None:
    model = Model(SHAPES)
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model)
    whole = ("reduce_scatter", sum(BYTES) + header(world_size, 5))

    for _ in range(2):
        with counted() as calls:
            backward(model)
        assert calls == [whole]
        with counted() as calls:
            opt.step()
            opt.zero_grad()
            opt.set_hyper("lr", 0.1)
        assert calls == [("all_gather", sum(BYTES))]

    # The first step after a change of freezing sends one empty bucket in the old shape, to agree on the new one.
    opt.freeze_to(1)
    for first in (True, False):
        with counted() as calls:
            backward(model)
            opt.step()
            opt.zero_grad()
        some = [("reduce_scatter", sum(BYTES[1:]) + header(world_size, 3)), ("all_gather", sum(BYTES[1:]))]
        assert calls == ([whole] if first else []) + some

    opt.unfreeze()
    with counted() as calls, opt.no_sync():
        backward(model)
        backward(model)
    assert calls == []
    with counted() as calls:
        backward(model)
        opt.clip_grad_norm_(1.0)
        opt.step()
    assert calls == [some[0], whole, ("all_reduce", 8), ("all_gather", sum(BYTES))]


@pytest.mark.parametrize("world_size", [2, 4])
def test_a_step_is_one_reduce_scatter_and_one_all_gather_per_bucket(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(counts_of_a_step)


def frozen_that_require_a_gradient(rank: int, world_size: int) -> None:
    """They are no reason for another round, also where only some ranks use them. Their gradients stay there."""
    for stepping in (False, True):
        model = Model(SHAPES)
        opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model, step_in_backward=stepping)
        trained, *frozen = model.groups[0]
        opt.state[trained]["force_train"] = True  # so that its group is on the wire
        opt.freeze_to(1)
        backward(model)
        opt.step()
        opt.zero_grad()
        for p in frozen:
            p.requires_grad_()
        before = [p.detach().clone() for p in frozen]
        with counted() as calls:
            losses = [p.square().sum() for p in (members(opt) if rank == 0 else members(opt)[1 + len(frozen) :])]
            sum(losses[1:], losses[0]).backward()
            opt.step()
        assert [name for name, _ in calls] == ["reduce_scatter", "all_gather"]
        assert all(map(torch.equal, frozen, before))
        assert [p.grad is not None for p in frozen] == [rank == 0] * len(frozen)


def test_frozen_parameters_that_require_a_gradient(ranks: Any) -> None:
    ranks(2).run(frozen_that_require_a_gradient)


def operators(rank: int, world_size: int) -> list[str]:
    """The collectives of a step on buckets of several groups, by PyTorch's names."""
    model = Model(SHAPES, (torch.float32, torch.bfloat16))
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model)
    with torch.autograd.profiler.profile() as profile:
        backward(model)
        opt.step()
    return sorted({event.key for event in profile.key_averages() if event.key.startswith("c10d::")})


def test_nothing_coalesced_goes_over_gloo(ranks: Any) -> None:
    """Two coalesced gathers under way at once crash PyTorch: see [Note: names in Gloo] in transport.py."""
    for told in ranks(2).run(operators):
        assert any("gather" in name for name in told)
        assert not any("coalesced" in name for name in told)


def waited_for_again(rank: int, world_size: int) -> list[list[float]]:
    """What is done to results between two waits."""
    group = transport.GroupTransport(None)
    mine, full, received = torch.empty(2), torch.ones(4), torch.empty(4)
    found = []
    for work, result in (
        (group.reduce_scatter(mine, full), mine),
        (group.all_gather([full], [full[2 * rank : 2 * rank + 2]]), full),
        (group.all_gather([received[:2], received[2:]], [torch.ones(1), torch.ones(1)]), received),
    ):
        work.wait()
        result.mul_(3)
        work.wait()
        found.append(result.tolist())
    return found


def test_waiting_again_writes_nothing(ranks: Any) -> None:
    """A sum is waited for on several streams, and divided before the last of them has come so far."""
    assert ranks(2).run(waited_for_again) == [[[6, 6], [3] * 4, [3] * 4]] * 2


def moved(world_size: int, name: str, many: bool, frozen: int) -> tuple[list[str], int, int]:
    """The collectives of a step of 60 parameters in one group or in as many, their bytes, and those of headers."""
    model = Model(tuple(((64, 16),) for _ in range(60)))
    opt = shard(EVERY[name](model.param_groups(split=many)), model, bucket_bytes=2**14)
    opt.freeze_to(frozen)
    for _ in range(2):
        with counted() as calls:
            backward(model)
            opt.step()
            opt.zero_grad()
    flags = [0] * len(opt.layout.buckets)
    for i in range(frozen, 60):
        flags[opt.layout.place(i)[0].index] += 1
    used = [n for n in reversed(flags) if n]
    headers = sum(header(world_size, n, first=k == 0) for k, n in enumerate(used))
    return [call for call, _ in calls], sum(n for _, n in calls), headers


def counts_of_groups(rank: int, world_size: int) -> None:
    size = 64 * 16 * 4
    calls, total, headers = moved(world_size, "sgd+mom", many=False, frozen=0)
    # 16 KiB hold four parameters: 15 buckets. The whole buffers of both directions, of which (N-1)/N leave each rank.
    assert calls == ["reduce_scatter"] * 15 + ["all_gather"] * 15
    assert total - headers == 2 * 60 * size
    calls, total, headers = moved(world_size, "sgd+mom", many=True, frozen=0)
    assert calls == ["reduce_scatter"] * 15 + ["all_gather"] * 15
    assert total - headers == 2 * 60 * size
    calls, total, headers = moved(world_size, "sgd+mom", many=True, frozen=37)
    assert calls == ["reduce_scatter"] * 6 + ["all_gather"] * 6
    assert total - headers == 2 * 23 * size


def test_complaint_14_and_16_many_groups_cost_what_one_costs_and_nothing_is_all_reduced(ranks: Any) -> None:
    ranks(2).run(counts_of_groups)


def trains_in_a_frozen_group(rank: int, world_size: int) -> None:
    """Normalisation layers that train in a frozen body do not bring the body back onto the wire."""
    model = Model((((64, 64), (64,), (64, 64), (64,)), ((64, 8),)))
    opt = fastopt.Adam(model.param_groups(), lr=0.1)
    for p in members(opt)[1:4:2]:
        opt.state[p] = {"force_train": True}
    sharded = shard(opt, model)
    sharded.freeze_to(1)
    for _ in range(2):
        with counted() as calls:
            backward(model)
            sharded.step()
            sharded.zero_grad()
    active = 4 * (2 * 64 + 64 * 8)
    assert calls == [("reduce_scatter", active + header(world_size, 3)), ("all_gather", active)]


def test_forced_parameters_of_a_frozen_group_are_sent_alone(ranks: Any) -> None:
    ranks(2).run(trains_in_a_frozen_group)


def counts_of_other_chains(rank: int, world_size: int) -> None:
    for stage in (1, 2):
        model = Model(SHAPES)
        opt = shard(fastopt.Lamb(model.param_groups(), lr=0.1), model, stage=stage)
        feed(opt, stage, 0, rank, world_size)
        with counted() as calls:
            opt.step()
        data = [call for call in calls if call[0] != "control"]
        # In stage 1 there is no reduction of ours to tell anything with: one message of a few bytes.
        assert len(calls) - len(data) == (stage == 1)
        # LAMB needs two norms and the count of five parameters: 15 numbers of 8 bytes, in one collective.
        reduced = [("reduce_scatter", sum(BYTES) + header(world_size, 5))] if stage == 2 else []
        assert data == [*reduced, ("all_reduce", 8 * 15), ("all_gather", sum(BYTES))]

        model = Model(SHAPES)
        opt = shard(EVERY["adamw"](model.param_groups()), model, stage=stage)
        feed(opt, stage, 0, rank, world_size)
        with counted() as calls:
            opt.step()
        names = [name for name, _ in calls if name != "control"]
        assert names == ["all_to_all_single"] * stage


def test_norm_chains_add_one_collective_and_whole_chains_use_owners(ranks: Any) -> None:
    ranks(2).run(counts_of_other_chains)


def test_one_rank_does_not_communicate(ranks: Any) -> None:
    ranks(1).run(silent)


def silent(rank: int, world_size: int) -> None:
    with counted() as calls:
        model = Model()
        opt = shard(fastopt.Lamb(model.param_groups(), lr=0.1), model)
        backward(model)
        opt.clip_grad_norm_(1.0)
        opt.step()
        opt.consolidate_state_dict()
    assert calls == []


def early(rank: int, world_size: int) -> tuple[int, list[int]]:
    """How many buckets are being reduced when backward comes to the first layer, and how many gradients are left."""
    model = nn.Sequential(*[nn.Linear(8, 8) for _ in range(4)])
    opt = shard(fastopt.SGD(model.parameters(), lr=0.1), model, bucket_bytes=4 * 72)
    model[2].bias.requires_grad_(False)
    seen: list[int] = []
    x = model[0](torch.ones(2, 8))
    with counted() as calls:
        x.register_hook(lambda _: seen.append(sum(name == "reduce_scatter" for name, _ in calls)))
        model[1:](x).sum().backward()
    assert len(opt.layout.buckets) == 4
    return seen[0], [sum(p.grad is not None for p in model.parameters())]


def test_buckets_are_reduced_while_backward_goes_on(ranks: Any) -> None:
    assert ranks(2).run(early) == [(3, [0])] * 2


# ---- memory


def held(rank: int, world_size: int, shapes: Any, name: str, frozen: int) -> int:
    model = Model(shapes)
    opt = shard(EVERY[name](model.param_groups()), model)
    opt.freeze_to(frozen)
    feed(opt, 2, 0, rank, world_size)
    opt.step()
    opt.zero_grad(set_to_none=True)
    assert sum(p.numel() for p in opt.state) <= sum(p.numel() for p in model.parameters())
    return opt.state_bytes()


@pytest.mark.parametrize("world_size", [2, 4])
def test_state_bytes_are_exactly_one_nth(ranks: Any, world_size: int) -> None:
    pool = ranks(world_size)
    # Adam keeps two float32 per parameter, SGD with momentum one; a frozen group that never trained has none.
    assert pool.run(held, SHAPES, "adam", 0) == [2 * sum(BYTES) // world_size] * world_size
    assert pool.run(held, SHAPES, "adam", 1) == [2 * sum(BYTES[1:]) // world_size] * world_size
    assert pool.run(held, SHAPES, "sgd+mom", 0) == [sum(BYTES) // world_size] * world_size
    assert pool.run(held, SHAPES, "sgd", 0) == [0] * world_size


def test_uneven_state_bytes(ranks: Any) -> None:
    shapes = (((1003, 7), (13,)), ((501,),))
    each = ranks(3).run(held, shapes, "adam", 0)
    elements = 1003 * 7 + 13 + 501
    assert sum(each) == 2 * 4 * elements
    # A region is a third of the bucket, rounded up to four elements; starts are aligned to four too.
    assert max(each) <= 2 * 4 * (elements / 3 + 2 * 4 + 2 * 4)


def test_one_giant_parameter_is_shared_by_all(ranks: Any) -> None:
    assert ranks(4).run(held, (((4096, 16),),), "adam", 0) == [2 * 4 * 4096 * 16 // 4] * 4


def gradients_held(rank: int, world_size: int) -> tuple[int, int]:
    """Bytes of gradients alive when a backward pass is over, and those of them that are headers."""
    model = Model(SHAPES)
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model)
    backward(model)
    assert all(p.grad is None for p in model.parameters())
    opt.clip_grad_norm_(1e9)
    parts = opt._gradients.slices(range(5))
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts if part is not None
    }
    return sum(storages.values()), header(world_size, 5) // world_size


@pytest.mark.parametrize("world_size", [2, 4])
def test_stage_2_keeps_one_nth_of_the_gradients(ranks: Any, world_size: int) -> None:
    for total, headers in ranks(world_size).run(gradients_held):
        assert total - headers == sum(BYTES) // world_size


def test_parameters_become_views_and_keep_their_identity() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(3, 2))
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    opt = shard(fastopt.SGD(model.parameters(), lr=0.1), model)
    for name, p in model.named_parameters():
        assert id(p) == before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.is_contiguous()
        assert p.untyped_storage().nbytes() == p.nbytes
    (bucket,) = opt.layout.buckets
    places = [opt.layout.place(i)[1].start for i in range(len(before))]
    first = next(model.parameters()).data_ptr()
    assert [p.data_ptr() - first for p in model.parameters()] == [4 * (at - places[0]) for at in places]
    assert max(places) < bucket.numel
