"""How long one optimizer step takes, beside others' optimizers and beside the least time that the memory allows.

    fastopt bench step --out step-h200.json                # JSON, and beside it the table and the chart
    fastopt bench step --models llama-1.3b --rules Adam,Lamb
    fastopt bench step --chart step-h200.json -o step.svg

Every optimizer of a row steps the same parameters and gradients, in turns; times are medians over the rounds. What the
columns mean is in docs/benchmarks/step.md. For rows of HeavyBall and pytorch-optimizer:

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
from collections.abc import Sequence
from pathlib import Path

import torch

from ...engine import native
from ...engine.look import MANY
from ...machine import cpu_name
from . import chart, results, rivals
from .clock import Clock, copy_bandwidth
from .first import CACHES, first_step, time_first_step
from .measuring import Settings, measure, plan
from .models import MODELS
from .results import Result

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
    parser.add_argument("--rounds", type=int, default=15, help="turns of each optimizer, fewer for slow ones")
    parser.add_argument("--seconds", type=float, default=0.5, help="about how long each optimizer is timed")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which no row is started")
    parser.add_argument("--peers", type=Path, help="folder with more packages to compare with")
    parser.add_argument("--compile-up-to", type=int, default=250, metavar="TENSORS", help="for packages that compile")
    parser.add_argument("--no-loop", action="store_true", help="do not time the callbacks one by one")
    parser.add_argument("--no-first", action="store_true", help="do not time the first steps of fresh processes")
    parser.add_argument("--first-step", metavar="RULE", help="print the milliseconds of one first step, no more")
    parser.add_argument("--chart", type=Path, metavar="JSON", help="draw this result, measure nothing")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write, .md and .svg beside it; with --chart the SVG")
    args = parser.parse_args(given)
    args.models = (args.models or DEFAULT_MODELS[args.device]).split(",")
    args.rules = (args.rules or DEFAULT_RULES[args.device]).split(",")
    for name, known in (("models", MODELS), ("rules", rivals.RULES)):
        if unknown := [value for value in getattr(args, name) if value not in known]:
            parser.error(f"--{name}: {unknown[0]!r} is none of {', '.join(known)}")
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
    start = time.perf_counter()
    clock = Clock(args.device)
    settings = Settings(
        args.device, copy_bandwidth(args.device, clock), args.rounds, args.seconds, args.compile_up_to, not args.no_loop
    )
    result = Result(device_name(args.device), versions(), settings.copy_gb_per_s, torch.get_num_threads())
    print("\n".join(results.HEAD))
    result.notes = rivals.notes(args.compile_up_to)
    if any(len(MODELS[model]()) >= MANY for model in args.models):
        how = "compiled functions" if native.wait() is not None else "Python"
        result.notes.insert(0, f"fastopt: {how} looked where the tensors lie.")
    first = "resnet-50" if "resnet-50" in args.models else args.models[0]
    for model, n_groups, rule in plan(args.models, args.rules):
        if time.perf_counter() - start > args.limit:
            result.notes.append(f"Stopped after {args.limit:.0f} s: rows from {rule} on {model} in {n_groups} on miss.")
            break
        rows = measure(model, n_groups, rule, clock, settings, result.notes)
        result.rows += rows
        print("\n".join(results.lines(rows)), flush=True)
        if model == first and n_groups == 1 and rule in FIRST_RULES and not args.no_first:
            result.first.append(first_step(model, rule, args.device))
        if args.out:
            results.write(result, args.out)
    return result


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
    if args.out:
        chart.draw(result, args.out.with_suffix(".svg"))
