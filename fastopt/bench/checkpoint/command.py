"""How fast checkpoints are saved and loaded, beside raw file access, torch.save and torch.distributed.checkpoint.

    python scripts/bench_checkpoint.py [--folder /data] [--rounds 5] [--scale 1.0] [--device cpu|cuda] [--out FILE.json]

The state is that of Adam for GPT-2 small: float32 masters and two averages of 148 parameters, 1.49 GB, on two ranks.
All competitors take turns within each round; the times are medians over the rounds, of the slower rank. `floor` is
os.write of the same bytes and fsync, and reading them back. Memory is the growth of the peak resident size during the
operation, in units of one rank's bytes; `fastopt load` drops the states that were there and makes new ones.
Run it on a machine that does nothing else: two busy cores make the times of everything meaningless.
`--only stall` measures nothing but how long an asynchronous save holds the loop.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import platform
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, whatever is installed

from fastopt import Adam
from fastopt.checkpoint import Checkpointer, load, save
from fastopt.checkpoint.assemble import assemble, rank_record
from fastopt.checkpoint.datafile import Item
from fastopt.checkpoint.manifest import from_bytes, to_bytes
from fastopt.checkpoint.plan import Use, Whole, block_bytes, pack, reads, share_out
from fastopt.checkpoint.records import (
    DataFile,
    Group,
    Manifest,
    ModelPart,
    OptPart,
    ParamStates,
    model_key,
    state_key,
)
from fastopt.checkpoint.writing import PART_BYTES, FileRecord
from fastopt.distributed import Layout, ParamSpec, shard

STATES = ("master", "grad_avg", "sqr_avg")


def gpt2(scale: float) -> dict[str, tuple[int, ...]]:
    """Shapes of GPT-2 small by name; `scale` makes all matrices narrower."""
    d = int(768 * scale) // 16 * 16
    shapes: dict[str, tuple[int, ...]] = {"wte": (50257, d), "wpe": (1024, d)}
    for i in range(12):
        for name, shape in {
            "ln_1.weight": (d,),
            "ln_1.bias": (d,),
            "attn.c_attn.weight": (d, 3 * d),
            "attn.c_attn.bias": (3 * d,),
            "attn.c_proj.weight": (d, d),
            "attn.c_proj.bias": (d,),
            "ln_2.weight": (d,),
            "ln_2.bias": (d,),
            "mlp.c_fc.weight": (d, 4 * d),
            "mlp.c_fc.bias": (4 * d,),
            "mlp.c_proj.weight": (4 * d, d),
            "mlp.c_proj.bias": (d,),
        }.items():
            shapes[f"h.{i}.{name}"] = shape
    return {**shapes, "ln_f.weight": (d,), "ln_f.bias": (d,)}


class Bag(nn.Module):
    """Parameters by name."""

    def __init__(self, shapes: dict[str, tuple[int, ...]], device: str) -> None:
        super().__init__()
        for name, shape in shapes.items():
            p = nn.Parameter(torch.zeros(shape, dtype=torch.bfloat16, device=device))
            self.register_parameter(name.replace(".", "_"), p)


def job(args: argparse.Namespace, filled: bool = True) -> Any:
    """A sharded Adam with masters and both averages; without `filled` it has no state yet."""
    model = Bag(gpt2(args.scale), args.device)
    opt = shard(Adam(model.named_parameters(), lr=1e-3), model)
    if filled:
        fill(opt)
    return opt


def fill(opt: Any) -> None:
    """Give every parameter its three states, this rank's part, of numbers that do not repeat."""
    torch.manual_seed(opt.rank)
    for number, p in enumerate(p for group in opt.param_groups for p in group["params"]):
        n = opt.layout.interval(number, opt.rank)
        opt.state[p] = {key: torch.randn(n[1] - n[0], device=p.device) for key in STATES} | {"step": 1}


def held(opt: Any) -> list[Tensor]:
    """This rank's tensors."""
    return [value for state in opt.state.values() for value in state.values() if isinstance(value, Tensor)]


# ---- measuring


def resident() -> tuple[int, int]:
    """Bytes resident now, and at most since `reset_peak`."""
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines() if ":" in line)
    return int(fields["VmRSS"].split()[0]) << 10, int(fields["VmHWM"].split()[0]) << 10


