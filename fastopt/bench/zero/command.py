"""How long an iteration takes on several ranks with sharded optimizer state, beside others' ways and compute alone.

    fastopt bench zero --ranks 2 --out zero-2xh200.json    # JSON, and beside it the table and the chart
    fastopt bench zero --ranks 2 --only stage2,megatron --profile
    fastopt bench zero --chart zero-2xh200.json -o zero.svg
    torchrun --nnodes=2 --nproc-per-node=8 ... -m fastopt.bench.zero    # on several machines

All train the same model in turns; times are medians, those of the slowest rank. What the columns mean is in
docs/benchmarks/zero.md. DeepSpeed and Megatron-Core take part where they can be imported (--peers FOLDER).

From a checkout without an installation: `torchrun --nproc-per-node=2 scripts/bench_zero.py`.
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist

from ...launch import environment, ranks
from . import chart, results, rivals
from .model import SIZES, batch, count_parameters
from .results import Result
from .run import Plan, run


def arguments(given: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """The options of a run; a mistake among them ends the process with a sentence."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--model", default="llama-1.36b", choices=list(SIZES))
    parser.add_argument("--only", help="comma-separated, of: " + ", ".join(rivals.builders(torch.device("cuda"))))
    parser.add_argument("--rounds", type=int, default=6, help="turns of each")
    parser.add_argument("--iterations", type=int, default=5, help="timed iterations of a turn")
    parser.add_argument("--profile", action="store_true", help="also where the time goes on the device")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which nobody new takes part")
    parser.add_argument("--peers", type=Path, help="folder with more packages to compare with")
    parser.add_argument("--chart", type=Path, metavar="JSON", help="draw this result, measure nothing")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write, .md and .svg beside it; with --chart the SVG")
    args = parser.parse_args(given)
    if args.chart and not args.out:
        parser.error("--chart needs -o FILE.svg")
    if args.chart:
        try:
            args.chart = results.read(args.chart)
        except (OSError, ValueError) as error:
            parser.error(f"--chart: {error}")
    elif problem := _problem_with_ranks(args.ranks, args.device):
        parser.error(problem)
    if args.peers:
        sys.path.append(str(args.peers.resolve()))
    known = rivals.builders(torch.device(args.device))
    args.only = args.only.split(",") if args.only else list(known)
    if unknown := [name for name in args.only if name not in known]:
        parser.error(f"--only: {unknown[0]!r} is none of {', '.join(known)}")
    return args


def _problem_with_ranks(n: int | None, device: str) -> str | None:
    """What is wrong with `--ranks n`, which the ranks that it starts get as well."""
    started = os.environ.get("WORLD_SIZE") if "RANK" in os.environ else None
    if n is None:
        return None if started else "it takes several ranks: add --ranks N, or start it with torchrun"
    if started:
        return None if int(started) == n else f"--ranks {n}: torchrun has started {started} ranks; leave it out"
    if n < 1:
        return f"--ranks {n}: there must be one at least"
    if device == "cuda" and n > torch.cuda.device_count():
        return f"--ranks {n}: each takes a GPU, and here are {torch.cuda.device_count()}"
    return None


def measure(args: argparse.Namespace) -> Result:
    """Run all that was asked for; every rank has the result, the first one prints."""
    rank = dist.get_rank()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else "cpu")
    size = SIZES[args.model]
    builders = {name: build for name, build in rivals.builders(device).items() if name in args.only}
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU ({platform.machine()})"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if args.device == "cuda":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    result = Result(name, dist.get_world_size(), versions, args.model, count_parameters(size), size.batch * size.length)
    result.notes = rivals.notes(device)
    setting = rivals.Setting(size, device, *batch(size, rank, device))
    plan = Plan(args.rounds, args.iterations, args.profile, args.limit)
    for rows in run(setting, builders, plan, result.notes):
        known = {row.who for row in result.rows}
        result.rows += [row for row in rows if row.who not in known]
        if rank == 0:
            print("\n".join(map(results.line, rows)), flush=True)
            if args.out:
                results.write(result, args.out)
    return result


def main(given: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Measure what the options say, on the ranks of torchrun or on ranks that it starts.

    Args:
        given: the options; without, those of the process.
        prog: what the help calls the command.
    """
    given = sys.argv[1:] if given is None else given
    args = arguments(given, prog)
    if args.chart:
        chart.draw(args.chart, args.out)
        return
    if "RANK" not in os.environ:
        sys.exit(subprocess.run(ranks(args.ranks, "fastopt.bench.zero", *given), env=environment()).returncode)
    start = time.perf_counter()
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    result = measure(args)
    if dist.get_rank() == 0:
        print(f"\n{results.page(result)}\n{time.perf_counter() - start:.0f} s in all", flush=True)
        if args.out:
            chart.draw(result, args.out.with_suffix(".svg"))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # ranks with models of several libraries do not always shut down in order
