"""The named optimizers: a tuple of callbacks each, with PyTorch's names in the groups.

Common arguments: `params` as for `Optimizer`; `lr`, `mom`, `wd`, ... a number, one per group or a slice; `decouple_wd`
chooses `weight_decay` (the parameter is decayed) or `l2_reg` (the gradient is); `betas`, `momentum`, `alpha` and
`weight_decay` are PyTorch's spellings of `(mom, sqr_mom)`, `mom`, `sqr_mom` and `wd`; `engine`, `master_weights` and
`capturable` as for `Optimizer`. Averages have the shape of their parameter, and its dtype or that of its master. A
value out of range, or one given in both spellings, is a `ValueError`, one that is no number a `TypeError`; both name
the hyper-parameter.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

from .cbs import (
    adam_step,
    average_grad,
    average_sqr_grad,
    l2_reg,
    lamb_step,
    larc_layer_lr,
    larc_step,
    momentum_step,
    qhadam_step,
    radam_step,
    rms_prop_step,
    sgd_step,
    step_stat,
    weight_decay,
)
from .checks import check_hyper
from .groups import collect_groups
from .hypers import Group, Hyper, group_values
from .optimizer import Optimizer

Cb = Callable[..., Any]
Betas = tuple[float, float]

_BETAS = {"betas__0": "mom", "betas__1": "sqr_mom", "weight_decay": "wd"}
_MOMENTUM = {"momentum": "mom", "weight_decay": "wd"}


class NamedOptimizer(Optimizer):
    """An optimizer with PyTorch's names in its groups, whose hyper-parameters are checked."""

    def _check_hyper(self, name: str, value: Any, group: int) -> None:
        # where the chain divides by 1 - mom^step
        debiased = ("mom", "sqr_mom") if "betas__0" in self.hp_map else ("sqr_mom",)
        check_hyper(type(self).__name__, name, value, group, below_one=debiased)


def _decay(decouple_wd: bool) -> Cb:
    return weight_decay if decouple_wd else l2_reg


def _pick(name: str, value: Any, default: Any, torch_name: str, torch_value: Any) -> Any:
    """The value of a hyper that has two spellings. Giving both is an error; a default does not count as given."""
    if torch_value is None:
        return value
    if value is not default and not (isinstance(value, int | float) and value == default):
        raise ValueError(f"{name}={value!r} and {torch_name}={torch_value!r} are the same hyper-parameter: give one")
    return torch_value


def _pick_betas(mom: Any, sqr_mom: Any, defaults: Betas, betas: Betas | None) -> tuple[Any, Any]:
    """`(mom, sqr_mom)` from either spelling."""
    if betas is None:
        return mom, sqr_mom
    if not isinstance(betas, tuple | list) or len(betas) != 2 or any(isinstance(b, tuple | list) for b in betas):
        raise ValueError(f"betas={betas!r}, expected two numbers; for values per group pass mom=[...], sqr_mom=[...]")
    mom = _pick("mom", mom, defaults[0], "betas[0]", betas[0])
    return mom, _pick("sqr_mom", sqr_mom, defaults[1], "betas[1]", betas[1])


def _any_momentum(params: Any, mom: Any) -> tuple[list[Group], bool]:
    """The groups, collected once, and whether momentum is asked for in general or in one of them."""
    groups = collect_groups(params)
    own = [group.get("momentum", group.get("mom", 0)) for group in groups]
    return groups, any(value != 0 for value in [*group_values("mom", mom, len(groups)), *own])


class SGD(NamedOptimizer):
    """Stochastic gradient descent, with momentum if `mom` is not 0: a <- m a + g, p <- p - lr a.

    Keeps `grad_avg` if there is momentum. Differs from torch.optim.SGD: weight decay is decoupled by default; no
    nesterov.
    """

    hp_map: Mapping[str, str] = _MOMENTUM

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        mom: Hyper = 0.0,
        wd: Hyper = 0.0,
        decouple_wd: bool = True,
        *,
        momentum: Hyper | None = None,
        weight_decay: Hyper | None = None,
        engine: str | None = None,
        master_weights: bool = False,
        capturable: bool = False,
    ) -> None:
        mom = _pick("mom", mom, 0.0, "momentum", momentum)
        wd = _pick("wd", wd, 0.0, "weight_decay", weight_decay)
        groups, with_momentum = _any_momentum(params, mom)
        steps = (average_grad, momentum_step) if with_momentum else (sgd_step,)
        super().__init__(
            groups,
            (_decay(decouple_wd), *steps),
            engine=engine,
            master_weights=master_weights,
            capturable=capturable,
            lr=lr,
            mom=mom,
            wd=wd,
        )


