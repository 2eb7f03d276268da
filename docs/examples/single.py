"""One process: groups with their own learning rates, freezing, a scheduler of PyTorch."""

import torch
from torch import nn

from fastopt import Adam

torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
body, head = model[0].parameters(), model[2].parameters()
opt = Adam([body, head], lr=slice(3e-3, 3e-2), wd=0.01)
schedule = torch.optim.lr_scheduler.OneCycleLR(opt, max_lr=[3e-3, 3e-2], total_steps=200)

opt.freeze()  # trains the last group only
for step in range(200):
    if step == 100:
        opt.unfreeze()
    x = torch.randn(64, 8)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    opt.step()
    schedule.step()
    opt.zero_grad()
    if step in (0, 99, 199):
        print(f"step {step}: loss {loss.item():.4f}")