def measured(work: Callable[[], Any], result_bytes: int = 0) -> tuple[float, int]:
    """Seconds of the slower rank, and the growth of memory on this one beyond the bytes of the result."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")
    before = resident()[0]
    dist.barrier()
    start = time.perf_counter()
    work()
    seconds = torch.tensor(time.perf_counter() - start)
    grown = resident()[1] - before - result_bytes
    dist.all_reduce(seconds, op=dist.ReduceOp.MAX)
    return seconds.item(), grown


def write_raw(path: Path, tensors: list[Tensor]) -> None:
    """All bytes, then fsync."""
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    for tensor in tensors:
        view = memoryview(tensor.view(torch.uint8).numpy())
        while view:
            view = view[os.write(handle, view) :]
    os.fsync(handle)
    os.close(handle)


def read_raw(path: Path, tensors: list[Tensor]) -> None:
    """All bytes, into `tensors`."""
    with open(path, "rb", buffering=0) as file:
        for tensor in tensors:
            view = memoryview(tensor.view(torch.uint8).numpy())
            while view:
                view = view[file.readinto(view) :]


# ---- competitors: each saves to and loads from a folder of its own


def dtensors(opt: Any, args: argparse.Namespace) -> dict[str, Any]:
    """The same amount of state as DTensors, cut along the first dimension."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    made: dict[str, Any] = {}
    for name, shape in gpt2(args.scale).items():
        local = list(torch.empty(shape[0]).chunk(mesh.size()))[mesh.get_local_rank()].shape[0]
        for key in STATES:
            data = torch.randn(local, *shape[1:])
            stride = torch.empty(shape, device="meta").stride()
            made[f"{key}.{name}"] = DTensor.from_local(
                data, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride
            )
    return made


def raw(place: Path, opt: Any) -> dict[str, Callable[[], Any]]:
    """os.write and fsync; reading into the same memory."""
    tensors = held(opt)
    file = place / f"{dist.get_rank()}.bin"
    return {"save": lambda: write_raw(file, tensors), "load": lambda: read_raw(file, tensors)}


def torch_save(place: Path, opt: Any) -> dict[str, Callable[[], Any]]:
    """One torch.save per rank, synced."""
    file = place / f"{dist.get_rank()}.pt"

    def write() -> None:
        with open(file, "wb") as opened:
            torch.save(held(opt), opened)
            opened.flush()
            os.fsync(opened.fileno())

    return {"save": write, "load": lambda: torch.load(file)}


def dcp(place: Path, state: dict[str, Any], hugging_face: bool) -> dict[str, Callable[[], Any]]:
    """torch.distributed.checkpoint with its own or with the safetensors writer."""
    import torch.distributed.checkpoint as dcp

    if hugging_face:
        writer: Any = dcp.HuggingFaceStorageWriter(str(place), save_distributed=True)
        reader: Any = dcp.HuggingFaceStorageReader(str(place))
    else:
        writer, reader = dcp.FileSystemWriter(place), dcp.FileSystemReader(place)
    return {
        "save": lambda: dcp.save(state, storage_writer=writer),
        "load": lambda: dcp.load(state, storage_reader=reader),
    }


# ---- the runs


