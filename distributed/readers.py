"""PyTorch's averages of weights (`torch.optim.swa_utils`) read parameters beside the modules of a model: they wait.

From the first `shard` on, `AveragedModel.update_parameters` waits for what is under way in the model that it is given.
"""

from __future__ import annotations

from torch import nn
from torch.optim.swa_utils import AveragedModel

from .gathering import synchronize_model

_update = AveragedModel.update_parameters


def _update_parameters(self: AveragedModel, model: nn.Module) -> None:
    synchronize_model(model)
    _update(self, model)


def teach_averaged_model() -> None:
    """Let every `AveragedModel` of this process wait."""
    AveragedModel.update_parameters = _update_parameters  # type: ignore[method-assign]
