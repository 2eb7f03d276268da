"""Other libraries' training loops on GPUs, in half precision and sharded, beside the same loops with torch's AdamW."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

import fastopt

from ..commands import ROOT, torchrun
from .accelerate_job import BATCHES, batches, loss_of, network

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.filterwarnings("ignore"),  # these libraries warn of much, in other words in each version
]

#: What makes fastopt's Adam torch's AdamW.
ALIKE: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}
PAIR: tuple[Callable[..., Any], ...] = (partial(fastopt.Adam, **ALIKE), partial(torch.optim.AdamW, **ALIKE))


def assert_alike(losses: list[list[float]], at_least: int = BATCHES, rel: float = 2e-2, falls: float = 0.9) -> None:
    """Both runs have the same losses, as far as half precision tells, which fall to `falls` of the first at least."""
    ours, theirs = losses
    assert len(ours) == len(theirs) >= at_least
    assert ours == pytest.approx(theirs, rel=rel, abs=1e-3)
    assert ours[-1] < falls * ours[0]


# ---- torch


@pytest.mark.parametrize("make", [fastopt.Adam, fastopt.Lamb, fastopt.ranger])
def test_grad_scaler_skips_a_step_with_infinities(make: Any) -> None:
    """Scaled gradients, unscaled for clipping; a step whose gradients overflow moves neither weights nor state."""
    model = network().cuda()
    opt = make(model.parameters(), lr=1e-2)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**14)
    losses, moved = [], []
    for number, (x, y) in enumerate(batches("cuda")):
        with torch.autocast("cuda", dtype=torch.float16):
            loss = loss_of(model, x, y)
        before = [p.detach().clone() for p in model.parameters()]
        scaler.scale(loss * (1e9 if number == 3 else 1)).backward()
        scaler.unscale_(opt)
        opt.clip_grad_norm_(1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        moved.append(not all(map(torch.equal, before, model.parameters())))
        losses.append(loss.item())
    assert moved == [number != 3 for number in range(BATCHES)]
    assert {opt.state[p]["step"] for p in model.parameters()} == {BATCHES - 1}
    assert scaler.get_scale() == 2.0**13
    assert losses[-1] < losses[0]


def test_grad_scaler_beside_adamw() -> None:
    losses: list[list[float]] = []
    for make in PAIR:
        model, scaler = network().cuda(), torch.amp.GradScaler("cuda", init_scale=2.0**24)  # overflows at first
        opt = make(model.parameters())
        losses.append([])
        for x, y in batches("cuda", repeat=4):
            with torch.autocast("cuda", dtype=torch.float16):
                loss = loss_of(model, x, y)
            scaler.scale(loss).backward()
            scaler.step(opt)
            scaler.update()
            opt.zero_grad()
            losses[-1].append(loss.item())
    assert_alike(losses)


# ---- Accelerate


@pytest.fixture
def accelerate() -> Iterator[Any]:
    """Accelerate, which keeps what the first Accelerator of a process was told."""
    library = pytest.importorskip("accelerate")
    from accelerate.state import AcceleratorState, GradientState, PartialState

    kept = (AcceleratorState, GradientState, PartialState)
    for state in kept:
        state._reset_state()
    yield library
    for state in kept:
        state._reset_state()


@pytest.mark.parametrize("precision", ["fp16", "bf16"])
def test_accelerate_in_half_precision(accelerate: Any, precision: str) -> None:
    """With fp16 Accelerate scales the loss, and skips steps until the scale is small enough."""
    losses: list[list[float]] = []
    skipped = []
    for make in PAIR:
        handlers = [accelerate.utils.GradScalerKwargs(init_scale=2.0**24)] if precision == "fp16" else []
        accelerator = accelerate.Accelerator(mixed_precision=precision, kwargs_handlers=handlers)
        model = network()
        model, opt = accelerator.prepare(model, make(model.parameters()))
        losses.append([])
        skipped.append(0)
        for x, y in batches("cuda", repeat=4):
            with accelerator.autocast():
                loss = loss_of(model, x, y)
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
            skipped[-1] += bool(opt.step_was_skipped)
            losses[-1].append(loss.item())
        for state in (accelerate.state.AcceleratorState, accelerate.state.GradientState, accelerate.state.PartialState):
            state._reset_state()
    assert_alike(losses)
    assert skipped[0] == skipped[1]
    assert (skipped[0] > 0) == (precision == "fp16")


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_accelerate_fsdp2_on_two_gpus(tmp_path: Path) -> None:
    """The optimizer is built before Accelerate shards the model; saved by Accelerate, and resumed bit for bit."""
    pytest.importorskip("accelerate")
    torchrun(2, ROOT / "tests" / "gpu" / "accelerate_job.py", tmp_path, timeout=240)
    found = torch.load(tmp_path / "found.pt")
    model = network()
    plain = torch.optim.AdamW(model.parameters(), **ALIKE)
    for x, y in batches("cpu"):
        loss_of(model, x, y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.5)
        plain.step()
        plain.zero_grad()
    assert found["sharded"]
    assert found["executors"] == ["triton"]
    torch.testing.assert_close(found["whole"], [p.detach() for p in model.parameters()], rtol=1e-4, atol=1e-5)
    assert all(map(torch.equal, found["whole"], found["resumed"]))


# ---- the Trainer of Hugging Face


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_hugging_face_trainer(accelerate: Any, precision: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", precision)  # the Trainer sets it, and leaves it
    library = pytest.importorskip("transformers")
    tokens = torch.randint(32, (64, 8), generator=torch.Generator().manual_seed(1)).sort().values
    rows = [{"input_ids": row, "labels": row} for row in tokens]
    losses = []
    for cls in (fastopt.Adam, torch.optim.AdamW):
        torch.manual_seed(0)
        config = library.GPT2Config(
            vocab_size=32, n_positions=8, n_embd=32, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
        )
        args = library.TrainingArguments(
            str(tmp_path), max_steps=16, per_device_train_batch_size=8, weight_decay=0.1, report_to=[],
            disable_tqdm=True, logging_steps=1, save_strategy="no", **{precision: True},
        )  # fmt: skip
        assert args.device.type == "cuda"
        args._n_gpu = 1  # the Trainer would wrap the model in DataParallel
        chosen = cls, {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}
        trainer = library.Trainer(
            library.GPT2LMHeadModel(config), args, train_dataset=rows, optimizer_cls_and_kwargs=chosen
        )
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    assert_alike(losses, 16)


# ---- Lightning


@pytest.mark.parametrize("precision", ["16-mixed", "bf16-mixed", "bf16-true"])
def test_lightning_trainer(precision: str, tmp_path: Path) -> None:
    library = pytest.importorskip("pytorch_lightning")
    losses = []
    for make in PAIR:
        module = lightning_module(library)(make)
        trainer = library.Trainer(
            max_epochs=4, accelerator="gpu", devices=[0], precision=precision, default_root_dir=tmp_path, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
            gradient_clip_val=1.0,
        )  # fmt: skip
        trainer.fit(module, DataLoader(list(batches("cpu")), batch_size=None))  # type: ignore[arg-type]
        losses.append([loss.item() for loss in module.losses])
    assert_alike(losses, rel=0.1 if precision == "bf16-true" else 2e-2)  # AdamW rounds to bfloat16 in between


def lightning_module(library: Any) -> Any:
    """The network in a module of Lightning."""

    class Module(library.LightningModule):  # type: ignore[misc]
        def __init__(self, make: Callable[..., Any]) -> None:
            super().__init__()
            self.net, self.make = network(), make
            self.losses: list[Tensor] = []

        def training_step(self, rows: Any, index: int) -> Tensor:
            x, y = rows
            loss = loss_of(self.net, x.to(self.dtype), y)
            self.losses.append(loss.detach())
            return loss

        def configure_optimizers(self) -> Any:
            return self.make(self.parameters())

    return Module


# ---- fastai


def test_fastai_learner_in_half_precision(tmp_path: Path) -> None:
    """`to_fp16`, first frozen, then one cycle: beside the same Learner with fastai's own Adam."""
    sys.path.append(str(ROOT / ".peers"))  # where packages that the machine lacks may have been carried
    pytest.importorskip("fastai.learner")
    from fastai.basics import Callback, DataLoaders, Learner, params
    from fastai.callback.all import GradientClip, ProgressCallback
    from fastai.data.load import DataLoader as FastaiLoader
    from fastai.optimizer import Adam as FastaiAdam

    rows = [(a, b) for x, y in batches("cpu") for a, b in zip(x, y, strict=True)]
    losses, scales = [], []
    note_scale = Callback(after_batch=lambda self: scales.append(self.learn.scaler.get_scale() if self.training else 1))
    for opt_func in (fastopt.Adam, FastaiAdam):
        loaders = DataLoaders(
            *(FastaiLoader(rows, bs=16, num_workers=0) for _ in range(2)), device=torch.device("cuda")
        )
        model = network().cuda()
        learn = Learner(
            loaders, model, lambda out, y: nn.functional.mse_loss(out.float(), y), opt_func=opt_func, path=tmp_path,
            splitter=lambda m: [params(m[0]), params(m[2])],
        ).to_fp16()  # fmt: skip
        learn.remove_cb(ProgressCallback)
        learn.logger = lambda *_: None
        learn.freeze()
        before = model[0].weight.detach().clone()
        learn.fit(1, 1e-3, cbs=[GradientClip(1.0), note_scale])
        assert torch.equal(before, model[0].weight)
        frozen = [float(value) for value in learn.recorder.losses]
        learn.unfreeze()
        learn.fit_one_cycle(4, slice(1e-3, 2e-2), cbs=GradientClip(1.0))
        assert not torch.equal(before, model[0].weight)
        losses.append(frozen + [float(value) for value in learn.recorder.losses])
    assert max(scales) > 1  # gradients were scaled
    assert_alike(losses, 5, falls=0.98)  # averages over all batches so far
