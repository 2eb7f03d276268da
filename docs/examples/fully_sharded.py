"""Stage 3: PyTorch's fully_shard spreads parameters, gradients and state; the optimizer steps the parts.

torchrun --nproc-per-node=2 fully_sharded.py /tmp/run
"""

import sys

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from fastopt import Lamb
from fastopt.checkpoint import Checkpointer

folder = sys.argv[1] if len(sys.argv) > 1 else "run"  # or any URL: s3://bucket/run
dist.init_process_group()
kind = "cuda" if torch.cuda.is_available() else "cpu"
if kind == "cuda":
    torch.cuda.set_device(dist.get_node_local_rank())

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 65), nn.ReLU(), nn.Linear(65, 1)).to(kind)
mesh = init_device_mesh(kind, (dist.get_world_size(),))
for layer in model:
    if any(True for _ in layer.parameters()):
        fully_shard(layer, mesh=mesh)
fully_shard(model, mesh=mesh)

opt = Lamb(model.parameters(), lr=1e-2)  # after fully_shard; `shard` has no part in it
with Checkpointer(folder) as checkpoints:
    found = checkpoints.load(model=model, opt=opt)  # None where there was never a checkpoint
    done = found.step if found else 0
    for _ in range(5):
        x = torch.randn(32, 8, device=kind)
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        opt.clip_grad_norm_(1.0)
        opt.step()
        opt.zero_grad()
    checkpoints.save(done + 5, model=model, opt=opt)

rows = opt.state[model[0].weight]["grad_avg"].shape[0]
print(f"rank {dist.get_rank()}: step {done + 5}, {rows} of 65 rows", flush=True)
dist.destroy_process_group()
