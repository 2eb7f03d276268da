"""How scripts/test and scripts/train make their environment: with an interpreter that only notes what it is asked."""

from __future__ import annotations

import os
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# It takes any `-c`, makes environments that hold itself, notes its installations, and says what else it was to run.
INTERPRETER = """#!/usr/bin/env bash
case "$*" in
  -c*) exit 0 ;;
  --version) echo 'Python 3.12.0' ;;
  '-m venv '*) mkdir -p "$3/bin" && cp "$0" "$3/bin/python" ;;
  '-m pip --version') ;;
  '-m pip install '*)
    echo "$*" >>"$NOTES/installs"
    echo 'WARNING: something about this machine' >&2
    [[ ! -e $NOTES/killed ]] || kill -9 "$PPID" $$
    [[ ! -e $NOTES/slow ]] || sleep 1
    [[ ! -e $NOTES/offline ]] || { echo 'ERROR: No matching distribution found' >&2; exit 1; } ;;
  *) echo "ran $*" ;;
esac
"""


@dataclass
class Checkout:
    """A copy of the commands in an otherwise empty checkout, with the notes of its interpreter beside it."""

    root: Path
    notes: Path

    def start(self, command: str = "test", *arguments: str, cwd: Path | None = None) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [self.root / "scripts" / command, *(arguments or ("some.py",))],
            cwd=cwd or self.notes,
            env={
                "PATH": os.environ["PATH"],
                "HOME": str(self.notes),
                "NOTES": str(self.notes),
                "PYTHON": str(self.notes / "interpreter"),
            },
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, command: str = "test", *arguments: str, cwd: Path | None = None) -> tuple[int, str, str]:
        process = self.start(command, *arguments, cwd=cwd)
        out, err = process.communicate(timeout=60)
        return process.returncode, out, err

    @property
    def installs(self) -> int:
        notes = self.notes / "installs"
        return len(notes.read_text().splitlines()) if notes.exists() else 0


@pytest.fixture
def checkout(tmp_path: Path) -> Checkout:
    root = tmp_path / "a check out"  # with spaces
    (root / "scripts").mkdir(parents=True)
    requirements = ("pyproject.toml", "constraints.txt", "requirements-clients.txt")
    for name in (*(f"scripts/{name}" for name in ("test", "train", "docs", "venv.sh")), *requirements):
        shutil.copy(ROOT / name, root / name)
    interpreter = tmp_path / "interpreter"
    interpreter.write_text(INTERPRETER)
    interpreter.chmod(0o755)
    return Checkout(root, tmp_path)


def test_it_is_made_once(checkout: Checkout) -> None:
    code, out, err = checkout.run()
    assert (code, out) == (0, "ran -m pytest some.py\n")
    assert err == "Making .venv with Python 3.12.0, this takes some minutes once.\n"  # and no warning of pip's
    assert checkout.run(cwd=checkout.root / "scripts") == (0, "ran -m pytest some.py\n", "")
    assert checkout.run("train", "--steps", "3")[0] == 0
    assert checkout.installs == 1
    install = (checkout.notes / "installs").read_text()
    assert f"--editable {checkout.root}[dev] --constraint {checkout.root}/constraints.txt" in install


@pytest.mark.parametrize("name", ["pyproject.toml", "constraints.txt"])
def test_it_follows_a_change_of_the_requirements(checkout: Checkout, name: str) -> None:
    checkout.run()
    with (checkout.root / name).open("a") as file:
        file.write("# changed\n")
    assert checkout.run()[2] == "Bringing .venv up to date.\n"
    assert checkout.run()[2] == ""
    assert checkout.installs == 2


def test_one_that_was_left_half_made_is_made_again(checkout: Checkout) -> None:
    (checkout.notes / "killed").touch()
    assert checkout.run()[0] != 0
    (checkout.root / ".venv" / "rubbish").touch()
    (checkout.notes / "killed").unlink()
    code, _, err = checkout.run()
    assert code == 0
    assert err.startswith("Making .venv")
    assert not (checkout.root / ".venv" / "rubbish").exists()


def test_one_whose_interpreter_is_gone_is_made_again(checkout: Checkout) -> None:
    checkout.run()
    (checkout.root / ".venv" / "bin" / "python").unlink()
    assert checkout.run()[:2] == (0, "ran -m pytest some.py\n")


def test_somebody_elses_is_used_and_not_removed(checkout: Checkout) -> None:
    (checkout.root / ".venv" / "bin").mkdir(parents=True)
    shutil.copy(checkout.notes / "interpreter", checkout.root / ".venv" / "bin" / "python")
    (checkout.root / ".venv" / "theirs").touch()
    assert checkout.run()[:2] == (0, "ran -m pytest some.py\n")
    assert (checkout.root / ".venv" / "theirs").exists()


def test_one_without_an_interpreter_that_is_not_ours_is_told(checkout: Checkout) -> None:
    (checkout.root / ".venv").mkdir()
    code, _, err = checkout.run()
    assert code == 1
    assert err == f"test: {checkout.root}/.venv has no working Python with pip; remove it and run this again.\n"


