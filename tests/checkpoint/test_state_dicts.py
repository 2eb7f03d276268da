"""State dicts by themselves: saved as they are, opened without being read, loaded by whoever holds a part of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from fastopt import Adam, checkpoint
from fastopt.checkpoint import CheckpointError
from fastopt.checkpoint.loading import reading
from fastopt.distributed import shard

from ..ranks import RankPool
from .jobs import Small, bits, data_files, everything, groups_of, train

Ranks = Callable[[int], RankPool]


def sharded(seed: int = 0) -> tuple[Small, Any]:
    """A sharded job of two groups."""
    model = Small(seed)
    return model, shard(Adam(groups_of(model), lr=slice(1e-3, 1e-2)), model)


def save_and_open(rank: int, world: int, root: str) -> Any:
    """Save the state dict of a sharded optimizer and load it into another."""
    model, opt = sharded()
    train(model, opt)
    assert {name for name, _, _ in opt.state_dict().params} == {name for name, _ in model.named_parameters()}
    place = checkpoint.save(opt.state_dict(), root)
    other_model, other = sharded(1)
    other.load_state_dict(checkpoint.open(root))
    held = [bits(dict(opt.state[p])) for p in model.parameters()]
    assert [bits(dict(other.state[p])) for p in other_model.parameters()] == held
    assert other.hypers == opt.hypers
    return place.rsplit("/", 1)[1], held


def open_elsewhere(rank: int, world: int, root: str) -> Any:
    """Load it on another number of ranks; all of the state, brought together."""
    _, opt = sharded(2)
    opt.load_state_dict(checkpoint.open(root))
    opt.consolidate_state_dict()
    return bits(opt.state_dict()["state"]) if rank == 0 else None


def test_a_sharded_state_dict_is_saved_and_opened_by_itself(ranks: Ranks, tmp_path: Path) -> None:
    assert {place for place, _ in ranks(2).run(save_and_open, str(tmp_path))} == {"step-00000000"}
    alone = checkpoint.open(tmp_path)
    assert list(alone) == ["state", "param_groups"]
    assert ranks(3).run(open_elsewhere, str(tmp_path))[0] == bits(alone["state"])
    plain_model = Small(3)
    plain = Adam([[(n, p) for n, p in plain_model.named_parameters() if (n[:4] == "body") is b] for b in (True, False)])
    plain.load_state_dict(alone)
    assert bits(plain.state_dict()["state"]) == bits(alone["state"])
    with pytest.raises(CheckpointError, match="parameters missing"):
        Adam([("other", nn.Parameter(torch.ones(2)))]).load_state_dict(alone)


def test_any_optimizer_of_torch_loads_it(tmp_path: Path) -> None:
    model = Small()
    opt = torch.optim.AdamW(model.parameters(), lr=0.1, amsgrad=True)
    train(model, opt)
    checkpoint.save(opt.state_dict(), tmp_path)
    train(model, opt)
    checkpoint.save(opt.state_dict(), tmp_path)
    assert checkpoint.steps(tmp_path) == [0, 1]
    other = torch.optim.AdamW(Small(1).parameters(), lr=0.2)
    other.load_state_dict(checkpoint.open(tmp_path))  # type: ignore[arg-type]
    assert everything(opt=other) == everything(opt=opt)
    ours = Adam(model.parameters(), lr=0.1)
    train(model, ours)
    checkpoint.save(ours.state_dict(), tmp_path / "ours", step=7, extra=1)
    same = Adam(Small(1).parameters(), lr=0.3)
    same.load_state_dict(checkpoint.open(tmp_path / "ours", step=7))
    assert everything(opt=same) == everything(opt=ours)


def test_a_model_is_read_tensor_by_tensor(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Small()
    checkpoint.save(model.state_dict(), tmp_path)
    read: list[str] = []
    original = reading.read

    def noted(storage: Any, manifest: Any, wanted: Any) -> None:
        read.extend(want.key for want in wanted)
        original(storage, manifest, wanted)

    monkeypatch.setattr("fastopt.checkpoint.loading.opening.read", noted)
    opened = checkpoint.open(tmp_path)
    assert set(opened) == set(model.state_dict())
    assert read == []
    assert torch.equal(opened["narrow"], model.narrow)
    assert read == ["model/narrow"]
    other = Small(1)
    other.load_state_dict(opened)
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))


def test_both_are_found_in_a_checkpoint_of_a_job(tmp_path: Path) -> None:
    model = Small()
    opt = Adam([(n, p) for n, p in model.named_parameters()], lr=0.1)
    train(model, opt)
    place = checkpoint.save(tmp_path, step=4, model=model, opt=opt)
    opened = checkpoint.open(tmp_path)
    other = Small(1)
    fresh = Adam([(n, p) for n, p in other.named_parameters()], lr=0.2)
    other.load_state_dict(opened["model"])
    fresh.load_state_dict(opened["opt"])
    assert everything(other, fresh) == everything(model, opt)
    states = next(file for file in data_files(place) if file.name.startswith("s-"))
    data = bytearray(states.read_bytes())
    data[5000] ^= 1
    states.write_bytes(data)
    before = everything(other, fresh)
    with pytest.raises(CheckpointError, match="is damaged"):
        fresh.load_state_dict(checkpoint.open(tmp_path)["opt"])
    assert everything(other, fresh) == before


def test_calls_that_mix_both_forms_are_refused(tmp_path: Path) -> None:
    for call in (
        lambda: checkpoint.save({}, model=nn.Linear(1, 1)),  # type: ignore[call-overload]
        lambda: checkpoint.save(tmp_path, tmp_path, step=1),  # type: ignore[call-overload]
    ):
        with pytest.raises(TypeError):
            call()
    with pytest.raises(CheckpointError, match="names of a state dict are text"):
        checkpoint.save({1: torch.ones(1)}, tmp_path)
