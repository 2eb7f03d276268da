"""The end of an iteration, bucket by bucket: what has stepped is on its way back while the rest steps.

[Note: chunks]
The buckets step in the order in which the next forward pass needs them, in *chunks* of 1, 2, 6, 18, ... buckets: the
first layers wait for one small piece of work, and all of it takes few launches. A bucket's gather begins as soon as
all chunks up to its own have been queued. While the first bucket is still being reduced, which is the last one that
backward makes gradients of, the second chunk steps before it.

Only a chain that steps every parameter by itself is cut into chunks. Norms of all parameters are one collective, and a
wrapped torch optimizer steps all at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from .communication.lane import Lane
from .gradients.local_gradients import Gradients
from .parameters.buckets import KEPT, Buffers
from .parameters.gathering import Gathering
from .wires.wire import Wire


@dataclass(frozen=True)
class Chunk:
    """What steps at once: parameters by their index in the layout, and the wires of their buckets."""

    params: tuple[int, ...]
    wires: tuple[Wire, ...]

    @property
    def buckets(self) -> frozenset[int]:
        """The numbers of the buckets."""
        return frozenset(wire.bucket.index for wire in self.wires)


class Pipeline:
    """Steps chunks and begins their gathers.

    Args:
        lane: where to queue it.
        run: runs the chain on parameters; its second argument tells the parts of a step apart.
    """

    def __init__(
        self,
        lane: Lane,
        buffers: Buffers,
        gradients: Gradients,
        gathering: Gathering,
        run: Callable[[Sequence[int], int], None],
    ) -> None:
        self._lane, self._buffers, self._gradients, self._gathering = lane, buffers, gradients, gathering
        self._run = run
        self._chunks: dict[tuple[tuple[int, ...], bool], list[Chunk]] = {}

    def step(self, params: Sequence[int], separable: bool, beside: bool) -> None:
        """Step `params` and begin to bring their buckets to all ranks. Collective.

        Args:
            params: by their index in the layout.
            separable: whether the chain may be cut into chunks.
            beside: whether to queue it in the lane.
        """
        self._gathering.synchronize()
        self._gathering.plan()
        if beside and self._lane:
            with self._lane.inside():
                self._step(params, separable)
            self._lane.stepped = True
        else:
            self._step(params, separable)
        self._gathering.begun()

    def _step(self, params: Sequence[int], separable: bool) -> None:
        chunks = self.chunks(params, separable)
        waiting = [wire for chunk in chunks for wire in chunk.wires]
        order = list(range(len(chunks)))
        if len(order) > 1 and self._gradients.under_way(chunks[0].buckets):
            order[:2] = 1, 0
        done: set[int] = set()
        for k in order:
            chunk = chunks[k]
            self._gradients.land(chunk.buckets)
            self._lane.join()  # gradients are averaged there; without effect where this step is in the lane itself
            self._run(chunk.params, k)
            done |= chunk.buckets
            while waiting and waiting[0].bucket.index in done:
                self._gathering.begin(waiting.pop(0))

    def chunks(self, params: Sequence[int], separable: bool) -> list[Chunk]:
        """The chunks of a step, kept for a few sets of parameters."""
        key = tuple(params), separable
        if key not in self._chunks:
            if len(self._chunks) >= KEPT:
                self._chunks.clear()
            self._chunks[key] = self._cut(params, separable)
        return self._chunks[key]

    def grown(self) -> None:
        """Forget chunks: there are other buckets now."""
        self._chunks.clear()

    def _cut(self, params: Sequence[int], separable: bool) -> list[Chunk]:
        wires = self._buffers.gathering(frozenset(params))
        if not separable or not wires:
            return [Chunk(tuple(params), wires)]
        bucket_of = {i: self._buffers.layout.place(i)[0].index for i in params}
        chunks = []
        at = 0
        while at < len(wires):
            some = wires[at : at + max(1, 2 * at)]
            buckets = {wire.bucket.index for wire in some}
            chunks.append(Chunk(tuple(i for i in params if bucket_of[i] in buckets), some))
            at += len(some)
        return chunks
