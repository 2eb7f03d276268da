"""Which errors are worth another attempt, and what is raised in the end."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import Any

import pytest

from fastopt.checkpoint import CheckpointError
from fastopt.checkpoint.errors import StorageError
from fastopt.checkpoint.io.retries import WAITS, retry, transient


def with_fields(error: Exception, **fields: Any) -> Exception:
    """`error` with attributes, as the exceptions of client libraries have them."""
    for name, value in fields.items():
        setattr(error, name, value)
    return error


def caused(error: Exception, cause: Exception) -> Exception:
    """`error` raised from `cause`."""
    error.__cause__ = cause
    return error


def answer(status: int, code: str) -> dict[str, Any]:
    """The response in an exception of botocore."""
    return {"ResponseMetadata": {"HTTPStatusCode": status}, "Error": {"Code": code}}


class ServerDisconnectedError(Exception):
    """As in aiohttp."""


@pytest.mark.parametrize(
    "error",
    [
        TimeoutError(),
        ConnectionResetError(),
        OSError(errno.EBUSY, "Please reduce your request rate."),
        OSError(errno.EREMOTEIO, "We encountered an internal error."),
        with_fields(Exception(), status=503),
        with_fields(Exception(), code=429),
        with_fields(Exception(), code="502"),
        with_fields(Exception(), status_code=500),
        with_fields(Exception(), response=answer(400, "ThrottlingException")),
        with_fields(Exception(), response=answer(409, "ConditionalRequestConflict")),
        caused(OSError(errno.EIO, "?"), with_fields(Exception(), response=answer(500, "InternalError"))),
        ServerDisconnectedError(),
    ],
)
def test_what_may_pass_is_tried_again(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    slept: list[float] = []
    monkeypatch.setattr("time.sleep", slept.append)
    assert transient(error)
    assert retry("there", failing(error, 3)) == "done"
    assert len(slept) == 3
    assert all(wait / 2 <= time <= wait for wait, time in zip(WAITS, slept, strict=False))
    slept.clear()
    with pytest.raises(StorageError, match=r"there: .*\(the last of 7 attempts\)") as caught:
        retry("there", failing(error, 100))
    assert caught.value.__cause__ is error
    assert len(slept) == len(WAITS)


def test_a_storage_that_never_answers_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each attempt may be minutes of time-outs, and all other ranks wait for this one."""
    now, called = [0.0], []

    def never() -> None:
        called.append(now[0])
        now[0] += 80.0
        raise TimeoutError

    monkeypatch.setattr("time.monotonic", lambda: now[0])
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    with pytest.raises(StorageError, match=r"there: TimeoutError \(the last of 2 attempts\)"):
        retry("there", never)
    assert called == [0.0, 80.0]


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (PermissionError(errno.EACCES, "Access Denied"), StorageError),
        (OSError(errno.ENOSPC, "No space left on device"), StorageError),
        (with_fields(Exception(), response=answer(403, "AccessDenied")), StorageError),
        (with_fields(Exception(), code="NoSuchKey"), StorageError),
        (ValueError("a mistake"), StorageError),
        (FileExistsError(), FileExistsError),
        (FileNotFoundError(), FileNotFoundError),
        (CheckpointError("damaged"), CheckpointError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ],
)
def test_what_will_not_pass_is_raised_at_once(error: BaseException, raised: type[BaseException]) -> None:
    attempts = failing(error, 1)
    with pytest.raises(raised):
        retry("there", attempts)
    assert attempts() == "done"


def failing(error: BaseException, times: int) -> Callable[[], str]:
    """Raises `error` so many times, then returns."""
    left = [error] * times

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    return call
