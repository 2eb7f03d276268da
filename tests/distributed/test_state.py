"""State dicts of sharded optimizers: named pieces on every rank, whole tensors or pieces in, any number of ranks."""

from __future__ import annotations

import copy
import io
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt
from fastopt import Box, Piece
from fastopt.distributed import shard

from .problems import EVERY, Model, assert_same, assert_same_run, feed, members, set_average

NAMES = ("adam", "ranger", "lamb", "adamw")
TRAINED, MORE = 3, 3
AVERAGED_OVER = 2
"""Gradients are averages over two ranks here, however many there are: runs on N and on M ranks can then be compared."""


def train(opt: Any, steps: range) -> None:
    """Step on the averages that two ranks would make; in stage 1, so that every rank is given them."""
    for step in steps:
        set_average(opt, step, AVERAGED_OVER)
        opt.step()
        opt.zero_grad(set_to_none=True)


def make(name: str) -> tuple[Model, Any]:
    """A model and its sharded optimizer, group 0 frozen."""
    model = Model()
    opt = shard(EVERY[name](model.param_groups()), model, stage=1, bucket_bytes=150)
    opt.freeze_to(1)
    return model, opt


def plain_run(name: str, steps: int) -> tuple[Model, Any]:
    model = Model()
    opt = EVERY[name](model.param_groups())
    opt.freeze_to(1)
    train(opt, range(steps))
    return model, opt


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def put(model: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for p, value in zip(model.parameters(), values, strict=True):
            p.copy_(value)


def saved(rank: int, world_size: int, name: str) -> tuple[dict[str, Any], list[Tensor]]:
    """What this rank's state dict shows after some steps."""
    model, opt = make(name)
    train(opt, range(TRAINED))
    shown = opt.state_dict()
    for i, p in enumerate(members(opt)):
        for value in shown["state"].get(i, {}).values():
            if isinstance(value, tuple):
                assert [piece.box for piece in value] == opt.boxes(p, tuple(p.shape))
                assert {piece.name for piece in value} <= {opt.param_names()[p]}
    return sent(shown), weights(model)


def sent(shown: dict[str, Any]) -> dict[str, Any]:
    """A state dict with plain tuples of pieces, for one with `Pieces` is not pickled."""

    def plain(value: Any) -> Any:
        return tuple(value) if isinstance(value, tuple) else value

    state = {i: {key: plain(value) for key, value in entry.items()} for i, entry in shown["state"].items()}
    return {"state": state, "param_groups": shown["param_groups"]}


def assemble(shown: list[dict[str, Any]]) -> dict[str, Any]:
    """Whole tensors from the pieces of all ranks, which must cover each exactly once."""
    whole: dict[str, Any] = {"state": {}, "param_groups": shown[0]["param_groups"]}
    for each in shown:
        assert each["param_groups"] == shown[0]["param_groups"]
    shapes = [tuple(p.shape) for p in Model().parameters()]
    for i in sorted({i for each in shown for i in each["state"]}):
        entry: dict[str, Any] = {}
        entries = [each["state"][i] for each in shown if i in each["state"]]
        for key, first in entries[0].items():
            if not isinstance(first, tuple):
                assert all(other[key] == first for other in entries)
                entry[key] = first
                continue
            pieces = [piece for other in entries for piece in other[key]]
            shape = pieces[0].shape if pieces else shapes[i]
            dtype = pieces[0].data.dtype if pieces else torch.float32
            entry[key], times = torch.zeros(shape, dtype=dtype), torch.zeros(shape)
            for piece in pieces:
                entry[key][piece.box.slices] = piece.data
                times[piece.box.slices] += 1
            assert (times == 1).all()
        whole["state"][i] = entry
    return whole


def resumed(rank: int, world_size: int, name: str, state: dict[str, Any], values: list[Tensor]) -> None:
    """Load whole tensors, go on, and compare with an undisturbed run in one process."""
    model, opt = make(name)
    opt.unfreeze()
    put(model, values)
    opt.load_state_dict(state)
    assert opt.is_frozen(0)
    train(opt, range(TRAINED, TRAINED + MORE))
    _, reference = plain_run(name, TRAINED + MORE)
    assert_same_run(opt, reference, f"{name} on {world_size} ranks", exact=name != "lamb")


@pytest.mark.parametrize("name", NAMES)
def test_saved_on_n_ranks_resumes_on_m(ranks: Any, name: str) -> None:
    _, reference = plain_run(name, TRAINED)
    want = reference.state_dict()
    for n in (1, 2, 3):
        told = ranks(n).run(saved, name)
        whole, values = assemble([shown for shown, _ in told]), told[0][1]
        assert whole["state"].keys() == want["state"].keys()
        for i, entry in want["state"].items():
            for key, value in entry.items():
                assert_same(whole["state"][i][key], value, f"{name}: {key} of {i}", exact=name != "lamb")
        for m in (1, 2, 3):
            if n != m:
                ranks(m).run(resumed, name, whole, values)


def own_pieces(rank: int, world_size: int) -> None:
    """A rank's own state dict, loaded into a fresh optimizer, gives the same state."""
    for name in NAMES:
        model, opt = make(name)
        train(opt, range(TRAINED))
        shown = copy.deepcopy(opt.state_dict())
        again, other = make(name)
        put(again, weights(model))
        other.load_state_dict(shown)
        train(opt, range(TRAINED, TRAINED + MORE))
        train(other, range(TRAINED, TRAINED + MORE))
        for p, q in zip(members(opt), members(other), strict=True):
            assert torch.equal(p, q)
            assert opt.state.get(p, {}).keys() == other.state.get(q, {}).keys()
            for key, value in opt.state.get(p, {}).items():
                assert_same(other.state[q][key], value, f"{name}: {key}")


def test_a_ranks_own_pieces_load(ranks: Any) -> None:
    ranks(3).run(own_pieces)


def both_ways(rank: int, world_size: int) -> None:
    """One process to sharded, and consolidated on any rank back to one process."""
    for name in NAMES:
        source, plain = plain_run(name, TRAINED)
        model, opt = make(name)
        put(model, weights(source))
        opt.load_state_dict(plain.state_dict())
        train(opt, range(TRAINED, TRAINED + MORE))
        opt.consolidate_state_dict(to=1)
        shown = opt.state_dict()
        # A rank that is not asked still shows its own part.
        whole = all(isinstance(v, Tensor | int | float) for entry in shown["state"].values() for v in entry.values())
        assert whole == (rank == 1)
        target, back = plain_run(name, 0)
        if rank == 1:
            put(target, weights(model))
            back.load_state_dict(shown)
            train(back, range(TRAINED + MORE, TRAINED + MORE + 1))
        train(opt, range(TRAINED + MORE, TRAINED + MORE + 1))
        if rank == 1:
            for p, q in zip(members(opt), members(back), strict=True):
                assert_same(p.detach(), q.detach(), name, exact=name != "lamb")
            values = [v for entry in opt.state_dict()["state"].values() for v in entry.values()]
            assert name == "adamw" or any(isinstance(v, tuple) for v in values)


def test_one_process_to_sharded_and_back(ranks: Any) -> None:
    ranks(3).run(both_ways)


def shard_late(rank: int, world_size: int) -> None:
    """An optimizer that has trained in one process is sharded with its state."""
    for name in NAMES:
        model, opt = plain_run(name, TRAINED)
        sharded = shard(opt, model, stage=2)
        for step in range(TRAINED, TRAINED + MORE):
            feed(sharded, 2, step, rank, world_size)
            sharded.step()
            sharded.zero_grad(set_to_none=True)
        _, reference = plain_run(name, TRAINED + MORE)
        assert_same_run(sharded, reference, name, exact=name != "lamb")


def test_an_optimizer_that_has_state_is_sharded_with_it(ranks: Any) -> None:
    ranks(AVERAGED_OVER).run(shard_late)


# ---- what does not fit


def wrong_boxes(state: dict[str, Any]) -> str:
    (piece, *rest) = state["state"][3]["grad_avg"]
    rows, columns = piece.box.shape
    cut = Piece(piece.name, piece.shape, Box(piece.box.offset, (rows, columns - 1)), piece.data[:, :-1])
    state["state"][3]["grad_avg"] = (cut, *rest)
    return "this rank holds the boxes"


def missing_piece(state: dict[str, Any]) -> str:
    state["state"][3]["grad_avg"] = ()
    return "this rank holds the boxes"


def foreign_name(state: dict[str, Any]) -> str:
    state["state"][3]["grad_avg"] = tuple(
        Piece("other", piece.shape, piece.box, piece.data) for piece in state["state"][3]["grad_avg"]
    )
    return "'g1.0' was given a piece of 'other'"


def wrong_shape(state: dict[str, Any]) -> str:
    state["state"][3]["grad_avg"] = torch.zeros(3, 13)
    return r"shape \(3, 13\)"


def fewer_groups(state: dict[str, Any]) -> str:
    state["param_groups"].pop()
    return "parameter groups"


def option_of_torch(state: dict[str, Any]) -> str:
    state["param_groups"][1]["maximize"] = True
    return "maximize of group 1 is True, which has no effect"


def no_state_dict(state: dict[str, Any]) -> str:
    state.clear()
    return "param_groups"


WRONG = (wrong_boxes, missing_piece, foreign_name, wrong_shape, fewer_groups, option_of_torch, no_state_dict)


def refuses(rank: int, world_size: int) -> None:
    _, opt = make("adam")
    train(opt, range(TRAINED))
    before = copy.deepcopy(opt.state_dict())
    for spoil in WRONG:
        state = copy.deepcopy(before)
        says = spoil(state)
        if state:
            state["param_groups"][0]["lr"] = 5.0
        with pytest.raises(ValueError, match=says):
            opt.load_state_dict(state)
        after = opt.state_dict()
        assert after["param_groups"] == before["param_groups"]
        for i, entry in before["state"].items():
            for key, value in entry.items():
                got = after["state"][i][key]
                if isinstance(value, tuple):
                    assert all(torch.equal(a.data, b.data) for a, b in zip(got, value, strict=True))
                else:
                    assert got == value


def test_a_state_dict_that_does_not_fit_changes_nothing(ranks: Any) -> None:
    ranks(2).run(refuses)


def test_clear_state_keeps_marks() -> None:
    model = Model()
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model)
    first = members(opt)[0]
    opt.state[first] = {"do_wd": False}
    train(opt, range(1))
    assert opt.state_bytes() == 2 * 4 * sum(p.numel() for p in model.parameters())
    opt.clear_state()
    assert opt.state_bytes() == 0
    assert dict(opt.state[first]) == {"do_wd": False}


