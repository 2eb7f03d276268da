"""The executor `triton`: one launch per pass for all tensors that step with the same program."""

from __future__ import annotations

import importlib.util
import linecache
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import lru_cache, partial
from hashlib import sha256
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ..cohorts.plan import Cohort
from ..recording.program import Program
from ..work import Reduce
from .blocks import run_blocks
from .triton_source import BLOCK, WARPS, Layout, source_of
from .triton_tables import TABLES, Tables

#: Addresses that are multiples of this are read and written 16 bytes at a time.
ALIGNED = 16


CAPTURE_ANEW = "this step runs other kernels than the captured one: capture it anew"


@lru_cache(maxsize=1)
def triton_is_there() -> bool:
    """Whether Triton is installed. Does not import it."""
    return importlib.util.find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton's interpreter is asked for, which runs kernels on the CPU."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


class Kernels:
    """The kernels of one program, compiled when they are first launched."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self.layout = Layout(program)
        source = source_of(self.layout)
        # Triton reads the source of a kernel through `inspect`, which looks here for what is no file
        name = f"<fastopt kernels {sha256(source.encode()).hexdigest()[:16]}>"
        linecache.cache[name] = (len(source), None, source.splitlines(keepends=True), name)
        self.functions: dict[str, Any] = {"__name__": "fastopt_kernels"}
        #: The kernels with their constants that have been compiled, or are about to be.
        self.compiled: set[tuple[Any, ...]] = set()
        exec(compile(source, name, "exec"), self.functions)


@lru_cache(maxsize=256)
def kernels_of(program: Program) -> Kernels:
    """The kernels of `program`."""
    return Kernels(program)


class TritonRuns:
    """Runs cohorts on one device; keeps the tables of each program.

    Cohorts that once stepped by different programs may come to step by the same one, when their numbers lead them the
    same way: then each has tables of its own.
    """

    def __init__(self) -> None:
        self._tables: dict[tuple[Program, torch.device, bool], list[Tables]] = {}
        self._captured: list[tuple[Any, ...]] | None = None
        self._read_by_graph: list[Tensor | None] = []
        self._new = False  # whether there are launches whose kernels are perhaps still to be compiled

    def run(self, cohorts: Sequence[Cohort], reduce: Reduce | None = None, launch: bool = True) -> None:
        """Step all parameters of the cohorts in place.

        Args:
            cohorts, reduce: as for `run_blocks`.
            launch: False does all of it but the kernels, which a CUDA graph replays.
        """
        capturing = _capturing(cohorts[0].params[0].device)
        flat, others = _by_layout(cohorts)
        if capturing and (others or any(cohort.fresh for cohort in flat)):
            raise RuntimeError("a CUDA graph cannot capture a step that creates state: make a few steps before")
        if not launch and others:
            raise RuntimeError(CAPTURE_ANEW)
        if others and reduce is not None:
            run_blocks(cohorts, reduce)
            return
        device = cohorts[0].params[0].device
        with _on(device):
            taken: list[Tables] = []
            launches = [launch for cohort in flat for launch in self._launches(cohort, device, taken)]
            kernels = [each.captured_as() for each in launches] if capturing or not launch else []
            if not launch and kernels != self._captured:
                raise RuntimeError(CAPTURE_ANEW)
            if self._new:
                self._new = False
                _compile((call for launch in launches for call in launch.calls(reduce is None)), device)
            for k in range(max((len(x.program.phases) for x in launches), default=0) if launch else 0):
                _run_phase(launches, k, reduce)
        if capturing:  # nothing has run; the numbers of the state go on with the replays
            self._captured = kernels
            self._read_by_graph = [x for each in launches for x in each.memory()]  # stays while the graph may read it
            return
        for cohort in flat:
            cohort.store()
        if others:
            run_blocks(others, None)

    def _launches(self, cohort: Cohort, device: torch.device, taken: list[Tables]) -> list[Launch]:
        """The launches for a cohort, with its tables up to date; those of its last step where that is possible.

        `taken` are the tables of other cohorts of this step, to which its own are added.
        """
        known: _Prepared | None = cohort.kept
        version = cohort.looked.version if cohort.looked is not None else None
        if known is not None and known.needs_any(taken):
            known = None
        if known is None or version is None or not known.current(version):
            kernels = kernels_of(cohort.program)
            addresses = _addresses(cohort, kernels.layout)
            if known is None or version is None or not known.move(addresses, version):
                known = cohort.kept = self._prepare(cohort, kernels, device, addresses, version, taken)
        scalars = cohort.scalars()
        for launch in known.launches:
            launch.tables.set_scalars(scalars)
            taken.append(launch.tables)
        return known.launches

    def _prepare(
        self,
        cohort: Cohort,
        kernels: Kernels,
        device: torch.device,
        addresses: NDArray[np.int64],
        version: int | None,
        taken: list[Tables],
    ) -> _Prepared:
        whole = [row for row, place in enumerate(kernels.layout.places) if cohort.is_whole(place)]
        aligned = _aligned(addresses, whole)
        sizes = np.fromiter((p.numel() for p in cohort.params), np.int64, len(cohort.params))
        rows = np.array(cohort.row_index, np.int32)
        prepared = _Prepared(whole, aligned, version)
        self._new = True
        for promise in (True, False):
            chosen = np.flatnonzero(aligned == promise)
            if len(chosen):
                tables = self._tables_for(kernels, device, promise, taken)
                tables.place(np.ascontiguousarray(addresses[:, chosen]), sizes[chosen], rows[chosen])
                launch = Launch(kernels, tables, ALIGNED if promise else 1, len(chosen), len(cohort.rows))
                prepared.add(launch, chosen)
        return prepared

    def _tables_for(self, kernels: Kernels, device: torch.device, aligned: bool, taken: list[Tables]) -> Tables:
        there = self._tables.setdefault((kernels.program, device, aligned), [])
        free = next((tables for tables in there if tables not in taken), None)
        if free is None:
            there.append(free := Tables(kernels.layout, device))
        return free


class Launch:
    """The tensors of one cohort that go through the same kernels."""

    def __init__(self, kernels: Kernels, tables: Tables, align: int, n_tensors: int, n_rows: int) -> None:
        self.kernels, self.tables, self.align = kernels, tables, align
        self.n_tensors, self.n_rows = n_tensors, n_rows
        #: For each kernel the table of scalars that it was launched with, what launches it again, and the arguments.
        self._known: dict[tuple[Any, ...], tuple[Tensor | None, Callable[..., Any], tuple[Any, ...]]] = {}
        self.program, layout = kernels.program, kernels.layout
        self.compute = torch.float64 if layout.double else torch.float32
        counted = [sum(self.program.nodes[i].op != "count" for i in phase.reductions) for phase in self.program.phases]
        self.partials = tables.scratch("partials", (max(counted), max(tables.n_chunks, 1)), self.compute)
        self.values = tables.scratch("values", (max(len(layout.values), 1), n_tensors), torch.float64)
        self.totals = tables.scratch("totals", (max(len(layout.totals), 1), n_tensors), torch.float64)

    def memory(self) -> list[Tensor | None]:
        """The tables that the kernels read, and what they put aside."""
        return [*self.tables.on_device(*TABLES), self.partials, self.values, self.totals]

    def captured_as(self) -> tuple[Any, ...]:
        """What a graph that has captured the launch goes on with: its kernels, where they look, how far they go."""
        return self.program, self.n_tensors, self.n_rows, self.tables.n_chunks, *map(id, self.memory())

    def stage(self, k: int, add: bool, scalars: bool) -> None:
        """Launch what is done per tensor before pass `k`."""
        self._launch(("stage", k, add, scalars))

    def sweep(self, k: int) -> None:
        """Launch pass `k`."""
        self._launch(("pass", k))

    def calls(self, alone: bool) -> Iterator[_Call]:
        """All that a step launches; `alone` says that no other processes add to the totals."""
        phases = self.program.phases
        for k in range(len(phases)):
            reducing = k > 0 and bool(phases[k - 1].reductions)
            if reducing and not alone:
                yield from self._call("stage", k, True, False)
            yield from self._call("stage", k, reducing and alone, True)
            yield from self._call("pass", k)

    def _launch(self, key: tuple[Any, ...]) -> None:
        """Launch a kernel; from the second time on without looking at its arguments, for nothing about them is new."""
        known = self._known.get(key)
        if known is None or known[0] is not self.tables.scalars.on_device:
            launched = [call.launch() for call in self._call(*key)] or [(_nothing, ())]
            self._known[key] = self.tables.scalars.on_device, *launched[0]
        else:
            known[1](*known[2])

    def _call(self, kind: str, k: int, add: bool = False, scalars: bool = False) -> Iterator[_Call]:
        """A stage or pass with its arguments; none if it has nothing to do."""
        t, phase = self.tables, self.program.phases[k]
        counts = self.n_tensors, self.n_rows, t.n_chunks
        if kind == "stage" and self.kernels.layout.stage(k):
            pointers = [*t.on_device("addresses", "sizes", "rows", "first_chunk", "scalars")]
            pointers += [self.values, self.partials, self.totals]
            constants = {"ADD": add, "SCALARS": scalars, "WIDE": BLOCK}
            yield _Call(self.kernels, f"stage_{k}", self.n_tensors, (*pointers, *counts), constants)
        reduces = any(self.program.nodes[i].op != "count" for i in phase.reductions)
        if kind == "pass" and t.n_chunks and (phase.stores or reduces):
            pointers = [*t.on_device("addresses", "sizes", "rows", "chunk_tensor", "chunk_number", "scalars")]
            pointers += [self.values, self.partials]
            constants = {"BLOCK": BLOCK, "ALIGN": self.align}
            yield _Call(self.kernels, f"pass_{k}", t.n_chunks, (*pointers, *counts), constants)


def _nothing() -> None:
    """What there is to launch for a stage or pass without work."""


class _Call(NamedTuple):
    """A kernel with its number of programs and its arguments."""

    kernels: Kernels
    name: str
    programs: int
    arguments: tuple[Any, ...]
    constants: dict[str, int]

    @property
    def key(self) -> tuple[Any, ...]:
        """Tells apart what has to be compiled for one program."""
        return self.name, *self.constants.values()

    def launch(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Launch it. Returns what launches it again, with the arguments for that."""
        launcher = self.kernels.functions[self.name][(self.programs,)]
        options = {**self.constants, "num_warps": WARPS, "enable_fp_fusion": False}
        compiled = launcher(*self.arguments, **options)
        if not _takes(compiled, len(self.arguments) + len(self.constants)):
            return partial(launcher, **options), self.arguments
        # an address is taken as it is, while Triton asks the driver about each tensor
        plain = (x.data_ptr() if isinstance(x, Tensor) else x for x in self.arguments)
        return compiled[(self.programs, 1, 1)], (*plain, *self.constants.values())

    def compile(self, device: torch.device) -> None:
        """Compile it for its arguments without launching it."""
        with _on(device):
            self.kernels.functions[self.name].warmup(
                *self.arguments, grid=(self.programs,), **self.constants, num_warps=WARPS, enable_fp_fusion=False
            )


