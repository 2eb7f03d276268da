"""Between parameters or gradients and the order in which they are sent: see [Note: wires] in wire.py."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .wire import Wire


def pack(wire: Wire, buffer: Tensor, sources: Mapping[int, Tensor], header: Tensor) -> None:
    """Fill `buffer` `[wire.numel]` from whole 1-d `sources` by parameter; what has no source is zero.

    One multi-tensor copy. `header` `[wire.header]` goes to the end of every part.
    """
    chunks = buffer.split_with_sizes(wire.splits)
    into: list[Tensor] = []
    out_of: list[Tensor] = []
    empty = [chunks[at] for at in wire.gaps]
    for at, param, start, stop in wire.moves:
        source = sources.get(param)
        if source is None:
            empty.append(chunks[at])
        else:
            into.append(chunks[at])
            out_of.append(source[start:stop] if stop else source)
    for at in wire.headers:
        into.append(chunks[at])
        out_of.append(header)
    if empty:
        torch._foreach_zero_(empty)
    if into:
        torch._foreach_copy_(into, out_of, non_blocking=True)


def unpack(wire: Wire, received: Tensor, flat: Tensor) -> None:
    """Copy the parts `received` (no headers) to the places of their parameters in the flat buffer of the bucket."""
    starts = {entry.param: entry.start for entry in wire.bucket.entries}
    into: list[Tensor] = []
    out_of: list[Tensor] = []
    runs = (run for part in wire.parts for run in part)
    for run, chunk in zip(runs, received.split_with_sizes(wire.splits), strict=True):
        if run.param is not None and run.count:
            at = starts[run.param] + run.start
            into.append(flat[at : at + run.count])
            out_of.append(chunk)
    if into:
        torch._foreach_copy_(into, out_of, non_blocking=True)


def own_spans(wire: Wire, flat: Tensor, rank: int) -> list[Tensor]:
    """What `rank` owns of each span of a wire whose parts are equally long: views of `flat`."""
    world_size = wire.bucket.world_size
    shares = [(start, (stop - start) // world_size) for start, stop in wire.spans or ()]
    return [flat[start + rank * share : start + (rank + 1) * share] for start, share in shares]


def own_part(wire: Wire, flat: Tensor, rank: int) -> Tensor:
    """The part of `rank` of the parameters in `flat`, in one piece (a view where all of a `whole` bucket is sent)."""
    starts = {entry.param: entry.start for entry in wire.bucket.entries}
    if wire.spans is not None and not wire.even:
        at = sum(wire.payloads[:rank])
        return flat[at : at + wire.payloads[rank]]
    pieces = []
    for run in wire.parts[rank]:
        if run.param is None:
            pieces.append(flat.new_zeros(run.count))
        else:
            at = starts[run.param] + run.start
            pieces.append(flat[at : at + run.count])
    return torch.cat(pieces) if pieces else flat[:0]