class RMSProp(NamedOptimizer):
    """RMSProp (Hinton's lecture 6), with momentum on the gradient if `mom` is not 0: p <- p - lr a / (sqrt(v) + eps).

    Keeps `sqr_avg`, and `grad_avg` if there is momentum. Differs from torch.optim.RMSprop: momentum averages the
    gradient, not the update; not centered.
    """

    hp_map: Mapping[str, str] = {**_MOMENTUM, "alpha": "sqr_mom"}

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        sqr_mom: Hyper = 0.99,
        mom: Hyper = 0.0,
        wd: Hyper = 0.0,
        decouple_wd: bool = True,
        eps: Hyper = 1e-8,
        *,
        alpha: Hyper | None = None,
        momentum: Hyper | None = None,
        weight_decay: Hyper | None = None,
        engine: str | None = None,
        master_weights: bool = False,
        capturable: bool = False,
    ) -> None:
        mom = _pick("mom", mom, 0.0, "momentum", momentum)
        sqr_mom = _pick("sqr_mom", sqr_mom, 0.99, "alpha", alpha)
        wd = _pick("wd", wd, 0.0, "weight_decay", weight_decay)
        groups, with_momentum = _any_momentum(params, mom)
        averages = (average_grad, average_sqr_grad) if with_momentum else (average_sqr_grad,)
        cbs = (_decay(decouple_wd), *averages, rms_prop_step)
        super().__init__(
            groups,
            cbs,
            engine=engine,
            master_weights=master_weights,
            capturable=capturable,
            lr=lr,
            mom=mom,
            sqr_mom=sqr_mom,
            eps=eps,
            wd=wd,
        )


def _adam_chain(decouple_wd: bool, stepper: Cb) -> tuple[Cb, ...]:
    """Decay, both averages damped, the step count, then the step."""
    damped = partial(average_grad, dampening=True)
    return (_decay(decouple_wd), damped, average_sqr_grad, step_stat, stepper)


class Adam(NamedOptimizer):
    """Adam (https://arxiv.org/abs/1412.6980) with decoupled weight decay by default (AdamW).

    p <- p (1 - lr wd), then p <- p - lr/(1-m^t) a / (sqrt(v/(1-s^t)) + eps).
    Keeps `grad_avg`, `sqr_avg` (8 bytes per parameter in float32) and the number `step`. Differs from torch.optim.AdamW
    in the defaults: sqr_mom (beta2) is 0.99 and eps 1e-5.
    """

    hp_map: Mapping[str, str] = _BETAS

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        mom: Hyper = 0.9,
        sqr_mom: Hyper = 0.99,
        eps: Hyper = 1e-5,
        wd: Hyper = 0.01,
        decouple_wd: bool = True,
        *,
        betas: Betas | None = None,
        weight_decay: Hyper | None = None,
        engine: str | None = None,
        master_weights: bool = False,
        capturable: bool = False,
    ) -> None:
        mom, sqr_mom = _pick_betas(mom, sqr_mom, (0.9, 0.99), betas)
        wd = _pick("wd", wd, 0.01, "weight_decay", weight_decay)
        cbs = _adam_chain(decouple_wd, adam_step)
        super().__init__(
            params,
            cbs,
            engine=engine,
            master_weights=master_weights,
            capturable=capturable,
            lr=lr,
            mom=mom,
            sqr_mom=sqr_mom,
            eps=eps,
            wd=wd,
        )


class RAdam(NamedOptimizer):
    """Rectified Adam (https://arxiv.org/abs/1908.03265); `beta` turns on the softplus of SAdam (1908.00700).

    Keeps what Adam keeps. The formula is that of `radam_step`.
    """

    hp_map: Mapping[str, str] = _BETAS

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        mom: Hyper = 0.9,
        sqr_mom: Hyper = 0.99,
        eps: Hyper = 1e-5,
        wd: Hyper = 0.0,
        beta: Hyper = 0.0,
        decouple_wd: bool = True,
        *,
        betas: Betas | None = None,
        weight_decay: Hyper | None = None,
        engine: str | None = None,
        master_weights: bool = False,
        capturable: bool = False,
    ) -> None:
        mom, sqr_mom = _pick_betas(mom, sqr_mom, (0.9, 0.99), betas)
        wd = _pick("wd", wd, 0.0, "weight_decay", weight_decay)
        cbs = _adam_chain(decouple_wd, radam_step)
        super().__init__(
            params,
            cbs,
            engine=engine,
            master_weights=master_weights,
            capturable=capturable,
            lr=lr,
            mom=mom,
            sqr_mom=sqr_mom,
            eps=eps,
            wd=wd,
            beta=beta,
        )


