"""Lightning's Trainer and Fabric, against plain loops and against torch's own optimizers in the same Trainer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.pytorch.callbacks import (
    BaseFinetuning,
    Callback,
    EMAWeightAveraging,
    LearningRateMonitor,
    ModelCheckpoint,
    StochasticWeightAveraging,
)
from lightning.pytorch.cli import LightningCLI
from lightning.pytorch.core.optimizer import LightningOptimizer
from lightning.pytorch.loggers import CSVLogger
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR, OneCycleLR, ReduceLROnPlateau
from torch.utils.data import DataLoader

from fastopt import Adam, Lamb, Lookahead, Optimizer, ranger
from fastopt.checkpoint import Checkpointer, load, save
from fastopt.distributed import shard

from ..fastopt.samples import Case, assert_moved, assert_same, batch, every_optimizer, model, train, values
from ..pages import Block, blocks

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:.*callbacks used to create the checkpoint"),
]

Make = Callable[[nn.Sequential], Any]
MAKERS: dict[str, Make] = {
    "Adam": lambda m: Adam([m[0].parameters(), m[2].parameters()], lr=[0.02, 0.05]),
    "Lamb": lambda m: Lamb(m.named_parameters(), lr=0.05, weight_decay=0.1),
    "ranger": lambda m: ranger(m.parameters(), lr=0.05, k=2),
    "Lookahead": lambda m: Lookahead(Adam(m.parameters(), lr=0.05), k=3),
}
every_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


class Net(L.LightningModule):
    """The model of `samples`, whose optimizers `make` builds."""

    def __init__(self, make: Make) -> None:
        super().__init__()
        self.make = make
        self.net = model()

    def training_step(self, rows: Any, index: int) -> Tensor:
        loss = nn.functional.mse_loss(self.net(rows[0]), rows[1])
        self.log("loss", loss)
        return loss

    def configure_optimizers(self) -> Any:
        return self.make(self.net)


class Batches(L.LightningDataModule):
    """Batches 0 to `n - 1` of `samples`, in that order."""

    def __init__(self, n: int = 4) -> None:
        super().__init__()
        self.n = n

    def train_dataloader(self) -> Any:
        return DataLoader([batch(seed) for seed in range(self.n)], batch_size=None)  # type: ignore[arg-type]


def fit(
    folder: Path, module: L.LightningModule, ckpt_path: Path | None = None, n: int = 4, **arguments: Any
) -> L.Trainer:
    """Trains on `n` batches per epoch, quietly, and returns the Trainer."""
    arguments = {"max_epochs": 1, "logger": False, "enable_checkpointing": False, **arguments}
    trainer = L.Trainer(
        accelerator="cpu",
        devices=1,
        default_root_dir=folder,
        **arguments,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, Batches(n), ckpt_path=ckpt_path, weights_only=True if ckpt_path else None)
    return trainer


ALIKE: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-5, "weight_decay": 0.01}
"""Arguments with which Adam and torch's AdamW are the same."""


def torchs(m: nn.Sequential) -> torch.optim.Optimizer:
    return torch.optim.AdamW(m.parameters(), lr=0.05, **ALIKE)


def ours(m: nn.Sequential) -> Optimizer:
    return Adam(m.parameters(), lr=0.05, **ALIKE)


@every_optimizer
def test_automatic_optimization_is_a_plain_loop(case: Case, tmp_path: Path) -> None:
    """Through closures; for every optimizer here."""
    net = Net(lambda m: case([m[0].parameters(), m[2].parameters()], lr=[0.02, 0.05]))
    fit(tmp_path, net, n=3)
    m = model()
    train(m, case([m[0].parameters(), m[2].parameters()], lr=[0.02, 0.05]), range(3))
    assert_same(net.net.parameters(), m.parameters())


def test_accumulation_and_clipping(tmp_path: Path) -> None:
    ends = []
    for make in (ours, torchs):
        net = Net(make)
        fit(tmp_path, net, n=6, accumulate_grad_batches=2, gradient_clip_val=0.1)
        ends.append(values(net.net.parameters()))
    torch.testing.assert_close(*ends)


