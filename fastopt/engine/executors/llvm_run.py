"""The executor `llvm`: each pass is one compiled loop over a table of addresses, on all cores of a CPU."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cohorts.plan import Cohort
from ..recording.program import Program
from ..work import Reduce
from .blocks import run_all
from .llvm_compile import Code
from .llvm_lanes import supported
from .llvm_source import CHUNK, TABLES, Layout, source_of
from .workers import share_out

#: Least and most chunks of a piece of work, which a thread takes at a time.
_PIECE = 8, 64
#: Chunks of the largest tensor of which a thread makes all passes before the next one: two million elements.
_SMALL = 256

_Range = tuple[int, int]


@lru_cache(maxsize=256)
def can_run(program: Program) -> bool:
    """Whether a program can be compiled: its operations are exact, its dtypes known."""
    return supported(program.nodes)


def run_llvm(cohorts: Sequence[Cohort], reduce: Reduce | None = None) -> None:
    """Step all parameters of the cohorts in place. The arguments are those of `run_blocks`."""
    if reduce is not None:
        run_all([LoopRun(cohort) for cohort in cohorts], reduce)
        return
    for cohort in cohorts:
        LoopRun(cohort).run()
    for cohort in cohorts:
        cohort.store()


class Loops:
    """The compiled functions of one program."""

    def __init__(self, program: Program) -> None:
        self.layout = Layout(program)
        self.code = Code(*source_of(self.layout))  # must outlive its functions
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
        self.chunks = np.concatenate([[0], np.cumsum(chunks)]).astype(np.int64)
        self.tensors = np.repeat(np.arange(n, dtype=np.int64), chunks)
        self.starts = (np.arange(len(self.tensors), dtype=np.int64) - self.chunks[self.tensors]) * CHUNK
        self.rows = np.array(cohort.row_index, np.int64)
        self.gaps = [i for i in range(n) if not cohort.is_flat(i)]
        self._ranges: dict[int, tuple[list[_Range], list[_Range]]] = {}

    def threads(self) -> int:
        """How many threads to use: as many as torch does, but one where the others would come too late to help."""
        return torch.get_num_threads() if len(self.tensors) > _PIECE[0] else 1

    def piece(self) -> int:
        """Chunks per piece of work: few enough for all threads to finish together."""
        return max(_PIECE[0], min(_PIECE[1], len(self.tensors) // (8 * self.threads())))

    def ranges(self, threads: int) -> tuple[list[_Range], list[_Range]]:
        """Ranges of tensors that a thread steps one by one, and of tensors that are too large for that."""
        if threads not in self._ranges:
            limit = min(_SMALL, max(1, len(self.tensors) // (4 * threads)))
            chunks = np.diff(self.chunks).tolist()
            found: list[list[list[int]]] = [[], []]
            for t, n in enumerate(chunks):
                ranges = found[n > limit]
                if not ranges or ranges[-1][1] != t or (n <= limit and ranges[-1][2] + n > limit):
                    ranges.append([t, t, 0])
                ranges[-1][1] = t + 1
                ranges[-1][2] += n
            found[0].sort(key=lambda x: -x[2])  # the last pieces of work are small ones
            small, large = ([(first, last) for first, last, _ in ranges] for ranges in found)
            self._ranges[threads] = small, large
        return self._ranges[threads]


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
        self.copies = {
            place: self._copies(place) for place in layout.places if self.cut.gaps and cohort.is_whole(place)
        }
        slots = np.ascontiguousarray(cohort.scalars())
        partials = max(len(layout.counted(phase)) for phase in self.phases)
        self.arrays: dict[str, NDArray[Any]] = {
            "addresses": self._addresses(layout.places),
            "sizes": self.cut.sizes,
            "rows": self.cut.rows,
            "chunks": self.cut.chunks,
            "tensors": self.cut.tensors,
            "starts": self.cut.starts,
            "slots": slots,
            "values": np.empty((len(layout.values), n)),
            "partials": np.empty((partials, len(self.cut.tensors))),
        }
        words = [self.arrays[name].ctypes.data for name in TABLES if name in self.arrays]
        self.tables = np.array([*words, n, slots.shape[1], len(self.cut.tensors)], np.int64)

    def _addresses(self, places: Sequence[str]) -> NDArray[np.int64]:
        """Where the tensors lie `[n_places, n_params]`."""
        table = np.empty((len(places), len(self.cohort.params)), np.int64)
        for row, place in zip(table, places, strict=True):
            row[:] = self.cohort.addresses(place)
            for i, copy in self.copies.get(place, {}).items():
                row[i] = copy.data_ptr()
        return table

    def _copies(self, place: str) -> dict[int, Tensor]:
        """Tensors without gaps in place of those of parameters whose tensors are not laid out alike."""
        return {i: self.cohort.tensor(i, place).clone(memory_format=torch.contiguous_format) for i in self.cut.gaps}

    def run(self) -> None:
        """Make all passes: over small tensors one tensor at a time, while it is in the cache, else pass by pass."""
        if len(self.phases) == 1:
            self._pass(0, 0, len(self.cohort.params))
        else:
            threads = self.cut.threads()
            small, large = self.cut.ranges(threads)
            whole, at = self.loops.functions["whole"], self.tables.ctypes.data
            share_out(lambda i: whole(*small[i], at), len(small), threads)
            for first, last in large:
                for k in range(len(self.phases)):
                    self._pass(k, first, last)
        self._copy_back()

    def pass_over(self, k: int) -> Tensor | None:
        """Make pass `k` over all parameters. Returns the partial reductions `[n_reductions * n_params]`, if any."""
        if k >= len(self.phases):
            return None
        self._pass(k, 0, len(self.cohort.params))
        if k == len(self.phases) - 1:
            self._copy_back()
        rows = self._reductions(k)
        return torch.from_numpy(self.arrays["values"][rows].reshape(-1)) if rows else None

    def take_totals(self, k: int, totals: Tensor) -> None:
        """Take the totals of the reductions of pass `k`, in the order in which `pass_over` gave the partial ones."""
        rows = self._reductions(k)
        self.arrays["values"][rows] = totals.numpy().reshape(len(rows), -1)

    def _reductions(self, k: int) -> list[int]:
        """The rows of the table of scalars per parameter that pass `k` fills."""
        return [self.loops.layout.values[i] for i in self.phases[k].reductions]

    def _pass(self, k: int, first: int, last: int) -> None:
        """Pass `k` over the parameters from `first` to `last`, with the scalars before it and the totals after it."""
        functions, at = self.loops.functions, self.tables.ctypes.data
        if f"scalars_{k}" in functions:
            functions[f"scalars_{k}"](first, last, at)
        if f"sweep_{k}" in functions:
            sweep, start, end = functions[f"sweep_{k}"], *map(int, self.cut.chunks[[first, last]])
            piece = self.cut.piece()
            starts = range(start, end, piece)
            share_out(lambda i: sweep(starts[i], min(starts[i] + piece, end), at), len(starts), self.cut.threads())
        if f"totals_{k}" in functions:
            functions[f"totals_{k}"](first, last, at)

    def _copy_back(self) -> None:
        for out in self.program.outputs:
            for i, copy in self.copies.get(out.place, {}).items():
                self.cohort.tensor(i, out.place).copy_(copy)
