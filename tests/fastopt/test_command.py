"""The command `fastopt`: what it says about its sub-commands, without importing torch, and how it takes mistakes."""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib import import_module
from multiprocessing import get_context
from multiprocessing.synchronize import Event

import click
import pytest
import torch
from click.testing import CliRunner

import fastopt
from fastopt.bench import children
from fastopt.bench.children import deaf, ended_together
from fastopt.command import COMMANDS, main
from fastopt.command.printing import print_json, say

from ..commands import ROOT, run_command


def lazy() -> torch.nn.Module:
    """Parameters without a shape."""
    return torch.nn.LazyLinear(3)


def without_elements() -> torch.nn.Module:
    """A parameter with a shape of nothing."""
    return torch.nn.ParameterList([torch.zeros(0)])


def fails() -> torch.nn.Module:
    """As a mistake of the user does."""
    raise RuntimeError("in two\nlines")


HELPS = [(), ("doctor",), ("plan",), ("bench",), ("bench", "step"), ("bench", "zero"), ("bench", "checkpoint")]


def called(*arguments: str) -> tuple[int, str]:
    """Exit code and output of both streams of a call in this process."""
    done = CliRunner().invoke(main, arguments, prog_name="fastopt")
    return done.exit_code, done.output


@pytest.mark.parametrize("names", HELPS, ids=" ".join)
def test_help_shows_an_example_of_the_command_itself(names: tuple[str, ...]) -> None:
    code, text = called(*names, "--help")
    assert code == 0
    assert re.search(rf"^ +(Example:  )?{' '.join(('fastopt', *names))} ?\S", text, re.MULTILINE)


def test_every_sub_command_is_there_and_says_what_it_does() -> None:
    text = called("--help")[1].split("Commands:")[1]
    assert re.findall(r"^  (\S+) ", text, re.MULTILINE) == sorted(COMMANDS)
    assert "..." not in text
    for name, place in COMMANDS.items():
        command = getattr(import_module(place.module), place.name)
        assert isinstance(command, click.Command)
        assert command.name == name


