"""The executor `numba`: each pass is one compiled loop over a table of addresses, on all cores. Numba is optional."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Sequence
from functools import lru_cache
from importlib import import_module
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .blocks import CohortRun, run_all
from .numba_source import CHUNK, dtype_of, source_of, supported
from .plan import Cohort
from .program import Phase, Program
from .work import Reduce


@lru_cache(maxsize=1)
def numba_is_there() -> bool:
    """Whether Numba is installed. Does not import it."""
    return importlib.util.find_spec("numba") is not None


def can_run(cohort: Cohort) -> bool:
    """Whether a cohort can go through compiled loops: on the CPU, exact operations, tensors without gaps."""
    if isinstance(cohort.kept, _Tables):  # looked at in an earlier step
        return True
    if cohort.params[0].device.type != "cpu" or not supported(cohort.program):
        return False
    cohort.make_fresh()
    return all(map(cohort.is_flat, range(len(cohort.params))))


def run_numba(cohorts: Sequence[Cohort], reduce: Reduce | None = None) -> None:
    """Step all parameters of the cohorts in place. The arguments are those of `run_blocks`."""
    run_all([_LoopRun(cohort) for cohort in cohorts], reduce)


class _Tables:
    """What a cohort keeps from step to step: how its tensors are cut into chunks."""

    def __init__(self, cohort: Cohort) -> None:
        n = len(cohort.params)
        self.sizes = np.fromiter((p.numel() for p in cohort.params), np.int64, n)
        chunks = -(-self.sizes // CHUNK)
        self.first = np.cumsum(chunks) - chunks
        self.tensor = np.repeat(np.arange(n, dtype=np.int64), chunks)
        self.number = np.arange(len(self.tensor), dtype=np.int64) - self.first[self.tensor]
        self.rows = np.array(cohort.row_index, np.int64)
        self.empty = chunks == 0


class _LoopRun(CohortRun):
    """One step of a cohort."""

    def __init__(self, cohort: Cohort) -> None:
        super().__init__(cohort)
        if not isinstance(cohort.kept, _Tables):
            cohort.kept = _Tables(cohort)
        self.tables: _Tables = cohort.kept
        self.loops = _loops_of(self.program)
        real = np.float32 if dtype_of(self.program) == torch.float32 else np.float64
        self.row_scalars = np.ascontiguousarray(cohort.scalars().astype(real))
        self.real = real
        self.addresses = np.stack([cohort.addresses(place) for place in self.loops.places])

    def pass_over(self, k: int) -> list[Tensor]:
        """Make pass `k` over all parameters. Returns the partial reductions, parameter by parameter."""
        if k >= len(self.phases):
            return []
        phase, tables = self.phases[k], self.tables
        n = len(self.cohort.params)
        if phase.scalars or phase.scalar_stores:
            for i in range(n):
                self.scalars_before(k, i)
        wanted = self.loops.scalars
        values = np.zeros((max(len(wanted), 1), n), self.real)
        for r, node in enumerate(wanted):
            if self.scalars[0][node] is not None:
                values[r] = torch.stack([s[node] for s in self.scalars]).numpy()
        partials = np.zeros((max(len(phase.reductions), 1), len(tables.tensor)))
        sweep = self.loops.sweeps[k]
        if len(tables.tensor) and sweep is not None:
            cut = (tables.sizes, tables.rows, tables.tensor, tables.number)
            sweep(self.addresses, *cut, self.row_scalars, values, partials)
        return self._sums(phase, partials)

    def _sums(self, phase: Phase, partials: NDArray[np.float64]) -> list[Tensor]:
        if not phase.reductions:
            return []
        tables, per_node = self.tables, []
        for j, node in enumerate(phase.reductions):
            if self.program.nodes[node].op == "count":
                per_node.append(tables.sizes.astype(np.float64))
                continue
            sums = np.zeros(len(tables.sizes))
            full = np.flatnonzero(~tables.empty)
            if len(full):
                sums[full] = np.add.reduceat(partials[j], tables.first[full])
            per_node.append(sums)
        return list(torch.from_numpy(np.stack(per_node, axis=1).reshape(-1)).unbind())


class _Loops:
    """The compiled loops of one program, one per pass; None where a pass does nothing to elements.

    Attributes:
        places: the rows of the table of addresses.
        scalars: the nodes that are rows of the table of scalars per parameter.
    """

    def __init__(self, program: Program) -> None:
        outs = [out.place for out in program.outputs if out.whole]
        ins = [place for place, i in program.inputs.items() if program.nodes[i].whole]
        self.places = list(dict.fromkeys([*ins, *outs]))
        read = {j for node in program.nodes if node.whole for j in node.values()} | {o.value for o in program.outputs}
        self.scalars = sorted(j for j in read if not program.nodes[j].whole)
        self.sweeps = [self._compile(program, phase) for phase in program.phases]

    def _compile(self, program: Program, phase: Phase) -> Callable[..., None] | None:
        if not phase.stores and not any(program.nodes[i].op != "count" for i in phase.reductions):
            return None
        numba: Any = import_module("numba")  # no type information, and not on every machine
        types, intrinsic = numba.types, import_module("numba.extending").intrinsic
        real = types.float32 if dtype_of(program) == torch.float32 else types.float64

        def pointer(typing: Any, address: Any) -> Any:
            signature = types.CPointer(real)(types.int64)

            def code(context: Any, builder: Any, sig: Any, args: Any) -> Any:
                return builder.inttoptr(args[0], context.get_value_type(sig.return_type))

            return signature, code

        def fma(typing: Any, x: Any, y: Any, z: Any) -> Any:
            return real(real, real, real), lambda context, builder, sig, args: builder.fma(*args)

        number = np.float32 if real is types.float32 else np.float64
        scope: dict[str, Any] = {
            "njit": numba.njit, "prange": numba.prange, "float64": numba.float64, "real": number, "sqrt": math.sqrt,
            "empty": np.empty, "one": number(1), "half": number(0.5), "SIZE": number().itemsize, "CHUNK": CHUNK,
            "pointer": intrinsic(pointer), "fma": intrinsic(fma),
        }  # fmt: skip
        exec(source_of(program, phase, self.places, self.scalars), scope)
        sweep = scope["sweep"]

        def run(*arguments: Any) -> None:
            numba.set_num_threads(min(torch.get_num_threads(), numba.config.NUMBA_NUM_THREADS))
            sweep(*arguments)

        return run


@lru_cache(maxsize=64)
def _loops_of(program: Program) -> _Loops:
    return _Loops(program)
