"""The small parts: the model, the metrics file, the curves."""

from __future__ import annotations

import math
import sys
from pathlib import Path

import pytest
import torch

from fastopt.checkpoint import save
from scripts.job.config import parse
from scripts.job.errors import JobError
from scripts.job.metrics import MetricsFile, read_metrics, steps_of
from scripts.job.model import GPT, rotate
from scripts.job.plot import draw_curves
from scripts.job.ranks import Ranks
from scripts.job.saving import Checkpoints


@pytest.fixture
def model() -> GPT:
    torch.manual_seed(0)
    return GPT(layers=2, width=32, heads=2)


def test_layer_groups_hold_every_parameter_once(model: GPT):
    groups = model.layer_groups()
    names = [name for group in groups for name, _ in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert len(groups) == 4
    assert names[0] == "embed.weight"
    assert [name for name, _ in groups[-1]] == ["norm.weight", "head.weight"]


def test_a_byte_is_predicted_from_those_before_it(model: GPT):
    rows = torch.randint(0, 256, (3, 10))
    changed = rows.clone()
    changed[:, 6] = (changed[:, 6] + 1) % 256
    before, after = model.logits(rows), model.logits(changed)
    torch.testing.assert_close(after[:, :6], before[:, :6])
    assert not torch.allclose(after[:, 6:], before[:, 6:])


def test_the_loss_is_the_sum_over_all_bytes_but_the_first(model: GPT):
    rows = torch.randint(0, 256, (3, 10))
    probabilities = model.logits(rows[:, :-1]).detach().double().softmax(-1)
    expected = -sum(float(probabilities[r, t, rows[r, t + 1]].log()) for r in range(3) for t in range(9))
    assert float(model(rows).detach()) == pytest.approx(expected, rel=1e-5)


def test_a_new_model_knows_nothing(model: GPT):
    rows = torch.randint(0, 256, (8, 33))
    assert float(model(rows).detach()) / (8 * 32) == pytest.approx(math.log(256), rel=0.02)


def test_rotary_products_depend_on_the_distance_only():
    q, k = torch.randn(8, dtype=torch.float64), torch.randn(8, dtype=torch.float64)
    at = lambda x: rotate(x.expand(6, 8))  # noqa: E731 (the same vector at six positions)
    products = at(q) @ at(k).T
    torch.testing.assert_close(products.diagonal(1), products.diagonal(1)[:1].expand(5), rtol=1e-5, atol=1e-6)
    assert float(products[0, 0]) == pytest.approx(float(q @ k))


def test_metrics_of_the_newest_run_with_the_later_of_two_lines_per_step(tmp_path: Path):
    path = tmp_path / "new/metrics.jsonl"
    first = MetricsFile(str(path))
    first.write(event="start", step=0)
    first.write(step=1, loss=9.0)
    second = MetricsFile(str(path))
    second.write(event="start", step=0)
    for loss in (5.0, 4.0):
        second.write(step=2, loss=loss)
    second.write(step=1, loss=6.0)
    with path.open("a") as file:
        file.write('{"step": 3, "lo')
    lines = read_metrics(path)
    assert [line.get("event") for line in lines] == ["start", None, None, None]
    assert steps_of(lines) == [{"step": 1, "loss": 6.0}, {"step": 2, "loss": 4.0}]


def test_no_path_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    MetricsFile("").write(step=1)
    assert list(tmp_path.iterdir()) == []


LINES = [{"step": step, "loss": 3 / step, "val_bpb": 4.0 if step == 2 else None, "lr": [0.1, 0.2]} for step in (1, 2)]


@pytest.mark.parametrize("attempt", [0, 1])
@pytest.mark.parametrize("flags", [[], ["--resume"]], ids=["start", "resume"])
def test_damage_is_no_reason_to_begin_anew(tmp_path: Path, flags: list[str], attempt: int):
    save(tmp_path, step=5, model=torch.nn.Linear(2, 2))
    next(tmp_path.glob("*/model-*.safetensors")).write_bytes(b"")
    config = parse(["--checkpoint", str(tmp_path), *flags])
    ranks = Ranks(rank=0, world=1, local_world=1, device=torch.device("cpu"), attempt=attempt)
    with pytest.raises(JobError, match=r"(?s)no complete checkpoint at .*bytes instead of"):
        Checkpoints(config, ranks, "").find()


def test_curves(tmp_path: Path):
    lines = [*LINES, {"event": "resume", "step": 1, "world_size": 3}]
    assert draw_curves(lines, 4.5, str(tmp_path / "new/curves.png")).startswith("curves: ")
    assert (tmp_path / "new/curves.png").read_bytes().startswith(b"\x89PNG")


def test_curves_that_cannot_be_drawn_are_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "no step" in draw_curves([], 4.5, str(tmp_path / "a.png"))
    assert "cannot be drawn" in draw_curves(LINES, 4.5, str(tmp_path / "a.nonsense"))
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert "matplotlib is not installed" in draw_curves(LINES, 4.5, str(tmp_path / "a.png"))
