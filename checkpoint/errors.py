"""The one exception of this part."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or read. The text names the file, tensor or rank, and the reason.

    Where several processes save or load together, all of them raise it, whichever of them met the problem.
    """
