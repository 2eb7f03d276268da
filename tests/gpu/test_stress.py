"""Everything at once over NCCL, and with copies between two GPUs: the steps of tests/distributed/test_stress.py."""

from __future__ import annotations

import os
from typing import Any

import pytest
import torch

from ..distributed.test_stress import anything
from .nccl import nccl_mesh

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

STEPS = int(os.environ.get("FASTOPT_STRESS_STEPS", "500"))


def on_gpus(rank: int, world_size: int, name: str, transport: str | None) -> None:
    mesh = nccl_mesh(rank)
    anything(rank, world_size, name, 29, STEPS, {"group": mesh, "transport": transport}, "cuda")


@pytest.mark.parametrize(("name", "transport"), [("adam", None), ("ranger", None), ("adam", "copy")])
def test_anything(ranks: Any, name: str, transport: str | None) -> None:
    ranks(2).run(on_gpus, name, transport, timeout=280)
