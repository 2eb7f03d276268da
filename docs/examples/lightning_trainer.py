"""Lightning's Trainer: an optimizer with two groups and a schedule, a checkpoint, and going on from it."""

import tempfile

import lightning as L
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fastopt import Adam


class Model(L.LightningModule):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 32), nn.ReLU())
        self.head = nn.Linear(32, 1)

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.mse_loss(self.head(self.body(x)), y)

    def configure_optimizers(self):
        opt = Adam([self.body.parameters(), self.head.parameters()], lr=slice(1e-3, 1e-2))
        return [opt], [torch.optim.lr_scheduler.StepLR(opt, 1, gamma=0.5)]


L.seed_everything(0)
x = torch.randn(256, 8)
loader = DataLoader(TensorDataset(x, x.sum(1, keepdim=True)), batch_size=32, shuffle=True)
settings = {"accelerator": "cpu", "logger": False, "enable_progress_bar": False, "enable_model_summary": False}
folder = tempfile.mkdtemp()

trainer = L.Trainer(max_epochs=2, default_root_dir=folder, **settings)
trainer.fit(Model(), loader)
trainer.save_checkpoint(f"{folder}/two.ckpt")

trainer = L.Trainer(max_epochs=4, default_root_dir=folder, **settings)
trainer.fit(Model(), loader, ckpt_path=f"{folder}/two.ckpt")
opt = trainer.optimizers[0]
print(f"epochs {trainer.current_epoch}, rates {[hyper['lr'] for hyper in opt.hypers]}")
print(f"steps of the head: {opt.state[opt.param_lists[1][0]]['step']}")
