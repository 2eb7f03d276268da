"""The real command, in a process of its own: what it prints, its exit codes, its errors."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file, safe_open
from torch import nn

from fastopt.checkpoint import CheckpointError, load, save, steps, verify
from fastopt.checkpoint.catalog import verified_mark
from fastopt.checkpoint.command.places import Place, command, place
from fastopt.checkpoint.io.storage import LocalStorage
from fastopt.checkpoint.offline.consolidation import consolidate
from fastopt.checkpoint.offline.export import export_hf
from fastopt.command import main

from ..commands import ROOT
from ..ranks import _context, run_ranks
from .jobs import Small, bits, groups_of
from .s3_server import BUCKET, S3Server
from .test_sharded import job, step


def fastopt(*arguments: object, code: int = 0) -> str:
    """What `fastopt ARGUMENTS` prints on stdout; on stderr where it must end with code 2.

    A process of its own, but one that has not to import torch first (see tests/ranks.py).
    """
    with tempfile.TemporaryDirectory() as folder:
        process = _context.Process(target=_main, args=([str(a) for a in arguments], folder, dict(os.environ)))
        process.start()
        process.join(120)
        process.kill()
        out, err = (Path(folder, name).read_text() for name in ("out", "err"))
    assert process.exitcode == code, out + err
    assert "Traceback" not in err
    return err if code == 2 else out


def _main(arguments: list[str], folder: str, env: dict[str, str]) -> None:
    os.environ.update(env)
    for number, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT), number)
    sys.stdin, sys.stdout, sys.stderr = open(os.devnull), open(1, "w"), open(2, "w")  # noqa: SIM115
    main(arguments, prog_name="fastopt")


def build(rank: int, world: int, root: str) -> None:
    """Three steps of a sharded job."""
    model, opt = job("elementwise", 2)
    for number in range(3):
        step(model, opt, number)
        save(root, step=10 * (number + 1), model=model, opt=opt, extra={"number": number})


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 10, 20 and 30 of three ranks; not to be changed."""
    root = tmp_path_factory.mktemp("cli") / "run"
    run_ranks(build, 3, str(root))
    return root


@pytest.fixture
def broken(run: Path, tmp_path: Path) -> Path:
    """A copy in which step 30 has a flipped bit, step 20 lacks a file and step 40 was never finished."""
    copy = tmp_path / "broken"
    subprocess.run(["cp", "-r", run, copy], check=True)
    file = sorted((copy / "step-00000030").glob("s-*"))[0]
    data = bytearray(file.read_bytes())
    data[-9] ^= 1
    file.write_bytes(data)
    sorted((copy / "step-00000020").glob("model-*"))[0].unlink()
    (copy / "step-00000040").mkdir()
    (copy / "step-00000040" / "s-00000000-r00000-000.safetensors").write_bytes(b"half")
    return copy


def help_of(*command: str) -> str:
    """The help of a command; without a process, for there are many."""
    done = CliRunner().invoke(main, [*command, "--help"], prog_name="fastopt")
    assert done.exit_code == 0
    return str(done.output)


def test_every_help_has_an_example() -> None:
    assert "Example:" in help_of()
    text = help_of("checkpoint")
    names = re.findall(r"^  ([a-z-]+)  ", text.split("Commands:")[1], re.MULTILINE)
    assert names == ["consolidate", "diff", "export-hf", "ls", "prune", "show", "verify"]
    assert "..." not in text.split("Commands:")[1]
    for name in names:
        (example,) = re.findall(r"Example:  (.*)$", help_of("checkpoint", name), re.MULTILINE)
        assert example.startswith(f"fastopt checkpoint {name} ")


def test_the_module_and_what_it_does_not_import(run: Path) -> None:
    code = (
        "import sys, runpy, fastopt, fastopt.checkpoint; print(sorted({'click', 'rich'} & sys.modules.keys()));"
        "sys.argv = ['fastopt', *sys.argv[1:]]; runpy.run_module('fastopt', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "checkpoint", "ls", run], capture_output=True, text=True, cwd=ROOT, check=True
    )
    assert done.stdout.startswith("[]\n")
    assert "complete" in done.stdout


