"""Labels in a profiler's trace, which cost nothing while nobody looks."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.autograd.profiler import record_function

_NOTHING = nullcontext()


def label(text: str) -> AbstractContextManager[Any]:
    """`text` around what is done inside, where a profiler runs."""
    return record_function(text) if torch._C._autograd._profiler_enabled() else _NOTHING
