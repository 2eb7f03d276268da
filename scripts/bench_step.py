"""How long one optimizer step takes, beside torch's own optimizers and beside the least time that the memory allows.

    python scripts/bench_step.py [--device cuda|cpu] [--models llama-1.3b,small-1000] [--rounds 15] [--out FILE.json]

Prints one table and writes it as JSON. Every competitor of a row steps the same parameters and gradients, in turns
within each round; the times are medians over the rounds. `floor` is the number of bytes that the program reads and
writes, divided by the bandwidth of a copy measured in the same run; torch is given the floor of the same rule.
"""

from __future__ import annotations

import argparse
import gc
import importlib
import json
import math
import platform
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parent.parent))  # this checkout, whatever is installed

from fastopt import SGD, Adam, Lamb, Larc, Optimizer, RAdam, average_grad, ranger, weight_decay

Shape = tuple[int, ...]


def llama() -> list[Shape]:
    """A LLaMA-like model of 1.36 billion parameters in 219 tensors."""
    d, hidden, layers, words = 2048, 5632, 24, 32000
    layer = [(d, d)] * 4 + [(hidden, d), (hidden, d), (d, hidden), (d,), (d,)]
    return [(words, d), *layer * layers, (d,), (words, d)]


def resnet50() -> list[Shape]:
    """ResNet-50: 25.6 million parameters in 161 tensors."""
    shapes: list[Shape] = [(64, 3, 7, 7), (64,), (64,)]
    width = 64
    for out, blocks in ((256, 3), (512, 4), (1024, 6), (2048, 3)):
        inner = out // 4
        for i in range(blocks):
            for conv in ((inner, width, 1, 1), (inner, inner, 3, 3), (out, inner, 1, 1)):
                shapes += [conv, (conv[0],), (conv[0],)]
            if i == 0:
                shapes += [(out, width, 1, 1), (out,), (out,)]
            width = out
    return [*shapes, (1000, 2048), (1000,)]


def vit_b() -> list[Shape]:
    """ViT-B/16: 86.6 million parameters in 152 tensors."""
    d = 768
    layer: list[Shape] = [
        (d,),
        (d,),
        (3 * d, d),
        (3 * d,),
        (d, d),
        (d,),
        (d,),
        (d,),
        (4 * d, d),
        (4 * d,),
        (d, 4 * d),
        (d,),
    ]
    return [(1, 1, d), (1, 197, d), (d, 3, 16, 16), (d,), *layer * 12, (d,), (d,), (1000, d), (1000,)]


def small() -> list[Shape]:
    """1000 small tensors, 2.3 million elements."""
    return [(64, 64 if i % 2 else 8) for i in range(1000)]


def mixed() -> list[Shape]:
    """10,000 tensors of 1 to 65,536 elements."""
    g = torch.Generator().manual_seed(0)
    return [(int(2 ** (16 * float(torch.rand((), generator=g)))),) for _ in range(10_000)]


def mlp() -> list[Shape]:
    """23 million parameters in 38 tensors."""
    return [(1024, 1184), (1024,)] * 18 + [(1024, 1184), (1000,)]


MODELS: dict[str, Callable[[], list[Shape]]] = {
    "llama-1.3b": llama,
    "resnet-50": resnet50,
    "vit-b": vit_b,
    "small-1000": small,
    "mixed-10000": mixed,
    "mlp-23m": mlp,
}


def sign_step(p: Tensor, lr: float, grad_avg: Tensor, **kwargs: Any) -> None:
    """What a user writes: sign momentum."""
    p.data.add_(torch.sign(grad_avg), alpha=-lr)


def user_chain(params: Any, lr: Any = 1e-3, engine: str | None = None) -> Optimizer:
    """Sign momentum with decoupled decay."""
    return Optimizer(params, (weight_decay, average_grad, sign_step), engine=engine, lr=lr, mom=0.9, wd=0.01)


def sgd(params: Any, lr: Any = 1e-3, engine: str | None = None) -> Optimizer:
    """SGD with momentum."""
    return SGD(params, lr=lr, mom=0.9, engine=engine)


