"""The callbacks (cbs) that optimizers are composed of: *stats* keep a state, *steppers* change the parameter.

A cb is a function of one parameter `p` (a tensor with `.grad`). It asks by argument name for hyper-parameters and for
state, takes the rest in `**kwargs`, and may return a dict, which is merged into the state of `p`. All tensors in the
state have the shape of `p` unless said otherwise. Three attributes describe a cb:

- `defaults`: hyper-parameters it brings, with their values.
- `needs`: what it must see of a parameter when the parameter is sharded. `'elementwise'`: any part; `'norm'`: any
  part, and norms of the whole through `whole_norm`; `'whole'`: all of it. Where nothing is declared it is found by
  recording the chain: `'whole'` if that is not possible.
- `like_param`: names of states that have the parameter's shape, so that a checkpoint of another shape is refused.
- `dense`: True where sparse gradients are refused, before a step changes anything; or the name of a hyper-parameter:
  where that is not 0 they are.

Real and imaginary parts of complex parameters step by themselves, as in `torch.optim`; norms are of both.

Notation in the formulas: p parameter, g gradient, a `grad_avg`, v `sqr_avg`, t `step`, m `mom`, s `sqr_mom`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from .engine.reductions import whole_norm, whole_rms

Cb = Callable[..., Any]
F_ = TypeVar("F_", bound=Cb)
Scalar = float | Tensor
Count = int | Tensor  # a 0-d tensor on the device of the parameter in groups that are `capturable`
State = dict[str, Any]


def declare(
    needs: str, defaults: dict[str, Any] | None = None, like_param: tuple[str, ...] = (), dense: bool | str = False
) -> Callable[[F_], F_]:
    """Attach the attributes that describe a cb, see the module's docstring."""

    def attach(cb: F_) -> F_:
        cb.needs = needs  # type: ignore[attr-defined]
        cb.like_param = like_param  # type: ignore[attr-defined]
        cb.dense = dense  # type: ignore[attr-defined]
        if defaults is not None:
            cb.defaults = defaults  # type: ignore[attr-defined]
        return cb

    return attach


def _add_scaled(target: Tensor, update: Tensor, scale: Scalar) -> None:
    """target <- target + scale * update, where `scale` is a number or a 0-d tensor that is never read back."""
    if isinstance(scale, Tensor):
        target.addcmul_(update, scale.to(target.device))
    else:
        target.add_(update, alpha=scale)


def _next(count: Count) -> Count:
    """The count of one more step; a tensor counts in place, so that a captured step goes on counting."""
    return count.add_(1) if isinstance(count, Tensor) else count + 1


def _grad(p: Tensor) -> Tensor:
    """The gradient's data; the engine calls a cb only where there is one."""
    assert p.grad is not None
    return p.grad.data


def _real(x: Tensor) -> Tensor:
    """A complex tensor as a real one that is twice as large; any other as it is."""
    return torch.view_as_real(x.resolve_conj()) if x.is_complex() else x


# ---- decay and plain steps


@declare("elementwise")
def sgd_step(p: Tensor, lr: Scalar, **kwargs: Any) -> None:
    """Gradient descent: p <- p - lr * g.

    Examples:
        >>> import torch
        >>> p = torch.tensor([1.0])
        >>> p.grad = torch.tensor([0.5])
        >>> sgd_step(p, lr=0.5)
        >>> p
        tensor([0.7500])
    """
    _add_scaled(p.data, _grad(p), -lr)


@declare("elementwise", defaults={"wd": 0.0})
def weight_decay(p: Tensor, lr: Scalar, wd: Scalar, do_wd: bool = True, **kwargs: Any) -> None:
    """Decoupled weight decay: p <- p * (1 - lr * wd), unless the parameter is marked `do_wd=False`.

    Loshchilov and Hutter, https://arxiv.org/abs/1711.05101.
    """
    if do_wd and (isinstance(wd, Tensor) or wd != 0):
        p.data.mul_(1 - lr * wd)


