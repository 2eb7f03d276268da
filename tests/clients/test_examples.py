"""The files in docs/examples that need other libraries run as they are."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from ..commands import ROOT, run_command

EXAMPLES = ROOT / "docs" / "examples"


def test_fastai_learner(tmp_path: Path) -> None:
    printed = run_command(sys.executable, EXAMPLES / "fastai_learner.py", cwd=tmp_path).stdout
    found = re.search(r"validation loss ([\d.]+) \[\{.*'mom'.*\}, \{.*\}\]", printed)
    assert found is not None, printed
    assert float(found[1]) < 1  # 8 before training: the variance of a sum of eight


def test_lightning_trainer(tmp_path: Path) -> None:
    printed = run_command(sys.executable, EXAMPLES / "lightning_trainer.py", cwd=tmp_path).stdout
    assert "epochs 4, rates [6.25e-05, 0.000625]" in printed, printed
    assert "steps of the head: 32" in printed
