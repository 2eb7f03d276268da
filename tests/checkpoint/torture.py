"""Processes that save until they are killed, and bits that flip: the machinery of test_killed and test_flips.

`scripts/torture_checkpoint.py` runs the same in large numbers.
"""

from __future__ import annotations

import itertools
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from fastopt import Adam
from fastopt.checkpoint import Checkpointer, CheckpointError, load, prune, save, verify
from fastopt.distributed import shard

from ..ranks import _context, run_ranks

LIMIT = 30.0
"""Seconds in which every rank must have its error after another one was killed."""


# ---- the job: everything that it saves as step n is n ----------------------------------------------------------------


def job(sharded: bool) -> tuple[nn.Module, Any]:
    """A model and an optimizer that has made a step."""
    model = nn.Sequential(nn.Linear(300, 500), nn.BatchNorm1d(500), nn.Linear(500, 300), nn.Linear(300, 1))
    opt: Any = Adam(model.parameters(), lr=0.01)
    if sharded:
        opt = shard(opt, model)
    model(torch.ones(2, 300)).sum().backward()
    opt.step()
    opt.zero_grad()
    return model, opt


def fill(model: nn.Module, opt: Any, step: int) -> None:
    """Make every element and every number that is saved the step."""
    with torch.no_grad():
        for tensor in [*model.state_dict().values(), *_states(opt)]:
            tensor.fill_(step)
    opt.param_groups[0]["lr"] = float(step)


def wrong(model: nn.Module, opt: Any, step: int) -> list[str]:
    """What is not the step."""
    tensors = {**model.state_dict(), **{f"state {i}": state for i, state in enumerate(_states(opt))}}
    found = [name for name, tensor in tensors.items() if not torch.equal(tensor, torch.full_like(tensor, step))]
    return [*found, *(["lr"] if opt.param_groups[0]["lr"] != step else [])]


def _states(opt: Any) -> list[torch.Tensor]:
    return [value for state in opt.state.values() for value in state.values() if isinstance(value, torch.Tensor)]


def check(root: str, least: int, most: int) -> int:
    """The newest checkpoint is whole, all of one step, and that is between `least` and `most`; the step."""
    model, opt = job(sharded=False)
    found = load(root, model=model, opt=opt)
    assert least <= found.step <= most, f"step {found.step} was loaded, expected {least} to {most}"
    bad = wrong(model, opt, found.step)
    assert found.extra == found.step, f"step {found.step} came with the extra of {found.extra}"
    assert not bad, f"step {found.step} is a mix: {bad}"
    return found.step


# ---- kills -----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Task:
    """What the ranks of one round do: save under `root` from step `first` on, `background`: by a Checkpointer."""

    root: str
    world: int
    port: int
    first: int
    background: bool
    env: Mapping[str, str]


def _saver(rank: int, task: Task, report: Connection) -> None:
    """Save one step after the other, told to `report`; ends with the first error, also told."""
    os.environ.update(task.env)
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", task.port, is_master=False)
    limit = timedelta(seconds=LIMIT)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=task.world, timeout=limit)
    model, opt = job(sharded=True)
    try:
        checkpoints = Checkpointer(task.root, keep_last=3) if task.background else None
        for step in itertools.count(task.first):
            fill(model, opt, step)
            report.send(("begun", step))
            if checkpoints is None:
                save(task.root, step=step, model=model, opt=opt, extra=step)
                report.send(("saved", step))
            else:  # the next `fill` comes while this one is being written
                checkpoints.save(step, model=model, opt=opt, extra=step)
                report.send(("saved", step - 1))
    except CheckpointError as error:
        report.send(("failed", str(error)))
    except Exception as error:
        report.send(("wrong", repr(error)))
    os._exit(0)


@dataclass
class Tally:
    """What the kills came to."""

    rounds: int = 0
    outcomes: Counter[str] = field(default_factory=Counter)
    slowest: float = 0.0

    def __str__(self) -> str:
        parts = ", ".join(f"{number} {what}" for what, number in sorted(self.outcomes.items()))
        return f"{self.rounds} rounds: {parts}; slowest error of a surviving rank after {self.slowest:.1f} s"


