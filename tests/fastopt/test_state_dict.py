"""Saving and loading: shapes of the dict, matching by name and place, checks, and nothing changed on an error."""

from __future__ import annotations

import copy
import io
from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import SGD, Adam, Lookahead, Optimizer, Ranger

from .samples import ALL, Case, assert_same, backward, every_optimizer, model, run_steps, tensors, train, values

every_state = pytest.mark.parametrize("case", ALL, ids=str)


def through_a_file(state_dict: dict[str, Any]) -> dict[str, Any]:
    """What `torch.load(weights_only=True)` makes of it."""
    file = io.BytesIO()
    torch.save(state_dict, file)
    file.seek(0)
    loaded: dict[str, Any] = torch.load(file, weights_only=True)
    return loaded


def snapshot(opt: Optimizer) -> tuple[Any, ...]:
    """Everything that a failing load could have changed."""
    groups = [{k: (list(v) if isinstance(v, list) else v) for k, v in g.items()} for g in opt.param_groups]
    grads = [p.requires_grad for g in opt.param_groups for p in g["params"]]
    return repr(groups), repr({id(p): dict(e) for p, e in opt.state.items()}), grads, opt.frozen_idx


class TestShape:
    @every_optimizer
    def test_torchs(self, case: Case) -> None:
        params = tensors((2,), (3,), (1,))
        opt = case([params[:2], params[2:]], lr=[0.1, 0.2])
        run_steps(opt, params[1:], [0])
        sd = opt.state_dict()
        assert list(sd) == ["state", "param_groups"]
        assert [g["params"] for g in sd["param_groups"]] == [[0, 1], [2]]
        assert set(sd["state"]) <= {1, 2}
        assert [g["lr"] for g in sd["param_groups"]] == [0.1, 0.2]
        for g in sd["param_groups"]:
            assert "frozen" not in g
            assert "param_names" not in g

    def test_containers_are_copies_and_tensors_are_live(self) -> None:
        (p,) = tensors((3,))
        opt = Adam([("w", p)])
        run_steps(opt, [p], [0])
        sd = opt.state_dict()
        assert sd["state"][0]["grad_avg"] is opt.state[p]["grad_avg"]
        sd["state"][0]["step"] = 99
        sd["state"].clear()
        sd["param_groups"][0]["lr"] = 99
        sd["param_groups"][0]["param_names"].append("x")
        sd["param_groups"].clear()
        assert opt.state[p]["step"] == 1
        assert opt.param_groups[0]["lr"] == 1e-3
        assert opt.param_groups[0]["param_names"] == ["w"]

    def test_freezing_is_a_key_of_the_frozen_groups(self) -> None:
        params = tensors((2,), (3,), requires_grad=True)
        opt = Adam([[p] for p in params])
        opt.freeze()
        assert [g.get("frozen") for g in opt.state_dict()["param_groups"]] == [True, None]

    def test_marks_are_saved(self) -> None:
        params = tensors((2,), (3,))
        opt = Adam(params)
        opt.state[params[1]] = {"do_wd": False}
        assert opt.state_dict()["state"] == {0: {}, 1: {"do_wd": False}}
        run_steps(opt, params[:1], [0])
        assert set(opt.state_dict()["state"][0]) == {"grad_avg", "sqr_avg", "step"}
        assert opt.state_dict()["state"][1] == {"do_wd": False}


