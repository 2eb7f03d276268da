"""Every form of `params`: what it becomes, and what is refused with which words."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastopt import SGD, Adam, Optimizer, average_grad, average_sqr_grad, momentum_step, sgd_step, weight_decay

from .samples import Case, every_native, model, tensors

A, B, C = tensors((2,), (3,), (1,))


def shape_of(opt: Optimizer) -> list[list[Any]]:
    """The members of each group, tensors by identity."""
    return [list(group) for group in opt.param_lists]


def same(found: list[list[Any]], wanted: list[list[Any]]) -> bool:
    return [[id(p) for p in g] for g in found] == [[id(p) for p in g] for g in wanted]


@pytest.mark.parametrize(
    ("params", "wanted"),
    [
        (A, [[A]]),
        (torch.tensor(1.0), None),
        ([A, B, C], [[A, B, C]]),
        ((A, B, C), [[A, B, C]]),
        (lambda: (p for p in (A, B)), [[A, B]]),
        (lambda: iter([A, B]), [[A, B]]),
        ({"a": A, "b": B}.values(), [[A, B]]),
        ([[A, B], [C]], [[A, B], [C]]),
        ([(A, B), (C,)], [[A, B], [C]]),
        (((A, B), [C]), [[A, B], [C]]),
        (lambda: [(p for p in (A, B)), iter([C])], [[A, B], [C]]),
        (lambda: ([p] for p in (A, B)), [[A], [B]]),
        (lambda: [[A], B], [[A], [B]]),
        ([[A], []], [[A], []]),
        (nn.ParameterList([nn.Parameter(A)]), None),
        ([{"params": [A, B]}, {"params": C}], [[A, B], [C]]),
        (lambda: [{"params": (p for p in (A, B))}], [[A, B]]),
        (lambda: [{"params": [A]}, [B, C]], [[A], [B, C]]),
        ([("a", A), ("b", B)], [[A, B]]),
        ([[("a", A)], [("b", B), ("c", C)]], [[A], [B, C]]),
        ({"a": A}.items(), [[A]]),
    ],
)
def test_forms(params: Any, wanted: list[list[Tensor]] | None) -> None:
    given = params() if callable(params) and not isinstance(params, nn.Module) else params
    opt = SGD(given, lr=0.1)
    if wanted is None:
        assert [len(g) for g in opt.param_lists] == [1]
    else:
        assert same(shape_of(opt), wanted)


@pytest.mark.parametrize(
    ("params", "wanted"),
    [([1, 2, 3], [[1, 2, 3]]), (range(3), [[0, 1, 2]]), ([[1, 2], [3]], [[1, 2], [3]])],
)
def test_numbers_stand_in_for_parameters(params: Any, wanted: list[list[int]]) -> None:
    opt = Optimizer(params, sgd_step, lr=0.1)
    assert opt.param_lists == wanted
    opt.step()
    opt.zero_grad()


def test_names_from_named_parameters() -> None:
    m = model()
    opt = Adam(m.named_parameters())
    assert opt.param_groups[0]["param_names"] == ["0.weight", "0.bias", "2.weight", "2.bias"]
    assert opt.param_names() == {p: n for n, p in m.named_parameters()}
    assert "param_names" not in opt.hypers[0]


def test_names_per_group_and_in_torchs_dicts() -> None:
    m = model()
    for params in (
        [m[0].named_parameters(), m[2].named_parameters()],
        [{"params": m[0].named_parameters(), "lr": 0.5}, {"params": list(m[2].named_parameters())}],
        [
            {"params": list(m[0].parameters()), "param_names": ["weight", "bias"]},
            {"params": m[2].named_parameters("z")},
        ],
    ):
        opt = Adam(params, lr=0.1)
        assert [len(g["param_names"]) for g in opt.param_groups] == [2, 2]
        assert len(opt.param_names()) == 4


@pytest.mark.parametrize(
    ("params", "error", "words"),
    [
        ([], ValueError, "no parameters"),
        ((), ValueError, "no parameters"),
        (iter(()), ValueError, "no parameters"),
        ([A, A], ValueError, "twice"),
        ([[A, B], [C, A]], ValueError, r"twice, as params\[0\] of group 0 and as params\[1\] of group 1"),
        (nn.Linear(2, 2), TypeError, "module"),
        ([nn.Linear(2, 2)], TypeError, "Linear"),
        ([nn.Sequential(nn.Linear(2, 2))], TypeError, "module"),
        ({A, B}, TypeError, "set"),
        ([{A, B}], TypeError, "set"),
        ("weights", TypeError, "str"),
        (None, TypeError, "NoneType"),
        ({"params": [A]}, TypeError, "dict"),
        ([{"lr": 0.1}], TypeError, "without 'params'"),
        ([A, None], TypeError, r"params\[1\] of params is a NoneType"),
        ([[A], [B, "x"]], TypeError, r"params\[1\] of group 1 is a str"),
        ([[A], None], TypeError, "group 1 is a NoneType"),
        ([("a", A), B], ValueError, "name all or none"),
        ([[("a", A)], [B]], ValueError, "name all or none"),
        ([("a", A), ("a", B)], ValueError, "'a'"),
        ([{"params": [A, B], "param_names": ["a"]}], ValueError, "2 params and 1 param_names"),
        (lambda: [A.clone().requires_grad_() * 2], ValueError, "non-leaf"),
        (lambda: A.clone().requires_grad_() * 2, ValueError, "non-leaf"),
    ],
)
def test_refused(params: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        SGD(params() if callable(params) and not isinstance(params, nn.Module) else params, lr=0.1)


def test_the_callers_lists_and_dicts_stay_the_callers() -> None:
    members, group = [A], {"params": [B], "wd": 0.5}
    opt = SGD([members, group], lr=0.1)
    members.append(C)
    group["lr"] = 7
    assert same(shape_of(opt), [[A], [B]])
    assert set(group) == {"params", "wd", "lr"}
    opt.param_groups[1]["lr"] = 9
    assert group["lr"] == 7


@pytest.mark.parametrize("spelling", ["wd", "weight_decay"])
def test_hypers_of_a_torch_style_group(spelling: str) -> None:
    opt = Adam([{"params": [A], spelling: 0.5, "lr": 0.2}, {"params": [B]}], lr=0.1, wd=0.25)
    assert [h["wd"] for h in opt.hypers] == [0.5, 0.25]
    assert [h["lr"] for h in opt.hypers] == [0.2, 0.1]
    assert [g["weight_decay"] for g in opt.param_groups] == [0.5, 0.25]
    assert all("wd" not in g for g in opt.param_groups)


@pytest.mark.parametrize("own", [{"betas": (0.5, 0.6)}, {"mom": 0.5, "sqr_mom": 0.6}])
def test_betas_of_a_torch_style_group(own: dict[str, Any]) -> None:
    opt = Adam([{"params": [A], **own}, {"params": [B], "mom": 0.7}])
    assert [g["betas"] for g in opt.param_groups] == [(0.5, 0.6), (0.7, 0.99)]


@pytest.mark.parametrize("both", [{"wd": 0.1, "weight_decay": 0.1}, {"mom": 0.5, "betas": (0.5, 0.9)}])
def test_both_spellings_in_one_group_are_refused(both: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="same hyper-parameter"):
        Adam([{"params": [A], **both}])


@pytest.mark.parametrize("betas", [0.9, (0.9,), (0.9, 0.9, 0.9)])
def test_betas_that_are_no_pair_are_refused(betas: Any) -> None:
    opt = Adam([A])
    for build in (lambda group: Adam([group]), opt.add_param_group):
        with pytest.raises(ValueError, match="expected one number for each of mom, sqr_mom"):
            build({"params": [B], "betas": betas})
    assert len(opt.param_groups) == 1


def test_unknown_keys_of_a_group_are_kept() -> None:
    keys = {"name": "head", "lr_scale": 0.1, "fused": None, "foreach": False, "lookahead_k": 3, "initial_lr": 0.5}
    opt = Adam([{"params": [A], **keys}])
    assert {k: opt.param_groups[0][k] for k in keys} == keys
    A.grad = torch.ones(2)
    opt.step()
    assert opt.state_dict()["param_groups"][0]["lr_scale"] == 0.1


def test_torchs_names_that_no_callback_asks_for_are_no_secret() -> None:
    """As the groups of the Hugging Face Trainer have them, with a chain that is not in a class of its own."""
    group: dict[str, Any] = {"params": [A], "weight_decay": 0.5}
    with pytest.warns(UserWarning, match=r"weight_decay=0.5 has no effect.*'wd'.*hp_map = \{'weight_decay': 'wd'\}"):
        opt = Optimizer([group], [weight_decay, sgd_step], lr=0.1)
    assert opt.hypers == [{"wd": 0.0, "lr": 0.1, "weight_decay": 0.5}]
    with pytest.warns(UserWarning, match="momentum=0.5 has no effect"):
        opt = Optimizer([A], [average_grad, sgd_step], lr=0.1, momentum=0.5)
    with pytest.warns(UserWarning, match="weight_decay=0.1 has no effect"):
        Optimizer([A], weight_decay, lr=0.1).add_param_group({"params": [B], "weight_decay": 0.1})


def test_torchs_names_that_a_class_or_a_callback_asks_for() -> None:
    class Decaying(Optimizer):
        hp_map: Mapping[str, str] = {"weight_decay": "wd"}

    def own_decay(p: Tensor, lr: float, weight_decay: float, wd: float = 0.0, **kwargs: Any) -> None:
        """Has a use for either name."""

    group: dict[str, Any] = {"params": [A], "weight_decay": 0.5}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        opt = Decaying([group], [weight_decay, sgd_step], lr=0.1)
        Optimizer([group], [own_decay], lr=0.1)
        Optimizer([group], [sgd_step], lr=0.1)  # nothing decays there
    assert opt.hypers == [{"wd": 0.5, "lr": 0.1}]
    assert opt.param_groups[0]["weight_decay"] == 0.5


class Own(Optimizer):
    """A chain in a class that has PyTorch's names in its groups; its callbacks bring defaults of their own."""

    hp_map: Mapping[str, str] = {"betas__0": "mom", "betas__1": "sqr_mom", "weight_decay": "wd"}

    def __init__(self, params: Any, lr: float = 0.1, **hypers: Any) -> None:
        super().__init__(params, [weight_decay, average_grad, average_sqr_grad, momentum_step], lr=lr, **hypers)


