"""Python values as JSON and back, exactly, without pickle.

JSON has no tuples, no infinities, no tensors and only string keys; schedulers and hyper-parameters use all of them.
What JSON lacks is written as `{"$": kind, "v": ...}`:

    float   "nan", "inf" or "-inf"              complex  [real, imag]
    tuple   list of items                       set      list of items
    dict    list of [key, value] (any keys)     bytes    base64
    counter the same for a collections.Counter
    tensor  base64 of the little-endian data, with "dtype" and "shape"
    array   the same for a numpy array
"""

from __future__ import annotations

import base64
import binascii
import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import CheckpointError
from .dtypes import byte_view, dtype_name, dtype_of

Json = Any
_LARGEST_TENSOR = 1 << 16  # bytes; a larger tensor belongs in a data file
_DEEPEST = 64
_LONGEST_INT = 4096  # bits; Python itself refuses to read a number of more than 4300 digits
_SPECIAL = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}


def encode(value: Any, where: str, depth: int = 0) -> Json:
    """`value` as JSON. `where` names it in errors, as in `scheduler.milestones`.

    Raises CheckpointError for what cannot be written without pickle (functions, objects, large tensors).
    """
    if depth > _DEEPEST:
        raise CheckpointError(f"{where} is nested more than {_DEEPEST} deep")
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, int):
        return int(value)
    if isinstance(value, float):
        return float(value) if math.isfinite(value) else {"$": "float", "v": str(float(value))}
    if isinstance(value, complex):
        return {"$": "complex", "v": [encode(part, where) for part in (value.real, value.imag)]}
    if isinstance(value, bytes):
        return {"$": "bytes", "v": base64.b64encode(value).decode()}
    if isinstance(value, Tensor):
        return _encode_tensor(value, where)
    if isinstance(value, np.ndarray):
        return _encode_array(value, where)
    if isinstance(value, Mapping):
        return _encode_mapping(value, where, depth)
    if isinstance(value, list | tuple | set | frozenset):
        one = _encode_hashed if isinstance(value, set | frozenset) else encode
        items = [one(item, f"{where}[{i}]", depth + 1) for i, item in enumerate(value)]
        if isinstance(value, list):
            return items
        return {"$": "tuple" if isinstance(value, tuple) else "set", "v": items}
    raise CheckpointError(
        f"{where} is a {type(value).__name__}, which cannot be saved without pickle; keep numbers, strings, lists, "
        f"tuples, dicts or small tensors there"
    )


def _encode_mapping(value: Mapping[Any, Any], where: str, depth: int) -> Json:
    if all(type(key) is str for key in value) and "$" not in value and not isinstance(value, Counter):
        return {key: encode(item, f"{where}.{key}", depth + 1) for key, item in value.items()}
    pairs = [
        [_encode_hashed(key, f"a key of {where}", depth + 1), encode(item, f"{where}[{key!r}]", depth + 1)]
        for key, item in value.items()
    ]
    return {"$": "counter" if isinstance(value, Counter) else "dict", "v": pairs}


def _encode_hashed(value: Any, where: str, depth: int) -> Json:
    """A key, or a member of a set; CheckpointError for what would come back as something that can be neither."""
    encoded = encode(value, where, depth)
    try:
        hash(decode(encoded, where))
    except TypeError:
        raise CheckpointError(f"{where} is {value!r}, which cannot be saved there: sets come back as sets") from None
    return encoded


def _encode_tensor(value: Tensor, where: str) -> Json:
    if value.layout is not torch.strided or value.is_meta or value.is_quantized:
        raise CheckpointError(f"{where} is a tensor without plain data ({value.layout}, {value.device})")
    if value.nbytes > _LARGEST_TENSOR:
        raise CheckpointError(f"{where} is a tensor of {value.nbytes} bytes; values hold at most {_LARGEST_TENSOR}")
    name = dtype_name(value.dtype, where)
    return {
        "$": "tensor",
        "dtype": name,
        "shape": list(value.shape),
        "v": base64.b64encode(byte_view(value)).decode(),
    }


def _encode_array(value: np.ndarray[Any, Any], where: str) -> Json:
    if value.dtype.kind not in "biufc" or value.nbytes > _LARGEST_TENSOR:
        raise CheckpointError(f"{where} is a numpy array of {value.dtype}, {value.nbytes} bytes, and cannot be saved")
    data = np.ascontiguousarray(value.astype(value.dtype.newbyteorder("<")))
    return {
        "$": "array",
        "dtype": data.dtype.str,
        "shape": list(value.shape),
        "v": base64.b64encode(data.tobytes()).decode(),
    }


