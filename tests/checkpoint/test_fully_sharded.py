"""Models under fully_shard (stage 3), with the optimizers of this library: any number of ranks, one process, ZeRO 2."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastopt import Adam, Lamb, Optimizer
from fastopt.checkpoint import load, save
from fastopt.distributed import shard

from ..ranks import RankPool
from .test_cli import fastopt

Ranks = Callable[[int], RankPool]
MAKE: dict[str, Callable[..., Optimizer]] = {"adam": Adam, "lamb": Lamb}


class Net(nn.Module):
    """Rows that neither two nor three ranks share evenly."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.first, self.last = nn.Linear(4, 7), nn.Linear(7, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(torch.tanh(self.first(x)))


def train(net: nn.Module, opt: Any, steps: range) -> None:
    for step in steps:
        x = torch.randn(6, 4, generator=torch.Generator().manual_seed(step))
        net(x).square().mean().backward()
        opt.step()
        opt.zero_grad()


def whole(value: Any) -> Any:
    return value.full_tensor() if isinstance(value, DTensor) else value


def outcome(net: nn.Module, opt: Any) -> dict[str, Any]:
    """Whole weights and whole states, by name."""
    names = [name for name, _ in net.named_parameters()]
    state = opt.state_dict()["state"]
    told: dict[str, Any] = {name: whole(p.detach()).clone() for name, p in net.named_parameters()}
    for i, name in enumerate(names):
        told.update({f"{key} of {name}": whole(value) for key, value in state[i].items()})
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in told.items()}


def job(rank: int, world_size: int, kind: str, name: str, url: str | None, steps: range, to: str | None) -> Any:
    """Load from `url`, make steps, save `to`; what came out, whole."""
    net = Net(0 if url is None else 9)
    if kind == "fully_shard":
        fully_shard(net, mesh=init_device_mesh("cpu", (world_size,)))
    opt: Any = MAKE[name](
        [{"params": net.first.parameters(), "lr": 0.1}, {"params": net.last.parameters(), "lr": 0.05}]
    )
    if kind == "shard":
        opt = shard(opt, net)
    if url is not None:
        load(url, model=net, opt=opt)
    loaded = None if url is None or kind == "shard" else outcome(net, opt)
    train(net, opt, steps)
    if to is not None:
        save(to, step=1, model=net, opt=opt)
    if kind == "shard":
        opt.consolidate_state_dict()
    return loaded, outcome(net, opt) if kind != "shard" or rank == 0 else None


def same(got: dict[str, Any], want: dict[str, Any]) -> None:
    assert got.keys() == want.keys()
    for key, value in want.items():
        assert torch.equal(torch.as_tensor(got[key]), torch.as_tensor(value)), key


def exported(url: str, to: Path, want: dict[str, Any]) -> None:
    """What ranks saved in parts becomes a folder that Hugging Face's libraries read: every weight, whole."""
    fastopt("checkpoint", "export-hf", url, to)
    index = json.loads((to / "model.safetensors.index.json").read_text())["weight_map"]
    assert set(index) == {name for name in want if " of " not in name}
    for name, file in index.items():
        assert torch.equal(load_file(to / file)[name], want[name]), name


def test_from_two_ranks_to_one_process_three_ranks_and_back(ranks: Ranks, tmp_path: Path) -> None:
    for name in MAKE:
        root = tmp_path / name
        first = [str(root / folder) for folder in ("two", "one", "three", "zero")]
        _, two = ranks(2).run(job, "fully_shard", name, None, range(3), first[0])[0]

        exported(first[0], root / "hf", two)
        loaded, one = job(0, 1, "plain", name, first[0], range(3, 5), first[1])
        same(loaded, two)
        loaded, _ = ranks(2).run(job, "fully_shard", name, first[1], range(0), None)[1]
        same(loaded, one)
        loaded, three = ranks(3).run(job, "fully_shard", name, first[0], range(3, 5), first[2])[2]
        same(loaded, two)
        for key, value in one.items():
            torch.testing.assert_close(torch.as_tensor(three[key]), torch.as_tensor(value), rtol=1e-4, atol=1e-5)

        # Stage 2 goes on where stage 3 was, and stage 3 where stage 2 was.
        _, zero = ranks(2).run(job, "shard", name, first[0], range(0), first[3])[0]
        same(zero, two)
        loaded, _ = ranks(3).run(job, "fully_shard", name, first[3], range(0), None)[0]
        same(loaded, two)


def in_two_dimensions(rank: int, world_size: int, url: str) -> list[Tensor]:
    """Tensor parallel inside data parallel: two dimensions of a mesh cut the same rows."""
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))

    def build() -> tuple[nn.Module, Optimizer]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2))
        parallelize_module(net, mesh["tp"], {"0": ColwiseParallel(), "2": RowwiseParallel()})
        fully_shard(net, mesh=mesh["dp"])
        return net, Adam(net.parameters(), lr=0.1)

    net, opt = build()
    train(net, opt, range(2))
    save(url, step=1, model=net, opt=opt)
    again, resumed = build()
    load(url, model=again, opt=resumed)
    for p, q in zip(net.parameters(), again.parameters(), strict=True):
        assert torch.equal(whole(p.detach()), whole(q.detach()))
        assert torch.equal(opt.state[p]["grad_avg"], resumed.state[q]["grad_avg"])
    return [whole(p.detach()).clone() for p in net.parameters()]


def test_tensor_parallel_inside_data_parallel(ranks: Ranks, tmp_path: Path) -> None:
    saved = ranks(4).run(in_two_dimensions, str(tmp_path))[0]
    net = nn.Sequential(nn.Linear(4, 12), nn.Tanh(), nn.Linear(12, 2))
    load(str(tmp_path), model=net, opt=Adam(net.parameters()))
    for p, q in zip(net.parameters(), saved, strict=True):
        assert torch.equal(p, q)
