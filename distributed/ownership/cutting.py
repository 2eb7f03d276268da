"""How parameters are cut into buckets, and who owns them: pure functions, the same on every rank."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Mapping, Sequence

import torch

from .places import Bucket, Entry, ParamSpec, Region, Segment, aligned

BUCKET_BYTES = 25 * 2**20, 256 * 2**20
"""Least and largest default size of a bucket. A larger parameter is a bucket of its own."""

BUCKETS = 12
"""How many buckets there are by default, between those sizes: enough to hide all but one of them, and few enough that
starting collectives costs the host little. Two H200, 1.36 B parameters: 6, 8, 12 and 24 buckets take the same time per
iteration where the host is fast, and it is busy for 34, 38, 40 and 45 ms; where it is slow, 24 take 84 ms instead of
the 78 of 12."""

FIRST_BYTES = 2**20
"""Size of the first bucket of a model: nothing is left to hide its reduction behind, at the end of backward."""


def default_bucket_bytes(params: Iterable[ParamSpec]) -> int:
    """The size of a bucket for these parameters."""
    total = sum(spec.numel * spec.dtype.itemsize for spec in params)
    least, largest = BUCKET_BYTES
    return min(max(-(-total // BUCKETS), least), largest)


def chunks(params: Sequence[ParamSpec], indices: Sequence[int], bucket_bytes: int, first: bool) -> list[list[int]]:
    """The members of each bucket: parameters of one dtype and device up to `bucket_bytes`, in the order of the model.

    A bucket that one group has filled by half ends with the group, so that few buckets have several segments.
    """
    found: list[list[int]] = []
    filling: dict[tuple[torch.dtype, str], tuple[list[int], int]] = {}
    for i in sorted(indices, key=lambda i: (params[i].place, i)):
        spec = params[i]
        key = (spec.dtype, spec.device)
        size = aligned(spec.room, spec.dtype) * spec.dtype.itemsize
        members, filled = filling.get(key, ([], 0))
        room = min(bucket_bytes, FIRST_BYTES) if first and members and members is found[0] else bucket_bytes
        groups = {params[j].group for j in members}
        ends = len(groups) == 1 and spec.group not in groups and 2 * filled >= room
        if not members or filled + size > room or ends:
            members, filled = [], 0
            found.append(members)
        members.append(i)
        filling[key] = (members, filled + size)
    return found


def even_bucket(index: int, params: Sequence[ParamSpec], members: list[int], world_size: int) -> Bucket:
    """The bucket of an `even` layout that holds `members`: a segment for each group."""
    first = params[members[0]]
    kinds: dict[tuple[int, bool], list[int]] = {}
    for i in members:
        kinds.setdefault((params[i].group, params[i].forced), []).append(i)
    segments: list[Segment] = []
    at = 0
    for (group, _), mine in kinds.items():
        entries, stop = _place(params, mine, at)
        stop = at + aligned(stop - at, first.dtype, world_size)
        segments.append(Segment(group, at, stop, tuple(entries)))
        at = stop
    return Bucket(index, first.dtype, first.device, at, world_size, tuple(segments))


def whole_bucket(
    owners: Mapping[int, int], index: int, params: Sequence[ParamSpec], members: list[int], world_size: int
) -> Bucket:
    """The bucket of a `whole` layout that holds `members`, sorted by owner."""
    first = params[members[0]]
    entries: list[Entry] = []
    regions: list[Region] = []
    at = 0
    for owner in sorted({owners[i] for i in members}):
        placed, stop = _place(params, [i for i in members if owners[i] == owner], at, owner)
        entries += placed
        regions.append(Region(owner, at, stop))
        at = stop
    segment = Segment(first.group, 0, at, tuple(entries))
    return Bucket(index, first.dtype, first.device, at, world_size, (segment,), tuple(regions))


def _place(
    params: Sequence[ParamSpec], members: Iterable[int], at: int, owner: int | None = None
) -> tuple[list[Entry], int]:
    """Entries for `members` from element `at` on, and where the next parameter may start."""
    entries = []
    for i in members:
        entries.append(Entry(i, at, at + params[i].numel, owner))
        at = aligned(at + params[i].room, params[i].dtype)
    return entries, at


def find_owners(
    world_size: int, params: Sequence[ParamSpec], placed: Mapping[int, int], new: Sequence[int]
) -> dict[int, int]:
    """An owner for each of `new`: per group the dearest first, each to the rank with the least of that group.

    Ranks with equally much of the group are told apart by what they hold in all, then by their number. The order
    depends on the layout alone, so every rank comes to the same owners.

    Args:
        world_size: how many ranks there are.
        params: all parameters.
        placed: the owners of those that have one.
        new: the others, by their index.
    """
    total = [0.0] * world_size
    for index, owner in placed.items():
        total[owner] += params[index].load
    owners: dict[int, int] = {}
    least = [(load, rank) for rank, load in enumerate(total)]
    heapq.heapify(least)
    by_group: dict[int, list[int]] = {}
    for i in new:
        by_group.setdefault(params[i].group, []).append(i)
    for group in sorted(by_group):
        members = sorted(by_group[group], key=lambda i: (-params[i].load, i))
        # A group of n parameters goes to the n ranks with the least load at most: the others need no look.
        heap = [(0.0, *heapq.heappop(least)) for _ in range(min(len(members), world_size))]
        for i in members:
            in_group, load, rank = heap[0]
            owners[i] = rank
            heapq.heapreplace(heap, (in_group + params[i].load, load + params[i].load, rank))
        for _, load, rank in heap:
            heapq.heappush(least, (load, rank))
    return owners
