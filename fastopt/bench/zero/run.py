"""Times ways to train on several ranks, in turns. Every rank runs all of this."""

from __future__ import annotations

import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import torch
import torch.distributed as dist

from ..values import in_a_line
from . import trace
from .model import count_parameters
from .results import Row
from .rivals import COMPUTE, OURS, Iteration, Iterations, Setting, compute_only, stage_2

LEAD_IN = 2
"""Iterations at the start of a turn that are not timed: then a turn is what goes on for ever in training."""
PROFILED = 3


@dataclass(frozen=True)
class Plan:
    """How a run measures: `rounds` turns of `iterations` each, whether kernels are profiled as well, and after how many
    seconds nobody new is built."""

    rounds: int
    iterations: int
    profile: bool
    limit: float


@dataclass
class Contender:
    """A way to train with what has been measured of it so far, on this rank."""

    who: str
    iterate: Iteration
    resident: int
    peak: int
    wire: trace.Wire
    times: list[float] = field(default_factory=list)
    host: list[float] = field(default_factory=list)
    kernels: trace.Kernels | None = None


def run(
    setting: Setting, builders: dict[str, Callable[[Setting], Iterations]], plan: Plan, notes: list[str]
) -> Iterator[Iterator[list[Row]]]:
    """The rows of `builders`, as many together as fit into memory, beside compute only and our stage 2 each time.

    The rows of those that are measured together come with what is known after every turn, so that nothing is lost where
    a later one goes wrong.
    """
    waiting = {name: build for name, build in builders.items() if build is not stage_2}
    start = time.perf_counter()
    first = True

    def late() -> bool:
        return _longest(setting.device, time.perf_counter() - start) > plan.limit

    while waiting or first:
        first = False
        contenders = [*_start(setting, compute_only), *_start(setting, stage_2)]
        references = len(contenders)
        for name in list(waiting):
            if len(contenders) > references and not _fits(setting.device, count_parameters(setting.size)):
                break
            if late():
                notes.append(f"Stopped after {plan.limit:.0f} s, without: {', '.join(waiting)}.")
                waiting.clear()
                break
            try:
                contenders += _start(setting, waiting.pop(name))
            except NotImplementedError as error:
                notes.append(f"{name}: {in_a_line(error)}.")
        yield _measured(setting.device, contenders, plan, late, notes)
        contenders.clear()
        _release(setting.device)


def _measured(
    device: torch.device, contenders: Sequence[Contender], plan: Plan, late: Callable[[], bool], notes: list[str]
) -> Iterator[list[Row]]:
    """Let all take turns; the rows as they are after every turn, and after the profiles."""
    for turn in range(plan.rounds):
        if turn and late():
            who = ", ".join(each.who for each in contenders)
            notes.append(f"Stopped after {plan.limit:.0f} s, after {turn} of {plan.rounds} turns of: {who}.")
            break
        for each in contenders:
            each.times += _turn(device, each.iterate, plan.iterations)
            each.host.append(_host(device, each.iterate))
        yield _rows(device, contenders)
    for each in contenders if plan.profile and device.type == "cuda" else ():
        if late():
            break
        each.kernels = trace.kernels(trace.record(each.iterate, PROFILED, device=True), PROFILED)
    yield _rows(device, contenders)


def _start(setting: Setting, build: Callable[[Setting], Iterations]) -> list[Contender]:
    """Build, make a few iterations of each kind, and measure memory and traffic."""
    before = _allocated(setting.device)
    found = []
    for who, iterate in build(setting).items():
        for _ in range(2):
            iterate()
        _reset_peak(setting.device)
        iterate()
        _synchronize(setting.device)
        resident = _allocated(setting.device) - before
        peak = _peak(setting.device) - before
        wire = trace.wire(trace.record(iterate), dist.get_world_size())
        found.append(Contender(who, iterate, resident, peak, wire))
    return found


def _turn(device: torch.device, iterate: Iteration, n: int) -> list[float]:
    """Milliseconds of each of `n` iterations in a row, timed on the device without stopping it."""
    _synchronize(device)
    dist.barrier()
    for _ in range(LEAD_IN):
        iterate()
    if device.type != "cuda":
        times = [time.perf_counter()]
        for _ in range(n):
            iterate()
            times.append(time.perf_counter())
        return [(b - a) * 1e3 for a, b in pairwise(times)]
    events = [torch.cuda.Event(enable_timing=True) for _ in range(n + 1)]  # type: ignore[no-untyped-call]
    events[0].record()
    for event in events[1:]:
        iterate()
        event.record()
    _synchronize(device)
    return [a.elapsed_time(b) for a, b in pairwise(events)]


def _host(device: torch.device, iterate: Iteration) -> float:
    """Milliseconds until an iteration is enqueued on the idle device."""
    _synchronize(device)
    dist.barrier()
    start = time.perf_counter()
    iterate()
    return (time.perf_counter() - start) * 1e3


def _rows(device: torch.device, contenders: Sequence[Contender]) -> list[Row]:
    """What was measured, of the slowest or fullest rank."""
    own = [[statistics.median(c.times), statistics.median(c.host), c.resident, c.peak] for c in contenders]
    worst = torch.tensor(own, dtype=torch.float64, device=device)
    dist.all_reduce(worst, op=dist.ReduceOp.MAX)
    values = worst.tolist()
    median = {c.who: v[0] for c, v in zip(contenders, values, strict=True)}
    on_gpu = device.type == "cuda"
    return [
        Row(
            who=c.who,
            iteration_ms=iteration_ms,
            compute_ms=median[COMPUTE],
            host_ms=host_ms,
            resident_bytes=int(resident) if on_gpu else None,
            peak_bytes=int(peak) if on_gpu else None,
            sent_bytes=c.wire.sent,
            collectives=c.wire.collectives,
            kernels=c.kernels,
            ours_ms=median[OURS],
        )
        for c, (iteration_ms, host_ms, resident, peak) in zip(contenders, values, strict=True)
    ]


def _fits(device: torch.device, n_params: int) -> bool:
    """Whether the largest contender, 24 bytes per parameter and the activations, still fits on every rank."""
    if device.type != "cuda":
        return True
    gc.collect()
    torch.cuda.empty_cache()
    room = torch.tensor(torch.cuda.mem_get_info(device)[0] - 24 * n_params - 16 * 2**30, device=device)
    dist.all_reduce(room, op=dist.ReduceOp.MIN)
    return bool(room.item() > 0)


def _longest(device: torch.device, seconds: float) -> float:
    """The largest on all ranks, so that they decide alike."""
    value = torch.tensor(seconds, device=device)
    dist.all_reduce(value, op=dist.ReduceOp.MAX)
    return value.item()


def _release(device: torch.device) -> None:
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _allocated(device: torch.device) -> int:
    if device.type != "cuda":
        return 0
    gc.collect()
    return torch.cuda.memory_allocated(device)


def _peak(device: torch.device) -> int:
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else 0


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
