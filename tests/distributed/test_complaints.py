"""What users of other sharded optimizers have complained about, one test each; numbers are those of our list.

All on real ranks, against one process where there are numbers to compare.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt
from fastopt.distributed import RanksDiffer, shard

from .problems import EVERY, Model, assert_same_run, average, feed, gradient, members, set_average
from .test_wire import counted

WORLD = 3


def body_and_head(dtype: torch.dtype = torch.float32) -> nn.Sequential:
    torch.manual_seed(5)
    body = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 7), nn.Tanh())
    return nn.Sequential(body, nn.Linear(7, 3)).to(dtype)


def groups(model: nn.Sequential) -> list[list[nn.Parameter]]:
    return [list(part.parameters()) for part in model]


def batch(step: int, rank: int) -> Tensor:
    return torch.randn(4, 5, generator=torch.Generator().manual_seed(31 * step + rank))


def backward(model: nn.Module, step: int, rank: int, scale: float = 1.0) -> None:
    (model(batch(step, rank)).square().sum() * scale).backward()


# ---- freezing


def unfreezes_after_a_frozen_forward(rank: int, world_size: int) -> None:
    """1: everything was frozen in the first forward pass, under autocast and with masters."""
    model = body_and_head(torch.bfloat16)
    opt = shard(fastopt.Adam(groups(model), lr=0.1), model, master_weights=True, reduce_dtype=torch.float32)
    with pytest.warns(UserWarning, match="whole model is frozen"):
        opt.freeze_to(2)
    model(batch(0, rank).bfloat16())
    opt.step()
    opt.unfreeze()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model(batch(0, rank).bfloat16()).float().square().sum().backward()
    opt.step()
    assert all(not torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert all(opt.state[p]["master"].dtype == torch.float32 for p in model.parameters())


def frozen_at_first(rank: int, world_size: int) -> None:
    """2, 4, 6: a group frozen from the start trains once unfrozen, as in one process; until then it has no state."""
    for name in ("adam", "ranger", "adamw"):
        model, reference = Model(), Model()
        opt, plain = shard(EVERY[name](model.param_groups()), model), EVERY[name](reference.param_groups())
        for each in (opt, plain):
            each.freeze_to(2)
        for step in range(6):
            if step == 3:
                assert not any(opt.state.get(p) for group in opt.param_groups[:2] for p in group["params"])
                for each in (opt, plain):
                    each.unfreeze()
            feed(opt, 2, step, rank, world_size)
            set_average(plain, step, world_size)
            opt.step()
            plain.step()
            opt.zero_grad(set_to_none=True)
            plain.zero_grad(set_to_none=True)
        assert_same_run(opt, plain, name)


def frozen_in_the_middle(rank: int, world_size: int) -> None:
    """5, 7: what is frozen later does not move, whatever its momentum or a gradient left over; its state comes back."""
    model, reference = body_and_head(), body_and_head()
    opt = shard(fastopt.Adam(groups(model), lr=0.05, wd=0.1), model, bucket_bytes=150)
    plain = fastopt.Adam(groups(reference), lr=0.05, wd=0.1)
    kept: list[Tensor] = []
    for step in range(8):
        if step in (2, 5):
            for each in (opt, plain):
                each.freeze_to(1) if step == 2 else each.unfreeze()
            kept = [value.clone() for value in model[0].state_dict().values()]
        if 2 <= step < 5:
            for p in model[0].parameters():
                p.grad = torch.ones_like(p)
        backward(model, step, rank)
        for each in range(world_size):
            backward(reference, step, each, 1 / world_size)
        opt.step()
        plain.step()
        opt.zero_grad(set_to_none=True)
        plain.zero_grad(set_to_none=True)
        if 2 <= step < 5:
            assert all(map(torch.equal, kept, model[0].state_dict().values()))
            assert len(opt.state_dict()["state"]) == 6
    for p, q in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)


def groups_without_parameters(rank: int, world_size: int) -> None:
    """3: a group of which nothing trains, an empty one, and parameters without elements."""
    model = Model((((4, 3),), (), ((0, 2), (5,))))
    opt = shard(fastopt.Adam(model.param_groups()), model)
    for first in (1, 2, 0):
        opt.freeze_to(first)
        feed(opt, 2, first, rank, world_size)
        opt.step()
        opt.zero_grad()


# ---- gradients


def unused_on_one_rank(rank: int, world_size: int) -> None:
    """8: a parameter that one rank does not use counts as zero there; one that no rank uses is left alone."""
    model, reference = Model(), Model()
    opt, plain = shard(fastopt.Adam(model.param_groups()), model), fastopt.Adam(reference.param_groups())
    for step in range(4):
        for i, (p, q) in enumerate(zip(members(opt), members(plain), strict=True)):
            who = [r for r in range(world_size) if (i + r + step) % 3 and i != 2]
            q.grad = average(step, i, who, world_size, q.detach()) if who else None
            p.grad = gradient(step, i, rank, p.detach()) if rank in who else None
        opt.step()
        plain.step()
        opt.zero_grad(set_to_none=True)
    assert_same_run(opt, plain, "unused on one rank")
    assert not opt.state.get(members(opt)[2])


def norm_of_the_whole(rank: int, world_size: int) -> None:
    """18: one norm, of all ranks' averaged gradients, the same on every rank; what is stepped is clipped."""
    model, reference = body_and_head(), body_and_head()
    opt, plain = shard(fastopt.SGD(groups(model), lr=1.0), model), fastopt.SGD(groups(reference), lr=1.0)
    backward(model, 0, rank)
    for each in range(world_size):
        backward(reference, 0, each, 1 / world_size)
    with counted() as calls:
        norm = opt.clip_grad_norm_(0.1)
    assert calls == [("all_reduce", 8)]
    assert type(norm) is Tensor
    torch.testing.assert_close(norm, nn.utils.clip_grad_norm_(reference.parameters(), 0.1))
    opt.step()
    plain.step()
    for p, q in zip(model.state_dict().values(), reference.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q)


