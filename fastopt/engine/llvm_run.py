"""The executor `llvm`: each pass is one compiled loop over a table of addresses, on all cores of a CPU."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .blocks import run_all
from .llvm_compile import Code
from .llvm_lanes import supported
from .llvm_source import CHUNK, TABLES, Layout, source_of
from .plan import Cohort
from .program import Phase, Program
from .work import Reduce
from .workers import share_out

#: Chunks per piece of work that a thread takes at a time, unless there is too little to do for all threads.
_PIECE = 32


@lru_cache(maxsize=256)
def can_run(program: Program) -> bool:
    """Whether a program can be compiled: its operations are exact, its dtypes known."""
    return supported(program.nodes)


def run_llvm(cohorts: Sequence[Cohort], reduce: Reduce | None = None) -> None:
    """Step all parameters of the cohorts in place. The arguments are those of `run_blocks`."""
    run_all([LoopRun(cohort) for cohort in cohorts], reduce)


class Loops:
    """The compiled functions of one program."""

    def __init__(self, program: Program) -> None:
        self.layout = Layout(program)
        phases = list(enumerate(program.phases))
        scalars = [f"scalars_{k}" for k, phase in phases if phase.scalars or phase.scalar_stores]
        sweeps = [f"sweep_{k}" for k, phase in phases if self.layout.sweeps(phase)]
        self.code = Code(source_of(self.layout), [*scalars, *sweeps])  # must outlive its functions
        self.functions = self.code.functions


@lru_cache(maxsize=256)
def loops_of(program: Program) -> Loops:
    """The compiled functions of `program`."""
    return Loops(program)


class _Cut:
    """How the tensors of a cohort are cut into chunks, kept from step to step."""

    def __init__(self, cohort: Cohort) -> None:
        n = len(cohort.params)
        self.sizes = np.fromiter((p.numel() for p in cohort.params), np.int64, n)
        chunks = -(-self.sizes // CHUNK)
        self.first = np.cumsum(chunks) - chunks
        self.tensors = np.repeat(np.arange(n, dtype=np.int64), chunks)
        self.starts = (np.arange(len(self.tensors), dtype=np.int64) - self.first[self.tensors]) * CHUNK
        self.rows = np.array(cohort.row_index, np.int64)
        self.full = np.flatnonzero(chunks)
        self.gaps = [i for i in range(n) if not cohort.is_flat(i)]


class LoopRun:
    """One step of a cohort."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort, self.program, self.phases = cohort, cohort.program, cohort.program.phases
        cohort.make_fresh()
        if not isinstance(cohort.kept, _Cut):
            cohort.kept = _Cut(cohort)
        self.cut: _Cut = cohort.kept
        self.loops = loops_of(self.program)
        layout, n = self.loops.layout, len(cohort.params)
        self.copies = {place: self._copies(place) for place in layout.places if self.cut.gaps and cohort.is_whole(place)}
        slots = np.array([tuple(row) for row in cohort.rows], np.float64).reshape(len(cohort.rows), -1)
        partials = max(len(layout.counted(phase)) for phase in self.phases)
        self.arrays: dict[str, NDArray[Any]] = {
            "addresses": np.array([self._addresses(place) for place in layout.places], np.int64),
            "sizes": self.cut.sizes,
            "rows": self.cut.rows,
            "tensors": self.cut.tensors,
            "starts": self.cut.starts,
            "slots": slots,
            "values": np.empty((len(layout.values), n)),
            "partials": np.empty((partials, len(self.cut.tensors))),
        }
        words = [self.arrays[name].ctypes.data for name in TABLES if name in self.arrays]
        self.tables = np.array([*words, n, len(self.cut.tensors)], np.int64)

    def _addresses(self, place: str) -> list[int]:
        known = self.cohort.addresses.get(place)
        found = known or list(map(Tensor.data_ptr, self.cohort.tensors(place)))
        if place in self.copies:
            found = list(found)
            for i, copy in self.copies[place].items():
                found[i] = copy.data_ptr()
        return found

    def _copies(self, place: str) -> dict[int, Tensor]:
        """Tensors without gaps in place of those of parameters whose tensors are not laid out alike."""
        return {i: self.cohort.tensor(i, place).clone(memory_format=torch.contiguous_format) for i in self.cut.gaps}

    def pass_over(self, k: int) -> Tensor | None:
        """Make pass `k` over all parameters. Returns the partial reductions `[n_reductions * n_params]`, if any."""
        if k >= len(self.phases):
            return None
        functions, at = self.loops.functions, self.tables.ctypes.data
        if f"scalars_{k}" in functions:
            functions[f"scalars_{k}"](0, len(self.cohort.params), at)
        n, sweep = len(self.cut.tensors), functions.get(f"sweep_{k}")
        if sweep is not None and n:
            threads = torch.get_num_threads()
            pieces = -(-n // _PIECE)
            share_out(lambda i: sweep(i * n // pieces, (i + 1) * n // pieces, at), pieces, threads)
        if k == len(self.phases) - 1:
            self._copy_back()
        return self._sums(self.phases[k])

    def _copy_back(self) -> None:
        for out in self.program.outputs:
            for i, copy in self.copies.get(out.place, {}).items():
                self.cohort.tensor(i, out.place).copy_(copy)

    def _sums(self, phase: Phase) -> Tensor | None:
        """The partial results of all chunks of each parameter together."""
        if not phase.reductions:
            return None
        sums = np.zeros((len(phase.reductions), len(self.cohort.params)))
        counted = self.loops.layout.counted(phase)
        for row, i in zip(sums, phase.reductions, strict=True):
            op = self.program.nodes[i].op
            if op == "count":
                row[:] = self.cut.sizes
            elif len(self.cut.full):
                add = {"amax": np.maximum, "amin": np.minimum}.get(op, np.add)
                row[self.cut.full] = add.reduceat(self.arrays["partials"][counted.index(i)], self.cut.first[self.cut.full])
        return torch.from_numpy(sums.reshape(-1))

    def take_totals(self, k: int, totals: Tensor) -> None:
        """Take the totals of the reductions of pass `k`, in the order in which `pass_over` gave the partial ones."""
        rows = [self.loops.layout.values[i] for i in self.phases[k].reductions]
        self.arrays["values"][rows] = totals.numpy().reshape(len(rows), -1)
