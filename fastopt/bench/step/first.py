"""The first step of a fresh process, with empty caches on disk and with those that it leaves behind."""

from __future__ import annotations

import subprocess
import tempfile

import torch

from ...launch import alone, environment
from .clock import Clock
from .measuring import tensors_of
from .results import FirstStep
from .rivals import RULES

CACHES = ("TRITON_CACHE_DIR", "TORCHINDUCTOR_CACHE_DIR", "XDG_CACHE_HOME")
"""Environment variables that say where compilers keep what they have made."""


def first_step(model: str, rule: str, device: str) -> FirstStep:
    """Milliseconds of the first step in two processes, one after the other, that share caches that were empty.

    Raises:
        RuntimeError: a process failed; the message ends with what it printed.
    """
    command = alone("fastopt.bench.step", "--first-step", rule, "--models", model, "--device", device)
    times = []
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(2):
            env = environment(**{name: f"{folder}/{name}" for name in CACHES})
            done = subprocess.run(command, env=env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"the first step of {rule} failed in a fresh process:\n{done.stderr[-2000:]}")
            times.append(float(done.stdout.split()[-1]))
    return FirstStep(model, rule, *times)


def time_first_step(model: str, rule: str, device: str) -> float:
    """Milliseconds of the first step in this process, without the start of the device."""
    tensors = tensors_of(model, device)
    opt = RULES[rule]([tensors], lr=1e-6)
    torch.ones(1, device=device).sum().item()
    return Clock(device).steps(opt.step, 1)
