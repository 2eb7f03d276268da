"""`shard` around a tensor parallel model over NCCL, on four GPUs: equal to one process."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from fastopt.distributed import shard

from ..distributed.test_tensor_parallel import (
    MAKE,
    Net,
    assert_same_weights,
    backward,
    backward_of_all,
    groups,
    parallel,
)
from .nccl import nccl_mesh

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 4, reason="needs four CUDA devices")


def same_as_one_process(rank: int, world_size: int) -> None:
    mesh = nccl_mesh(rank, (2, 2), ("dp", "tp"))
    for name, make in MAKE.items():
        net, reference = parallel(mesh, "cuda"), Net().cuda()
        opt = shard(make(groups(net)), net, group=mesh["dp"], bucket_bytes=300)
        plain = make(groups(reference))
        for step in range(4):
            backward(net, mesh, step)
            backward_of_all(reference, step)
            if step >= 2:
                got, want = opt.clip_grad_norm_(0.3), nn.utils.clip_grad_norm_(reference.parameters(), 0.3)
                torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-6)
            for each in (opt, plain):
                each.step()
                each.zero_grad(set_to_none=True)
        opt.synchronize()
        assert_same_weights(net, reference, name, rtol=1e-4, atol=1e-5)
        if name != "muon":
            assert {choice.executor for choice in opt.engine} == {"triton"}


def test_it_equals_one_process(ranks: Any) -> None:
    ranks(4).run(same_as_one_process, timeout=200)
