"""One flipped bit anywhere in a checkpoint; `scripts/torture_checkpoint.py` flips a thousand."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from fastopt.checkpoint import CheckpointError, latest, load, prune, steps, verify

from ..ranks import run_ranks
from .torture import build, flip_rounds


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    tally = flip_rounds(str(tmp_path), flips=60, seed=2)
    found = {region: {outcome for r, outcome in tally if r == region} for region, _ in tally}
    refused, unneeded = "loading refused, verify found it", "not needed for loading, verify found it"
    assert found.pop("data") in ({refused}, {refused, unneeded})  # the generators of a rank that is not there now
    assert found == {"manifest": {refused}, "header": {unneeded}, "index": {unneeded}}


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """Steps 1 and 2 of two ranks."""
    run_ranks(build, 2, str(tmp_path))
    return tmp_path


def test_verify_names_every_damage_and_notes_what_is_sound(root: Path) -> None:
    seen: list[tuple[int, int]] = []
    report = verify(root, progress=lambda done, total: seen.append((done, total)))
    folder = root / "step-00000002"
    files = sorted(folder.glob("*.safetensors"))
    total = sum(file.stat().st_size for file in files)
    assert (report.step, report.url, report.files, report.nbytes, report.sound) == (
        2,
        str(folder),
        len(files),
        total,
        True,
    )
    assert seen[-1] == (total, total)
    assert len(list(folder.glob("verified-*"))) == 1
    assert prune(root, keep=1) == [1]
    for file, at in ((files[0], 20), (files[-1], -1)):
        data = bytearray(file.read_bytes())
        data[at] ^= 4
        file.write_bytes(data)
    broken = verify(root, step=2)
    assert len(broken.problems) == 2
    assert f"{files[0]}: the header" in broken.problems[0]
    assert "of 'state/" in broken.problems[1]
    assert f"{files[-1]}: bytes " in broken.problems[1]
    assert latest(root).step == 2


def test_verify_of_an_incomplete_one_is_a_problem_and_of_none_an_error(root: Path) -> None:
    next((root / "step-00000001").glob("s-*")).unlink()
    (problem,) = verify(root, step=1).problems
    assert "is missing" in problem
    assert verify(root).step == 2
    for step in (7, None):
        with pytest.raises(CheckpointError, match=r"manifest\.json|no complete"):
            verify(root if step else root / "none", step=step)
    (root / "step-00000002" / "model.safetensors.index.json").unlink()
    (problem,) = verify(root).problems
    assert "index" in problem
    assert "only programs of others" in problem


def test_stale_files_of_another_world_size_are_not_looked_at(root: Path) -> None:
    one, two = root / "step-00000001", root / "step-00000002"
    for file in one.glob("*.safetensors"):
        for rank in range(5):
            shutil.copy(file, two / f"s-deadbeef-r{rank:05d}-000.safetensors")
    assert verify(root).sound
    assert load(root).extra == 2
    assert steps(root) == [1, 2]
