"""Functions of kernels that Triton lacks or computes too roughly. Imports Triton; loaded by generated kernels only."""

from __future__ import annotations

# mypy: disable-error-code="no-untyped-def, untyped-decorator"
import triton
import triton.language as tl


@triton.jit
def maximum(x, y):
    """The larger one, nan if either is."""
    return tl.maximum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def minimum(x, y):
    """The smaller one, nan if either is."""
    return tl.minimum(x, y, propagate_nan=tl.PropagateNan.ALL)


@triton.jit
def sign(x):
    """-1, 0 or 1."""
    return tl.where(x > 0, 1.0, 0.0) - tl.where(x < 0, 1.0, 0.0)


@triton.jit
def log1p(x):
    """log(1 + x), exact to rounding for small x (Kahan)."""
    u = 1.0 + x
    near = tl.where(u == 1.0, x, tl.log(u) * (x / tl.where(u == 1.0, 1.0, u - 1.0)))
    return tl.where(tl.abs(x) > 0.5, tl.log(u), near)


@triton.jit
def expm1(x):
    """exp(x) - 1, exact to rounding for small x (Kahan)."""
    u = tl.exp(x)
    apart = (u != 1.0) & (tl.abs(x) < 0.5)
    near = tl.where(apart, (u - 1.0) * (x / tl.where(apart, tl.log(u), 1.0)), x)
    return tl.where(tl.abs(x) < 0.5, near, u - 1.0)


@triton.jit
def tanh(x):
    """Hyperbolic tangent."""
    t = expm1(2.0 * tl.minimum(tl.abs(x), 20.0))
    y = t / (t + 2.0)
    return tl.where(x != x, x, tl.where(x < 0, -y, y))


@triton.jit
def sigmoid(x):
    """1 / (1 + exp(-x))."""
    return 1.0 / (1.0 + tl.exp(-x))


@triton.jit
def softplus(x, beta, threshold):
    """log(1 + exp(beta x)) / beta, and x itself where beta x is above the threshold."""
    scaled = x * beta
    return tl.where(scaled > threshold, x, log1p(tl.exp(tl.minimum(scaled, threshold))) / beta)


@triton.jit
def lerp(x, y, weight):
    """x + weight (y - x), computed from the nearer end."""
    d = y - x
    return tl.where(tl.abs(weight) < 0.5, tl.fma(d, weight, x), y - d * (1.0 - weight))


@triton.jit
def power(x, exponent: tl.constexpr):
    """x to a power that is a number of the structure."""
    y = tl.exp2(tl.log2(tl.abs(x)) * exponent)
    y = tl.where(x == 0, 0.0 if exponent > 0 else float("inf"), y)
    if exponent == exponent // 1:
        if exponent % 2 == 1:
            return tl.where(x < 0, -y, y)
        return y
    return tl.where(x < 0, float("nan"), y)
