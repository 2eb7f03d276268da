"""`shard` over one dimension of a mesh around a model that is tensor parallel on the other, against one process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, SequenceParallel, parallelize_module

import fastopt
from fastopt.checkpoint import load, save
from fastopt.distributed import RanksDiffer, shard
from fastopt.distributed.checks import other_dimensions

from .muon import muon
from .test_wire import counted

INNER = 13  # rows that two ranks do not share evenly


class Net(nn.Module):
    """A norm, two projections and a scale: one of each kind of parameter that a plan leaves."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.norm = nn.LayerNorm(6)
        self.first = nn.Linear(6, INNER)
        self.last = nn.Linear(INNER, 5)
        self.scale = nn.Parameter(torch.linspace(0.5, 1.5, 5))

    def forward(self, x: Tensor) -> Tensor:
        hidden = torch.tanh(self.first(self.norm(x)))
        out: Tensor = self.last(hidden) * self.scale
        return out


def groups(net: Net) -> list[dict[str, Any]]:
    return [
        {"params": [*net.norm.parameters(), *net.first.parameters()], "lr": 0.05},
        {"params": [*net.last.parameters(), net.scale], "lr": 0.1},
    ]


def two_dimensions() -> DeviceMesh:
    return init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))


def parallel(mesh: DeviceMesh, device: str = "cpu") -> Net:
    """The norm under sequence parallelism, so that its gradient is a sum still to be made; the scale is left alone."""
    net = Net().to(device)
    plan = {
        "norm": SequenceParallel(),
        "first": ColwiseParallel(input_layouts=Shard(1), use_local_output=False),
        "last": RowwiseParallel(input_layouts=Shard(-1), output_layouts=Replicate()),
    }
    parallelize_module(net, mesh["tp"], plan)
    return net


def data(step: int, row: int) -> Tensor:
    """The batch of all ranks of row `row`: `[3, 4, 6]`, of which each works on half of the positions in the norm."""
    return torch.randn(3, 4, 6, generator=torch.Generator().manual_seed(10 * step + row))


def backward(net: Net, mesh: DeviceMesh, step: int) -> None:
    half = data(step, mesh["dp"].get_local_rank()).chunk(2, dim=1)[mesh["tp"].get_local_rank()]
    net(half.to(net.scale.device)).square().sum().backward()


def backward_of_all(net: Net, step: int) -> None:
    for row in range(2):
        (net(data(step, row).to(net.scale.device)).square().sum() / 2).backward()


def average_by_hand(net: Net, mesh: DeviceMesh) -> None:
    """What stage 1 leaves to others."""
    for p in net.parameters():
        if p.grad is not None:
            part = p.grad._local_tensor if hasattr(p.grad, "_local_tensor") else p.grad
            dist.all_reduce(part, group=mesh["dp"].get_group())
            part.div_(2)


def whole(x: Any) -> Tensor:
    found: Tensor = x.full_tensor() if hasattr(x, "full_tensor") else x
    return found.detach()


def assert_same_weights(net: Net, reference: Net, what: str, rtol: float = 2e-5, atol: float = 2e-6) -> None:
    """Collective."""
    for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(whole(p), q.detach(), rtol=rtol, atol=atol, msg=lambda m: f"{what}: {name}: {m}")  # noqa: B023


MAKE: dict[str, Callable[[Any], fastopt.Optimizer]] = {
    "adam": lambda g: fastopt.Adam(g, wd=0.01),
    "lamb": lambda g: fastopt.Lamb(g, wd=0.01),
    "larc": lambda g: fastopt.Larc(g, mom=0.9),
    "ranger": lambda g: fastopt.ranger(g, k=2),
    "muon": muon,
}


def same_as_one_process(rank: int, world_size: int, names: list[str], stage: int) -> None:
    mesh = two_dimensions()
    for name in names:
        net, reference = parallel(mesh), Net()
        with torch.no_grad():
            net.scale.add_(mesh["dp"].get_local_rank())  # the first row's values count
        opt = shard(MAKE[name](groups(net)), net, stage=stage, group=mesh["dp"], bucket_bytes=300)
        plain = MAKE[name](groups(reference))
        for step, first in enumerate((0, 1, 0, 0)):
            for each in (opt, plain):
                each.freeze_to(first)
            backward(net, mesh, step)
            backward_of_all(reference, step)
            if stage == 1:
                average_by_hand(net, mesh)
            if step >= 2:
                kind = (2.0, float("inf"))[step % 2]
                active = [q for q in reference.parameters() if q.grad is not None]
                got, want = opt.clip_grad_norm_(0.3, kind), nn.utils.clip_grad_norm_(active, 0.3, kind)
                torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)
            opt.step()
            plain.step()
            for each in (opt, plain):
                each.zero_grad(set_to_none=True)
        opt.synchronize()
        assert_same_weights(net, reference, f"{name}, stage {stage}")


