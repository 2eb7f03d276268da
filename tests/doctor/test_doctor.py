"""`fastopt doctor`: a real run with two ranks, and what it says when something is broken."""

from __future__ import annotations

import json
import platform
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

from fastopt.command import main
from fastopt.doctor import collectives, software, steps, stores
from fastopt.doctor.findings import Finding
from fastopt.engine.cohorts import native

from ..commands import ROOT

Found = dict[str, dict[str, Any]]


def called(*arguments: str) -> tuple[int, str]:
    """Exit code and standard output of a call in this process."""
    done = CliRunner().invoke(main, ["doctor", *arguments], prog_name="fastopt")
    assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
    return done.exit_code, done.stdout


def findings_of(text: str) -> Found:
    """Findings by name."""
    return {finding["name"]: finding for finding in json.loads(text)["findings"]}


@pytest.fixture(scope="module")
def run() -> Found:
    """What a whole run finds; it must be well."""
    code, text = called("--json")
    assert code == 0, text
    assert json.loads(text)["well"] is True
    return findings_of(text)


def test_versions_are_those_of_the_packages(run: Found) -> None:
    assert run["python"]["text"].startswith(platform.python_version())
    assert run["torch"] == {"area": "software", "name": "torch", "state": "ok", "text": torch.__version__, "detail": ""}
    assert {"fastopt", "numpy", "fsspec", "safetensors", "xxhash", "triton", "llvmlite", "cuda"} <= run.keys()


def test_two_ranks_have_talked(run: Found) -> None:
    found = run["gloo on 2 ranks"]
    assert found["state"] == "ok"
    assert re.match(r"sums and a sharded step are right; all-reduce \d+ us, of 4 MiB [\d.e+-]+ GB/s;", found["text"])


def test_executors_come_from_steps(run: Found) -> None:
    made = steps.step("Adam", "cpu").text
    assert run["Adam on cpu"]["text"] == made
    assert made.split(":")[0] in ("llvm", "foreach")


def test_the_page_shows_what_a_run_finds(run: Found) -> None:
    page = (ROOT / "docs" / "commands.md").read_text()
    (block,) = re.findall(r"^\$ fastopt doctor\n(.*?)^```", page, re.MULTILINE | re.DOTALL)
    names = re.findall(r"^(?:software|hardware|steps|stores|ranks|) +(\S.*?)  +(?:ok|note) ", block, re.MULTILINE)
    assert len(names) > 20
    assert set(names) <= run.keys()


def test_ranks_that_cannot_talk_are_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "nowhere0")
    code, text = called("--json")
    assert code == 1
    assert json.loads(text)["broken"] == ["gloo on 2 ranks"]
    gloo = findings_of(text)["gloo on 2 ranks"]
    assert "nowhere0" in gloo["text"]
    assert "GLOO_SOCKET_IFNAME names the interface" in gloo["text"]
    assert "ProcessGroupGloo" in gloo["detail"]
    assert "torchrun" not in gloo["detail"]


def test_an_engine_that_does_not_exist_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FASTOPT_ENGINE", "warp")
    code, text = called("--no-ranks")
    assert code == 1
    assert "engine 'warp' (chosen by FASTOPT_ENGINE) does not exist" in text
    assert text.splitlines()[-1] == "broken: Adam on cpu; Lamb on cpu"


def test_a_step_with_other_results_is_broken(monkeypatch: pytest.MonkeyPatch) -> None:
    right = steps._stepped

    def wrong(make: Any, device: str, engine: str | None) -> Any:
        after, choice = right(make, device, engine)
        return (after if engine else after + 0.01), choice

    monkeypatch.setattr(steps, "_stepped", wrong)
    found = steps.step("Adam", "cpu")
    assert found.state == "broken"
    assert found.text.endswith("but its parameters are 1.0e-02 off those of eager")


def test_ranks_that_hang_are_ended_and_shown() -> None:
    program = "import faulthandler, time; faulthandler.dump_traceback_later(0.2, exit=True); time.sleep(600)"
    code, output = collectives._run([sys.executable, "-c", program], 60)
    assert code == 1
    assert collectives.cause(output, 0.2) == "the ranks were not done after 0.2 s"
    program = "import time; print('here', flush=True); time.sleep(600)"
    code, output = collectives._run([sys.executable, "-c", program], 2)
    assert (code, output) == (None, "here\n")


