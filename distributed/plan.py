"""What will sharding cost, and who will own what? `plan(model, ranks)` computes it, `report` writes it down as text.

The model may be on the meta device. `fastopt plan` is the command.
"""

from __future__ import annotations

from collections.abc import Iterator

from .planning.costs import Memory, Plan, StagePlan, plan, plan_specs
from .planning.decoder import Decoder, decoder
from .planning.drawing import owners_text, size

__all__ = ["Decoder", "Memory", "Plan", "StagePlan", "decoder", "owners_text", "plan", "plan_specs", "report"]


def report(found: Plan) -> Iterator[str]:
    """The plan as lines of text."""
    dtypes = sorted({str(spec.dtype).removeprefix("torch.") for spec in found.params})
    state = sum(b * spec.numel for b, spec in zip(found.state_bytes, found.params, strict=True)) / found.elements
    groups = len({spec.group for spec in found.params})
    yield (
        f"{found.elements:,} parameters in {len(found.params)} tensors ({', '.join(dtypes)}), "
        f"{groups} group{'s' * (groups != 1)}, on {found.ranks:,} ranks"
    )
    yield f"{found.optimizer} keeps {state:g} bytes of state per parameter"
    yield ""
    heads = ("stage", "layout", "params", "gradients", "state", "passing", "memory", "sent", "collectives", "imbalance")
    rows = [heads, *(_row(stage) for stage in found.stages)]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        yield "  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True))
    yield "memory: on the rank that holds most, without activations; passing: whole for a moment while it is moved;"
    yield "sent: by each rank in a step; imbalance: elements stepped by the rank with most, over the mean"
    yield ""
    for stage in found.stages:
        kind = "units" if stage.stage == 3 else "buckets"
        low, high = size(min(stage.sizes)), size(max(stage.sizes))
        idle = f"; {stage.idle:,} ranks own nothing" if stage.idle else ""
        yield f"stage {stage.stage}: {len(stage.sizes)} {kind} of {low} to {high}{idle}"
    yield ""
    yield from owners_text(found)


def _row(stage: StagePlan) -> tuple[str, ...]:
    memory = stage.memory
    parts = (memory.parameters, memory.gradients, memory.state, memory.passing, memory.total, stage.sent)
    return (str(stage.stage), stage.kind, *map(size, parts), str(stage.collectives), f"{stage.imbalance:.3f}")