def test_a_sharded_optimizer_is_not_copied_or_pickled() -> None:
    model = Model()
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model)
    for attempt in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="cannot be copied or pickled"):
            attempt(opt)


def test_a_consolidated_state_dict_is_saved_as_plain_values(tmp_path: Path) -> None:
    """Lightning loads with weights_only=True, which takes no class of ours."""
    models = [Model(), Model()]
    one, two = (shard(fastopt.Adam(model.param_groups(), lr=0.1), model) for model in models)
    train(one, range(2))
    one.consolidate_state_dict()
    torch.save(one.state_dict(), tmp_path / "opt.pt")
    two.load_state_dict(torch.load(tmp_path / "opt.pt", weights_only=True))
    assert copy.deepcopy(one.state_dict()).params == one.state_dict().params  # a copy knows the names, as before
    models[1].load_state_dict(models[0].state_dict())
    for opt in (one, two):
        train(opt, range(2, 4))
    for p, q in zip(members(one), members(two), strict=True):
        assert torch.equal(p, q)


def test_consolidating_on_a_rank_that_is_none() -> None:
    model = Model()
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model)
    with pytest.raises(ValueError, match="to=1"):
        opt.consolidate_state_dict(to=1)


def test_engine_tells_of_slices_also_before_the_first_step_after_a_load() -> None:
    stepped, fresh = Model(), Model()
    first = shard(fastopt.Adam(stepped.param_groups()), stepped, stage=1)
    set_average(first, 0, 1)
    first.step()
    assert [choice.executor for choice in first.engine] in (["llvm"] * 3, ["foreach"] * 3)
    second = shard(fastopt.Adam(fresh.param_groups()), fresh)
    assert second.engine == first.engine
    second.load_state_dict(first.state_dict())
    assert second.engine == first.engine
    wrapped = Model()
    whole = shard(fastopt.OptimWrapper(torch.optim.AdamW(wrapped.param_groups())), wrapped)
    assert {choice.executor for choice in whole.engine} == {"eager"}


