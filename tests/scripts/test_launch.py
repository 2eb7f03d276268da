"""What `scripts/launch.py` makes of the ways in which torchrun ends."""

from __future__ import annotations

import signal

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from scripts.launch import launch


def failed(code: int) -> ChildFailedError:
    return ChildFailedError("train.py", {1: ProcessFailure(local_rank=1, pid=1, exitcode=code, error_file="none")})


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (SignalException("stop", signal.SIGINT), 130),
        (SignalException("stop", signal.SIGTERM), 143),
        (KeyboardInterrupt(), 130),
        (failed(2), 2),
        (failed(-signal.SIGKILL), 137),
        (None, 0),
    ],
)
def test_every_end_is_an_exit_code(monkeypatch: pytest.MonkeyPatch, error: BaseException | None, code: int) -> None:
    def main() -> None:
        if error is not None:
            raise error

    monkeypatch.setattr("torch.distributed.run.main", main)
    assert launch() == code
