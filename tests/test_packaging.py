"""What an installation brings: the three folders as one package, under no other name."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from .commands import run_command

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
PARTS = {"distributed": "fastopt/distributed", "checkpoint": "fastopt/checkpoint"}


def modules() -> set[str]:
    """The source files of the package, by the place where they are installed."""
    places = {"fastopt": "fastopt", **PARTS}
    return {
        str(place / path.relative_to(ROOT / folder))
        for folder, place in ((folder, Path(place)) for folder, place in places.items())
        for path in (p for kind in ("*.py", "*.cpp") for p in (ROOT / folder).rglob(kind))
        if path.relative_to(ROOT).parts[:2] not in {("fastopt", part) for part in PARTS}
    }


def build(kind: str, source: Path, into: Path) -> Path:
    """Builds `wheel` or `sdist` from `source`, with the setuptools that is installed here."""
    into.mkdir()
    program = f"import sys; from setuptools import build_meta; print(build_meta.build_{kind}(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", program, into], cwd=source, capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return into / done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of what the build reads: it writes beside its sources."""
    copy = tmp_path_factory.mktemp("source") / "fastopt"
    copy.mkdir()
    for name in ("fastopt", "distributed", "checkpoint"):
        shutil.copytree(ROOT / name, copy / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    return copy


@pytest.fixture(scope="module")
def sdist(source: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build("sdist", source, tmp_path_factory.mktemp("sdist") / "out")


@pytest.fixture(scope="module", params=["checkout", "sdist"])
def wheel(request: pytest.FixtureRequest, source: Path, sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    if request.param == "sdist":
        with tarfile.open(sdist) as archive:
            archive.extractall(folder, filter="data")
        (source,) = folder.iterdir()
    return build("wheel", source, folder / "out")


@pytest.mark.parametrize("part", PARTS)
def test_the_package_links_to_the_folder_at_the_top(part: str) -> None:
    assert os.readlink(ROOT / "fastopt" / part) == f"../{part}"


def test_every_folder_with_code_is_listed() -> None:
    listed = {name.replace(".", "/") for name in PROJECT["tool"]["setuptools"]["packages"]}
    assert listed == {str(Path(name).parent) for name in modules()}
    for package in listed:
        assert (ROOT / package / "__init__.py").is_file(), f"{package} has no __init__.py"


def test_the_wheel_holds_all_modules_as_files_and_nothing_else(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        entries = {info.filename: info for info in archive.infolist()}
    metadata = {name for name in entries if name.split("/")[0].endswith(".dist-info")}
    assert set(entries) - metadata == modules() | {"fastopt/py.typed"}
    links = [name for name, info in entries.items() if (info.external_attr >> 16) & 0o170000 == 0o120000]
    assert links == []


SMOKE = """
import sys, torch
from fastopt import Adam
from fastopt.command import main

p = torch.nn.Parameter(torch.ones(3))
opt = Adam([p], lr=0.1)
p.grad = torch.ones(3)
opt.step()
assert p.max() < 1
for arguments in (
    ["plan", "--params", "1e6", "--ranks", "4"],
    ["bench", "step", "--device", "cpu", "--models", "tiny", "--rules", "Adam", "--rounds", "1", "--seconds", "0.01",
     "--no-first", "--out", "step.json"],
    ["doctor", "--json", *sys.argv[1:]],
):
    print("==", *arguments, flush=True)
    assert not main(arguments, "fastopt", standalone_mode=False)
"""


def installed(package: Path, folder: Path) -> Path:
    """An environment that has nothing but `package`, and sees what it needs in the one that runs the tests."""
    venv.create(folder, with_pip=False)
    site = folder / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    (site / "others.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n")
    options = ("--quiet", "--no-index", "--no-deps", "--no-build-isolation", "--ignore-installed")
    pip = (sys.executable, "-m", "pip", "--disable-pip-version-check", "--python", folder / "bin" / "python")
    run_command(*pip, "install", *options, package, env={"PYTHONPATH": ""}, cwd=folder)
    assert {path.name.partition("-")[0] for path in site.iterdir()} == {"fastopt", "others.pth"}
    return folder


# Ranks are started from one of the two: that is where most of the time goes.
@pytest.mark.parametrize(("kind", "options"), [("wheel", ()), ("sdist", ("--no-ranks",))])
def test_what_is_installed_works(
    kind: str, options: tuple[str, ...], source: Path, sdist: Path, tmp_path: Path
) -> None:
    package = sdist if kind == "sdist" else build("wheel", source, tmp_path / "out")
    environment = installed(package, tmp_path / "environment")
    work = tmp_path / "work"
    work.mkdir()
    env = {"PYTHONPATH": ""}
    assert "doctor" in run_command(environment / "bin" / "fastopt", "--help", env=env, cwd=work).stdout
    printed = run_command(environment / "bin" / "python", "-c", SMOKE, *options, env=env, cwd=work).stdout
    assert "on 4 ranks" in printed
    assert json.loads((work / "step.json").read_text())["rows"][0]["who"] == "fastopt"
    found = json.loads(printed.split("== doctor")[1].partition("\n")[2])
    texts = {finding["name"]: finding["text"] for finding in found["findings"]}
    assert f" in {environment}" in texts["fastopt"]
    assert ("gloo on 2 ranks" in texts) == (not options)


def listed(name: str) -> dict[str, str]:
    """The packages of a list of requirements and their versions, "" where it has none."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / name).read_text().splitlines()]
    assert [line for line in lines if "/" in line or "@" in line] == []
    pairs = [line.partition("==") for line in lines if line]
    return {name.lower().replace("_", "-"): version for name, _, version in pairs}


def names(requirements: list[str]) -> set[str]:
    return {line.partition(">=")[0].partition("[")[0].lower() for line in requirements}


def test_constraints_name_every_direct_requirement_and_no_place() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    needed = set().union(*(names(lines) for extra, lines in extras.items() if extra != "clients"))
    needed |= names(PROJECT["project"]["dependencies"])
    assert needed - listed("constraints.txt").keys() == {"fastopt"}


def test_the_list_for_clients_has_the_extra_and_a_version_of_each() -> None:
    clients, pinned = listed("requirements-clients.txt"), listed("constraints.txt")
    assert names(PROJECT["project"]["optional-dependencies"]["clients"]) <= clients.keys()
    assert names(PROJECT["project"]["dependencies"]) <= clients.keys()
    assert {name for name, version in clients.items() if not version and name not in pinned} == set()
    assert {name for name, version in clients.items() if version and name in pinned} == set()
    assert "torchvision" not in clients
