"""How long an iteration takes on several ranks with sharded optimizer state, beside others' ways and compute alone.

    torchrun --nproc-per-node=2 scripts/bench_zero.py --out docs/benchmarks/zero-2xh200.json   # table, JSON and chart
    torchrun --nproc-per-node=2 scripts/bench_zero.py --only stage2,megatron --profile
    python scripts/bench_zero.py --chart docs/benchmarks/zero-2xh200.json -o docs/benchmarks/zero.svg

All train the same model in turns; times are medians, those of the slowest rank. What the columns mean is in
docs/benchmarks/zero.md. DeepSpeed and Megatron-Core take part where they can be imported (--peers FOLDER).
"""

from __future__ import annotations

import argparse
import math
import os
import platform
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, whatever is installed

from bench import zero_chart, zero_results, zero_rivals
from bench.zero_model import SIZES, batch, count_parameters
from bench.zero_results import Result
from bench.zero_run import Plan, run


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--model", default="llama-1.36b", choices=list(SIZES))
    parser.add_argument("--only", help="comma-separated, of: " + ", ".join(zero_rivals.builders(torch.device("cuda"))))
    parser.add_argument("--rounds", type=int, default=6, help="turns of each")
    parser.add_argument("--iterations", type=int, default=5, help="timed iterations of a turn")
    parser.add_argument("--profile", action="store_true", help="also where the time goes on the device")
    parser.add_argument("--limit", type=float, default=math.inf, help="seconds after which nobody new takes part")
    parser.add_argument("--peers", type=Path, help="folder with more packages to compare with")
    parser.add_argument("--chart", type=Path, metavar="JSON", help="draw this result, measure nothing")
    parser.add_argument("-o", "--out", type=Path, help="JSON to write, .md and .svg beside it; with --chart the SVG")
    args = parser.parse_args()
    if args.chart and not args.out:
        parser.error("--chart needs -o FILE.svg")
    return args


def measure(args: argparse.Namespace) -> Result:
    """Run all that was asked for; every rank has the result, the first one prints."""
    rank = dist.get_rank()
    device = torch.device(f"cuda:{os.environ['LOCAL_RANK']}" if args.device == "cuda" else "cpu")
    size = SIZES[args.model]
    builders = zero_rivals.builders(device)
    if args.only:
        wanted = args.only.split(",")
        if unknown := [name for name in wanted if name not in builders]:
            raise SystemExit(f"--only: {unknown[0]!r} is none of {', '.join(builders)}")
        builders = {name: builders[name] for name in wanted}
    name = torch.cuda.get_device_name() if args.device == "cuda" else f"CPU ({platform.machine()})"
    versions = {"python": platform.python_version(), "torch": torch.__version__}
    if args.device == "cuda":
        versions["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    result = Result(name, dist.get_world_size(), versions, args.model, count_parameters(size), size.batch * size.length)
    result.notes = zero_rivals.notes(device)
    setting = zero_rivals.Setting(size, device, *batch(size, rank, device))
    plan = Plan(args.rounds, args.iterations, args.profile, args.limit)
    for rows in run(setting, builders, plan, result.notes):
        known = {row.who for row in result.rows}
        result.rows += [row for row in rows if row.who not in known]
        if rank == 0:
            print("\n".join(map(zero_results.line, rows)), flush=True)
            if args.out:
                zero_results.write(result, args.out)
    return result


def main() -> None:
    args = arguments()
    if args.peers:
        sys.path.append(str(args.peers.resolve()))
    if args.chart:
        zero_chart.draw(zero_results.read(args.chart), args.out)
        return
    if "RANK" not in os.environ:
        raise SystemExit("run it with torchrun, see --help")
    start = time.perf_counter()
    if args.device == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
        dist.init_process_group("nccl", device_id=device)
    else:
        dist.init_process_group("gloo")
    result = measure(args)
    if dist.get_rank() == 0:
        print(f"\n{zero_results.page(result)}\n{time.perf_counter() - start:.0f} s in all", flush=True)
        if args.out:
            zero_chart.draw(result, args.out.with_suffix(".svg"))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # ranks with models of several libraries do not always shut down in order


if __name__ == "__main__":
    main()