def kill_rounds(
    root: str, rounds: int, seed: int, env: Mapping[str, str] | None = None, say: Callable[[str], None] = print
) -> Tally:
    """Rounds of ranks that save and are killed at a random moment, one of them or all; asserts what `check` does.

    1 to 3 ranks save a few steps under `root`, in the foreground or in the background. Of those that survive each must
    raise within `LIMIT` seconds. The next round saves the step that did not become a checkpoint once more, beside what
    the dead left behind.
    """
    generator = random.Random(seed)
    tally = Tally()
    span = 0.2  # seconds from the beginning of a save to its end, roughly: adapts to the machine
    model, opt = job(sharded=False)
    fill(model, opt, 0)
    save(root, step=0, model=model, opt=opt, extra=0)
    done = 0
    for number in range(rounds):
        world = generator.choice((1, 2, 2, 3))
        victims = range(world) if generator.random() < 0.4 else [generator.randrange(world)]
        task = Task(root, world, 0, done + 1, generator.random() < 0.4, env or {})
        moment = generator.choice((generator.random() * 1.3, generator.uniform(0.8, 1.2)))  # half of them near the end
        began, saved, took, errors, slow = _round(task, victims, span * moment, generator)
        span = 0.7 * span + 0.3 * took if took else span
        newest = check(root, max(saved, done), began)
        tally.rounds += 1
        tally.outcomes["the save came through" if newest == began else "the one before is there"] += 1
        if newest > saved and newest == began:
            tally.outcomes["of these killed between commit and return"] += 1
        tally.outcomes["errors of surviving ranks"] += errors
        tally.slowest = max(tally.slowest, slow)
        done = newest
        if generator.random() < 0.5:
            prune(root, keep_last=2, grace=generator.choice((0.0, 6 * 3600.0)))
            assert check(root, done, done) == done
        if (number + 1) % 20 == 0:
            say(f"{number + 1} of {rounds}: {tally}")
    return tally


def _round(task: Task, victims: Any, delay: float, generator: random.Random) -> tuple[int, int, float, int, float]:
    """Kill them `delay` seconds after the beginning of the first to third save.

    The last step begun, the last that some rank knows as saved (-1: none), seconds per save, errors, slowest one.
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    world, first = task.world, task.first
    processes, pipes = [], []
    for rank in range(world):
        here, there = _context.Pipe()
        arguments = (rank, replace(task, port=store.port), there)
        process = _context.Process(target=_saver, args=arguments, daemon=True)
        process.start()
        there.close()
        processes.append(process)
        pipes.append(here)
    told: list[list[tuple[str, Any, float]]] = [[] for _ in range(world)]
    try:
        until = first + generator.randint(0, 2)
        _listen(pipes, told, lambda: _last(told[victims[0]], "begun") >= until, 60)
        _listen(pipes, told, lambda: False, delay)
        for rank in victims:
            processes[rank].kill()
        killed = time.monotonic()
        alive = [rank for rank in range(world) if rank not in victims]
        _listen(pipes, told, lambda: all(told[r] and told[r][-1][0] in ("failed", "wrong") for r in alive), LIMIT)
        for rank in alive:
            assert told[rank][-1][0] == "failed", f"rank {rank} of {world} after {victims} died: {told[rank][-3:]}"
    finally:
        for process in processes:
            process.kill()
            process.join()
    _listen(pipes, told, lambda: False, 0.01)  # what they said last
    for pipe in pipes:
        pipe.close()
    begun = max(_last(each, "begun") for each in told)
    saved = max(_last(each, "saved") for each in told)
    times = [
        b - a for each in told for (x, _, a), (y, _, b) in itertools.pairwise(each) if (x, y) == ("begun", "saved")
    ]
    slow = max((told[rank][-1][2] - killed for rank in alive), default=0.0)
    return begun, saved, sum(times) / len(times) if times else 0.0, len(alive), slow


def _listen(
    pipes: list[Connection], told: list[list[tuple[str, Any, float]]], until: Callable[[], bool], seconds: float
) -> None:
    """Note what the ranks say, until something is true or the time is over."""
    deadline = time.monotonic() + seconds
    open_pipes = list(range(len(pipes)))
    while not until():
        left = deadline - time.monotonic()
        if left <= 0 or not open_pipes:
            return
        for pipe in wait([pipes[i] for i in open_pipes], left):
            rank = next(i for i in open_pipes if pipes[i] is pipe)
            try:
                told[rank].append((*pipes[rank].recv(), time.monotonic()))
            except (EOFError, OSError):
                open_pipes.remove(rank)


def _last(told: list[tuple[str, Any, float]], what: str) -> int:
    return max((value for kind, value, _ in told if kind == what), default=-1)


# ---- flips -----------------------------------------------------------------------------------------------------------


def build(rank: int, world: int, root: str) -> None:
    """Two checkpoints of every rank's share."""
    model, opt = job(sharded=True)
    for step in (1, 2):
        fill(model, opt, step)
        save(root, step=step, model=model, opt=opt, extra=step)