@pytest.mark.parametrize("stage", [1, 2])
def test_it_equals_one_process(ranks: Any, stage: int) -> None:
    ranks(4).run(same_as_one_process, list(MAKE), stage, timeout=120)


def parts_and_bytes(rank: int, world_size: int) -> tuple[int, int]:
    """Elements of state that a rank holds, and of its parts of the parameters; what a step sends."""
    mesh = two_dimensions()
    net = parallel(mesh)
    opt = shard(fastopt.Lamb(groups(net)), net, group=mesh["dp"])
    for step in range(2):
        with counted() as calls:
            backward(net, mesh, step)
            opt.step()
            opt.synchronize()
            opt.zero_grad()
    assert [name for name, _ in calls if name in ("reduce_scatter", "all_gather")] == ["reduce_scatter", "all_gather"]
    # Norms: over dp for what both columns cut and for what they copy, over tp for the former.
    assert sum(name == "all_reduce" for name, _ in calls) == 3
    values = [v for entry in opt.state.values() for v in entry.values() if isinstance(v, Tensor)]
    assert values
    assert all(type(v) is Tensor and v.ndim == 1 for v in values)
    local = sum((p._local_tensor if hasattr(p, "_local_tensor") else p).numel() for p in net.parameters())
    return sum(v.numel() for v in values), local


def test_state_is_spread_over_both_dimensions(ranks: Any) -> None:
    told = ranks(4).run(parts_and_bytes)
    for column in (0, 1):
        first, second = told[column], told[2 + column]
        assert first[1] == second[1]
        assert first[0] + second[0] == 2 * first[1]  # two averages
        assert abs(first[0] - second[0]) <= 2 * 4 * 14


def saved(rank: int, world_size: int, name: str, url: str, again: str | None) -> list[Tensor]:
    """Save after two steps; resume, and go on. Or resume from what one process has saved."""
    mesh = two_dimensions()
    net = parallel(mesh)
    opt = shard(MAKE[name](groups(net)), net, group=mesh["dp"])
    if again is not None:
        load(again, model=net, opt=opt)
    for step in range(2):
        backward(net, mesh, step)
        opt.step()
        opt.zero_grad()
    if again is None:
        save(url, step=1, model=net, opt=opt)
        other = parallel(mesh)
        resumed = shard(MAKE[name](groups(other)), other, group=mesh["dp"])
        load(url, model=other, opt=resumed)
        for each, model in ((opt, net), (resumed, other)):
            backward(model, mesh, 2)
            each.step()
            each.synchronize()
        for p, q in zip(net.parameters(), other.parameters(), strict=True):
            assert torch.equal(whole(p), whole(q))
        # A state dict that was brought together loads, too.
        opt.consolidate_state_dict(to=0)
        shown = opt.state_dict()
        if opt.rank == 0:
            weight = next(i for i, p in enumerate(p for g in opt.param_groups for p in g["params"]) if p.ndim == 2)
            average = shown["state"][weight]["grad_avg"]
            assert average.shape == (INNER, 6)
            assert average._local_tensor.shape == net.first.weight._local_tensor.shape
    opt.synchronize()
    return [whole(p).clone() for p in net.parameters()]


@pytest.mark.parametrize("name", ["adam", "lamb", "muon"])
def test_a_checkpoint_goes_to_one_process_and_back(ranks: Any, name: str, tmp_path: Path) -> None:
    there, back = str(tmp_path / "there"), str(tmp_path / "back")
    found = ranks(4).run(saved, name, there, None)
    net = Net()
    opt = MAKE[name](groups(net))
    load(there, model=net, opt=opt)
    save(back, step=1, model=net, opt=opt)
    backward_of_all(net, 2)
    opt.step()
    for weights in found:
        for p, q in zip(weights, net.parameters(), strict=True):
            torch.testing.assert_close(p, q.detach(), rtol=2e-5, atol=2e-6)

    found = ranks(4).run(saved, name, there, back)
    load(back, model=net, opt=opt)
    opt.zero_grad()
    for step in range(2):
        backward_of_all(net, step)
        opt.step()
        opt.zero_grad()
    for p, q in zip(found[3], net.parameters(), strict=True):
        torch.testing.assert_close(p, q.detach(), rtol=2e-5, atol=2e-6)


