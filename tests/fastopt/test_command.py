"""The command `fastopt`: what it says about its sub-commands, without importing torch, and how it takes mistakes."""

from __future__ import annotations

import re
import sys
from importlib import import_module

import click
import pytest
import torch
from click.testing import CliRunner

import fastopt
from fastopt.command import COMMANDS, main

from ..commands import run_command

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
        (("plan", "--params", "7e9", "--ranks", "0"), "'--ranks': 0 is not in the range x>=1"),
        (("bench", "frobnicate"), "No such command 'frobnicate'"),
        (("bench", "step", "--models", "huge"), "'huge' is none of llama-1.3b"),
        (("bench", "step", "--chart", "nowhere.json", "-o", "x.svg"), "nowhere.json"),
        (("bench", "zero"), "add --ranks N, or start it with torchrun"),
        (("bench", "zero", "--ranks", "0"), "--ranks 0"),
        (("bench", "zero", "--ranks", "2", "--only", "horovod"), "'horovod' is none of stage2"),
        (("bench", "checkpoint", "--folder", "/nowhere"), "there is no folder /nowhere"),
        (("bench", "checkpoint", "--rounds", "0"), "--rounds 0"),
        (("doctor", "--ranks", "1"), "--ranks"),
    ],
    ids=" ".join,
)
def test_a_mistake_is_answered_by_a_sentence(arguments: tuple[str, ...], says: str) -> None:
    code, text = called(*arguments)
    assert code == 2
    assert says in text.splitlines()[-1]
    assert "Traceback" not in text


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
