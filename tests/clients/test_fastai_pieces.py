"""fastai's functions and states in optimizers from here, and the other way round."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor

import fastopt

pytest.importorskip("fastai", reason="fastai is not installed")

import fastai.optimizer as fastais
from fastai.callback.fp16 import _copy_state, get_master, to_master_grads, to_model_params

FACTORIES: list[tuple[str, dict[str, Any]]] = [
    ("SGD", {"wd": 0.1}),
    ("SGD", {"mom": 0.9, "wd": 0.1, "decouple_wd": False}),
    ("RMSProp", {"mom": 0.8}),
    ("Adam", {}),
    ("RAdam", {"sqr_mom": 0.9}),
    ("QHAdam", {"wd": 0.1}),
    ("Larc", {"wd": 0.1}),
    ("Larc", {"clip": False}),
    ("Lamb", {"wd": 0.1}),
]


def groups() -> list[list[Tensor]]:
    """Two groups of parameters in float64."""
    generator = torch.Generator().manual_seed(0)
    made = [torch.rand(shape, generator=generator, dtype=torch.float64) for shape in ((4, 3), (5,), (2, 2, 2))]
    return [made[:2], made[2:]]


def run(opt: Any, params: Sequence[Sequence[Tensor]], steps: range) -> list[Tensor]:
    """The parameters after steps with gradients that depend on the number of the step alone."""
    flat = [p for group in params for p in group]
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in flat:
            p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        opt.step()
    return flat


def assert_close(one: Any, two: Any) -> None:
    torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize(("name", "hypers"), FACTORIES, ids=[f"{n}-{i}" for i, (n, _) in enumerate(FACTORIES)])
def test_the_cbs_of_a_factory(name: str, hypers: dict[str, Any]) -> None:
    params, expected = groups(), groups()
    theirs = getattr(fastais, name)(expected, lr=0.05, **hypers)
    values = {k: [h[k] for h in theirs.hypers] for k in theirs.hypers[0]}
    ours = fastopt.Optimizer(params, theirs.cbs, **values)
    assert_close(run(ours, params, range(15)), run(theirs, expected, range(15)))
    assert ours.hypers == list(theirs.hypers)
    assert ours.state[params[0][0]].keys() == theirs.state[expected[0][0]].keys()


@pytest.mark.parametrize(("name", "recorded"), [("Adam", True), ("QHAdam", True), ("RMSProp", True), ("Lamb", False)])
def test_which_of_them_are_recorded(name: str, recorded: bool) -> None:
    """Functions of fastai that do not branch on the values of tensors run as one program, like those from here."""
    params = groups()
    theirs = getattr(fastais, name)(params, lr=0.05)
    opt = fastopt.Optimizer(params, theirs.cbs, **theirs.hypers[0])
    run(opt, params, range(2))
    assert (opt.engine[0].executor != "eager") == recorded, opt.engine[0]


def test_lookahead_around_the_cbs_of_a_factory() -> None:
    params, expected = groups(), groups()
    theirs = fastais.ranger(expected, lr=0.05, k=3)
    inner = fastopt.Optimizer(params, theirs.opt.cbs, **theirs.hypers[0])
    assert_close(run(fastopt.Lookahead(inner, k=3), params, range(10)), run(theirs, expected, range(10)))


def test_one_function_of_fastai_among_ours() -> None:
    params, expected = groups(), groups()
    chain = [fastais.weight_decay, fastopt.average_grad, fastais.momentum_step]
    ours = fastopt.Optimizer(params, chain, lr=[0.1, 0.01], wd=0.1)
    theirs = fastais.SGD(expected, lr=[0.1, 0.01], mom=0.9, wd=0.1)
    assert_close(run(ours, params, range(5)), run(theirs, expected, range(5)))


def test_our_functions_in_an_optimizer_of_fastai() -> None:
    params, expected = groups(), groups()
    ours = fastopt.Adam(expected, lr=0.05, wd=0.1)
    theirs = fastais.Optimizer(params, list(ours.cbs), lr=0.05, mom=0.9, sqr_mom=0.99, eps=1e-5, wd=0.1)
    assert_close(run(theirs, params, range(5)), run(ours, expected, range(5)))


@pytest.mark.parametrize("name", ["Adam", "ranger"])
def test_a_state_of_fastai_goes_on_here(name: str) -> None:
    params, expected = groups(), groups()
    theirs = getattr(fastais, name)(expected, lr=0.05)
    theirs.set_hyper("lr", [0.05, 0.01])
    run(theirs, expected, range(4))
    for group, reached in zip(params, expected, strict=True):
        for p, value in zip(group, reached, strict=True):
            p.copy_(value)
    ours = getattr(fastopt, name)(params)
    ours.load_state_dict(copy.deepcopy(theirs.state_dict()))  # fastai's holds the live tensors, and so would ours
    assert_close(run(ours, params, range(4, 12)), run(theirs, expected, range(4, 12)))


@pytest.mark.parametrize(
    ("cls", "hypers"),
    [(torch.optim.AdamW, {}), (torch.optim.SGD, {}), (torch.optim.RMSprop, {"momentum": 0.5}), (torch.optim.NAdam, {})],
)
def test_our_wrapper_of_torch_optimizers_beside_that_of_fastai(cls: Any, hypers: dict[str, Any]) -> None:
    params, expected = groups(), groups()
    ours = fastopt.OptimWrapper(params, opt=cls, lr=0.01, **hypers)
    theirs = fastais.OptimWrapper(expected, opt=cls, lr=0.01, **hypers)
    run(ours, params, range(3)), run(theirs, expected, range(3))
    for opt in (ours, theirs):
        opt.set_hypers(lr=slice(1e-3, 1e-2), wd=0.1, mom=0.8)
    assert_close(run(ours, params, range(3, 6)), run(theirs, expected, range(3, 6)))
    shared = ours.hypers[1].keys() & theirs.hypers[1].keys()
    assert {k: ours.hypers[1][k] for k in shared} == {k: theirs.hypers[1][k] for k in shared}


def test_master_weights_that_fastai_swaps_in() -> None:
    """What its own mixed precision, which runs on CUDA alone, does: masters in the place of the groups, and back."""
    reached: list[list[list[Tensor]]] = []
    for make in (fastopt.Adam, fastais.Adam):
        halves = [[p.half().requires_grad_() for p in group] for group in groups()]
        opt = make(halves, lr=0.05)
        model, masters = get_master(opt)
        _copy_state(opt, model, masters)
        for step in range(4):
            generator = torch.Generator().manual_seed(step)
            for p in (p for group in halves for p in group):
                p.grad = torch.randn(p.shape, generator=generator).half()
            to_master_grads(model, masters)
            opt.step()
            to_model_params(model, masters)
        _copy_state(opt, masters, model)
        assert [[id(p) for p in group] for group in opt.param_lists] == [[id(p) for p in group] for group in halves]
        assert opt.state[halves[0][0]]["step"] == 4
        reached.append(masters)
    assert reached[0][0][0].dtype == torch.float32
    torch.testing.assert_close(*reached)
