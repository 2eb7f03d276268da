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

import torch
from torch import Tensor


class Lane:
    """A stream beside the current one; without a device everything happens where it is called.

    Args:
        device: a CUDA device, or None.

    Attributes:
        stepped: whether a step has been queued that nobody has waited for.
    """

    def __init__(self, device: torch.device | None) -> None:
        self._stream = None if device is None else torch.cuda.Stream(device, priority=-1)  # type: ignore[no-untyped-call]
        self._outer: torch.cuda.Stream | None = None
        self.stepped = False

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
        self._outer = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(self._outer)
        try:
            with torch.cuda.stream(self._stream):
                yield
        finally:
            self._outer = None

    @contextmanager
    def outside(self) -> Iterator[None]:
        """Queue what is done inside where the lane was entered from."""
        if self._outer is None:
            yield
            return
        with torch.cuda.stream(self._outer):
            yield

    def join(self) -> None:
        """Let the current stream wait for all that is in the lane."""
        if self._stream is not None and self._outer is None:
            torch.cuda.current_stream(self._stream.device).wait_stream(self._stream)
            self.stepped = False

    def bring(self, tensor: Tensor) -> Tensor:
        """A tensor made in the lane, for the current stream."""
        if self._stream is not None and self._outer is None and tensor.is_cuda:
            self.join()
            tensor.record_stream(torch.cuda.current_stream(tensor.device))
        return tensor
