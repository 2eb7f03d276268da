"""The exceptions of this part."""

from __future__ import annotations


class CheckpointError(RuntimeError):
    """A checkpoint cannot be written, found or read. The text names the file, tensor or rank, and the reason.

    Where several processes save or load together, all of them raise it, whichever of them met the problem.
    """


class StorageError(CheckpointError):
    """A storage could not be reached or refused a request. It says nothing about the checkpoints that lie there.

    So nobody goes on with an older checkpoint because of it: a network that is down for a minute would cost hours.
    """


class NewerFormat(CheckpointError):
    """A checkpoint in a version of the format that this version of fastopt cannot read: not damaged, only newer."""
