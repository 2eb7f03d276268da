"""Who else reads parameters between a step and the next forward pass: what is taken from a module waits.

From the first `shard` on, `parameters()` and `named_parameters()` of every module of this process hand out a parameter
when it has come back from its owner: averages of other libraries, norms for a log and penalties read what the step has
made. `zero_grad()`, which many loops call just then, looks at no values and waits for nothing. PyTorch's averages of
weights (`torch.optim.swa_utils`) read buffers, too: they wait for all that is under way in their model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel

from .gathering import Gathering, synchronize_model, under_way

_update = AveragedModel.update_parameters
_named_parameters = nn.Module.named_parameters
_waiting = True


def _update_parameters(self: AveragedModel, model: nn.Module) -> None:
    synchronize_model(model)
    _update(self, model)


def _complete_parameters(self: nn.Module, *args: Any, **kwargs: Any) -> Iterator[tuple[str, nn.Parameter]]:
    named = _named_parameters(self, *args, **kwargs)
    if torch.compiler.is_compiling() or not _waiting:
        return named
    gatherings = under_way()
    return _completed(named, gatherings) if gatherings else named


def _completed(
    named: Iterator[tuple[str, nn.Parameter]], gatherings: Sequence[Gathering]
) -> Iterator[tuple[str, nn.Parameter]]:
    for name, p in named:
        for gathering in gatherings:
            gathering.complete(p)
        yield name, p


@contextmanager
def values_unread() -> Iterator[None]:
    """Parameters are handed out at once, to code that does not look at their values."""
    global _waiting
    before, _waiting = _waiting, False
    try:
        yield
    finally:
        _waiting = before


def teach_modules_and_averages() -> None:
    """Let every module and every `AveragedModel` of this process wait."""
    AveragedModel.update_parameters = _update_parameters  # type: ignore[method-assign]
    nn.Module.named_parameters = _complete_parameters  # type: ignore[method-assign]