def norms_of_layers(rank: int, world_size: int) -> None:
    """17: LAMB's and LARC's norms are those of whole parameters, whichever ranks hold their slices."""
    for name in ("lamb", "larc"):
        model, reference = Model(), Model()
        opt, plain = shard(EVERY[name](model.param_groups()), model), EVERY[name](reference.param_groups())
        for step in range(3):
            feed(opt, 2, step, rank, world_size)
            set_average(plain, step, world_size)
            opt.step()
            plain.step()
        assert_same_run(opt, plain, name, exact=False)


# ---- ranks that differ


def hyper_from_local_progress(rank: int, world_size: int) -> str:
    """19: a learning rate that one rank computes from its own data is an error on all ranks, before anything moves."""
    model = body_and_head()
    opt = shard(fastopt.Adam(groups(model), lr=0.1), model)
    backward(model, 0, rank)
    opt.step()
    opt.zero_grad()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    opt.set_hyper("lr", [0.1, 0.2 if rank == 1 else 0.1])
    backward(model, 1, rank)
    with pytest.raises(RanksDiffer) as caught:
        opt.step()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    return str(caught.value)


def hyper_between_backward_and_step(rank: int, world_size: int) -> str:
    """19: set after backward, which has told the others already: told with the next one, later before the step."""
    model = body_and_head()
    opt = shard(fastopt.Adam(groups(model), lr=0.1), model)
    for step in range(2):
        backward(model, step, rank)
        opt.set_hyper("lr", 0.1 / (step + 2))
        opt.step()
        opt.zero_grad()
    backward(model, 2, rank)
    opt.set_hyper("lr", 0.5 if rank == world_size - 1 else 0.3)
    with pytest.raises(RanksDiffer) as caught:
        opt.step()
    opt.set_hyper("lr", 0.3)
    opt.step()
    return str(caught.value)


def groups_in_another_order(rank: int, world_size: int) -> str:
    """20: the same parameters in other groups, or in another order of the model."""
    model = body_and_head()
    order = groups(model)
    with pytest.raises(RanksDiffer) as caught:
        shard(fastopt.Adam(order[::-1] if rank == world_size - 1 else order), model)
    return str(caught.value)


# ---- the rest


def hypers_of_groups(rank: int, world_size: int) -> None:
    """13: groups keep their hypers, and schedulers see all of them."""
    model = body_and_head()
    opt = shard(fastopt.Adam(groups(model), lr=[0.1, 0.2], mom=[0.8, 0.9]), model)
    assert [group["betas"] for group in opt.param_groups] == [(0.8, 0.99), (0.9, 0.99)]
    scheduler = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
    backward(model, 0, rank)
    opt.step()
    scheduler.step()
    assert [group["lr"] for group in opt.param_groups] == [0.05, 0.1]
    assert [len(group["params"]) for group in opt.param_groups] == [4, 2]