def test_the_messages_of_a_failed_installation_are_shown(checkout: Checkout) -> None:
    (checkout.notes / "offline").touch()
    code, out, err = checkout.run("train")
    assert (code, out) == (1, "")
    assert "ERROR: No matching distribution found\n" in err
    assert err.endswith("train: pip could not install fastopt and what it needs; its messages are above.\n")
    (checkout.notes / "offline").unlink()
    assert checkout.run() == (0, "ran -m pytest some.py\n", "Bringing .venv up to date.\n")


def test_two_at_once_make_it_once(checkout: Checkout) -> None:
    if shutil.which("flock") is None:
        pytest.skip("without flock the two commands do not wait for each other")
    (checkout.notes / "slow").touch()
    both = [checkout.start(), checkout.start("train")]
    for process in both:
        process.communicate(timeout=60)
        assert process.returncode == 0
    assert checkout.installs == 1


def test_no_fitting_python_is_one_sentence(checkout: Checkout) -> None:
    too_old = checkout.notes / "bin"
    too_old.mkdir()
    for name in ("python", "python3", "python3.11", "python3.12", "python3.13"):
        (too_old / name).write_text("#!/bin/sh\nexit 1\n")
        (too_old / name).chmod(0o755)
    done = subprocess.run(
        [checkout.root / "scripts" / "test"],
        env={"PATH": f"{too_old}:{os.environ['PATH']}", "HOME": str(checkout.notes)},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("test: found no Python 3.11, 3.12 or 3.13 with its venv module")
    assert done.stderr.count("\n") == 1
    assert not (checkout.root / ".venv").exists()


def test_train_starts_two_ranks_and_hands_its_arguments_on(checkout: Checkout) -> None:
    script = checkout.root / "scripts"
    _, out, _ = checkout.run("train", "--data", "a file", "--steps", "3")
    ranks = f"{script}/launch.py --standalone --nproc-per-node=2"
    checked = f"ran {script}/train.py --check --data a file --steps 3\n"
    assert out == f"{checked}ran {ranks} {script}/train.py --data a file --steps 3\n"
    assert checkout.run("train", "--steps", "3", "--demo")[1] == f"ran {script}/demo.py --steps 3\n"
    assert checkout.run("train", "--help")[1].endswith(f"ran {script}/train.py --help\n")
    assert checkout.run("test", "--help")[1].startswith("usage: scripts/test")


def test_docs_builds_the_site_and_is_strict_unless_it_serves(checkout: Checkout) -> None:
    mkdocs = "ran -m mkdocs"
    out = checkout.run("docs", "build", "--site-dir", "a folder")[1]
    assert out == f"{mkdocs} build --config-file scripts/mkdocs.yml --strict --site-dir a folder\n"
    assert checkout.run("docs", "serve")[1] == f"{mkdocs} serve --config-file scripts/mkdocs.yml\n"
    assert checkout.run("docs", "--help")[1].startswith("usage: scripts/docs")


def test_that_of_the_clients_is_another_one(checkout: Checkout) -> None:
    checkout.run()
    everything = "ran -m pytest -n auto --dist loadfile tests/clients\n"
    made = "Making .venv-clients with Python 3.12.0, this takes some minutes once.\n"
    assert checkout.run("test", "--clients") == (0, everything, made)
    assert checkout.run("test", "--clients", "some.py", "-x") == (0, "ran -m pytest some.py -x\n", "")
    listed = f"--requirement {checkout.root}/requirements-clients.txt --constraint {checkout.root}/constraints.txt"
    assert listed in (checkout.notes / "installs").read_text().splitlines()[1]
    with (checkout.root / "requirements-clients.txt").open("a") as file:
        file.write("# changed\n")
    assert checkout.run("test", "--clients", "some.py")[2] == "Bringing .venv-clients up to date.\n"
    assert checkout.run()[2] == ""
    assert checkout.installs == 3


def test_without_arguments_all_checks_run_and_a_failed_one_is_named(checkout: Checkout) -> None:
    checkout.run()
    contract = checkout.root / ".venv" / "bin" / "lint-imports"
    process = checkout.start("test", "")  # an empty argument is one for pytest
    assert process.communicate(timeout=60)[0] == "ran -m pytest \n"
    everything = "ran -m pytest -n auto --dist loadfile --no-loadscope-reorder\n"
    for code, verdict in ((0, everything), (1, "failed: [import contract]\n")):
        contract.write_text(f"#!/bin/sh\nexit {code}\n")
        contract.chmod(0o755)
        done = subprocess.run(
            [checkout.root / "scripts" / "test"],
            env={"PATH": os.environ["PATH"], "HOME": str(checkout.notes), "NOTES": str(checkout.notes)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.returncode == code
        assert done.stdout.endswith(verdict)
        for tool in ("ruff check", "ruff format --check", "mypy", "pytest"):
            assert f"ran -m {tool}" in done.stdout
