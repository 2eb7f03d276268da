"""Planning: the numbers against formulas worked out by hand, against enumeration, and against what really happens."""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import fastopt
from fastopt.command import main
from fastopt.distributed import shard
from fastopt.distributed.ownership.fully_shard_rows import REST, Rows, loads_of_rows, units_of
from fastopt.distributed.ownership.layout import Layout
from fastopt.distributed.ownership.places import ParamSpec
from fastopt.distributed.plan import plan, plan_specs, report
from fastopt.distributed.planning.costs import Memory, Plan
from fastopt.distributed.planning.decoder import decoder
from fastopt.distributed.planning.drawing import owner_of

from .problems import EVERY, Model, feed
from .test_layout import kinds, param_lists, sizes

few = st.sampled_from([1, 2, 3, 7, 64])


@settings(max_examples=60, deadline=None)
@given(param_lists(), few, kinds, sizes)
def test_loads_of_all_ranks_are_those_of_each(params: list[ParamSpec], n: int, kind: str, bucket_bytes: int) -> None:
    layout = Layout.make(kind, params, n, bucket_bytes)
    assert layout.loads() == [layout.elements(rank) for rank in range(n)]
    weights = [i + 1 for i in range(len(params))]
    counted = [0] * n
    for rank in range(n):
        for i, weight in enumerate(weights):
            start, stop = layout.interval(i, rank)
            counted[rank] += weight * (stop - start)
    assert layout.loads(weights) == counted


@settings(max_examples=60, deadline=None)
@given(param_lists(), few)
def test_rows_are_cut_as_torch_cuts_them(params: list[ParamSpec], n: int) -> None:
    counted = [0] * n
    for spec in params:
        for rank, chunk in enumerate(torch.empty(spec.shape or (1,), device="meta").chunk(n)):
            counted[rank] += chunk.numel()
    assert loads_of_rows(params, n) == counted


def owners_one_by_one(params: list[ParamSpec], n: int) -> list[int]:
    """Longest first within each group, always looking at all ranks."""
    total = [0] * n
    owners: dict[int, int] = {}
    for group in sorted({p.group for p in params}):
        heap = [(0, load, rank) for rank, load in enumerate(total)]
        heapq.heapify(heap)
        members = [i for i, p in enumerate(params) if p.group == group]
        for i in sorted(members, key=lambda i: (-params[i].numel, i)):
            in_group, _, rank = heapq.heappop(heap)
            owners[i] = rank
            total[rank] += params[i].numel
            heapq.heappush(heap, (in_group + params[i].numel, total[rank], rank))
    return [owners[i] for i in range(len(params))]


@settings(max_examples=60, deadline=None)
@given(param_lists(), few)
def test_owners_are_found_without_looking_at_every_rank(params: list[ParamSpec], n: int) -> None:
    layout = Layout.whole(params, n)
    assert [layout.owner(i) for i in range(len(params))] == owners_one_by_one(params, n)


# ---- numbers


def two_layers() -> nn.Module:
    with torch.device("meta"):
        return nn.Sequential(nn.Linear(8, 16, bias=False), nn.Linear(16, 4, bias=False))


def test_a_plan_by_hand() -> None:
    # 128 and 64 elements in one bucket: 768 bytes, 192 per rank; Adam keeps 8 bytes for each element.
    found = plan(two_layers(), 4, lambda params: fastopt.Adam(params))
    first, second, third = found.stages
    assert first.memory == Memory(parameters=768, gradients=768, state=384, passing=0)
    assert second.memory == Memory(parameters=768, gradients=192, state=384, passing=2 * 768)
    # Units of 512 and 256 bytes, each alive twice as parameters or gradients.
    assert third.memory == Memory(parameters=192, gradients=192, state=384, passing=2 * 768)
    assert [stage.sent for stage in found.stages] == [3 * 576, 2 * 576, 3 * 576]
    assert [stage.collectives for stage in found.stages] == [2, 2, 6]
    assert [stage.imbalance for stage in found.stages] == [1, 1, 1]
    assert (first.sizes, third.sizes) == ((768,), (512, 256))
    assert found.elements == 192