class TestResume:
    @every_state
    def test_bit_for_bit(self, case: Case) -> None:
        a, b = model(), model()
        one = case([a[0].parameters(), a[2].parameters()], lr=[0.02, 0.05])
        train(a, one, range(4))
        saved, weights = through_a_file(one.state_dict()), copy.deepcopy(a.state_dict())
        train(a, one, range(4, 9))
        b.load_state_dict(weights)
        two = case([b[0].parameters(), b[2].parameters()], lr=0.5)
        two.load_state_dict(saved)
        assert [h["lr"] for h in two.hypers] == [0.02, 0.05]
        train(b, two, range(4, 9))
        assert_same(a.parameters(), b.parameters())

    @every_state
    def test_a_round_trip_before_any_step_changes_nothing(self, case: Case) -> None:
        a, b = model(), model()
        one, two = case(a.parameters(), lr=0.02), case(b.parameters(), lr=0.02)
        two.load_state_dict(two.state_dict())
        train(a, one, range(3))
        train(b, two, range(3))
        assert_same(a.parameters(), b.parameters())

    @every_state
    def test_loading_into_itself_half_way(self, case: Case) -> None:
        a, b = model(), model()
        one, two = case(a.parameters(), lr=0.02), case(b.parameters(), lr=0.02)
        train(a, one, range(6))
        train(b, two, range(3))
        two.load_state_dict(copy.deepcopy(two.state_dict()))
        train(b, two, range(3, 6))
        assert_same(a.parameters(), b.parameters())

    def test_the_dict_stays_the_callers(self) -> None:
        (p,), (q,) = tensors((3,)), tensors((3,))
        one, two = Adam([p]), Adam([q])
        run_steps(one, [p], range(2))
        sd = one.state_dict()
        two.load_state_dict(sd)
        assert list(sd) == ["state", "param_groups"]
        run_steps(two, [q], range(2))
        two.set_hyper("lr", 9.0)
        assert sd["param_groups"][0]["lr"] == 1e-3
        assert sd["state"][0]["step"] == 2
        assert one.state[p]["step"] == 2

    def test_dtypes_of_states_are_kept(self) -> None:
        def counting(p: Tensor, n: Tensor | None = None, **kwargs: Any) -> dict[str, Tensor]:
            fresh = torch.zeros(3, dtype=torch.int64) if n is None else n
            return {"n": fresh + 1, "wide": torch.full((3,), 1 / 3, dtype=torch.float64), "seen": torch.ones(3) > 0}

        (p,), (q,) = tensors((3,), dtype=torch.bfloat16), tensors((3,), dtype=torch.bfloat16)
        one, two = Optimizer([p], counting), Optimizer([q], counting)
        run_steps(one, [p], range(2))
        two.load_state_dict(through_a_file(one.state_dict()))
        assert {k: v.dtype for k, v in two.state[q].items()} == {
            "n": torch.int64,
            "wide": torch.float64,
            "seen": torch.bool,
        }
        assert two.state[q]["n"].tolist() == [2, 2, 2]

    def test_a_tensor_step_count_becomes_a_number(self) -> None:
        (p,) = tensors((3,))
        opt = Adam([p])
        opt.load_state_dict(
            {"state": {0: {"step": torch.tensor(7.0)}}, "param_groups": opt.state_dict()["param_groups"]}
        )
        assert opt.state[p]["step"] == 7
        assert type(opt.state[p]["step"]) is int

    def test_a_tensor_lr_stays_the_object_and_takes_the_value(self) -> None:
        lr = torch.tensor(0.5)
        (p,) = tensors((3,))
        opt = Adam([p], lr=lr)
        opt.load_state_dict(Adam(tensors((3,)), lr=0.125).state_dict())
        assert opt.param_groups[0]["lr"] is lr
        assert lr.item() == 0.125

    def test_a_loaded_tensor_lr_is_not_the_saved_one(self) -> None:
        one, two = Adam(tensors((3,)), lr=torch.tensor(0.5)), Adam(tensors((3,)), lr=0.25)
        two.load_state_dict(one.state_dict())
        two.set_hyper("lr", 0.125)
        assert (one.hypers[0]["lr"].item(), two.hypers[0]["lr"].item()) == (0.5, 0.125)

    def test_marks_set_by_the_user_outlive_a_load(self) -> None:
        a, b = tensors((3,), (2,))
        opt = Adam([a, b])
        opt.state[a] = {"do_wd": False}
        opt.state[b] = {"do_wd": False}
        other = tensors((3,), (2,))
        saved = Adam(other)
        saved.state[other[1]] = {"do_wd": True}
        run_steps(saved, other, [0])
        opt.load_state_dict(saved.state_dict())
        assert opt.state[a]["do_wd"] is False
        assert opt.state[b]["do_wd"] is True
        assert opt.state[a]["step"] == 1


