"""Times all optimizers of one rule on one model, in turns."""

from __future__ import annotations

import gc
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from ... import Optimizer
from ..values import in_a_line
from .clock import Clock
from .models import MODELS
from .results import Row
from .rivals import FUSED, LOOP, OURS, Rival, rivals

CYCLE = 6
"""Steps after which ranger's work repeats: its slow weights move in every sixth."""
WARM_UP = 8
LEAST_ROUNDS = 3
LOOP_UP_TO = 1000
"""Tensors up to which the callbacks are also timed one by one."""


@dataclass(frozen=True)
class Settings:
    """How a run measures.

    Args:
        rounds: of turns; slow optimizers have fewer of them.
        seconds: about how long one optimizer steps in all its turns.
        compiled: models and rules for which packages that compile one graph of all tensors take part.
        loop: also time the callbacks as they are, one by one, where that is affordable.
    """

    device: str
    copy_gb_per_s: float
    rounds: int = 15
    seconds: float = 0.5
    compiled: frozenset[tuple[str, str]] = frozenset()
    loop: bool = True


def plan(model: str, rules: Sequence[str]) -> Iterator[tuple[int, str]]:
    """What to measure on a model: (groups, rule), one group first, with no more groups than there are tensors."""
    n_tensors = len(MODELS[model]())
    yield from ((n, rule) for n in (1, 10, 500) if n == 1 or n <= n_tensors for rule in rules)


def tensors_of(model: str, device: str) -> list[Tensor]:
    """Random parameters of a model, with gradients."""
    tensors: list[Tensor] = [torch.nn.Parameter(torch.randn(s, device=device) * 0.02) for s in MODELS[model]()]
    for p in tensors:
        p.grad = torch.randn_like(p)
    return tensors


def new_gradients(tensors: Sequence[Tensor]) -> None:
    """What `zero_grad(set_to_none=True)` and a backward leave: new tensors, those of the last parameters first."""
    for p in tensors:
        p.grad = None
    for p in reversed(tensors):
        p.grad = torch.full_like(p, 1e-3)


def split(tensors: Sequence[Tensor], n_groups: int) -> list[list[Tensor]]:
    """The tensors in `n_groups` groups of neighbours."""
    bounds = [len(tensors) * i // n_groups for i in range(n_groups + 1)]
    return [list(tensors[a:b]) for a, b in pairwise(bounds)]


@dataclass
class Turns:
    """One optimizer with its times so far; `n_calls` steps in a row make a turn."""

    rival: Rival
    opt: Any
    first_ms: float
    n_calls: int
    n_rounds: int
    step_ms: list[float]
    host_us: list[float]
    host_new_us: list[float]


def measure(model: str, n_groups: int, rule: str, clock: Clock, settings: Settings, notes: list[str]) -> list[Row]:
    """All optimizers of one rule on one model. A package that fails becomes one of the `notes`."""
    tensors = tensors_of(model, settings.device)
    groups = split(tensors, n_groups)
    loop = settings.loop and n_groups == 1 and len(tensors) <= LOOP_UP_TO
    turns = []
    for rival in rivals(rule, n_groups, loop, (model, rule) in settings.compiled):
        try:
            turns.append(_start(rival, groups, clock, settings))
        except Exception as error:
            if rival.who in (OURS, LOOP):
                raise
            notes.append(f"{rival.who}, {rule} on {model}: {in_a_line(error)}")
    _take_turns(turns, tensors, clock, 2 * settings.seconds * len(turns))
    n = sum(p.numel() for p in tensors)
    rows = _rows(model, n_groups, rule, turns, bytes_per_element(turns[0].opt, rule) * n / settings.copy_gb_per_s / 1e6)
    del tensors, groups, turns
    release(settings.device)
    return rows


def release(device: str) -> None:
    """Free what the last optimizers held: they are in cycles, and these hold gigabytes."""
    torch.compiler.reset()
    gc.collect()
    if device == "cuda":
        torch.cuda.empty_cache()


def _start(rival: Rival, groups: list[list[Tensor]], clock: Clock, settings: Settings) -> Turns:
    """Build an optimizer, step it until all it does has been done once, and choose how often to time it."""
    opt = rival.make(groups, [1e-6 * (1 + i % 10) for i in range(len(groups))])
    first_ms = clock.steps(opt.step, 1)
    clock.steps(opt.step, 1 if rival.who == LOOP else WARM_UP)
    ms = clock.steps(opt.step, 1)
    calls = CYCLE * max(1, min(24, int(20 / ms / CYCLE))) if ms * CYCLE < settings.seconds * 1e3 else 1
    rounds = max(LEAST_ROUNDS, min(settings.rounds, int(settings.seconds * 1e3 / (ms * calls))))
    return Turns(rival, opt, first_ms, calls, rounds, [], [], [])


def _take_turns(turns: Sequence[Turns], tensors: Sequence[Tensor], clock: Clock, seconds: float) -> None:
    """Time all optimizers for about `seconds`, at least three rounds; then once more with new gradients."""
    most = max(t.n_rounds for t in turns)
    for i in _rounds(most, seconds, clock):
        for t in (t for t in turns if i < t.n_rounds):
            t.step_ms.append(clock.steps(t.opt.step, t.n_calls))
            t.host_us += [clock.host(t.opt.step) for _ in range(min(3, t.n_calls))]
    for i in _rounds(most, seconds, clock):
        for t in (t for t in turns if i < t.n_rounds):
            new_gradients(tensors)
            t.host_new_us.append(clock.host(t.opt.step))


def _rounds(most: int, seconds: float, clock: Clock) -> Iterator[int]:
    start = clock.now()
    yield from (i for i in range(most) if i < LEAST_ROUNDS or clock.now() - start < seconds)


def bytes_per_element(opt: Optimizer, rule: str) -> float:
    """Bytes that the recorded program reads and writes per element in a step, as an average where steps differ."""
    programs = [sum(program.bytes_per_element()) for program in opt.program()]
    if not programs:
        return math.nan
    usual = programs[-1]
    return ((CYCLE - 1) * usual + max(programs)) / CYCLE if rule == "ranger" else usual


def _rows(model: str, n_groups: int, rule: str, turns: Sequence[Turns], floor_ms: float) -> list[Row]:
    fused = [statistics.median(t.step_ms) for t in turns if t.rival.who == FUSED]
    floor = None if math.isnan(floor_ms) else floor_ms
    rows = []
    for t in turns:
        ms = statistics.median(t.step_ms)
        rows.append(
            Row(
                model=model,
                groups=n_groups,
                rule=rule,
                who=t.rival.who,
                step_ms=ms,
                host_us=statistics.median(t.host_us),
                host_new_us=statistics.median(t.host_new_us),
                first_ms=t.first_ms,
                floor_ms=floor,
                share=floor and floor / ms,
                against_fused=fused[0] / ms if fused else None,
                engine=t.opt.engine[0].executor if isinstance(t.opt, Optimizer) else "",
            )
        )
    return rows
