"""torchtitan's container of optimizers, its schedulers and its checkpoints, beside its AdamW."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch import nn

import fastopt

from ..pages import Block, blocks

pytest.importorskip("torchtitan", reason="torchtitan is not installed")

from torchtitan.components.optimizer import LRSchedulersContainer, OptimizersContainer, ParamGroupConfig

STEPS = 6
#: What makes fastopt's Adam torch's AdamW.
AS_TORCHS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8}


class Optimizers(OptimizersContainer[torch.optim.Optimizer]):
    """torchtitan's container; it looks names up in a fixed table, so ours are added to it."""

    @dataclass(kw_only=True, slots=True)
    class Config(OptimizersContainer.Config):
        """As there."""

    @staticmethod
    def _resolve_optimizer_factory(name: str) -> Callable[..., torch.optim.Optimizer]:
        ours = {"fastopt.Adam": fastopt.Adam, "fastopt.ranger": fastopt.ranger}
        return ours.get(name) or OptimizersContainer._resolve_optimizer_factory(name)


def parts() -> list[nn.Module]:
    """A model in two parts, as pipeline parallelism cuts it."""
    torch.manual_seed(0)
    return [nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)).double(), nn.Sequential(nn.Linear(16, 1)).double()]


def named(part: nn.Module, prefix: str) -> nn.Module:
    """`part` below a module, so that the names of parameters differ from part to part."""
    return nn.ModuleDict({prefix: part})


def build(name: str, model: list[nn.Module], implementation: Any = "for-loop", **hypers: Any) -> tuple[Any, Any]:
    """The containers of optimizers and of schedulers, with a group of its own for biases and norms."""
    hypers = {**AS_TORCHS, **hypers}
    bare = {**hypers, "weight_decay": 0.0}
    config = Optimizers.Config(
        param_groups=[
            ParamGroupConfig(pattern=r"bias|\.1\.", optimizer_name=name, optimizer_kwargs=bare),
            ParamGroupConfig(pattern=".*", optimizer_name=name, optimizer_kwargs={**hypers, "weight_decay": 0.1}),
        ],
        implementation=implementation,
    )
    model_parts = [named(part, f"part{i}") for i, part in enumerate(model)]
    opt = config.build(model_parts=model_parts)
    return opt, LRSchedulersContainer.Config(warmup_steps=2).build(optimizers=opt, training_steps=STEPS)


def train(model: list[nn.Module], opt: Any, schedule: Any, steps: range) -> list[dict[str, float]]:
    """Steps on batches that depend on their numbers alone; returns the rates that torchtitan would log."""
    rates = []
    for step in steps:
        x = torch.randn(4, 8, generator=torch.Generator().manual_seed(step), dtype=torch.float64)
        (nn.Sequential(*model)(x) - x.sum(1, keepdim=True)).square().mean().backward()
        opt.step()
        schedule.step()
        opt.zero_grad()
        rates.append(schedule.get_metrics())
    return rates


def weights(model: list[nn.Module]) -> list[torch.Tensor]:
    return [p.detach().clone() for part in model for p in part.parameters()]


@pytest.mark.parametrize("implementation", ["for-loop", "foreach", "fused"])
def test_the_container_beside_adamw(implementation: str) -> None:
    """Its switches `fused` and `foreach` arrive in the groups, where they mean nothing to us."""
    ours, theirs = parts(), parts()
    rates = train(ours, *build("fastopt.Adam", ours, implementation), range(STEPS))
    expected = train(theirs, *build("AdamW", theirs), range(STEPS))
    torch.testing.assert_close(weights(ours), weights(theirs), rtol=1e-10, atol=1e-12)
    assert [sorted(entry.values()) for entry in rates] == [sorted(entry.values()) for entry in expected]
    assert list(rates[0]) == [key.replace("AdamW", "Adam") for key in expected[0]]


@pytest.mark.parametrize("name", ["fastopt.Adam", "fastopt.ranger"])
def test_its_checkpoint_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    """Saved with names of parameters, flat, by torch.distributed.checkpoint, before which it makes a step with lr 0."""
    whole, resumed = parts(), parts()
    opt, schedule = build(name, whole)
    before = weights(whole)
    assert opt.state_dict()
    assert all(torch.equal(a, b) for a, b in zip(before, weights(whole), strict=True))
    train(whole, opt, schedule, range(3))
    saved = {"opt": opt, "schedule": schedule, **{f"part{i}": part for i, part in enumerate(whole)}}
    dcp.save(saved, checkpoint_id=str(tmp_path), no_dist=True)
    train(whole, opt, schedule, range(3, STEPS))

    opt, schedule = build(name, resumed)
    loaded = {"opt": opt, "schedule": schedule, **{f"part{i}": part for i, part in enumerate(resumed)}}
    dcp.load(loaded, checkpoint_id=str(tmp_path), no_dist=True)
    train(resumed, opt, schedule, range(3, STEPS))
    assert all(torch.equal(a, b) for a, b in zip(weights(whole), weights(resumed), strict=True))


@pytest.mark.parametrize("block", blocks("docs/integrations.md", "torchtitan"), ids=Block.title)
def test_example_of_the_page(block: Block, tmp_path: Path) -> None:
    assert "lr/Adam" in block.run_here(tmp_path)
