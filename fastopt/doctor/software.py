"""The versions of everything that matters, and whether what is needed can be imported."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Iterator
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path

import torch

from .. import __version__
from .findings import Finding, sentence

NEEDED = ("torch", "numpy", "fsspec", "safetensors", "xxhash", "click", "rich")
OPTIONAL = {
    "triton": "one kernel per step on CUDA GPUs; it comes with torch's CUDA packages for Linux",
    "llvmlite": "compiled loops for steps on CPUs: pip install fastopt[cpu]",
    "matplotlib": "plots and charts: pip install fastopt[plot]",
}
"""By package, what is missing without it."""


def software() -> Iterator[Finding]:
    """Python, this package, what it needs and what it can use."""
    yield Finding("software", "python", "ok", f"{platform.python_version()}, {platform.platform()}")
    yield Finding("software", "fastopt", "ok", f"{__version__} in {Path(__file__).parents[1]}")
    oldest = oldest_versions()
    for name in NEEDED:
        yield _needed(name, oldest.get(name))
    for name, use in OPTIONAL.items():
        if find_spec(name) is None:
            yield Finding("software", name, "note", f"not installed; it is for {use}")
        else:
            yield _needed(name, oldest.get(name))
    yield from _cuda()


def _needed(name: str, oldest: str | None) -> Finding:
    try:
        import_module(name)
        version = importlib.metadata.version(name)
    except Exception as error:  # a broken package may raise anything
        return Finding("software", name, "broken", f"cannot be imported: {sentence(error)}")
    if oldest is not None and numbers(version) < numbers(oldest):
        return Finding("software", name, "broken", f"{version} is too old, at least {oldest} is needed")
    return Finding("software", name, "ok", version)


def oldest_versions() -> dict[str, str]:
    """The oldest versions that will do, as the installed package says; empty in a checkout that is not installed."""
    try:
        required = importlib.metadata.requires("fastopt") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    found = (re.match(r"([\w-]+)(?:\[.*?\])?>=([\d.]+)", line) for line in required)
    return {match[1]: match[2] for match in found if match}


def numbers(version: str) -> tuple[int, ...]:
    """`2.13.0+cpu` as numbers that can be compared."""
    return tuple(int(part) for part in re.findall(r"\d+", version.split("+")[0]))


def _cuda() -> Iterator[Finding]:
    built_for = torch.version.cuda
    if built_for is None:
        yield Finding("software", "cuda", "note", "this torch is built without CUDA")
    elif not torch.cuda.is_available():
        there = Path("/dev/nvidia0").exists()
        text = f"torch is built for CUDA {built_for} and finds no GPU"
        more = ", though there is one: compare the driver that nvidia-smi shows" if there else ""
        yield Finding("software", "cuda", "broken" if there else "note", text + more)
    else:
        yield Finding("software", "cuda", "ok", built_for)
        nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
        yield Finding("software", "nccl", "ok", nccl)