def test_the_cause_is_what_a_rank_has_raised() -> None:
    output = (
        "[W] something\nTraceback (most recent call last):\n  File x\n[rank1]: torch.DistBackendError: no route\n"
        "E1123 00:18:44 5119 torch/distributed/elastic/api.py:1002] failed (exitcode: 1)\n"
        "torch.distributed.elastic.multiprocessing.errors.ChildFailedError: \n====\nend\n"
    )
    assert collectives.cause(output, 1) == "DistBackendError: no route"
    assert collectives.last_words(output).splitlines()[-1] == "[rank1]: torch.DistBackendError: no route"
    assert collectives.cause("only\nthis\n", 1) == "this"
    assert collectives.cause("", 1) == "the ranks ended without a word"


def test_packages_that_are_missing_broken_or_old(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "matplotlib").mkdir()
    (tmp_path / "matplotlib" / "__init__.py").write_text("raise OSError('libpng is missing')")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in [name for name in sys.modules if name.split(".")[0] == "matplotlib"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(software, "OPTIONAL", {"matplotlib": "plots", "no_such_package": "nothing"})
    monkeypatch.setattr(software, "oldest_versions", lambda: {"torch": "99.1"})
    found = {finding.name: finding for finding in software.software()}
    assert found["matplotlib"].text == "cannot be imported: OSError: libpng is missing"
    assert found["torch"].text == f"{torch.__version__} is too old, at least 99.1 is needed"
    assert found["no_such_package"].state == "note"
    assert [name for name, finding in found.items() if finding.state == "broken"] == ["torch", "matplotlib"]


def test_versions_are_compared_as_numbers() -> None:
    assert software.numbers("2.13.0+cpu") == (2, 13, 0)
    assert software.numbers("2.9") < software.numbers("2.11")


def test_a_store_that_loses_data_is_broken(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert stores.under(str(tmp_path)).state == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "file").write_text("")
    found = stores.under(f"{tmp_path}/file")
    assert (found.state, found.name) == ("broken", f"{tmp_path}/file")
    monkeypatch.setattr(stores, "load", lambda *args, **kwargs: None)
    assert stores.under(str(tmp_path)).text == "a checkpoint came back otherwise than it was saved"


def test_the_round_trip_leaves_nothing_behind(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert stores.under(f"{tmp_path}/new/deep").state == "ok"
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "mine").mkdir()
    assert stores.under(f"{tmp_path}/mine/deep").state == "ok"
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]

    def interrupted(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(stores, "load", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stores.under(f"{tmp_path}/new/deep")
    assert list(tmp_path.rglob("*")) == [tmp_path / "mine"]


def test_what_stays_behind_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def refuses(place: str, new: object) -> None:
        raise PermissionError("no deleting here")

    monkeypatch.setattr(stores, "_remove", refuses)
    monkeypatch.setattr(stores, "load", lambda *args, **kwargs: None)
    found = stores.under(str(tmp_path))
    assert found.state == "broken"
    assert found.text.startswith(f"a checkpoint came back otherwise than it was saved, but {tmp_path}/fastopt-doctor-")
    assert found.text.endswith(" cannot be removed: PermissionError: no deleting here")


def test_a_store_that_is_not_installed_is_a_note(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(protocol: str) -> None:
        raise ImportError("Install ocifs")

    monkeypatch.setattr("fsspec.get_filesystem_class", missing)
    assert stores._store("oci", "ocifs") == Finding("stores", "oci://", "note", "not installed: pip install ocifs")


@pytest.fixture
def fresh_library() -> Iterator[None]:
    """Forget which compiled module was looked for."""
    native._library.cache_clear()
    yield
    native._library.cache_clear()


@pytest.mark.usefixtures("fresh_library")
def test_why_addresses_are_looked_up_as_they_are(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("FASTOPT_CACHE_DIR", str(tmp_path))
    monkeypatch.setenv("CXX", sys.executable)
    assert native.status() == (
        True,
        f"will be compiled in the background of a training with many parameters, into {tmp_path}",
    )
    monkeypatch.setenv("FASTOPT_NATIVE", "0")
    assert native.status() == (False, "in Python, as FASTOPT_NATIVE=0 says")
    monkeypatch.delenv("FASTOPT_NATIVE")
    monkeypatch.setenv("CXX", "no-such-compiler")
    assert native.status() == (False, "in Python: there is no C++ compiler 'no-such-compiler'; CXX names another")