def _compile(calls: Iterable[_Call], device: torch.device) -> None:
    """Compile the kernels that calls need at the same time: for much of that time Python's lock is free."""
    new = {(call.kernels, call.key): call for call in calls if call.key not in call.kernels.compiled}
    for kernels, key in new:
        kernels.compiled.add(key)
    if len(new) > 1 and not interpreted():
        with ThreadPoolExecutor(len(new)) as pool:
            list(pool.map(partial(_Call.compile, device=device), new.values()))


class _Prepared:
    """The launches of a cohort, good while its tensors lie where they lay and no other cohort has used its tables."""

    def __init__(self, whole: list[int], aligned: NDArray[np.bool_], version: int | None) -> None:
        self.launches: list[Launch] = []
        self._whole, self._aligned, self._version = whole, aligned, version
        self._chosen: list[NDArray[np.intp]] = []
        self._tokens: list[int] = []

    def add(self, launch: Launch, chosen: NDArray[np.intp]) -> None:
        """Add a launch for the tensors with the indices `chosen`, whose tables are filled."""
        self.launches.append(launch)
        self._chosen.append(chosen)
        self._tokens.append(launch.tables.version)

    def needs_any(self, taken: list[Tables]) -> bool:
        """Whether it needs any of these tables."""
        return any(launch.tables in taken for launch in self.launches)

    def current(self, version: int) -> bool:
        """Whether all is still in place; `version` is that of what was looked at."""
        return self._version == version and self._own_tables()

    def _own_tables(self) -> bool:
        return [launch.tables.version for launch in self.launches] == self._tokens

    def move(self, addresses: NDArray[np.int64], version: int) -> bool:
        """Put new addresses into the tables, if nothing else has to change."""
        if not self._own_tables() or not np.array_equal(_aligned(addresses, self._whole), self._aligned):
            return False
        for launch, chosen in zip(self.launches, self._chosen, strict=True):
            all_of_them = len(chosen) == addresses.shape[1]
            launch.tables.addresses.put(addresses if all_of_them else np.ascontiguousarray(addresses[:, chosen]))
        self._version = version
        return True


