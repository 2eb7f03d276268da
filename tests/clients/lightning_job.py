"""What the ranks of torchrun do in test_lightning_ddp: Lightning's Trainer with sharded optimizers.

    torchrun --nproc-per-node=2 tests/clients/lightning_job.py FOLDER

For both stages the weights at the end of an undisturbed run and of one that was resumed from half way are in FOLDER.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR
from torch.utils.data import DataLoader, TensorDataset

from fastopt import Adam, Optimizer
from fastopt.distributed import shard
from tests.fastopt.samples import batch, model

EPOCHS, ROWS = 4, 32


class Unwrapped(DDPStrategy):
    """Ranks and samplers of DDP, with gradients left to the optimizer (stage 2)."""

    def configure_ddp(self) -> None:
        """No DistributedDataParallel."""


class Net(L.LightningModule):
    """The model of `samples` with Adam on two groups; in stages 1 and 2 sharded, in stage 0 not."""

    def __init__(self, stage: int) -> None:
        super().__init__()
        self.stage = stage
        self.net = model()

    def training_step(self, rows: Any, index: int) -> Tensor:
        return nn.functional.mse_loss(self.net(rows[0]), rows[1])

    def configure_optimizers(self) -> Any:
        opt: Optimizer = Adam([self.net[0].parameters(), self.net[2].parameters()], lr=[0.02, 0.05], eps=1e-3)
        if self.stage:
            opt = shard(opt, self, self.stage)
        return [opt], [CosineAnnealingLR(opt, 2 * EPOCHS)]

    def configure_gradient_clipping(self, optimizer: Any, *args: Any, **kwargs: Any) -> None:
        """The norm of all gradients; in stage 2 they are not in `p.grad`, so Lightning's own clipping finds none."""
        optimizer.clip_grad_norm_(0.5)


def train(stage: int, folder: Path, ranks: int, epochs: int = EPOCHS, start: Path | None = None) -> Net:
    """Trains on `ranks` ranks, saves a checkpoint after every epoch as stage-epoch.ckpt, and returns the module."""
    net = Net(stage)
    trainer = L.Trainer(
        accelerator="cpu",
        devices=ranks,
        strategy={0: "auto", 1: "ddp", 2: Unwrapped()}[stage],  # type: ignore[arg-type]
        max_epochs=epochs,
        logger=False,
        default_root_dir=folder,
        callbacks=[ModelCheckpoint(folder, filename=f"{stage}-{{epoch}}", save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        use_distributed_sampler=False,  # it would shuffle
    )
    rank = int(os.environ.get("RANK", "0"))
    loader = DataLoader(TensorDataset(*(rows[rank::ranks] for rows in batch(0, ROWS))), batch_size=8 // ranks)
    trainer.fit(net, loader, ckpt_path=start, weights_only=True if start else None)
    return net


def main(folder: Path) -> None:
    """Runs both stages, whole and resumed."""
    for stage in (1, 2):
        whole = train(stage, folder / "whole", 2)
        resumed = train(stage, folder / "resumed", 2, start=folder / "whole" / f"{stage}-epoch=1.ckpt")
        ends = {"whole": whole.state_dict(), "resumed": resumed.state_dict()}
        torch.save(ends, folder / f"{stage}-{os.environ['RANK']}.pt")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
    torch.distributed.barrier()
    sys.stdout.flush()
    os._exit(0)  # ranks with Gloo sometimes abort while the interpreter shuts down
