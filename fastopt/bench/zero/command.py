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
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from ...command.ending import UNREAD, ended_by_others
from ..options import folder, new_file, number, positive, whole
from . import chart, results, rivals
from .model import SIZES, batch, count_parameters
from .processes import run_ranks
from .results import Result
from .run import Plan, run

OVERTIME = 30.0
"""Seconds after `--limit` in which ranks come to an end by themselves."""


def arguments(given: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """The options of a run; a mistake among them ends the process with a sentence."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--ranks", type=int, metavar="N", help="start N ranks on this machine")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--model", default="llama-1.36b", choices=list(SIZES))
    parser.add_argument("--only", help="comma-separated, of: " + ", ".join(rivals.builders(torch.device("cuda"))))
    parser.add_argument("--rounds", type=whole, default=6, help="turns of each")
    parser.add_argument("--iterations", type=whole, default=5, help="timed iterations of a turn")
    parser.add_argument("--profile", action="store_true", help="also where the time goes on the device")
    parser.add_argument("--limit", type=number, default=math.inf, help="seconds after which nothing new is begun")
    parser.add_argument(
        "--patience", type=positive, default=300, metavar="SECONDS", help="that each of other packages may take"
    )
    parser.add_argument("--add", action="store_true", help="keep the rows that are in --out, add those it lacks")
    parser.add_argument("--peers", type=folder, help="folder with more packages to compare with")
    parser.add_argument("--stretch", action="store_true", help=argparse.SUPPRESS)  # one of those of `_start_ranks`
    parser.add_argument("--chart", type=Path, metavar="JSON", help="draw this result, measure nothing")
    parser.add_argument(
        "-o", "--out", type=new_file, help="JSON to write, .md and .svg beside it; with --chart the SVG"
    )
    args = parser.parse_args(given)
    if (args.chart or args.add) and not args.out:
        parser.error("--chart needs -o FILE.svg" if args.chart else "--add needs -o FILE.json")
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
    """Measure what was asked for on this rank; every rank has the result, the first one writes it after every turn."""
    rank = dist.get_rank()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else "cpu")
    size = SIZES[args.model]
    builders = rivals.builders(device)
    result = _result_so_far(args)
    setting = rivals.Setting(size, device, *batch(size, rank, device))
    start = time.perf_counter()
    for names in rivals.stretches(args.only):
        left = args.limit - (time.perf_counter() - start)
        plan = Plan(args.rounds, args.iterations, args.profile, left)
        for together in run(setting, {name: builders[name] for name in names}, plan, result.notes):
            before = list(result.rows)
            for rows in together:
                result.rows = list(before)
                result.take(rows)
                if rank == 0 and args.out:
                    results.write(result, args.out)
            if rank == 0:
                print("\n".join(map(results.line, result.rows[len(before) :])), flush=True)
    if rank == 0 and args.out:
        results.write(result, args.out)
    return result


def _result_so_far(args: argparse.Namespace) -> Result:
    """What `--add` finds, else a result without rows."""
    size = SIZES[args.model]
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU ({platform.machine()})"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if args.device == "cuda":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    new = Result(name, dist.get_world_size(), versions, args.model, count_parameters(size), size.batch * size.length)
    if args.add and args.out.exists():
        found = results.read(args.out)
        if found.about != new.about:
            sys.exit(f"--add: {args.out} is about {found.about}, and this run about {new.about}: write another file")
        return found
    new.notes = rivals.notes()
    return new


@ended_by_others()
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
    elif "RANK" in os.environ:
        _measure_and_leave(args)
    else:
        with tempfile.TemporaryDirectory() as folder:
            sys.exit(_start_ranks(args, given, args.out or Path(folder) / "zero.json"))


def _measure_and_leave(args: argparse.Namespace) -> None:
    """Be one of the ranks."""
    code = 0
    try:
        if args.device == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", device_id=device)
        else:
            dist.init_process_group("gloo")
        result = measure(args)
        if dist.get_rank() == 0 and not args.stretch:
            _show(result, args.out)
        dist.barrier()
    except BrokenPipeError:  # nobody reads the rows any more
        os._exit(UNREAD)
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)  # ranks with models of several libraries do not always shut down in order


def _start_ranks(args: argparse.Namespace, given: Sequence[str], out: Path) -> int:
    """Measure each stretch on ranks of its own; what goes wrong with one of another package is a note.

    Returns:
        The exit code: not 0 where one without other packages went wrong.
    """
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that the ranks end, too
    start = time.perf_counter()
    keep, failed, notes = args.add, False, []
    for names in rivals.stretches(args.only):
        left = args.limit - (time.perf_counter() - start)
        outside = names[0] in rivals.OTHERS
        if left <= 0:
            notes.append(f"Stopped after {args.limit:.0f} s, without: {', '.join(names)}.")
            continue
        more = ["--stretch", "--only", ",".join(names), "--limit", str(left), "--out", str(out)]
        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        seconds = min(left + OVERTIME, args.patience if outside else math.inf)
        arguments = [*given, *more, *(["--add"] if keep else [])]
        problem = run_ranks(args.ranks, "fastopt.bench.zero", arguments, store.port, seconds)
        keep = out.exists()
        if problem is not None:
            notes.append(f"{', '.join(names)}: {problem}.")
            failed = failed or not outside
        if keep and notes:
            result = results.read(out)
            result.notes += notes
            results.write(result, out)
            notes = []
    if not out.exists():
        return 1
    result = results.read(out)
    _show(result, args.out)
    print(f"{time.perf_counter() - start:.0f} s in all", flush=True)
    return int(failed)


def _show(result: Result, out: Path | None) -> None:
    """Print the page, and draw the chart beside it."""
    print(f"\n{results.page(result)}", flush=True)
    if out and result.rows:
        chart.draw(result, out.with_suffix(".svg"))
