"""Which checkpoints stay, and that leftovers of dead saves go while those of running ones do not."""

from __future__ import annotations

import os
import time
import uuid
from datetime import timedelta
from pathlib import Path

import fsspec
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from fastopt import Adam
from fastopt.checkpoint import load, prune, save, steps, verify
from fastopt.checkpoint.catalog import look, note_damage, verified_mark
from fastopt.checkpoint.io.storage import open_storage
from fastopt.checkpoint.retention import plan_prune, stay

from .jobs import Small, data_files, train

HOUR = 3600.0


def save_steps(root: str | Path, *numbers: int) -> None:
    """A small checkpoint of every step."""
    for number in numbers:
        save(root, step=number, model=nn.Linear(2, 2), extra=number)


def mark(root: str | Path, step: int) -> None:
    """Note that a step was verified."""
    storage = open_storage(root)
    storage.publish(f"step-{step:08d}/{verified_mark(look(storage, step).data)}", b"{}")


def left_behind(root: Path, step: int, save_id: str, hours: float, ranks: int = 2) -> list[Path]:
    """Data files of a save that never published its manifest; rank 0's are the oldest."""
    folder = root / f"step-{step:08d}"
    folder.mkdir(exist_ok=True)
    made = []
    for rank in range(ranks):
        file = folder / f"s-{save_id}-r{rank:05d}-000.safetensors"
        file.write_bytes(b"part")
        when = time.time() - (hours + ranks - 1 - rank) * HOUR
        os.utime(file, (when, when))
        made.append(file)
    return made


@pytest.mark.parametrize(
    ("have", "last", "every", "verified", "kept"),
    [
        ([1, 2, 3, 4], 2, None, [], [3, 4]),
        ([1, 2, 3, 4], 9, None, [], [1, 2, 3, 4]),
        ([100, 200, 300, 400, 500], 1, 200, [], [200, 400, 500]),
        ([0, 300, 600, 900, 1200, 1500, 2400], 1, 1000, [], [0, 1200, 2400]),
        ([1, 2, 3, 4], 1, None, [2], [2, 4]),
        ([1, 2, 3, 4], 1, None, [1, 4], [4]),
        ([], 1, 5, [], []),
    ],
)
def test_what_stays(have: list[int], last: int, every: int | None, verified: list[int], kept: list[int]) -> None:
    assert sorted(stay(have, last, every, verified, {}, [])) == kept


def test_what_is_used_by_what_stays_stays() -> None:
    needs = {1: {1}, 2: {2}, 3: {1, 3}, 4: {4}, 5: {3, 5}, 7: {2, 7}}
    assert stay([1, 2, 3, 4, 5], 1, None, [], needs, [7]) == {
        7: "not complete, left alone",
        5: "the newest",
        2: "step 7 uses its files",
        3: "step 5 uses its files",
        1: "step 3 uses its files",
    }


@given(st.data())
def test_nothing_needed_goes(data: st.DataObject) -> None:
    have = sorted(data.draw(st.sets(st.integers(0, 60), min_size=1)))
    verified = [step for step in have if data.draw(st.booleans())]
    needs = {step: {step, data.draw(st.sampled_from([s for s in have if s <= step]))} for step in have}
    last, every = data.draw(st.integers(1, 5)), data.draw(st.one_of(st.none(), st.integers(1, 20)))
    kept = set(stay(have, last, every, verified, needs, []))
    assert set(have[-last:]) <= kept <= set(have)
    assert not verified or verified[-1] in kept
    assert all(needs[step] <= kept for step in kept)
    if every:
        assert {step for step in have if step % every == 0} <= kept
    for earlier in range(len(have)):  # what is kept for good does not change its mind: pruned after each save, the same
        alive: list[int] = []
        for step in have[: earlier + 1]:
            alive = sorted(stay([*alive, step], last, every, [], {}, []))
        assert alive == sorted(stay(have[: earlier + 1], last, every, [], {}, []))


def test_prune_with_a_policy(tmp_path: Path) -> None:
    save_steps(tmp_path, 100, 200, 300, 400, 500)
    mark(tmp_path, 100)
    assert prune(tmp_path, keep_last=1, keep_every=200) == [300]
    assert steps(tmp_path) == [100, 200, 400, 500]
    mark(tmp_path, 400)
    assert prune(tmp_path, keep_last=1) == [100, 200]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-00000400", "step-00000500"]
    assert load(tmp_path).extra == 500


def test_a_mark_is_of_one_manifest_only(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2)
    (tmp_path / "step-00000001" / "verified-0123456789abcdef").write_text("{}")
    assert not look(open_storage(tmp_path), 1).verified
    mark(tmp_path, 1)
    assert look(open_storage(tmp_path), 1).verified
    assert prune(tmp_path, keep=1) == []


def test_a_load_that_has_read_everything_counts_as_verified(tmp_path: Path) -> None:
    model = Small()
    opt = Adam(model.named_parameters(), lr=0.1)
    train(model, opt)
    for step in (1, 2, 3, 4):
        save(tmp_path, step=step, model=model, opt=opt, reuse=False)
    load(tmp_path, step=1, model=model, opt=opt)
    load(tmp_path, step=2, model=model, rng=False)
    file = data_files(tmp_path / "step-00000003")[0]
    data = bytearray(file.read_bytes())
    data[20] ^= 4  # in the header, which loading does not need
    file.write_bytes(data)
    load(tmp_path, step=3, model=model, opt=opt)
    found = {step: look(open_storage(tmp_path), step).verified for step in steps(tmp_path)}
    assert found == {1: True, 2: False, 3: False, 4: False}
    assert prune(tmp_path, keep_last=1) == [2, 3]


