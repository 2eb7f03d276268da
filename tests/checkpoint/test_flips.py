"""One flipped bit anywhere in a checkpoint; `scripts/torture_checkpoint.py` flips a thousand."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
from torch import nn

from fastopt.checkpoint import CheckpointError, latest, load, prune, save, steps, verify

from ..ranks import run_ranks
from .torture import build, check, fill, flip_rounds, job


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
    assert latest(root) is None
    for file, at in ((files[0], 20), (files[-1], -1)):  # put right again
        data = bytearray(file.read_bytes())
        data[at] ^= 4
        file.write_bytes(data)
    assert latest(root) is None
    assert verify(root, step=2).sound
    assert latest(root).step == 2


def damage(root: Path, step: int) -> None:
    """Flip a bit of the data."""
    file = sorted((root / f"step-{step:08d}").glob("s-*"))[-1]
    data = bytearray(file.read_bytes())
    data[-1] ^= 4
    file.write_bytes(data)


def test_a_step_that_was_found_damaged_is_saved_again(root: Path) -> None:
    damage(root, 2)
    model, opt = job(sharded=False)
    assert load(root, model=model, opt=opt).step == 1
    (skipped,) = load(root, model=model, opt=opt).skipped
    assert re.search(r"damaged-[0-9a-f]{16} says: .*/s-.* is damaged: bytes ", skipped)
    assert steps(root) == [1]
    assert prune(root, keep=1) == []
    with pytest.raises(CheckpointError, match=r"bytes .* do not have the checksum"):
        load(root, model=model, opt=opt, step=2)
    fill(model, opt, 2)
    save(root, step=2, model=model, opt=opt, extra=2)
    assert check(str(root), 2, 2) == 2
    assert verify(root).sound
    with pytest.raises(CheckpointError, match="step 2 is already saved"):
        save(root, step=2, model=model)


def test_nothing_is_taken_from_a_damaged_checkpoint(tmp_path: Path) -> None:
    model = nn.Linear(1024, 1024)
    for number in (1, 2):
        save(tmp_path, step=number, model=model, reuse=False)
    (file,) = (tmp_path / "step-00000002").glob("model-*")
    with file.open("r+b") as opened:
        opened.seek(-1, 2)
        opened.write(b"\x55")
    load(tmp_path, model=model)
    save(tmp_path, step=3, model=model)
    assert verify(tmp_path, step=3).sound
    file.unlink()
    assert load(tmp_path, model=model).step == 3


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
