"""Lookahead around any optimizer, as two more callbacks of its chain."""

from __future__ import annotations

from typing import Any

import torch

from .around import AroundChain
from .base import _BaseOptimizer
from .cbs import lookahead_start, lookahead_step
from .checks import check_hyper
from .hypers import Hyper, group_values
from .optimizer import Optimizer
from .optimizers import RAdam, _pick, _pick_betas
from .wrapper import OptimWrapper, TorchStep, evaluates_closure


class Lookahead(AroundChain):
    """Every `k`-th step the parameters go the fraction `alpha` of the way from where they were `k` steps before.

    Built from `opt`, whose groups and state it shares: the chain of `opt` between `lookahead_start` and
    `lookahead_step`. Keeps `k` and `alpha` in the groups, `slow_weights` and `count` in the state of each parameter.
    Zhang et al., https://arxiv.org/abs/1907.08610.

    Args:
        opt: an optimizer of this library, or of torch (wrapped in `OptimWrapper`).
        k: steps between two synchronisations.
        alpha: step size of the slow weights.

    Raises:
        TypeError: `opt` is no optimizer with a chain, or evaluates the loss itself (LBFGS).
        ValueError: `opt` is a Lookahead already, or `k` or `alpha` is out of range.
    """

    opt: Optimizer

    def __init__(self, opt: torch.optim.Optimizer, k: Hyper = 6, alpha: Hyper = 0.5) -> None:
        if isinstance(opt, torch.optim.Optimizer) and not isinstance(opt, _BaseOptimizer):
            opt = OptimWrapper(opt)
        if not isinstance(opt, Optimizer):
            hint = ": shard the Lookahead, not what is in it" if isinstance(opt, _BaseOptimizer) else ""
            got = (
                f"the class {opt.__name__}: build it first"
                if isinstance(opt, type)
                else f"a {type(opt).__name__}{hint}"
            )
            raise TypeError(f"Lookahead needs an optimizer with a chain of callbacks, got {got}")
        if lookahead_step in opt.cbs:
            raise ValueError("this optimizer already is a Lookahead: two of them would share one set of slow weights")
        for cb in opt.cbs:
            if isinstance(cb, TorchStep) and evaluates_closure(cb.opt):
                raise TypeError(
                    f"{type(cb.opt).__name__} evaluates the loss itself, again and again in one step: "
                    f"Lookahead cannot stand around it"
                )
        n_groups = len(opt.param_groups)
        hypers = {"k": group_values("k", k, n_groups), "alpha": group_values("alpha", alpha, n_groups)}
        for name, values in hypers.items():
            for i, value in enumerate(values):
                check_hyper("Lookahead", name, value, i)
        # RMSProp's group has an `alpha` of its own, PyTorch's name of its averaging factor
        taken = {"lookahead_alpha": "alpha"} if "alpha" in opt.hp_map else {}
        self._hp_map = {**opt.hp_map, **taken}
        self._adopt(opt, (lookahead_start, *opt.cbs, lookahead_step))
        for name, values in hypers.items():
            stored = "lookahead_alpha" if name == "alpha" and taken else name
            self.defaults[stored] = values[-1]
            for group, value in zip(self.param_groups, values, strict=True):
                group[stored] = value

    def _check_hyper(self, name: str, value: Any, group: int) -> None:
        if name in ("k", "alpha"):
            check_hyper("Lookahead", name, value, group)
        elif self._within is not None:
            self.opt._check_hyper(name, value, group)


class Ranger(Lookahead):
    """Lookahead around RAdam. Arguments as for `RAdam`, then `k` and `alpha` of Lookahead."""

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        mom: Hyper = 0.95,
        wd: Hyper = 0.01,
        eps: Hyper = 1e-6,
        k: Hyper = 6,
        alpha: Hyper = 0.5,
        *,
        sqr_mom: Hyper = 0.99,
        beta: Hyper = 0.0,
        decouple_wd: bool = True,
        betas: tuple[float, float] | None = None,
        weight_decay: Hyper | None = None,
        engine: str | None = None,
        master_weights: bool = False,
        capturable: bool = False,
    ) -> None:
        mom, sqr_mom = _pick_betas(mom, sqr_mom, (0.95, 0.99), betas)
        wd = _pick("wd", wd, 0.01, "weight_decay", weight_decay)
        inner = RAdam(
            params,
            lr,
            mom,
            sqr_mom,
            eps,
            wd,
            beta,
            decouple_wd,
            engine=engine,
            master_weights=master_weights,
            capturable=capturable,
        )
        super().__init__(inner, k, alpha)


#: fastai's spelling; a class like the others.
ranger = Ranger