def rounds(args: argparse.Namespace, rows: dict[str, Any]) -> None:
    """Save and warm load of all competitors, in turns."""
    opt = job(args)
    mine = sum(t.nbytes for t in held(opt))
    state = dtensors(opt, args)
    rows["bytes of a rank"] = mine
    times: dict[str, list[float]] = {}
    memory: dict[str, list[int]] = {}

    def note(name: str, result: tuple[float, int]) -> None:
        times.setdefault(name, []).append(result[0])
        memory.setdefault(name, []).append(result[1])

    def turn_of(name: str, place: Path) -> None:
        if name == "fastopt":
            note("fastopt save", measured(lambda: save(place, step=1, opt=opt)))
            note("fastopt load in place", measured(lambda: load(place, opt=opt, staging=0)))
            note("fastopt load by copies", measured(lambda: load(place, opt=opt, staging=1 << 60)))
            note("fastopt load", measured(lambda: (opt.clear_state(), load(place, opt=opt))))
            return
        if name.startswith("DCP"):
            tools = dcp(place, state, name == "DCP HF")
        else:
            tools = raw(place, opt) if name == "raw" else torch_save(place, opt)
        note(f"{name} save", measured(tools["save"]))
        note(f"{name} load", measured(tools["load"]))
        if name == "raw":
            file = place / f"{dist.get_rank()}.bin"
            sizes = [t.numel() for t in held(opt)]
            note("raw load, new memory", measured(lambda: read_raw(file, [torch.empty(n) for n in sizes]), mine))

    for turn in range(args.rounds + 1):
        for name in ("raw", "torch.save", "DCP", "DCP HF", "fastopt"):
            place = fresh_folder(args)
            turn_of(name, place)
            remove_folder(place)
        if turn == 0:  # the first round finds cold memory
            times.clear()
            memory.clear()
    for name, seconds in times.items():
        floor = (
            "raw save" if "save" in name.split() else "raw load, new memory" if name == "fastopt load" else "raw load"
        )
        rows[name] = {
            "seconds": statistics.median(seconds),
            "least": min(seconds),
            "most": max(seconds),
            "of floor": statistics.median(times[floor]) / statistics.median(seconds),
            "memory": statistics.median(memory[name]) / mine,
        }


def stall(args: argparse.Namespace, rows: dict[str, Any]) -> None:
    """How long an asynchronous save holds the loop, beside a plain copy of this rank's tensors."""
    opt = job(args)
    tensors = held(opt)
    pinned = args.device == "cuda"
    buffers = [torch.empty(t.shape, dtype=t.dtype, pin_memory=pinned) for t in tensors]

    def copy() -> None:
        for buffer, tensor in zip(buffers, tensors, strict=True):
            buffer.copy_(tensor, non_blocking=True)
        if pinned:
            torch.cuda.synchronize()

    copies, stalls, totals = [], [], []
    place = fresh_folder(args)
    with Checkpointer(place, keep_last=1, reuse=False) as checkpoints:
        for step in range(args.rounds + 1):
            copies.append(measured(copy)[0])
            stalls.append(measured(lambda step=step: checkpoints.save(step, opt=opt))[0])  # type: ignore[misc]
            totals.append(stalls[-1] + measured(checkpoints.wait)[0])
    remove_folder(place)
    medians = [statistics.median(each[1:]) for each in (copies, stalls, totals)]
    rows["stall"] = dict(zip(("copy", "stall", "until written"), medians, strict=True))
    rows["stall"]["x copy"] = medians[1] / medians[0]


def reshard(args: argparse.Namespace, rows: dict[str, Any]) -> None:
    """What two ranks saved, loaded by one process: the floor reads the same bytes from two files."""
    opt = job(args)
    state = dtensors(opt, args)
    ours, theirs, plain = fresh_folder(args), fresh_folder(args), fresh_folder(args)
    save(ours, step=1, opt=opt)
    dcp(theirs, state, False)["save"]()
    raw(plain, opt)["save"]()
    dist.barrier()
    if dist.get_rank() == 0:
        rows["reshard"] = alone(args, ours, theirs, plain)
    dist.barrier()
    for place in (ours, theirs, plain):
        remove_folder(place)


def alone(args: argparse.Namespace, ours: Path, theirs: Path, plain: Path) -> dict[str, Any]:
    """One process of its own, since this one belongs to a process group."""
    context = mp.get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=_alone, args=(args, ours, theirs, plain, queue))
    process.start()
    result: dict[str, Any] = queue.get(timeout=600)
    process.join()
    return result


