"""Every code block of the README and of the guide to checkpoints runs as it stands there and prints what they claim."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from .commands import ROOT
from .pages import blocks, on_ranks, under_torchrun

BLOCKS = blocks("README.md")
ALONE = [block for block in BLOCKS if block.kind == ""]
ON_RANKS = [block.code for block in BLOCKS if block.kind == "torchrun"]
GUIDE = [block.code for block in blocks("docs/checkpoints.md")]


def test_the_readme_has_the_blocks_that_are_run_here() -> None:
    assert (len(ALONE), len(ON_RANKS), len(BLOCKS)) == (1, 1, 2)


def test_an_optimizer_of_your_own(tmp_path: Path) -> None:
    printed = ALONE[0].run(tmp_path)
    assert "'mom': 0.95" in printed
    assert "executor=" in printed
    assert "write state grad_avg" in printed


def test_save_and_resume_on_another_number_of_ranks(tmp_path: Path) -> None:
    code = ON_RANKS[0].replace("URL", repr(str(tmp_path / "run")))
    two_averages = (8 * 64 + 64 + 64 + 1) * 2 * 4  # bytes in float32
    for ranks, steps in [(2, "1 to 10"), (1, "11 to 20")]:
        printed = (under_torchrun if ranks == 2 else on_ranks)(code, ranks, tmp_path)
        found = re.findall(rf"rank (\d) of {ranks}: steps {steps}, (\d+) bytes of state", printed)
        assert sorted(rank for rank, _ in found) == [str(rank) for rank in range(ranks)], printed
        assert sum(int(n) for _, n in found) == two_averages
        assert max(int(n) for _, n in found) < 1.05 * two_averages / ranks


def test_its_links_lead_somewhere() -> None:
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", (ROOT / "README.md").read_text())
    assert len(links) > 15
    assert [link for link in links if "://" not in link and not (ROOT / link).exists()] == []


def test_the_table_has_the_committed_results() -> None:
    page = (ROOT / "README.md").read_text()
    folder = ROOT / "docs" / "benchmarks"
    step, slower = (json.loads((folder / f"{name}.json").read_text()) for name in ("step-h200", "step-small-h200"))
    adam, there = (
        {(row["model"], row["who"]): row for row in run["rows"] if row["rule"] == "Adam" and row["groups"] == 1}
        for run in (step, slower)
    )
    zero = {row["who"]: row for row in json.loads((folder / "zero-2xh200.json").read_text())["rows"]}
    saving = json.loads((folder / "checkpoint-cpu.json").read_text())

    def ms(model: str, who: str, rows: dict[tuple[str, str], Any] = adam) -> str:
        return f"{rows[model, who]['step_ms']:.3g}"

    def iteration(who: str) -> str:
        return f"{zero[who]['iteration_ms']:.3g}"

    def gib(who: str) -> str:
        return f"{zero[who]['resident_bytes'] / 2**30:.1f}"

    def faster(theirs: str, how: str) -> float:
        return float(saving[f"DCP {theirs}"]["seconds"] / saving[f"fastopt {how}"]["seconds"])

    fused = adam["resnet-50", "torch fused"]["first_ms"]
    (ours_first,) = (first["empty_ms"] for first in step["first"] if first["rule"] == "Adam")
    ours, zeros, fsdp = "fastopt stage 2", "DDP float32, ZeroRedundancyOptimizer", "fully_shard, torch fused"
    megatron = "Megatron-Core distributed optimizer"
    said = [
        f"{ms('llama-1.3b', 'fastopt')} against {ms('llama-1.3b', 'torch fused')} ms for 1.36 billion",
        f"{ms('small-1000', 'fastopt')} against {ms('small-1000', 'torch fused')} ms for 1000 small",
        f"({ms('small-1000', 'fastopt', there)} against {ms('small-1000', 'torch fused', there)} on a slower host)",
        f"{fused:.0f} ms against {ours_first / 1e3:.1f} s",
        f"{ms('llama-1.3b', 'fastopt')} against {ms('llama-1.3b', 'HeavyBall')} ms for HeavyBall",
        f"{iteration(ours)} against {iteration(zeros)} ms an iteration and {gib(ours)} against {gib(zeros)} GiB",
        f"{iteration('DDP bfloat16 without master, torch fused')} ms, and whole gradients",
        f"{iteration(ours)} against {iteration('fully_shard without resharding, torch fused')} ms where",
        f"{gib(fsdp)} against {gib(ours)} GiB",
        f"{iteration(ours)} against {iteration('DeepSpeed stage 1')} ms (ZeRO 1) and "
        f"{iteration('DeepSpeed stage 2')} ms (ZeRO 2)",
        f"{iteration(ours)} against {iteration(megatron)} ms and {gib(ours)} against {gib(megatron)} GiB",
        f"saving {faster('save', 'save'):.1f} times as fast, loading {faster('load', 'load in place'):.1f} to "
        f"{faster('load', 'load, checked during'):.1f} times",
    ]
    assert [claim for claim in said if claim not in page] == []


def test_the_tables_have_the_committed_results() -> None:
    rows = re.findall(
        r"^\| (.+?) \| ([\d.]+) \| ([\d.]+) \| ([\d.]*) ?\|$", (ROOT / "README.md").read_text(), re.MULTILINE
    )
    folder = ROOT / "docs" / "benchmarks"
    zero = {row["who"]: row for row in json.loads((folder / "zero-2xh200.json").read_text())["rows"]}
    saving = json.loads((folder / "checkpoint-cpu.json").read_text())
    reshard = saving["reshard"]
    iterations = {
        "forward and backward alone": "compute only",
        "`shard`, stage 2": "fastopt stage 2",
        "the same, clipping": "fastopt stage 2, clipping",
        "the same, 219 groups": "fastopt stage 2, 219 groups",
        "DDP, bfloat16 without masters": "DDP bfloat16 without master, torch fused",
        "DDP, float32": "DDP float32, torch fused",
        "DDP with ZeroRedundancyOptimizer, float32": "DDP float32, ZeroRedundancyOptimizer",
        "`fully_shard`": "fully_shard, torch fused",
        "DeepSpeed, ZeRO 1": "DeepSpeed stage 1",
        "DeepSpeed, ZeRO 2": "DeepSpeed stage 2",
        "Megatron-Core, distributed optimizer": "Megatron-Core distributed optimizer",
    }
    seconds = {
        "raw writes and reads": ("raw save", "raw load", "raw"),
        "fastopt": ("fastopt save", "fastopt load in place", "fastopt in place"),
        'fastopt, `check="during"`': ("fastopt save", "fastopt load, checked during", "fastopt, checked during"),
        "`torch.distributed.checkpoint`": ("DCP save", "DCP load", "DCP"),
        "`torch.save` per rank": ("torch.save save", "torch.save load", None),
    }
    wanted = []
    for name, who in iterations.items():
        row = zero[who]
        gib = [f"{row[key] / 2**30:.1f}" for key in ("resident_bytes", "peak_bytes")]
        wanted.append((name, f"{row['iteration_ms']:.1f}", *gib))
    for name, (save, load, on_one) in seconds.items():
        last = f"{reshard[on_one]['seconds']:.2f}" if on_one else ""
        wanted.append((name, f"{saving[save]['seconds']:.2f}", f"{saving[load]['seconds']:.2f}", last))
    assert rows == wanted


def test_the_guide_saves_in_the_background_and_resumes(tmp_path: Path) -> None:
    (code,) = GUIDE
    code = code.replace("URL", repr(str(tmp_path / "run")))
    for ranks, steps in [(2, "1 to 10"), (1, "11 to 20")]:
        assert f"rank 0: steps {steps}" in on_ranks(code, ranks, tmp_path)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [f"step-000000{n}" for n in (10, 15, 20)]
