"""In which order a step waits, lands gradients and runs, with everything around the pipeline replaced by notes."""

from __future__ import annotations

from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest

from fastopt.distributed.pipeline import Pipeline


class Notes:
    """A lane, gradients and a gathering that only note what is asked of them."""

    def __init__(self) -> None:
        self.made: list[str] = []
        self.stepped = False

    def __bool__(self) -> bool:
        return True

    @contextmanager
    def inside(self) -> Any:
        self.made.append("enter")
        yield
        self.made.append("leave")

    def join(self) -> None:
        self.made.append("join")

    def land(self, buckets: Any) -> None:
        self.made.append("land")

    def under_way(self, buckets: Any) -> bool:
        return False

    def synchronize(self) -> None:
        pass

    plan = begun = synchronize


@pytest.mark.parametrize("beside", [False, True], ids=["on the stream of the model", "in the lane"])
def test_a_step_runs_after_the_stream_has_waited_for_landed_gradients(beside: bool) -> None:
    """Landing averages in the lane, so a step elsewhere waits for the lane after it, not before."""
    notes: Any = Notes()
    buffers: Any = SimpleNamespace(gathering=lambda params: ())
    pipeline = Pipeline(notes, buffers, notes, notes, lambda params, part: notes.made.append("run"))
    pipeline.step([0, 1], separable=False, beside=beside)
    made = [note for note in notes.made if note != "join" or not beside]
    assert made == (["enter", "land", "run", "leave"] if beside else ["land", "join", "run"])
