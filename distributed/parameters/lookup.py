"""Looks up parameters without a gradient: does the model still have them? What has been replaced would not train."""

from __future__ import annotations

import warnings
import weakref
from collections.abc import Mapping, Set

from torch import Tensor, nn

from .buckets import Buffers

ADVICE = (
    "so it would not train. Call shard() after what replaces parameters: load_state_dict(..., assign=True), assigning "
    "modules or parameters, parametrizations. fully_shard() does so too, and takes an optimizer without shard()"
)


class Lookup:
    """Each parameter is looked up once: what a model leaves unused is no mistake.

    Args:
        model: as it was when it was sharded.
        buffers: the parameters.
    """

    def __init__(self, model: nn.Module, buffers: Buffers) -> None:
        self._model, self._buffers = model, buffers
        self._others = [weakref.ref(p) for p in model.parameters()]
        self._idle: set[int] = set()
        self._lacking: set[int] = set()

    def idle(self, params: Set[int]) -> None:
        """Look up parameters without a gradient on any rank.

        Raises:
            RuntimeError: one is no longer in the model, and what has taken its place has a gradient.
        """
        new, self._idle = params - self._idle, self._idle | params
        problem = self._replaced(new) if new else None
        if problem:
            raise RuntimeError(problem)

    def lacking(self, params: Set[int]) -> str | None:
        """Look up parameters with a gradient on other ranks only; what is wrong with one, if anything is."""
        new, self._lacking = params - self._lacking, self._lacking | params
        if not new:
            return None
        for i in sorted(new):
            if not self._buffers.params[i].requires_grad:
                warnings.warn(
                    f"{self._name(i)!r} does not require a gradient on this rank, but has one on others: it counts as "
                    f"zero here. Change requires_grad alike on all ranks",
                    stacklevel=6,
                )
        return self._replaced(new)

    def _name(self, i: int) -> str:
        return self._buffers.layout.params[i].name

    def _replaced(self, params: Set[int]) -> str | None:
        """What is wrong where the model has another tensor in the place of a parameter."""
        there = dict(self._model.named_parameters(remove_duplicate=False))
        held = {id(p) for p in there.values()}
        gone = []
        for i in sorted(params):
            name, p = self._name(i), self._buffers.params[i]
            if there.get(name, p) is not p:
                return f"{name!r} of the model is another tensor than when shard() was called, {ADVICE}"
            if id(p) not in held:
                gone.append(name)
        new = self._with_gradients_and_new(there) if gone else []
        if gone and new:
            return f"{gone[0]!r} is no longer in the model, {new[0]!r} has come in its place, {ADVICE}"
        return None

    def _with_gradients_and_new(self, there: Mapping[str, Tensor]) -> list[str]:
        """Names of parameters that the model did not have when it was sharded, nor the optimizer has."""
        known = {id(p) for other in self._others if (p := other()) is not None} | set(map(id, self._buffers.params))
        return [name for name, p in there.items() if id(p) not in known and p.grad is not None]
