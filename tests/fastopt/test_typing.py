"""mypy --strict on what a user writes, without one `type: ignore`."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("mypy", reason="mypy is not installed")

SCRIPT = """
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR

from fastopt import SGD, Adam, Larc, Lookahead, Optimizer, OptimWrapper, average_grad, ranger, whole_norm
from fastopt.checkpoint import Checkpointer, latest, load, save
from fastopt.distributed import shard


def clipped_step(p: Tensor, lr: float, limit: float = 1.0, **kwargs: Any) -> dict[str, Any]:
    assert p.grad is not None
    (norm,) = whole_norm(p.grad)
    p.sub_(p.grad * (limit / norm.clamp(min=limit)), alpha=lr)
    return {"norm": norm}


def train(model: nn.Sequential, x: Tensor) -> float:
    opt: torch.optim.Optimizer = Adam(model.parameters(), lr=1e-3, wd=0.1)
    groups = [list(layer.parameters()) for layer in model]
    by_group = Adam(groups, lr=slice(1e-4, 1e-2), betas=(0.9, 0.99))
    named = SGD(model.named_parameters(), lr=[0.1], momentum=0.9)
    looking = Lookahead(Larc(model.parameters(), lr=torch.tensor(0.1), clip=False), k=5)
    own = Optimizer(model.parameters(), [average_grad, clipped_step], lr=0.1)
    wrapped = OptimWrapper(model.parameters(), opt=torch.optim.AdamW, lr=0.1)
    radam = ranger(groups, lr=1e-3)
    schedule = OneCycleLR(opt, 0.1, total_steps=10)
    by_group.freeze_to(-1)
    by_group.set_hyper("lr", 0.5)
    by_group.hypers[0]["mom"] = 0.5
    rates: list[float] = [h["lr"] for h in by_group.hypers]
    for each in (opt, by_group, named, looking, own, wrapped, radam):
        each.zero_grad()
        loss = model(x).square().mean()
        torch.autograd.backward(loss)
        each.step()
    schedule.step()
    by_group.load_state_dict(by_group.state_dict())
    return rates[0]


def resume(model: nn.Sequential, url: str) -> int:
    opt = shard(Adam(model.parameters(), lr=1e-3), model, stage=2)
    done: int = load(url, model=model, opt=opt).step if latest(url) else 0
    norm: Tensor = opt.clip_grad_norm_(1.0)
    opt.step()
    opt.zero_grad()
    save(url, step=done + 1, model=model, opt=opt, extra={"norm": norm.item()})
    with Checkpointer(url) as checkpointer:
        checkpointer.save(step=done + 2, model=model, opt=opt)
    state: dict[str, Any] = opt.state_dict()
    return done + len(state) + opt.state_bytes()
"""


def test_a_users_script_is_strict(tmp_path: Path) -> None:
    script = tmp_path / "user.py"
    script.write_text(SCRIPT)
    root = Path(__file__).parents[2]
    cache = f"--cache-dir={root / '.mypy_cache'}"
    # silent: as for an installed package, whose own errors (libraries without types) are not the user's
    command = [
        sys.executable,
        "-m",
        "mypy",
        "--strict",
        "--config-file=",
        "--follow-imports=silent",
        cache,
        str(script),
    ]
    done = subprocess.run(
        command, cwd=tmp_path, env={**os.environ, "MYPYPATH": str(root)}, capture_output=True, text=True, timeout=250
    )
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_script_runs() -> None:
    import torch

    space: dict[str, object] = {}
    exec(SCRIPT, space)
    train = space["train"]
    assert callable(train)
    assert train(torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.Linear(3, 1)), torch.ones(4, 2)) == 0.5
