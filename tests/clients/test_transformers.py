"""The Trainer of Hugging Face, with a built optimizer and with a class, beside torch's AdamW in its place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainerCallback, TrainingArguments

import fastopt
from fastopt.distributed import shard

from ..pages import Block, examples
from ..ranks import RankPool

STEPS = 6
#: What makes fastopt's Adam torch's AdamW.
AS_TORCHS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}


def network() -> GPT2LMHeadModel:
    """A tiny GPT-2 in float64, without dropout."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=32, n_positions=8, n_embd=16, n_layer=1, n_head=2, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0
    )
    return GPT2LMHeadModel(config).double()


def rows() -> list[dict[str, Tensor]]:
    """Enough rows for `STEPS` batches of four."""
    tokens = torch.randint(32, (4 * STEPS, 8), generator=torch.Generator().manual_seed(1))
    return [{"input_ids": row, "labels": row} for row in tokens]


def arguments(folder: Path, **kwargs: Any) -> TrainingArguments:
    return TrainingArguments(
        str(folder),
        per_device_train_batch_size=4,
        max_steps=kwargs.pop("max_steps", STEPS),
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        logging_steps=1,
        save_strategy=kwargs.pop("save_strategy", "no"),
        **kwargs,
    )


def rates(trainer: Trainer) -> list[float]:
    """The learning rates that were logged, step by step."""
    return [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]


def with_built_optimizer(folder: Path, make: Any = fastopt.Adam, hypers: Any = AS_TORCHS, **kwargs: Any) -> Trainer:
    """`Trainer(optimizers=(opt, schedule))`."""
    model = network()
    opt = make(model.parameters(), **hypers)
    schedule = LambdaLR(opt, lambda step: 1 / (1 + step))
    return Trainer(model, arguments(folder, **kwargs), train_dataset=rows(), optimizers=(opt, schedule))


def test_a_built_optimizer_with_a_schedule(tmp_path: Path) -> None:
    ours = with_built_optimizer(tmp_path)
    theirs = with_built_optimizer(tmp_path, torch.optim.AdamW)
    for trainer in (ours, theirs):
        trainer.train()
    torch.testing.assert_close(ours.model.state_dict(), theirs.model.state_dict(), rtol=1e-9, atol=1e-11)
    assert rates(ours) == rates(theirs) == pytest.approx([1e-2 / (1 + step) for step in range(STEPS)])


@pytest.mark.parametrize("make", [fastopt.Adam, fastopt.ranger])
def test_resumed_bit_for_bit(make: Any, tmp_path: Path) -> None:
    """The Trainer reads the optimizer's file with `torch.load(weights_only=True)`."""
    whole = with_built_optimizer(tmp_path, make, {"lr": 1e-2}, save_strategy="steps", save_steps=3)
    whole.train()
    resumed = with_built_optimizer(tmp_path, make, {"lr": 1e-2})
    resumed.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    for a, b in zip(whole.model.parameters(), resumed.model.parameters(), strict=True):
        assert torch.equal(a, b)
    assert resumed.state.global_step == STEPS


class Signed(fastopt.Optimizer):
    """A chain of one's own as a class, with torch's name of the weight decay in its groups."""

    hp_map: Mapping[str, str] = {"weight_decay": "wd"}

    def __init__(self, params: Any, lr: float = 1e-3, **hypers: Any) -> None:
        super().__init__(params, [fastopt.weight_decay, sign_step], lr=lr, **hypers)


def sign_step(p: Tensor, lr: float, **kwargs: Any) -> None:
    p.data.sub_(lr * p.grad.sign())  # type: ignore[union-attr]