def test_the_monitor_sees_rates_momentum_and_decay(tmp_path: Path) -> None:
    seen = []
    for cls in (Adam, torch.optim.AdamW):

        def make(m: nn.Sequential, cls: Any = cls) -> Any:
            groups: list[dict[str, Any]] = [
                {"params": m[0].parameters(), "name": "body"},
                {"params": m[2].parameters(), "name": "head", "weight_decay": 0.5},
            ]
            opt = cls(groups, lr=0.01, betas=(0.9, 0.99), weight_decay=0.1)
            return [opt], [{"scheduler": OneCycleLR(opt, [0.1, 0.2], total_steps=5), "interval": "step"}]

        monitor = LearningRateMonitor("step", log_momentum=True, log_weight_decay=True)
        logger = CSVLogger(tmp_path, name=cls.__name__)
        fit(tmp_path, Net(make), callbacks=[monitor], logger=logger, log_every_n_steps=1)
        seen.append([monitor.lrs, monitor.last_momentum_values, monitor.last_weight_decay_values])
        assert (Path(logger.log_dir) / "metrics.csv").exists()
    named = [
        {key.replace(name, "opt"): value for key, value in each.items()}
        for name, found in zip(("Adam", "AdamW"), seen, strict=True)
        for each in found
    ]
    for mine, theirs in zip(named[:3], named[3:], strict=True):
        assert mine.keys() == theirs.keys()
        assert len(mine) == 2
        for key, value in theirs.items():
            assert mine[key] == pytest.approx(value)


@every_maker
def test_a_checkpoint_resumes_bit_for_bit(make: Make, tmp_path: Path) -> None:
    def scheduled(m: nn.Sequential) -> Any:
        opt = make(m)
        return [opt], [CosineAnnealingLR(opt, 8)]

    whole, half, rest = Net(scheduled), Net(scheduled), Net(scheduled)
    fit(tmp_path, whole, max_epochs=4)
    fit(tmp_path, half, max_epochs=2, callbacks=[ModelCheckpoint(tmp_path, filename="half")], enable_checkpointing=True)
    trainer = fit(tmp_path, rest, tmp_path / "half.ckpt", max_epochs=4)
    assert trainer.global_step == 16
    assert_same(whole.net.parameters(), rest.net.parameters())


def test_a_plateau_of_what_is_logged(tmp_path: Path) -> None:
    def make(m: nn.Sequential) -> Any:
        opt = Adam(m.parameters(), lr=0.5)
        plateau = ReduceLROnPlateau(opt, mode="max", patience=0, factor=0.5)
        return {"optimizer": opt, "lr_scheduler": {"scheduler": plateau, "monitor": "loss"}}

    trainer = fit(tmp_path, Net(make), max_epochs=4)
    (opt,) = trainer.optimizers
    assert isinstance(opt, Adam)
    assert opt.hypers[0]["lr"] < 0.5


class Duel(L.LightningModule):
    """Two optimizers by hand, each on a model of its own, with the other one's parameters toggled off."""

    def __init__(self, freeze: bool) -> None:
        super().__init__()
        self.automatic_optimization = False
        self.freeze_first = freeze
        self.one, self.two = model(1), model(2)

    def configure_optimizers(self) -> Any:
        a = Adam([self.one[0].parameters(), self.one[2].parameters()], lr=0.05)
        if self.freeze_first:
            a.freeze()
        return a, Lamb(self.two.parameters(), lr=0.05)

    def training_step(self, rows: Any, index: int) -> None:
        a, b = self.optimizers()  # type: ignore[attr-defined]
        x, y = rows
        for opt in (a, b):
            with opt.toggle_model():
                loss = nn.functional.mse_loss(self.one(x) + self.two(x), y)
                self.manual_backward(loss)
                assert all(p.grad is None for p in (self.two if opt is a else self.one).parameters())
                opt.step()
                opt.zero_grad()


@pytest.mark.parametrize("freeze", [False, True])
def test_manual_optimization(freeze: bool, tmp_path: Path) -> None:
    net, plain = Duel(freeze), Duel(freeze)
    fit(tmp_path, net)
    opts = plain.configure_optimizers()
    for seed in range(4):
        x, y = batch(seed)
        for opt in opts:
            torch.autograd.backward(nn.functional.mse_loss(plain.one(x) + plain.two(x), y))
            opt.step()
            for each in opts:
                each.zero_grad()
    assert_same(net.parameters(), plain.parameters())
    (assert_same if freeze else assert_moved)(net.one[0].parameters(), values(model(1)[0].parameters()))
    opt = net.optimizers()[0].optimizer  # type: ignore[index,union-attr]
    assert isinstance(opt, Adam)
    assert opt.is_frozen(0) is freeze