def _alone(args: argparse.Namespace, ours: Path, theirs: Path, plain: Path, queue: Any) -> None:
    import torch.distributed.checkpoint as dcp

    torch.set_num_threads(args.threads)
    dist.init_process_group("gloo", init_method="file://" + tempfile.mktemp(), rank=0, world_size=1)
    model = Bag(gpt2(args.scale), "cpu")
    opt = Adam(model.named_parameters(), lr=1e-3)
    for p in model.parameters():
        opt.state[p] = {key: torch.zeros(p.shape) for key in STATES} | {"step": 1}
    tensors = [t.view(-1) for t in held(opt)]
    shapes = gpt2(args.scale)
    state = {f"{key}.{name}": torch.zeros(shape) for name, shape in shapes.items() for key in STATES}
    total = sum(t.nbytes for t in tensors)
    files = sorted(plain.iterdir())
    flat = torch.zeros(total // 4)
    halves = [flat[: files[0].stat().st_size // 4], flat[files[0].stat().st_size // 4 :]]
    times: dict[str, list[tuple[float, int]]] = {}
    for _ in range(args.rounds + 1):
        runs: dict[str, tuple[Callable[[], Any], int]] = {
            "raw": (lambda: [read_raw(f, [half]) for f, half in zip(files, halves, strict=True)], 0),
            "DCP": (lambda: dcp.load(state, storage_reader=dcp.FileSystemReader(theirs)), 0),
            "fastopt in place": (lambda: load(ours, opt=opt, staging=0, rng=False), 0),
            "fastopt by copies": (lambda: load(ours, opt=opt, staging=1 << 60, rng=False), 0),
            "raw, new memory": (lambda: read_raw(files[0], [torch.empty(total // 8)]), total // 2),
            "fastopt": (lambda: (opt.clear_state(), load(ours, opt=opt, rng=False)), 0),
        }
        for name, (run, result) in runs.items():
            times.setdefault(name, []).append(measured(run, result))
    medians = {name: statistics.median(t for t, _ in each[1:]) for name, each in times.items()}
    medians["raw, new memory"] *= 2  # half of the bytes were read
    memory = {name: statistics.median(m for _, m in each[1:]) / total for name, each in times.items()}
    queue.put(
        {
            name: {
                "seconds": seconds,
                "of floor": medians["raw, new memory" if name == "fastopt" else "raw"] / seconds,
                "memory": memory[name],
            }
            for name, seconds in medians.items()
        }
    )
    dist.destroy_process_group()


def llama() -> list[tuple[str, tuple[int, ...]]]:
    """A LLaMA-like model of 1.36 billion parameters in 219 tensors."""
    d, hidden = 2048, 5632
    shapes: list[tuple[str, tuple[int, ...]]] = [("embed", (32000, d))]
    for i in range(24):
        shapes += [(f"blocks.{i}.attn.{w}", (d, d)) for w in "qkvo"]
        shapes += [
            (f"blocks.{i}.mlp.{w}", shape)
            for w, shape in zip(("gate", "up", "down"), ((hidden, d), (hidden, d), (d, hidden)), strict=True)
        ]
        shapes += [(f"blocks.{i}.{w}", (d,)) for w in ("norm_1", "norm_2")]
    return [*shapes, ("norm", (d,)), ("head", (32000, d))]


def plan(args: argparse.Namespace) -> dict[str, Any]:
    """What rank 0 and each rank work out for a save and a load on many ranks, without any data: the layout that `shard`
    makes with its default buckets, two states per parameter, weights that all ranks have. In seconds of a processor."""
    shapes, ranks = llama(), args.simulated
    layout = Layout.even([ParamSpec(name, shape, torch.float32, 0) for name, shape in shapes], ranks)
    states = ("grad_avg", "sqr_avg")
    held = [
        [(n, box) for n in range(len(shapes)) for box in layout.boxes(n, rank) if box.numel] for rank in range(ranks)
    ]
    start = time.process_time()
    weights = share_out([Whole(model_key(n), s, 4, cut=False) for n, s in shapes], [0] * ranks)
    shared = time.process_time() - start
    expected = {model_key(name): shape for name, shape in shapes}
    expected |= {state_key(name, key): shape for name, shape in shapes for key in states}
    keys = sorted(expected)
    number = {key: i for i, key in enumerate(keys)}
    records, slowest = [], 0.0
    block = block_bytes(sum(3 * 4 * math.prod(shape) for _, shape in shapes))
    for rank in range(ranks):
        empty = torch.empty(0)
        start = time.process_time()
        items = weights[rank] + [(state_key(shapes[n][0], key), box) for n, box in held[rank] for key in states]
        files = []
        for kind in ("model", "s"):
            mine = [(key, box, 4) for key, box in items if key.startswith("model/") == (kind == "model")]
            for part, written in enumerate(pack(mine, PART_BYTES, cut=kind != "model")):
                size = sum(each.nbytes for each in written)
                file = DataFile(
                    f"{kind}-0123abcd-r{rank:05d}-{part:03d}.safetensors",
                    4096 + size,
                    4096,
                    "0" * 16,
                    1,
                    "0" * 16 * -(-size // block),
                )
                stored = [Item(each.key, "F32", expected[each.key], each.box, empty) for each in written]
                files.append(FileRecord(kind, part, file, stored))
        records.append(rank_record(files, number, expected))
        slowest = max(slowest, time.process_time() - start)
    start = time.process_time()
    all_files, tensors = assemble(records, keys, expected)
    opt = OptPart(
        dict(shapes),
        (Group(tuple(n for n, _ in shapes), {"lr": 1e-3}),),
        {n: ParamStates(states, {"step": 1}) for n, _ in shapes},
    )
    library = {"fastopt": "0", "torch": str(torch.__version__)}
    model = ModelPart(tuple(name for name, _ in shapes))
    manifest = Manifest(
        1, "0123abcd", "", ranks, library, block, all_files, tensors, model, opt, None, None, (), (), None
    )
    data = to_bytes(manifest)
    first = time.process_time() - start
    start = time.process_time()
    parsed = from_bytes(data)
    parse = time.process_time() - start
    start = time.process_time()
    uses = []
    for n, box in held[ranks // 2]:
        for key in states:
            for shard_, common in parsed.tensors[state_key(shapes[n][0], key)].shards.meeting(box, 4):
                uses.append(Use(len(uses), shard_.file, shard_.at, shard_.box, common, 4))
    requests = reads(uses, [(file.header, file.bytes) for file in parsed.files], block)
    return {
        "ranks": ranks,
        "parts": sum(len(tensor.shards) for tensor in parsed.tensors.values()),
        "files": len(parsed.files),
        "manifest bytes": len(data),
        "save, each rank (slowest), s": shared + slowest,
        "save, rank 0, s": first,
        "load, parse, s": parse,
        "load, each rank, s": time.process_time() - start,
        "requests of a rank": len(requests),
    }


def fresh_folder(args: argparse.Namespace) -> Path:
    """A new empty folder, the same on all ranks."""
    name = [tempfile.mkdtemp(dir=args.folder) if dist.get_rank() == 0 else ""]
    dist.broadcast_object_list(name)
    return Path(name[0])


def remove_folder(place: Path) -> None:
    """Remove it, when all ranks are done with it."""
    dist.barrier()
    if dist.get_rank() == 0:
        shutil.rmtree(place)
        os.sync()
    dist.barrier()


def rank_main(rank: int, args: argparse.Namespace, store: str, queue: Any) -> None:
    """One rank of the benchmark."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda":
        torch.cuda.set_device(rank % torch.cuda.device_count())
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=args.ranks)
    rows: dict[str, Any] = {}
    for name, run in {"rounds": rounds, "stall": stall, "reshard": reshard}.items():
        if args.only in ("", name):
            run(args, rows)
    if rank == 0:
        queue.put(rows)
    dist.destroy_process_group()


def main() -> None:
    """Run everything, print it, write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", default=None, help="where the files go [the system's temporary folder]")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--simulated", type=int, default=1024, help="ranks of the plan that is made without data")
    parser.add_argument("--threads", type=int, default=1, help="CPU threads per rank")
    parser.add_argument("--scale", type=float, default=1.0, help="width of the model")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--only", default="", choices=("", "rounds", "stall", "reshard", "plan"))
    parser.add_argument("--out", type=Path, default=None)
    args = parser.parse_args()
    result: dict[str, Any] = {"python": platform.python_version(), "torch": torch.__version__, "cores": os.cpu_count()}
    result |= {"ranks": args.ranks, "rounds": args.rounds, "scale": args.scale, "device": args.device}
    if args.only in ("", "plan"):
        result["plan"] = plan(args)
    if args.only != "plan":
        context = mp.get_context("spawn")
        queue = context.Queue()
        with tempfile.TemporaryDirectory() as folder:
            processes = [
                context.Process(target=rank_main, args=(rank, args, f"{folder}/store", queue))
                for rank in range(args.ranks)
            ]
            for process in processes:
                process.start()
            result |= queue.get(timeout=3600)
            for process in processes:
                process.join()
    print(json.dumps(result, indent=2))
    if args.out:
        args.out.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