@pytest.mark.parametrize(
    "given",
    [
        {"betas": (0.5, 0.7), "weight_decay": 0.3},
        {"betas": [0.5, 0.7], "wd": 0.3},
        {"mom": 0.5, "sqr_mom": 0.7, "wd": 0.3},
        {"mom": [0.5], "sqr_mom": 0.7, "weight_decay": [0.3]},
    ],
)
def test_a_class_of_ones_own_takes_either_spelling(given: dict[str, Any]) -> None:
    opt = Own([A], **given)
    assert opt.hypers == [{"wd": 0.3, "mom": 0.5, "sqr_mom": 0.7, "lr": 0.1}]
    assert opt.defaults == {"weight_decay": 0.3, "betas": (0.5, 0.7), "lr": 0.1}


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"weight_decay": 0.1, "wd": 0.1}, "'weight_decay' and 'wd' are the same"),
        ({"wd": 0.1, "weight_decay": 0.1}, "'weight_decay' and 'wd' are the same"),
        ({"betas": (0.5, 0.7), "mom": 0.5}, "'betas' and 'mom' are the same"),
        ({"betas": 0.5}, "one number for each of mom, sqr_mom"),
        ({"betas": (0.5,)}, "one number for each of mom, sqr_mom"),
        ({"betas": [(0.5, 0.6), (0.7, 0.8)]}, "one number for each of mom, sqr_mom"),
    ],
)
def test_but_not_both(given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        Own([A], **given)


class TestAddParamGroup:
    @every_native
    def test_takes_the_defaults(self, case: Case) -> None:
        p, q = tensors((2,), (3,), seed=9)
        opt = case([p], lr=0.25)
        before = dict(opt.param_groups[0])
        opt.add_param_group({"params": [q]})
        assert {k: v for k, v in opt.param_groups[1].items() if k != "params"} == {
            k: v for k, v in before.items() if k != "params"
        }
        assert len(opt.hypers) == len(opt.param_lists) == 2
        q.grad = torch.ones(3)
        moved = q.clone()
        opt.step()
        assert not torch.equal(q, moved)

    def test_takes_its_own_values_in_either_spelling(self) -> None:
        p, q, r = tensors((2,), (3,), (1,), seed=9)
        opt = Adam([p])
        opt.add_param_group({"params": q, "lr": 0.5, "wd": 0.7, "mom": 0.1})
        opt.add_param_group({"params": (x for x in [r]), "weight_decay": 0.3, "betas": (0.4, 0.5)})
        assert [h["wd"] for h in opt.hypers] == [0.01, 0.7, 0.3]
        assert [g["betas"] for g in opt.param_groups] == [(0.9, 0.99), (0.1, 0.99), (0.4, 0.5)]

    @pytest.mark.parametrize(
        ("group", "error", "words"),
        [
            ([B], TypeError, "list"),
            ({"lr": 0.1}, TypeError, "params"),
            ({"params": [A]}, ValueError, "twice"),
            ({"params": [B, B]}, ValueError, "twice"),
            ({"params": {B}}, TypeError, "set"),
            ({"params": [B], "lr": -1.0}, ValueError, "lr of group 1"),
            ({"params": [("b", B)]}, ValueError, "names"),
            ({"params": [B], "wd": 0.1, "weight_decay": 0.1}, ValueError, "same"),
        ],
    )
    def test_refused_and_nothing_changed(self, group: Any, error: type[Exception], words: str) -> None:
        opt = Adam([A])
        with pytest.raises(error, match=words):
            opt.add_param_group(group)
        assert len(opt.param_groups) == 1

    def test_names_go_on(self) -> None:
        opt = Adam([("a", A)])
        opt.add_param_group({"params": [("b", B)]})
        assert opt.param_names() == {A: "a", B: "b"}
        with pytest.raises(ValueError, match="several parameters named 'c'"):
            opt.add_param_group({"params": [("c", C), ("c", torch.ones(1))]})


class TestCbs:
    def test_one_several_or_none(self) -> None:
        assert Optimizer([A], None).cbs == ()
        assert Optimizer([A], sgd_step, lr=0.1).cbs == (sgd_step,)
        cbs: list[Callable[..., Any]] = [sgd_step]
        opt = Optimizer([A], cbs, lr=0.1)
        cbs.clear()
        assert opt.cbs == (sgd_step,)

    def test_what_is_no_function_is_named(self) -> None:
        with pytest.raises(TypeError, match=r"cbs\[1\] is a str"):
            Optimizer([A], [sgd_step, "sgd"], lr=0.1)  # type: ignore[list-item]
        with pytest.raises(TypeError):
            Optimizer([A], 3)  # type: ignore[arg-type]

    def test_train_bn_is_kept(self) -> None:
        assert Optimizer([A], sgd_step, lr=0.1).train_bn is True
        assert Optimizer([A], sgd_step, False, lr=0.1).train_bn is False


def test_a_generator_that_is_used_up() -> None:
    params = iter(tensors((2,)))
    Adam(params)
    with pytest.raises(ValueError, match=r"a generator such as .* is used up after the first time"):
        Adam(params)