class Unfreeze(BaseFinetuning):
    """Trains the last layer, and from the second epoch on the first one as well, as a group of its own."""

    def freeze_before_training(self, pl_module: Any) -> None:
        self.freeze(pl_module.net[0])

    def finetune_function(self, pl_module: Any, epoch: int, optimizer: torch.optim.Optimizer) -> None:
        if epoch == 1:
            self.unfreeze_and_add_param_group(pl_module.net[0], optimizer, lr=0.01)
        elif epoch > 1:  # a resumed run has frozen it again, and the callback only restores the groups
            self.make_trainable(pl_module.net[0])


def test_finetuning_adds_a_group_and_assigns_groups_when_it_resumes(tmp_path: Path) -> None:
    def run(cls: Any, epochs: int, start: Path | None = None, keep: bool = False) -> list[Tensor]:
        net = Net(lambda m: cls([p for p in m.parameters() if p.requires_grad], lr=0.05, **ALIKE))
        callbacks: list[Callback] = [Unfreeze()]
        if keep:
            callbacks.append(ModelCheckpoint(tmp_path, filename="tuned"))
        trainer = fit(tmp_path, net, start, max_epochs=epochs, callbacks=callbacks, enable_checkpointing=keep)
        assert len(trainer.optimizers[0].param_groups) == (2 if epochs > 1 else 1)
        return values(net.net.parameters())

    whole = run(Adam, 4)
    torch.testing.assert_close(whole, run(torch.optim.AdamW, 4))
    run(Adam, 2, keep=True)
    assert_same(run(Adam, 4, tmp_path / "tuned.ckpt"), whole)


@pytest.mark.parametrize(
    "callback",
    [lambda: StochasticWeightAveraging(0.02, swa_epoch_start=2, annealing_epochs=2), lambda: EMAWeightAveraging()],
    ids=["StochasticWeightAveraging", "EMAWeightAveraging"],
)
def test_averages_of_weights(callback: Callable[[], Callback], tmp_path: Path) -> None:
    ends = []
    for make in (ours, torchs):
        net = Net(make)
        trainer = fit(tmp_path, net, max_epochs=5, callbacks=[callback()])
        ends.append((values(net.net.parameters()), trainer.optimizers[0].param_groups[0]["lr"]))
    torch.testing.assert_close(ends[0], ends[1])


def fabric_run(m: nn.Module, opt: Any, fabric: L.Fabric, seeds: range) -> None:
    for seed in seeds:
        x, y = batch(seed)
        fabric.backward(nn.functional.mse_loss(m(x), y))
        fabric.clip_gradients(m, opt, max_norm=0.5)
        opt.step()
        opt.zero_grad()


@every_maker
def test_fabric_trains_saves_and_resumes(make: Make, tmp_path: Path) -> None:
    fabric = L.Fabric(accelerator="cpu", devices=1)
    nets: list[Any] = [model(), model(), model(1)]
    plain = make(nets[0])
    for seed in range(6):
        x, y = batch(seed)
        torch.autograd.backward(nn.functional.mse_loss(nets[0](x), y))
        nn.utils.clip_grad_norm_(nets[0].parameters(), 0.5)
        plain.step()
        plain.zero_grad()
    one, opt = fabric.setup(nets[1], make(nets[1]))
    fabric_run(one, opt, fabric, range(3))
    fabric.save(tmp_path / "run.ckpt", {"model": one, "opt": opt})
    two, again = fabric.setup(nets[2], make(nets[2]))
    rest = fabric.load(tmp_path / "run.ckpt", {"model": two, "opt": again}, weights_only=True)
    assert not rest
    fabric_run(one, opt, fabric, range(3, 6))
    fabric_run(two, again, fabric, range(3, 6))
    for m in nets[1:]:
        assert_same(m.parameters(), nets[0].parameters())
    assert again.hypers == plain.hypers


