"""Sharded optimizers and the state dicts of torch.distributed.checkpoint: by name, in pieces or whole."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint import CheckpointException, state_dict_saver
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict

from fastopt import Adam, Optimizer
from fastopt.distributed import shard

from ..fastopt.samples import assert_same, backward, model, train, values


def make(seed: int, stage: int) -> tuple[nn.Sequential, Any]:
    """The model of `samples`, and Adam on two groups, sharded where there is a stage."""
    m = model(seed)
    opt: Optimizer = Adam([m[0].parameters(), m[2].parameters()], lr=[0.02, 0.05])
    return m, shard(opt, m, stage) if stage else opt


def resumes_from_its_pieces(rank: int, world_size: int, stage: int) -> None:
    """Every rank reads and writes its own pieces; reading before the first step moves nothing."""
    m, opt = make(0, stage)
    before = values(m.parameters())
    get_optimizer_state_dict(m, opt)
    assert_same(m.parameters(), before)
    train(m, opt, range(3))
    saved = copy.deepcopy(get_state_dict(m, opt))
    n, again = make(1, stage)
    set_state_dict(n, again, model_state_dict=saved[0], optim_state_dict=saved[1])
    for each, by in ((m, opt), (n, again)):
        train(each, by, range(3, 6))
        by.synchronize()
    assert_same(m.parameters(), n.parameters())


def is_whole_where_it_was_asked_for(rank: int, world_size: int, stage: int) -> None:
    """What rank 0 has after `consolidate_state_dict` is one process's, and loads on all ranks and in one process."""
    m, opt = make(0, stage)
    train(m, opt, range(3))
    opt.consolidate_state_dict(to=0)
    weights, saved = copy.deepcopy(get_state_dict(m, opt))
    box = [(weights, saved)]
    dist.broadcast_object_list(box, src=0)
    train(m, opt, range(3, 6))
    opt.synchronize()
    for into in (stage, 0):
        n, again = make(1, into)
        set_state_dict(n, again, model_state_dict=box[0][0], optim_state_dict=copy.deepcopy(box[0][1]))
        train(n, again, range(3, 6))
        if into:
            again.synchronize()
        assert_same(m.parameters(), n.parameters())


def is_not_saved_in_part(rank: int, world_size: int, folder: Path) -> None:
    m, opt = make(0, 2)
    backward(m, 0)
    opt.step()
    opt.zero_grad()
    with pytest.raises(CheckpointException, match=r"spread over the ranks.*fastopt\.checkpoint\.save"):
        state_dict_saver.save({"opt": get_optimizer_state_dict(m, opt)}, checkpoint_id=folder)


@pytest.mark.parametrize("stage", [1, 2])
def test_pieces(ranks: Any, stage: int) -> None:
    ranks(2).run(resumes_from_its_pieces, stage)


@pytest.mark.parametrize("stage", [1, 2])
def test_whole(ranks: Any, stage: int) -> None:
    ranks(2).run(is_whole_where_it_was_asked_for, stage)


def test_a_part_is_refused(ranks: Any, tmp_path: Path) -> None:
    ranks(2).run(is_not_saved_in_part, tmp_path)
