"""Accelerate's `prepare`, `accumulate`, `save_state` and `load_state`, and its FSDP2 on ranks with Gloo."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from accelerate import Accelerator, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState, GradientState, PartialState
from accelerate.utils import DistributedType
from safetensors import safe_open
from torch import Tensor, nn
from torch.optim.lr_scheduler import OneCycleLR
from torch.utils.data import DataLoader, TensorDataset

import fastopt
from fastopt.distributed import shard

from ..pages import Block, examples
from ..ranks import RankPool

STEPS = 6
#: What makes fastopt's Adam torch's AdamW.
AS_TORCHS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.1}


@pytest.fixture(autouse=True)
def fresh_accelerate() -> Iterator[None]:
    """Accelerate keeps what the first Accelerator of a process was told."""
    forget()
    yield
    forget()


def forget() -> None:
    for kept in (AcceleratorState, GradientState, PartialState):
        kept._reset_state()


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 1)).double()


def batches(size: int = 4) -> DataLoader[Any]:
    x = torch.randn(size * STEPS, 8, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return DataLoader(TensorDataset(x, x.sum(1, keepdim=True).sin()), batch_size=size)


def loss(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return (model(x) - y).square().mean()


def train(accelerator: Accelerator, model: nn.Module, opt: Any, schedule: Any, data: Any) -> None:
    """One pass of Accelerate's training loop."""
    for x, y in data:
        with accelerator.accumulate(model):
            accelerator.backward(loss(model, x, y))
            if accelerator.sync_gradients:
                accelerator.clip_grad_norm_(model.parameters(), 0.5)
            opt.step()
            schedule.step()
            opt.zero_grad()


def test_the_loop_of_its_documentation_beside_plain_torch() -> None:
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = network()
    opt: Any = fastopt.Adam(model.parameters(), **AS_TORCHS)  # type: ignore[arg-type]
    schedule = OneCycleLR(opt, 0.05, total_steps=STEPS)
    prepared = accelerator.prepare(model, opt, schedule, batches())
    train(accelerator, *prepared)

    expected = network()
    plain = torch.optim.AdamW(expected.parameters(), **AS_TORCHS)  # type: ignore[arg-type]
    rates = OneCycleLR(plain, 0.05, total_steps=STEPS)
    for number, (x, y) in enumerate(batches()):
        (loss(expected, x, y) / 2).backward()
        if number % 2:
            nn.utils.clip_grad_norm_(expected.parameters(), 0.5)
            plain.step()
            rates.step()
            plain.zero_grad()
    torch.testing.assert_close(list(model.parameters()), list(expected.parameters()), rtol=1e-10, atol=1e-12)
    assert opt.param_groups[0]["lr"] == plain.param_groups[0]["lr"]
    assert opt.param_groups[0]["betas"] == plain.param_groups[0]["betas"]  # cycled, too
    assert isinstance(prepared[1].optimizer, fastopt.Adam)


@pytest.mark.parametrize("make", [fastopt.Adam, fastopt.ranger, fastopt.Larc])
def test_save_state_and_load_state_bit_for_bit(make: Any, tmp_path: Path) -> None:
    def start() -> tuple[Any, ...]:
        accelerator = Accelerator(cpu=True)
        model = network()
        opt = make([list(model[0].parameters()), list(model[2].parameters())], lr=slice(1e-3, 1e-2))
        return accelerator, *accelerator.prepare(model, opt, OneCycleLR(opt, [0.01, 0.02], total_steps=99), batches())

    whole = start()
    train(*whole)
    whole[0].save_state(tmp_path)
    train(*whole)
    forget()
    resumed = start()
    resumed[0].load_state(tmp_path)
    train(*resumed)
    assert all(torch.equal(a, b) for a, b in zip(whole[1].parameters(), resumed[1].parameters(), strict=True))
    assert whole[2].param_groups[0]["lr"] == resumed[2].param_groups[0]["lr"]


def test_half_precision_without_a_scaler() -> None:
    """On the CPU Accelerate has bfloat16 by autocast, and no GradScaler: bit for bit as autocast by hand."""
    accelerator = Accelerator(cpu=True, mixed_precision="bf16")
    model, expected = network().float(), network().float()
    opt: Any = fastopt.Lamb(model.parameters(), lr=1e-2)
    plain = fastopt.Lamb(expected.parameters(), lr=1e-2)
    prepared, opt, data = accelerator.prepare(model, opt, batches())
    for x, y in data:
        accelerator.backward(loss(prepared, x.float(), y.float()))
        opt.step()
        opt.zero_grad()
    for x, y in batches():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = expected(x.float())
        (predicted.float() - y.float()).square().mean().backward()
        plain.step()
        plain.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), expected.parameters(), strict=True))


