"""Random generators of a process: torch's on the CPU and on every CUDA device, Python's, numpy's.

Each becomes a vector of bytes under a name: `torch`, `cuda:0`, `python`, `numpy`. The bytes of torch's generators are
its own; those of the other two are JSON.
"""

from __future__ import annotations

import json
import random
from typing import Any

import numpy as np
import torch
import xxhash
from torch import Tensor

from ..errors import CheckpointError
from ..format.dtypes import in_use
from ..format.manifest import canonical
from ..format.values import decode, encode


def capture() -> dict[str, Tensor]:
    """The state of every generator of this process, as uint8 vectors. CUDA devices only where CUDA is in use."""
    states = {
        "torch": torch.get_rng_state(),
        "python": _to_bytes(random.getstate(), "random.getstate()"),
        "numpy": _to_bytes(np.random.get_state(legacy=False), "numpy.random.get_state()"),
    }
    if in_use("cuda"):
        states |= {f"cuda:{i}": state for i, state in enumerate(torch.cuda.get_rng_state_all())}
    return states


def restore(states: dict[str, Tensor]) -> None:
    """Set the generators named in `states`; a CUDA device that this process lacks is passed over."""
    for name, state in states.items():
        if name == "torch":
            torch.set_rng_state(state)
        elif name == "python":
            random.setstate(_from_bytes(state, name))
        elif name == "numpy":
            np.random.set_state(_from_bytes(state, name))
        elif int(name.removeprefix("cuda:")) < torch.cuda.device_count():
            torch.cuda.set_rng_state(state, name)


def check(states: dict[str, Tensor]) -> None:
    """Raise CheckpointError unless `restore` can set `states`. Changes nothing."""
    for name, state in states.items():
        try:
            if name == "torch":
                torch.Generator().set_state(state)
            elif name == "python":
                random.Random().setstate(_from_bytes(state, name))
            elif name == "numpy":
                np.random.RandomState().set_state(_from_bytes(state, name))
            elif not (name.startswith("cuda:") and name[5:].isdecimal()):
                raise CheckpointError(f"the random generator {name!r} is unknown")
        except (RuntimeError, TypeError, ValueError, KeyError) as error:
            raise CheckpointError(f"the state of the random generator {name!r} is malformed: {error}") from error


def fresh(save_id: str, rank: int) -> dict[str, Tensor]:
    """States for a rank that the saving job did not have, seeded by checkpoint and rank: the same every time."""
    seed = xxhash.xxh3_64_intdigest(f"{save_id}/{rank}".encode())
    states = {
        "torch": torch.Generator().manual_seed(seed).get_state(),
        "python": _to_bytes(random.Random(seed).getstate(), "random"),
        "numpy": _to_bytes(np.random.RandomState(seed % (1 << 32)).get_state(legacy=False), "numpy"),
    }
    if in_use("cuda"):
        for i in range(torch.cuda.device_count()):
            states[f"cuda:{i}"] = torch.Generator(f"cuda:{i}").manual_seed(seed).get_state()
    return states


def _to_bytes(state: Any, where: str) -> Tensor:
    return torch.frombuffer(bytearray(canonical(encode(state, where))), dtype=torch.uint8)


def _from_bytes(state: Tensor, where: str) -> Any:
    return decode(json.loads(state.numpy().tobytes()), where)