def test_rows_that_do_not_divide_leave_ranks_without_work() -> None:
    with torch.device("meta"):
        model = nn.Linear(8, 10, bias=False)
    (stage,) = plan(model, 8, stages=[3]).stages
    # torch.chunk makes rows of two: five ranks have some.
    assert stage.elements == (16, 16, 16, 16, 16, 0, 0, 0)
    assert stage.imbalance == pytest.approx(16 / 10)
    assert stage.idle == 3
    # One unit, whose parameters stay gathered between forward and backward.
    assert stage.sent == 2 * (8 * 16 * 4) * 7 // 8


def test_units_are_blocks_and_the_rest() -> None:
    names = ["embed.weight", "layers.0.q.weight", "layers.0.norms.1.weight", "layers.1.q.weight", "out.weight"]
    units = units_of([ParamSpec(name, (4,), torch.float32, 0) for name in names])
    assert [(unit.name, unit.params) for unit in units] == [
        ("layers.0", (1, 2)),
        ("layers.1", (3,)),
        (REST, (0, 4)),
    ]
    assert Rows.of(ParamSpec("scale", (), torch.float32, 0), 4) == Rows(1, 1, 1)


def test_states_come_from_the_chain_itself() -> None:
    def bytes_of(make: Callable[[Any], fastopt.Optimizer]) -> float:
        return plan(two_layers(), 2, make).state_bytes[0]

    assert bytes_of(lambda p: fastopt.SGD(p, lr=0.1)) == 0
    assert bytes_of(lambda p: fastopt.SGD(p, lr=0.1, mom=0.9)) == 4
    assert bytes_of(lambda p: fastopt.ranger(p)) == 12
    low = two_layers().bfloat16()
    assert plan(low, 2, lambda p: fastopt.Adam(p)).state_bytes[0] == 4
    assert plan(low, 2, lambda p: fastopt.Adam(p, master_weights=True)).state_bytes[0] == 4 + 8
    torchs = plan(two_layers(), 2, lambda p: fastopt.OptimWrapper(p, opt=torch.optim.AdamW))
    assert torchs.state_bytes[0] == 8 + 4 / 128  # and a step count of four bytes
    assert torchs.layout.kind == "whole"
    assert torchs.optimizer == "AdamW"
    with pytest.raises(ValueError, match=r"Adafactor.*plan_specs"):
        plan(two_layers(), 2, lambda p: fastopt.OptimWrapper(p, opt=torch.optim.Adafactor))


@pytest.mark.parametrize("ranks", [1024, 16384])
def test_a_large_model_on_many_ranks(ranks: int) -> None:
    model = decoder(70e9, torch.bfloat16)
    found = plan(model, ranks)
    assert found.elements == sum(p.numel() for p in model.parameters())
    assert abs(found.elements / 70e9 - 1) < 0.02
    even = found.stages[1]
    assert even.memory.state >= 4 * found.elements // ranks
    assert even.imbalance < 1.01
    assert sum(even.elements) == sum(found.stages[2].elements) == found.elements
    assert plan(model, ranks, stages=[2], layout="whole").stages[0].idle == max(0, ranks - 687)


def test_nothing_to_plan() -> None:
    with pytest.raises(ValueError, match="no parameters"):
        plan_specs([], 4, [])


# ---- what really happens


def held_really(rank: int, world_size: int, name: str) -> tuple[int, list[int], Plan]:
    model = Model()
    opt = shard(EVERY[name](model.param_groups()), model, bucket_bytes=100)
    feed(opt, 2, 0, rank, world_size)
    opt.step()
    sizes = [flat.flat.nbytes for flat in opt._buffers.buckets]
    found = plan(model, world_size, lambda _: EVERY[name](model.param_groups()), bucket_bytes=100)
    shaped = [v for p, entry in opt.state.items() for v in entry.values() if torch.is_tensor(v) and v.ndim]
    return sum(v.nbytes for v in shaped), sizes, found