def flip_rounds(root: str, flips: int, seed: int, say: Callable[[str], None] = print) -> Counter[tuple[str, str]]:
    """One bit after the other flips somewhere in the newest checkpoint of two; what came of it, by region.

    Asserts of each that `verify` finds it, and that loading either refuses, and without a step gives the checkpoint
    before, or gives every element as it was saved.
    """
    run_ranks(build, 2, root)
    folder = Path(root) / "step-00000002"
    sound = verify(root, mark=False)
    assert sound.sound, sound
    generator = random.Random(seed)
    tally: Counter[tuple[str, str]] = Counter()
    for number in range(flips):
        region, file, at = _place(folder, generator)
        with file.open("r+b") as opened:
            opened.seek(at)
            old = opened.read(1)
            opened.seek(at)
            opened.write(bytes([old[0] ^ 1 << generator.randrange(8)]))
        tally[region, _outcome(root, f"bit at byte {at} of {file.name}")] += 1
        with file.open("r+b") as opened:
            opened.seek(at)
            opened.write(old)
        for note in folder.glob("damaged-*"):
            note.unlink()
        if (number + 1) % 100 == 0:
            say(f"{number + 1} of {flips} bits")
    assert verify(root, mark=False).sound
    return tally


def _place(folder: Path, generator: random.Random) -> tuple[str, Path, int]:
    """A region, a file and a byte."""
    region = generator.choice(("data", "data", "header", "manifest", "index"))
    if region == "manifest":
        file = folder / "manifest.json"
        return region, file, generator.randrange(file.stat().st_size)
    if region == "index":
        file = folder / "model.safetensors.index.json"
        return region, file, generator.randrange(file.stat().st_size)
    files = sorted(folder.glob("*.safetensors"))
    file = generator.choices(files, [path.stat().st_size for path in files])[0]
    with file.open("rb") as opened:
        header = 8 + int.from_bytes(opened.read(8), "little")
    return region, file, generator.randrange(*((0, header) if region == "header" else (header, file.stat().st_size)))


def _outcome(root: str, what: str) -> str:
    """What loading and verifying make of it."""
    report = verify(root, step=2, mark=False)
    assert not report.sound, f"{what} was not found"
    model, opt = job(sharded=False)
    fill(model, opt, 9)
    try:
        load(root, model=model, opt=opt, step=2)
    except CheckpointError:
        assert not wrong(model, opt, 9), f"{what}: the refused load has changed something"
        assert check(root, 1, 1) == 1, f"{what}: the one before did not load"
        return "loading refused, verify found it"
    assert not wrong(model, opt, 2), f"{what}: a wrong value was loaded"
    return "not needed for loading, verify found it"
