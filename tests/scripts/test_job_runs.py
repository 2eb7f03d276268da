"""The job as a user starts it: processes, signals, kills, resumes. Two ranks with sharded states and gradients."""

from __future__ import annotations

import json
import os
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path

import pytest
from safetensors import safe_open

from fastopt import checkpoint

from .jobs import TINY, Job, events_in, losses_in, steps_in, write_text

STEPS = 120
PATIENCE = 150


@dataclass
class Place:
    """A folder in which jobs on the same text run."""

    folder: Path
    text: Path

    @property
    def metrics(self) -> Path:
        return self.folder / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def start(self, *flags: str, **options: object) -> Job:
        """The job that all tests of this module run, with further flags."""
        files = ["--data", str(self.text), "--metrics", str(self.metrics), "--checkpoint", str(self.checkpoints)]
        steps = ["--steps", str(STEPS), "--every", "20", "--plot", "", "--val-every", "60", "--unfreeze-at", "15"]
        return Job.start(self.folder, *TINY, *files, *steps, "--freeze-to", "1", *flags, **options)  # type: ignore[arg-type]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_text(tmp_path_factory.mktemp("job") / "text")


@pytest.fixture
def place(tmp_path: Path, text: Path) -> Place:
    return Place(tmp_path, text)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory, text: Path) -> Place:
    """A run on two ranks that nobody interrupted."""
    place = Place(tmp_path_factory.mktemp("undisturbed"), text)
    place.start(ranks=2).succeed(PATIENCE)
    return place


@pytest.fixture
def stopped(place: Place) -> Place:
    """A run on two ranks of which one rank got SIGTERM after some steps."""
    job = place.start(ranks=2)
    assert job.wait(PATIENCE, until=lambda: len(steps_in(place.metrics)) >= 30) is None, job.output
    os.kill(events_in(place.metrics, "start")[0]["pids"][1], signal.SIGTERM)
    output = job.succeed(PATIENCE)
    assert "go on with --resume" in output
    return place


def contents(place: Place) -> dict[str, list[bytes]]:
    """The bytes of weights and states in the last checkpoint: by key, the parts of a tensor in any order."""
    newest = checkpoint.latest(str(place.checkpoints))
    assert newest is not None
    assert newest.step == STEPS
    parts: dict[str, list[bytes]] = {}
    for path in place.checkpoints.glob(f"step-{STEPS:08d}/*.safetensors"):
        with safe_open(path, framework="np") as file:
            for key in file.keys():  # noqa: SIM118 (a safetensors file is no dict)
                parts.setdefault(key, []).append(file.get_tensor(key).tobytes())
    return {key: sorted(values) for key, values in parts.items() if not key.startswith("rng/")}


def assert_same_end(place: Place, undisturbed: Place) -> None:
    """Every loss and every byte of the last checkpoint is that of the undisturbed run."""
    assert losses_in(place.metrics) == losses_in(undisturbed.metrics)
    got, expected = contents(place), contents(undisturbed)
    assert got.keys() == expected.keys()
    assert [key for key in expected if got[key] != expected[key]] == []
    assert {"embed.weight", "state/sqr_avg/embed.weight"} <= got.keys()


def test_sigterm_saves_and_resuming_changes_nothing(stopped: Place, undisturbed: Place):
    newest = checkpoint.latest(str(stopped.checkpoints))
    assert newest is not None
    assert newest.step == max(steps_in(stopped.metrics)) < STEPS
    on_three = Place(stopped.folder / "three", stopped.text)
    shutil.copytree(stopped.checkpoints, on_three.checkpoints)
    shutil.copy(stopped.metrics, on_three.metrics)

    output = stopped.start("--resume", ranks=2).succeed(PATIENCE)
    assert f"resumed at step {newest.step} on 2 ranks" in output
    assert_same_end(stopped, undisturbed)

    on_three.start("--resume", ranks=3).succeed(PATIENCE)
    (resumed,) = events_in(on_three.metrics, "resume")
    assert (resumed["step"], resumed["world_size"]) == (newest.step, 3)
    assert losses_in(on_three.metrics) == pytest.approx(losses_in(undisturbed.metrics), rel=2e-3)
    last, expected = steps_in(on_three.metrics)[STEPS], steps_in(undisturbed.metrics)[STEPS]
    assert last["lr"] == expected["lr"]
    assert last["val_bpb"] == pytest.approx(expected["val_bpb"], rel=2e-3)


def test_torchrun_restarts_a_killed_rank(place: Place, undisturbed: Place):
    # The agent's shared store is the harder case: without the prefix of each attempt the ranks would not meet again.
    job = place.start("--resume", ranks=2, torchrun=("--max-restarts=1",), share_store=True)
    saved_and_on = lambda: len(steps_in(place.metrics)) >= 30  # noqa: E731
    assert job.wait(PATIENCE, until=saved_and_on) is None, job.output
    os.kill(events_in(place.metrics, "start")[0]["pids"][1], signal.SIGKILL)
    output = job.succeed(PATIENCE)
    assert "starting from step 0" in output
    (resumed,) = events_in(place.metrics, "resume")
    assert resumed["step"] % 20 == 0
    assert resumed["step"] > 0
    assert_same_end(place, undisturbed)


def test_one_process_draws_and_tells(place: Place, undisturbed: Place):
    job = place.start("--plot", str(place.folder / "curves.png"))
    output = job.succeed(PATIENCE)
    assert (place.folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert losses_in(place.metrics) == pytest.approx(losses_in(undisturbed.metrics), rel=2e-3)
    lines = steps_in(place.metrics)
    assert [step for step, line in lines.items() if line["val_bpb"] is not None] == [60, 120]
    assert lines[1]["frozen"] == [True, False, False]
    assert lines[16]["frozen"] == [False, False, False]
    (end,) = events_in(place.metrics, "end")
    assert end["val_bpb"] < end["baseline_bpb"]
    for said in ("bits per byte", "tokens/s", f"{end['parameters']:,} parameters", f"{end['state_bytes'][0]:,} bytes"):
        assert said in output
    assert len(list(place.checkpoints.iterdir())) == 3  # --keep


def test_a_run_keeps_away_from_the_checkpoints_of_another(undisturbed: Place, tmp_path: Path):
    before = undisturbed.metrics.read_bytes()
    for flags, words in (
        ([], "pass --resume"),
        (["--resume", "--width", "32"], "--width 32"),
        (["--resume", "--data", str(Path(json.__file__).parent)], "--data"),
    ):
        job = undisturbed.start(*flags)
        assert job.wait(PATIENCE) == 2, job.output
        assert words in job.output
        assert "Traceback" not in job.output
    assert undisturbed.metrics.read_bytes() == before


def test_longer_with_another_rate(undisturbed: Place, tmp_path: Path):
    longer = Place(tmp_path, undisturbed.text)
    shutil.copytree(undisturbed.checkpoints, longer.checkpoints)
    flags = ["--steps", str(2 * STEPS), "--lr", "0.01", "--schedule", "linear"]
    output = longer.start("--resume", *flags).succeed(PATIENCE)
    assert "with new --lr --schedule --steps" in output
    lines = steps_in(longer.metrics)
    assert sorted(lines) == list(range(STEPS + 1, 2 * STEPS + 1))
    # Warm-up 20: step STEPS + 1 is made with what is left of the linear fall from step 20 to 2 * STEPS.
    assert lines[STEPS + 1]["lr"] == pytest.approx([0.01 * (2 * STEPS - STEPS) / (2 * STEPS - 20)] * 3)