@declare("elementwise", defaults={"wd": 0.0}, dense="wd")
def l2_reg(p: Tensor, lr: Scalar, wd: Scalar, do_wd: bool = True, **kwargs: Any) -> None:
    """L2 penalty: g <- g + wd * p, in the gradient itself, unless the parameter is marked `do_wd=False`."""
    if do_wd and (isinstance(wd, Tensor) or wd != 0):
        _add_scaled(_grad(p), p.data, wd)


# ---- statistics


@declare("elementwise", defaults={"mom": 0.9}, like_param=("grad_avg",))
def average_grad(
    p: Tensor, mom: Scalar, dampening: bool = False, grad_avg: Tensor | None = None, **kwargs: Any
) -> State:
    """Momentum in the state `grad_avg`, from zero: a <- m * a + g, or with `dampening` a <- m * a + (1 - m) * g."""
    grad = _grad(p)
    if grad_avg is None:
        grad_avg = torch.zeros_like(grad)
    grad_avg.mul_(mom)
    _add_scaled(grad_avg, grad, 1 - mom if dampening else 1.0)
    return {"grad_avg": grad_avg}


@declare("elementwise", defaults={"sqr_mom": 0.99}, like_param=("sqr_avg",), dense=True)
def average_sqr_grad(
    p: Tensor, sqr_mom: Scalar, dampening: bool = True, sqr_avg: Tensor | None = None, **kwargs: Any
) -> State:
    """Mean square in the state `sqr_avg`: v <- s * v + g^2, or with `dampening` v <- s * v + (1 - s) * g^2."""
    if sqr_avg is None:
        sqr_avg = torch.zeros_like(_grad(p))
    grad, average = _real(_grad(p)), _real(sqr_avg)
    average.mul_(sqr_mom)
    scale = 1 - sqr_mom if dampening else 1.0
    if isinstance(scale, Tensor):
        average.addcmul_(grad, grad * scale.to(grad.device))
    else:
        average.addcmul_(grad, grad, value=scale)
    return {"sqr_avg": sqr_avg}


@declare("elementwise")
def step_stat(p: Tensor, step: Count = 0, **kwargs: Any) -> State:
    """Count the steps of this parameter in the state `step`, a Python int (0-d on the device if `capturable`)."""
    return {"step": _next(step)}


def debias(mom: Scalar, damp: Scalar, step: Count) -> Scalar:
    """What an average with factor `mom` and weight `damp` of the new value has summed up to after `step` steps.

    damp * (1 - mom^step) / (1 - mom), which is 1 - mom^step where `damp` is 1 - mom.

    Examples:
        >>> debias(mom=0.5, damp=0.5, step=2)
        0.75
    """
    return damp * (1 - mom**step) / (1 - mom)


# ---- steps with statistics


@declare("elementwise")
def momentum_step(p: Tensor, lr: Scalar, grad_avg: Tensor, **kwargs: Any) -> None:
    """Step along the momentum: p <- p - lr * a."""
    _add_scaled(p.data, grad_avg, -lr)


@declare("elementwise", defaults={"eps": 1e-8})
def rms_prop_step(
    p: Tensor, lr: Scalar, sqr_avg: Tensor, eps: float, grad_avg: Tensor | None = None, **kwargs: Any
) -> None:
    """RMSProp: p <- p - lr * (a, or g without momentum) / (sqrt(v) + eps). No bias correction.

    Hinton's lecture 6, http://www.cs.toronto.edu/~tijmen/csc321/slides/lecture_slides_lec6.pdf.
    """
    direction = _real(_grad(p) if grad_avg is None else grad_avg)
    _add_scaled(_real(p.data), direction / _real(sqr_avg).sqrt().add_(eps), -lr)


def _debiased_root(sqr_avg: Tensor, sqr_mom: Scalar, step: Count) -> Tensor:
    """sqrt(v / (1 - s^t)), in a new real tensor."""
    return (_real(sqr_avg) / debias(sqr_mom, 1 - sqr_mom, step)).sqrt_()


