"""OptimWrapper: its forms, that it steps as the bare torch optimizer, and what it adds to it."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fastopt import SGD, Adam, Lookahead, OptimWrapper

from .samples import assert_moved, assert_same, backward, give_grads, model, run_steps, tensors, train, values

TORCHS: list[tuple[type[torch.optim.Optimizer], dict[str, Any]]] = [
    (torch.optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}),
    (torch.optim.Adam, {"lr": 0.05, "weight_decay": 0.1, "amsgrad": True}),
    (torch.optim.AdamW, {"lr": 0.05, "foreach": True}),
    (torch.optim.AdamW, {"lr": 0.05, "fused": True}),
    (torch.optim.RMSprop, {"lr": 0.05, "momentum": 0.5, "centered": True}),
    (torch.optim.Adagrad, {"lr": 0.05}),
    (torch.optim.Adadelta, {"lr": 0.5}),
    (torch.optim.NAdam, {"lr": 0.05}),
    (torch.optim.RAdam, {"lr": 0.05}),
    (torch.optim.Adamax, {"lr": 0.05}),
    (torch.optim.ASGD, {"lr": 0.05}),
    (torch.optim.Rprop, {"lr": 0.05}),
    (torch.optim.Adafactor, {"lr": 0.05}),
]
every_torch = pytest.mark.parametrize(
    ("cls", "kwargs"), TORCHS, ids=[f"{c.__name__}-{i}" for i, (c, _) in enumerate(TORCHS)]
)


class TestForms:
    def test_a_built_optimizer_by_place_or_keyword(self) -> None:
        (p,) = tensors((2,))
        opt = torch.optim.SGD([p], lr=0.5)
        for wrapper in (OptimWrapper(opt), OptimWrapper(opt=opt)):
            assert wrapper.opt is opt
            assert wrapper.param_groups is opt.param_groups
            assert wrapper.state is opt.state
            assert wrapper.defaults is opt.defaults

    @pytest.mark.parametrize(
        "make", [torch.optim.SGD, partial(torch.optim.SGD, momentum=0.5), lambda p, **k: torch.optim.SGD(p, **k)]
    )
    def test_parameters_and_something_that_makes_one(self, make: Callable[..., torch.optim.Optimizer]) -> None:
        a, b = tensors((2,), (3,))
        for params in (
            [a, b],
            [[a], [b]],
            iter([a, b]),
            [{"params": [a]}, {"params": [b], "lr": 7.0}],
            [("a", a), ("b", b)],
        ):
            wrapper = OptimWrapper(params, opt=make, lr=0.5)
            assert isinstance(wrapper.opt, torch.optim.SGD)
            assert wrapper.hypers[0]["lr"] == 0.5
            assert sum(len(g) for g in wrapper.param_lists) == 2
        assert OptimWrapper([[a], [b]], make, lr=0.5).param_lists == [[a], [b]]

    def test_hypers_per_group_at_construction(self) -> None:
        a, b, c = tensors((2,), (3,), (1,))
        wrapper = OptimWrapper([[a], [b], [c]], torch.optim.AdamW, lr=slice(1e-4, 1e-2), weight_decay=[0.1, 0.2, 0.3])
        assert [h["lr"] for h in wrapper.hypers] == pytest.approx([1e-4, 1e-3, 1e-2])
        assert [h["wd"] for h in wrapper.hypers] == [0.1, 0.2, 0.3]
        with pytest.raises(ValueError, match="2 values for lr but there are 3"):
            OptimWrapper([[a], [b], [c]], torch.optim.AdamW, lr=[0.1, 0.2])

    def test_names_reach_torch(self) -> None:
        m = model()
        wrapper = OptimWrapper(m.named_parameters(), opt=torch.optim.AdamW)
        assert wrapper.param_names() == {p: n for n, p in m.named_parameters()}

    def test_untouched_with_convert_groups_off(self) -> None:
        (p,) = tensors((2,))
        seen: list[Any] = []

        def make(params: Any, **kwargs: Any) -> torch.optim.Optimizer:
            seen.append(params)
            return torch.optim.SGD([p], **kwargs)

        OptimWrapper("anything", opt=make, convert_groups=False, lr=0.1)
        assert seen == ["anything"]

    def test_its_own_hp_map(self) -> None:
        (p,) = tensors((2,))
        opt = torch.optim.SGD([p], lr=0.5, momentum=0.25)
        for wrapper in (OptimWrapper(opt, {"lr": "speed"}), OptimWrapper(opt=opt, hp_map={"lr": "speed"})):
            assert wrapper.hypers[0]["speed"] == 0.5
            assert wrapper.hypers[0]["momentum"] == 0.25
            wrapper.set_hyper("speed", 0.5)
            assert opt.param_groups[0]["lr"] == 0.5

    @pytest.mark.parametrize(
        ("args", "kwargs", "error", "words"),
        [
            ((), {}, ValueError, "cannot be None"),
            ((tensors((2,)),), {}, (ValueError, TypeError), "opt"),
            ((tensors((2,)), torch.optim.SGD(tensors((2,)))), {}, ValueError, "both `params` and a built"),
            ((torch.optim.SGD(tensors((2,))),), {"lr": 0.5}, ValueError, "built optimizer"),
            ((tensors((2,)), 3), {}, TypeError, "int"),
            (([], torch.optim.SGD), {}, ValueError, "no parameters"),
            ((2 * tensors((2,)), torch.optim.SGD), {"lr": 0.5}, ValueError, "twice"),
        ],
    )
    def test_refused(self, args: Any, kwargs: Any, error: Any, words: str) -> None:
        with pytest.raises(error, match=words):
            OptimWrapper(*args, **kwargs)


class TestSteps:
    @every_torch
    def test_as_the_bare_optimizer(self, cls: Any, kwargs: dict[str, Any]) -> None:
        m, n = model(), model()
        bare, wrapped = cls(m.parameters(), **kwargs), OptimWrapper(n.parameters(), opt=cls, **kwargs)
        train(m, bare, range(4))
        train(n, wrapped, range(4))
        assert_same(m.parameters(), n.parameters())

    @every_torch
    def test_its_state_is_torchs_and_moves_both_ways(self, cls: Any, kwargs: dict[str, Any]) -> None:
        m, n, o = model(), model(), model()
        bare, wrapped = cls(m.parameters(), **kwargs), OptimWrapper(n.parameters(), opt=cls, **kwargs)
        train(m, bare, range(3))
        train(n, wrapped, range(3))
        ours, theirs = wrapped.state_dict(), bare.state_dict()
        assert ours.keys() == theirs.keys()
        assert [sorted(e) for e in ours["state"].values()] == [sorted(e) for e in theirs["state"].values()]
        assert ours["param_groups"] == theirs["param_groups"]
        o.load_state_dict(m.state_dict())
        third = cls(o.parameters(), **{**kwargs, "lr": 9.0})
        third.load_state_dict(copy.deepcopy(ours))
        back = OptimWrapper(n.parameters(), opt=cls, **{**kwargs, "lr": 9.0})
        back.load_state_dict(copy.deepcopy(theirs))
        train(m, bare, range(3, 6))
        train(n, back, range(3, 6))
        train(o, third, range(3, 6))
        assert_same(m.parameters(), n.parameters())
        assert_same(m.parameters(), o.parameters())

    def test_marks_do_not_keep_torch_from_making_its_state(self) -> None:
        params = tensors((2,), (3,), requires_grad=True)
        wrapper = OptimWrapper([params[:1], params[1:]], opt=torch.optim.Adam, lr=0.1)
        wrapper.state[params[0]] = {"force_train": True}
        assert not wrapper.state
        wrapper.freeze()
        run_steps(wrapper, params, range(2))
        assert set(wrapper.state[params[0]]) == {"force_train", "step", "exp_avg", "exp_avg_sq"}
        wrapper.opt.zero_grad()
        wrapper.opt.step()  # the bare optimizer can be used beside it

    def test_do_wd_with_momentum_and_both_kinds_of_groups(self) -> None:
        a, b = tensors((2,), (3,)), tensors((2,), (3,))
        kwargs: dict[str, Any] = {"lr": 0.1, "momentum": 0.9}
        wrapper = OptimWrapper(a, opt=torch.optim.SGD, weight_decay=0.5, **kwargs)
        wrapper.state[a[0]] = {"do_wd": False}
        groups = [{"params": b[:1], "weight_decay": 0.0}, {"params": b[1:], "weight_decay": 0.5}]
        bare = torch.optim.SGD(groups, **kwargs)
        run_steps(wrapper, a, range(4))
        run_steps(bare, b, range(4))
        assert_same(a, b)
        assert wrapper.state[a[0]]["do_wd"] is False
        assert wrapper.param_groups[0]["params"] == a
        assert len(wrapper.param_groups) == len(wrapper.opt.param_groups) == 1

    def test_an_error_of_torch_leaves_groups_and_marks(self) -> None:
        class Failing(torch.optim.SGD):
            def step(self, closure: Any = None) -> Any:
                raise RuntimeError("out of order")

        params = tensors((2,), (3,), requires_grad=True)
        wrapper = OptimWrapper(params, opt=Failing, lr=0.1, weight_decay=0.1)
        wrapper.state[params[0]] = {"do_wd": False}
        give_grads(params, 0)
        with pytest.raises(RuntimeError, match="out of order"):
            wrapper.step()
        assert wrapper.param_groups[0]["params"] == params
        assert wrapper.state == {params[0]: {"do_wd": False}}

    def test_lbfgs_evaluates_the_closure_itself(self) -> None:
        m, n = model(), model()
        bare = torch.optim.LBFGS(m.parameters(), max_iter=5)
        wrapped = OptimWrapper(n.parameters(), opt=torch.optim.LBFGS, max_iter=5)

        def closure(net: nn.Module, opt: torch.optim.Optimizer) -> Tensor:
            opt.zero_grad()
            return backward(net, 0)

        for _ in range(3):
            one = bare.step(lambda: closure(m, bare))  # type: ignore[no-untyped-call]
            two = wrapped.step(lambda: closure(n, wrapped))
            assert torch.equal(torch.as_tensor(one), torch.as_tensor(two))
        assert_same(m.parameters(), n.parameters())
        with pytest.raises(TypeError, match="closure"):
            wrapped.step()

    def test_a_closure_is_evaluated_once_for_the_others(self) -> None:
        m, calls = model(), []
        wrapper = OptimWrapper(m.parameters(), opt=torch.optim.SGD, lr=0.1)

        def closure() -> Tensor:
            calls.append(torch.is_grad_enabled())
            wrapper.zero_grad()
            return backward(m, 0)

        before = values(m.parameters())
        assert wrapper.step(closure).ndim == 0
        assert calls == [True]
        assert_moved(m.parameters(), before)

    def test_needs_whole_parameters(self) -> None:
        assert OptimWrapper(tensors((2,)), opt=torch.optim.SGD, lr=0.1).needs == "whole"


class TestHypers:
    def test_equal_the_seeds(self) -> None:
        (p,), (q,) = tensors((2,)), tensors((2,))
        wrapper = OptimWrapper(torch.optim.SGD([p], lr=1e-3, momentum=0.9, weight_decay=1e-2))
        ours = SGD([q], lr=1e-3, mom=0.9, wd=1e-2)
        assert wrapper.hypers == [{**ours.hypers[0], "dampening": 0, "nesterov": False}]

    def test_live(self) -> None:
        wrapper = OptimWrapper(tensors((2,)), opt=torch.optim.AdamW, lr=0.1)
        wrapper.hypers[0]["lr"] = 0.5
        wrapper.hypers[0]["mom"] = 0.25
        wrapper.set_hyper("sqr_mom", 0.75)
        wrapper.set_hyper("weight_decay", 0.125)
        group = wrapper.opt.param_groups[0]
        assert (group["lr"], group["betas"], group["weight_decay"]) == (0.5, (0.25, 0.75), 0.125)
        wrapper.set_hyper("betas", (0.5, 0.6))
        assert group["betas"] == (0.5, 0.6)

    def test_an_unknown_hyper_is_ignored_with_one_warning(self) -> None:
        wrapper = OptimWrapper(tensors((2,)), opt=torch.optim.Adagrad, lr=0.1)
        before = copy.deepcopy(wrapper.state_dict()["param_groups"])
        with pytest.warns(UserWarning, match="Adagrad has no hyper-parameter 'mom'"):
            wrapper.set_hyper("mom", 0.9)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            wrapper.set_hypers(mom=0.8, lr=0.5)
        assert wrapper.opt.param_groups == [{**wrapper.opt.param_groups[0]}]
        after = wrapper.state_dict()["param_groups"]
        assert after == [{**before[0], "lr": 0.5}]

    def test_schedulers_on_either_side(self) -> None:
        for inner in (True, False):
            m = model()
            wrapper = OptimWrapper(m.parameters(), opt=torch.optim.SGD, lr=1.0)
            sched = torch.optim.lr_scheduler.ExponentialLR(wrapper.opt if inner else wrapper, 0.5)
            for seed in range(3):
                backward(m, seed)
                wrapper.step()
                sched.step()
            assert wrapper.hypers[0]["lr"] == wrapper.opt.param_groups[0]["lr"] == 0.125

    def test_reduce_on_plateau(self) -> None:
        wrapper = OptimWrapper(tensors((2,)), opt=torch.optim.SGD, lr=0.5)
        sched = torch.optim.lr_scheduler.ReduceLROnPlateau(wrapper, patience=0)
        for loss in (1.0, 1.0, 1.0):
            sched.step(loss)
        assert wrapper.hypers[0]["lr"] == pytest.approx(0.005)


class TestRest:
    def test_add_param_group(self) -> None:
        a, b = tensors((2,), (3,))
        wrapper = OptimWrapper([a], opt=torch.optim.AdamW, lr=0.1)
        wrapper.add_param_group({"params": [b], "wd": 0.5, "mom": 0.5})
        assert len(wrapper.opt.param_groups) == 2
        assert wrapper.param_groups[1]["weight_decay"] == 0.5
        assert wrapper.param_groups[1]["betas"] == (0.5, 0.999)
        run_steps(wrapper, [a, b], [0])
        assert set(wrapper.state) == {a, b}

    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
    )
    def test_copies_step_by_themselves(self, how: Callable[[Any], Any]) -> None:
        m = model()
        wrapper = OptimWrapper(m.parameters(), opt=torch.optim.AdamW, lr=0.1)
        torch.optim.lr_scheduler.ExponentialLR(wrapper, 0.5)
        torch.optim.lr_scheduler.ExponentialLR(wrapper.opt, 0.5)
        train(m, wrapper, range(2))
        n, twin = how((m, wrapper))
        assert twin.param_groups is twin.opt.param_groups
        assert twin.state is twin.opt.state
        before = values(m.parameters())
        train(n, twin, range(2, 4))
        assert_same(m.parameters(), before)
        train(m, wrapper, range(2, 4))
        assert_same(m.parameters(), n.parameters())

    @pytest.mark.parametrize(
        "how", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"]
    )
    def test_copies_keep_marks_of_what_has_not_stepped(self, how: Callable[[Any], Any]) -> None:
        params = tensors((2,), (3,), requires_grad=True)
        wrapper = OptimWrapper([params[:1], params[1:]], opt=torch.optim.AdamW, lr=0.1)
        wrapper.freeze()
        wrapper.state[params[0]] = {"do_wd": False}
        run_steps(wrapper, params, [0])
        others, twin = how(how((params, wrapper)))
        assert dict(twin.state[others[0]]) == {"do_wd": False}
        assert others[0] in twin.state
        twin.unfreeze()
        run_steps(twin, others, [1])
        assert twin.state[others[0]]["step"] == 1

    def test_freezing_and_marks_go_through_a_state_dict(self) -> None:
        params, others = tensors((2,), (3,), requires_grad=True), tensors((2,), (3,), requires_grad=True)
        one = OptimWrapper([params[:1], params[1:]], opt=torch.optim.AdamW, lr=0.1)
        one.state[params[1]] = {"do_wd": False}
        one.freeze()
        run_steps(one, params, range(2))
        two = OptimWrapper([others[:1], others[1:]], opt=torch.optim.AdamW, lr=0.5)
        two.load_state_dict(copy.deepcopy(one.state_dict()))
        assert [p.requires_grad for p in others] == [False, True]
        assert two.state[others[1]]["do_wd"] is False
        for p, q in zip(params, others, strict=True):
            q.data.copy_(p.data)
        run_steps(one, params, range(2, 4))
        run_steps(two, others, range(2, 4))
        assert_same(params, others)

    def test_a_load_by_the_inner_optimizer_is_seen(self) -> None:
        m = model()
        wrapper = OptimWrapper(m.parameters(), opt=torch.optim.AdamW, lr=0.1)
        train(m, wrapper, range(2))
        wrapper.opt.load_state_dict(copy.deepcopy(wrapper.state_dict()))
        assert wrapper.param_groups is wrapper.opt.param_groups
        assert [int(e["step"]) for e in wrapper.state.values()] == [2] * 4
        assert wrapper.state[torch.zeros(1)] == {}
        assert len(wrapper.state) == 4

    def test_lookahead_around_it(self) -> None:
        m, n = model(), model()
        looking = Lookahead(torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), k=2, alpha=0.25)
        bare = torch.optim.SGD(n.parameters(), lr=0.1, momentum=0.9)
        slow = values(n.parameters())
        for step in range(1, 6):
            train(m, looking, [step])
            train(n, bare, [step])
            if step % 2 == 0:
                slow = [s + 0.25 * (p.detach() - s) for s, p in zip(slow, n.parameters(), strict=True)]
                for p, s in zip(n.parameters(), slow, strict=True):
                    p.data.copy_(s)
            for p, q in zip(m.parameters(), n.parameters(), strict=True):
                torch.testing.assert_close(p, q)
        assert looking.needs == "whole"
        assert {"momentum_buffer", "slow_weights", "count"} == set(looking.state[next(m.parameters())])

    def test_lookahead_around_a_freezing_wrapper(self) -> None:
        params = tensors((2,), (3,), requires_grad=True)
        opt = Lookahead(OptimWrapper([params[:1], params[1:]], opt=torch.optim.Adam, lr=0.1), k=2)
        opt.freeze()
        before = values(params)
        run_steps(opt, params, range(4))
        assert_same(params[:1], before[:1])
        assert_moved(params[1:], before[1:])

    def test_equals_ours_where_the_rule_is_the_same(self) -> None:
        m, n = model(), model()
        one = OptimWrapper(
            m.parameters(), opt=torch.optim.AdamW, lr=1e-2, betas=(0.9, 0.99), eps=1e-5, weight_decay=0.1
        )
        two = Adam(n.parameters(), 1e-2, wd=0.1)
        train(m, one, range(4))
        train(n, two, range(4))
        for p, q in zip(m.parameters(), n.parameters(), strict=True):
            torch.testing.assert_close(p, q)
