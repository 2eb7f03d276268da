"""The executor `foreach`: torch's own operations, node by node, over blocks of a parameter that stay in the cache.

The loop over a whole parameter moves every intermediate result through memory; a block of it does not. Each node is
the very torch operation that the cb called, so the results of an elementwise chain are those of `eager` bit for bit
(sums over a parameter are formed block by block, in float64). Not to the bit with several threads in bfloat16 and for
powers, sigmoid and softplus, where torch's own results depend on how it cuts a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import torch
from torch import Tensor

from ..cohorts.plan import Cohort
from ..recording.chain import PARAM
from ..recording.ops import OPS, run_node
from ..recording.program import Node, Phase, Program, Slot, Value
from ..work import Reduce

#: Elements per block: small enough for the outer caches, large enough that the calls of torch cost little.
BLOCK = 1 << 17


def run_blocks(cohorts: Sequence[Cohort], reduce: Reduce | None = None) -> None:
    """Step all parameters of the cohorts in place.

    Args:
        cohorts: what to step.
        reduce: adds up partial sums over processes; called once per pass that ends in reductions.
    """
    run_all([CohortRun(cohort) for cohort in cohorts], reduce)


class Run(Protocol):
    """One step of a cohort, pass by pass. Reductions of a pass are vectors in float64."""

    cohort: Cohort
    phases: tuple[Phase, ...]

    def pass_over(self, k: int) -> Tensor | None:
        """Make pass `k`, if there is one. Returns the partial reductions of this process, if there are any."""

    def take_totals(self, k: int, totals: Tensor) -> None:
        """Take the totals of the reductions of pass `k`, in the same order."""


def run_all(runs: Sequence[Run], reduce: Reduce | None) -> None:
    """Make the passes of all runs together, so that `reduce` is called once for each."""
    for k in range(max((len(run.phases) for run in runs), default=0)):
        found = [(run, partial) for run in runs if (partial := run.pass_over(k)) is not None]
        if found and reduce is None:
            for run, partial in found:
                run.take_totals(k, partial)
        elif found and reduce is not None:
            totals = reduce(torch.cat([partial for _, partial in found]))
            parts = torch.split(totals, [partial.numel() for _, partial in found])
            for (run, _), total in zip(found, parts, strict=True):
                run.take_totals(k, total)
    for run in runs:
        run.cohort.store()


class CohortRun:
    """One step of a cohort."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort
        self.program = cohort.program
        self.phases = cohort.program.phases
        n = len(self.program.nodes) if any(not node.whole for node in self.program.nodes) else 0
        self.scalars: list[list[Any]] = [[None] * n for _ in cohort.params]
        cohort.make_fresh()

    def pass_over(self, k: int) -> Tensor | None:
        """Make pass `k` over all parameters. Returns the partial reductions, parameter by parameter."""
        if k >= len(self.phases):
            return None
        partials = [x for i in range(len(self.cohort.params)) for x in self._pass(k, i)]
        return torch.stack(partials) if partials else None

    def _pass(self, k: int, i: int) -> list[Tensor]:
        phase, code, cohort = self.phases[k], compiled(self.program)[k], self.cohort
        row, scalars = cohort.row_of(i), self.scalars[i]
        self.scalars_before(k, i)
        places = [cohort.tensor(i, name) for name in code.places]
        if not places or places[0].numel() <= BLOCK or not all(t.is_contiguous() for t in places):
            parts = [code.plain(places, row, scalars, None)]
        else:
            parts = code.blocks([t.view(-1) for t in places], row, scalars)
        p = cohort.params[i]
        return [
            torch.tensor(float(p.numel()), dtype=torch.float64, device=p.device)
            if self.program.nodes[n].op == "count"
            else _combine(self.program.nodes[n].op, [x[j] for x in parts])
            for j, n in enumerate(phase.reductions)
        ]

    def scalars_before(self, k: int, i: int) -> None:
        """Compute and store the scalars of parameter `i` that pass `k` needs."""
        for n in self.phases[k].scalars:
            self.scalars[i][n] = self._scalar(n, i)
        for out in self.phases[k].scalar_stores:
            self.cohort.tensor(i, out.place).copy_(self.scalars[i][out.value])

    def _scalar(self, n: int, i: int) -> Tensor:
        """The value of node `n`, one scalar of parameter `i`, as a 0-d tensor."""
        node, row, scalars = self.program.nodes[n], self.cohort.row_of(i), self.scalars[i]
        if node.op == "input":
            return self.cohort.tensor(i, node.args[0]).clone()
        operands = [
            scalars[a.index] if isinstance(a, Value) else row[a.index] if isinstance(a, Slot) else a for a in node.args
        ]
        return run_node(node.op, operands, node.dtype, self.cohort.params[i])

    def take_totals(self, k: int, totals: Tensor) -> None:
        """Take totals, in the order of `pass_over`, as the values of the reductions of pass `k`."""
        each = iter(totals.unbind())
        for scalars in self.scalars:
            for n in self.phases[k].reductions:
                scalars[n] = next(each).to(self.program.nodes[n].dtype)


