"""The layout is a pure value: every element has one owner, for any parameters and ranks, in one process."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastopt.distributed.ownership.layout import Layout
from fastopt.distributed.ownership.places import ALIGN_BYTES, ParamSpec
from fastopt.distributed.planning.decoder import decoder

DTYPES = (torch.float32, torch.bfloat16, torch.float64)


@st.composite
def param_lists(draw: st.DrawFn) -> list[ParamSpec]:
    """Lists of 0 to 20 parameters of any small shape (empty and 0-d ones too) in groups of which some stay empty."""
    shapes = st.lists(st.integers(0, 9), max_size=3).map(tuple)
    count = draw(st.integers(0, 20))
    places = draw(st.permutations(range(count)))
    return [
        ParamSpec(
            f"p{i}",
            draw(shapes),
            draw(st.sampled_from(DTYPES)),
            draw(st.integers(0, 4)),
            place=places[i],
            forced=draw(st.booleans()),
        )
        for i in range(count)
    ]


ranks = st.one_of(st.integers(1, 9), st.sampled_from([64, 1000, 16384]))
kinds = st.sampled_from(["even", "whole"])
sizes = st.sampled_from([1, 64, 1000, 2**20])


def owned_by_enumeration(layout: Layout, param: int) -> list[int]:
    """How many ranks own each element of a parameter, counted one by one."""
    counts = [0] * layout.params[param].numel
    for rank in range(layout.world_size):
        for element in range(*layout.interval(param, rank)):
            counts[element] += 1
    return counts


@settings(max_examples=40, deadline=None)
@given(param_lists(), ranks, kinds, sizes)
def test_every_element_has_exactly_one_owner(params: list[ParamSpec], n: int, kind: str, bucket_bytes: int) -> None:
    layout = Layout.make(kind, params, n, bucket_bytes)
    probe = range(len(params)) if n < 100 else range(min(2, len(params)))
    for i in probe:
        assert owned_by_enumeration(layout, i) == [1] * params[i].numel


@settings(max_examples=40, deadline=None)
@given(param_lists(), ranks, kinds, sizes)
def test_buckets_hold_each_parameter_once_and_segments_never_mix(
    params: list[ParamSpec], n: int, kind: str, bucket_bytes: int
) -> None:
    layout = Layout.make(kind, params, n, bucket_bytes)
    seen = [entry.param for bucket in layout.buckets for entry in bucket.entries]
    assert sorted(seen) == list(range(len(params)))
    for bucket in layout.buckets:
        members = [params[entry.param] for entry in bucket.entries]
        assert {m.dtype for m in members} == {bucket.dtype}
        at = 0
        for entry, member in zip(bucket.entries, members, strict=True):
            assert entry.start >= at
            assert entry.stop - entry.start == member.numel
            assert entry.start * bucket.dtype.itemsize % ALIGN_BYTES == 0
            at = entry.stop
        assert at <= bucket.numel
        assert bucket.segments[0].start == 0
        assert bucket.segments[-1].stop == bucket.numel
        assert all(a.stop == b.start for a, b in pairwise(bucket.segments))
        for segment in bucket.segments if kind == "even" else ():
            inside = [params[entry.param] for entry in segment.entries]
            assert {m.group for m in inside} == {segment.group}
            assert len({m.forced for m in inside}) == 1
        payload = sum(m.numel * m.dtype.itemsize for m in members)
        assert payload <= bucket_bytes or len(members) == 1


@settings(max_examples=40, deadline=None)
@given(param_lists(), ranks, sizes)
def test_even_regions_are_equal_aligned_and_cover_the_bucket(
    params: list[ParamSpec], n: int, bucket_bytes: int
) -> None:
    for bucket in Layout.even(params, n, bucket_bytes).buckets:
        unit = ALIGN_BYTES // bucket.dtype.itemsize
        for k, segment in enumerate(bucket.segments):
            regions = [bucket.regions(rank)[k] for rank in range(n)]
            assert regions[0].start == segment.start
            assert regions[-1].stop == segment.stop
            assert all(a.stop == b.start for a, b in pairwise(regions))
            assert len({r.numel for r in regions}) == 1
            assert all(r.start * bucket.dtype.itemsize % ALIGN_BYTES == 0 for r in regions)
            used = sum(-(-(e.stop - e.start) // unit) * unit for e in segment.entries)
            assert segment.stop - segment.start - used < unit * n


@settings(max_examples=40, deadline=None)
@given(param_lists(), ranks, sizes)
def test_whole_layout_gives_each_parameter_one_owner_in_one_region(
    params: list[ParamSpec], n: int, bucket_bytes: int
) -> None:
    layout = Layout.whole(params, n, bucket_bytes)
    for i, param in enumerate(params):
        owner = layout.owner(i)
        assert 0 <= owner < n
        assert layout.interval(i, owner) == (0, param.numel)
        bucket, entry = layout.place(i)
        (region,) = bucket.regions(owner)
        assert region.start <= entry.start
        assert entry.stop <= region.stop
    for bucket in layout.buckets:
        assert bucket.owned is not None
        assert len({region.rank for region in bucket.owned}) == len(bucket.owned)
        assert sum(region.numel for region in bucket.owned) == bucket.numel


@settings(max_examples=40, deadline=None)
@given(st.lists(st.lists(st.integers(1, 50), max_size=12), min_size=1, max_size=4), st.integers(1, 6))
def test_whole_layout_balances_every_group(groups: list[list[int]], n: int) -> None:
    params = [
        ParamSpec(f"{g}.{i}", (size,), torch.float32, g) for g, ss in enumerate(groups) for i, size in enumerate(ss)
    ]
    layout = Layout.whole(params, n)
    for g, members in enumerate(groups):
        loads = [0] * n
        for i, param in enumerate(params):
            if param.group == g:
                loads[layout.owner(i)] += param.numel
        # Longest processing time first is never worse than the mean plus the largest member.
        assert max(loads) <= sum(members) / n + max(members, default=0)


def test_many_small_groups_do_not_all_go_to_rank_0() -> None:
    params = [ParamSpec(f"p{g}", (10,), torch.float32, g) for g in range(100)]
    layout = Layout.whole(params, 4)
    assert [layout.elements(rank) for rank in range(4)] == [250] * 4


def test_known_even_layout() -> None:
    params = [
        ParamSpec("a", (2, 5), torch.float32, 0),
        ParamSpec("b", (), torch.float32, 0),
        ParamSpec("c", (3,), torch.float32, 1),
        ParamSpec("d", (6,), torch.float32, 0),
    ]
    layout = Layout.even(params, 2)
    (bucket,) = layout.buckets
    # 16 bytes are 4 floats: a takes 10 of 12, b 1 of 4, d 6 of 8; 24 split by 2 in units of 4 gives 12 each.
    # c of the other group has a segment of its own: 3 of 8, of which each rank owns 4.
    assert [(e.param, e.start, e.stop) for e in bucket.entries] == [(0, 0, 10), (1, 12, 13), (3, 16, 22), (2, 24, 27)]
    assert [(s.group, s.start, s.stop) for s in bucket.segments] == [(0, 0, 24), (1, 24, 32)]
    assert [layout.interval(i, 0) for i in range(4)] == [(0, 10), (0, 0), (0, 3), (0, 0)]
    assert [layout.interval(i, 1) for i in range(4)] == [(10, 10), (0, 1), (3, 3), (0, 6)]


def test_boxes_of_a_cut_parameter_and_of_a_scalar_state() -> None:
    layout = Layout.even([ParamSpec("a", (3, 4), torch.float32, 0)], 3)
    assert [[(b.offset, b.shape) for b in layout.boxes(0, rank)] for rank in range(3)] == [
        [((0, 0), (1, 4))],
        [((1, 0), (1, 4))],
        [((2, 0), (1, 4))],
    ]
    assert [b.shape for b in layout.boxes(0, 2, ())] == [()]
    whole = Layout.whole([ParamSpec("a", (3, 4), torch.float32, 0)], 3)
    assert [b.shape for b in whole.boxes(0, 0)] == [(3, 4)]
    assert whole.boxes(0, 1) == []
    assert whole.boxes(0, 1, ()) == []


def test_buckets_follow_the_model_and_not_the_groups() -> None:
    # Weights in one group and biases in another: layers are neighbours in the model, and in the buckets.
    params = [
        ParamSpec(f"{i}.{part}", shape, torch.float32, group, place=2 * i + group)
        for group, (part, shape) in enumerate({"weight": (64, 64), "bias": (64,)}.items())
        for i in range(6)
    ]
    layout = Layout.even(params, 2, bucket_bytes=40_000)
    names = [[params[e.param].name for e in bucket.entries] for bucket in layout.buckets]
    assert names == [
        ["0.weight", "1.weight", "0.bias", "1.bias"],
        ["2.weight", "3.weight", "2.bias", "3.bias"],
        ["4.weight", "5.weight", "4.bias", "5.bias"],
    ]


def test_five_hundred_groups_share_buckets() -> None:
    one = [ParamSpec(f"p{i}", (32, 32), torch.float32, 0, place=i) for i in range(500)]
    many = [ParamSpec(f"p{i}", (32, 32), torch.float32, i, place=i) for i in range(500)]
    for n in (2, 8):
        few, more = Layout.even(one, n, 2**18), Layout.even(many, n, 2**18)
        assert len(few.buckets) == len(more.buckets) == 8
        assert sum(b.numel for b in more.buckets) == sum(b.numel for b in few.buckets)


def test_a_bucket_that_one_group_has_filled_by_half_ends_with_it() -> None:
    sizes = {0: 3, 1: 1, 2: 2, 3: 4}
    params = [
        ParamSpec(f"{group}.{i}", (64,), torch.float32, group, place=10 * group + i)
        for group, count in sizes.items()
        for i in range(count)
    ]
    layout = Layout.even(params, 2, bucket_bytes=4 * 256)
    assert [[s.group for s in bucket.segments] for bucket in layout.buckets] == [[0], [1, 2, 3], [3]]


def test_the_first_bucket_of_a_model_is_small() -> None:
    params = [ParamSpec(f"p{i}", (2**18,), torch.float32, 0, place=i) for i in range(12)]
    layout = Layout.even(params, 2, bucket_bytes=4 * 2**20)
    assert [len(bucket.entries) for bucket in layout.buckets] == [1, 4, 4, 3]


def test_extending_leaves_what_is_there() -> None:
    params = [ParamSpec(f"p{i}", (7, i + 1), torch.float32, i % 2) for i in range(6)]
    more = [ParamSpec(f"q{i}", (5,), torch.float32, 2) for i in range(3)]
    for kind in ("even", "whole"):
        before = Layout.make(kind, params, 3)
        after = before.extended(more)
        assert after.buckets[: len(before.buckets)] == before.buckets
        assert [after.params[i].name for i in range(6, 9)] == ["q0", "q1", "q2"]
        assert sum(after.elements(rank) for rank in range(3)) == sum(p.numel for p in params + more)


def test_a_large_model_on_16384_ranks() -> None:
    params = [
        ParamSpec(f"layers.{i}.{part}", shape, torch.bfloat16, i % 4)
        for i in range(80)
        for part, shape in {"attn": (8192, 8192), "up": (8192, 28672), "norm": (8192,)}.items()
    ]
    even, whole = Layout.even(params, 16384), Layout.whole(params, 16384)
    held = [even.elements(rank) for rank in (0, 1, 8191, 16383)]
    total = sum(p.numel for p in params)
    # The regions of each segment are rounded up to 16 bytes, 8 elements.
    slack = 8 * sum(len(bucket.segments) for bucket in even.buckets)
    assert all(h <= total // 16384 + slack for h in held)
    assert sum(r.numel for b in even.buckets for rank in range(16384) for r in b.regions(rank)) >= total
    assert len({whole.owner(i) for i in range(len(params))}) == len(params)


@pytest.mark.parametrize(
    ("kind", "ranks", "size", "says"),
    [("even", 0, 10, "world_size=0"), ("even", 2, 0, "bucket_bytes"), ("odd", 2, 10, "'odd'")],
)
def test_wrong_arguments_are_named(kind: str, ranks: int, size: int, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        Layout.make(kind, [], ranks, size)


def test_an_even_layout_has_no_owner() -> None:
    with pytest.raises(ValueError, match="'w' has no single owner"):
        Layout.even([ParamSpec("w", (3,), torch.float32, 0)], 2).owner(0)


def test_a_group_for_each_parameter_takes_hardly_more_memory_than_one() -> None:
    """A decoder of 1.36 billion parameters on 4 ranks: bytes of the flat buffers, padding included."""
    params = list(decoder(1.36e9, torch.bfloat16).named_parameters())
    sizes = []
    for groups in (1, len(params)):
        specs = [
            ParamSpec(name, tuple(p.shape), p.dtype, i if groups > 1 else 0, place=i)
            for i, (name, p) in enumerate(params)
        ]
        sizes.append(sum(bucket.numel for bucket in Layout.even(specs, 4).buckets))
    assert sizes[0] <= sizes[1] <= 1.0001 * sizes[0]
