"""The element types that safetensors files know, and the bytes of a tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..errors import CheckpointError

DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E4M3FNUZ": torch.float8_e4m3fnuz,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E5M2FNUZ": torch.float8_e5m2fnuz,
    "C64": torch.complex64,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


def in_use(device: str) -> bool:
    """Whether this process uses an accelerator of the kind `device`; asking does not start it."""
    module: Any = getattr(torch, device, None)
    return module is not None and bool(module.is_available()) and bool(module.is_initialized())


def dtype_name(dtype: torch.dtype, where: str) -> str:
    """The safetensors name of `dtype`; CheckpointError, naming `where`, for a dtype that the format lacks."""
    if dtype not in _NAMES:
        raise CheckpointError(f"{where} has dtype {dtype}, which safetensors files cannot hold")
    return _NAMES[dtype]


def dtype_of(name: Any, where: str) -> torch.dtype:
    """The torch dtype of a safetensors name; CheckpointError for anything else."""
    if not isinstance(name, str) or name not in DTYPES:
        raise CheckpointError(f"{where} has the unknown dtype {name!r}")
    return DTYPES[name]


def byte_view(tensor: Tensor) -> memoryview:
    """The bytes of `tensor` in row-major order: a view where it is contiguous and on the CPU, a copy otherwise."""
    plain = tensor.detach().resolve_conj().resolve_neg().cpu().contiguous()
    return memory(plain)


def memory(buffer: Tensor) -> memoryview:
    """The memory of a contiguous CPU tensor, as bytes that can be read and written."""
    array: Any = buffer.detach().reshape(-1).view(torch.uint8).numpy()
    return memoryview(array)