def test_ls(run: Path, broken: Path, tmp_path: Path) -> None:
    lines = fastopt("checkpoint", "ls", run).splitlines()
    assert [line.split()[:2] for line in lines if line.strip()[:1].isdigit()] == [
        [str(number), "complete"] for number in (10, 20, 30)
    ]
    rows = json.loads(fastopt("checkpoint", "ls", broken, "--json"))
    assert [(row["step"], row["state"]) for row in rows] == [
        (10, "complete"),
        (20, "damaged"),
        (30, "complete"),
        (40, "unfinished"),
    ]
    assert rows[0]["ranks"] == 3
    assert rows[0]["bytes"] == sum(f.stat().st_size for f in (run / "step-00000010").glob("*.safetensors"))
    assert "is missing" in rows[1]["problem"]
    assert "which step 20 needs, is missing" in fastopt("checkpoint", "ls", broken)
    assert "nothing at" in fastopt("checkpoint", "ls", tmp_path / "none", code=1)


def test_show(run: Path, tmp_path: Path) -> None:
    text = fastopt("checkpoint", "show", run, "--tensors", "body.0", "--plot", tmp_path / "ranks.png")
    assert "step 30, saved 20" in text
    assert "by 3 ranks" in text
    assert re.search(r"state/grad_avg +\d+ +\d+ +", text)
    assert "(0.9, 0.99)" in text
    assert "{'number': 2}" in text
    assert "state/sqr_avg/body.0.weight" in text
    assert "embed" not in text
    assert (tmp_path / "ranks.png").read_bytes().startswith(b"\x89PNG")
    about = json.loads(fastopt("checkpoint", "show", run / "step-00000010", "--json"))
    model = Small()
    assert about["step"] == 10
    assert {part["part"]: part["elements"] for part in about["parts"]}["model"] == sum(
        tensor.numel() for name, tensor in model.state_dict().items() if name != "head.weight"
    )
    assert [len(group["params"]) for group in about["groups"]] == [len(g) for g in groups_of(model)]
    svg = tmp_path / "ranks.svg"
    fastopt("checkpoint", "show", run, "--step", 20, "--plot", svg)
    assert "<svg" in svg.read_text()
    assert "ends with .png" in fastopt("checkpoint", "show", run, "--plot", tmp_path / "a.doc", code=2)


def test_verify(run: Path, broken: Path) -> None:
    assert re.match(r"step 30 is sound: .* in \d+ files", fastopt("checkpoint", "verify", run, "--no-mark"))
    assert not list(run.glob("*/verified-*"))
    text = fastopt("checkpoint", "verify", broken, code=1)
    assert "step 30 is damaged" in text
    assert re.search(r"s-\w+-r00000-000\.safetensors: bytes \d+ to \d+, of '(state|rng)/.* damaged", text)
    (report,) = json.loads(fastopt("checkpoint", "verify", broken / "step-00000010", "--json"))
    assert (report["step"], report["sound"], report["problems"]) == (10, True, [])
    reports = json.loads(fastopt("checkpoint", "verify", broken, "--all", "--json", code=1))
    assert [(report["step"], report["sound"]) for report in reports] == [(10, True), (20, False), (30, False)]
    states = [row["state"] for row in json.loads(fastopt("checkpoint", "ls", broken, "--json"))]
    assert states == ["verified", "damaged", "damaged", "unfinished"]


