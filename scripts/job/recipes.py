"""The optimizers that `--opt` knows: a table of data, and the function that builds one over layer groups."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn

    from fastopt import Optimizer

NamedGroups = Sequence[Sequence[tuple[str, "nn.Parameter"]]]


@dataclass(frozen=True)
class Recipe:
    """How one value of `--opt` is built."""

    factory: str
    """Name of the class in `fastopt`, or in `torch.optim` when `foreign` is set."""
    lr: float
    """The learning rate when `--lr` is not given; the best of the few tried in 100 steps of the default job."""
    hypers: dict[str, Any] = field(default_factory=dict)
    """Further arguments, by the names of the factory."""
    lookahead: bool = False
    """Whether `fastopt.Lookahead` goes around it."""
    foreign: bool = False
    """Whether it is a torch optimizer inside `fastopt.OptimWrapper`."""


RECIPES: dict[str, Recipe] = {
    "sgd": Recipe("SGD", 0.3),
    "momentum": Recipe("SGD", 0.05, {"mom": 0.9}),
    "rmsprop": Recipe("RMSProp", 5e-4),
    "adam": Recipe("Adam", 3e-3),
    "radam": Recipe("RAdam", 3e-3),
    "qhadam": Recipe("QHAdam", 2e-3, {"mom": 0.95, "sqr_mom": 0.99, "eps": 1e-5}),
    "larc": Recipe("Larc", 0.1),
    "lamb": Recipe("Lamb", 0.06),
    "ranger": Recipe("ranger", 5e-3),
    "lookahead": Recipe("Adam", 6e-3, lookahead=True),
    "torch-adamw": Recipe("AdamW", 3e-3, foreign=True),
}
"""What `--opt` accepts."""


def build_optimizer(
    name: str, groups: NamedGroups, *, lr: float | slice | None, wd: float, mom: float | None
) -> Optimizer:
    """The optimizer `name` over `groups` (one group per element, first layer first).

    `lr` is a number for all groups, or a slice that is spread geometrically from the first group to the last.
    Parameters with fewer than two dimensions (the scales of the norms) are not decayed.
    """
    import fastopt

    recipe = RECIPES[name]
    named = [list(group) for group in groups]
    rate = recipe.lr if lr is None else lr
    if recipe.foreign:
        opt = _wrap_torch(recipe, named)
        opt.set_hypers(lr=rate, wd=wd, **({} if mom is None else {"mom": mom}))
    else:
        hypers = recipe.hypers if mom is None else {**recipe.hypers, "mom": mom}
        factory: Callable[..., Optimizer] = getattr(fastopt, recipe.factory)
        opt = factory(named, lr=rate, wd=wd, **hypers)
        if recipe.lookahead:
            opt = fastopt.Lookahead(opt)
    for group in groups:
        for _, p in group:
            if p.ndim < 2:
                opt.state[p]["do_wd"] = False
    return opt


def _wrap_torch(recipe: Recipe, named: list[list[tuple[str, nn.Parameter]]]) -> Optimizer:
    """A torch optimizer with one group per layer group, inside `OptimWrapper`."""
    import torch

    import fastopt

    factory = getattr(torch.optim, recipe.factory)
    return fastopt.OptimWrapper(factory([{"params": group} for group in named], lr=recipe.lr, **recipe.hypers))


def has_momentum(group: dict[str, Any]) -> bool:
    """Whether a parameter group carries a momentum that a one-cycle schedule may move."""
    return "betas" in group or bool(group.get("momentum"))