def pickles(rank: int, world_size: int) -> None:
    model = Model()
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model, stage=1)
    train(opt, range(1))
    for attempt in (pickle.dumps, lambda state: torch.save(state, io.BytesIO())):
        with pytest.raises(TypeError, match=r"spread over the ranks, .*call opt.consolidate_state_dict\(\) on all"):
            attempt(opt.state_dict())
        with pytest.raises(TypeError, match="spread over the ranks"):
            attempt(copy.deepcopy(dict(opt.state_dict())))
    opt.consolidate_state_dict()
    if rank == 0:
        torch.save(opt.state_dict(), io.BytesIO())


def test_a_part_of_a_state_is_not_pickled(ranks: Any) -> None:
    """Others save the state dict of rank 0 alone, and could not even load it."""
    ranks(2).run(pickles)


@pytest.mark.parametrize("name", NAMES)
def test_alone_a_state_dict_is_pickled_as_plain_tensors(name: str) -> None:
    _, opt = make(name)
    train(opt, range(1))
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    loaded = torch.load(file, weights_only=True)
    plain = plain_run(name, 1)[1].state_dict()["state"]
    assert loaded["state"].keys() == plain.keys()
    for i, entry in plain.items():
        for key, value in entry.items():
            got = loaded["state"][i][key]
            assert type(got) is type(value)
            if isinstance(value, Tensor):
                torch.testing.assert_close(got, value)


def test_each_parameter_has_a_storage_of_its_own() -> None:
    """Accelerate and safetensors take tensors on one storage for one tensor, and save the first of them alone."""
    model = Model()
    opt = shard(fastopt.Adam(model.param_groups(), lr=0.1), model, bucket_bytes=1 << 20)
    assert len(opt.layout.buckets) == 1
    storages = [p.untyped_storage() for p in model.parameters()]
    assert len({(storage.data_ptr(), storage.nbytes()) for storage in storages}) == len(storages)
    assert [storage.nbytes() for storage in storages] == [p.nbytes for p in model.parameters()]
