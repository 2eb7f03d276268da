"""fastai's Learner with optimizers from here, beside the same Learner with fastai's own."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt

from ..pages import Block, blocks

pytest.importorskip("fastai", reason="fastai is not installed")

import fastai.optimizer as fastais
from fastai.basics import Callback, DataLoader, DataLoaders, Learner, load_learner, params
from fastai.callback.all import (
    GradientAccumulation,
    GradientClip,
    MixedPrecision,
    ProgressCallback,
    ReduceLROnPlateau,
    SaveModelCallback,
)
from torch.amp import GradScaler, autocast

BATCHES = 6
#: Each optimizer, here and in fastai, with arguments that make them the same.
PAIRS: dict[str, tuple[Any, Any, dict[str, Any]]] = {
    "SGD": (fastopt.SGD, fastais.SGD, {"mom": 0.9}),
    "RMSProp": (fastopt.RMSProp, fastais.RMSProp, {"mom": 0.8}),
    "Adam": (fastopt.Adam, fastais.Adam, {}),
    "RAdam": (fastopt.RAdam, fastais.RAdam, {}),
    "QHAdam": (fastopt.QHAdam, fastais.QHAdam, {}),
    "Larc": (fastopt.Larc, fastais.Larc, {}),
    "Lamb": (fastopt.Lamb, fastais.Lamb, {}),
    "ranger": (fastopt.ranger, fastais.ranger, {}),
}


@pytest.fixture(autouse=True)
def fail_where_fastai_only_warns() -> Iterator[None]:
    """An optimizer state that cannot be loaded is a warning of fastai."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="Could not load the optimizer state")
        yield


def network() -> nn.Sequential:
    """Three parts with norm layers, whose parameters fastai marks; none is zero, which LARC treats in its own way."""
    stem = [nn.Linear(6, 16, bias=False), nn.BatchNorm1d(16), nn.ReLU()]
    middle = [nn.Linear(16, 8), nn.LayerNorm(8), nn.Tanh()]
    made = nn.Sequential(nn.Sequential(*stem), nn.Sequential(*middle), nn.Linear(8, 1))
    generator = torch.Generator().manual_seed(1)
    for p in made.parameters():
        nn.init.uniform_(p, 0.1, 0.5, generator=generator)
    return made


def loss(predicted: Tensor, target: Tensor) -> Tensor:
    """Squared error, in the one dtype in which fastai can average it."""
    return nn.functional.mse_loss(predicted, target).float()


def parts(model: nn.Sequential) -> list[list[nn.Parameter]]:
    """The groups of `network()`."""
    return [params(part) for part in model]


def quiet(*_: Any) -> None:
    """Logs nothing."""


class Rows(list[tuple[Tensor, Tensor]]):
    """A data set that an exported Learner can leave out."""

    def new_empty(self) -> Rows:
        return Rows()


def learner(opt_func: Callable[..., Any], path: Path, dtype: torch.dtype = torch.float64, **kwargs: Any) -> Any:
    """A Learner of `network()` in three groups, on six batches in a fixed order."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8 * BATCHES + 16, 6, generator=generator, dtype=dtype)
    rows = list(zip(x, x.sum(1, keepdim=True).sin(), strict=True))
    train, valid = (DataLoader(Rows(part), bs=8, num_workers=0) for part in (rows[:-16], rows[-16:]))
    loaders = DataLoaders(train, valid, device=torch.device("cpu"))
    learn = Learner(loaders, network().to(dtype), loss, opt_func, splitter=parts, path=path, **kwargs)
    learn.remove_cb(ProgressCallback)
    learn.logger = quiet
    return learn


def weights(learn: Any) -> list[Tensor]:
    """Copies of the model's parameters and buffers."""
    return [value.detach().clone() for value in learn.model.state_dict().values()]