def test_diff(run: Path, broken: Path, tmp_path: Path) -> None:
    assert fastopt("checkpoint", "diff", run, run) == "no difference\n"
    ten, thirty = run / "step-00000010", run / "step-00000030"
    found = json.loads(fastopt("checkpoint", "diff", ten, thirty, "--json", code=1))
    kinds = {item["kind"] for item in found}
    assert kinds == {"setting", "values"}
    (extra,) = [item for item in found if item["what"] == "extra.number"]
    assert (extra["left"], extra["right"]) == (0, 2)
    values = {item["what"]: item for item in found if item["kind"] == "values"}
    models = []
    for number in (10, 30):
        models.append(Small(7))
        load(run, model=models[-1], step=number, rng=False)
    a, b = (dict(model.named_parameters())["body.0.weight"].detach() for model in models)
    assert values["model/body.0.weight"]["left"] == int((a != b).sum())
    assert values["model/body.0.weight"]["right"] == pytest.approx(float((a - b).abs().max()))
    assert "values of" in fastopt("checkpoint", "diff", ten, thirty, code=1)
    assert "values of" not in fastopt("checkpoint", "diff", ten, thirty, "--no-values", code=1)
    save(tmp_path / "other", step=1, model=nn.Linear(2, 2))
    other = json.loads(fastopt("checkpoint", "diff", run, tmp_path / "other", "--json", code=1))
    assert {"kind": "tensor", "what": "model/weight", "left": None, "right": "F32 [2, 2]"} in other
    assert "damaged" in fastopt("checkpoint", "diff", broken, run, code=2)


def test_consolidate_makes_a_checkpoint_with_the_same_content(run: Path, tmp_path: Path) -> None:
    made = fastopt("checkpoint", "consolidate", run, tmp_path / "whole", "--step", 20).strip()
    assert made == str(tmp_path / "whole" / "step-00000020")
    assert fastopt("checkpoint", "diff", run / "step-00000020", made) == "no difference\n"
    assert "sound" in fastopt("checkpoint", "verify", made)
    files = sorted(Path(made).glob("*.safetensors"))
    assert [file.name.split("-")[0] for file in files] == ["model", "s"]
    whole: dict[str, Any] = {}
    for file in files:
        whole |= load_file(file)
    models = Small(5), Small(6)
    load(run, model=models[0], step=20)
    for name, tensor in models[0].state_dict().items():
        if name != "head.weight":
            assert bits(whole[name]) == bits(tensor)
    load(made.rsplit("/", 1)[0], model=models[1])
    assert bits(dict(models[0].state_dict())) == bits(dict(models[1].state_dict()))
    assert "already saved" in fastopt("checkpoint", "consolidate", run, tmp_path / "whole", "--step", 20, code=2)


def test_a_failed_consolidation_leaves_nothing(broken: Path, tmp_path: Path) -> None:
    assert "is damaged" in fastopt("checkpoint", "consolidate", broken, tmp_path / "whole", code=2)
    assert not list((tmp_path / "whole").glob("*/*"))


def test_export_hf(run: Path, tmp_path: Path) -> None:
    arguments = (run, tmp_path / "hf", "--dtype", "BF16", "--file-gb", "0.0000004", "--json")
    made = json.loads(fastopt("checkpoint", "export-hf", *arguments))
    index = json.loads((tmp_path / "hf" / "model.safetensors.index.json").read_text())
    assert set(made["files"]) == {*index["weight_map"].values(), "model.safetensors.index.json"}
    assert len(made["files"]) > 2
    model = Small(5)
    load(run, model=model)
    state = model.state_dict()
    assert set(index["weight_map"]) == set(state) - {"head.weight"}
    total = 0
    for name, file in index["weight_map"].items():
        with safe_open(tmp_path / "hf" / file, "pt") as opened:
            got = opened.get_tensor(name)
        wanted = state[name].bfloat16() if state[name].is_floating_point() else state[name]
        assert bits(got) == bits(wanted)
        total += got.nbytes
    assert index["metadata"]["total_size"] == total
    assert "nothing was overwritten" in fastopt("checkpoint", "export-hf", run, tmp_path / "hf", "--file-gb", 9, code=2)


