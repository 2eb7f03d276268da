"""Flags, their checks, and what a resumed run may change."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.job.config import Config, check_resumable, parse, parse_rate, rebuilds
from scripts.job.errors import JobError
from scripts.job.recipes import RECIPES
from scripts.job.unfreezing import parse_unfreezing
from tests.commands import run_command

from .jobs import ROOT


def test_no_flags_are_the_defaults():
    assert parse([]) == Config()


def test_every_field_has_a_flag_with_help():
    done = subprocess.run(
        [sys.executable, str(ROOT / "scripts/train.py"), "--help"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    for spec in dataclasses.fields(Config):
        assert f"--{spec.name.replace('_', '-')}" in done.stdout


def test_flags_fill_the_fields():
    flags = "--opt lamb --lr 1e-4:1e-2 --data a b --mom 0.8 --stage 1 --resume --checkpoint memory://x --unfreeze-at 5"
    config = parse(flags.split())
    assert (config.opt, config.data, config.mom, config.stage, config.resume) == ("lamb", ("a", "b"), 0.8, 1, True)
    assert config.rate == slice(1e-4, 1e-2)
    assert config.unfreeze_at == 5


def test_the_default_batch_is_shared_evenly_by_one_to_four_ranks():
    assert [Config().batch % n for n in (1, 2, 3, 4)] == [0] * 4


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--steps", "0"], "--steps must be at least 1"),
        (["--steps", "many"], "--steps"),
        (["--opt", "adamant"], "adamant"),
        (["--lr", "fast"], "--lr takes a number"),
        (["--lr", "-1"], "--lr"),
        (["--lr", "0:1"], "--lr"),
        (["--lr", "1:2:3"], "--lr"),
        (["--lr", "nan"], "--lr"),
        (["--mom", "1"], "--mom"),
        (["--wd", "-0.1"], "--wd"),
        (["--clip", "inf"], "--clip"),
        (["--width", "30", "--heads", "4"], "--width must be a multiple of twice --heads"),
        (
            ["--batch", "2", "--accumulate", "3"],
            "--batch 2 cannot be shared by 1 rank with --accumulate 3: it must be at least 3",
        ),
        (["--resume"], "--resume needs --checkpoint"),
        (["--freeze-to", "6"], "the model has 6 groups"),
        (["--unfreeze", "10:1,5:0"], "rising steps"),
        (["--unfreeze", "10"], "STEP:LEVEL"),
        (["--unfreeze", "10:9"], "the model has 6 groups"),
        (["--unfreeze", "10:0", "--unfreeze-at", "3"], "the same thing twice"),
        (["--schedule", "steep"], "steep"),
        (["--stage", "3"], "--stage"),
        (["--dtype", "int8"], "--dtype"),
        (["--nonsense"], "--nonsense"),
    ],
)
def test_wrong_flags_are_one_sentence(flags: list[str], words: str):
    with pytest.raises(JobError) as caught:
        parse(flags)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_script_prints_the_sentence_and_no_traceback():
    command = [sys.executable, str(ROOT / "scripts/train.py"), "--lr", "fast"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2
    assert done.stderr.startswith("train.py: --lr takes a number")
    assert done.stderr.count("\n") == 1


def test_rates():
    assert parse_rate("0.5") == 0.5
    assert parse_rate("0.001:0.1") == slice(0.001, 0.1)


def test_freeze_levels_are_a_function_of_the_step():
    plan = parse_unfreezing(-1, "3:2,5:0", None, groups=4)
    assert [plan.level(step) for step in range(7)] == [3, 3, 3, 2, 2, 0, 0]
    assert [parse_unfreezing(2, "", 4, groups=4).level(step) for step in (0, 3, 4)] == [2, 2, 0]
    assert parse_unfreezing(0, "", None, groups=4).level(10**6) == 0


@pytest.mark.parametrize("flag", ["--batch", "--context", "--seed", "--layers", "--data-limit"])
def test_a_resumed_run_keeps_model_and_data(flag: str):
    saved = Config().to_json()
    changed = parse([flag, str(2 * saved[flag[2:].replace("-", "_")])])
    with pytest.raises(JobError, match=flag):
        check_resumable(changed, saved)


def test_a_resumed_run_keeps_the_optimizer_and_may_change_the_rest():
    saved = Config().to_json()
    with pytest.raises(JobError, match="--opt"):
        check_resumable(parse(["--opt", "sgd"]), saved)
    free = parse(["--lr", "0.1", "--stage", "1", "--accumulate", "2", "--steps", "500", "--clip", "0"])
    check_resumable(free, saved)
    assert rebuilds(free, saved) == ["--lr", "--steps"]


def test_recipes_name_what_is_there():
    import torch

    import fastopt

    for recipe in RECIPES.values():
        assert isinstance(getattr(torch.optim if recipe.foreign else fastopt, recipe.factory), type)


def test_check_says_in_one_sentence_what_is_wrong() -> None:
    wrong = {
        ("--data", "no such folder"): "--data no such folder matches no file",
        ("--opt", "adamm"): "argument --opt: invalid choice: 'adamm'",
        ("--batch", "3", "--accumulate", "2"): "--batch 3 cannot be shared by 2 ranks with --accumulate 2",
        ("--metrics", "/proc/x.jsonl"): "--metrics /proc/x.jsonl cannot be written: ",
        ("--checkpoint", "s4://x"): "--checkpoint s4://x cannot be written: cannot open 's4://x'",
        ("--data-limit", "100"): "the train text has 90 bytes, --context 128 needs more",
    }
    program = "import sys, train; print([train.main(['--check', '--metrics', '', *a]) for a in eval(sys.argv[1])])"
    env = {"WORLD_SIZE": "2", "PYTHONPATH": os.pathsep.join(map(str, (ROOT / "scripts", ROOT)))}
    *said, codes = run_command(sys.executable, "-c", program, repr([*wrong]), env=env).stdout.splitlines()
    assert codes == str([2] * len(wrong))
    assert len(said) == len(wrong)
    for line, sentence in zip(said, wrong.values(), strict=True):
        assert line.startswith(f"train.py: {sentence}")


def test_check_passes_what_is_right(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("some text" * 1000)
    places = (
        "--data",
        tmp_path / "text.txt",
        "--checkpoint",
        tmp_path / "run",
        "--metrics",
        tmp_path / "metrics.jsonl",
    )
    run_command(sys.executable, ROOT / "scripts/train.py", "--check", *places, "--steps", "3")
