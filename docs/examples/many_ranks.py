"""Many ranks, saved in the background, resumed on any number of ranks.

torchrun --nproc-per-node=2 many_ranks.py /tmp/run   # steps 1 to 10
torchrun --nproc-per-node=3 many_ranks.py /tmp/run   # steps 11 to 20
"""

import sys

import torch
import torch.distributed as dist
from torch import nn

from fastopt import Adam
from fastopt.checkpoint import Checkpointer
from fastopt.distributed import shard

folder = sys.argv[1] if len(sys.argv) > 1 else "run"  # or any URL: s3://bucket/run
dist.init_process_group()  # NCCL between GPUs, Gloo between CPUs
device = torch.device("cpu")
if torch.cuda.is_available():
    device = torch.device("cuda", dist.get_node_local_rank())
    torch.cuda.set_device(device)

model = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 1)).to(device)
opt = shard(Adam(model.parameters(), lr=1e-2), model)  # no DistributedDataParallel around the model
with Checkpointer(folder, keep_last=2) as checkpoints:
    found = checkpoints.load(model=model, opt=opt)  # None where there is none yet
    first = found.step + 1 if found else 1
    for step in range(first, first + 10):
        x = torch.randn(32, 8, device=device)  # each rank has its own data
        loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
        loss.backward()  # gradients are summed over the ranks while this goes on
        opt.clip_grad_norm_(1.0)
        opt.step()
        opt.zero_grad()
        if step % 5 == 0:
            checkpoints.save(step, model=model, opt=opt)

rank, ranks = dist.get_rank(), dist.get_world_size()
print(f"rank {rank} of {ranks}: steps {first} to {step}, {opt.state_bytes()} bytes of state", flush=True)
dist.destroy_process_group()
