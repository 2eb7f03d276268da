"""Parameters that are DTensors: fully_shard, tensor parallel plans and both, against one process.

Gradients of the bit-for-bit tests are given, so that no sum over ranks blurs the comparison.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    RowwiseParallel,
    SequenceParallel,
    parallelize_module,
)

from fastopt import SGD, Adam, Lamb, Larc, Optimizer, OptimWrapper, average_grad
from fastopt.distributed import shard

from ..distributed.callbacks import counting_step, sign_step, turning_step, unit_step
from ..distributed.muon import muon
from ..distributed.problems import ELEMENTWISE, NORM, Model, average, members

SHAPES = (((5, 4), (7,)), ((1, 3), (6, 2, 2), (2,)))
"""On 3 ranks: rows that do not divide, and ranks without rows."""

OWN: dict[str, Callable[[Any], Optimizer]] = {
    "sign": lambda g: Optimizer(g, [average_grad, sign_step], lr=0.1, mom=0.9),
    "unit": lambda g: Optimizer(g, unit_step, lr=0.1),
    "counting": lambda g: Optimizer(g, counting_step, lr=0.1),
    "turning": lambda g: Optimizer(g, turning_step, lr=0.1),
    "muon": muon,
}
INEXACT = {*NORM, "unit", "counting", "turning", "muon"}


def whole(x: Any) -> Tensor:
    return x.detach().full_tensor() if isinstance(x, DTensor) else x.detach()


def close(got: Tensor, want: Tensor, what: str, looser: float = 1) -> None:
    torch.testing.assert_close(got, want, rtol=1e-5 * looser, atol=1e-6 * looser, msg=lambda text: f"{what}: {text}")


def set_grads(opt: Optimizer, step: int) -> None:
    """The same whole gradient for a parameter, however it is placed."""
    for i, p in enumerate(members(opt)):
        full = average(step, i, range(4), 4, torch.empty(p.shape, dtype=p.dtype))
        p.grad = distribute_tensor(full, p.device_mesh, p.placements) if isinstance(p, DTensor) else full


def agrees(rank: int, world_size: int, names: list[str], mesh_shape: tuple[int, ...]) -> list[str]:
    for name in names:
        build = (ELEMENTWISE | NORM | OWN)[name]
        model, reference = Model(SHAPES), Model(SHAPES)
        names_of_mesh = ("replicate", "shard")[-len(mesh_shape) :]
        fully_shard(model, mesh=init_device_mesh("cpu", mesh_shape, mesh_dim_names=names_of_mesh))
        opt, plain = build(model.param_groups()), build(reference.param_groups())
        if name in OWN:
            plain._engine = "eager"
        for step in range(5):
            for each in (opt, plain):
                each.freeze_to((1, 0, 0, -1, 0)[step])
                set_grads(each, step)
                each.step()
                each.zero_grad(set_to_none=True)
        for i, (p, q) in enumerate(zip(members(opt), members(plain), strict=True)):
            what = f"{name}, parameter {i}"
            if name in INEXACT:
                close(whole(p), q.detach(), what)
            else:
                assert torch.equal(whole(p), q.detach()), what
        shown, want = opt.state_dict(), plain.state_dict()
        assert shown["param_groups"] == want["param_groups"]
        for i, entry in want["state"].items():
            assert shown["state"][i].keys() == entry.keys(), name
            for key, value in entry.items():
                got = shown["state"][i][key]
                if isinstance(value, Tensor) and value.ndim:
                    p = members(opt)[i]
                    assert isinstance(got, DTensor), (name, key)
                    assert (got.placements, got.shape, got.stride()) == (p.placements, p.shape, p.stride())
                    torch.testing.assert_close(whole(got), value, rtol=1e-5, atol=1e-6)
    return names


@pytest.mark.parametrize(("world_size", "mesh"), [(2, (2,)), (3, (3,)), (4, (2, 2))], ids=["2", "3", "hybrid"])
def test_fully_shard_equals_one_process(ranks: Any, world_size: int, mesh: tuple[int, ...]) -> None:
    names = [*ELEMENTWISE, *NORM, *OWN] if world_size < 4 else ["adam", "lamb", "larc", "unit"]
    ranks(world_size).run(agrees, names, mesh, timeout=120)


# ---- without dispatch, with few collectives


@contextmanager
def all_reduces() -> Iterator[list[tuple[int, Any]]]:
    """Elements and group of each all-reduce inside."""
    calls: list[tuple[int, Any]] = []
    patch = pytest.MonkeyPatch()
    real = dist.all_reduce

    def counted(tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        calls.append((tensor.numel(), kwargs.get("group")))
        return real(tensor, *args, **kwargs)

    patch.setattr(dist, "all_reduce", counted)
    try:
        yield calls
    finally:
        patch.undo()


def local_only(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    counts = {}
    for name, make in {"adam": Adam, "lamb": Lamb, "larc": Larc}.items():
        model = Model(SHAPES)
        fully_shard(model, mesh=mesh)
        opt = make(model.param_groups(), lr=0.1)
        patch = pytest.MonkeyPatch()

        def refuse(*args: Any, **kwargs: Any) -> Any:
            raise AssertionError(f"DTensor's dispatch was used: {args}")

        for _ in range(3):
            set_grads(opt, 0)
            patch.setattr(DTensor._op_dispatcher, "dispatch", refuse, raising=False)
            patch.setattr(DTensor, "__torch_dispatch__", refuse)
            try:
                with all_reduces() as calls:
                    opt.step()
            finally:
                patch.undo()
        counts[name] = [n for n, _ in calls]
        assert all(p.grad is not None for p in members(opt))
        assert all(part.grad is None for part in (p._local_tensor for p in members(opt)))
    # Two norms and a count of each of five parameters; two norms.
    assert counts == {"adam": [], "lamb": [3 * 5], "larc": [2 * 5]}


def test_a_step_uses_no_dispatch_and_one_small_collective(ranks: Any) -> None:
    ranks(2).run(local_only)


def engines(rank: int, world_size: int) -> list[tuple[str, str]]:
    """Names and needs; what runs is what runs on ordinary tensors, or the reference for what needs whole ones."""
    told = []
    for name in ("adam", "lamb", "unit", "muon", "adamw"):
        model = Model(SHAPES)
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        opt, plain = ((ELEMENTWISE | NORM | OWN)[name](m.param_groups()) for m in (model, Model(SHAPES)))
        before = opt.engine[0].executor
        set_grads(opt, 0)
        opt.step()
        assert opt.engine[0].executor == before
        assert (before == "eager") == (name in ("muon", "adamw")) or before == plain.engine[0].executor
        told.append((name, opt.needs))
    return told


def test_the_engine_says_what_runs(ranks: Any) -> None:
    assert ranks(2).run(engines)[0] == [
        ("adam", "elementwise"),
        ("lamb", "norm"),
        ("unit", "norm"),
        ("muon", "whole"),
        ("adamw", "whole"),
    ]


# ---- tensor parallel


class Net(nn.Module):
    """Two linear layers around a norm; shapes that two ranks share evenly (torch's plans run no others)."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.first = nn.Linear(6, 8)
        self.second = nn.Linear(8, 6)
        self.norm = nn.LayerNorm(6)
        self.last = nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.norm(self.second(torch.tanh(self.first(x)))))


