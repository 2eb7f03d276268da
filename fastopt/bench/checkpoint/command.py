"""How fast checkpoints are saved and loaded, beside raw file access, torch.save and torch.distributed.checkpoint.

    fastopt bench checkpoint --folder /data --out checkpoint.json
    fastopt bench checkpoint --only stall --device cuda --ranks 1 --model llama-1.36b
    fastopt bench checkpoint --only plan --simulated 1024

The state is that of Adam: float32 masters and two averages, of GPT-2 small 1.49 GB for 148 parameters, on two ranks.
All competitors take turns within each round; the times are medians over the rounds, of the slower rank. `floor` is
os.write of the same bytes and fsync, and reading them back, in one thread of each rank (`raw load, our threads` has as
many as our loads take where there are processors for them). Memory is the growth of the peak resident size during the
operation, in units of one rank's bytes. `fastopt load in place` is the default where states are there already: it
checks all before it changes any; `checked during` is `check="during"`; `by copies` is that with memory for copies;
`fastopt load` drops the states that were there and makes new ones.
Run it on a machine that does nothing else: two busy cores make the times of everything meaningless.
`--only stall` measures nothing but how long an asynchronous save holds the loop, `--only live` loads in place beside
reading the bytes and, with `--device cuda`, copying them there from pinned memory, apart and one after the other
(`raw`, the floor). `pinned` are the bytes of memory that all turns together pinned.

From a checkout without an installation: `python scripts/bench_checkpoint.py`.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.multiprocessing.spawn import spawn

from ...command.ending import ended_by_others
from ..children import ended_together
from ..options import new_file, positive, whole
from .live import live
from .planning import plan
from .reshard import reshard
from .rounds import rounds
from .settings import Settings
from .stall import stall
from .state import MODELS

_RUNS = {"rounds": rounds, "stall": stall, "reshard": reshard, "live": live}
_USUAL = ("rounds", "stall", "reshard")


def arguments(given: Sequence[str] | None, prog: str | None) -> argparse.Namespace:
    """The options of a run; a mistake among them ends the process with a sentence."""
    parser = argparse.ArgumentParser(prog, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="where the files go [the system's temporary folder]")
    parser.add_argument("--rounds", type=whole, default=5, help="turns of each [5]")
    parser.add_argument("--ranks", type=whole, default=2, help="processes on this machine [2]")
    parser.add_argument("--simulated", type=whole, default=1024, help="ranks of the plan that is made without data")
    parser.add_argument("--threads", type=whole, default=1, help="CPU threads per rank")
    parser.add_argument("--model", default="gpt2", choices=MODELS, help="whose state [gpt2]")
    parser.add_argument("--scale", type=positive, default=1.0, help="width of the model")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"), help="where the state is [cpu]")
    parser.add_argument("--only", default="", choices=(*_RUNS, "plan"), help="one part; without, all but live")
    parser.add_argument("--out", type=new_file, default=None, help="JSON to write")
    args = parser.parse_args(given)
    if args.folder is not None and not Path(args.folder).is_dir():
        parser.error(f"--folder: there is no folder {args.folder}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: here is no CUDA device")
    return args


@ended_by_others()
def main(given: Sequence[str] | None = None, prog: str | None = None) -> None:
    """Run everything that the options say, print it, write it.

    Args:
        given: the options; without, those of the process.
        prog: what the help calls the command.
    """
    args = arguments(given, prog)
    result: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    result |= {
        "ranks": args.ranks,
        "rounds": args.rounds,
        "model": args.model,
        "scale": args.scale,
        "device": args.device,
    }
    if args.only in ("", "plan"):
        result["plan"] = plan(args.simulated)
    if args.only != "plan":
        settings = Settings(args.folder, args.rounds, args.ranks, args.threads, args.scale, args.device, args.model)
        result |= on_ranks(settings, [args.only] if args.only else _USUAL)
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(result, indent=2) + "\n")


def on_ranks(settings: Settings, runs: Sequence[str]) -> dict[str, Any]:
    """The results of `runs`, each made by all ranks, which are processes of their own.

    Raises:
        ProcessRaisedException: a rank failed; the others are stopped.
    """
    with (
        tempfile.TemporaryDirectory() as folder,
        tempfile.TemporaryDirectory(dir=settings.folder) as files,
        ended_together(),
    ):
        arguments = (replace(settings, folder=files), runs, Path(folder))
        spawn(rank_main, arguments, nprocs=settings.ranks)  # type: ignore[no-untyped-call]
        found: dict[str, Any] = json.loads((Path(folder) / "result.json").read_text())
    return found


def rank_main(rank: int, settings: Settings, runs: Sequence[str], folder: Path) -> None:
    """One rank of the benchmark; the first one writes what was found into `folder`."""
    torch.set_num_threads(settings.threads)
    if settings.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=settings.ranks)
    rows: dict[str, Any] = {}
    for name in runs:
        _RUNS[name](settings, rows)
    if rank == 0:
        (folder / "result.json").write_text(json.dumps(rows))
    dist.destroy_process_group()
