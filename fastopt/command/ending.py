"""How a command ends that others have ended: by Ctrl-C, or because nobody reads what it prints any more.

The exit codes are those that shells know, 128 and the number of the signal: 0, 1 and 2 have meanings of their own.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Iterator

import click

INTERRUPTED = 128 + signal.SIGINT
UNREAD = 128 + signal.SIGPIPE


@contextlib.contextmanager
def ended_by_others() -> Iterator[None]:
    """Ctrl-C becomes a word on stderr and INTERRUPTED, a reader that has gone away (`| head`) UNREAD without a word."""
    try:
        try:
            yield
        finally:
            _flush()
    except (KeyboardInterrupt, click.Abort):
        print("\ninterrupted", file=sys.stderr)
        sys.exit(INTERRUPTED)
    except BrokenPipeError:
        sys.exit(UNREAD)


def _flush() -> None:
    """Write what is printed now rather than when the interpreter ends, which is too late to say anything about it."""
    try:
        sys.stdout.flush()
    except OSError:
        with contextlib.suppress(OSError, ValueError):  # no file: a stream of a test
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for what is still in the buffer
        raise