OURS: dict[str, Callable[..., Optimizer]] = {
    "Adam": Adam, "SGD": sgd, "RAdam": RAdam, "Lamb": Lamb, "Larc": Larc, "ranger": ranger, "user": user_chain,
}  # fmt: skip


def _torch_adam(kind: str) -> Callable[[Any, float], Any]:
    return lambda ps, lr: torch.optim.AdamW(ps, lr=lr, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.01, **{kind: True})


def _torch_sgd(kind: str) -> Callable[[Any, float], Any]:
    return lambda ps, lr: torch.optim.SGD(ps, lr=lr, momentum=0.9, **{kind: True})


def _made_with(kind: Callable[..., Any], params: Any, lr: float) -> Any:
    return kind(params, lr=lr)


def peers(rule: str) -> dict[str, Callable[[Any, float], Any]]:
    """The optimizers of others with the same rule, those of packages that are not installed left out."""
    found: dict[str, Callable[[Any, float], Any]] = {}
    if rule in ("Adam", "SGD"):
        make = _torch_adam if rule == "Adam" else _torch_sgd
        found = {"torch fused": make("fused"), "torch foreach": make("foreach")}
    if rule == "RAdam":
        found = {
            "torch foreach": lambda ps, lr: torch.optim.RAdam(ps, lr=lr, betas=(0.9, 0.99), eps=1e-5, foreach=True)
        }
    for package, names in (
        ("heavyball", {"Adam": "ForeachAdamW"}),
        ("pytorch_optimizer", {"Lamb": "Lamb", "ranger": "Ranger"}),
    ):
        if rule in names and importlib.util.find_spec(package):
            kind = getattr(importlib.import_module(package), names[rule])
            found[package] = partial(_made_with, kind)
    return found


@dataclass
class Row:
    """One competitor on one model. Times in milliseconds."""

    model: str
    groups: int
    rule: str
    who: str
    step_ms: float
    host_us: float
    first_ms: float
    floor_ms: float
    share: float
    against_fused: float | None = None
    engine: str = ""


@dataclass
class Result:
    """A run of the benchmark."""

    device: str
    versions: dict[str, str]
    copy_gb_per_s: float
    threads: int
    rows: list[Row] = field(default_factory=list)


