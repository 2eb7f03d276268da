"""An optimizer of your own: momentum of which only the sign counts, with two of the library's functions before it."""

import torch
from torch import nn

from fastopt import Optimizer, average_grad, weight_decay


def sign_step(p, lr, grad_avg, **kwargs):
    p.data.sub_(lr * grad_avg.sign())


torch.manual_seed(0)
model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 1))
opt = Optimizer(model.parameters(), [weight_decay, average_grad, sign_step], lr=3e-3, mom=0.95, wd=0.1)
for step in range(200):
    x = torch.randn(64, 8)
    loss = (model(x) - x.sum(1, keepdim=True)).square().mean()
    loss.backward()
    opt.step()
    opt.zero_grad()
    if step in (0, 99, 199):
        print(f"step {step}: loss {loss.item():.4f}")

print(opt.engine[0].executor)  # what runs it: triton on a GPU, llvm on a CPU with the extra `cpu`
