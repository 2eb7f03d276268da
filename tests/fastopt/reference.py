"""The rules of the optimizers once more, in float64 with numpy and plain Python, one parameter at a time.

Written from the formulas, not from the code under test, and without its decomposition into callbacks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


def _root_mean_square(x: Array) -> float:
    return math.sqrt(float(np.mean(x * x))) if x.size else 0.0


def _norm(x: Array) -> float:
    return math.sqrt(float(np.sum(x * x)))


class Reference:
    """One parameter under one optimizer. `p` is the value after the steps so far, `s` what the rule remembers."""

    def __init__(self, rule: str, p: Array, decouple_wd: bool = True, do_wd: bool = True, **h: Any) -> None:
        self.p = np.array(p, dtype=np.float64)
        self.rule: Callable[[Array], None] = getattr(self, rule)
        self.decouple_wd, self.do_wd, self.h = decouple_wd, do_wd, h
        self.s: dict[str, Any] = {"a": np.zeros_like(self.p), "v": np.zeros_like(self.p), "t": 0}

    def step(self, grad: Array) -> Array:
        """Decay, then the rule, then Lookahead's pull if the hypers have `k`. Returns the new value."""
        g = np.array(grad, dtype=np.float64)
        wd, lr = self.h.get("wd", 0.0), self.h["lr"]
        self.s["t"] += 1
        if "k" in self.h and "slow" not in self.s:
            self.s["slow"] = self.p.copy()
        if self.do_wd and self.decouple_wd:
            self.p = self.p - lr * wd * self.p
        elif self.do_wd:
            g = g + wd * self.p
        self.rule(g)
        if "k" in self.h and self.s["t"] % self.h["k"] == 0:
            slow = self.s["slow"]
            self.s["slow"] = slow + self.h["alpha"] * (self.p - slow)
            self.p = self.s["slow"].copy()
        return self.p

    # ---- the rules

    def sgd(self, g: Array) -> None:
        m = self.h.get("mom", 0.0)
        self.s["a"] = m * self.s["a"] + g
        self.p = self.p - self.h["lr"] * self.s["a"]

    def rmsprop(self, g: Array) -> None:
        m, s = self.h.get("mom", 0.0), self.h["sqr_mom"]
        self.s["a"] = m * self.s["a"] + g
        self.s["v"] = s * self.s["v"] + (1 - s) * g * g
        self.p = self.p - self.h["lr"] * self.s["a"] / (np.sqrt(self.s["v"]) + self.h["eps"])

    def _averages(self, g: Array) -> tuple[Array, Array]:
        """Both averages without their bias."""
        m, s, t = self.h["mom"], self.h["sqr_mom"], self.s["t"]
        self.s["a"] = m * self.s["a"] + (1 - m) * g
        self.s["v"] = s * self.s["v"] + (1 - s) * g * g
        return self.s["a"] / (1 - m**t), self.s["v"] / (1 - s**t)

    def adam(self, g: Array) -> None:
        a, v = self._averages(g)
        self.p = self.p - self.h["lr"] * a / (np.sqrt(v) + self.h["eps"])

    def radam(self, g: Array) -> None:
        a, v = self._averages(g)
        s, t, beta = self.h["sqr_mom"], self.s["t"], self.h.get("beta", 0.0)
        r_inf = 2 / (1 - s) - 1
        r = r_inf - 2 * t * s**t / (1 - s**t)
        if not r > 5:
            self.p = self.p - self.h["lr"] * a
            return
        w = math.sqrt((r - 4) * (r - 2) * r_inf / ((r_inf - 4) * (r_inf - 2) * r))
        d = np.sqrt(v) + self.h["eps"]
        if beta:
            d = np.where(beta * d > 20, d, np.log1p(np.exp(np.minimum(beta * d, 20.0))) / beta)
        self.p = self.p - self.h["lr"] * w * a / d

    def qhadam(self, g: Array) -> None:
        a, v = self._averages(g)
        n1, n2 = self.h["nu_1"], self.h["nu_2"]
        above = (1 - n1) * g + n1 * a
        self.p = self.p - self.h["lr"] * above / (np.sqrt((1 - n2) * g * g + n2 * v) + self.h["eps"])

    def larc(self, g: Array) -> None:
        h, p_norm, g_norm = self.h, _norm(self.p), _norm(g)
        wd = h.get("wd", 0.0) if self.do_wd else 0.0
        ratio = h["trust_coeff"] * p_norm / (g_norm + wd * p_norm + h["eps"]) if p_norm and g_norm else 1.0
        local = h["lr"] * (min(ratio, 1.0) if h.get("clip", True) else ratio)
        self.s["a"] = h.get("mom", 0.0) * self.s["a"] + g
        self.s["local_lr"] = local
        self.p = self.p - local * self.s["a"]

    def lamb(self, g: Array) -> None:
        a, v = self._averages(g)
        u = a / (np.sqrt(v) + self.h["eps"])
        r1, r2 = _root_mean_square(self.p), _root_mean_square(u)
        self.p = self.p - self.h["lr"] * (min(r1 / r2, 10.0) if r1 and r2 else 1.0) * u