def _run_phase(launches: Sequence[Launch], k: int, reduce: Reduce | None) -> None:
    """The scalars before pass `k`, and the pass."""
    now = [launch for launch in launches if k < len(launch.program.phases)]
    reducing = [launch for launch in now if k and launch.program.phases[k - 1].reductions]
    if reduce is not None and reducing:
        for launch in reducing:
            launch.stage(k, add=True, scalars=False)
        # row by row: a list of rows would be an index that the host sends, which no graph can capture
        rows = [
            launch.totals[launch.kernels.layout.totals[i]]
            for launch in reducing
            for i in launch.program.phases[k - 1].reductions
        ]
        for row, total in zip(rows, torch.split(reduce(torch.cat(rows)), [len(row) for row in rows]), strict=True):
            row.copy_(total)
    for launch in now:
        launch.stage(k, add=reduce is None and launch in reducing, scalars=True)
        launch.sweep(k)


def _by_layout(cohorts: Sequence[Cohort]) -> tuple[list[Cohort], list[Cohort]]:
    """The parameters whose tensors are laid out alike without gaps, and the others."""
    flat: list[Cohort] = []
    others: list[Cohort] = []
    for cohort in cohorts:
        if cohort.kept is not None:  # looked at in an earlier step
            flat.append(cohort)
            continue
        cohort.make_fresh()
        good = [cohort.is_flat(i) for i in range(len(cohort.params))]
        if all(good):
            flat.append(cohort)
            continue
        cohort.split = True
        for keep, found in ((True, flat), (False, others)):
            part = cohort.part([i for i, x in enumerate(good) if x == keep])
            if part.params:
                found.append(part)
    return flat, others


def _addresses(cohort: Cohort, layout: Layout) -> NDArray[np.int64]:
    """Where each tensor lies `[n_places, n_tensors]`."""
    rows = [cohort.addresses(place) for place in layout.places]
    return np.stack(rows) if rows else np.zeros((1, len(cohort.params)), np.int64)


def _aligned(addresses: NDArray[np.int64], whole: list[int]) -> NDArray[np.bool_]:
    """Which tensors `[n_tensors]` have all their elementwise places, the rows `whole`, at aligned addresses."""
    aligned: NDArray[np.bool_] = (addresses[whole] % ALIGNED == 0).all(axis=0)
    return aligned


def _takes(compiled: Any, n: int) -> bool:
    """Whether a compiled kernel is launched with `n` arguments, constants included, as in the Triton of this torch."""
    signature = getattr(getattr(compiled, "src", None), "signature", ())
    return len(signature) == n and hasattr(compiled, "__getitem__")


def _capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _on(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the current one, where it is not."""
    if device.type != "cuda" or torch.cuda.current_device() == device.index:
        return nullcontext()
    return torch.cuda.device(device)
