"""Files that are missing, cut, changed, swapped or foreign: found, named, and nothing changed."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import xxhash
from torch import nn

from fastopt.checkpoint import CheckpointError, latest, load, prune, save, steps, verify
from fastopt.checkpoint.contents import rng
from fastopt.checkpoint.format.manifest import from_bytes

from .jobs import Small, adam_job, bits, data_files, everything, train


def job_of(step: int, root: Path) -> Path:
    """Save a job as `step`; its folder."""
    torch.manual_seed(step)
    model, opt, schedule = adam_job(step)
    train(model, opt, schedule)
    return Path(save(root, step=step, model=model, opt=opt, scheduler=schedule))


def refused(root: Path, match: str, step: int | None = None) -> None:
    """Loading raises, and changes nothing."""
    live = adam_job(99)
    before = everything(*live)
    with pytest.raises(CheckpointError, match=match):
        load(root, model=live[0], opt=live[1], scheduler=live[2], step=step)
    assert everything(*live) == before


def test_an_empty_place_has_no_checkpoint(tmp_path: Path) -> None:
    assert latest(tmp_path / "none") is None
    assert steps(tmp_path / "none") == []
    refused(tmp_path / "none", "there is no complete checkpoint at")
    refused(tmp_path, r"step 7 does not exist.*step-00000007/manifest\.json", step=7)


def spoil_missing(file: Path) -> None:
    file.unlink()


def spoil_cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def spoil_longer(file: Path) -> None:
    file.write_bytes(file.read_bytes() + b"\0")


def spoil_empty(file: Path) -> None:
    file.write_bytes(b"")


@pytest.mark.parametrize(
    ("spoil", "match"),
    [
        (spoil_missing, ", which step 2 needs, is missing"),
        (spoil_cut, "bytes instead of"),
        (spoil_longer, "bytes instead of"),
        (spoil_empty, "has 0 bytes"),
    ],
)
def test_a_wrong_size_makes_it_incomplete(spoil: Callable[[Path], None], match: str, tmp_path: Path) -> None:
    job_of(1, tmp_path)
    folder = job_of(2, tmp_path)
    file = data_files(folder)[0]
    spoil(file)
    assert steps(tmp_path) == [1]
    assert latest(tmp_path).step == 1
    refused(tmp_path, rf"{file.name} ?.*{match}", step=2)
    live = adam_job(99)
    assert load(tmp_path, model=live[0], opt=live[1], scheduler=live[2]).step == 1


def test_every_bit_of_the_data_is_covered(tmp_path: Path) -> None:
    folder = job_of(1, tmp_path)
    generator = random.Random(1)
    for file in data_files(folder):
        good = file.read_bytes()
        header = int.from_bytes(good[:8], "little") + 8
        for _ in range(30):
            at, bit = generator.randrange(header, len(good)), generator.randrange(8)
            broken = bytearray(good)
            broken[at] ^= 1 << bit
            file.write_bytes(broken)
            refused(tmp_path, rf"{file.name} is damaged: bytes \d+ to \d+, of '(model|state|rng)/", step=1)
        file.write_bytes(good[: header + 100] + bytes(len(good) - header - 100))
        refused(tmp_path, "is damaged", step=1)
        file.write_bytes(good)
    with pytest.raises(CheckpointError, match=r"damaged-[0-9a-f]{16} says: .*\(`verify` removes the note"):
        load(tmp_path)
    assert verify(tmp_path).sound
    load(tmp_path)


def test_the_header_is_covered_by_the_digest_in_the_manifest(tmp_path: Path) -> None:
    folder = job_of(1, tmp_path)
    for entry in from_bytes((folder / "manifest.json").read_bytes()).files:
        data = (folder / entry.name).read_bytes()
        assert entry.bytes == len(data)
        assert entry.digest == xxhash.xxh3_64_hexdigest(data[: entry.header])
        assert entry.header == int.from_bytes(data[:8], "little") + 8


@pytest.mark.parametrize(
    "data", [b"", b"{}", b"null", b"\x80\x04N.", b'{"digest":"' + b"0" * 16 + b'","format":"fastopt-checkpoint"}']
)
def test_a_broken_manifest_is_passed_over(data: bytes, tmp_path: Path) -> None:
    job_of(1, tmp_path)
    folder = job_of(2, tmp_path)
    (folder / "manifest.json").write_bytes(data)
    assert latest(tmp_path).step == 1
    refused(tmp_path, r"step-00000002/manifest\.json: ", step=2)


def test_checkpoints_under_a_wrong_name_and_foreign_things_are_no_checkpoints(tmp_path: Path) -> None:
    folder = job_of(1, tmp_path)
    shutil.copytree(folder, tmp_path / "step-00000005")
    shutil.copytree(folder, tmp_path / "step-000000001")
    (tmp_path / "step-00000009").write_text("a file")
    (tmp_path / "step-0000000x").mkdir()
    (tmp_path / "other").mkdir()
    assert steps(tmp_path) == [1]
    refused(tmp_path, "it is the manifest of step 1", step=5)


def test_files_of_another_step_do_not_pass_for_its_own(tmp_path: Path) -> None:
    one, two = job_of(1, tmp_path), job_of(2, tmp_path)
    for a, b in zip(data_files(one), data_files(two), strict=True):
        content = a.read_bytes(), b.read_bytes()
        assert len(content[0]) == len(content[1])
        a.write_bytes(content[1])
        b.write_bytes(content[0])
    refused(tmp_path, "is damaged", step=1)
    refused(tmp_path, "is damaged", step=2)


def test_stale_files_beside_are_not_looked_at(tmp_path: Path) -> None:
    folder = job_of(1, tmp_path)
    file = data_files(folder)[0]
    shutil.copy(file, folder / "s-deadbeef-r00003-000.safetensors")
    live = adam_job(99)
    load(tmp_path, model=live[0], opt=live[1], scheduler=live[2])
    assert bits(dict(live[0].state_dict())) == bits(dict(adam_after(1)))


def adam_after(step: int) -> dict[str, torch.Tensor]:
    """The weights that `job_of(step)` saves."""
    torch.manual_seed(step)
    model, opt, schedule = adam_job(step)
    train(model, opt, schedule)
    return model.state_dict()


def test_a_malformed_generator_is_found_before_anything_changes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rng, "capture", lambda: {"python": torch.tensor([91], dtype=torch.uint8)})
    job_of(1, tmp_path)
    refused(tmp_path, "random generator 'python' is malformed")
    monkeypatch.setattr(rng, "capture", lambda: {"dice": torch.tensor([91], dtype=torch.uint8)})
    job_of(2, tmp_path)
    refused(tmp_path, "random generator 'dice' is unknown")


def test_prune_keeps_the_newest_complete_ones(tmp_path: Path) -> None:
    for step in (1, 2, 30, 4):
        job_of(step, tmp_path)
    newest = job_of(100, tmp_path)
    data_files(newest)[0].unlink()
    (tmp_path / "step-00000002" / ".manifest.json.0a1b2c3d").write_text("{")
    (tmp_path / "step-00000001" / "notes.txt").write_text("mine")
    assert prune(tmp_path, keep=2) == [1, 2]
    assert steps(tmp_path) == [4, 30]
    assert prune(tmp_path, keep=1) == [4]
    assert prune(tmp_path, keep=1) == []
    assert latest(tmp_path).step == 30
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000001", "step-00000030", "step-00000100"]
    assert [p.name for p in (tmp_path / "step-00000001").iterdir()] == ["notes.txt"]
    for keep in (0, -1):
        with pytest.raises(ValueError, match="at least 1"):
            prune(tmp_path, keep=keep)


def test_a_half_removed_checkpoint_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastopt.checkpoint.io.storage import LocalStorage

    job_of(1, tmp_path), job_of(2, tmp_path)
    remove = LocalStorage.remove
    gone: list[str] = []

    def dies_after_one(self: LocalStorage, path: str) -> None:
        if gone:
            raise KeyboardInterrupt
        remove(self, path)
        gone.append(path)

    monkeypatch.setattr(LocalStorage, "remove", dies_after_one)
    with pytest.raises(KeyboardInterrupt):
        prune(tmp_path, keep=1)
    assert gone == ["step-00000001/manifest.json"]
    assert steps(tmp_path) == [2]


def test_an_entry_says_what_it_is(tmp_path: Path) -> None:
    folder = job_of(3, tmp_path)
    entry = latest(tmp_path)
    assert (entry.step, entry.url, str(entry), entry.world_size) == (3, str(folder), str(folder), 1)
    assert entry.nbytes == sum(file.stat().st_size for file in data_files(folder))
    assert entry.created == json.loads((folder / "manifest.json").read_text())["created"]


def test_a_failed_save_leaves_nothing_and_the_one_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fastopt.checkpoint.io import storage

    job_of(1, tmp_path)
    monkeypatch.setattr("fastopt.checkpoint.saving.writing.PART_BYTES", 3000)
    written: list[int] = []

    def full(handle: int, views: list[memoryview]) -> None:
        written.append(sum(map(len, views)))
        if sum(written) > 15_000:
            raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(storage, "write", full)
        with pytest.raises(CheckpointError, match="No space left on device"):
            save(tmp_path, step=2, model=nn.Sequential(*(nn.Linear(30, 30) for _ in range(9))))
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
    assert latest(tmp_path).step == 1
    monkeypatch.setattr(storage.LocalStorage, "publish", lambda *_: full(0, [memoryview(bytes(15_000))]))
    with pytest.raises(CheckpointError):
        save(tmp_path, step=2, model=Small())
    assert [p.name for p in tmp_path.iterdir()] == ["step-00000001"]