def _combine(op: str, partials: list[Tensor]) -> Tensor:
    if len(partials) == 1:
        return partials[0]
    together = torch.stack(partials)
    return together.amax() if op == "amax" else together.amin() if op == "amin" else together.sum()


# ---- code


@dataclass(frozen=True)
class PhaseCode:
    """One pass as two generated functions.

    Attributes:
        places: the tensors that it works on, in order.
        plain: (places, row, scalars, None) -> partial reductions, for tensors of any layout.
        blocks: (flat places, row, scalars) -> partial reductions of each block.
    """

    places: tuple[str, ...]
    plain: Callable[..., list[Tensor]]
    blocks: Callable[..., list[list[Tensor]]]


@lru_cache(maxsize=256)
def compiled(program: Program) -> tuple[PhaseCode, ...]:
    """The code of each pass."""
    return tuple(_compile(program, phase) for phase in program.phases)


def _compile(program: Program, phase: Phase) -> PhaseCode:
    names = [name for name, _ in phase.loads] + [out.place for out in phase.stores]
    if not names and phase.nodes:
        names = [PARAM]  # something must give the shape
    places = tuple(dict.fromkeys(names))
    source = _Source(program, phase, places)
    plain = source.function(scratch=False)
    in_blocks = source.function(scratch=True)

    def blocks(flat: list[Tensor], row: Any, scalars: Any) -> list[list[Tensor]]:
        whole, rest = divmod(flat[0].numel(), BLOCK)
        scratch = [torch.empty(BLOCK, dtype=dtype, device=flat[0].device) for dtype in source.scratch]
        cut = [torch.split(t, BLOCK) for t in flat]
        done = [
            in_blocks(parts, row, scalars, scratch)
            for _, parts in zip(range(whole), zip(*cut, strict=True), strict=False)
        ]
        if rest:
            last = [parts[-1] for parts in cut]
            done.append(plain(last, row, scalars, None))
        return done

    return PhaseCode(places, plain, blocks)


