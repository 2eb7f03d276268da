"""A stand-in for torchvision, for the import of timm.

timm imports it at the top, for image transforms and one layer. The one on PyPI does not import beside a torch for CPUs,
so that it is not installed here (requirements-clients.txt); what is driven here uses none of it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import MagicMock

import torch

_MODULES = ("", ".datasets", ".ops", ".ops.misc", ".transforms", ".transforms.functional")


@contextmanager
def torchvision() -> Iterator[None]:
    """While it lasts `import torchvision` finds the stand-in; other libraries do not see it afterwards."""
    modules = {f"torchvision{name}": MagicMock() for name in _MODULES}
    modules["torchvision.ops.misc"].FrozenBatchNorm2d = torch.nn.BatchNorm2d
    sys.modules.update(modules)
    try:
        yield
    finally:
        for name in modules:
            del sys.modules[name]
