"""fastai's Learner: discriminative rates, one-cycle with momentum, freezing, saving with the optimizer."""

import tempfile

import torch
from fastai.basics import DataLoader, DataLoaders, Learner, params
from fastai.callback.all import ProgressCallback  # with it comes fit_one_cycle
from torch import nn
from torch.utils.data import TensorDataset

import fastopt

torch.manual_seed(0)
x = torch.randn(256, 8)
data = TensorDataset(x, x.sum(1, keepdim=True))
loaders = DataLoaders(DataLoader(data, bs=32, shuffle=True), DataLoader(data, bs=64))

body = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
head = nn.Linear(32, 1)
learner = Learner(
    loaders,
    nn.Sequential(body, head),
    loss_func=nn.functional.mse_loss,
    opt_func=fastopt.Adam,  # the one line that changes
    splitter=lambda model: [params(model[0]), params(model[1])],
    path=tempfile.mkdtemp(),
)
learner.remove_cb(ProgressCallback)
learner.freeze()
learner.fit_one_cycle(2, 3e-2)
learner.unfreeze()
learner.fit_one_cycle(10, slice(3e-3, 3e-2))
learner.save("trained", with_opt=True)
learner.load("trained", with_opt=True)
print(f"validation loss {learner.validate()[0]:.3f}", learner.opt.hypers)
