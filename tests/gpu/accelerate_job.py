"""Training with Accelerate's FSDP2 on the ranks of torchrun; leaves its results in the folder that it is given."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import fastopt

BATCHES = 8


def network() -> nn.Sequential:
    """A small network, the same everywhere."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1))


def batches(device: str, repeat: int = 1) -> Iterator[tuple[Tensor, Tensor]]:
    """`BATCHES` batches, again and again."""
    x = torch.randn(BATCHES, 16, 8, generator=torch.Generator().manual_seed(1))
    y = x.sum(2, keepdim=True).sin()
    for _ in range(repeat):
        yield from zip(x.to(device), y.to(device), strict=True)


def loss_of(model: Any, x: Tensor, y: Tensor) -> Tensor:
    return (model(x).float() - y).square().mean()


def sharding() -> Any:
    """The accelerator. There is one in a process."""
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    return Accelerator(fsdp_plugin=FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False))


def prepared(accelerator: Any) -> tuple[Any, Any, Any]:
    """Accelerator, a new model and its optimizer, which is built before the model is sharded."""
    model = network()
    opt = fastopt.Adam(model.parameters(), lr=1e-2, betas=(0.9, 0.99), eps=1e-8, weight_decay=0.1)
    return accelerator, *accelerator.prepare(model, opt)


def steps(accelerator: Any, model: Any, opt: Any, chosen: slice) -> None:
    """Step on this rank's rows of the chosen batches."""
    rows = slice(accelerator.process_index, None, accelerator.num_processes)
    for x, y in list(batches("cuda"))[chosen]:
        accelerator.backward(loss_of(model, x[rows], y[rows]))
        accelerator.clip_grad_norm_(model.parameters(), 0.5)
        opt.step()
        opt.zero_grad()


def whole(model: Any) -> list[Tensor]:
    """All weights, gathered."""
    return [p.full_tensor().detach().cpu() for p in model.parameters()]


def main(folder: Path) -> None:
    """In one go, and resumed half-way from what Accelerate has saved."""
    half = BATCHES // 2
    accelerator = sharding()
    one = prepared(accelerator)
    steps(*one, slice(half))
    accelerator.save_state(folder / "state")
    steps(*one, slice(half, None))
    accelerator.free_memory()  # or else `load_state` would load into the first model, too
    two = prepared(accelerator)
    accelerator.load_state(folder / "state")
    steps(*two, slice(half, None))
    found = {
        "whole": whole(one[1]),
        "resumed": whole(two[1]),
        "sharded": all(hasattr(p, "placements") for p in one[2].param_groups[0]["params"]),
        "executors": sorted({choice.executor for choice in one[2].optimizer.engine}),
    }
    if accelerator.is_main_process:
        torch.save(found, folder / "found.pt")
    torch.distributed.barrier()
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