@declare("elementwise", defaults={"eps": 1e-5})
def adam_step(
    p: Tensor,
    lr: Scalar,
    mom: Scalar,
    step: Count,
    sqr_mom: Scalar,
    grad_avg: Tensor,
    sqr_avg: Tensor,
    eps: float,
    **kwargs: Any,
) -> None:
    """Adam: p <- p - lr / (1 - m^t) * a / (sqrt(v / (1 - s^t)) + eps).

    Kingma and Ba, https://arxiv.org/abs/1412.6980.
    """
    update = _real(grad_avg) / _debiased_root(sqr_avg, sqr_mom, step).add_(eps)
    _add_scaled(_real(p.data), update, -lr / debias(mom, 1 - mom, step))


@declare("elementwise", defaults={"eps": 1e-5})
def radam_step(
    p: Tensor,
    lr: Scalar,
    mom: Scalar,
    step: Count,
    sqr_mom: float,
    grad_avg: Tensor,
    sqr_avg: Tensor,
    eps: float,
    beta: float = 0.0,
    **kwargs: Any,
) -> None:
    """Rectified Adam; with `beta` the denominator passes through a softplus.

    r_inf = 2/(1-s) - 1 and r = r_inf - 2*t*s^t/(1-s^t). Where r > 5, with d = sqrt(v/(1-s^t)) + eps (d = softplus(d)
    if `beta`) and w = sqrt((r-4)(r-2)r_inf / ((r_inf-4)(r_inf-2)r)): p <- p - lr * w/(1-m^t) * a/d.
    Before that the step is p <- p - lr/(1-m^t) * a.

    Liu et al., https://arxiv.org/abs/1908.03265; softplus: Tong et al., https://arxiv.org/abs/1908.00700.
    """
    data, average = _real(p.data), _real(grad_avg)
    scale = -lr / debias(mom, 1 - mom, step)
    r_inf = 2 / (1 - sqr_mom) - 1
    r = r_inf - 2 * step * sqr_mom**step / (1 - sqr_mom**step)
    if (r_inf if isinstance(r, Tensor) else r) <= 5:
        return _add_scaled(data, average, scale)
    above = r.clamp(min=5) if isinstance(r, Tensor) else r
    rectification = (((above - 4) * (above - 2) * r_inf) / ((r_inf - 4) * (r_inf - 2) * above)) ** 0.5
    denominator = _debiased_root(sqr_avg, sqr_mom, step).add_(eps)
    if beta:
        denominator = F.softplus(denominator, beta)
    if isinstance(r, Tensor):  # both ways, because only the device knows
        return _add_scaled(data, torch.where(r > 5, average / denominator * rectification, average), scale)
    return _add_scaled(data, average / denominator, scale * rectification)


@declare("elementwise", defaults={"eps": 1e-8})
def qhadam_step(
    p: Tensor,
    lr: Scalar,
    mom: Scalar,
    sqr_mom: Scalar,
    sqr_avg: Tensor,
    nu_1: float,
    nu_2: float,
    step: Count,
    grad_avg: Tensor,
    eps: float,
    **kwargs: Any,
) -> None:
    """Quasi-hyperbolic Adam, which mixes the gradient into both averages:

    p <- p - lr * [(1-nu_1) g + nu_1 a/(1-m^t)] / [sqrt((1-nu_2) g^2 + nu_2 v/(1-s^t)) + eps].

    Ma and Yarats, https://arxiv.org/abs/1810.06801.
    """
    grad = _real(_grad(p))
    above = grad * (1 - nu_1) + _real(grad_avg) * (nu_1 / debias(mom, 1 - mom, step))
    below = grad * grad * (1 - nu_2) + _real(sqr_avg) * (nu_2 / debias(sqr_mom, 1 - sqr_mom, step))
    _add_scaled(_real(p.data), above / below.sqrt_().add_(eps), -lr)


# ---- steps with norms of the whole parameter


