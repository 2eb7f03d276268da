"""Checkpoints on S3. Run it as often as you like: each run goes on where the one before stopped.

export AWS_ACCESS_KEY_ID=... AWS_SECRET_ACCESS_KEY=... AWS_DEFAULT_REGION=...
python s3_resume.py s3://bucket/run   # or torchrun --nproc-per-node=2 s3_resume.py s3://bucket/run
"""

import os
import sys

import torch
import torch.distributed as dist
from torch import nn

from fastopt import RAdam
from fastopt.checkpoint import Checkpointer, steps
from fastopt.distributed import shard

url = sys.argv[1]
if "RANK" in os.environ:  # set by torchrun
    dist.init_process_group()
model = nn.Linear(8, 1)
opt = shard(RAdam(model.parameters(), lr=1e-2), model)  # with one process there is nothing to spread
schedule = torch.optim.lr_scheduler.StepLR(opt, 5, gamma=0.5)

with Checkpointer(url) as checkpoints:
    found = checkpoints.load(model=model, opt=opt, scheduler=schedule)  # None where there was never a checkpoint
    done = found.step if found else 0
    for _ in range(5):
        x = torch.randn(32, 8)
        (model(x) - x.sum(1, keepdim=True)).square().mean().backward()
        opt.step()
        schedule.step()
        opt.zero_grad()
    checkpoints.save(done + 5, model=model, opt=opt, scheduler=schedule, extra={"by": "s3_resume.py"})

print(f"steps {done + 1} to {done + 5}, lr {opt.hypers[0]['lr']:g}; on S3: {steps(url)}", flush=True)
if dist.is_initialized():
    dist.destroy_process_group()
