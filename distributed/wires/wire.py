"""What one collective moves of a bucket, a pure value.

[Note: wires]
A flat buffer holds parameters one after the other, group by group; a collective wants what belongs to a rank in one
piece. So what is sent is laid out anew, *part* by part: the regions that rank 0 owns of all active segments, those of
rank 1, and so on. With two segments of two groups and two ranks:

    flat buffer   | a a a a A A A A | b b B B |         small letters are rank 0's, capitals are rank 1's
    wire          | a a a a b b h | A A A A B B h |     both segments active
    wire          | b b h | B B h |                     the first group is frozen: it is not on the wire
                                                        h: the header, see header.py

Gradients are copied into this order as they are anyhow copied out of `p.grad`. Parameters come back in place: one
collective gathers each active segment where it is, so that nothing is kept beside the flat buffer. Only a `whole`
bucket of which not all parameters are active comes back in this order, and is copied.
"""

from __future__ import annotations

from collections.abc import Iterator, Set
from dataclasses import dataclass
from functools import cached_property

from ..ownership.places import Bucket, Segment, aligned


@dataclass(frozen=True)
class Run:
    """`count` consecutive elements of a part: those of parameter `param` from its element `start` on.

    `param` is None where nothing is meant to be: padding.
    """

    param: int | None
    start: int
    count: int


@dataclass(frozen=True)
class Wire:
    """What one collective moves.

    Attributes:
        bucket: of which.
        params: the parameters in it, in the order of their flags in the header.
        parts: for each rank the runs of its part.
        header: how many numbers follow the runs of each part.
        spans: start and stop of what is gathered in place in the flat buffer: each active segment, or all of a `whole`
            bucket; None where what comes back must be copied.
    """

    bucket: Bucket
    params: tuple[int, ...]
    parts: tuple[tuple[Run, ...], ...]
    header: int
    spans: tuple[tuple[int, int], ...] | None

    @cached_property
    def payloads(self) -> tuple[int, ...]:
        """Elements of each part without the header."""
        return tuple(sum(run.count for run in part) for part in self.parts)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Elements of each part."""
        return tuple(payload + self.header for payload in self.payloads)

    @cached_property
    def splits(self) -> tuple[int, ...]:
        """Sizes of all runs in order, with each part's header behind its runs if there is one."""
        tail = (self.header,) if self.header else ()
        return tuple(n for part in self.parts for n in (*(run.count for run in part), *tail))

    @property
    def even(self) -> bool:
        """Whether all parts are equally long."""
        return self.bucket.owned is None

    @property
    def numel(self) -> int:
        """Elements of all parts."""
        return sum(self.sizes)

    @cached_property
    def moves(self) -> tuple[tuple[int, int, int, int], ...]:
        """Where whole gradients go: (number of the split, parameter, start, stop), stop 0 where it is all of it."""
        sizes = {entry.param: entry.stop - entry.start for entry in self.bucket.entries}
        return tuple(
            (at, run.param, run.start, 0 if run.count == sizes[run.param] else run.start + run.count)
            for at, run in self._numbered
            if run is not None and run.param is not None
        )

    @cached_property
    def gaps(self) -> tuple[int, ...]:
        """The numbers of the splits that are padding."""
        return tuple(at for at, run in self._numbered if run is not None and run.param is None and run.count)

    @cached_property
    def headers(self) -> tuple[int, ...]:
        """The numbers of the splits that are headers."""
        return tuple(at for at, run in self._numbered if run is None)

    @property
    def _numbered(self) -> Iterator[tuple[int, Run | None]]:
        """The splits with their numbers; None for a header."""
        tail = (None,) if self.header else ()
        return enumerate(run for part in self.parts for run in (*part, *tail))


def wire_of(bucket: Bucket, active: Set[int], extra: int | None = None) -> Wire | None:
    """The wire of `bucket` that moves the parameters `active`; None if it has none of them.

    In an `even` layout it moves whole segments, so that the parts are equally long.

    Args:
        bucket: any.
        active: parameters by their index in the layout.
        extra: how many numbers the header has beside a flag for each parameter; None for no header.
    """
    spans: tuple[tuple[int, int], ...] | None
    whole = bucket.owned is not None
    segments = [s for s in bucket.segments if any(entry.param in active for entry in s.entries)]
    if not segments:
        return None
    if whole:
        params = tuple(entry.param for entry in bucket.entries if entry.param in active)
        parts = _owners_parts(bucket, active)
        spans = ((0, bucket.numel),) if len(params) == len(bucket.entries) else None
    else:
        params = tuple(entry.param for segment in segments for entry in segment.entries)
        parts = _even_parts(bucket, segments)
        spans = tuple((segment.start, segment.stop) for segment in segments)
    header = 0 if extra is None else aligned(len(params) + extra, bucket.dtype)
    return Wire(bucket, params, parts, header, spans)


def _even_parts(bucket: Bucket, segments: list[Segment]) -> tuple[tuple[Run, ...], ...]:
    parts: list[list[Run]] = [[] for _ in range(bucket.world_size)]
    for segment in segments:
        share = (segment.stop - segment.start) // bucket.world_size
        for param, start, stop in _filled_and_empty(segment):
            at = start
            while at < stop:
                rank = (at - segment.start) // share
                end = min(stop, segment.start + (rank + 1) * share)
                parts[rank].append(Run(param, at - start if param is not None else 0, end - at))
                at = end
    return tuple(map(tuple, parts))


def _filled_and_empty(segment: Segment) -> Iterator[tuple[int | None, int, int]]:
    """Parameters and the gaps behind them, as (parameter or None, start, stop), in order."""
    starts = [entry.start for entry in segment.entries]
    for entry, following in zip(segment.entries, [*starts[1:], segment.stop], strict=True):
        yield entry.param, entry.start, entry.stop
        yield None, entry.stop, following


def _owners_parts(bucket: Bucket, active: Set[int]) -> tuple[tuple[Run, ...], ...]:
    parts: list[list[Run]] = [[] for _ in range(bucket.world_size)]
    following = [*(entry.start for entry in bucket.entries[1:]), bucket.numel]
    for entry, end in zip(bucket.entries, following, strict=True):
        if entry.param in active and entry.owner is not None:
            parts[entry.owner].append(Run(entry.param, 0, entry.stop - entry.start))
            if end > entry.stop:
                parts[entry.owner].append(Run(None, 0, end - entry.stop))
    return tuple(map(tuple, parts))