@declare("norm", defaults={"trust_coeff": 0.02, "wd": 0.0, "eps": 1e-8}, dense=True)
def larc_layer_lr(
    p: Tensor,
    lr: Scalar,
    trust_coeff: float,
    wd: Scalar,
    eps: float,
    clip: bool = True,
    do_wd: bool = True,
    **kwargs: Any,
) -> State:
    """The learning rate of one layer, in the state `local_lr` (0-d): lr * trust_coeff * |p| / (|g| + wd * |p| + eps).

    With `clip` (LARC) it is at most `lr`; without (LARS) it is not bounded. Where |p| or |g| is 0 it is `lr`. `wd`
    counts only for parameters that decay. You, Gitman and Ginsburg, https://arxiv.org/abs/1708.03888.
    """
    p_norm, g_norm = whole_norm(_real(p.data), _real(_grad(p)))
    decay = wd * p_norm if do_wd else 0.0
    ratio = trust_coeff * p_norm / (g_norm + decay + eps)
    local_lr = lr * torch.where((p_norm == 0) | (g_norm == 0), torch.ones_like(ratio), ratio)
    if clip:
        local_lr = local_lr.clamp(max=lr.to(local_lr) if isinstance(lr, Tensor) else lr)
    return {"local_lr": local_lr}


@declare("elementwise")
def larc_step(p: Tensor, local_lr: Scalar, grad_avg: Tensor | None = None, **kwargs: Any) -> None:
    """Step with the layer's own learning rate: p <- p - local_lr * (a, or g without momentum)."""
    _add_scaled(p.data, _grad(p) if grad_avg is None else grad_avg, -local_lr)


@declare("norm", defaults={"eps": 1e-5})
def lamb_step(
    p: Tensor,
    lr: Scalar,
    mom: Scalar,
    step: Count,
    sqr_mom: Scalar,
    grad_avg: Tensor,
    sqr_avg: Tensor,
    eps: float,
    **kwargs: Any,
) -> None:
    """LAMB: Adam's update u scaled by the layer's trust ratio, p <- p - lr * min(rms(p) / rms(u), 10) * u.

    The ratio is 1 where either root mean square is 0. Weight decay is not part of u (unlike the paper).
    You et al., https://arxiv.org/abs/1904.00962.
    """
    update = _real(grad_avg) / _debiased_root(sqr_avg, sqr_mom, step).add_(eps)
    update.div_(debias(mom, 1 - mom, step))
    p_rms, update_rms = whole_rms(_real(p.data), update)
    ratio = (p_rms / update_rms).clamp(max=10.0)
    ratio = torch.where((p_rms == 0) | (update_rms == 0), torch.ones_like(ratio), ratio)
    _add_scaled(_real(p.data), update, -lr * ratio)


# ---- Lookahead

#: States that `lookahead_start` and `lookahead_step` keep.
LOOKAHEAD_STATES = frozenset({"slow_weights", "count"})


@declare("elementwise", like_param=("slow_weights",))
def lookahead_start(p: Tensor, slow_weights: Tensor | None = None, **kwargs: Any) -> State | None:
    """Before the first step of a parameter, copy it to the state `slow_weights`."""
    return {"slow_weights": p.data.clone()} if slow_weights is None else None


@declare("elementwise", defaults={"k": 6, "alpha": 0.5})
def lookahead_step(
    p: Tensor, slow_weights: Tensor, lr: Scalar, k: int, alpha: float, count: Count = 0, **kwargs: Any
) -> State:
    """Every `k`-th step: slow <- slow + alpha * (p - slow), then p <- slow. Counts in the state `count`.

    With lr = 0 the parameter stays where it is. Zhang et al., https://arxiv.org/abs/1907.08610.
    """
    count = _next(count)
    due = _is_multiple(count, k)
    if due is False or (not isinstance(lr, Tensor) and lr == 0):
        return {"count": count}
    now = _both(due, lr.to(p.device) != 0 if isinstance(lr, Tensor) else True)
    if isinstance(now, Tensor):
        slow_weights.copy_(torch.where(now, torch.lerp(slow_weights, p.data, alpha), slow_weights))
        p.data.copy_(torch.where(now, slow_weights, p.data))
    else:
        slow_weights.lerp_(p.data, alpha)
        p.data.copy_(slow_weights)
    return {"count": count}


def _is_multiple(count: Count, k: int) -> bool | Tensor:
    """Whether `count` is a multiple of `k`; 0-d where only the device knows, by operations that are recorded."""
    return (count / k + 0.5).floor() * k == count if isinstance(count, Tensor) else count % k == 0


def _both(a: bool | Tensor, b: bool | Tensor) -> bool | Tensor:
    """Whether both hold; what is no tensor does."""
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a & b
    return a if isinstance(a, Tensor) else b