class TestFreezing:
    def build(self, **hypers: Any) -> tuple[list[Tensor], Adam]:
        params = tensors((2,), (3,), (1,), requires_grad=True)
        return params, Adam([[p] for p in params], **hypers)

    def test_is_taken_over(self) -> None:
        _, one = self.build()
        one.freeze_to(1)
        params, two = self.build()
        two.load_state_dict(through_a_file(one.state_dict()))
        assert [p.requires_grad for p in params] == [False, True, True]
        assert two.frozen_idx == 1
        before = values(params)
        run_steps(two, params, [0])
        assert [torch.equal(p, b) for p, b in zip(params, before, strict=True)] == [True, False, False]

    def test_an_unfrozen_dict_unfreezes(self) -> None:
        _, one = self.build()
        params, two = self.build()
        two.freeze_to(2)
        two.load_state_dict(one.state_dict())
        assert [p.requires_grad for p in params] == [True, True, True]
        assert two.frozen_idx == 0
        assert all("frozen" not in g for g in two.param_groups)

    def test_requires_grad_of_groups_that_do_not_change_is_left_alone(self) -> None:
        _, one = self.build()
        params, two = self.build()
        params[1].requires_grad_(False)
        two.load_state_dict(one.state_dict())
        assert [p.requires_grad for p in params] == [True, False, True]

    def test_forced_parameters_of_a_frozen_group_train_on(self) -> None:
        ps, one = self.build()
        one.state[ps[0]] = {"force_train": True}
        one.freeze_to(2)
        params, two = self.build()
        two.load_state_dict(one.state_dict())
        assert [p.requires_grad for p in params] == [True, False, True]


class TestNames:
    def test_matched_by_name_in_another_order(self) -> None:
        m, n = model(), model()
        one = Adam(m.named_parameters(), lr=0.02)
        two = Adam(list(n.named_parameters())[::-1], lr=0.5)
        train(m, one, range(3))
        n.load_state_dict(m.state_dict())
        two.load_state_dict(through_a_file(one.state_dict()))
        train(m, one, range(3, 6))
        train(n, two, range(3, 6))
        assert_same(m.parameters(), n.parameters())
        assert two.param_groups[0]["param_names"] == ["2.bias", "2.weight", "0.bias", "0.weight"]

    def test_other_names_are_refused_by_name(self) -> None:
        one = Adam(model().named_parameters())
        two = Adam([(f"body.{name}", p) for name, p in model().named_parameters()])
        before = snapshot(two)
        with pytest.raises(ValueError, match=r"only in the state dict \['0.bias'.*body.0.bias"):
            two.load_state_dict(one.state_dict())
        assert snapshot(two) == before

    def test_by_place_where_one_side_has_no_names(self) -> None:
        m, n = model(), model()
        one, two, three = Adam(m.named_parameters()), Adam(n.parameters()), Adam(model().named_parameters())
        train(m, one, range(2))
        two.load_state_dict(one.state_dict())
        assert [e["step"] for e in two.state.values()] == [2] * 4
        assert two.param_names() == {p: name for name, p in n.named_parameters()}
        two.load_state_dict(Adam(model().parameters()).state_dict())
        three.load_state_dict(Adam(model().parameters()).state_dict())
        assert len(three.param_names()) == 4


