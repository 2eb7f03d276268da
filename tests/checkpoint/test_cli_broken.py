"""What every command answers where checkpoints are broken: exit codes, JSON, sentences."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import xxhash
from click.testing import CliRunner
from torch import nn

from fastopt.checkpoint import save
from fastopt.checkpoint.format.manifest import canonical
from fastopt.command import main

COMMANDS = {
    "ls": ["ls", "ROOT"],
    "show": ["show", "ROOT"],
    "verify": ["verify", "ROOT"],
    "all": ["verify", "ROOT", "--all"],
    "diff": ["diff", "ROOT", "GOOD"],
    "prune": ["prune", "ROOT", "--keep-last", "1", "--dry-run"],
    "consolidate": ["consolidate", "ROOT", "OUT"],
    "export": ["export-hf", "ROOT", "OUT"],
}


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Steps 1 and 2, not to be changed."""
    root = tmp_path_factory.mktemp("good")
    for step in (1, 2):
        save(root, step=step, model=nn.Linear(9, 9))
    return root


def newest(root: Path, name: str) -> Path:
    """A file of step 2."""
    return next((root / "step-00000002").glob(name))


def flip(file: Path, at: int) -> None:
    """Change a byte."""
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.write_bytes(data)


def no_manifest(root: Path) -> None:
    newest(root, "manifest.json").unlink()


def manifest_edited(root: Path) -> None:
    flip(newest(root, "manifest.json"), -9)


def manifest_empty(root: Path) -> None:
    newest(root, "manifest.json").write_bytes(b"")


def manifest_newer(root: Path) -> None:
    file = newest(root, "manifest.json")
    content = {**json.loads(file.read_bytes()), "version": 99}
    del content["digest"]
    body = canonical(content)[1:]
    file.write_bytes(b'{"digest":"%s",%s' % (xxhash.xxh3_64_hexdigest(body).encode(), body))


def data_missing(root: Path) -> None:
    newest(root, "model-*").unlink()


def data_cut(root: Path) -> None:
    file = newest(root, "model-*")
    file.write_bytes(file.read_bytes()[:-1])


def data_flipped(root: Path) -> None:
    flip(newest(root, "model-*"), -1)


def header_flipped(root: Path) -> None:
    flip(newest(root, "model-*"), 20)


def index_missing(root: Path) -> None:
    newest(root, "*.index.json").unlink()


def everything_damaged(root: Path) -> None:
    for file in root.glob("*/manifest.json"):
        file.write_bytes(b"{}")


def nothing(root: Path) -> None:
    shutil.rmtree(root)


def a_file(root: Path) -> None:
    shutil.rmtree(root)
    root.write_text("no folder")


# The exit codes of ls, show, verify, all, diff, prune, consolidate, export; and what the answers say, or some of them.
BROKEN: dict[Callable[[Path], None], tuple[str, str]] = {
    no_manifest: ("00001000", "unfinished"),
    manifest_edited: ("00111000", "manifest.json: its digest is not"),
    manifest_empty: ("00111000", "manifest.json: it does not begin like a manifest"),
    manifest_newer: ("02212222", "install a newer one"),
    data_missing: ("00111000", "which step 2 needs, is missing"),
    data_cut: ("00111000", "bytes instead of"),
    data_flipped: ("00112022", "of 'model/bias' and 'model/weight', are damaged"),
    header_flipped: ("00110000", "the header, bytes 0 to 4096, is damaged"),
    index_missing: ("00110000", "only programs of others need it"),
    everything_damaged: ("12112022", "it does not begin like a manifest"),
    nothing: ("12222222", "there is no"),
    a_file: ("12222222", "there is no"),
}


@pytest.mark.parametrize("spoil", BROKEN, ids=lambda spoil: spoil.__name__)
def test_every_command_has_an_answer(spoil: Callable[[Path], None], good: Path, tmp_path: Path) -> None:
    codes, said = "", ""
    for number, arguments in enumerate(COMMANDS.values()):
        for as_json in (False, True):
            root = tmp_path / f"{number}-{as_json}"
            shutil.copytree(good, root)
            spoil(root)
            places = {"ROOT": root, "GOOD": good, "OUT": tmp_path / f"out-{number}-{as_json}"}
            parts = [str(places.get(part, part)) for part in arguments]
            done = CliRunner().invoke(main, ["checkpoint", *parts, *["--json"] * as_json])
            assert done.exception is None or isinstance(done.exception, SystemExit), done.exception
            if as_json:
                assert codes[-1] == str(done.exit_code)
                if done.exit_code < 2:
                    json.loads(done.stdout)
                else:
                    assert done.stderr.startswith("Error: ")
                    assert not done.stdout
            else:
                codes += str(done.exit_code)
                said += " ".join(done.output.split())
            if done.exit_code == 2:
                assert not places["OUT"].exists() or not [p for p in places["OUT"].rglob("*") if p.is_file()]
    assert codes == BROKEN[spoil][0], dict(zip(COMMANDS, codes, strict=True))
    assert BROKEN[spoil][1] in said