class _Source:
    """Writes the Python function of one pass."""

    def __init__(self, program: Program, phase: Phase, places: Sequence[str]) -> None:
        self.program, self.phase = program, phase
        self.index = {name: f"P[{i}]" for i, name in enumerate(places)}
        self.direct = _direct_stores(program, phase)
        self.scratch: list[torch.dtype] = []
        self.scope: dict[str, Any] = {
            "run_node": run_node,
            "vector_norm": torch.linalg.vector_norm,
            "f64": torch.float64,
        }

    def function(self, scratch: bool) -> Callable[..., Any]:
        """(places, row, scalars, None or scratch buffers) -> partial reductions.

        With `scratch`, intermediate values are written into the given buffers.
        """
        free: dict[torch.dtype, list[int]] = {}
        held: dict[int, int] = {}
        last_use = self._last_uses()
        lines = ["def run(P, row, S, T):"]
        overwritten = {out.place for out in self.phase.stores}
        stored_values = {out.value for out in self.phase.stores}
        for place, i in self.phase.loads:
            copied = place in overwritten and i in stored_values
            lines.append(f"    v{i} = {self.index[place]}{'.clone()' if copied else ''}")
        for position, i in enumerate(self.phase.nodes):
            node = self.program.nodes[i]
            out = ""
            if i in self.direct:
                out = self.index[self.direct[i]]
            elif scratch and self._takes_out(node):
                if not free.setdefault(node.dtype, []):
                    free[node.dtype].append(len(self.scratch))
                    self.scratch.append(node.dtype)
                held[i] = free[node.dtype].pop()
                out = f"T[{held[i]}]"
            lines.append(f"    v{i} = {self._call(node, out)}")
            for used in {*node.values(), i}:
                if used in held and last_use.get(used, -1) <= position:
                    free[self.program.nodes[used].dtype].append(held.pop(used))
        # before the stores: what was loaded is there no longer after them
        lines.append(f"    partials = [{', '.join(self._partial(i) for i in self.phase.reductions)}]")
        for out_ in self.phase.stores:
            if self.direct.get(out_.value) != out_.place:
                lines.append(f"    {self.index[out_.place]}.copy_({self._value(out_.value)})")
        lines.append("    return partials")
        exec("\n".join(lines), self.scope)
        made: Callable[..., Any] = self.scope["run"]
        return made

    def _last_uses(self) -> dict[int, int]:
        """For each value the position of the node that reads it last; after all nodes if it is stored or reduced."""
        uses = {used: k for k, i in enumerate(self.phase.nodes) for used in self.program.nodes[i].values()}
        end = len(self.phase.nodes)
        uses |= {out.value: end for out in self.phase.stores}
        return uses | {used: end for i in self.phase.reductions for used in self.program.nodes[i].values()}

    def _takes_out(self, node: Node) -> bool:
        return node.op in OPS and OPS[node.op].takes_out

    def _value(self, i: int) -> str:
        return f"v{i}" if self.program.nodes[i].whole else f"S[{i}]"

    def _operand(self, x: Any) -> str:
        if isinstance(x, Value):
            return self._value(x.index)
        return f"row[{x.index}]" if isinstance(x, Slot) else repr(x)

    def _call(self, node: Node, out: str) -> str:
        operands = [self._operand(x) for x in node.args]
        if node.op in OPS:
            self.scope[f"op_{node.op}"] = OPS[node.op].run
            return f"op_{node.op}({', '.join(operands)}{f', out={out}' if out else ''})"
        dtype = f"d{len(self.scope)}"
        self.scope[dtype] = node.dtype
        like = next(iter(self.index.values()))
        return f"run_node({node.op!r}, [{', '.join(operands)}], {dtype}, {like})"

    def _partial(self, i: int) -> str:
        node = self.program.nodes[i]
        if node.op == "count":
            return "None"
        value = self._value(next(node.values()))
        if node.op == "sum_of_squares":
            dtype = f"d{len(self.scope)}"
            self.scope[dtype] = torch.promote_types(self.program.nodes[next(node.values())].dtype, torch.float32)
            return f"vector_norm({value}, dtype={dtype}).double().square()"
        if node.op == "sum":
            return f"{value}.sum(dtype=f64)"
        return f"{value}.{node.op}().double()"


def _direct_stores(program: Program, phase: Phase) -> dict[int, str]:
    """The values that can be computed straight into their place: nothing reads afterwards what was there before."""
    reads = {place: i for place, i in phase.loads}
    stored = [out.value for out in phase.stores]
    reduced = [j for i in phase.reductions for j in program.nodes[i].values()]
    direct: dict[int, str] = {}
    for out in phase.stores:
        node = program.nodes[out.value]
        if out.value not in phase.nodes or out.value in direct or node.op not in OPS or not OPS[node.op].takes_out:
            continue
        old = reads.get(out.place)
        later = [i for i in phase.nodes if i > out.value]
        used = {*stored, *reduced, *(j for i in later for j in program.nodes[i].values())}
        if node.dtype == out.dtype and old not in used:
            direct[out.value] = out.place
    return direct