def test_an_incomplete_one_neither_counts_nor_goes(tmp_path: Path) -> None:
    save_steps(tmp_path, 1, 2, 3)
    next((tmp_path / "step-00000003").glob("*.safetensors")).write_bytes(b"")
    assert prune(tmp_path, keep_last=1, grace=0) == [1]
    assert steps(tmp_path) == [2]
    assert len(list((tmp_path / "step-00000003").iterdir())) >= 2


@pytest.mark.parametrize("how", ["noted", "cut", "missing"])
def test_what_a_damaged_one_uses_stays(how: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastopt.checkpoint.saving.writing.LEAST_REUSED", 100)
    storage, model, other = open_storage(tmp_path), nn.Linear(40, 10), nn.Linear(40, 10)
    save(tmp_path, step=1, model=model)
    torch.rand(1)  # the random generator moves on, the weights do not
    save(tmp_path, step=2, model=model)
    assert {file.step for file in look(storage, 2).raise_problem().files} == {1, 2}
    if how == "noted":  # of one bad block in one bad moment: the data may be sound
        note_damage(storage, 2, look(storage, 2).data, "a block")
    else:
        (file,) = data_files(tmp_path / "step-00000002")
        file.write_bytes(b"") if how == "cut" else file.unlink()
    for step in (3, 4):
        save(tmp_path, step=step, model=other, reuse=False)
    assert plan_prune(storage, 1).reasons[1] == "step 2 uses its files"
    assert prune(tmp_path, keep_last=1, grace=0) == [3]
    assert steps(tmp_path) == [1, 4]
    if how == "noted":
        assert verify(tmp_path, step=2).sound


def test_leftovers_go_after_a_grace_time_whole_saves_together(tmp_path: Path) -> None:
    save_steps(tmp_path, 5)
    old = left_behind(tmp_path, 4, "00000001", hours=7)
    old += left_behind(tmp_path, 5, "00000002", hours=7)
    running = left_behind(tmp_path, 6, "00000003", hours=5.9)
    running += left_behind(tmp_path, 4, "00000004", hours=0.1, ranks=9)  # a slow one: its first files are old
    mine = tmp_path / "step-00000005" / "notes.txt"
    mine.write_text("mine")
    os.utime(mine, (1, 1))
    plan = plan_prune(open_storage(tmp_path), 1)
    assert plan.steps == ()
    assert [tmp_path / path for path in plan.leftovers] == old
    assert prune(tmp_path, keep=1) == []
    assert [file for file in [*old, *running, mine] if file.exists()] == [*running, mine]
    assert load(tmp_path).extra == 5
    assert prune(tmp_path, keep=1, grace=0.01) == []
    assert not (tmp_path / "step-00000006").exists()
    assert not (tmp_path / "step-00000004").exists()


def test_ages_are_by_the_clock_of_the_storage(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    files = left_behind(tmp_path, 2, "00000001", hours=1)
    for file in tmp_path.rglob("*.*"):  # a storage whose clock is three days behind
        when = file.stat().st_mtime - 72 * HOUR
        os.utime(file, (when, when))
    prune(tmp_path, keep=1)
    assert all(file.exists() for file in files)


def test_a_clock_that_has_jumped_makes_no_running_save_old(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    files = left_behind(tmp_path, 2, "00000001", hours=1)
    for file in (tmp_path / "step-00000001").iterdir():  # saved while the clock was a day ahead
        os.utime(file, (time.time() + 24 * HOUR,) * 2)
    prune(tmp_path, keep=1)
    assert all(file.exists() for file in files)


def test_leftovers_beside_a_broken_manifest_are_left_alone(tmp_path: Path) -> None:
    save_steps(tmp_path, 1)
    files = left_behind(tmp_path, 2, "00000001", hours=100)
    (tmp_path / "step-00000002" / "manifest.json").write_text("{}")
    prune(tmp_path, keep=1)
    assert all(file.exists() for file in files)


def test_in_memory() -> None:
    root = f"memory://{uuid.uuid4()}/run"
    save_steps(root, 1, 2, 3)
    storage = open_storage(root)
    storage.make_folder("step-00000009")
    storage.create("step-00000009/s-00000001-r00000-000.safetensors", [b"1"])
    assert prune(root, keep=1) == [1, 2]
    assert set(storage.sizes("")) == {"step-00000003", "step-00000009"}
    fs = fsspec.filesystem("memory")
    fs.store[next(path for path in fs.store if "00000001-r" in path)].created -= timedelta(days=1)
    prune(root, keep=1)
    assert set(storage.sizes("")) == {"step-00000003"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "keep_last"),
        ({"keep": 1, "keep_last": 1}, "keep_last"),
        ({"keep_last": 0}, "at least 1"),
        ({"keep": 1, "keep_every": 0}, "keep_every"),
    ],
)
def test_mistakes_are_named(arguments: dict[str, int], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        prune(tmp_path, **arguments)
