"""Chains of callbacks that no library has, written as users write them, and a strategy for random ones."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st

from fastopt import Optimizer, average_grad, average_sqr_grad, step_stat, weight_decay

Cb = Callable[..., Any]


def sign_step(p, lr, grad_avg, **kwargs):
    """Sign momentum."""
    p.data.add_(torch.sign(grad_avg), alpha=-lr)


def clip_by_norm(p, max_norm, **kwargs):
    """Scale the gradient of one parameter so that its norm is at most `max_norm`."""
    norm = p.grad.data.norm()
    p.grad.data.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))


def torch_adam_step(p, lr, mom, sqr_mom, eps, exp_avg=None, exp_avg_sq=None, step=0, **kwargs):
    """Adam in one cb, in the style of torch.optim, with new state tensors made by `zeros_like`."""
    if exp_avg is None:
        exp_avg, exp_avg_sq = torch.zeros_like(p), torch.zeros_like(p)
    step += 1
    g = p.grad
    exp_avg.lerp_(g, 1 - mom)
    exp_avg_sq.mul_(sqr_mom).addcmul_(g, g, value=1 - sqr_mom)
    denominator = (exp_avg_sq.sqrt() / math.sqrt(1 - sqr_mom**step)).add_(eps)
    p.data.addcdiv_(exp_avg, denominator, value=-lr / (1 - mom**step))
    return {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq, "step": step}


def lion_step(p, lr, betas, wd, exp_avg=None, **kwargs):
    """Lion, with betas as one hyper and a functional update."""
    beta1, beta2 = betas
    grad = p.grad.data
    m = torch.zeros_like(grad) if exp_avg is None else exp_avg
    update = (m * beta1 + grad * (1 - beta1)).sign()
    p.data.mul_(1 - lr * wd).sub_(update * lr)
    return {"exp_avg": m * beta2 + (1 - beta2) * grad}


def adan_step(p, lr, b1, b2, b3, eps, wd, step=0, m=None, v=None, n=None, previous=None, **kwargs):
    """Adan (https://arxiv.org/abs/2208.06677)."""
    g = p.grad.data
    if m is None:
        m, v, n, previous = torch.zeros_like(g), torch.zeros_like(g), torch.zeros_like(g), g.clone()
    step = step + 1
    difference = g - previous
    m.mul_(b1).add_(g, alpha=1 - b1)
    v.mul_(b2).add_(difference, alpha=1 - b2)
    n.mul_(b3).add_((g + b2 * difference).square_(), alpha=1 - b3)
    denominator = (n / (1 - b3**step)).sqrt_().add_(eps)
    p.data.sub_(lr * (m / (1 - b1**step) + b2 * v / (1 - b2**step)) / denominator)
    p.data.div_(1 + lr * wd)
    previous.copy_(g)
    return {"m": m, "v": v, "n": n, "previous": previous, "step": step}


def centered_step(p, lr, **kwargs):
    """A gradient without its mean, squashed and gated: reductions, comparisons and functions."""
    g = p.grad - p.grad.mean()
    gate = torch.where(g.abs() > 0.5, torch.tanh(g), F.softplus(g, 2.0))
    p.data -= lr * gate * (p.data.norm() > 0)


def decay_and_scale(p, lr, **kwargs):
    """Move the parameter, and scale its gradient by the norm that the parameter had before."""
    norm = p.data.norm()
    p.data.mul_(1 + lr)
    p.grad.data.div_(norm + 1)


class Scheduled:
    """A cb that is an object, with a number of its own."""

    def __init__(self, factor: float) -> None:
        self.factor = factor

    def __call__(self, p, lr, **kwargs):
        p.data.add_(p.grad.data, alpha=-lr * self.factor)


damped = partial(average_grad, dampening=True)

FOREIGN: dict[str, tuple[tuple[Cb, ...], dict[str, Any]]] = {
    "sign momentum": ((weight_decay, damped, sign_step), {"lr": 1e-2, "mom": 0.9, "wd": 0.1}),
    "clipped Adam": (
        (clip_by_norm, torch_adam_step),
        {"lr": 1e-2, "mom": 0.9, "sqr_mom": 0.99, "eps": 1e-8, "max_norm": 0.5},
    ),
    "Lion": ((lion_step,), {"lr": 1e-2, "betas": [(0.9, 0.99)], "wd": 0.1}),
    "Adan": ((adan_step,), {"lr": 1e-2, "b1": 0.98, "b2": 0.92, "b3": 0.99, "eps": 1e-8, "wd": 0.02}),
    "centered": ((centered_step,), {"lr": 1e-2}),
    "object": ((Scheduled(0.5),), {"lr": 1e-2}),
    "norm of what is overwritten": ((decay_and_scale,), {"lr": 1e-2}),
    "stats only": ((average_sqr_grad, step_stat), {"lr": 1e-2}),
}


def foreign(name: str, params: Any, engine: str | None) -> Optimizer:
    """An optimizer with one of the chains above."""
    cbs, hypers = FOREIGN[name]
    return Optimizer(params, cbs, engine=engine, **hypers)


# ---- random chains

_UNARY = ("sqrt", "rsqrt", "square", "abs", "sign", "exp", "log", "tanh", "neg", "reciprocal", "log1p", "relu", "floor")
_BINARY = ("add", "sub", "mul", "div", "maximum", "minimum")
_INPLACE = ("add_", "sub_", "mul_", "copy_")
_COMPARE = ("gt", "le", "eq")

Step = tuple[Any, ...]


def run_steps_of(steps: tuple[Step, ...], tensors: list[Any], numbers: list[Any]) -> None:
    """Apply `steps` to the tensors, which grow and change, and the numbers."""
    for kind, name, *rest in steps:
        x, y, z = (tensors[k % len(tensors)] for k in rest[:3])
        n = numbers[rest[3] % len(numbers)]
        if kind == "unary":
            tensors.append(getattr(torch, name)(x))
        elif kind == "binary":
            tensors.append(getattr(torch, name)(x, y))
        elif kind == "number":
            tensors.append(getattr(torch, name)(x, n))
        elif kind == "in place":
            getattr(x, name)(y)
        elif kind == "scaled":
            x.add_(y, alpha=n)
        elif kind == "products":
            getattr(x, name)(y, z, value=n)
        elif kind == "lerp":
            x.lerp_(y, n)
        elif kind == "clamp":
            tensors.append(x.clamp(min=-n, max=n))
        elif kind == "where":
            tensors.append(torch.where(getattr(x, name)(y), z, x))
        elif kind == "norm":
            tensors.append(x / (y.norm() + n))
        elif kind == "branch" and n > 0.5:
            x.mul_(n)


def random_cb(p, lr, wd, steps, keeps, step=0, one=None, two=None, **kwargs):
    """A callback that does `steps` to the parameter, the gradient and two states, of which `keeps` says how many."""
    step = step + 1
    if one is None:
        one = torch.zeros_like(p)
    if two is None:
        two = p.grad.data.clone()
    run_steps_of(steps, [p.data, p.grad.data, one, two], [lr, wd, 1 - 0.9**step, 0.25 * step, 2.0])
    return {"step": step, **({"one": one} if keeps else {}), **({"two": two} if keeps > 1 else {})}


_index = st.integers(0, 11)


def _step(kind: str, *names: str) -> st.SearchStrategy[Step]:
    return st.tuples(st.just(kind), st.sampled_from(names or ("",)), _index, _index, _index, _index)


elementwise_steps = st.one_of(
    _step("unary", *_UNARY),
    _step("binary", *_BINARY),
    _step("number", "add", "sub", "mul", "div"),
    _step("in place", *_INPLACE),
    _step("scaled"),
    _step("products", "addcmul_", "addcdiv_"),
    _step("lerp"),
    _step("clamp"),
    _step("where", *_COMPARE),
    _step("branch"),
)


@st.composite
def random_chains(draw: Any, norms: bool = False) -> tuple[Cb, ...]:
    """One or two callbacks of up to eight steps each."""
    steps = st.one_of(elementwise_steps, _step("norm")) if norms else elementwise_steps
    count = draw(st.integers(1, 2))
    lists = [tuple(draw(st.lists(steps, min_size=1, max_size=8))) for _ in range(count)]
    return tuple(partial(random_cb, steps=each, keeps=draw(st.integers(0, 2))) for each in lists)