@pytest.mark.parametrize("name", ["adam", "ranger", "sgd"])
def test_the_plan_is_what_shard_does(ranks: Any, name: str) -> None:
    told = ranks(3).run(held_really, name)
    found = told[0][2]
    assert max(held for held, _, _ in told) == found.stages[1].memory.state
    assert all(sizes == list(found.stages[1].sizes) for _, sizes, _ in told)


# ---- the command


def called(*arguments: str) -> tuple[int, str, str]:
    """Exit code and both streams of `fastopt plan`."""
    done = CliRunner().invoke(main, ["plan", *arguments], prog_name="fastopt")
    return done.exit_code, done.stdout, done.stderr


def test_the_command_prints_and_draws(tmp_path: Path) -> None:
    picture = tmp_path / "owners.png"
    code, out, _ = called("--params", "1e6", "--ranks", "4", "--groups", "2", "--plot", str(picture))
    assert code == 0
    assert "2 groups, on 4 ranks" in out
    assert "|000000000000111111111111222222222222333333333333|" in out
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_the_command_as_json() -> None:
    code, out, _ = called("--params", "1e6", "--ranks", "100", "--optimizer", "AdamW", "--stage", "2", "--json")
    assert code == 0
    told = json.loads(out)
    assert told["ranks"] == 100
    (stage,) = told["stages"]
    assert (stage["stage"], stage["layout"]) == (2, "whole")
    assert stage["memory"]["total"] == sum(v for k, v in stage["memory"].items() if k != "total")


def test_a_model_of_your_own() -> None:
    code, out, _ = called("--model", f"{__name__}:two_layers", "--ranks", "2", "--optimizer", "Lookahead")
    assert code == 0
    assert "192 parameters in 2 tensors" in out


def test_the_owner_in_the_picture_is_the_owner_in_the_layout() -> None:
    params = [ParamSpec(f"p{i}", (7, i + 1), torch.float32, i % 2) for i in range(6)]
    for kind in ("even", "whole"):
        layout = Layout.make(kind, params, 3, 200)
        for i in range(len(params)):
            bucket, entry = layout.place(i)
            for rank in range(3):
                start, stop = layout.interval(i, rank)
                assert {owner_of(bucket, entry.start + e) for e in range(start, stop)} <= {rank}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--params", "1e6", "--ranks", "0"], "0 is not in the range"),
        (["--params", "3", "--ranks", "2"], "is not in the range 10000.0<=x"),
        (["--params", "1e6", "--ranks", "2", "--dtype", "nn"], "--dtype nn"),
        (["--params", "1e6", "--ranks", "2", "--optimizer", "Nadamax"], "--optimizer Nadamax"),
        (["--params", "1e6", "--ranks", "2", "--groups", "99"], "99 groups"),
        (["--model", "tests", "--ranks", "2"], "expected MODULE:FUNCTION"),
        (["--model", "torch:zeros", "--ranks", "2"], "torch:zeros"),
        (["--params", "1e6", "--model", "tests:nothing", "--ranks", "2"], "--params or --model"),
        (["--model", "tests:nothing", "--ranks", "2", "--groups", "2"], "--groups goes with --params"),
        (["--params", "1e6", "--ranks", "2", "--plot", "owners.xyz"], "cannot draw owners.xyz"),
        (["--model", "torch:get_rng_state", "--ranks", "2"], "not a torch.nn.Module"),
        (["--model", "tests:nothing", "--ranks", "2"], "nothing"),
    ],
)
def test_wrong_arguments(arguments: list[str], says: str) -> None:
    code, out, errors = called(*arguments)
    assert (code, out) == (2, "")
    assert says in errors.splitlines()[-1]


def test_the_report_of_many_ranks_has_no_bars_of_digits() -> None:
    text = "\n".join(report(plan(two_layers(), 100)))
    assert "16 B each" in text
    assert "rank 99 owns" in text
