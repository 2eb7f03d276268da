"""`verify` and `diff`: commands that read the data."""

from __future__ import annotations

from dataclasses import asdict

import click

from ...command.answers import as_json, say_no
from ...command.printing import Size, print_json, print_table, progress, say
from ..catalog import survey
from ..errors import CheckpointError
from ..format.records import MANIFEST
from ..io.storage import open_storage
from ..offline.difference import diff as find_differences
from ..verifying import Verified
from ..verifying import verify as verify_one
from . import places


@click.command(short_help="Check every byte of a checkpoint.")
@places.url
@places.step
@click.option("--all", "everything", is_flag=True, help="Every checkpoint under URL that has a manifest.")
@click.option("--no-mark", is_flag=True, help="Leave no note of what was found.")
@as_json
@places.command
def verify(url: str, step: int | None, everything: bool, no_mark: bool, as_json: bool) -> None:
    """Read every byte of a checkpoint and compare it with its checksum.

    Without a step: the newest that was completed, damaged since or not. A sound checkpoint gets a note beside it, so
    that no pruning removes the newest of these; a damaged one gets a note that makes it count as not complete. Exit
    code 1 where anything is damaged, with file, bytes and tensor.

    \b
    Example:  fastopt checkpoint verify s3://bucket/run1 --all
    """
    at = places.place(url, step)
    if everything and at.step is not None:
        raise click.UsageError("--all and a step exclude each other")
    numbers: list[int | None] = [at.step]
    if everything:
        numbers = [found.step for found in survey(open_storage(at.root)) if MANIFEST in found.sizes]
        if not numbers:
            raise CheckpointError(f"there is no checkpoint at {at.root}")
    reports: list[Verified] = []
    for number in numbers:
        with progress(f"verifying {'the newest' if number is None else f'step {number}'}") as tell:
            reports.append(verify_one(at.root, number, tell, mark=not no_mark))
        if not as_json:
            _print(reports[-1])
    if as_json:
        print_json([{**asdict(report), "sound": report.sound} for report in reports])
    if not all(report.sound for report in reports):
        say_no()


def _print(report: Verified) -> None:
    if report.sound:
        say(f"step {report.step} is sound: {Size(report.nbytes)} in {report.files} files")
        return
    say(f"step {report.step} is damaged:")
    for problem in report.problems:
        say(f"  {problem}")


@click.command(short_help="Compare two checkpoints.")
@click.argument("left")
@click.argument("right")
@click.option("--values/--no-values", default=True, help="Compare the elements of tensors too (read both), or not.")
@as_json
@places.command
def diff(left: str, right: str, values: bool, as_json: bool) -> None:
    """Compare two checkpoints: names, shapes, hyper-parameters, and every element.

    How they are cut into files, and by how many ranks, makes no difference. Exit code 1 where they differ.

    \b
    Example:  fastopt checkpoint diff /data/run1/step-00001000 s3://bucket/copy
    """
    a, b = places.place(left), places.place(right)
    with progress("comparing") as tell:
        found = find_differences(a.root, b.root, a.step, b.step, values, tell)
    if as_json:
        print_json([asdict(difference) for difference in found])
    elif not found:
        say("no difference" if values else "no difference but perhaps in the elements")
    for kind, columns in (
        ("tensor", ("tensor", "left", "right")),
        ("setting", ("setting", "left", "right")),
        ("values", ("values of", "elements that differ", "largest difference")),
    ):
        rows = [[d.what, d.left, d.right] for d in found if d.kind == kind]
        if rows and not as_json:
            print_table(columns, [[what, _short(x), _short(y)] for what, x, y in rows])
    if found:
        say_no()


def _short(value: object) -> object:
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None:
        return "-"
    return value if isinstance(value, int) and not isinstance(value, bool) else str(value)[:60]
