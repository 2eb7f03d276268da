"""Compiled loops touch nothing beside their tensors: these lie against pages that may not be read or written.

An access out of bounds ends the process with a segmentation fault.
"""

from __future__ import annotations

import ctypes
import math
import mmap
import sys
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastopt import Adam, Lamb, Optimizer, average_grad, weight_decay
from fastopt.engine.cohorts import plan
from fastopt.engine.executors import llvm_run
from fastopt.engine.executors.llvm_source import CHUNK, TABLES

pytest.importorskip("llvmlite")
pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="there is no mprotect")

NO_ACCESS, ALL_ACCESS = 0, 3
SIZES = [(), 0, 1, 2, 3, 7, 15, 16, 17, 31, (3, 11), 1000, 4095, CHUNK - 1, CHUNK, CHUNK + 17, 2 * CHUNK + 1]


class Guarded:
    """Hands out memory that ends, or begins, `shift` bytes from a page without access."""

    def __init__(self, at_end: bool, shift: int) -> None:
        self.at_end, self.shift = at_end, shift
        self._protect = ctypes.CDLL(None, use_errno=True).mprotect
        self._protect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
        self._maps: list[tuple[mmap.mmap, int]] = []

    def memory(self, size: int) -> Any:
        """A buffer of `size` bytes."""
        page = mmap.PAGESIZE
        inner = -(-(size + self.shift) // page) * page
        pages = mmap.mmap(-1, inner + 2 * page)
        start = ctypes.addressof(ctypes.c_char.from_buffer(pages))
        self._maps.append((pages, start))
        for guard in (start, start + page + inner):
            assert self._protect(guard, page, NO_ACCESS) == 0
        begin = page + inner - self.shift - size if self.at_end else page + self.shift
        return (ctypes.c_char * size).from_buffer(pages, begin)

    def tensor(self, like: Tensor) -> Tensor:
        """A copy of a tensor."""
        if like.numel() == 0:
            return like.detach().clone()
        made = torch.frombuffer(self.memory(like.nbytes), dtype=like.dtype).view(like.shape)
        return made.copy_(like.detach())

    def array(self, like: NDArray[Any]) -> NDArray[Any]:
        """A copy of an array, which is always aligned."""
        if like.size == 0:
            return like
        shift, self.shift = self.shift, 0
        made: NDArray[Any] = np.frombuffer(self.memory(like.nbytes), like.dtype).reshape(like.shape)
        self.shift = shift
        made[...] = like
        return made

    def open(self) -> None:
        """Allow access to all pages, before they are given back."""
        for pages, start in self._maps:
            assert self._protect(start, len(pages), ALL_ACCESS) == 0


@pytest.fixture(params=[("end", 0), ("begin", 2)], ids=str)
def guarded(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Guarded]:
    """Guarded memory, also for what the engine makes: new states and its tables."""
    found = Guarded(request.param[0] == "end", request.param[1])
    new, prepare = plan._new, llvm_run.LoopRun.__init__

    def guarded_tables(self: Any, cohort: plan.Cohort) -> None:
        prepare(self, cohort)
        self.arrays = {name: found.array(array) for name, array in self.arrays.items()}
        words = [self.arrays[name].ctypes.data for name in TABLES if name in self.arrays]
        self.tables = found.array(np.array([*words, *self.tables[len(words) :]], np.int64))

    monkeypatch.setattr(plan, "_new", lambda *args: found.tensor(new(*args)))
    monkeypatch.setattr(llvm_run.LoopRun, "__init__", guarded_tables)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    yield found
    torch.set_num_threads(threads)
    found.open()


def uneven_step(p: Any, lr: float, grad_avg: Tensor, seen: Tensor | None = None, **kwargs: Any) -> Any:
    """With a state of bools, norms, a mean and a choice for each element."""
    grad = p.grad
    seen = torch.zeros_like(grad, dtype=torch.bool) if seen is None else seen
    seen.logical_or_(grad > grad.mean())
    p.data.sub_(torch.where(seen, grad_avg, grad) * (lr / (grad.norm() + grad.abs().max() + 1)))
    return {"seen": seen}


BUILD: dict[str, Any] = {
    "Adam": lambda ps: Adam(ps, engine="llvm"),
    "Lamb with masters": lambda ps: Lamb(ps, wd=0.1, master_weights=True, engine="llvm"),
    "a chain": lambda ps: Optimizer(ps, [weight_decay, average_grad, uneven_step], lr=0.1, wd=0.1, engine="llvm"),
}


@pytest.mark.parametrize("name", BUILD)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
def test_nothing_beside_the_tensors_is_touched(guarded: Guarded, name: str, dtype: torch.dtype) -> None:
    shapes = [(size,) if isinstance(size, int) else size for size in SIZES]
    ps = [guarded.tensor(torch.linspace(-1, 1, math.prod(shape), dtype=dtype).view(shape)) for shape in shapes]
    opt = BUILD[name](ps)
    for _ in range(2):
        for p in ps:
            p.grad = guarded.tensor(torch.full_like(p, 0.5))
        opt.step()
    assert {choice.executor for choice in opt.engine} == {"llvm"}
    assert all(p.isfinite().all() for p in ps)