class Clock:
    """Waits for the device, where there is one to wait for."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"

    def now(self) -> float:
        if self.cuda:
            torch.cuda.synchronize()
        return time.perf_counter()

    def steps(self, step: Callable[[], Any], n: int) -> tuple[float, float]:
        """Milliseconds per step and host microseconds per step of `n` steps in a row."""
        start = self.now()
        for _ in range(n):
            step()
        queued = time.perf_counter()
        return (self.now() - start) / n * 1e3, (queued - start) / n * 1e6


def copy_bandwidth(device: str, clock: Clock) -> float:
    """GB/s that a copy reads and writes."""
    a = torch.ones(1 << (29 if device == "cuda" else 25), device=device)
    b = torch.empty_like(a)
    times = [clock.steps(lambda: b.copy_(a), 5)[0] for _ in range(8)]
    return 2 * a.numel() * 4 / statistics.median(times[2:]) / 1e6


def split(tensors: Sequence[Tensor], n_groups: int) -> list[list[Tensor]]:
    """The tensors in `n_groups` groups of neighbours."""
    size = math.ceil(len(tensors) / n_groups)
    return [list(tensors[i : i + size]) for i in range(0, len(tensors), size)]


def measure(
    model: str, n_groups: int, rule: str, result: Result, clock: Clock, rounds: int, device: str, loop: bool
) -> Iterator[Row]:
    """All competitors of one rule on one model."""
    tensors = [torch.nn.Parameter(torch.randn(s, device=device) * 0.02) for s in MODELS[model]()]
    for p in tensors:
        p.grad = torch.randn_like(p)
    n = sum(p.numel() for p in tensors)
    groups = split(tensors, n_groups)
    lr = [1e-6 * (1 + i) for i in range(len(groups))]
    ours = OURS[rule](groups, lr=lr)
    competitors: dict[str, Any] = {"fastopt": ours}
    if n_groups == 1:
        competitors |= {name: make(tensors, 1e-6) for name, make in peers(rule).items()}
        if loop:
            competitors["loop"] = OURS[rule](groups, lr=lr)
            competitors["loop"]._engine = "eager"
    first = {}
    for name, opt in competitors.items():
        start = clock.now()
        opt.step()
        first[name] = (clock.now() - start) * 1e3
        for _ in range(7):  # all structures of Lookahead's cycle
            opt.step()
    calls = max(3, min(12, int(2e8 / n)))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in competitors}
    for _ in range(rounds):
        for name, opt in competitors.items():
            times[name].append(clock.steps(opt.step, calls if name != "loop" else 2))
    medians = {name: [statistics.median(x) for x in zip(*pairs, strict=True)] for name, pairs in times.items()}
    floor = sum(ours.program()[-1].bytes_per_element()) * n / result.copy_gb_per_s / 1e6
    for name, (step_ms, host_us) in medians.items():
        row = Row(model, len(groups), rule, name, step_ms, host_us, first[name], floor, floor / step_ms)
        if "torch fused" in medians:
            row.against_fused = medians["torch fused"][0] / step_ms
        if isinstance(competitors[name], Optimizer):
            row.engine = competitors[name].engine[0].executor
        yield row


def plan(models: Sequence[str], device: str) -> Iterator[tuple[str, int, str]]:
    """What to measure: (model, groups, rule)."""
    for model in models:
        rules = [r for r in OURS if model != "mixed-10000" or r in ("Adam", "Lamb")]
        yield from ((model, 1, rule) for rule in rules)
        if model in ("llama-1.3b", "small-1000", "mixed-10000"):
            yield from ((model, n, "Adam") for n in (10, 500))


def show(result: Result) -> str:
    """The table."""
    lines = [
        f"{result.device}, {', '.join(f'{k} {v}' for k, v in result.versions.items())}, {result.threads} threads; "
        f"copy {result.copy_gb_per_s:.0f} GB/s",
        "",
        "| model | groups | rule | who | ms/step | host us | floor ms | of floor | x torch fused | first step ms |",
        "| --- | ---: | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for r in result.rows:
        times_fused = "" if r.against_fused is None else f"{r.against_fused:.2f}"
        who = f"{r.who} ({r.engine})" if r.engine else r.who
        lines.append(
            f"| {r.model} | {r.groups} | {r.rule} | {who} | {r.step_ms:.3f} | {r.host_us:.0f} | {r.floor_ms:.3f} | "
            f"{r.share:.2f} | {times_fused} | {r.first_ms:.0f} |"
        )
    return "\n".join(lines)


def versions() -> dict[str, str]:
    """Of everything that matters here."""
    found = {"python": platform.python_version(), "torch": torch.__version__}
    for package in ("triton", "numba"):
        if importlib.util.find_spec(package):
            found[package] = importlib.import_module(package).__version__
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cuda", "cpu"])
    parser.add_argument("--models", help="comma-separated, of: " + ", ".join(MODELS))
    parser.add_argument("--rules", default=",".join(OURS), help="comma-separated, of: " + ", ".join(OURS))
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--loop", action="store_true", help="also measure the callbacks as they are, one by one")
    parser.add_argument("--out", type=Path, help="where to write the JSON")
    args = parser.parse_args()
    default = "llama-1.3b,resnet-50,vit-b,small-1000,mixed-10000" if args.device == "cuda" else "mlp-23m,small-1000"
    models = (args.models or default).split(",")
    clock = Clock(args.device)
    name = torch.cuda.get_device_name() if args.device == "cuda" else platform.processor() or platform.machine()
    result = Result(name, versions(), copy_bandwidth(args.device, clock), torch.get_num_threads())
    for model, n_groups, rule in plan(models, args.device):
        if rule in args.rules.split(","):
            loop = args.loop and model != "llama-1.3b"
            rows = list(measure(model, n_groups, rule, result, clock, args.rounds, args.device, loop))
            result.rows += rows
            print("\n".join(show(result).splitlines()[-len(rows) :]), flush=True)
            gc.collect()  # optimizers are in cycles, and these hold gigabytes
            if args.device == "cuda":
                torch.cuda.empty_cache()
    print(show(result))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        args.out.write_text(json.dumps(asdict(result), indent=1) + "\n")


if __name__ == "__main__":
    main()
