"""The optimizers that are timed: this library's, torch's, and those of two packages where they are installed."""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ... import SGD, Adam, Lamb, Larc, Optimizer, QHAdam, RAdam, RMSProp, average_grad, ranger, weight_decay

Groups = Sequence[Sequence[Tensor]]

FUSED = "torch fused"
LOOP = "loop"
OURS = "fastopt"


def sign_step(p: Tensor, lr: float, grad_avg: Tensor, **kwargs: Any) -> None:
    """What a user writes: sign momentum."""
    p.data.add_(torch.sign(grad_avg), alpha=-lr)


def user_chain(params: Any, lr: Any = 1e-3, engine: str | None = None) -> Optimizer:
    """Sign momentum with decoupled decay."""
    return Optimizer(params, (weight_decay, average_grad, sign_step), engine=engine, lr=lr, mom=0.9, wd=0.01)


def sgd(params: Any, lr: Any = 1e-3, engine: str | None = None) -> Optimizer:
    """SGD with momentum."""
    return SGD(params, lr=lr, mom=0.9, engine=engine)


RULES: dict[str, Callable[..., Optimizer]] = {
    "Adam": Adam, "SGD": sgd, "RAdam": RAdam, "Lamb": Lamb, "Larc": Larc, "ranger": ranger, "user": user_chain,
    "RMSProp": RMSProp, "QHAdam": QHAdam,
}  # fmt: skip

_BETAS: dict[str, Any] = {"betas": (0.9, 0.99), "eps": 1e-5}

#: Per rule: the class in torch.optim, its arguments, and the variants of it that exist.
_TORCH: dict[str, tuple[str, dict[str, Any], tuple[str, ...]]] = {
    "Adam": ("AdamW", {**_BETAS, "weight_decay": 0.01}, ("fused", "foreach")),
    "SGD": ("SGD", {"momentum": 0.9}, ("fused", "foreach")),
    "RAdam": ("RAdam", _BETAS, ("foreach",)),
}

#: Per package and rule: the class of the same algorithm and its arguments. HeavyBall compiles its updates by default;
#: it would drop the gradients after a step, which the others share. pytorch-optimizer's AdamW and SGD are torch's.
_PACKAGES: dict[str, dict[str, tuple[str, dict[str, Any]]]] = {
    "heavyball": {
        "Adam": ("AdamW", {**_BETAS, "weight_decay": 0.01}),
        "SGD": ("SGD", {"beta": 0.9}),
    },
    "pytorch_optimizer": {
        "RAdam": ("RAdam", {**_BETAS, "foreach": True}),
        "Lamb": ("Lamb", {**_BETAS, "foreach": True}),
        "Larc": ("LARS", {"momentum": 0.9, "foreach": True}),
        "ranger": ("Ranger", {"betas": (0.95, 0.99), "weight_decay": 0.01, "use_gc": False, "foreach": True}),
        "user": ("Tiger", {"beta": 0.9, "weight_decay": 0.01, "foreach": True}),
    },
}
NAMES = {"heavyball": "HeavyBall", "pytorch_optimizer": "pytorch-optimizer"}


@dataclass(frozen=True)
class Rival:
    """One optimizer to time. `make(groups, lrs)` builds it on groups of parameters, with a learning rate for each."""

    who: str
    make: Callable[[Groups, Sequence[float]], Any]
    compiles: bool = False


def rivals(rule: str, n_groups: int, loop: bool, compiling: bool) -> list[Rival]:
    """Who is timed on a rule; those of packages that are not installed are left out, see `notes`.

    Args:
        loop: also the callbacks as they are, one by one.
        compiling: also packages that compile one graph of all tensors.
    """
    found = [Rival(OURS, partial(_ours, rule, None))]
    if rule in _TORCH:
        kinds = _TORCH[rule][2]
        found += [
            Rival(f"torch {kind}", partial(_torch, rule, kind)) for kind in kinds if n_groups == 1 or kind == "fused"
        ]
    if n_groups > 1:
        return found
    for package, rules in _PACKAGES.items():
        compiles = package == "heavyball"
        if rule in rules and _installed(package) and (compiling or not compiles):
            found.append(Rival(NAMES[package], partial(_package, package, rule), compiles))
    return [*found, Rival(LOOP, partial(_ours, rule, "eager"))] if loop else found


def notes(compiled: Iterable[tuple[str, str]]) -> list[str]:
    """What is missing from the table, and why; `compiled` are the models and rules with packages that compile."""
    absent = [f"{NAMES[package]} is not installed here: no rows." for package in _PACKAGES if not _installed(package)]
    if not _installed("heavyball"):
        return absent
    rows = ", ".join(sorted(f"{rule} on {model}" for model, rule in compiled)) or "nothing"
    return [*absent, f"HeavyBall compiles one graph of all tensors, which takes minutes: {rows} only."]


def versions() -> dict[str, str]:
    """Of the packages that were timed."""
    return {NAMES[package]: importlib.metadata.version(package) for package in _PACKAGES if _installed(package)}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _ours(rule: str, engine: str | None, groups: Groups, lrs: Sequence[float]) -> Optimizer:
    return RULES[rule]([list(group) for group in groups], lr=list(lrs), engine=engine)


def _torch(rule: str, kind: str, groups: Groups, lrs: Sequence[float]) -> Any:
    name, arguments, _ = _TORCH[rule]
    params = [{"params": list(group), "lr": lr} for group, lr in zip(groups, lrs, strict=True)]
    return getattr(torch.optim, name)(params, **arguments, **{kind: True})


def _package(package: str, rule: str, groups: Groups, lrs: Sequence[float]) -> Any:
    name, arguments = _PACKAGES[package][rule]
    opt = getattr(importlib.import_module(package), name)(list(groups[0]), lr=lrs[0], **arguments)
    if package == "heavyball":
        opt.consume_grad = False
    return opt
