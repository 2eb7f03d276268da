"""What goes over the wire is a pure value: every active element once, equal parts for all ranks, nothing else."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fastopt.distributed.ownership.layout import Layout
from fastopt.distributed.ownership.places import ParamSpec
from fastopt.distributed.parameters.buckets import Buffers
from fastopt.distributed.wires.header import EXTRA, PLACES, decode, encode
from fastopt.distributed.wires.packing import own_part, own_spans, pack, unpack
from fastopt.distributed.wires.wire import Wire, wire_of

from .test_layout import kinds, param_lists, sizes


def held(wire: Wire, rank: int) -> dict[int, tuple[int, int]]:
    """Where in the part of `rank` its elements of each parameter lie: start and stop."""
    found = dict.fromkeys(wire.params, (0, 0))
    at = 0
    for run in wire.parts[rank]:
        if run.param is not None:
            found[run.param] = (at, at + run.count)
        at += run.count
    return found


@settings(max_examples=60, deadline=None)
@given(param_lists(), st.integers(1, 6), kinds, sizes, st.data())
def test_every_active_element_is_sent_once(
    params: list[ParamSpec], n: int, kind: str, bucket_bytes: int, data: st.DataObject
) -> None:
    layout = Layout.make(kind, params, n, bucket_bytes)
    active = data.draw(st.sets(st.sampled_from(range(len(params))))) if params else set()
    for bucket in layout.buckets:
        mine = {entry.param for entry in bucket.entries}
        wire = wire_of(bucket, active, EXTRA)
        if wire is None:
            assert not mine & active
            continue
        assert mine & active <= set(wire.params) <= mine
        assert wire.numel == sum(wire.splits)
        for param in wire.params:
            start_and_stop = [held(wire, rank)[param] for rank in range(n)]
            owned = [layout.interval(param, rank) for rank in range(n)]
            assert [b - a for a, b in start_and_stop] == [b - a for a, b in owned]
        if kind == "even":
            assert len(set(wire.sizes)) == 1
            # Whole segments, so that the parts are equal; none that has nothing to send.
            groups = {(params[i].group, params[i].forced) for i in mine & active}
            assert {(params[i].group, params[i].forced) for i in wire.params} == groups
        else:
            assert set(wire.params) == mine & active


@settings(max_examples=40, deadline=None)
@given(param_lists(), st.integers(1, 4), kinds, sizes, st.data())
def test_parts_of_all_ranks_put_together_are_the_parameters(
    params: list[ParamSpec], n: int, kind: str, bucket_bytes: int, data: st.DataObject
) -> None:
    """What is packed by one rank and taken apart by all of them, as a collective among equal ranks would."""
    layout = Layout.make(kind, params, n, bucket_bytes)
    active = data.draw(st.sets(st.sampled_from(range(len(params))))) if params else set()
    values = [torch.arange(1.0, p.numel + 1).view(p.shape).to(p.dtype) for p in params]
    buffers = Buffers(layout, 0, [value.clone() for value in values])
    for flat in buffers.buckets:
        wire = wire_of(flat.bucket, active, EXTRA)
        plain = wire_of(flat.bucket, active)
        if wire is None or plain is None:
            continue
        full = torch.full((wire.numel,), float("nan"), dtype=flat.flat.dtype)
        header = torch.arange(wire.header).to(full)
        pack(wire, full, {i: values[i].view(-1) for i in wire.params if i in active}, header)
        parts = full.split(list(wire.sizes))
        for rank, part in enumerate(parts):
            assert torch.equal(part[wire.payloads[rank] :], header)
            for param, (start, stop) in held(wire, rank).items():
                want = values[param].view(-1)[slice(*layout.interval(param, rank))]
                assert torch.equal(part[start:stop], want if param in active else torch.zeros_like(want))
        assert not full.isnan().any()
        # The parameters' parts, one after the other, and back to their places.
        before = flat.flat.clone()
        if kind == "even":
            spans = plain.spans or ()
            gathered = [torch.cat(each) for each in zip(*(own_spans(plain, before, r) for r in range(n)), strict=True)]
        else:
            spans = ((0, flat.bucket.numel),)
            gathered = [torch.cat([own_part(plain, flat.flat, rank) for rank in range(n)])]
        for param in plain.params:
            buffers.params[param].zero_()
        if plain.spans is None:
            unpack(plain, gathered[0], flat.flat)
        else:
            for (start, stop), part in zip(spans, gathered, strict=True):
                flat.flat[start:stop] = part
        assert torch.equal(flat.flat, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_headers_survive_any_dtype_and_number_of_ranks(dtype: torch.dtype) -> None:
    alike = encode("backward", False, False, b"1234", b"abcd")
    assert len(alike) == EXTRA
    other = encode("step", True, True, b"1235", b"abcd", late=True, loaded=True)
    for n in (1, 2, 1000):
        total = torch.zeros(EXTRA, dtype=dtype)
        for _ in range(n):
            total += torch.tensor(alike, dtype=dtype)
        verdict = decode(total.tolist())
        assert verdict.places == {"backward"}
        assert verdict.same_activity
        assert verdict.same_hypers
        assert (verdict.changed, verdict.unchanged, verdict.problem) == (False, True, False)
        assert not verdict.late
        assert not verdict.loaded
        verdict = decode((total + torch.tensor(other, dtype=dtype)).tolist())
        assert verdict.places == {"backward", "step"}
        assert not verdict.same_activity
        assert verdict.same_hypers
        assert all((verdict.changed, verdict.unchanged, verdict.problem, verdict.late, verdict.loaded))
    assert set(PLACES) == {"backward", "unscale_", "clip_grad_norm_", "step"}