def test_prune(broken: Path) -> None:
    assert "nobody to ask" in fastopt("checkpoint", "prune", broken, "--keep-last", 1, code=2)
    shown = fastopt("checkpoint", "prune", broken, "--keep-last", 1, "--grace", 0, "--dry-run")
    assert re.search(r"10 +goes", shown)
    assert re.search(r"20 +stays +not complete", shown)
    assert len(list(broken.iterdir())) == 4
    done = json.loads(fastopt("checkpoint", "prune", broken, "--keep-last", 1, "--yes", "--json"))
    assert (done["remove"], done["leftovers"], done["removed"]) == ([10], [], True)
    assert sorted(path.name for path in broken.iterdir()) == [f"step-000000{n}0" for n in (2, 3, 4)]
    assert "nothing to remove" in fastopt("checkpoint", "prune", broken, "--keep-last", 1)


def test_a_job_that_saves_while_prune_asks_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastopt.checkpoint.saving.writing.LEAST_REUSED", 100)
    model = nn.Linear(40, 10)
    for number in (10, 20, 40):
        save(tmp_path, step=number, model=model if number == 20 else nn.Linear(40, 10), reuse=False)

    def ask(*args: Any, **kwargs: Any) -> bool:  # meanwhile the job has gone back to 20, and uses its files
        torch.rand(1)
        save(tmp_path, step=50, model=nn.Linear(3, 3), reuse=False)
        (tmp_path / "step-00000040" / "manifest.json").rename(tmp_path / "aside")
        save(tmp_path, step=30, model=model)
        (tmp_path / "aside").rename(tmp_path / "step-00000040" / "manifest.json")
        save(tmp_path, step=60, model=nn.Linear(3, 3), reuse=False)
        mark = verified_mark((tmp_path / "step-00000030" / "manifest.json").read_bytes())
        (tmp_path / "step-00000030" / mark).write_text("{}")
        return True

    monkeypatch.setattr("click.confirm", ask)
    monkeypatch.setattr(
        "fastopt.checkpoint.command.cleaning.sys", SimpleNamespace(stdin=SimpleNamespace(isatty=lambda: True))
    )
    done = CliRunner().invoke(main, ["checkpoint", "prune", str(tmp_path), "--keep-last", "1"])
    assert done.exit_code == 0, done.output
    assert "removed 1 checkpoints" in done.output
    assert steps(tmp_path) == [20, 30, 40, 50, 60]
    assert verify(tmp_path, step=30).sound


def test_two_exports_at_the_same_time_do_not_remove_each_others_files(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    theirs = tmp_path / "model-00001-of-00001.safetensors"
    create = LocalStorage.create

    def late(self: LocalStorage, path: str, chunks: Any) -> None:
        theirs.write_bytes(b"theirs")
        create(self, path, chunks)

    monkeypatch.setattr(LocalStorage, "create", late)
    with pytest.raises(CheckpointError, match="is there already; nothing was overwritten"):
        export_hf(run, tmp_path)
    assert theirs.read_bytes() == b"theirs"


@pytest.mark.parametrize(
    ("url", "root", "number"),
    [
        ("/data/run/step-00000010", "/data/run/", 10),
        ("step-00000010//", ".", 10),
        ("/step-00000010", "/", 10),
        ("s3://bucket/step-00000010", "s3://bucket/", 10),
        ("memory://step-00000010", "memory://", 10),
        ("/data/last-step-00000010", "/data/last-step-00000010", None),
        ("/data/step-00000010/hf", "/data/step-00000010/hf", None),
        ("/data/run/step-0000001٣", "/data/run/step-0000001٣", None),
    ],
)
def test_what_a_url_names(url: str, root: str, number: int | None) -> None:
    assert place(url) == Place(root, number)


def test_a_path_that_the_terminal_cannot_show(run: Path, tmp_path: Path) -> None:
    (tmp_path / "läufe").symlink_to(run.parent)
    done = subprocess.run(
        [sys.executable, "-m", "fastopt", "checkpoint", "show", tmp_path / "läufe" / "run"],
        capture_output=True,
        cwd=ROOT,
        env=os.environ | {"PYTHONIOENCODING": "ascii"},
        check=True,
    )
    assert done.stdout.splitlines()[0] == f"{tmp_path}/l\\xe4ufe/run/step-00000030".encode()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("show", "RUN", "--step", "7"), "step 7 does not exist"),
        (("show", "RUN/step-00000010", "--step", "20"), "the URL names step 10"),
        (("show", "nosuch://x"), "nosuch"),
        (("show", ""), "empty"),
        (("prune", "RUN"), "--keep-last"),
        (("prune", "RUN/step-00000010", "--keep-last", "1"), "the folder above"),
        (("prune", "RUN", "--keep-last", "0"), "x>=1"),
        (("verify", "RUN/none"), "no complete checkpoint"),
        (("verify", "RUN", "--all", "--step", "10"), "exclude"),
        (("export-hf", "RUN", "/proc/none/there"), "Error"),
        (("export-hf", "RUN", "/dev/null"), "/dev/null is there and is no folder"),
        (("export-hf", "RUN", "RUN-hf", "--file-gb", "inf"), "inf is not a finite number"),
        (("prune", "RUN", "--keep-last", "1", "--grace", "nan"), "nan is not a finite number"),
        (("consolidate", "RUN", "RUN/step-00000030"), "would be the folder of a step"),
        (("frobnicate",), "No such command"),
    ],
)
def test_mistakes_get_one_sentence(arguments: tuple[str, ...], message: str, run: Path) -> None:
    text = fastopt("checkpoint", *(part.replace("RUN", str(run)) for part in arguments), code=2)
    assert message in text
    assert len(text.strip().splitlines()) <= 6  # click adds the usage to its own


