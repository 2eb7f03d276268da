"""Python values through JSON and back."""

from __future__ import annotations

import json
import math
from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fastopt.checkpoint import CheckpointError
from fastopt.checkpoint.format.values import check_json, decode, encode

leaves = (
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.binary(max_size=20) | st.complex_numbers()
)
keys = st.text() | st.integers() | st.booleans() | st.tuples(st.integers(), st.text())
values = st.recursive(
    leaves,
    lambda inner: st.lists(inner) | st.lists(inner).map(tuple) | st.dictionaries(keys, inner),
    max_leaves=20,
)


def same(a: Any, b: Any) -> bool:
    """Equal, of the same types throughout, NaN being equal to NaN and 0.0 not to -0.0."""
    if type(a) is not type(b):
        return False
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(map(same, a, b))
    if isinstance(a, dict):
        return same(list(a), list(b)) and same(list(a.values()), list(b.values()))
    if isinstance(a, complex):
        return same([a.real, a.imag], [b.real, b.imag])
    if isinstance(a, float):
        return (math.isnan(a) and math.isnan(b)) or (a == b and math.copysign(1, a) == math.copysign(1, b))
    return bool(a == b)


def through_json(value: Any) -> Any:
    """Encoded, written, read, decoded."""
    text = json.dumps(encode(value, "x"), allow_nan=False)
    return decode(json.loads(text), "x")


@given(values)
def test_values_come_back_the_same(value: Any) -> None:
    assert same(through_json(value), value)


def test_subclasses_come_back_as_what_they_are_read_as() -> None:
    assert same(through_json(OrderedDict(b=1, a=2)), {"b": 1, "a": 2})
    counter = through_json(Counter({30: 2, 60: 1}))
    assert sorted(counter.elements()) == [30, 30, 60]
    assert same(through_json(np.float32(0.5)), 0.5)
    assert same(through_json(torch.Size([2, 3])), (2, 3))
    assert through_json({1, 2}) == {1, 2}


@pytest.mark.parametrize(
    "tensor",
    [
        torch.tensor(0.1),
        torch.tensor(3, dtype=torch.int64),
        torch.tensor(True),
        torch.tensor([[1.5, float("nan")], [float("inf"), -0.0]], dtype=torch.bfloat16),
        torch.empty(0, 3),
        torch.arange(6.0).reshape(2, 3).T,
        torch.tensor([1 + 2j], dtype=torch.complex64),
    ],
)
def test_small_tensors_come_back(tensor: torch.Tensor) -> None:
    back = through_json(tensor)
    assert back.dtype is tensor.dtype
    assert back.shape == tensor.shape
    assert back.reshape(-1).view(torch.uint8).tolist() == tensor.reshape(-1).view(torch.uint8).tolist()


def test_numpy_arrays_come_back() -> None:
    for array in (np.arange(5, dtype=np.uint32), np.array(2.5), np.zeros((0, 2), np.int8), np.arange(4, dtype=">i4")):
        back = through_json(array)
        assert back.tolist() == array.tolist()
        assert back.dtype == array.dtype.newbyteorder("<")


@pytest.mark.parametrize(
    ("value", "path"),
    [
        ({"a": [1, {"b": print}]}, r"x\.a\[1\]\.b is a builtin_function"),
        ({"t": torch.zeros(100_000)}, r"x\.t is a tensor of 400000 bytes"),
        ({3: object()}, r"x\[3\] is a object"),
        (np.array(["text"]), "numpy array"),
        (torch.zeros(2, dtype=torch.complex128), "complex128"),
        (torch.zeros(2, device="meta"), "without plain data"),
    ],
)
def test_what_needs_pickle_is_refused_by_name(value: Any, path: str) -> None:
    with pytest.raises(CheckpointError, match=path):
        encode(value, "x")


def test_a_cycle_is_an_error() -> None:
    ring: list[Any] = []
    ring.append(ring)
    with pytest.raises(CheckpointError, match="nested"):
        encode(ring, "x")
    with pytest.raises(CheckpointError, match="nested"):
        check_json(ring, "x")


fields = st.sampled_from(["$", "v", "dtype", "shape", "a"])
forms = ["float", "tuple", "dict", "set", "counter", "tensor", "array", "bytes", "complex", "F32", "<f4"]
look_alikes = st.recursive(
    leaves | st.sampled_from(forms),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(fields, inner, max_size=4),
)


@given(look_alikes)
def test_decoding_anything_gives_a_value_or_a_checkpoint_error(value: Any) -> None:
    try:
        tree = json.loads(json.dumps(value, default=str))
    except TypeError:
        return
    try:
        decode(tree, "x")
    except CheckpointError:
        return


def test_a_claim_of_a_huge_tensor_is_refused_before_it_is_made() -> None:
    for kind, dtype in (("tensor", "F32"), ("array", "<f4")):
        with pytest.raises(CheckpointError, match="0 bytes for a"):
            decode({"$": kind, "dtype": dtype, "shape": [1 << 40], "v": ""}, "x")


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"a": {"b": (1, 2)}}, r"extra\.a\.b is a tuple"),
        ({"a": [0, float("nan")]}, r"extra\.a\[1\] is nan"),
        ({1: 2}, "extra has the key 1"),
        (torch.tensor(1), "extra is a Tensor"),
        (np.float64(1.0), "extra is a float64"),
    ],
)
def test_what_is_not_json_is_named(value: Any, message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        check_json(value, "extra")


def test_json_passes() -> None:
    check_json({"a": [1, 2.5, None, True, "é", {}], "$": []}, "extra")
