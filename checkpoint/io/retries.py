"""Trying again: which errors of a storage pass by themselves, and how long to wait for that.

The clients of object stores retry too, for some seconds (s3fs: five times, on top of the five of botocore). What is
here outlasts a longer trouble, is the same for every store, and knows the errors that those clients give up on at once.
"""

from __future__ import annotations

import errno
import random
import time
from collections.abc import Callable
from typing import TypeVar

from ..errors import CheckpointError, StorageError

T = TypeVar("T")

WAITS = (0.5, 1.0, 2.0, 4.0, 8.0, 16.0)
"""Seconds before each further attempt, at most; half of that at least, drawn at random so that ranks spread out."""

ENOUGH = 120.0
"""Seconds after which there is no further attempt: where nobody answers, each takes minutes of a client's time-outs."""

_STATUS = frozenset({408, 409, 425, 429, 500, 502, 503, 504})  # 409: two conditional writes at the same moment
_ERRNO = frozenset(
    {
        errno.EAGAIN,
        errno.EBUSY,
        errno.ETIMEDOUT,
        errno.EPIPE,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.ECONNRESET,
        errno.EHOSTUNREACH,
        errno.ENETDOWN,
        errno.ENETRESET,
        errno.ENETUNREACH,
        getattr(errno, "EREMOTEIO", errno.EBUSY),  # what s3fs makes of an InternalError
    }
)
_CODES = ("SlowDown", "Throttl", "InternalError", "RequestTimeout", "RequestLimitExceeded", "ServiceUnavailable")
# Exceptions of botocore and aiohttp that are no OSErrors, by name: neither library needs to be there.
_NAMES = frozenset(
    {
        "ClientPayloadError",
        "ConnectionClosedError",
        "ConnectTimeoutError",
        "EndpointConnectionError",
        "FSTimeoutError",
        "HTTPClientError",
        "IncompleteRead",
        "ReadTimeoutError",
        "ResponseParserError",
        "ResponseStreamingError",
        "ServerDisconnectedError",
    }
)


def transient(error: BaseException | None) -> bool:
    """Whether an error may pass by itself: no answer, a time-out, throttling, a failure on the server's side."""
    while error is not None:
        if isinstance(error, TimeoutError | ConnectionError) or type(error).__name__ in _NAMES:
            return True
        if isinstance(error, OSError) and error.errno in _ERRNO:
            return True
        status, code = _answer(error)
        if status in _STATUS or code.startswith(_CODES):
            return True
        error = error.__cause__
    return False


def _answer(error: BaseException) -> tuple[int, str]:
    """The HTTP status and the error code in an exception of a client library: 0 and nothing where there are none."""
    response = getattr(error, "response", None)
    if isinstance(response, dict):  # botocore
        status = response.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        return int(status or 0), str(response.get("Error", {}).get("Code", ""))
    for name in ("status", "status_code", "code"):  # aiohttp, Azure, Google
        value = getattr(error, name, None)
        if isinstance(value, int) or (isinstance(value, str) and value.isdigit()):
            return int(value), ""
    return 0, ""


def retry(where: str, call: Callable[[], T]) -> T:
    """The result of `call`, tried again while it fails with what may pass.

    FileExistsError, FileNotFoundError and CheckpointError are raised as they are, anything else as a StorageError that
    names `where`.
    """
    started = time.monotonic()
    for attempt in range(len(WAITS) + 1):
        try:
            return call()
        except (FileExistsError, FileNotFoundError, CheckpointError):
            raise
        except Exception as error:
            if not transient(error):
                raise StorageError(f"{where}: {_text(error)}") from error
            if attempt == len(WAITS) or time.monotonic() - started > ENOUGH:
                raise StorageError(f"{where}: {_text(error)} (the last of {attempt + 1} attempts)") from error
        time.sleep(WAITS[attempt] * random.uniform(0.5, 1))
    raise AssertionError("unreachable")


def _text(error: Exception) -> str:
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
