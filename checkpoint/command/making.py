"""`consolidate` and `export-hf`: other files with the same content."""

from __future__ import annotations

import click

from ...command.answers import Number, as_json
from ...command.printing import print_json, progress, say
from ..format.dtypes import DTYPES
from ..io.storage import open_storage
from ..offline.consolidation import consolidate as write_whole
from ..offline.export import export_hf as write_hf
from . import places


@click.command(short_help="Write a sharded checkpoint again, each tensor whole.")
@places.url
@click.argument("destination")
@places.step
@as_json
@places.command
def consolidate(url: str, destination: str, step: int | None, as_json: bool) -> None:
    """Write a checkpoint of many ranks again under DESTINATION, each tensor whole, as one process would have saved it.

    The result is a checkpoint like any other, of plain safetensors files, and needs no files of other steps. Memory:
    some tens of MiB, however large the tensors are (one file, where DESTINATION is an object store).

    \b
    Example:  fastopt checkpoint consolidate s3://bucket/run1 /data/whole --step 1000
    """
    at = places.place(url, step)
    with progress("consolidating") as tell:
        made = write_whole(at.root, destination, at.step, tell)
    print_json({"url": made}) if as_json else say(made)


@click.command("export-hf", short_help="Write the weights as Hugging Face has them.")
@places.url
@click.argument("destination")
@places.step
@click.option("--dtype", type=click.Choice(["F64", "F32", "F16", "BF16"]), help="Round floating point numbers to this.")
@click.option("--file-gb", type=Number(0, min_open=True), default=5.0, show_default=True, help="GB per file.")
@as_json
@places.command
def export_hf(url: str, destination: str, step: int | None, dtype: str | None, file_gb: float, as_json: bool) -> None:
    """Write the model's weights into the folder DESTINATION as Hugging Face's libraries load them.

    \b
    Example:  fastopt checkpoint export-hf /data/run1 /data/export --dtype BF16
    """
    at = places.place(url, step)
    with progress("exporting") as tell:
        names = write_hf(at.root, destination, at.step, DTYPES[dtype] if dtype else None, tell, int(file_gb * 1e9))
    folder = open_storage(destination).url
    print_json({"url": folder, "files": names}) if as_json else say(f"{folder}: {', '.join(names)}")
