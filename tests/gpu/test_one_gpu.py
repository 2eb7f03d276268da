"""Two ranks that share one GPU: streams, events and kernels of sharded steps, where there is no second GPU.

NCCL refuses two ranks on a GPU. Gloo does not, and copies between the ranks' symmetric memory go where PyTorch is told
that this is meant: the cases of the modules for two GPUs, over both.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import pytest
import torch

from fastopt.distributed import shard

from ..distributed import test_complaints as some
from ..distributed import test_more_complaints as more
from ..distributed.problems import EVERY
from ..distributed.test_stress import anything
from ..ranks import RankPool
from . import test_nccl, test_overlap
from .test_complaints import MADE, on

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")

STEPS = 200
over_both = pytest.mark.parametrize("transport", ["copy", None], ids=["copies", "gloo"])


@pytest.fixture(scope="module")
def both() -> Iterator[RankPool]:
    with RankPool(2, env={"TORCH_SYMM_MEM_ALLOW_OVERLAPPING_DEVICES": "1"}) as pool:
        yield pool


def take_the_gpu(rank: int) -> None:
    """The group is the default one then, which is of Gloo."""
    torch.cuda.set_device(0)


def borrowed(module: ModuleType, name: str, rank: int, world_size: int, transport: str | None, *args: Any) -> Any:
    """Run a case of another module."""
    changed = {"on_gpus": take_the_gpu, "shard": partial(shard, transport=transport)}
    with mock.patch.multiple(module, **changed):  # type: ignore[arg-type]
        return getattr(module, name)(rank, world_size, *args)


def of_nccl(rank: int, world_size: int, name: str, transport: str | None, *args: Any) -> Any:
    return borrowed(test_nccl, name, rank, world_size, transport, *args)


def of_overlap(rank: int, world_size: int, name: str, transport: str | None, *args: Any) -> Any:
    return borrowed(test_overlap, name, rank, world_size, transport, *args)


@over_both
def test_every_optimizer(both: RankPool, transport: str | None) -> None:
    assert both.run(of_nccl, "every_optimizer", transport, timeout=200) == [2 * len(EVERY)] * 2


@over_both
def test_backward_with_clipping(both: RankPool, transport: str | None) -> None:
    assert max(both.run(of_nccl, "backward_and_clip", transport, timeout=120)) < 1e-4


@over_both
def test_checkpoint(both: RankPool, transport: str | None, tmp_path: Path) -> None:
    assert both.run(of_nccl, "saved_and_resumed", transport, str(tmp_path), timeout=120) == [True, True]


@over_both
def test_freezing_with_overlap_equals_one_process(both: RankPool, transport: str | None) -> None:
    assert max(both.run(of_overlap, "against_one_process", transport, timeout=120)) < 1e-4


@over_both
def test_stepping_in_backward_gives_the_same_bits(both: RankPool, transport: str | None) -> None:
    both.run(of_overlap, "in_backward", transport, timeout=120)


@over_both
def test_grad_scaler(both: RankPool, transport: str | None) -> None:
    assert both.run(of_overlap, "scaled", transport, timeout=120) == [[2.0**10, 2.0**10, 2.0**9, 2.0**9]] * 2


@over_both
def test_two_runs_are_the_same(both: RankPool, transport: str | None) -> None:
    for first, second in both.run(of_overlap, "deterministic", transport, timeout=120):
        assert all(map(torch.equal, first, second))


@over_both
def test_compiled_models(both: RankPool, transport: str | None) -> None:
    for told in both.run(of_overlap, "compiled", transport, timeout=280):
        assert max(told.values()) < 1e-2, told


def stress(rank: int, world_size: int, name: str, transport: str | None, seed: int) -> None:
    take_the_gpu(rank)
    anything(rank, world_size, name, seed, STEPS, {"transport": transport}, "cuda")


@over_both
@pytest.mark.parametrize(("name", "seed"), [("adam", 29), ("ranger", 31)])
def test_anything(both: RankPool, name: str, seed: int, transport: str | None) -> None:
    both.run(stress, name, transport, seed, timeout=280)


def placed(rank: int, world_size: int, transport: str | None, case: Callable[..., Any], *args: Any) -> Any:
    """Run a case whose models and batches are made on the GPU."""
    take_the_gpu(rank)
    with ExitStack() as stack:
        for module, names in MADE.items():
            changed: dict[str, Any] = {name: on("cuda", getattr(module, name)) for name in names}
            stack.enter_context(mock.patch.multiple(module, **changed, shard=partial(shard, transport=transport)))
        return case(rank, world_size, *args)


@over_both
@pytest.mark.parametrize("name", some.CASES)
def test_complaint(both: RankPool, transport: str | None, name: str) -> None:
    both.run(placed, transport, some.CASES[name], timeout=120)


@over_both
@pytest.mark.parametrize("case", [more.frozen_state_is_saved, more.resumed_as_it_was], ids=lambda case: case.__name__)
def test_saving_frozen_groups(both: RankPool, transport: str | None, tmp_path: Path, case: Callable[..., Any]) -> None:
    both.run(placed, transport, case, str(tmp_path), timeout=120)