def decode(value: Json, where: str) -> Any:
    """What `encode` was given. Raises CheckpointError where `value` is nothing that `encode` makes."""
    if isinstance(value, list):
        return [decode(item, f"{where}[{i}]") for i, item in enumerate(value)]
    if not isinstance(value, dict):
        return value
    if "$" not in value:
        return {key: decode(item, f"{where}.{key}") for key, item in value.items()}
    kind, content = value["$"], value.get("v")
    if kind == "float" and isinstance(content, str) and content in _SPECIAL:
        return _SPECIAL[content]
    if kind == "complex" and isinstance(content, list) and len(content) == 2:
        real, imag = (decode(part, where) for part in content)
        if isinstance(real, float) and isinstance(imag, float):
            return complex(real, imag)
    if kind == "bytes":
        return _raw(content, where)
    if kind in ("tensor", "array"):
        return _decode_data(value, where)
    if kind == "tuple" and isinstance(content, list):
        return tuple(decode(content, where))
    if kind in ("set", "dict", "counter") and isinstance(content, list):
        return _decode_hashed(kind, content, where)
    raise CheckpointError(f"{where} holds a value of unknown form {kind!r}")


def _decode_hashed(kind: str, content: list[Json], where: str) -> Any:
    items = decode(content, where)
    try:
        if kind == "set":
            return set(items)
        pairs = {key: item for key, item in items}
        return Counter(pairs) if kind == "counter" else pairs
    except (TypeError, ValueError) as error:
        raise CheckpointError(f"{where} holds a malformed {kind}: {error}") from None


def _raw(content: Json, where: str) -> bytes:
    if not isinstance(content, str):
        raise CheckpointError(f"{where} holds malformed bytes")
    try:
        return base64.b64decode(content, validate=True)
    except (binascii.Error, ValueError):
        raise CheckpointError(f"{where} holds malformed base64") from None


def _decode_data(value: dict[str, Json], where: str) -> Any:
    shape, raw = value.get("shape"), _raw(value.get("v"), where)
    if not isinstance(shape, list) or not all(type(n) is int and n >= 0 for n in shape):
        raise CheckpointError(f"{where} holds a {value['$']} with the malformed shape {shape!r}")
    if value["$"] == "tensor":
        dtype = dtype_of(value.get("dtype"), where)
        size = dtype.itemsize
    else:
        np_dtype = _array_dtype(value.get("dtype"), where)
        size = np_dtype.itemsize
    if math.prod(shape) * size != len(raw) or len(raw) > _LARGEST_TENSOR:
        raise CheckpointError(f"{where} holds {len(raw)} bytes for a {value['$']} of shape {shape}")
    if value["$"] == "array":
        return np.frombuffer(raw, dtype=np_dtype).reshape(shape).copy()
    if not raw:
        return torch.empty(shape, dtype=dtype, device="cpu")
    return torch.frombuffer(bytearray(raw), dtype=dtype).reshape(shape)


def _array_dtype(name: Json, where: str) -> np.dtype[Any]:
    known = {f"<{kind}{size}" for kind in "iuf" for size in (2, 4, 8)} | {"|b1", "|i1", "|u1", "<c8", "<c16"}
    if name not in known:
        raise CheckpointError(f"{where} holds an array of the unknown dtype {name!r}")
    return np.dtype(name)


def check_json(value: Any, where: str, depth: int = 0) -> None:
    """Raise CheckpointError, naming the key path, unless `value` comes back from JSON equal and of the same types."""
    if depth > _DEEPEST:
        raise CheckpointError(f"{where} is nested more than {_DEEPEST} deep")
    if type(value) is int and value.bit_length() > _LONGEST_INT:
        raise CheckpointError(f"{where} is a number of {value.bit_length()} bits, more than the {_LONGEST_INT} allowed")
    if value is None or type(value) in (bool, str, int):
        return
    if type(value) is float:
        if not math.isfinite(value):
            raise CheckpointError(f"{where} is {value}, which JSON cannot hold; save a string or None instead")
        return
    if type(value) is list:
        for i, item in enumerate(value):
            check_json(item, f"{where}[{i}]", depth + 1)
        return
    if type(value) is dict:
        for key, item in value.items():
            if type(key) is not str:
                raise CheckpointError(f"{where} has the key {key!r}; keys in JSON are strings")
            check_json(item, f"{where}.{key}", depth + 1)
        return
    raise CheckpointError(
        f"{where} is a {type(value).__name__}; extra holds JSON only (str, int, float, bool, None, list, dict)"
    )
