"""The stream on which a sharded optimizer works, beside that of the model.

[Note: lane]
On a GPU all that a sharded optimizer does with reduced gradients (averaging, norms, the step, beginning gathers) is
queued on a stream of its own, its *lane*. So the model's next forward pass waits for nothing but the parameters that it
reads, and later buckets step and are gathered while the first layers run.

Memory stays with the stream that it was made for. Parts of gradients are made in the lane and are used there; what is
entered in the lane first waits for all that the model's stream has queued by then, so that memory which that stream
has read may be used again. Where the model's stream reads something of the lane, it waits for the lane (`join`).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class Lane:
    """A stream beside the current one; without a device everything happens where it is called.

    Streams are switched by PyTorch's inner functions, as this is done for every bucket: `torch.cuda.stream` takes ten
    times as long.

    Args:
        device: a CUDA device, or None.

    Attributes:
        stepped: whether a step has been queued that nobody has waited for.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._stream: Any = None
        self._outer: Any = None
        self._known: tuple[Any, Any] | None = None
        self.stepped = False
        if device is not None:
            self._index = torch.cuda.current_device() if device.index is None else device.index
            self._stream = torch.cuda.Stream(self._index, priority=-1)  # type: ignore[no-untyped-call]
            self._reached = torch.cuda.Event()  # type: ignore[no-untyped-call]

    @classmethod
    def beside(cls, params: Sequence[Tensor]) -> Lane:
        """The lane for parameters on one GPU; for others one that is none."""
        devices = {p.device for p in params}
        return cls(next(iter(devices)) if len(devices) == 1 and next(iter(devices)).type == "cuda" else None)

    def __bool__(self) -> bool:
        return self._stream is not None

    @contextmanager
    def inside(self) -> Iterator[None]:
        """Queue what is done inside in the lane, after all that the current stream has been given."""
        if self._stream is None or self._outer is not None:
            yield
            return
        outer = self._current()
        self._reached.record(outer)
        self._stream.wait_event(self._reached)
        self._outer = outer
        _switch(self._stream)
        try:
            yield
        finally:
            _switch(outer)
            self._outer = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Queue what is done inside where the lane was entered from."""
        if self._outer is None:
            yield
            return
        _switch(self._outer)
        try:
            yield
        finally:
            _switch(self._stream)

    def join(self) -> None:
        """Let the current stream wait for all that is in the lane."""
        if self._stream is not None and self._outer is None:
            self._current().wait_stream(self._stream)
            self.stepped = False

    def bring(self, tensor: Tensor) -> Tensor:
        """A tensor made in the lane, for the current stream."""
        if self._stream is not None and self._outer is None and tensor.is_cuda:
            self.join()
            tensor.record_stream(self._current())
        return tensor

    def _current(self) -> Any:
        """The current stream of the device."""
        told = torch._C._cuda_getCurrentStream(self._index)
        if self._known is None or self._known[0] != told:
            number, index, kind = told
            known: Any = torch.cuda.Stream
            self._known = told, known(stream_id=number, device_index=index, device_type=kind)
        return self._known[1]


def _switch(stream: Any) -> None:
    """Make `stream` the current one."""
    torch._C._cuda_setStream(
        stream_id=stream.stream_id, device_index=stream.device_index, device_type=stream.device_type
    )