def test_on_s3(tmp_path: Path) -> None:
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.env.items():
            patch.setenv(name, value)
        url = f"s3://{BUCKET}/run"
        for number in (1, 2, 3):
            save(url, step=number, model=nn.Linear(3, 3))
        assert "sound" in fastopt("checkpoint", "verify", url)
        assert json.loads(fastopt("checkpoint", "prune", url, "--keep-last", 2, "--yes", "--json"))["remove"] == [1]
        made = fastopt("checkpoint", "consolidate", url, f"s3://{BUCKET}/whole").strip()
        assert fastopt("checkpoint", "diff", url, made) == "no difference\n"
        fastopt("checkpoint", "export-hf", url, tmp_path / "hf")
        assert [row["state"] for row in json.loads(fastopt("checkpoint", "ls", url, "--json"))] == [
            "complete",
            "verified",
        ]


PEAK = """
import resource, sys
from fastopt.checkpoint.offline.consolidation import consolidate
from fastopt.command import main
from fastopt.checkpoint.offline.export import export_hf
large, small, made = sys.argv[1:]
def peak(act, *arguments):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    act(*arguments)
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
consolidate(small, made + "/small")
print(peak(consolidate, large, made + "/large"), peak(export_hf, large, made + "/hf"))
"""


def test_memory_is_bounded_however_large_a_tensor_is(tmp_path: Path) -> None:
    size = 480 << 20
    model = nn.Module()
    model.register_parameter("large", nn.Parameter(torch.arange(size // 4, dtype=torch.float32).view(480, -1)))
    save(tmp_path / "large", step=2, model=model)
    save(tmp_path / "small", step=1, model=nn.Linear(2, 2))
    done = subprocess.run(
        [sys.executable, "-c", PEAK, tmp_path / "large", tmp_path / "small", tmp_path / "made"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert [int(grown) < size // 4 for grown in done.stdout.split()] == [True, True], done.stdout
    for made in ("large", "hf"):
        (file,) = (tmp_path / "made" / made).rglob("model-*.safetensors")
        assert torch.equal(load_file(file)["large"], model.large)


def test_consolidate_as_a_function_tells_its_progress(run: Path, tmp_path: Path) -> None:
    told: list[tuple[int, int]] = []
    consolidate(run, tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[-1][0] == told[-1][1]
    assert [done for done, _ in told] == sorted(done for done, _ in told)


def test_a_reader_that_has_enough_gets_no_message() -> None:
    @command
    def written() -> None:
        raise BrokenPipeError

    with pytest.raises(BrokenPipeError):  # click then ends without a word
        written()
