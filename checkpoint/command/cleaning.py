"""`prune`: remove what is no longer needed."""

from __future__ import annotations

import sys

import click

from ...command.answers import Failed, Number, as_json, say_no
from ...command.printing import print_json, print_table, say
from ..catalog import step_numbers
from ..errors import CheckpointError
from ..io.storage import open_storage
from ..retention import GRACE, Plan, carry_out, plan_prune
from . import places


@click.command(short_help="Remove old checkpoints and leftovers.")
@places.url
@click.option("--keep-last", type=click.IntRange(1), required=True, help="How many of the newest stay.")
@click.option(
    "--keep-every", type=click.IntRange(1), help="The first from every multiple of so many steps on stays too."
)
@click.option("--grace", type=Number(0), default=GRACE / 3600, show_default=True, metavar="HOURS",
              help="Files of unfinished saves that are younger stay: the save may be running.")  # fmt: skip
@click.option("--dry-run", is_flag=True, help="Only say what would go.")
@click.option("--yes", is_flag=True, help="Do not ask.")
@as_json
@places.command
def prune(
    url: str, keep_last: int, keep_every: int | None, grace: float, dry_run: bool, yes: bool, as_json: bool
) -> None:
    """Remove old checkpoints, and what saves that died have left behind.

    The newest verified checkpoint stays, and every one whose files another one uses. Damaged ones are left alone.

    \b
    Example:  fastopt checkpoint prune /data/run1 --keep-last 3 --keep-every 1000 --dry-run
    """
    at = places.place(url)
    if at.step is not None:
        raise click.UsageError("prune works on all checkpoints of a run: give it the folder above the steps")
    storage = open_storage(at.root)
    if not step_numbers(storage):
        raise CheckpointError(f"there is no checkpoint at {storage.url}")
    plan = plan_prune(storage, keep_last, keep_every, grace * 3600)
    if not as_json:
        _print(plan)
    work = bool(plan.steps or plan.leftovers) and not dry_run
    if work and not yes:
        if as_json or not sys.stdin.isatty():
            raise Failed("nothing was removed: there is nobody to ask; pass --yes to remove, or --dry-run")
        if not click.confirm("Remove?", err=True):
            say("nothing was removed")
            say_no()
        plan = plan.within(plan_prune(storage, keep_last, keep_every, grace * 3600))  # a job may have saved meanwhile
    if work:
        carry_out(storage, plan)
    if as_json:
        stay = [{"step": step, "reason": reason} for step, reason in sorted(plan.reasons.items())]
        print_json({"remove": plan.steps, "leftovers": plan.leftovers, "stay": stay, "removed": work})
    elif work:
        say(f"removed {len(plan.steps)} checkpoints and {len(plan.leftovers)} leftover files")


def _print(plan: Plan) -> None:
    rows = [(step, "stays", reason) for step, reason in plan.reasons.items()]
    rows += [(step, "goes", "") for step in plan.steps]
    if rows:
        print_table(("step", "", "reason"), sorted(rows))
    for path in plan.leftovers:
        say(f"goes: {path}, of a save that died")
    if not (plan.steps or plan.leftovers):
        say("nothing to remove")