def _prepared(fsdp2: bool) -> tuple[Any, ...]:
    """Accelerate's DDP, or its FSDP2, which it offers for accelerators only, although nothing in it needs one."""
    forget()
    accelerator = Accelerator(cpu=True)
    if fsdp2:
        for state in (AcceleratorState, PartialState):
            state._shared_state["distributed_type"] = DistributedType.FSDP
        plugin = FullyShardedDataParallelPlugin(fsdp_version=2, cpu_ram_efficient_loading=False)
        accelerator.state.fsdp_plugin = plugin
    model = network()
    opt = fastopt.Adam(model.parameters(), **AS_TORCHS)  # type: ignore[arg-type]
    return accelerator, *accelerator.prepare(model, opt)


def _on_ranks(rank: int, world_size: int, fsdp2: bool, folder: str) -> tuple[list[Tensor], list[Tensor], bool]:
    """Weights after `STEPS` steps, in one go and resumed half-way; whether the optimizer holds DTensors."""

    def steps(prepared: tuple[Any, ...], chosen: slice) -> None:
        accelerator, model, opt = prepared
        for x, y in list(batches())[chosen]:
            rows = slice(rank, None, world_size)
            accelerator.backward(loss(model, x[rows], y[rows]))
            opt.step()
            opt.zero_grad()

    def whole(prepared: tuple[Any, ...]) -> list[Tensor]:
        return [(p.full_tensor() if fsdp2 else p).detach() for p in prepared[1].parameters()]

    one = _prepared(fsdp2)
    steps(one, slice(3))
    one[0].save_state(folder)
    steps(one, slice(3, None))
    two = _prepared(fsdp2)
    two[0].load_state(folder)
    steps(two, slice(3, None))
    sharded = all(hasattr(p, "placements") for p in one[2].param_groups[0]["params"])
    return whole(one), whole(two), sharded


@pytest.mark.parametrize("fsdp2", [False, True], ids=["ddp", "fsdp2"])
def test_two_ranks_beside_one_process(ranks: Callable[[int], RankPool], fsdp2: bool, tmp_path: Path) -> None:
    """Under FSDP2 the optimizer is built before the model is sharded: Accelerate replaces what is in its groups."""
    expected = network()
    plain = torch.optim.AdamW(expected.parameters(), **AS_TORCHS)  # type: ignore[arg-type]
    for x, y in batches():
        loss(expected, x, y).backward()
        plain.step()
        plain.zero_grad()
    for weights, resumed, sharded in ranks(2).run(_on_ranks, fsdp2, str(tmp_path), timeout=120):
        assert sharded == fsdp2
        torch.testing.assert_close(weights, [p.detach() for p in expected.parameters()], rtol=1e-10, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


def _sharded_on_ranks(
    rank: int, world_size: int, stage: Literal[1, 2], folder: str
) -> tuple[list[Tensor], list[Tensor], list[str]]:
    """As `_on_ranks`, with a sharded optimizer; and the names of what is saved of the model."""

    def start() -> tuple[Any, ...]:
        forget()
        accelerator = Accelerator(cpu=True)
        model: Any = accelerator.prepare_model(network(), evaluation_mode=stage == 2)
        opt: Any = shard(fastopt.Adam(model.parameters(), **AS_TORCHS), model, stage)  # type: ignore[arg-type]
        accelerator.register_save_state_pre_hook(lambda *_: opt.consolidate_state_dict())
        return accelerator, model, accelerator.prepare(opt)

    def steps(prepared: tuple[Any, ...], chosen: slice) -> None:
        accelerator, model, opt = prepared
        for x, y in list(batches())[chosen]:
            rows = slice(rank, None, world_size)
            accelerator.backward(loss(model, x[rows], y[rows]))
            opt.step()
            opt.zero_grad()

    one = start()
    steps(one, slice(3))
    with pytest.raises(TypeError, match="spread over the ranks"):
        torch.save(one[2].state_dict(), f"{folder}/part-{rank}")
    one[0].save_state(folder)
    one[0].wait_for_everyone()
    steps(one, slice(3, None))
    two = start()
    two[0].load_state(folder)
    steps(two, slice(3, None))
    with safe_open(f"{folder}/model.safetensors", "pt") as saved:
        names = sorted(saved.keys())
    return [*one[1].state_dict().values()], [*two[1].state_dict().values()], names


@pytest.mark.parametrize("stage", [1, 2])
def test_a_sharded_optimizer_on_two_ranks(ranks: Callable[[int], RankPool], stage: int, tmp_path: Path) -> None:
    expected = network()
    plain = torch.optim.AdamW(expected.parameters(), **AS_TORCHS)  # type: ignore[arg-type]
    for x, y in batches():
        loss(expected, x, y).backward()
        plain.step()
        plain.zero_grad()
    for weights, resumed, names in ranks(2).run(_sharded_on_ranks, stage, str(tmp_path), timeout=120):
        assert names == sorted(expected.state_dict())
        torch.testing.assert_close(weights, [p.detach() for p in expected.parameters()], rtol=1e-10, atol=1e-12)
        assert all(torch.equal(a, b) for a, b in zip(weights, resumed, strict=True))


@pytest.mark.parametrize("block", examples("docs/integrations.md", "Accelerate"), ids=Block.title)
def test_example_of_the_page(block: Block, tmp_path: Path) -> None:
    assert "'lr'" in block.run_here(tmp_path)