class TestChecks:
    def saved(self) -> dict[str, Any]:
        params = tensors((2, 3), (3,), (1,), requires_grad=True)
        opt = Ranger([params[:2], params[2:]], lr=0.5)
        run_steps(opt, params, range(2))
        opt.freeze()
        return copy.deepcopy(opt.state_dict())

    @pytest.mark.parametrize(
        ("spoil", "words"),
        [
            (lambda sd: sd.pop("state"), "'state' and 'param_groups'"),
            (lambda sd: sd.pop("param_groups"), "'state' and 'param_groups'"),
            (lambda sd: sd["param_groups"].pop(), "has 1 parameter groups, the optimizer has 2"),
            (lambda sd: sd["param_groups"][1]["params"].append(3), "group 1 of the state dict has 2 parameters"),
            (lambda sd: sd["param_groups"][0]["params"].pop(), "group 0 of the state dict has 1 parameters"),
            (lambda sd: sd["state"].update({7: {"step": 1}}), "parameter 7"),
            (lambda sd: sd["state"][0].update(grad_avg=torch.zeros(3, 2)), r"'grad_avg' of parameter 0 .*\(3, 2\)"),
            (lambda sd: sd["state"][2].update(sqr_avg=torch.zeros(())), r"'sqr_avg' of parameter 2"),
            (lambda sd: sd["state"][1].update(slow_weights=torch.zeros(4)), r"'slow_weights' of parameter 1"),
            (lambda sd: sd["state"].update({0: None}), "parameter 0"),
            (lambda sd: sd.update(state=[]), "state"),
            (lambda sd: sd["param_groups"][0].pop("params"), "group 0"),
            (lambda sd: sd["param_groups"][0].update(lr="fast"), "lr"),
        ],
    )
    def test_what_does_not_fit_is_named_and_nothing_changes(self, spoil: Any, words: str) -> None:
        sd = self.saved()
        spoil(sd)
        params = tensors((2, 3), (3,), (1,), seed=1, requires_grad=True)
        opt = Ranger([params[:2], params[2:]], lr=torch.tensor(0.25))
        opt.state[params[1]] = {"force_train": True}
        run_steps(opt, params, [0])
        before = snapshot(opt)
        with pytest.raises((ValueError, TypeError), match=words):
            opt.load_state_dict(sd)
        assert snapshot(opt) == before

    def test_the_saved_dict_itself_loads(self) -> None:
        params = tensors((2, 3), (3,), (1,), requires_grad=True)
        opt = Ranger([params[:2], params[2:]], lr=torch.tensor(0.25))
        opt.load_state_dict(self.saved())
        assert [opt.state[p]["count"] for p in params] == [2, 2, 2]
        assert [h["lr"].item() for h in opt.hypers] == [0.5, 0.5]
        assert [opt.is_frozen(0), opt.is_frozen(1)] == [True, False]

    def test_a_parameter_that_cannot_be_frozen(self) -> None:
        one = Optimizer([torch.ones(2)], None)
        one.set_freeze(0, rg=False)
        two = Optimizer([torch.arange(2)], None)
        with pytest.raises(RuntimeError, match="group 0"):
            two.load_state_dict(one.state_dict())
        assert not two.is_frozen(0)