def test_a_class_of_ones_own_decays_what_the_trainer_says(tmp_path: Path) -> None:
    """One step: p (1 - lr wd) - lr sign(g), with the decay of the group it came in."""
    trainer = Trainer(
        network(),
        arguments(tmp_path, weight_decay=0.5, lr_scheduler_type="constant", max_steps=1),
        train_dataset=rows(),
        optimizer_cls_and_kwargs=(Signed, {"lr": 0.125}),
    )
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    trainer.train()
    decayed = set(trainer.get_decay_parameter_names(trainer.model))
    assert 0 < len(decayed) < len(before)
    for name, p in trainer.model.named_parameters():
        moved = p - before[name] * (1 - 0.125 * 0.5 * (name in decayed))
        assert ((moved.abs() - 0.125).abs() < 1e-12).logical_or(moved.abs() < 1e-12).all(), name


def test_a_class_with_arguments_decays_what_the_trainer_says(tmp_path: Path) -> None:
    """Two groups arrive, with `weight_decay` 0.5 and, for biases and norms, 0."""
    trained: list[nn.Module] = []
    for cls in (fastopt.Adam, torch.optim.AdamW):
        trainer = Trainer(
            network(),
            arguments(tmp_path, weight_decay=0.5, lr_scheduler_type="constant"),
            train_dataset=rows(),
            optimizer_cls_and_kwargs=(cls, AS_TORCHS),
        )
        trainer.train()
        within = trainer.optimizer.optimizer
        assert isinstance(within, cls)
        assert [group["weight_decay"] for group in within.param_groups] == [0.5, 0.0]
        trained.append(trainer.model)
    torch.testing.assert_close(trained[0].state_dict(), trained[1].state_dict(), rtol=1e-9, atol=1e-11)


class Sharded(Trainer):
    """With a sharded optimizer in the place of AdamW."""

    def create_optimizer(self, *_: Any, **__: Any) -> Any:
        if self.optimizer is None:
            self.accelerator.device_placement = False  # on CPUs it would move the parameters from "cpu" to "cpu:0"
            self.optimizer = shard(fastopt.Adam(self.model.parameters(), **AS_TORCHS), self.model, stage=1)  # type: ignore[arg-type]
        return self.optimizer


class Whole(TrainerCallback):
    """Brings the state together before rank 0 writes it."""

    def on_step_end(self, args: Any, state: Any, control: Any, optimizer: Any = None, **_: Any) -> None:
        if control.should_save:
            optimizer.optimizer.consolidate_state_dict()


def sharded_on_ranks(rank: int, world_size: int, folder: str) -> tuple[list[Tensor], list[Tensor]]:
    """Weights at the end of a run, and of one that was resumed half way."""

    def run(start: str | None = None, **kwargs: Any) -> list[Tensor]:
        given = arguments(Path(folder), lr_scheduler_type="constant", **kwargs)
        given.per_device_train_batch_size = 4 // world_size
        trainer = Sharded(network(), given, train_dataset=rows(), callbacks=[Whole()])
        trainer.train(resume_from_checkpoint=start)
        return [value.clone() for value in trainer.model.state_dict().values()]

    whole = run(save_strategy="steps", save_steps=3, save_total_limit=2)
    torch.distributed.barrier()
    return whole, run(f"{folder}/checkpoint-3")


def test_a_sharded_optimizer_on_two_ranks(ranks: Callable[[int], RankPool], tmp_path: Path) -> None:
    """Clipped by the Trainer; its checkpoint has all weights and all states."""
    alone = with_built_optimizer(tmp_path / "alone", torch.optim.AdamW, lr_scheduler_type="constant")
    alone.lr_scheduler = LambdaLR(alone.optimizer, lambda step: 1.0)
    alone.train()
    for whole, resumed in ranks(2).run(sharded_on_ranks, str(tmp_path), timeout=120):
        torch.testing.assert_close(whole, [*alone.model.state_dict().values()], rtol=1e-7, atol=1e-9)
        assert all(torch.equal(a, b) for a, b in zip(whole, resumed, strict=True))


@pytest.mark.parametrize("block", examples("docs/integrations.md", "Hugging Face Trainer"), ids=Block.title)
def test_example_of_the_page(block: Block, tmp_path: Path) -> None:
    assert "'lr'" in block.run_here(tmp_path)
