"""`capturable=True`: counts are tensors that a step changes in place, and nothing of a step is decided on the host."""

from __future__ import annotations

import io
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fastopt
from fastopt.distributed import shard

OPTIMIZERS: dict[str, Any] = {
    "adam": fastopt.Adam,
    "radam": fastopt.RAdam,
    "sadam": lambda ps, **kwargs: fastopt.RAdam(ps, beta=50.0, **kwargs),
    "radam that never rectifies": lambda ps, **kwargs: fastopt.RAdam(ps, sqr_mom=0.5, **kwargs),
    "qhadam": fastopt.QHAdam,
    "lamb": fastopt.Lamb,
    "larc": fastopt.Larc,
    "sgd": lambda ps, **kwargs: fastopt.SGD(ps, mom=0.9, **kwargs),
    "rmsprop": fastopt.RMSProp,
    "ranger": fastopt.ranger,
    "lookahead": lambda ps, **kwargs: fastopt.Lookahead(fastopt.Adam(ps, **kwargs), k=3),
}


def weights(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(0)
    return [nn.Parameter(torch.randn(shape, generator=generator, dtype=dtype)) for shape in ((5, 4), (7,), ())]


def give_gradients(params: list[nn.Parameter], step: int) -> None:
    generator = torch.Generator().manual_seed(1 + step)
    for p in params:
        p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)


@pytest.mark.parametrize("engine", ["eager", "foreach", None])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_as_with_counts_on_the_host(name: str, engine: str | None) -> None:
    params, expected = weights(), weights()
    rate = torch.tensor(0.1, dtype=torch.float64)
    opt = OPTIMIZERS[name](params, lr=rate, engine=engine, capturable=True)
    plain = OPTIMIZERS[name](expected, lr=0.1, engine=engine)
    places: dict[Any, int] = {}
    for step in range(14):
        rate.fill_(0.1 / (step + 1))
        plain.set_hyper("lr", 0.1 / (step + 1))
        for each, ps in ((opt, params), (plain, expected)):
            give_gradients(ps, step)
            each.step()
        for p in params:
            for key in opt.state[p].keys() & {"step", "count"}:
                count = opt.state[p][key]
                assert count == step + 1
                assert (count.shape, count.dtype) == ((), torch.float32)
                assert (
                    places.setdefault((p, key), count.data_ptr()) == count.data_ptr()
                )  # what a graph would go on with
    # float32 in between: 1 - mom^step has lost some digits, those of r in RAdam are the last ones of r_inf
    torch.testing.assert_close(params, expected, rtol=2e-4, atol=2e-5)
    assert "capturable" not in opt.hypers[0]


def test_beside_adamw_of_torch() -> None:
    params, expected = weights(), weights()
    hypers: dict[str, Any] = {"lr": 0.01, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.1}
    opt = fastopt.Adam(params, capturable=True, **hypers)
    plain = torch.optim.AdamW(expected, **hypers)
    for step in range(10):
        for each, ps in ((opt, params), (plain, expected)):
            give_gradients(ps, step)
            each.step()
    torch.testing.assert_close(params, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_a_zero_rate_moves_nothing(name: str) -> None:
    params, before = weights(), [p.detach().clone() for p in weights()]
    opt = OPTIMIZERS[name](params, lr=torch.tensor(0.0), capturable=True)
    for step in range(7):
        give_gradients(params, step)
        opt.step()
    assert all(map(torch.equal, params, before))


def test_a_step_is_recorded_and_decides_nothing_on_the_host() -> None:
    """One program for all steps after the counts have moved, where RAdam and Lookahead have two on the host."""
    params = weights()
    opt = fastopt.ranger(params, lr=torch.tensor(0.1), capturable=True, engine="foreach")
    for step in range(3):
        give_gradients(params, step)
        opt.step()
    known = len(opt.program())
    for step in range(3, 20):
        give_gradients(params, step)
        opt.step()
    assert len(opt.program()) == known


def test_in_one_group_of_several_and_in_groups_of_dicts() -> None:
    a, b, c = weights()
    opt = fastopt.Adam([{"params": [a], "capturable": True}, {"params": [b]}])
    opt.add_param_group({"params": [c], "capturable": True})
    for step in range(2):
        give_gradients([a, b, c], step)
        opt.step()
    assert [isinstance(opt.state[p]["step"], Tensor) for p in (a, b, c)] == [True, False, True]
    opt.param_groups[1]["capturable"] = True
    opt.step()
    assert [float(opt.state[p]["step"]) for p in (a, b, c)] == [3, 3, 3]
    assert isinstance(opt.state[b]["step"], Tensor)


def test_a_state_dict_goes_on_in_either_kind() -> None:
    def start(capturable: bool) -> tuple[list[nn.Parameter], Any]:
        params = weights()
        return params, fastopt.ranger(params, lr=0.1, capturable=capturable)

    def go_on(params: list[nn.Parameter], opt: Any, steps: range) -> None:
        for step in steps:
            give_gradients(params, step)
            opt.step()

    for first in (False, True):
        params, opt = start(first)
        go_on(params, opt, range(4))
        stored = io.BytesIO()
        torch.save({"opt": opt.state_dict(), "params": params}, stored)
        go_on(params, opt, range(4, 9))
        for second in (False, True):
            others, other = start(second)
            stored.seek(0)
            saved = torch.load(stored, weights_only=True)
            for p, value in zip(others, saved["params"], strict=True):
                p.data.copy_(value)
            other.load_state_dict(saved["opt"])
            go_on(others, other, range(4, 9))
            torch.testing.assert_close(others, params, rtol=1e-4, atol=1e-5)
            assert float(other.state[others[0]]["step"]) == float(other.state[others[0]]["count"]) == 9


def test_a_loaded_count_is_ones_own() -> None:
    """Counts go on in place, so two optimizers must not share one."""
    params, others = weights(), weights()
    opt, other = fastopt.Adam(params, capturable=True), fastopt.Adam(others, capturable=True)
    give_gradients(params, 0)
    opt.step()
    other.load_state_dict(opt.state_dict())
    opt.step()
    assert (opt.state[params[0]]["step"], other.state[others[0]]["step"]) == (2, 1)


def test_no_bool() -> None:
    with pytest.raises(TypeError, match="capturable='yes', expected True or False"):
        fastopt.Adam(weights(), capturable="yes")  # type: ignore[arg-type]


def test_a_sharded_step_is_not_captured() -> None:
    model = nn.Linear(3, 2)
    with pytest.raises(ValueError, match="capturable=True, but a sharded step cannot be captured"):
        shard(fastopt.Adam(model.parameters(), capturable=True), model)
