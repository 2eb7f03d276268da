"""The tables that tell the kernels where the tensors of a cohort lie, kept on the device from step to step.

A table is built anew from the tensors of every step and compared with the one before; what has changed is copied from
pinned memory without waiting for the device. The tables themselves stay where they are as long as their shape does, so
that a CUDA graph that has captured a step goes on reading them.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from .triton_source import BLOCK, Layout


class _Staging:
    """Pinned memory that arrays of one shape go through on their way to the device, used again and again.

    It has two halves. What is left behind in one is queued for copying when the other is entered, so one event per half
    tells whether the device has read it.
    """

    def __init__(self, like: NDArray[Any]) -> None:
        self._half = max(2, min(32, _STAGING // max(like.nbytes, 1)))
        memory = torch.empty((2 * self._half, *like.shape), dtype=torch.from_numpy(like).dtype, pin_memory=True)
        self._slots = list(memory.unbind())
        self._arrays = [slot.numpy() for slot in self._slots]
        self._read: list[Any] = [None, None]  # the event of each half
        self._next = 0

    def take(self, array: NDArray[Any]) -> Tensor | None:
        """A pinned copy of `array`, None where the device has not read yet what lies there."""
        half, place = divmod(self._next, self._half)
        if place == 0:
            left: Any = torch.cuda.Event()  # type: ignore[no-untyped-call]
            left.record()
            self._read[1 - half] = left
            entered = self._read[half]
            if entered is not None and not entered.query():
                return None
        self._arrays[self._next][...] = array
        source = self._slots[self._next]
        self._next = (self._next + 1) % len(self._slots)
        return source


#: Bytes of pinned memory for one half of a staging area, at least two arrays.
_STAGING = 1 << 18


class Table:
    """An array on the host with its copy on the device."""

    def __init__(self, device: torch.device, in_graph: bool = True) -> None:
        self.device, self.in_graph = device, in_graph
        self.on_device: Tensor | None = None
        self._host: NDArray[Any] | None = None
        self._captured: list[Tensor] = []
        self._staging: _Staging | None = None

    def put(self, array: NDArray[Any]) -> Tensor:
        """The table on the device, with these contents for whatever is queued from now on.

        While a CUDA graph is captured a table that is not `in_graph` keeps its contents: its values are brought before
        each replay. Any other is filled inside the graph, from memory that lives as long as the table.
        """
        capturing = self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()
        same_shape = self._host is not None and self._host.shape == array.shape and self._host.dtype == array.dtype
        if same_shape and _same_bytes(self._host, array):  # type: ignore[arg-type]
            return self._ready()
        if capturing and not self.in_graph and same_shape:
            return self._ready()
        source = self._source(array, same_shape, capturing)
        if not same_shape or self.on_device is None:
            self.on_device = torch.empty_like(source, device=self.device)
        self.on_device.copy_(source, non_blocking=True)
        if capturing:
            self._captured.append(source)
        self._host = array
        return self.on_device

    def _source(self, array: NDArray[Any], again: bool, capturing: bool) -> Tensor:
        """`array` as a tensor that is not written to before the device has read it."""
        if self.device.type != "cuda":
            return torch.from_numpy(array)
        if capturing or not again:
            self._staging = None
            return torch.from_numpy(array).pin_memory()
        staged = self._staging.take(array) if self._staging is not None else None
        if staged is None:  # torch keeps the memory of the old one until the device has read it
            self._staging = _Staging(array)
            staged = self._staging.take(array)
        assert staged is not None
        return staged

    def _ready(self) -> Tensor:
        assert self.on_device is not None
        return self.on_device


def _same_bytes(a: NDArray[Any], b: NDArray[Any]) -> bool:
    """Whether two arrays of one shape and dtype are equal to the bit."""
    if a.nbytes <= 1 << 16:
        return a.tobytes() == b.tobytes()
    return np.array_equal(a.view(np.uint8), b.view(np.uint8))


TABLES = ("addresses", "sizes", "rows", "scalars", "first_chunk", "chunk_tensor", "chunk_number")


class Tables:
    """All tables of the tensors that one program steps on one device. `version` counts how often they were placed."""

    def __init__(self, layout: Layout, device: torch.device) -> None:
        self.layout, self.device = layout, device
        self.addresses = Table(device)
        self.sizes = Table(device)
        self.rows = Table(device)
        self.scalars = Table(device, in_graph=False)
        self.first_chunk = Table(device)
        self.chunk_tensor = Table(device)
        self.chunk_number = Table(device)
        self.version = 0
        self.n_chunks = 0
        self._sizes: NDArray[np.int64] | None = None
        self._work: dict[str, Tensor] = {}

    def place(self, addresses: NDArray[np.int64], sizes: NDArray[np.int64], rows: NDArray[np.int32]) -> None:
        """Set where the tensors lie `[n_places, n_tensors]`, their elements `[n_tensors]` and rows `[n_tensors]`."""
        self.version += 1
        self.addresses.put(addresses)
        self.rows.put(rows)
        if self._sizes is not None and np.array_equal(sizes, self._sizes):
            return
        chunks = -(-sizes // BLOCK)
        first = np.zeros(len(sizes) + 1, np.int32)
        first[1:] = np.cumsum(chunks)
        tensor = np.repeat(np.arange(len(sizes), dtype=np.int32), chunks)
        number = np.arange(len(tensor), dtype=np.int32) - first[tensor]
        self.n_chunks = len(tensor)
        for table, array in (
            (self.sizes, sizes),
            (self.first_chunk, first),
            (self.chunk_tensor, tensor),
            (self.chunk_number, number),
        ):
            table.put(array)
        self._sizes = sizes

    def set_scalars(self, scalars: NDArray[np.float64]) -> None:
        """Set the scalars `[n_slots, n_rows]`."""
        dtype = np.float64 if self.layout.double else np.float32
        self.scalars.put(np.array(scalars, dtype, order="C") if scalars.size else np.zeros((1, 1), dtype))

    def on_device(self, *names: str) -> list[Tensor | None]:
        """The tables of these names as they lie on the device."""
        return [getattr(self, name).on_device for name in names]

    def scratch(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Memory for intermediate results, kept from step to step."""
        kept = self._work.get(name)
        if kept is None or kept.shape != shape or kept.dtype != dtype:
            kept = self._work[name] = torch.empty(shape, dtype=dtype, device=self.device)
        return kept