PLAN = {
    "first": ColwiseParallel(input_layouts=Replicate()),
    "second": RowwiseParallel(output_layouts=Shard(0)),
    "norm": SequenceParallel(sequence_dim=0),
    "last": ColwiseParallel(input_layouts=Shard(0), output_layouts=Replicate()),
}


def parallel_net(mesh: Any, dp: bool) -> nn.Module:
    net = Net()
    parallelize_module(net, mesh["tp"] if dp else mesh, PLAN)
    if dp:
        fully_shard(net, mesh=mesh["dp"])
    return net


def trained(opt: Optimizer, net: nn.Module, clip: bool) -> list[float]:
    norms = []
    for step in range(4):
        x = torch.randn(4, 6, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        if clip:
            norms.append(opt.clip_grad_norm_(0.05).item())
        opt.step()
        opt.zero_grad()
    return norms


def tensor_parallel(rank: int, world_size: int, dp: bool) -> None:
    mesh = init_device_mesh("cpu", (2, world_size // 2), mesh_dim_names=("dp", "tp")) if dp else None
    mesh = mesh if dp else init_device_mesh("cpu", (world_size,), mesh_dim_names=("tp",))
    for make in (Adam, Lamb, Larc):
        net, reference = parallel_net(mesh, dp), Net()
        opt, plain = make(net.parameters(), lr=0.05), make(reference.parameters(), lr=0.05)
        assert sum(isinstance(p, DTensor) for p in net.parameters()) == 8
        got, want = trained(opt, net, clip=True), trained(plain, reference, clip=True)
        torch.testing.assert_close(torch.tensor(got), torch.tensor(want), rtol=1e-4, atol=1e-5)
        for (name, p), q in zip(net.named_parameters(), reference.parameters(), strict=True):
            close(whole(p), q.detach(), name, 100)


@pytest.mark.parametrize(("world_size", "dp"), [(2, False), (4, True)], ids=["2", "2x2"])
def test_tensor_parallel_plans(ranks: Any, world_size: int, dp: bool) -> None:
    ranks(world_size).run(tensor_parallel, dp)


def reduced_once(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
    copies = nn.Parameter(distribute_tensor(torch.full((4, 4), 2.0), mesh, [Replicate(), Replicate()]))
    one = nn.Parameter(distribute_tensor(torch.full((4, 4), 2.0), mesh, [Replicate(), Shard(1)]))
    both = nn.Parameter(distribute_tensor(torch.full((3, 4), 2.0), mesh, [Shard(0), Shard(1)]))
    opt = Lamb([copies, one, both], lr=0.1)
    for p in (copies, one, both):
        p.grad = torch.ones_like(p.data)
    with all_reduces() as calls:
        norm = opt.clip_grad_norm_(1e9)
    assert norm.item() == pytest.approx((16 + 16 + 12) ** 0.5)
    assert [n for n, _ in calls] == [1, 1, 1]
    with all_reduces() as calls:
        opt.step()
    # Nothing for the copies; over one dimension of the mesh, then over both, one after the other.
    assert calls == [(3, mesh.get_group(1)), (3, mesh.get_group(0)), (3, mesh.get_group(1))]


def test_copies_count_once(ranks: Any) -> None:
    ranks(4).run(reduced_once)


def sums_to_be_made(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    p = nn.Parameter(distribute_tensor(torch.ones(4), mesh, [Replicate()]))
    p.grad = DTensor.from_local(torch.full((4,), 1.0 + rank), mesh, [Partial()])
    opt = Adam([p], lr=0.1)
    assert opt.clip_grad_norm_(1e9).item() == pytest.approx(6.0)  # four times 1 + 2
    opt.step()
    assert torch.equal(opt.state[p]["grad_avg"], torch.full((4,), 3.0) * (1 - 0.9))
    bad = nn.Parameter(DTensor.from_local(torch.ones(4), mesh, [Partial()]))
    bad.grad = DTensor.from_local(torch.ones(4), mesh, [Partial()])
    with pytest.raises(ValueError, match="redistribute it first"):
        Lamb([bad], lr=0.1).step()


def test_sums_still_to_be_made(ranks: Any) -> None:
    ranks(2).run(sums_to_be_made)


# ---- states


def round_trip(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))

    def build() -> Optimizer:
        model = Model(SHAPES)
        fully_shard(model, mesh=mesh)
        return Adam(model.param_groups(), lr=0.1)

    first, second, third = build(), build(), build()
    set_grads(first, 0)
    first.step()
    saved = first.state_dict()
    second.load_state_dict(saved)
    entire = {i: {k: whole(v) if isinstance(v, Tensor) else v for k, v in e.items()} for i, e in saved["state"].items()}
    third.load_state_dict({**saved, "state": entire})
    for p, q, r in zip(members(first), members(second), members(third), strict=True):
        for key, value in first.state[p].items():
            for other in (second.state[q][key], third.state[r][key]):
                assert torch.equal(torch.as_tensor(other), torch.as_tensor(value)), key
        assert first.state[p]["grad_avg"].shape == p._local_tensor.shape
        boxes = first.boxes(p, tuple(p.shape))
        assert sum(box.numel for box in boxes) == p._local_tensor.numel()
        assert first.boxes(p, ())[0].shape == ()


def test_states_are_parts_and_are_shown_as_dtensors(ranks: Any) -> None:
    ranks(3).run(round_trip)


def changes_between_steps(rank: int, world_size: int) -> None:
    """What is kept from step to step is looked at anew when it is no longer true."""
    mesh = init_device_mesh("cpu", (world_size,))
    for make in (Adam, Lamb):
        model, reference = Model(SHAPES), Model(SHAPES)
        fully_shard(model, mesh=mesh)
        opt, plain = make(model.param_groups(), lr=0.1), make(reference.param_groups(), lr=0.1)
        other = copy.deepcopy(opt.state_dict())
        for step in range(10):
            for each in (opt, plain):
                set_grads(each, step)
                some = members(each)
                if step == 2:
                    some[1].grad = None
                if step == 3:  # on another process group, as it were
                    some[0].grad = as_copies(some[0].grad)
                if step == 4:
                    each.state[some[0]]["grad_avg"] = torch.ones_like(some[0].detach())
                if step == 5:
                    each.load_state_dict(each.state_dict())
                if step == 6:
                    each.state[some[2]] = {}
                if step == 7:
                    each.set_hyper("lr", slice(0.01, 0.2))
                if step == 8:
                    each.load_state_dict({**other, "param_groups": each.state_dict()["param_groups"]})
                each.step()
        for p, q in zip(members(opt), members(plain), strict=True):
            close(whole(p), q.detach(), make.__name__)


def as_copies(grad: Any) -> Any:
    """The same gradient, whole on every rank."""
    return grad.redistribute(grad.device_mesh, [Replicate()]) if isinstance(grad, DTensor) else grad


def test_changes_between_steps(ranks: Any) -> None:
    ranks(2).run(changes_between_steps)


def low_precision(rank: int, world_size: int) -> None:
    mesh = init_device_mesh("cpu", (world_size,))
    for name, make in {"adam": Adam, "lamb": Lamb}.items():
        model, reference = Model(SHAPES, [torch.bfloat16]), Model(SHAPES, [torch.bfloat16])
        fully_shard(model, mesh=mesh)
        opt, plain = (make(m.param_groups(), lr=0.1, master_weights=True) for m in (model, reference))
        for step in range(3):
            for each in (opt, plain):
                set_grads(each, step)
                each.step()
        for p, q in zip(members(opt), members(plain), strict=True):
            master = opt.state[p]["master"]
            assert (master.dtype, master.shape) == (torch.float32, p._local_tensor.shape)
            close(whole(p).float(), q.detach().float(), name, 1000)
            assert opt.state[p].keys() == plain.state[q].keys()
        shown = opt.state_dict()["state"][0]["master"]
        close(whole(shown), plain.state[members(plain)[0]]["master"], name)


def test_master_weights_of_parts(ranks: Any) -> None:
    ranks(2).run(low_precision)


def not_for_shard(rank: int, world_size: int) -> None:
    model = Model(SHAPES)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    with pytest.raises(ValueError, match=r"'g0.0' is a DTensor over .* without shard\(\)"):
        shard(Adam(model.param_groups()), model)


def test_shard_sends_dtensors_to_the_optimizer_itself(ranks: Any) -> None:
    ranks(2).run(not_for_shard)


def wrapped(rank: int, world_size: int) -> None:
    model, reference = Model(SHAPES), Model(SHAPES)
    fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
    opt, plain = (OptimWrapper(m.param_groups(), opt=torch.optim.AdamW, lr=0.1) for m in (model, reference))
    for step in range(2):
        for each in (opt, plain):
            set_grads(each, step)
            each.step()
    for p, q in zip(members(opt), members(plain), strict=True):
        assert torch.equal(whole(p), q.detach())
        assert isinstance(opt.state[p]["exp_avg"], DTensor)


def test_a_wrapped_torch_optimizer_has_dtensors_as_torch_has(ranks: Any) -> None:
    ranks(2).run(wrapped)


def not_replayed(rank: int, world_size: int) -> None:
    """A replay is of parts, too, and what cannot be replayed says why; nothing moves."""
    for build, why in (
        (Adam, "only steps of the executor triton"),
        (lambda g: OptimWrapper(torch.optim.SGD(g, lr=0.1)), "only steps of the executor triton"),
        (muon, "gathers DTensors one by one"),
    ):
        model = Model(SHAPES)
        fully_shard(model, mesh=init_device_mesh("cpu", (world_size,)))
        opt = build(model.param_groups())
        before = [p._local_tensor.clone() for p in model.parameters()]
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        with pytest.raises(RuntimeError, match=why):
            opt.prepare_replay()
        assert all(torch.equal(p._local_tensor, q) for p, q in zip(model.parameters(), before, strict=True))


def test_what_cannot_be_replayed_says_why(ranks: Any) -> None:
    ranks(2).run(not_replayed)


@pytest.mark.parametrize("norm_type", [1.0, 2.0, 3.0, float("inf")])
def test_clipping_complex_and_sparse_gradients(norm_type: float) -> None:
    torch.manual_seed(0)
    p, q = nn.Parameter(torch.ones(3, dtype=torch.complex64)), nn.Parameter(torch.ones(4, 2))
    p.grad = torch.randn(3, dtype=torch.complex64)
    rows = torch.randn(3, 2)
    q.grad = torch.sparse_coo_tensor([[1, 1, 3]], rows, (4, 2), check_invariants=True)
    before, summed = p.grad.clone(), q.grad.to_dense()
    magnitudes = torch.cat([before.abs(), summed.flatten().abs()]).double()
    norm = magnitudes.max() if norm_type == float("inf") else magnitudes.pow(norm_type).sum() ** (1 / norm_type)
    found = SGD([p, q]).clip_grad_norm_(0.5, norm_type)
    assert found.item() == pytest.approx(norm.item(), rel=1e-6)
    torch.testing.assert_close(p.grad, before * (0.5 / norm.item()))
    assert q.grad is not None
    torch.testing.assert_close(q.grad.to_dense(), summed * (0.5 / norm.item()))
