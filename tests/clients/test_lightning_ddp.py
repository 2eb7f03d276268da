"""Lightning's Trainer with sharded optimizers on two ranks of torchrun."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from ..commands import ROOT, torchrun
from .lightning_job import train

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec.*:FutureWarning"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the ranks have left their results."""
    path = tmp_path_factory.mktemp("ranks")
    torchrun(2, ROOT / "tests" / "clients" / "lightning_job.py", path, timeout=240)
    return path


def ends(folder: Path, stage: int) -> list[Any]:
    return [torch.load(folder / f"{stage}-{rank}.pt") for rank in range(2)]


@pytest.mark.parametrize("stage", [1, 2])
def test_equal_to_one_process(stage: int, folder: Path, tmp_path: Path) -> None:
    alone = train(0, tmp_path, 1).state_dict()
    first, second = ends(folder, stage)
    for name, value in alone.items():
        assert torch.equal(first["whole"][name], second["whole"][name])
        torch.testing.assert_close(first["whole"][name], value, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_resumes_bit_for_bit(stage: int, folder: Path) -> None:
    for end in ends(folder, stage):
        for name, value in end["whole"].items():
            assert torch.equal(end["resumed"][name], value), name


@pytest.mark.parametrize("stage", [1, 2])
def test_a_checkpoint_is_whole_and_resumes_in_one_process(stage: int, folder: Path, tmp_path: Path) -> None:
    start = folder / "whole" / f"{stage}-epoch=1.ckpt"
    (saved,) = torch.load(start, weights_only=True)["optimizer_states"]
    assert [saved["state"][i]["grad_avg"].shape for i in range(4)] == [(6, 4), (6,), (2, 6), (2,)]
    resumed = train(0, tmp_path, 1, start=start).state_dict()
    for name, value in ends(folder, stage)[0]["whole"].items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=1e-5)
