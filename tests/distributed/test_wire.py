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
from fastopt.distributed import collectives, shard

from .problems import EVERY, Model, feed, members

WATCHED = {
    collectives: ("_reduce_scatter", "_all_gather"),
    dist: (
        *("all_reduce", "reduce", "broadcast", "gather", "scatter", "all_gather", "all_gather_object", "all_to_all"),
        *("all_to_all_single", "gather_object", "broadcast_object_list", "send", "recv", "barrier", "reduce_scatter"),
    ),
}
LARGER = {"_reduce_scatter": 1, "_all_gather": 0}
"""Which argument is the whole buffer, of which (N-1)/N go out from every rank."""


@contextmanager
def counted() -> Iterator[list[tuple[str, int]]]:
    """The collectives called inside, as (name, bytes of the whole buffer); control messages are uint8."""
    calls: list[tuple[str, int]] = []
    patch = pytest.MonkeyPatch()

    def spy(name: str, real: Any) -> Any:
        def called(*args: Any, **kwargs: Any) -> Any:
            buffer = args[LARGER.get(name, 0)]
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


def counts_of_a_step(rank: int, world_size: int) -> None:
    model = Model(SHAPES)
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model)
    # Two digests both ways, three places, and a flag per parameter and for all of them.
    control = 2 * 32 + 3 + 5 + 1

    with counted() as calls:
        backward(model)
    assert calls == [("control", control), *(("reduce_scatter", n) for n in reversed(BYTES))]
    with counted() as calls:
        opt.step()
        opt.zero_grad()
    assert calls == [("control", control), *(("all_gather", n) for n in BYTES)]

    opt.freeze_to(1)
    opt.state[members(opt)[0]].update(force_train=False)
    with counted() as calls:
        backward(model)
        opt.step()
        opt.zero_grad()
    data = [call for call in calls if call[0] != "control"]
    assert data == [("reduce_scatter", n) for n in reversed(BYTES[1:])] + [("all_gather", n) for n in BYTES[1:]]

    opt.state[members(opt)[1]].update(force_train=True)
    opt.freeze_to(3)
    with counted() as calls:
        backward(model)
        opt.step()
        opt.zero_grad()
    assert calls == [("control", control), ("reduce_scatter", BYTES[0]), ("control", control), ("all_gather", BYTES[0])]

    opt.unfreeze()
    with counted() as calls, opt.no_sync():
        backward(model)
        backward(model)
    assert calls == []
    with counted() as calls:
        backward(model)
        opt.clip_grad_norm_(1.0)
    reduced = [("reduce_scatter", n) for n in reversed(BYTES)]
    assert calls == [("control", control), *reduced, ("control", control), ("all_reduce", 8)]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.filterwarnings("ignore:Freezing 3 groups")
def test_a_step_is_one_reduce_scatter_and_one_all_gather_per_bucket(ranks: Any, world_size: int) -> None:
    ranks(world_size).run(counts_of_a_step)


def counts_of_other_chains(rank: int, world_size: int) -> None:
    for stage in (1, 2):
        model = Model(SHAPES)
        opt = shard(fastopt.Lamb(model.param_groups(), lr=0.1), model, stage=stage)
        feed(opt, stage, 0, rank, world_size)
        with counted() as calls:
            opt.step()
        data = [call for call in calls if call[0] != "control"]
        # LAMB needs two norms and the count of five parameters: 15 numbers of 8 bytes, in one collective.
        reduced = [("reduce_scatter", n) for n in reversed(BYTES)] if stage == 2 else []
        assert data == [*reduced, ("all_reduce", 8 * 15), *(("all_gather", n) for n in BYTES)]

        model = Model(SHAPES)
        opt = shard(EVERY["adamw"](model.param_groups()), model, stage=stage)
        feed(opt, stage, 0, rank, world_size)
        with counted() as calls:
            opt.step()
        moved = {name: sum(n for each, n in calls if each == name) for name in ("reduce", "broadcast", "all_reduce")}
        assert moved == {"reduce": sum(BYTES) * (stage - 1), "broadcast": sum(BYTES), "all_reduce": 0}
        assert {name for name, _ in calls} <= {"control", "reduce", "broadcast"}


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


def gradients_held(rank: int, world_size: int) -> int:
    """Bytes of gradients alive after a backward pass, found by what the optimizer keeps."""
    model = Model(SHAPES)
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model)
    backward(model)
    assert all(p.grad is None for p in model.parameters())
    parts = [opt._gradients.slice(i) for i in range(5)]
    storages = {
        part.untyped_storage().data_ptr(): part.untyped_storage().nbytes() for part in parts if part is not None
    }
    return sum(storages.values())


@pytest.mark.parametrize("world_size", [2, 4])
def test_stage_2_keeps_one_nth_of_the_gradients(ranks: Any, world_size: int) -> None:
    assert ranks(world_size).run(gradients_held) == [sum(BYTES) // world_size] * world_size


def test_parameters_become_views_and_keep_their_identity() -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last), nn.Linear(3, 2))
    before = {name: (id(p), p.detach().clone()) for name, p in model.named_parameters()}
    opt = shard(fastopt.SGD(model.parameters(), lr=0.1), model)
    for name, p in model.named_parameters():
        assert id(p) == before[name][0]
        assert torch.equal(p, before[name][1])
        assert p.is_contiguous()
    assert len({p.untyped_storage().data_ptr() for p in model.parameters()}) == len(opt.layout.buckets) == 1
