"""Copies aside: of tensors on several GPUs, each of which is waited for."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from fastopt import Box
from fastopt.checkpoint.format.datafile import Item
from fastopt.checkpoint.saving.staging import Staging


class OnGpu(Tensor):
    """A tensor on the CPU that says it is on a GPU."""

    is_cuda = True
    number = 0

    @property
    def device(self) -> torch.device:
        """The GPU that it is not on."""
        return torch.device("cuda", self.number)


def test_every_gpu_that_is_copied_from_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copies are not complete before; the current GPU need not be the one that the tensors are on."""
    items = []
    for number in (1, 3, 1):
        data: Any = torch.full((4,), float(number)).as_subclass(OnGpu)
        data.number = number
        items.append(Item("a", "F32", (4,), Box.whole((4,)), data))
    waited: list[Any] = []
    monkeypatch.setattr(torch.cuda, "synchronize", lambda device=None: waited.append(device))
    copies = Staging().copy(items)
    assert sorted(waited, key=str) == [torch.device("cuda", 1), torch.device("cuda", 3)]
    assert [copy.data.tolist() for copy in copies] == [[1.0] * 4, [3.0] * 4, [1.0] * 4]
