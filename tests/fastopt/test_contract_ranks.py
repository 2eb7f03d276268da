"""On two ranks: under DDP and FSDP2 equal to the full batch, and inside torch's ZeroRedundancyOptimizer."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, StateDictType, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from fastopt import Adam, Lamb, Larc, Optimizer, QHAdam, RAdam, Ranger, RMSProp

from ..ranks import RankPool
from .samples import ALL, NATIVE, Case, batch, model, train

STEPS = 4


def _step_on(m: nn.Module, opt: torch.optim.Optimizer, seed: int, rows: slice = slice(None)) -> None:
    x, y = batch(seed)
    torch.autograd.backward(nn.functional.mse_loss(m(x[rows]), y[rows]))
    opt.step()
    opt.zero_grad()


def _under_ddp(rank: int, world_size: int) -> dict[str, list[Tensor]]:
    found = {}
    for case in ALL:
        m = model()
        ddp = DistributedDataParallel(m)
        opt = case([m[0].parameters(), m[2].parameters()], lr=[0.02, 0.05])
        for seed in range(STEPS):
            _step_on(ddp, opt, seed, slice(rank * 4, rank * 4 + 4))
        found[case.name] = [p.detach() for p in m.parameters()]
    return found


def test_ddp_equals_the_full_batch(ranks: Callable[[int], RankPool]) -> None:
    results = ranks(2).run(_under_ddp)
    for case in ALL:
        m = model()
        train(m, case([m[0].parameters(), m[2].parameters()], lr=[0.02, 0.05]), range(STEPS))
        for a, b, whole in zip(results[0][case.name], results[1][case.name], m.parameters(), strict=True):
            assert torch.equal(a, b)
            torch.testing.assert_close(a, whole.detach(), rtol=2e-3, atol=2e-4, msg=case.name)


CLASSES: list[tuple[type[Optimizer], dict[str, Any]]] = [
    (Adam, {"wd": 0.1}),
    (RMSProp, {"momentum": 0.5}),
    (RAdam, {"sqr_mom": 0.9}),
    (QHAdam, {}),
    (Larc, {"weight_decay": 0.1}),
    (Lamb, {}),
    (Ranger, {"k": 2, "sqr_mom": 0.9}),
]


def _inside_zero(rank: int, world_size: int) -> list[tuple[list[Tensor], int, int, float]]:
    found = []
    for cls, hypers in CLASSES:
        m = model()
        opt = ZeroRedundancyOptimizer(m.parameters(), optimizer_class=cls, lr=0.05, **hypers)
        sched = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for seed in range(STEPS):
            _step_on(m, opt, seed)
            sched.step()
        opt.consolidate_state_dict(to=0)
        whole = len(opt.state_dict()["state"]) if rank == 0 else 0
        found.append(([p.detach() for p in m.parameters()], len(opt.optim.state), whole, opt.param_groups[0]["lr"]))
    return found


def test_as_the_class_of_a_zero_redundancy_optimizer(ranks: Callable[[int], RankPool]) -> None:
    results = ranks(2).run(_inside_zero)
    for i, (cls, hypers) in enumerate(CLASSES):
        m = model()
        opt = cls(m.parameters(), lr=0.05, **hypers)
        sched = torch.optim.lr_scheduler.ExponentialLR(opt, 0.5)
        for seed in range(STEPS):
            train(m, opt, [seed])
            sched.step()
        held = [results[rank][i][1] for rank in range(2)]
        assert sum(held) == 4
        assert min(held) > 0
        assert results[0][i][2] == 4
        for rank in range(2):
            weights, _, _, lr = results[rank][i]
            assert lr == opt.hypers[0]["lr"]
            for a, b in zip(weights, m.parameters(), strict=True):
                assert torch.equal(a, b), cls


def _fully_sharded(case: Case, seed: int, lr: Any) -> tuple[nn.Module, torch.optim.Optimizer]:
    m = model(seed)
    fully_shard(m, mesh=init_device_mesh("cpu", (2,)))
    return m, case([list(m[0].parameters()), list(m[2].parameters())], lr=lr)


def _whole(m: nn.Module) -> list[Tensor]:
    """The weights of a sharded model."""
    sharded: list[Any] = list(m.parameters())
    return [p.detach().full_tensor() for p in sharded]


def _under_fsdp(rank: int, world_size: int) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """For every optimizer the weights after all steps, undisturbed and resumed half way with DCP's helpers."""
    found = {}
    for case in NATIVE:
        rates: Any = torch.tensor(0.02) if case.name == "Adam" else [0.02, 0.05]
        m, opt = _fully_sharded(case, 0, rates)
        n, again = _fully_sharded(case, 1, 0.5)
        for seed in range(STEPS):
            if seed == 2:
                weights, saved = copy.deepcopy(get_state_dict(m, opt))
                set_state_dict(n, again, model_state_dict=weights, optim_state_dict=saved)
            for net, each in ((m, opt), (n, again)) if seed >= 2 else ((m, opt),):
                x, y = batch(seed)
                torch.autograd.backward(nn.functional.mse_loss(net(x), y))
                torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
                each.step()
                each.zero_grad()
        get_optimizer_state_dict(m, opt)
        found[case.name] = (_whole(m), _whole(n))
    return found