def test_help_completion_and_version_do_not_import_torch() -> None:
    program = (
        "import sys\n"
        "from fastopt.command import main\n"
        "from click.shell_completion import ShellComplete\n"
        "completions = ShellComplete(main, {}, 'fastopt', '_FASTOPT_COMPLETE').get_completions\n"
        "print([c.value for c in completions([], '')], [c.value for c in completions(['bench'], 's')])\n"
        "for arguments in (['--help'], ['--version'], ['bench', '--help']):\n"
        "    main(arguments, 'fastopt', standalone_mode=False)\n"
        "print('torch' in sys.modules)\n"
    )
    lines = run_command(sys.executable, "-c", program).stdout.splitlines()
    assert lines[0] == "['bench', 'checkpoint', 'doctor', 'plan'] ['step']"
    assert fastopt.__version__ in lines
    assert lines[-1] == "False"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("frobnicate",), "No such command 'frobnicate'"),
        (("chekpoint", "ls"), "Did you mean 'checkpoint'?"),
        (("plan", "--ranks", "2"), "--params or --model"),
        (("plan", "--params", "7e9", "--ranks", "0"), "'--ranks': 0 is not in the range 1<=x<=100000"),
        (("bench", "frobnicate"), "No such command 'frobnicate'"),
        (("bench", "step", "--models", "huge"), "'huge' is none of llama-1.3b"),
        (("bench", "step", "--chart", "nowhere.json", "-o", "x.svg"), "nowhere.json"),
        (("plan", "--params", "inf", "--ranks", "2"), "'--params': inf is not"),
        (("plan", "--params", "1e30", "--ranks", "2"), "'--params': 1e+30 is not in the range"),
        (("plan", "--params", "1e6", "--ranks", "100000000"), "'--ranks': 100000000 is not in the range"),
        (("plan", "--params", "1e6", "--ranks", "2", "--dtype", "int8"), "--dtype int8 is no dtype that parameters"),
        (("plan", "--model", "torch.nn:Identity", "--ranks", "2", "--dtype", "int8"), "--dtype goes with --params"),
        (("plan", "--model", "fastopt.nowhere:x", "--ranks", "2"), "No module named 'fastopt.nowhere'"),
        (("plan", "--model", f"{__name__}:lazy", "--ranks", "2"), "'weight' has no shape yet"),
        (("plan", "--model", f"{__name__}:without_elements", "--ranks", "2"), "have no elements"),
        (("plan", "--model", f"{__name__}:fails", "--ranks", "2"), "RuntimeError: in two lines"),
        (("plan", "--params", "1e6", "--ranks", "2", "--optimizer", "LBFGS"), "LBFGS cannot be made without numbers"),
        (("plan", "--params", "1e6", "--ranks", "2", "--optimizer", "Optimizer"), "is no optimizer of"),
        (("plan", "--params", "1e6", "--ranks", "2", "--bucket-mb", "inf"), "'--bucket-mb': inf is not"),
        (("plan", "--params", "1e6", "--ranks", "2", "--bucket-mb", "nan"), "'--bucket-mb': nan is not a finite"),
        (("bench", "step", "--rounds", "0"), "--rounds: 0 is no whole number of at least 1"),
        (("bench", "step", "--seconds", "nan"), "--seconds: nan is no number"),
        (("bench", "step", "--limit", "soon"), "--limit: soon is no number"),
        (("bench", "step", "--out", "/"), "--out: / is a folder"),
        (("bench", "zero", "--ranks", "2", "--iterations", "0"), "--iterations: 0 is no whole number of at least 1"),
        (("bench", "zero", "--ranks", "2", "--peers", "/nowhere"), "--peers: there is no folder /nowhere"),
        (("bench", "checkpoint", "--scale", "0"), "--scale: 0 is no number above 0"),
        (("bench", "checkpoint", "--out", "/"), "--out: / is a folder"),
        (("bench", "zero"), "add --ranks N, or start it with torchrun"),
        (("bench", "zero", "--ranks", "0"), "--ranks 0"),
        (("bench", "zero", "--ranks", "2", "--only", "horovod"), "'horovod' is none of stage2"),
        (("bench", "checkpoint", "--folder", "/nowhere"), "there is no folder /nowhere"),
        (("bench", "checkpoint", "--rounds", "0"), "--rounds: 0 is no whole number"),
        (("doctor", "--ranks", "1"), "--ranks"),
        (("doctor", "--timeout", "nan"), "'--timeout': nan is not a finite number"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_answered_by_a_sentence(arguments: tuple[str, ...], says: str) -> None:
    code, text = called(*arguments)
    assert code == 2
    assert says in text.splitlines()[-1]
    assert "Traceback" not in text


def test_what_the_system_refuses_is_a_sentence() -> None:
    code = "from fastopt.command import main; main(['plan', '--params', '1e6', '--ranks', '2'])"
    with open("/dev/full", "w") as full:
        done = subprocess.run([sys.executable, "-c", code], stdout=full, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr.splitlines()[0] == "Error: OSError: [Errno 28] No space left on device"


def test_ctrl_c_has_an_exit_code_of_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    def pressed(*args: object, **kwargs: object) -> None:
        raise KeyboardInterrupt

    for module, arguments in (
        ("fastopt.distributed.command.make_plan", ("plan", "--params", "1e6", "--ranks", "2")),
        ("fastopt.bench.checkpoint.command.plan", ("bench", "checkpoint", "--only", "plan")),
    ):
        monkeypatch.setattr(module, pressed)
        assert called(*arguments) == (130, "\ninterrupted\n")
    with pytest.raises(SystemExit, match="130"):
        import_module("fastopt.bench.checkpoint.command").main(["--only", "plan"])


@pytest.mark.parametrize(
    "code",
    [
        "from fastopt.command import main; main(['--help'])",
        "with ended_by_others(): print('not flushed'); raise Exit(1)",
        "with ended_by_others(): print_table(['a'], [['b']])",
    ],
)
def test_a_reader_that_has_enough_is_no_answer(code: str) -> None:
    names = (
        "from click.exceptions import Exit\nfrom fastopt.command.ending import ended_by_others\n"
        "from fastopt.command.printing import print_table\n"
    )
    reads, writes = os.pipe()
    os.close(reads)
    with open(writes, "wb") as pipe:
        done = subprocess.run([sys.executable, "-c", names + code], stdout=pipe, stderr=subprocess.PIPE, cwd=ROOT)
    assert (done.returncode, done.stderr) == (141, b"")


@pytest.fixture
def hears() -> Iterator[None]:
    """This process hears Ctrl-C, which one that a shell has started in the background does not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def sleep(hears_term: bool, ready: Event) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_DFL if hears_term else signal.SIG_IGN)
    ready.set()
    time.sleep(600)


@pytest.mark.usefixtures("hears")
@pytest.mark.parametrize("hears_term", [True, False])
def test_processes_of_a_benchmark_end_with_it(hears_term: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also those of whom a library, or a hang, has made that they do not end when asked."""
    monkeypatch.setattr(children, "_GRACE", 300.0 if hears_term else 0.1)
    fork = get_context("fork")
    ready = fork.Event()
    child = fork.Process(target=sleep, args=(hears_term, ready))

    def measure() -> None:
        with ended_together():
            with deaf():
                child.start()
            assert ready.wait(60)
            os.kill(child.pid or 0, signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        measure()
    assert child.exitcode == (-signal.SIGTERM if hears_term else -signal.SIGKILL)


def test_a_package_that_is_missing_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "fastopt.doctor.command", None)
    monkeypatch.setitem(COMMANDS, "doctor", COMMANDS["doctor"]._replace(module="fastopt.doctor.command"))
    code, text = called("doctor")
    assert code == 2
    assert text.splitlines()[-1].startswith("Error: import of fastopt.doctor.command halted")


def test_json_is_json_and_long_lines_stay_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    out = io.StringIO()
    monkeypatch.setattr(sys, "stdout", out)
    print_json({"largest": math.inf, "list": [math.nan, (1.5, -math.inf)], "text": "inf"})

    def refuse(text: str) -> None:
        raise AssertionError(text)

    found = json.loads(out.getvalue(), parse_constant=refuse)
    assert found == {"largest": "inf", "list": ["nan", [1.5, "-inf"]], "text": "inf"}
    out.seek(0)
    out.truncate()
    monkeypatch.setattr(out, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("COLUMNS", "30")
    path = "/a/long path/" + "x" * 60 + "/step-00000001"
    say(path)
    assert out.getvalue() == path + "\n"


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU here")
@pytest.mark.parametrize("what", ["step", "checkpoint"])
def test_a_benchmark_without_the_gpu_that_it_is_told_to_use(what: str) -> None:
    code, text = called("bench", what, "--device", "cuda")
    assert (code, text.splitlines()[-1][-37:]) == (2, "--device cuda: here is no CUDA device")


def test_all_names_of_the_package_are_there_and_others_are_not() -> None:
    assert fastopt.Adam.__module__ == "fastopt.optimizers"
    assert set(fastopt.__all__) <= set(dir(fastopt))
    with pytest.raises(AttributeError, match="module 'fastopt' has no attribute 'Adamw'"):
        _ = fastopt.Adamw  # type: ignore[attr-defined]
