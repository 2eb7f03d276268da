"""`check_replicas`: what has diverged is named on all ranks, and where all is alike it costs one small message."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

import fastopt
from fastopt.distributed import RanksDiffer, check_replicas, shard
from fastopt.distributed.checks.checksums import CHUNK, checksums

from .test_complaints import backward, body_and_head, groups
from .test_wire import counted

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float8_e4m3fn, torch.int64, torch.bool, torch.complex128)


def checksum(x: Tensor) -> str:
    return checksums({"x": x})["x"]


def test_a_checksum_is_of_every_bit_and_its_place() -> None:
    x = torch.randn(3, 50, generator=torch.Generator().manual_seed(0))
    assert checksum(x) == checksum(x.clone()) == checksum(x.T.contiguous().T)
    nearly = x.clone()
    nearly[1, 7] = torch.nextafter(x[1, 7], torch.tensor(9.0))
    others = [nearly, x.flip(0), x.T, x.view(50, 3), x.double(), x[:, :49], -x, x.view(torch.int32)]
    assert len({checksum(each) for each in [x, *others]}) == 1 + len(others)
    for dtype in DTYPES:
        values, other = (torch.tensor(numbers).to(dtype) for numbers in ([1, 0, 1, 1], [1, 1, 0, 1]))
        assert checksum(values) == checksum(values.clone()) != checksum(other)
    assert checksum(torch.zeros(0, 3)) == checksum(torch.ones(0, 3)) != checksum(torch.zeros(3, 0))
    assert checksum(torch.tensor(1.0)) != checksum(torch.tensor(2.0))


def test_a_checksum_of_more_than_a_chunk() -> None:
    x = torch.zeros(2 * CHUNK + 3, dtype=torch.int8)
    x[[0, CHUNK, 2 * CHUNK + 2]] = torch.tensor([1, 2, -3], dtype=torch.int8)
    want = 1 + 2 * (2 * CHUNK + 1) - 3 * (2 * (2 * CHUNK + 2) + 1)
    assert checksum(x).startswith(f"{want % 2**64:016x} ")


def told_by(call: Callable[[], Any]) -> str:
    with pytest.raises(RanksDiffer) as caught:
        call()
    return str(caught.value)


def diverged(rank: int, world_size: int) -> list[str]:
    """What one rank of four does alone to a sharded training, one thing after the other."""
    model = body_and_head()
    model.register_buffer("mean", torch.zeros(2))
    opt = fastopt.Adam(groups(model), lr=0.1)
    opt.freeze_to(1)
    opt = shard(opt, model)
    for step in range(2):
        backward(model, step, rank)
        opt.step()
        opt.zero_grad()
    with counted() as calls:
        check_replicas(model, opt)
    assert [name for name, _ in calls if name != "control"] == ["all_gather_object"]
    alone = rank == 2
    told = []

    def both(do: Callable[[], Any], undo: Callable[[], Any], **kwargs: Any) -> None:
        if alone:
            do()
        told.append(told_by(lambda: check_replicas(model, opt, **kwargs)))
        if alone:
            undo()
        check_replicas(model, opt, **kwargs)

    frozen, trained = model[0][0].weight, model[1].bias
    first = frozen.detach().flatten()[0].clone()
    with torch.no_grad():
        both(lambda: frozen[0, 0].add_(1), lambda: frozen[0, 0].copy_(first))
    both(lambda: model.mean.add_(1), lambda: model.mean.sub_(1), buffers=True)
    both(lambda: opt.set_hyper("lr", 0.2), lambda: opt.set_hyper("lr", 0.1))
    both(lambda: opt.state[trained].update(step=7), lambda: opt.state[trained].update(step=2))
    both(lambda: frozen.requires_grad_(True), lambda: frozen.requires_grad_(False))
    both(lambda: setattr(model, "more", nn.Linear(1, 1)), lambda: delattr(model, "more"))
    return told


def test_what_has_diverged_is_named_on_all_ranks(ranks: Any) -> None:
    found = ranks(4).run(diverged)
    assert found[0] == found[1] == found[2] == found[3]
    weight, buffer, lr, step, required, more = found[0]
    assert weight.startswith("the ranks disagree\n  parameter '0.0.weight': norm ")
    assert weight.count("\n") == 2
    assert "on ranks 0, 1, 3; norm " in weight
    assert "on rank 2\nthese replicas have diverged: go on from a checkpoint" in weight
    assert "buffer 'mean': norm 0 (0, 0), checksum" in buffer
    assert "'lr' of group 0: 0.1 on ranks 0, 1, 3; 0.2 on rank 2" in lr
    assert "'step' of '1.bias': 2 on ranks 0, 1, 3; 7 on rank 2" in step
    assert "requires_grad of '0.0.weight': False on ranks 0, 1, 3; True on rank 2" in required
    assert "parameter 'more.weight': nothing on ranks 0, 1, 3; norm " in more


def others(rank: int, world_size: int) -> list[str]:
    """Without `shard`: DistributedDataParallel, some of the ranks, copies of `fully_shard`; whole layouts."""
    told = []
    model = body_and_head()
    wrapped = DistributedDataParallel(model)
    for opt in (fastopt.Adam(model.parameters()), torch.optim.Adam(model.parameters())):
        backward(wrapped, 0, rank)
        opt.step()
        check_replicas(wrapped, opt)
        if rank == 3:
            next(iter(opt.state.values()))["grad_avg" if isinstance(opt, fastopt.Adam) else "exp_avg"].zero_()
        told.append(told_by(lambda opt=opt: check_replicas(wrapped, opt)))

    pair = dist.new_group([0, 3])
    if rank in (0, 3):
        told.append(told_by(lambda: check_replicas(model, opt, pair)))

    model = body_and_head()
    opt = shard(fastopt.OptimWrapper(torch.optim.AdamW(model.parameters())), model)
    backward(model, 0, rank)
    opt.step()
    check_replicas(model, opt)
    check_replicas(model)

    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("replicate", "shard"))
    model = body_and_head()
    for layer in (model[0], model):
        fully_shard(layer, mesh=mesh)
    opt = fastopt.Adam(model.parameters())
    backward(model, 0, rank)
    opt.step()
    copies = mesh["replicate"].get_group()
    check_replicas(model, opt, copies)
    with pytest.raises(ValueError, match="every parameter of the model is spread over these ranks"):
        check_replicas(model, opt)
    if rank == 0:
        model[1].bias.to_local().data.add_(1)
    if rank in (0, 2):
        told.append(told_by(lambda: check_replicas(model, opt, copies)))
    else:
        check_replicas(model, opt, copies)
    return told


def test_trainings_that_are_not_sharded(ranks: Any) -> None:
    found = ranks(4).run(others)
    for ours, torchs, *_ in found:
        assert "state 'grad_avg' of '0.0.weight': norm " in ours
        assert "on ranks 0, 1, 2; norm 0 (0, 0, 0, ...), checksum" in ours
        assert "state 'exp_avg' of '0.0.weight': norm " in torchs
    assert "on rank 0; norm 0 (0, 0, 0, ...)" in found[0][2]
    assert found[0][2] == found[3][2]
    assert "parameter '1.bias': norm " in found[2][2]
    assert found[0][3] == found[2][2]


def test_one_process_has_nothing_to_compare() -> None:
    model = body_and_head()
    check_replicas(model, shard(fastopt.Adam(model.parameters()), model))