def test_fsdp2_equals_one_process(ranks: Callable[[int], RankPool]) -> None:
    results = ranks(2).run(_under_fsdp)
    for case in NATIVE:
        m = model()
        opt = case([m[0].parameters(), m[2].parameters()], lr=[0.02, 0.02 if case.name == "Adam" else 0.05])
        for seed in range(STEPS):
            x, y = batch(seed)
            torch.autograd.backward(nn.functional.mse_loss(m(x), y))
            torch.nn.utils.clip_grad_norm_(m.parameters(), 1.0)
            opt.step()
            opt.zero_grad()
        for found in results:
            undisturbed, resumed = found[case.name]
            for a, b, whole in zip(undisturbed, resumed, m.parameters(), strict=True):
                assert torch.equal(a, b), case.name
                torch.testing.assert_close(a, whole.detach(), rtol=2e-3, atol=2e-4, msg=case.name)


def _under_fsdp1(rank: int, world_size: int) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """As `_under_fsdp`, with the older wrapper, flat parameters behind the original ones and its own state dicts."""
    found = {}
    for case in FLAT:
        nets, opts = [], []
        for seed in (0, 1):
            m = model(seed)
            wrapped = FullyShardedDataParallel(m, device_id=torch.device("cpu"), use_orig_params=True)
            # Whole ones are wrong on CPUs, for torch.optim too: every state of a parameter is that of its last.
            FullyShardedDataParallel.set_state_dict_type(wrapped, StateDictType.SHARDED_STATE_DICT)
            nets.append(wrapped)
            opts.append(case([list(m[0].parameters()), list(m[2].parameters())], lr=[0.02, 0.05]))
        for seed in range(STEPS):
            if seed == 2:
                nets[1].load_state_dict(nets[0].state_dict())
                saved = FullyShardedDataParallel.optim_state_dict(nets[0], opts[0])
                loaded = FullyShardedDataParallel.optim_state_dict_to_load(nets[1], opts[1], saved)
                opts[1].load_state_dict(loaded)
            for net, opt in zip(nets, opts, strict=True):
                if seed >= 2 or net is nets[0]:
                    _step_on(net, opt, seed)
        ends = []
        for net in nets:
            with FullyShardedDataParallel.summon_full_params(net):
                ends.append([p.detach().clone() for p in net.parameters()])
        found[case.name] = (ends[0], ends[1])
    return found


FLAT = [case for case in NATIVE if case.name in ("SGD-mom", "Adam", "RAdam", "QHAdam", "Ranger")]
"""Parts do not tell of the rest: the norms of LARC and LAMB want the DTensors of `fully_shard`."""


def test_fsdp1_equals_one_process(ranks: Callable[[int], RankPool]) -> None:
    results = ranks(2).run(_under_fsdp1)
    for case in FLAT:
        m = model()
        train(m, case([m[0].parameters(), m[2].parameters()], lr=[0.02, 0.05]), range(STEPS))
        for found in results:
            for a, b, whole in zip(*found[case.name], m.parameters(), strict=True):
                assert torch.equal(a, b), case.name
                torch.testing.assert_close(a, whole.detach(), rtol=2e-3, atol=2e-4, msg=case.name)