class TestFastai:
    """fastai's own shape: a list of states, a list of hypers, Lookahead's two keys beside them."""

    def test_state_and_hypers(self) -> None:
        a, b, c = tensors((2,), (3,), (1,))
        opt = Adam([[a, b], [c]], lr=0.1)
        opt.freeze()
        opt.load_state_dict(
            {
                "state": [{"grad_avg": torch.ones(2), "sqr_avg": torch.ones(2), "step": 4}, {}, {"do_wd": False}],
                "hypers": [{"wd": 0.5, "sqr_mom": 0.7, "lr": 0.2, "mom": 0.6, "eps": 1e-3}, {"lr": 0.3, "mom": 0.5}],
            }
        )
        assert opt.state[a]["step"] == 4
        assert b not in opt.state
        assert opt.state[c] == {"do_wd": False}
        assert opt.param_groups[0]["betas"] == (0.6, 0.7)
        assert opt.param_groups[1]["betas"] == (0.5, 0.99)
        assert opt.hypers[0] == {"wd": 0.5, "sqr_mom": 0.7, "lr": 0.2, "mom": 0.6, "eps": 1e-3}
        assert opt.hypers[1]["lr"] == 0.3
        assert opt.is_frozen(0)  # fastai saves no freezing, so there is none to take over

    def test_lookahead(self) -> None:
        a, b = tensors((2,), (3,))
        opt = Lookahead(SGD([[a], [b]], lr=0.1))
        sd: dict[str, Any] = {
            "state": [{}, {}],
            "hypers": [{"lr": 0.2, "mom": 0.0, "wd": 0.0}] * 2,
            "count": 4,
            "slow_weights": [[torch.ones(2)], [torch.ones(3)]],
        }
        opt.load_state_dict(sd)
        assert set(sd) == {"state", "hypers", "count", "slow_weights"}
        assert [opt.state[p]["count"] for p in (a, b)] == [4, 4]
        assert torch.equal(opt.state[b]["slow_weights"], torch.ones(3))
        assert opt.hypers[0] == {"lr": 0.2, "mom": 0.0, "wd": 0.0, "k": 6, "alpha": 0.5}
        opt.load_state_dict({**sd, "slow_weights": None, "count": 0})
        assert not opt.state

    @pytest.mark.parametrize(
        ("sd", "words"),
        [
            ({"state": [{}], "hypers": [{}, {}]}, "hypers of 2 groups, the optimizer has 1"),
            ({"state": [{}, {}], "hypers": [{}]}, "state of 2 parameters, the optimizer has 1"),
            ({"state": [{"grad_avg": torch.ones(5)}], "hypers": [{}]}, r"'grad_avg' .*\(5,\)"),
        ],
    )
    def test_checks(self, sd: dict[str, Any], words: str) -> None:
        opt = Adam(tensors((2,)))
        before = snapshot(opt)
        with pytest.raises(ValueError, match=words):
            opt.load_state_dict(sd)
        assert snapshot(opt) == before


class TestHooks:
    def test_around_saving_and_loading(self) -> None:
        m = model()
        opt = Adam(m.parameters())
        backward(m, 0)
        opt.step()
        seen: list[str] = []

        def tag(opt: torch.optim.Optimizer, sd: dict[str, Any]) -> dict[str, Any]:
            seen.append("saved")
            return {**sd, "tag": 1}

        def untag(opt: torch.optim.Optimizer, sd: dict[str, Any]) -> dict[str, Any]:
            seen.append("loading")
            return {k: v for k, v in sd.items() if k != "tag"}

        opt.register_state_dict_pre_hook(lambda opt: seen.append("saving"))
        opt.register_state_dict_post_hook(tag)
        opt.register_load_state_dict_pre_hook(untag)
        opt.register_load_state_dict_post_hook(lambda opt: seen.append("loaded"))
        sd = opt.state_dict()
        assert sd["tag"] == 1
        opt.load_state_dict(sd)
        assert "tag" in sd
        assert seen == ["saving", "saved", "loading", "loaded"]

    @every_optimizer
    def test_by_keyword(self, case: Case) -> None:
        opt = case(tensors((2,)))
        opt.load_state_dict(state_dict=opt.state_dict())


def test_the_state_of_a_torch_optimizer_is_not_taken_for_ours() -> None:
    """It would lie beside empty averages, whose bias is corrected for more steps than they have seen."""
    params = tensors((2,), requires_grad=True)
    params[0].grad = torch.ones(2)
    theirs, ours = torch.optim.AdamW(params), Adam(params)
    theirs.step()
    ours.step()
    before = snapshot(ours)
    with pytest.raises(ValueError, match="'exp_avg' of parameter 0 is that of a torch optimizer, Adam has 'grad_avg'"):
        ours.load_state_dict(theirs.state_dict())
    assert snapshot(ours) == before

    def own_chain(p: Tensor, lr: float, grad_avg: Any = None, exp_avg: Any = None, **kwargs: Any) -> dict[str, Tensor]:
        return {"exp_avg": torch.ones_like(p)}

    asks_for_it = Optimizer(params, own_chain, lr=0.1)
    asks_for_it.load_state_dict(theirs.state_dict())
    torch.testing.assert_close(asks_for_it.state[params[0]]["exp_avg"], theirs.state[params[0]]["exp_avg"])