def assert_close(one: Any, two: Any) -> None:
    """The same weights up to rounding, in float64."""
    torch.testing.assert_close(weights(one), weights(two), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("name", PAIRS)
def test_frozen_then_one_cycle_with_rates_per_group(name: str, tmp_path: Path) -> None:
    here, there, hypers = PAIRS[name]
    # where a parameter does not decay, fastai's LARC takes its decay into the ratio all the same: so all decay there
    learners = [learner(partial(make, **hypers), tmp_path, wd_bn_bias=name == "Larc") for make in (here, there)]
    start = weights(learners[0])
    for learn in learners:
        learn.freeze()
        learn.fit_one_cycle(1, 1e-2, wd=0.1)
    frozen = [torch.equal(a, b) for a, b in zip(start, weights(learners[0]), strict=True)]
    names = list(learners[0].model.state_dict())
    # norm layers train in frozen groups too, by fastai's mark `force_train`
    assert [n for n, same in zip(names, frozen, strict=True) if same] == ["0.0.weight", "1.0.weight", "1.0.bias"]
    for learn in learners:
        learn.unfreeze()
        learn.fit_one_cycle(2, slice(1e-4, 1e-2), wd=0.1)
    assert_close(*learners)
    ours, theirs = learners
    assert isinstance(ours.opt, here)
    assert [h["lr"] for h in ours.opt.hypers] == [h["lr"] for h in theirs.opt.hypers]
    assert ours.recorder.hps == theirs.recorder.hps  # what fastai has scheduled, batch by batch: lr and momentum
    torch.testing.assert_close(torch.tensor(ours.recorder.values), torch.tensor(theirs.recorder.values))


def test_callbacks_that_reach_into_the_optimizer(tmp_path: Path) -> None:
    """Accumulated and clipped gradients, and a rate that falls on a plateau, which fastai writes into `hypers`."""
    learners = [learner(make, tmp_path, lr=0.05) for make in (fastopt.Adam, fastais.Adam)]
    for learn in learners:
        plateau = ReduceLROnPlateau(patience=1, factor=4.0, min_delta=10.0)
        learn.fit(4, cbs=[GradientAccumulation(16), GradientClip(0.1), plateau])
    assert_close(*learners)
    rates = [[h["lr"] for h in learn.opt.hypers] for learn in learners]
    assert rates[0] == rates[1] == [0.05 / 4**3] * 3


def test_saved_and_loaded_with_the_optimizer_bit_for_bit(tmp_path: Path) -> None:
    whole, resumed = (learner(fastopt.Adam, tmp_path) for _ in range(2))
    whole.fit(1, slice(1e-3, 1e-2))
    whole.save("half")
    whole.fit(1)
    resumed.create_opt()
    resumed.load("half")
    assert [h["lr"] for h in resumed.opt.hypers] == pytest.approx([1e-3, 10**-2.5, 1e-2])
    resumed.fit(1)
    for a, b in zip(weights(whole), weights(resumed), strict=True):
        assert torch.equal(a, b)


def test_the_best_epoch_is_kept_with_its_optimizer(tmp_path: Path) -> None:
    learn = learner(fastopt.ranger, tmp_path)
    seen: list[list[Tensor]] = []
    note = Callback(after_epoch=lambda self: seen.append(weights(self.learn)))
    learn.fit(2, 1e-2, cbs=[SaveModelCallback(with_opt=True, fname="best"), note])
    losses = [values[1] for values in learn.recorder.values]
    best = seen[losses.index(min(losses))]
    assert all(torch.equal(a, b) for a, b in zip(best, weights(learn), strict=True))


def test_finding_a_rate_changes_nothing_and_a_learner_is_exported(tmp_path: Path) -> None:
    found, plain = (learner(fastopt.Adam, tmp_path) for _ in range(2))
    found.fit(1, 1e-2)
    plain.fit(1, 1e-2)
    found.lr_find(num_it=8, show_plot=False)
    found.export("whole.pkl")
    exported = found.model.eval()(torch.ones(1, 6, dtype=torch.float64))
    for learn in (found, plain):
        learn.fit(1, 1e-2)
    for a, b in zip(weights(found), weights(plain), strict=True):
        assert torch.equal(a, b)
    assert isinstance(found.opt, fastopt.Adam)
    found.freeze()
    assert "Model frozen up to parameter group #2" in found.summary()
    x = torch.ones(1, 6, dtype=torch.float64)
    assert load_learner(tmp_path / "whole.pkl").model.eval()(x) == exported


def test_mixed_precision_with_a_scaler(tmp_path: Path) -> None:
    """fastai's callback is an optimizer to the GradScaler; on the CPU here, beside a plain loop, bit for bit."""

    class OnCpu(MixedPrecision):
        def before_fit(self) -> None:
            super().before_fit()
            self.autocast = autocast("cpu", dtype=torch.bfloat16)
            self.learn.scaler = GradScaler("cpu", init_scale=2.0**127)

    learn = learner(fastopt.Adam, tmp_path, dtype=torch.float32)
    model = copy.deepcopy(learn.model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that there is no CUDA for what the callback makes first
        learn.fit(2, 1e-2, cbs=OnCpu())

    opt = fastopt.Adam([params(part) for part in model], lr=1e-2)
    for p in model.parameters():
        opt.state[p]["do_wd"] = p.ndim > 1
    scaler = GradScaler("cpu", init_scale=2.0**127)
    skipped = 0
    for x, y in [*learn.dls.train, *learn.dls.train]:
        with autocast("cpu", dtype=torch.bfloat16):
            predicted = model(x)
        scaler.scale(loss(predicted.float(), y)).backward()
        scaler.step(opt)
        before = scaler.get_scale()
        scaler.update()
        skipped += scaler.get_scale() < before
        opt.zero_grad()
    assert 0 < skipped < 2 * BATCHES
    assert all(torch.equal(a, b) for a, b in zip(weights(learn), model.state_dict().values(), strict=True))


def test_inside_the_wrapper_of_fastai(tmp_path: Path) -> None:
    """That wrapper leaves the marks out: all parameters decay, and what is frozen stays."""
    hypers = {"betas": (0.9, 0.99), "eps": 1e-5, "weight_decay": 0.01}
    classes = (fastopt.Adam, torch.optim.AdamW)
    learners = [learner(partial(fastais.OptimWrapper, opt=partial(cls, **hypers)), tmp_path) for cls in classes]
    for learn in learners:
        learn.freeze()
        learn.fit_one_cycle(1, 1e-2)
        learn.unfreeze()
        learn.fit_one_cycle(1, slice(1e-3, 1e-2), wd=0.1)
    assert_close(*learners)


def test_a_torch_optimizer_in_our_wrapper_decays_as_fastai_does(tmp_path: Path) -> None:
    wrapped = partial(fastopt.OptimWrapper, opt=torch.optim.AdamW, betas=(0.9, 0.99))
    learners = [learner(make, tmp_path) for make in (wrapped, partial(fastais.Adam, eps=1e-8))]
    for learn in learners:
        learn.fit_one_cycle(2, slice(1e-3, 1e-2), wd=0.5)
    assert_close(*learners)


@pytest.mark.parametrize("block", blocks("docs/integrations.md", "fastai"), ids=Block.title)
def test_example_of_the_page(block: Block, tmp_path: Path) -> None:
    assert "'lr'" in block.run_here(tmp_path)
