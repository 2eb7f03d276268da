"""The one error of the job that a user is meant to read."""

from __future__ import annotations


class JobError(Exception):
    """One sentence that says what is wrong and what to do. The job prints it without a traceback and exits with 2."""
