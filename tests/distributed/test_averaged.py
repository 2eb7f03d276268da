"""Stage 1 with gradients that nobody has averaged: an error on all ranks before anything moves, and no false alarm."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

import fastopt
from fastopt.distributed import RanksDiffer, shard
from fastopt.distributed.checks.averaged import Sketch, comparable, sketch, unlike

from .test_complaints import backward, body_and_head, groups
from .test_wire import counted

# ---- which gradients are the same


def of(values: Any, dtype: torch.dtype = torch.float32) -> Sketch:
    return sketch({0: torch.as_tensor(values).to(dtype)})[0]


def noise(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        (noise(0, 300), noise(0, 300) * (1 + 1e-6), True),
        (noise(0, 300), noise(0, 300) * 1.01, False),
        (noise(0, 300), noise(1, 300), False),
        (noise(0, 300), -noise(0, 300), False),
        (noise(0, 300), torch.zeros(300), False),
        (noise(0, 64, 64), noise(1, 64, 64), False),
        (torch.zeros(3), torch.zeros(3), True),
        (torch.zeros(0, 4), torch.zeros(0, 4), True),
        (torch.tensor(1.0), torch.tensor(1.5), False),
        # Elements between the samples differ: the norm tells.
        (torch.zeros(300), torch.eye(300)[1], False),
    ],
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_gradients_that_differ_by_more_than_rounding(a: Tensor, b: Tensor, same: bool, dtype: torch.dtype) -> None:
    assert of(a, dtype).like(of(b, dtype)) is of(b, dtype).like(of(a, dtype)) is same


def test_rounding_is_that_of_the_dtype() -> None:
    for dtype in (torch.bfloat16, torch.float16):
        a = noise(0, 300).to(dtype)
        assert of(a, dtype).like(of(a * (1 + torch.finfo(dtype).eps), dtype))
        assert not of(a, dtype).like(of(noise(1, 300), dtype))


def test_a_sketch_is_of_the_whole_gradient() -> None:
    grads = {3: noise(0, 7, 11), 1: noise(1, 16), 2: noise(2, 5, 4).T}
    found = sketch(grads)
    assert list(found) == [1, 2, 3]
    for i, grad in grads.items():
        assert found[i].norm == pytest.approx(grad.double().square().sum().sqrt().item())
        assert set(found[i].elements) <= set(grad.double().flatten().tolist())
    assert [len(each.elements) for each in found.values()] == [16, 10, 16]


def test_what_is_missing_or_not_finite_is_not_compared() -> None:
    one, other, bad = of([1.0]), of([2.0]), of([float("nan")])
    assert unlike([{0: one, 1: one}, {0: one, 1: other}, {}]) == [1]
    assert unlike([{0: one}, {0: bad}, {0: other}]) == []
    assert unlike([{0: one}, {1: other}]) == []
    assert comparable([{0: one, 1: one}, {0: bad, 2: other}]) == {1, 2}


# ---- on ranks


def told_by(call: Any) -> str:
    with pytest.raises(RanksDiffer) as caught:
        call()
    return str(caught.value)


def average(model: nn.Module) -> None:
    """What DistributedDataParallel does."""
    for p in model.parameters():
        if p.grad is not None:
            dist.all_reduce(p.grad)
            p.grad.div_(dist.get_world_size())


def sharded(check_gradients: bool = True, frozen: int = 0) -> tuple[nn.Sequential, Any]:
    model = body_and_head()
    opt = fastopt.Adam(groups(model), lr=0.1)
    opt.freeze_to(frozen)
    return model, shard(opt, model, stage=1, check_gradients=check_gradients)


def not_averaged(rank: int, world_size: int) -> list[str]:
    """The first step, the first clipping, and that of what trains from then on."""
    model, opt = sharded()
    before = [p.detach().clone() for p in model.parameters()]
    backward(model, 0, rank)
    told = [told_by(opt.step), told_by(lambda: opt.clip_grad_norm_(1.0))]
    assert all(map(torch.equal, before, model.parameters()))
    assert not any(opt.state.values())
    average(model)
    opt.step()
    opt.synchronize()
    assert not any(map(torch.equal, before, model.parameters()))

    # DistributedDataParallel was made when only the head trained, so it does not average the body.
    model, opt = sharded(frozen=1)
    wrapped = DistributedDataParallel(model)
    for _ in range(2):
        backward(wrapped, 0, rank)
        opt.step()
        opt.zero_grad()
    opt.unfreeze()
    backward(wrapped, 1, rank)
    told.append(told_by(opt.step))
    opt.zero_grad()
    backward(DistributedDataParallel(model), 1, rank)
    opt.step()

    # The last pass before the step has not averaged either.
    opt.freeze_to(1)
    opt.step()
    opt.unfreeze()
    opt.zero_grad()
    with (again := DistributedDataParallel(model)).no_sync():
        backward(again, 2, rank)
    told.append(told_by(opt.step))

    new = nn.Parameter(torch.ones(3))
    model.register_parameter("new", new)
    opt.zero_grad()
    opt.add_param_group({"params": [new]})
    new.grad = torch.full((3,), 1.0 + rank)
    told.append(told_by(opt.step))
    return told


def test_gradients_that_nobody_has_averaged(ranks: Any) -> None:
    found = ranks(3).run(not_averaged)
    assert found[0] == found[1] == found[2]
    step, clip, unfrozen, paused, new = found[0]
    assert step == clip
    for name in ("0.0.weight", "0.0.bias", "0.2.weight", "0.2.bias", "1.weight", "1.bias"):
        assert f"the gradient of '{name}': norm " in step
    assert " on rank 0; norm " in step
    assert "wrap the model in DistributedDataParallel" in step
    assert "stage=2" in step
    for told in (unfrozen, paused):
        assert "'0.0.weight'" in told
        assert "'1." not in told
    assert "the gradient of 'new': norm 1.73205 (1, 1, 1) on rank 0; norm 3.4641 (2, 2, 2) on rank 1" in new
    assert "'1." not in new


def no_alarm(rank: int, world_size: int) -> None:
    """What is averaged, or differs for another reason."""
    model, opt = sharded()
    wrapped = DistributedDataParallel(model)
    calls: list[tuple[str, int]] = []
    looked: list[int] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            "fastopt.distributed.gradients.local_gradients.sketch",
            lambda grads: looked.append(len(grads)) or sketch(grads),
        )
        for step in range(3):
            backward(wrapped, step, rank)
            with counted() as made:
                opt.step()
            opt.zero_grad()
            calls += made
    assert looked == [6]
    assert [name for name, _ in calls].count("control") == 3
    assert {name for name, _ in calls} == {"control", "all_gather"}

    model, opt = sharded()  # the same data on all ranks
    backward(model, 0, 0)
    opt.step()

    model, opt = sharded()  # in the last bits, as unlike machines clip
    backward(model, 0, 0)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.mul_(1 + 1e-6 * rank)
    with counted() as made:
        opt.step()
        opt.step()
    assert [name for name, _ in made].count("all_gather_object") == 1

    model, opt = sharded(check_gradients=False)
    backward(model, 0, rank)
    opt.step()

    # An inf tells nothing, and the next step is compared.
    model, opt = sharded()
    backward(model, 0, rank)
    for p in model.parameters():
        assert p.grad is not None
        p.grad.fill_(float("nan") if rank else float("inf"))
    opt.clip_grad_norm_(1.0)
    opt.zero_grad()
    backward(model, 0, rank)
    told_by(opt.step)

    # A scaler that unscales what is averaged afterwards.
    model, opt = sharded()
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    scaler.scale(model(noise(rank, 4, 5)).square().sum()).backward()
    scaler.unscale_(opt)
    average(model)
    opt.clip_grad_norm_(1.0)
    scaler.step(opt)
    scaler.update()


def test_no_alarm_where_gradients_are_averaged(ranks: Any) -> None:
    ranks(3).run(no_alarm)
