"""`fastopt bench`: the benchmarks as sub-commands."""

from __future__ import annotations

from importlib import import_module

import click

_BENCHMARKS = {
    "step": "Time optimizer steps, beside others' optimizers.",
    "zero": "Time training on several ranks, beside others' ways.",
    "checkpoint": "Time saving and loading, beside raw files and torch.",
}


@click.group()
def bench() -> None:
    """Time this library beside others, on this machine.

    Each command prints a table and has a --help of its own.

    \b
    Examples:
      fastopt bench step --out step.json
      fastopt bench zero --ranks 2
      fastopt bench checkpoint --folder /data
    """


def _command(name: str, short: str) -> click.Command:
    """The sub-command `name`. Its options, --help among them, are read by the benchmark itself."""

    @click.command(
        name,
        short_help=short,
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False},
    )
    @click.argument("options", nargs=-1, type=click.UNPROCESSED)
    def run(options: tuple[str, ...]) -> None:
        import_module(f"fastopt.bench.{name}.command").main(options, prog=f"fastopt bench {name}")

    return run


for _name, _short in _BENCHMARKS.items():
    bench.add_command(_command(_name, _short))
