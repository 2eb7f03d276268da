"""Which blocks of a checkpoint have been read and compared with their checksums."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..contents.plan import Read
from ..format.records import Manifest


class Coverage:
    """The blocks of all files of `manifest`, each seen or not. Sixty-five thousand blocks are 8 KiB of `bits`."""

    def __init__(self, manifest: Manifest) -> None:
        self._block = manifest.block
        self._headers = [file.header for file in manifest.files]
        blocks = [len(file.blocks) // 16 for file in manifest.files]
        self._first = np.concatenate([[0], np.cumsum(blocks, dtype=np.int64)])
        self._seen = np.zeros(int(self._first[-1]), dtype=np.bool_)

    def add(self, reads: Sequence[Read]) -> None:
        """Everything that these requests read has been seen."""
        for read in reads:
            first, header = int(self._first[read.file]), self._headers[read.file]
            start, stop = (read.start - header) // self._block, -(-(read.stop - header) // self._block)
            self._seen[first + start : first + stop] = True

    @property
    def bits(self) -> bytes:
        """What has been seen, to be sent to another process."""
        return np.packbits(self._seen).tobytes()

    def whole(self, others: Sequence[bytes]) -> bool:
        """Whether the `bits` of several processes are all of it, together."""
        together = np.zeros(-(-len(self._seen) // 8), dtype=np.uint8)
        for bits in others:
            together |= np.frombuffer(bits, dtype=np.uint8)
        return bool(np.unpackbits(together, count=len(self._seen)).all())
