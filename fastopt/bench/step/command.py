"""How long one optimizer step takes, beside others' optimizers and beside the least time that the memory allows.

    fastopt bench step --out step-h200.json                # JSON, and beside it the table and the chart
    fastopt bench step --models llama-1.3b --rules Adam,Lamb
    fastopt bench step --chart step-h200.json -o step.svg

Every optimizer of a row steps the same parameters and gradients, in turns; times are medians over the rounds. Each
model has a process of its own, so that none depends on what ran before. What the columns mean is in
docs/benchmarks/step.md. For rows of HeavyBall and pytorch-optimizer:

    pip install --no-deps --target .peers heavyball pytorch-optimizer opt-einsum
    fastopt bench step --peers .peers

From a checkout without an installation: `python scripts/bench_step.py`.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import math
import os
import platform
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path

import torch

from ...command.ending import ended_by_others
from ...engine.cohorts import native
from ...engine.cohorts.look import MANY
from ...machine import cpu_name
from ..children import deaf, ended_together
from ..options import folder, new_file, number, positive, whole
from . import chart, results, rivals
from .clock import Clock, copy_bandwidth
from .first import CACHES, first_step, time_first_step
from .measuring import Settings, measure, plan
from .models import MODELS
from .results import Result, Row

DEFAULT_MODELS = {
    "cuda": "llama-1.3b,resnet-50,vit-b,small-1000,mixed-10000",
    "cpu": "mlp-23m,small-1000,mixed-10000",
}
FIRST_RULES = ("Adam", "Lamb", "ranger", "user")
"""Whose first step is timed in fresh processes: elementwise, with norms, with steps that differ, and a user's own."""
DEFAULT_RULES = {
    "cuda": "Adam,SGD,RAdam,Lamb,Larc,ranger,user",
    "cpu": ",".join(rivals.RULES),
}