@pytest.mark.parametrize("sharded", [False, True])
def test_our_checkpoints_take_what_fabric_hands_out(sharded: bool, tmp_path: Path) -> None:
    """Names are those of the user's module, and the state is that of the optimizer which steps."""
    fabric = L.Fabric(accelerator="cpu", devices=1)
    net, plain = model(), model(1)
    one, opt = fabric.setup(net, shard(ours(net), net, stage=1) if sharded else ours(net))
    fabric_run(one, opt, fabric, range(2))
    save(tmp_path / "run", step=2, model=one, opt=opt)
    again = ours(plain)
    load(tmp_path / "run", model=plain, opt=again)
    fabric_run(one, opt, fabric, range(2, 4))
    fabric_run(plain, again, fabric, range(2, 4))
    assert_same(net.parameters(), plain.parameters())
    opt.clear_state()
    assert not opt.optimizer.state
    load(tmp_path / "run", model=one, opt=opt)
    fabric_run(one, opt, fabric, range(2, 4))
    assert_same(net.parameters(), plain.parameters())
    with pytest.raises(TypeError, match=r"Fabric.*, which stands for an optimizer: shard the optimizer itself"):
        shard(opt, one)


class Resuming(Net):
    """Loads and saves with ours what Lightning gives it for its optimizer."""

    def __init__(self, folder: Path) -> None:
        super().__init__(ours)
        self.folder = folder

    def on_train_start(self) -> None:
        with Checkpointer(self.folder) as checkpoints:
            checkpoints.load(model=self, opt=self.optimizers())

    def on_train_end(self) -> None:
        with Checkpointer(self.folder) as checkpoints:
            done = checkpoints.latest()
            checkpoints.save(4 + (done.step if done else 0), model=self, opt=self.optimizers())


def test_our_checkpoints_take_what_lightning_hands_out(tmp_path: Path) -> None:
    whole, half, rest = Net(ours), Resuming(tmp_path / "run"), Resuming(tmp_path / "run")
    fit(tmp_path, whole, max_epochs=2)
    fit(tmp_path, half)
    fit(tmp_path, rest)
    assert_same(whole.net.parameters(), rest.net.parameters())
    wrapper: Any = LightningOptimizer(ours(model()))
    wrapper.load_state_dict(rest.trainer.optimizers[0].state_dict())
    assert wrapper.optimizer.state_dict()["state"][0]["step"] == 8
    wrapper.clear_state()
    assert not wrapper.optimizer.state


class Plain(L.LightningModule):
    """A module whose optimizer is the command line's business."""

    def __init__(self) -> None:
        super().__init__()
        self.net = model()

    training_step = Net.training_step


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:.*provide both args and command line|No seed found")
def test_the_command_line_builds_optimizer_and_schedule(tmp_path: Path) -> None:
    quiet = "--trainer.logger=false --trainer.enable_checkpointing=false --trainer.enable_progress_bar=false"
    asked = "--optimizer=fastopt.Adam --optimizer.lr=0.25 --optimizer.wd=0.1 --optimizer.betas=[0.8,0.9]"
    paced = "--lr_scheduler=torch.optim.lr_scheduler.ExponentialLR --lr_scheduler.gamma=0.5"
    where = f"--trainer.accelerator=cpu --trainer.max_epochs=2 --trainer.default_root_dir={tmp_path}"
    arguments = f"fit {where} {quiet} --trainer.enable_model_summary=false {asked} {paced}".split()
    cli = LightningCLI(Plain, Batches, args=arguments, save_config_callback=None)
    (opt,) = cli.trainer.optimizers
    assert type(opt) is Adam
    assert {key: opt.hypers[0][key] for key in ("mom", "sqr_mom", "wd")} == {"mom": 0.8, "sqr_mom": 0.9, "wd": 0.1}
    assert opt.hypers[0]["lr"] == 0.25 / 4
    assert_moved(cli.model.net.parameters(), values(model().parameters()))


@pytest.mark.parametrize("block", blocks("docs/integrations.md", "Lightning"), ids=Block.title)
def test_example(block: Block, tmp_path: Path) -> None:
    block.run_here(tmp_path)