def plain_tensors(rank: int, world_size: int) -> None:
    """15: the chain steps on plain tensors, and state is no more than slices of them."""
    model = body_and_head()
    opt = shard(fastopt.Adam(groups(model)), model)
    backward(model, 0, rank)
    opt.step()
    values = [v for entry in opt.state.values() for v in entry.values() if isinstance(v, Tensor)]
    assert values
    assert all(type(v) is Tensor and v.ndim == 1 for v in values)


class TiedAndUneven(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(6)
        self.embed = nn.Embedding(7, 5)
        self.out = nn.Linear(5, 7, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.out(self.embed(x))
        return out


def tied_and_uneven(rank: int, world_size: int) -> None:
    """21: every row of a tied weight is updated, on the last rank too, where ranks do not divide the rows."""
    model = TiedAndUneven()
    before = model.embed.weight.detach().clone()
    opt = shard(fastopt.Adam(model.parameters(), lr=0.1), model)
    model(torch.arange(7, device=before.device)).square().sum().backward()
    opt.step()
    opt.synchronize()
    assert (model.embed.weight != before).any(1).all()
    assert model.out.weight is model.embed.weight


def starting(rank: int, world_size: int) -> None:
    """24: to begin with, each parameter is sent once, in as many collectives as there are buckets and buffers."""
    model = Model(tuple(((16, 16),) for _ in range(50)))
    with counted() as calls:
        opt = shard(fastopt.Adam(model.param_groups()), model, bucket_bytes=2**14)
    sent = [n for name, n in calls if name == "broadcast"]
    assert len(sent) == len(opt.layout.buckets)
    assert sum(sent) <= 50 * (4 * 256 + 16 * world_size)
    assert len(calls) - len(sent) <= 2


CASES = {
    "1_unfreezing_after_an_all_frozen_forward": unfreezes_after_a_frozen_forward,
    "2_4_6_frozen_from_the_start_then_unfrozen": frozen_at_first,
    "3_groups_without_trainable_parameters": groups_without_parameters,
    "5_7_frozen_in_the_middle": frozen_in_the_middle,
    "8_unused_on_one_rank": unused_on_one_rank,
    "13_groups_keep_their_hypers": hypers_of_groups,
    "15_plain_tensors": plain_tensors,
    "17_norms_of_layers": norms_of_layers,
    "18_the_norm_of_all_gradients": norm_of_the_whole,
    "21_tied_and_uneven": tied_and_uneven,
    "24_starting": starting,
}


@pytest.mark.parametrize("name", CASES)
def test_complaint(ranks: Any, name: str) -> None:
    ranks(WORLD).run(CASES[name])


def test_complaint_19_hypers_that_differ(ranks: Any) -> None:
    told = ranks(WORLD).run(hyper_from_local_progress)
    assert len(set(told)) == 1
    assert "hyper 'lr' of group 1: 0.1 on ranks 0, 2; 0.2 on rank 1" in told[0]
    told = ranks(WORLD).run(hyper_between_backward_and_step)
    assert len(set(told)) == 1
    assert "hyper 'lr' of group 0: 0.3 on ranks 0, 1; 0.5 on rank 2" in told[0]


def test_complaint_20_groups_in_another_order(ranks: Any) -> None:
    told = ranks(WORLD).run(groups_in_another_order)
    assert len(set(told)) == 1
    assert "params[0] of group 0" in told[0]
    assert "rank 2" in told[0]


def test_every_complaint_has_a_test_that_exists() -> None:
    page = str(sys.modules[__package__].__doc__)
    numbers = [int(n) for n in re.findall(r"^ +(\d+)  ", page, re.MULTILINE)]
    assert numbers == list(range(1, 25))
    folder = Path(__file__).parent
    named = re.findall(r"(gpu\.)?(test_\w+)\.(\w+)", page.partition("checks that all")[2])
    assert len(named) > 40
    for gpu, module, function in named:
        path = (folder.parent / "gpu" if gpu else folder) / f"{module}.py"
        assert re.search(rf"^def {function}\(", path.read_text(), re.MULTILINE), f"{path.name} has no {function}"