def spoil(grad: Any) -> None:
    """Make this rank's part of a gradient infinite."""
    grad._local_tensor.fill_(float("inf"))


def inf_in_one_part(rank: int, world_size: int, stage: int) -> None:
    """An inf in the part of one rank skips the step on all, and the scale shrinks everywhere."""
    mesh = two_dimensions()
    net = parallel(mesh)
    opt = shard(fastopt.Adam(groups(net)), net, stage=stage, group=mesh["dp"])
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    before = [whole(p).clone() for p in net.parameters()]
    for step in range(2):
        scaler.scale(torch.ones(()))
        if step == 0 and rank == 3:
            hook = net.first.weight.register_hook(spoil)
        backward(net, mesh, step)
        if step == 0 and rank == 3:
            hook.remove()
        if stage == 1:
            average_by_hand(net, mesh)
        scaler.step(opt)
        scaler.update()
        opt.synchronize()
        moved = [not torch.equal(whole(p), q) for p, q in zip(net.parameters(), before, strict=True)]
        assert not any(moved) if step == 0 else all(moved)
        assert scaler.get_scale() == 2.0
        opt.zero_grad()


@pytest.mark.parametrize("stage", [1, 2])
def test_an_inf_in_one_part_skips_the_step_on_all(ranks: Any, stage: int) -> None:
    ranks(4).run(inf_in_one_part, stage)


def refusals(rank: int, world_size: int) -> str:
    mesh = two_dimensions()
    net = parallel(mesh)
    with pytest.raises(ValueError, match="is a DTensor over") as caught:
        shard(fastopt.Adam(groups(net)), net)
    foreign = fastopt.OptimWrapper(torch.optim.AdamW(groups(net)))
    with pytest.raises(TypeError, match="AdamW steps DTensors in its own way"):
        shard(foreign, net, group=mesh["dp"])
    staged = Net()
    fully_shard(staged, mesh=mesh["dp"])
    with pytest.raises(ValueError, match="Under fully_shard an optimizer of fastopt takes it as it is"):
        shard(fastopt.Adam(groups(staged)), staged, group=mesh["dp"])
    return str(caught.value)


def test_what_stays_impossible_says_what_to_do(ranks: Any) -> None:
    for told in ranks(4).run(refusals):
        assert "shard(opt, model, group=mesh['dp'])" in told


def differ_along_the_plan(rank: int, world_size: int) -> list[str]:
    """What is raised when a column has another rate: from the start, and from the second of six steps on."""
    mesh = two_dimensions()
    told = []
    net = parallel(mesh)
    column = mesh["tp"].get_local_rank()
    try:
        shard(fastopt.Adam(net.parameters(), lr=0.1 * (1 + column)), net, group=mesh["dp"])
    except RanksDiffer as error:
        told.append(str(error))
    opt = shard(fastopt.Adam(net.parameters(), lr=0.1), net, group=mesh["dp"])
    before, other_dimensions.EVERY = other_dimensions.EVERY, 3
    try:
        for step in range(6):
            if step == 1:
                opt.set_hyper("lr", 0.1 * (1 + column))
            if step == 2:
                opt.set_hyper("lr", 0.3)  # what is used is compared, not what is there by then
            backward(net, mesh, step)
            opt.step()
            opt.zero_grad()
    except RanksDiffer as error:
        told.append(f"step {step}: {error}")
    finally:
        other_dimensions.EVERY = before
    return told


def test_rates_that_differ_along_the_plan_are_told_after_some_steps(ranks: Any) -> None:
    found = ranks(4).run(differ_along_the_plan)
    for rank, (first, later) in enumerate(found):
        row = rank // 2 * 2
        assert f"hyper 'lr' of group 0: 0.1 on rank {row}; 0.2 on rank {row + 1}" in first
        assert later.startswith("step 2: the ranks disagree\n  hypers and freezing in steps 0 to 3: ")
        assert f" on rank {row}; " in later
