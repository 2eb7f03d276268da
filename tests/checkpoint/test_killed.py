"""kill -9 at random moments of a save: what was there before loads, or the new one, never a mix."""

from __future__ import annotations

import itertools
import multiprocessing
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fastopt.checkpoint import latest, load, prune, save, steps

from .. import ranks  # for its fork server, which has imported torch already

KILLS = 20


def model_of(step: int) -> nn.Module:
    """A model whose every element is the step."""
    model = nn.Linear(700, 900)
    for p in model.parameters():
        nn.init.constant_(p, step)
    return model


def saver(root: str, first: int, report: Any) -> None:
    """Save one step after the other until killed; reports every step before it is saved."""
    for step in itertools.count(first):
        model = model_of(step)
        report.send(step)
        save(root, step=step, model=model, extra=step)


def check(root: Path, least: int) -> int:
    """The newest checkpoint is whole and of one step, at least `least`; its step."""
    model = nn.Linear(700, 900)
    found = load(root, model=model)
    entry = latest(root)
    assert entry is not None
    assert found.step == found.extra == entry.step >= least
    for p in model.parameters():
        assert torch.equal(p, torch.full_like(p, found.step))
    return found.step


def test_a_killed_save_leaves_the_one_before_or_itself(tmp_path: Path) -> None:
    save(tmp_path, step=0, model=model_of(0), extra=0)
    context = multiprocessing.get_context(ranks._context.get_start_method())
    generator = random.Random(3)
    done = 0
    for _ in range(KILLS):
        here, there = context.Pipe()
        process = context.Process(target=saver, args=(str(tmp_path), done + 1, there), daemon=True)
        process.start()
        there.close()
        started = done
        for _ in range(generator.randint(1, 3)):
            assert here.poll(60)
            started = here.recv()
        time.sleep(generator.random() * 0.02)
        process.kill()
        process.join()
        done = check(tmp_path, started - 1)
        prune(tmp_path, keep=2)
        assert steps(tmp_path)[-1:] == [done]
    save(tmp_path, step=done + 1, model=model_of(done + 1), extra=done + 1)
    check(tmp_path, done + 1)