def arguments(given: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """The options of a run; a mistake among them ends the process with a sentence."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--models", help="comma-separated, of: " + ", ".join(MODELS))
    parser.add_argument("--rules", help="comma-separated, of: " + ", ".join(rivals.RULES) + "; without: the usual ones")
    parser.add_argument("--rounds", type=whole, default=15, help="turns of each optimizer, fewer for slow ones")
    parser.add_argument("--seconds", type=positive, default=0.5, help="about how long each optimizer is timed")
    parser.add_argument("--limit", type=number, default=math.inf, help="seconds after which no row is started")
    parser.add_argument("--peers", type=folder, help="folder with more packages to compare with")
    parser.add_argument(
        "--compile",
        default="llama-1.3b:Adam",
        metavar="MODEL:RULE,...",
        help="rows with packages that compile for minutes",
    )
    parser.add_argument("--no-loop", action="store_true", help="do not time the callbacks one by one")
    parser.add_argument("--no-first", action="store_true", help="do not time the first steps of fresh processes")
    parser.add_argument("--first-step", metavar="RULE", help="print the milliseconds of one first step, no more")
    parser.add_argument("--chart", type=Path, metavar="JSON", help="draw this result, measure nothing")
    parser.add_argument(
        "-o", "--out", type=new_file, help="JSON to write, .md and .svg beside it; with --chart the SVG"
    )
    args = parser.parse_args(given)
    args.models = (args.models or DEFAULT_MODELS[args.device]).split(",")
    args.rules = (args.rules or DEFAULT_RULES[args.device]).split(",")
    for name, known in (("models", MODELS), ("rules", rivals.RULES)):
        if unknown := [value for value in getattr(args, name) if value not in known]:
            parser.error(f"--{name}: {unknown[0]!r} is none of {', '.join(known)}")
    try:
        args.compile = frozenset(_pair(text) for text in filter(None, args.compile.split(",")))
    except ValueError as error:
        parser.error(f"--compile: {error}")
    if args.device == "cuda" and not args.chart and not torch.cuda.is_available():
        parser.error("--device cuda: here is no CUDA device")
    if args.chart and not args.out:
        parser.error("--chart needs -o FILE.svg")
    if args.chart:
        try:
            args.chart = results.read(args.chart)
        except (OSError, ValueError) as error:
            parser.error(f"--chart: {error}")
    return args


def _pair(text: str) -> tuple[str, str]:
    model, _, rule = text.partition(":")
    if model not in MODELS or rule not in rivals.RULES:
        raise ValueError(f"{text!r} is no MODEL:RULE")
    return model, rule


def device_name(device: str) -> str:
    """What the times were taken on."""
    if device == "cuda":
        return torch.cuda.get_device_name()
    return f"CPU, {cpu_name()}"


def versions() -> dict[str, str]:
    """Of everything that matters here."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "llvmlite"):
        if importlib.util.find_spec(package):
            found[package] = importlib.metadata.version(package)
    return found | rivals.versions()


def run(args: argparse.Namespace) -> Result:
    """Measure everything that was asked for; prints and writes it as it goes on."""
    end = time.monotonic() + args.limit
    copy = copy_bandwidth(args.device, Clock(args.device))
    settings = Settings(args.device, copy, args.rounds, args.seconds, args.compile, not args.no_loop)
    result = Result(device_name(args.device), versions(), copy, torch.get_num_threads())
    print("\n".join(results.HEAD), flush=True)
    result.notes = rivals.notes(args.compile)
    if any(len(MODELS[model]()) >= MANY for model in args.models):
        how = "compiled functions" if native.wait() is not None else "Python"
        result.notes.insert(0, f"fastopt: {how} looked where the tensors lie.")
    first = "resnet-50" if "resnet-50" in args.models else args.models[0]
    for model in args.models:
        for rows, notes in in_a_process(model, args.rules, settings, end):
            result.rows += rows
            result.notes += notes
            print("".join(f"{line}\n" for line in results.lines(rows)), end="", flush=True)
            if args.out:
                results.write(result, args.out)
        if model == first and not args.no_first:
            result.first = [first_step(model, rule, args.device) for rule in FIRST_RULES if rule in args.rules]
    if args.out:
        results.write(result, args.out)
    return result


def in_a_process(
    model: str, rules: Sequence[str], settings: Settings, end: float
) -> Iterator[tuple[list[Row], list[str]]]:
    """The rows of a model, which a fresh process measures, and notes; none is started after `end` (`time.monotonic`).

    Raises:
        RuntimeError: the process died.
    """
    with ProcessPoolExecutor(1, get_context("spawn")) as pool, ended_together():
        for n_groups, rule in plan(model, rules):
            if time.monotonic() > end:
                yield [], [f"Out of time: rows of {model} from {rule} in {n_groups} groups on are missing."]
                return
            try:
                with deaf():
                    found = pool.submit(rows_of, model, n_groups, rule, settings)
                yield found.result()
            except BrokenProcessPool as error:
                raise RuntimeError(f"the process that measured {rule} on {model} died") from error


def rows_of(model: str, n_groups: int, rule: str, settings: Settings) -> tuple[list[Row], list[str]]:
    """The rows of one rule, measured in this process, and notes."""
    notes: list[str] = []
    if len(MODELS[model]()) >= MANY:
        native.wait()
    return measure(model, n_groups, rule, Clock(settings.device), settings, notes), notes


@ended_by_others()
def main(given: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Measure what the options say.

    Args:
        given: the options; without, those of the process.
        prog: what the help calls the command.
    """
    args = arguments(given, prog)
    if args.peers:
        sys.path.append(str(args.peers.resolve()))
    if args.chart:
        chart.draw(args.chart, args.out)
        return
    if args.first_step:
        print(time_first_step(args.models[0], args.first_step, args.device))
        return
    start = time.perf_counter()
    with tempfile.TemporaryDirectory() as caches:  # so that first steps compile, whatever ran here before
        os.environ.update({name: f"{caches}/{name}" for name in CACHES})
        result = run(args)
    print(f"\n{results.page(result)}\n{time.perf_counter() - start:.0f} s in all")
    if args.out and result.rows:
        chart.draw(result, args.out.with_suffix(".svg"))
