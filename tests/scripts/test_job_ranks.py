"""The trainer on 1 to 3 ranks, in the ranks of the shared harness: whatever is shared out, the losses are the same."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from scripts.job.config import parse
from scripts.job.ranks import Ranks, StopRequest
from scripts.job.trainer import Trainer
from tests.ranks import RankPool

from .jobs import TINY, losses_in, steps_in, write_text

STEPS = 8
FREEZING = ["--freeze-to", "1", "--unfreeze", "3:2,5:0"]


def train(rank: int, world: int, folder: str, flags: list[str]) -> dict[str, torch.Tensor]:
    """Train on this rank into `folder`; the final weights."""
    files = ["--data", f"{folder}/text", "--metrics", f"{folder}/{world}.jsonl", "--plot", ""]
    config = parse([*TINY, *files, "--steps", str(STEPS), "--val-every", "4", "--threads", "1", *flags])
    with StopRequest() as stop:
        trainer = Trainer(config, Ranks(rank, world, world, torch.device("cpu"), 0), stop)
        trainer.run()
    return {name: p.detach().clone() for name, p in trainer.model.named_parameters()}


@pytest.fixture
def text(tmp_path: Path) -> Path:
    write_text(tmp_path / "text")
    return tmp_path


@pytest.mark.parametrize("world", [2, 3])
@pytest.mark.parametrize("stage", [0, 1, 2])
@pytest.mark.parametrize(
    "flags",
    [["--opt", "adam"], ["--opt", "lamb", "--accumulate", "2", *FREEZING], ["--opt", "ranger", "--batch", "10"]],
    ids=["adam", "lamb-accumulate-freeze", "ranger-uneven"],
)
def test_every_stage_trains_as_one_process_does(
    ranks: Callable[[int], RankPool], text: Path, world: int, stage: int, flags: list[str]
):
    expected = train(0, 1, str(text), flags)
    results = ranks(world).run(train, str(text), [*flags, "--stage", str(stage)])
    one, many = steps_in(text / "1.jsonl"), steps_in(text / f"{world}.jsonl")
    assert [line["step"] for line in many.values()] == list(range(1, STEPS + 1))
    assert losses_in(text / f"{world}.jsonl") == pytest.approx(losses_in(text / "1.jsonl"), rel=1e-4)
    for step, line in many.items():
        assert line["lr"] == one[step]["lr"]
        assert line["frozen"] == one[step]["frozen"]
        assert line["world_size"] == world
    assert many[STEPS]["val_bpb"] == pytest.approx(one[STEPS]["val_bpb"], rel=1e-4)
    for result in results:
        for name, p in result.items():
            torch.testing.assert_close(p, results[0][name], rtol=0, atol=0)
            torch.testing.assert_close(p, expected[name], rtol=1e-2, atol=2e-4)


def test_a_stop_request_hears_signals_until_the_end_of_its_block():
    before = signal.getsignal(signal.SIGTERM)
    with StopRequest() as stop:
        os.kill(os.getpid(), signal.SIGTERM)
        assert (stop.name, bool(stop)) == ("SIGTERM", True)
    assert signal.getsignal(signal.SIGTERM) is before


def test_frozen_groups_stay_where_they_are(text: Path):
    flags = "--metrics= --plot= --freeze-to 2 --unfreeze-at 4 --steps 8 --wd 0.5 --threads 1"
    config = parse([*TINY, "--data", f"{text}/text", *flags.split()])
    with StopRequest() as stop:
        trainer = Trainer(config, Ranks(0, 1, 1, torch.device("cpu"), 0), stop)
    start = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    moved = []
    for _ in range(2):
        for _ in range(4):
            trainer._set_level(config.unfreezing.level(trainer.step))
            trainer.train_step()
        moved.append({name for name, p in trainer.model.named_parameters() if not torch.equal(p, start[name])})
    assert moved[0] == {"norm.weight", "head.weight"}
    assert moved[1] == set(start)


@pytest.mark.parametrize("opt", ["sgd", "momentum", "rmsprop", "qhadam", "larc", "lookahead", "torch-adamw"])
def test_every_optimizer_learns(text: Path, opt: str):
    train(0, 1, str(text), ["--opt", opt, "--schedule", "one-cycle", "--lr", "1e-3:1e-2", "--dtype", "bfloat16"])
    losses = losses_in(text / "1.jsonl")
    assert losses[-1] < losses[0]


@pytest.mark.parametrize("opt", ["momentum", "rmsprop", "larc", "lamb", "ranger", "torch-adamw"])
def test_every_optimizer_resumes_on_other_ranks(ranks: Callable[[int], RankPool], text: Path, opt: str):
    flags = ["--opt", opt, "--every", "4", *FREEZING, "--schedule", "one-cycle", "--checkpoint", f"{text}/checkpoints"]
    ranks(2).run(train, str(text), [*flags, "--stage", "2"])
    shutil.rmtree(text / "checkpoints/step-00000008")
    ranks(3).run(train, str(text), [*flags, "--stage", "1", "--resume"])
    whole, later = steps_in(text / "2.jsonl"), steps_in(text / "3.jsonl")
    assert list(later) == [5, 6, 7, 8]
    for step, line in later.items():
        assert line["loss"] == pytest.approx(whole[step]["loss"], rel=1e-4)
        assert line["lr"] == whole[step]["lr"]
        assert line["frozen"] == whole[step]["frozen"]
