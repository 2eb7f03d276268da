"""timm's groups, schedulers, scaler, checkpoints and Lookahead, beside its AdamW."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt

from ..pages import Block, blocks
from .torchvision_stub import torchvision_stub

if find_spec("timm") is None:
    pytest.skip("timm is not installed", allow_module_level=True)

with torchvision_stub():
    import timm
    from timm.models import resume_checkpoint
    from timm.optim import OptimInfo, create_optimizer_v2, param_groups_layer_decay
    from timm.optim._optim_factory import default_registry
    from timm.scheduler import create_scheduler_v2
    from timm.utils import NativeScaler

EPOCHS, UPDATES = 4, 2
#: What makes fastopt's Adam torch's AdamW.
AS_TORCHS: dict[str, Any] = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-8, "weight_decay": 0.05}


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    """fastopt's Adam under a name of timm's factory."""
    default_registry.register(OptimInfo(name="fastopt", opt_class=fastopt.Adam, has_betas=True))
    yield
    del default_registry._optimizers["fastopt"]


def network() -> Any:
    """timm's smallest vision transformer, in float64."""
    torch.manual_seed(0)
    return timm.create_model("test_vit", img_size=32, num_classes=4).double()


def images(update: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(update)
    x = torch.randn(2, 3, 32, 32, generator=generator, dtype=torch.float64)
    return x, torch.randint(4, (2,), generator=generator)


def train(model: nn.Module, opt: Any, epochs: range) -> list[list[float]]:
    """timm's training loop; returns the learning rates of the groups in each epoch."""
    schedule, _ = create_scheduler_v2(
        opt,
        "cosine",
        num_epochs=EPOCHS,
        warmup_epochs=1,
        warmup_lr=1e-3,
        updates_per_epoch=UPDATES,
        step_on_epochs=False,
    )
    schedule.step_update(epochs.start * UPDATES)
    scaler = NativeScaler(device="cpu")
    rates = []
    for epoch in epochs:
        for number in range(epoch * UPDATES, (epoch + 1) * UPDATES):
            x, y = images(number)
            loss = nn.functional.cross_entropy(model(x), y)
            scaler(loss, opt, clip_grad=1.0, parameters=model.parameters())
            opt.zero_grad()
            schedule.step_update(number + 1)
        rates.append([group["lr"] for group in opt.param_groups])
    return rates


def assert_close(one: nn.Module, two: nn.Module) -> None:
    torch.testing.assert_close(one.state_dict(), two.state_dict(), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("layer_decay", [None, 0.7])
def test_by_name_beside_adamw(layer_decay: float | None) -> None:
    """Groups without decay, or one group per layer with `lr_scale`; a schedule with warm-up; clipping; a scaler."""
    models, rates, opts = [], [], []
    for name in ("fastopt", "adamw"):
        model = network()
        opts.append(create_optimizer_v2(model, name, layer_decay=layer_decay, **AS_TORCHS))
        rates.append(train(model, opts[-1], range(EPOCHS)))
        models.append(model)
    assert isinstance(opts[0], fastopt.Adam)
    assert {group["weight_decay"] for group in opts[0].param_groups} == {0.0, 0.05}
    assert rates[0] == rates[1]
    assert len(set(rates[0][0])) == (1 if layer_decay is None else len(opts[0].param_groups) // 2)
    assert_close(*models)


def test_a_class_with_groups_of_timm() -> None:
    """Without the factory: the same groups, passed to the class."""
    model, expected = network(), network()
    groups = param_groups_layer_decay(model, 0.05, no_weight_decay_list=model.no_weight_decay(), layer_decay=0.7)
    train(model, fastopt.Adam(groups, lr=1e-2, betas=(0.9, 0.99), eps=1e-8), range(EPOCHS))
    train(expected, create_optimizer_v2(expected, "adamw", layer_decay=0.7, **AS_TORCHS), range(EPOCHS))
    assert_close(model, expected)


def test_lookahead_by_prefix_and_ours() -> None:
    """`lookahead_` puts timm's wrapper around ours, as around AdamW; `fastopt.Lookahead` does the same as a chain."""
    by_prefix, expected, ours = network(), network(), network()
    train(by_prefix, create_optimizer_v2(by_prefix, "lookahead_fastopt", **AS_TORCHS), range(EPOCHS))
    train(expected, create_optimizer_v2(expected, "lookahead_adamw", **AS_TORCHS), range(EPOCHS))
    assert_close(by_prefix, expected)
    inner = create_optimizer_v2(ours, "fastopt", **AS_TORCHS)
    slow = {name: p.detach().clone() for name, p in ours.named_parameters()}
    train(ours, fastopt.Lookahead(inner, k=6), range(3))  # six updates: fast and slow weights meet
    plain = network()
    train(plain, create_optimizer_v2(plain, "adamw", **AS_TORCHS), range(3))
    for (name, p), fast in zip(ours.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(p, (slow[name] + fast) / 2, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("name", ["fastopt", "lookahead_fastopt"])
def test_its_checkpoint_resumes_bit_for_bit(name: str, tmp_path: Path) -> None:
    whole, resumed = network(), network()
    one, two = (create_optimizer_v2(model, name, layer_decay=0.7, **AS_TORCHS) for model in (whole, resumed))
    train(whole, one, range(2))
    file = tmp_path / "last.pth.tar"
    torch.save({"epoch": 1, "version": 2, "state_dict": whole.state_dict(), "optimizer": one.state_dict()}, file)
    train(whole, one, range(2, EPOCHS))
    start = resume_checkpoint(resumed, str(file), optimizer=two, log_info=False)
    train(resumed, two, range(start, EPOCHS))
    assert all(torch.equal(a, b) for a, b in zip(whole.parameters(), resumed.parameters(), strict=True))


@pytest.mark.parametrize("block", blocks("docs/integrations.md", "timm"), ids=Block.title)
def test_example_of_the_page(block: Block, tmp_path: Path) -> None:
    assert "0." in block.run_here(tmp_path)
