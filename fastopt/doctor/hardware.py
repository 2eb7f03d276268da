"""Processors, GPUs, the compiler, and the backends of torch.distributed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.distributed as dist

from ..engine.cohorts.native import compiler, status
from ..machine import cpu_name, cpus
from .findings import Finding


def hardware() -> Iterator[Finding]:
    """What steps and ranks run on."""
    yield Finding("hardware", "cpu", "ok", f"{cpu_name()}, {cpus()} processors, {torch.get_num_threads()} threads")
    for index in range(torch.cuda.device_count()):
        found = torch.cuda.get_device_properties(index)
        text = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, compute capability {found.major}.{found.minor}"
        yield Finding("hardware", f"cuda:{index}", "ok", text)
    found_compiler = compiler()
    text = found_compiler or "none found; it would make steps with many small parameters faster on the host"
    yield Finding("hardware", "c++ compiler", "ok" if found_compiler else "note", text)
    there, text = status()
    yield Finding("hardware", "address look-up", "ok" if there else "note", text)
    yield _backends()


def _backends() -> Finding:
    if not dist.is_available():
        return Finding("hardware", "backends", "broken", "this torch is built without torch.distributed")
    there = {
        "gloo": dist.is_gloo_available(),
        "nccl": dist.is_nccl_available(),
        "mpi": dist.is_mpi_available(),
        "ucc": dist.is_ucc_available(),
    }
    return Finding("hardware", "backends", "ok", ", ".join(name for name, has in there.items() if has) or "none")
