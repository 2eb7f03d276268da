"""What each rank of the doctor's test does, under torchrun: sums whose result is known, and one sharded step."""

from __future__ import annotations

import faulthandler
import json
import os
import sys
import time
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .. import Adam
from ..distributed import shard

LARGE = 1 << 20
"""Elements of the tensor that the bandwidth is measured with."""


def main(backend: str, result: Path, seconds: float) -> None:
    """Run the test; the first rank writes what it found, as JSON.

    Args:
        backend: `gloo` on the CPU, `nccl` on a GPU of its own.
        result: the file.
        seconds: after which the rank gives up and shows where it was.
    """
    faulthandler.dump_traceback_later(seconds, exit=True)
    rank, local = int(os.environ["RANK"]), int(os.environ["LOCAL_RANK"])
    device = torch.device("cuda", local) if backend == "nccl" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group(
        backend, timeout=timedelta(seconds=seconds), device_id=device if device.type == "cuda" else None
    )
    found = {
        "wrong": [*_wrong_sum(device), *_wrong_step(device)],
        "us": 1e6 * _seconds(torch.ones(1, device=device), 50),
        "gb_per_s": 4 * LARGE / _seconds(torch.ones(LARGE, device=device), 10) / 1e9,
    }
    if rank == 0:
        result.write_text(json.dumps(found))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # Gloo sometimes aborts while the interpreter shuts down


def _wrong_sum(device: torch.device) -> list[str]:
    """What an all-reduce got wrong."""
    n, rank = dist.get_world_size(), dist.get_rank()
    x = torch.arange(LARGE, device=device) + rank
    dist.all_reduce(x)
    expected = n * torch.arange(LARGE, device=device) + n * (n - 1) // 2
    return [] if torch.equal(x, expected) else ["an all-reduce gave a wrong sum"]


def _wrong_step(device: torch.device) -> list[str]:
    """How a sharded step differs from the same step in one process, on any rank."""
    n, rank = dist.get_world_size(), dist.get_rank()
    models = [_model(device) for _ in range(2)]
    data = [torch.full((4, 16), float(each + 1), device=device) for each in range(n)]
    sharded = shard(Adam(models[0].parameters(), lr=0.1), models[0])
    models[0](data[rank]).square().mean().backward()
    sharded.step()
    sharded.synchronize()
    alone = Adam(models[1].parameters(), lr=0.1)
    (sum(models[1](x).square().mean() for x in data) / n).backward()
    alone.step()
    same = all(map(_close, *(model.parameters() for model in models)))
    differ = torch.tensor(0 if same else 1, device=device)
    dist.all_reduce(differ)
    return [] if not differ.item() else ["a sharded step differs from the same step in one process"]


def _close(a: Tensor, b: Tensor) -> bool:
    return torch.allclose(a, b, rtol=1e-4, atol=1e-5)


def _model(device: torch.device) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 1)).to(device)


def _seconds(x: Tensor, times: int) -> float:
    """Of one all-reduce of `x`."""
    for measured in (False, True):  # the first ones set up connections
        start = time.perf_counter()
        for _ in range(times if measured else 3):
            dist.all_reduce(x)
        if x.is_cuda:
            torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), float(sys.argv[3]))
