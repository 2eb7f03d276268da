"""Checkpoints of every version of the format there has been still load; those of later versions are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import xxhash

from fastopt.checkpoint import CheckpointError, latest, load, prune, save, verify
from fastopt.checkpoint.format.manifest import VERSION

from .fixtures.make import FOLDER, content, job, numbers, states_of

FIXTURES = [*sorted(FOLDER.glob("v*")), *sorted(FOLDER.glob("sharded-v*"))]


def test_there_is_a_fixture_of_every_version() -> None:
    versions = range(1, VERSION + 1)
    assert [path.name for path in FIXTURES] == [f"{kind}v{number}" for kind in ("", "sharded-") for number in versions]


@pytest.mark.parametrize("fixture", FIXTURES, ids=lambda path: path.name)
def test_it_loads_bit_for_bit(fixture: Path, tmp_path: Path) -> None:
    shutil.copytree(fixture, tmp_path / "run")
    torch.manual_seed(99)
    model, opt, scheduler = job()
    found = load(tmp_path / "run", model=model, opt=opt, scheduler=scheduler)
    about = json.loads((fixture / "content.json").read_text())
    assert torch.rand(3).tolist() == about.pop("random")
    states = states_of(model, opt)
    assert numbers(states, opt, scheduler) == about
    assert (found.step, found.extra) == (3, {"note": "\u00e9", "at": 0.1})
    now, wanted = content(model, states), np.load(fixture / "content.npz")
    assert sorted(now) == sorted(wanted)
    for key in wanted:
        assert now[key].tobytes() == wanted[key].tobytes(), key
    assert verify(tmp_path / "run", mark=False).sound


def test_a_newer_version_is_refused_and_never_taken_for_damage(tmp_path: Path) -> None:
    model, opt, _ = job()
    save(tmp_path, step=1, model=model, opt=opt)
    save(tmp_path, step=2, model=model, opt=opt)
    file = tmp_path / "step-00000002" / "manifest.json"
    body = file.read_bytes()[29:].replace(b'"version":1}', f'"version":{VERSION + 1}}}'.encode())
    body = body.replace(b'"version":1,', f'"version":{VERSION + 1},'.encode()).replace(b'"files"', b'"pages"')
    file.write_bytes(b'{"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'",' + body)
    before = sorted(path for path in tmp_path.rglob("*"))
    for call in (
        lambda: load(tmp_path, model=model, opt=opt),
        lambda: load(tmp_path, model=model, opt=opt, step=2),
        lambda: save(tmp_path, step=2, model=model, opt=opt),
        lambda: prune(tmp_path, keep_last=1),
        lambda: latest(tmp_path),
    ):
        with pytest.raises(CheckpointError, match=f"version {VERSION + 1} of the format, .* install a newer one"):
            call()
    assert sorted(path for path in tmp_path.rglob("*")) == before
    load(tmp_path, model=model, opt=opt, step=1)
