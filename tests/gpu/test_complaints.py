"""Complaints about other sharded optimizers, over NCCL on two GPUs: the cases of tests/distributed, placed there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from fastopt.checkpoint import load, save
from fastopt.distributed import shard

from ..distributed import test_complaints as some
from ..distributed import test_more_complaints as more

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


def placed(rank: int, world_size: int, device: str, case: Callable[..., Any], *args: Any) -> Any:
    """Run a case whose models and batches are made on `device`, sharded over its own process group."""
    if device == "cuda":
        torch.cuda.set_device(rank)
    group = dist.new_group(backend="nccl" if device == "cuda" else "gloo")
    patches = {module: {name: on(device, getattr(module, name)) for name in names} for module, names in MADE.items()}
    patches[some]["shard"] = partial(shard, group=group)
    patches[more] |= {name: partial(call, group=group) for name, call in PER_GROUP.items()}
    with mock.patch.multiple(some, **patches[some]), mock.patch.multiple(more, **patches[more]):
        return case(rank, world_size, *args)


MADE = {some: ("Model", "body_and_head", "TiedAndUneven", "batch"), more: ("Model", "layers")}
PER_GROUP: dict[str, Callable[..., Any]] = {"shard": shard, "save": save, "load": load}


def on(device: str, make: Callable[..., Any]) -> Callable[..., Any]:
    """`make`, with what it makes on `device`."""
    return lambda *args, **kwargs: make(*args, **kwargs).to(device)


@pytest.mark.parametrize("name", some.CASES)
def test_complaint(ranks: Any, name: str) -> None:
    ranks(2).run(placed, "cuda", some.CASES[name], timeout=120)


def test_complaints_19_and_20_ranks_that_differ(ranks: Any) -> None:
    for case in (some.hyper_from_local_progress, some.hyper_between_backward_and_step, some.groups_in_another_order):
        (one, other) = ranks(2).run(placed, "cuda", case, timeout=120)
        assert one == other
        assert "rank" in one


@pytest.mark.filterwarnings("ignore:Freezing 3 groups")
def test_a_group_in_which_nothing_trains(ranks: Any) -> None:
    ranks(2).run(placed, "cuda", more.frozen_for, [3, 1, 3, 1], torch.float32, timeout=120)


@pytest.mark.parametrize("case", [more.frozen_state_is_saved, more.resumed_as_it_was], ids=lambda case: case.__name__)
def test_saving_frozen_groups(ranks: Any, tmp_path: Path, case: Callable[..., Any]) -> None:
    ranks(2).run(placed, "cuda", case, str(tmp_path), timeout=120)


def test_saving_brings_no_state_together(ranks: Any, tmp_path: Path) -> None:
    written = ranks(2).run(placed, "cuda", more.saving_moves_nothing, str(tmp_path), timeout=120)
    assert sum(written) == 2 * sum(p.numel() for p in more.Model().parameters())


def test_many_groups_cost_what_one_costs(ranks: Any) -> None:
    one = ranks(2).run(placed, "cuda", more.moved, 1, timeout=120)
    assert one == ranks(2).run(placed, "cuda", more.moved, 120, timeout=120)
    assert set(one[0]) <= {"reduce_scatter", "all_gather", "control"}
    assert {"reduce_scatter", "all_gather"} <= set(one[0])


@pytest.mark.parametrize("case", [more.bytes_moved, more.empty_parts], ids=lambda case: case.__name__)
def test_what_is_moved_and_ranks_without_elements(ranks: Any, case: Callable[..., Any]) -> None:
    ranks(2).run(placed, "cuda", case, timeout=120)
