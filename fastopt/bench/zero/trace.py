"""What a profiler's trace says: bytes on the wire, time of kernels by kind, and how much communication was hidden."""

from __future__ import annotations

import json
import re
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.profiler import ProfilerActivity, profile

Event = Mapping[str, Any]
Span = tuple[float, float]

#: The operations that all collectives go through: which argument is the whole buffer, and how often (N-1)/N of its
#: bytes leave each rank, on average over the ranks, when no byte is sent that need not be.
_COLLECTIVES = {
    "c10d::allreduce_": (0, 2),
    "c10d::allreduce_coalesced_": (0, 2),
    "c10d::broadcast_": (0, 1),
    "c10d::reduce_": (0, 1),
    "c10d::_reduce_scatter_base_": (1, 1),
    "c10d::reduce_scatter_tensor_coalesced_": (1, 1),
    "c10d::reduce_scatter_": (1, 1),
    "c10d::_allgather_base_": (0, 1),
    "c10d::allgather_into_tensor_coalesced_": (0, 1),
    "c10d::allgather_": (0, 1),
    "c10d::alltoall_base_": (1, 1),
    "c10d::alltoall_": (1, 1),
}
#: By the names of C++ and by those of torch.
_ITEM_BYTES = {
    "double": 8, "long": 8, "long int": 8, "float": 4, "int": 4, "c10::BFloat16": 2, "c10::Half": 2,
    "unsigned char": 1, "signed char": 1, "bool": 1,
    "Double": 8, "Long": 8, "Float": 4, "Int": 4, "BFloat16": 2, "Half": 2, "Byte": 1, "Char": 1, "Bool": 1,
}  # fmt: skip

#: Kinds of kernels, the first that matches. Kernels of fastopt's programs are called pass_k and stage_k.
_KINDS = (
    ("nccl", re.compile("nccl", re.IGNORECASE)),
    ("copy", re.compile("memcpy|memset", re.IGNORECASE)),
    ("attention", re.compile("flash|fmha|attention", re.IGNORECASE)),
    ("matmul", re.compile("gemm|nvjet|cutlass|cublas", re.IGNORECASE)),
    ("step", re.compile(r"^(pass|stage)_\d|adam", re.IGNORECASE)),
    ("foreach", re.compile("multi_tensor", re.IGNORECASE)),
)
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass
class Wire:
    """Bytes that leave a rank, on average over the ranks, and the number of collectives, of one iteration.

    The bytes are None where the trace does not tell the dtype of a collective.
    """

    sent: float | None
    collectives: int


@dataclass
class Kernels:
    """Of one iteration on one device, in ms: time of kernels by kind, with and without any kernel running, and the
    share of the time of communication kernels in which another kernel runs as well."""

    by_kind: dict[str, float]
    busy_ms: float
    idle_ms: float
    hidden: float


def record(iterate: Callable[[], Any], iterations: int = 1, device: bool = False) -> list[Event]:
    """The events of `iterations` calls; those on the device too if asked for."""
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if device else [])]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        with profile(activities=activities, record_shapes=not device) as profiler:
            for _ in range(iterations):
                iterate()
            _finish()
        profiler.export_chrome_trace(str(path))
        return events_in(path)


def _finish() -> None:
    """Wait for all that is under way: a collective of Gloo that ends after the profiler has stopped crashes."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        torch.cuda.synchronize()
    if dist.is_initialized():
        dist.barrier()
        time.sleep(0.05)  # for the threads of Gloo to tell the profiler


def events_in(path: Path) -> list[Event]:
    """The events of a trace file."""
    found: list[Event] = json.loads(path.read_text(errors="replace"))["traceEvents"]
    return found


def wire(events: Iterable[Event], world_size: int) -> Wire:
    """What the collectives in `events` send.

    Lists of tensors come without a dtype: it is that of the backend's own event of as many elements, if there is one.
    """
    events = [event for event in events if event.get("args")]
    item_bytes = _item_bytes(events)
    sent, collectives = 0.0, 0
    known = True
    for event in events:
        if event["name"] in _COLLECTIVES:
            argument, times = _COLLECTIVES[event["name"]]
            dims, kind = event["args"]["Input Dims"][argument], event["args"]["Input type"][argument]
            for each in _tensors(dims):
                size = _ITEM_BYTES.get(kind) or item_bytes.get(_product(each), 0)
                known = known and (size > 0 or _product(each) == 0)
                sent += times * _product(each) * size * (world_size - 1) / world_size
            collectives += 1
    return Wire(sent if known else None, collectives)


def _item_bytes(events: Iterable[Event]) -> dict[int, int]:
    """Bytes of an element by the number of elements, as the backends tell: `gloo:...`, `nccl:...` and its messages."""
    found = {}
    for event in events:
        args = event["args"]
        if event["name"].startswith(("nccl:", "gloo:")):
            for dims, kind in zip(args.get("Input Dims", []), args.get("Input type", []), strict=False):
                if kind in _ITEM_BYTES:
                    found[_product(dims)] = _ITEM_BYTES[kind]
        elif "In msg nelems" in args and args.get("dtype") in _ITEM_BYTES:
            found[int(args["In msg nelems"])] = _ITEM_BYTES[args["dtype"]]
    return found


def _tensors(dims: Sequence[Any]) -> list[Sequence[int]]:
    """The shapes in what is one shape, a list of shapes, or a list of lists of shapes."""
    if all(isinstance(n, int) for n in dims) and dims:
        return [dims]
    return [shape for each in dims for shape in (_tensors(each) if each else [[]])]


def _product(shape: Sequence[int]) -> int:
    total = 1
    for n in shape:
        total *= n
    return total


def kernels(events: Iterable[Event], iterations: int) -> Kernels:
    """Time on the device, per iteration."""
    spans: dict[str, list[Span]] = {}
    for event in events:
        if event.get("cat") in _ON_DEVICE and event.get("dur"):
            spans.setdefault(kind_of(event["name"]), []).append((event["ts"], event["ts"] + event["dur"]))
    everything = union(span for each in spans.values() for span in each)
    if not everything:
        return Kernels({}, 0.0, 0.0, 0.0)
    communication = union(spans.get("nccl", []))
    others = union(span for kind, each in spans.items() if kind != "nccl" for span in each)
    busy, waiting = length(everything), length(communication)
    unit = 1e3 * iterations  # a trace is in microseconds
    return Kernels(
        {kind: sum(stop - start for start, stop in each) / unit for kind, each in sorted(spans.items())},
        busy / unit,
        (everything[-1][1] - everything[0][0] - busy) / unit,
        (waiting + length(others) - busy) / waiting if waiting else 0.0,
    )


def kind_of(name: str) -> str:
    """The kind of a kernel by its name."""
    return next((kind for kind, pattern in _KINDS if pattern.search(name)), "other")


def union(spans: Iterable[Span]) -> list[Span]:
    """The spans in order, those that overlap made one."""
    merged: list[Span] = []
    for start, stop in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], stop))
        else:
            merged.append((start, stop))
    return merged


def length(spans: Iterable[Span]) -> float:
    """Of spans that do not overlap."""
    return sum(stop - start for start, stop in spans)