class QHAdam(NamedOptimizer):
    """Quasi-hyperbolic Adam (https://arxiv.org/abs/1810.06801); equals Adam where nu_1 = nu_2 = 1.

    `nu_1` and `nu_2` are the shares of the averages beside the gradient and its square. Keeps what Adam keeps. The
    formula is that of `qhadam_step`.
    """

    hp_map: Mapping[str, str] = _BETAS

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        mom: Hyper = 0.999,
        sqr_mom: Hyper = 0.999,
        nu_1: Hyper = 0.7,
        nu_2: Hyper = 1.0,
        eps: Hyper = 1e-8,
        wd: Hyper = 0.0,
        decouple_wd: bool = True,
        *,
        betas: Betas | None = None,
        weight_decay: Hyper | None = None,
        engine: str | None = None,
        master_weights: bool = False,
        capturable: bool = False,
    ) -> None:
        mom, sqr_mom = _pick_betas(mom, sqr_mom, (0.999, 0.999), betas)
        wd = _pick("wd", wd, 0.0, "weight_decay", weight_decay)
        averages: dict[str, Any] = {"mom": mom, "sqr_mom": sqr_mom, "nu_1": nu_1, "nu_2": nu_2}
        cbs = _adam_chain(decouple_wd, qhadam_step)
        super().__init__(
            params,
            cbs,
            engine=engine,
            master_weights=master_weights,
            capturable=capturable,
            lr=lr,
            eps=eps,
            wd=wd,
            **averages,
        )


class Larc(NamedOptimizer):
    """LARC, a learning rate per layer of at most `lr` (`clip=False`: LARS, https://arxiv.org/abs/1708.03888).

    local = lr trust_coeff |p| / (|g| + wd |p| + eps), p <- p - local a, norms over the whole parameter. Keeps
    `local_lr` (0-d), and `grad_avg` if there is momentum.
    """

    hp_map: Mapping[str, str] = _MOMENTUM

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        mom: Hyper = 0.9,
        clip: bool = True,
        trust_coeff: Hyper = 0.02,
        eps: Hyper = 1e-8,
        wd: Hyper = 0.0,
        decouple_wd: bool = True,
        *,
        momentum: Hyper | None = None,
        weight_decay: Hyper | None = None,
        engine: str | None = None,
        master_weights: bool = False,
        capturable: bool = False,
    ) -> None:
        mom = _pick("mom", mom, 0.9, "momentum", momentum)
        wd = _pick("wd", wd, 0.0, "weight_decay", weight_decay)
        groups, with_momentum = _any_momentum(params, mom)
        averages = (average_grad,) if with_momentum else ()
        cbs = (_decay(decouple_wd), *averages, partial(larc_layer_lr, clip=clip), larc_step)
        super().__init__(
            groups,
            cbs,
            engine=engine,
            master_weights=master_weights,
            capturable=capturable,
            lr=lr,
            mom=mom,
            trust_coeff=trust_coeff,
            eps=eps,
            wd=wd,
        )


class Lamb(NamedOptimizer):
    """LAMB (https://arxiv.org/abs/1904.00962): Adam's update scaled by rms(p)/rms(update), at most 10.

    Keeps what Adam keeps. Differs from the paper: decoupled weight decay is not part of the update whose norm is taken.
    """

    hp_map: Mapping[str, str] = _BETAS

    def __init__(
        self,
        params: Any,
        lr: Hyper = 1e-3,
        mom: Hyper = 0.9,
        sqr_mom: Hyper = 0.99,
        eps: Hyper = 1e-5,
        wd: Hyper = 0.0,
        decouple_wd: bool = True,
        *,
        betas: Betas | None = None,
        weight_decay: Hyper | None = None,
        engine: str | None = None,
        master_weights: bool = False,
        capturable: bool = False,
    ) -> None:
        mom, sqr_mom = _pick_betas(mom, sqr_mom, (0.9, 0.99), betas)
        wd = _pick("wd", wd, 0.0, "weight_decay", weight_decay)
        cbs = _adam_chain(decouple_wd, lamb_step)
        super().__init__(
            params,
            cbs,
            engine=engine,
            master_weights=master_weights,
            capturable=capturable,
            lr=lr,
            mom=mom,
            sqr_mom=sqr_mom,
            eps=eps,
            wd=wd,
        )
