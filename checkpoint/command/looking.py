"""`ls` and `show`: what there is, without reading the data."""

from __future__ import annotations

import math
import os
from collections import Counter
from pathlib import Path
from typing import Any

import click

from ...command.answers import as_json, say_no
from ...command.printing import Size, print_json, print_table, say
from ...pieces import Shape
from ..catalog import Found, find, survey
from ..errors import CheckpointError
from ..format.dtypes import DTYPES
from ..format.manifest import from_bytes
from ..format.records import MANIFEST, Manifest, StoredTensor, part_of, rank_of
from ..format.values import decode
from ..io.storage import open_storage
from . import places


@click.command(short_help="List the checkpoints of a run.")
@places.url
@as_json
@places.command
def ls(url: str, as_json: bool) -> None:
    """List the checkpoints under URL, and what keeps any from being complete.

    \b
    Example:  fastopt checkpoint ls /data/run1
    """
    storage = open_storage(places.place(url).root)
    everything = survey(storage)
    rows = [_about(found) for found in everything]
    if as_json:
        print_json(rows)
    elif not rows:
        say(f"nothing at {storage.url}")
    else:
        columns = ("step", "state", "saved", "ranks", "size", "files")
        print_table(columns, [[row[c] if c != "size" else Size(row["bytes"]) for c in columns] for row in rows])
        for found in everything:
            if found.problem is not None and MANIFEST in found.sizes:
                say(found.problem)
    if not any(found.complete for found in everything):
        say_no()


def _about(found: Found) -> dict[str, Any]:
    manifest = found.manifest
    if found.complete:
        state = "verified" if found.verified else "complete"
    else:
        state = "damaged" if MANIFEST in found.sizes else "unfinished"
    here = sum(size or 0 for size in found.sizes.values())
    return {
        "step": found.step,
        "state": state,
        "saved": manifest and manifest.created,
        "ranks": manifest and manifest.world_size,
        "bytes": manifest.nbytes if manifest else here,
        "files": len(manifest.files) if manifest else len(found.sizes),
        "url": found.url,
        "problem": found.problem,
    }


@click.command(short_help="Say what is in a checkpoint.")
@places.url
@places.step
@click.option("--tensors", metavar="TEXT", help="List the tensors whose key contains TEXT ('' for all).")
@click.option("--plot", type=click.Path(dir_okay=False, writable=True), help="Draw which rank wrote what: .png, .svg.")
@as_json
@places.command
def show(url: str, step: int | None, tensors: str | None, plot: str | None, as_json: bool) -> None:
    """Say what is in a checkpoint: parts, groups with their hyper-parameters, states, sizes.

    \b
    Example:  fastopt checkpoint show s3://bucket/run1 --step 1000 --tensors attn --plot ranks.png
    """
    at = places.place(url, step)
    storage = open_storage(at.root)
    folder, data = find(storage, at.step)
    manifest = from_bytes(data)
    if plot is not None:
        draw(manifest, plot)
    if as_json:
        print_json({"url": f"{storage.url}/{folder}", **_summary(manifest), "tensors": _tensors(manifest, tensors)})
        return
    summary = _summary(manifest)
    say(f"{storage.url}/{folder}")
    say(
        f"step {manifest.step}, saved {manifest.created} by {_ranks(manifest.world_size)} with "
        + ", ".join(f"{name} {version}" for name, version in sorted(manifest.library.items()))
    )
    reused = {file.step for file in manifest.files} - {manifest.step}
    if reused:
        say(f"uses files of {'steps' if len(reused) > 1 else 'step'} {', '.join(map(str, sorted(reused)))}")
    print_table(
        ("part", "tensors", "elements", "size", "dtypes"),
        [[p["part"], p["tensors"], p["elements"], Size(p["bytes"]), ", ".join(p["dtypes"])] for p in summary["parts"]],
    )
    if summary["groups"]:
        names = list(dict.fromkeys(name for group in summary["groups"] for name in group["options"]))
        rows = [
            [i, len(g["params"]), *(decode(g["options"].get(name), name) for name in names)]
            for i, g in enumerate(summary["groups"])
        ]
        print_table(("group", "parameters", *names), rows)
    for what in ("scheduler", "scaler", "loader", "extra"):
        if summary[what]:
            value = summary[what] if what == "extra" else decode(summary[what], what)
            say(f"{what}: {str(value)[:300]}")
    if tensors is not None:
        print_table(
            ("tensor", "dtype", "shape", "size", "ranks"),
            [[t["key"], t["dtype"], t["shape"], Size(t["bytes"]), t["ranks"]] for t in _tensors(manifest, tensors)],
        )


def _ranks(n: int) -> str:
    return f"{n} rank{'s' * (n != 1)}"


def _summary(manifest: Manifest) -> dict[str, Any]:
    parts: dict[str, list[StoredTensor]] = {}
    for key in sorted(manifest.tensors):
        parts.setdefault(part_of(key), []).append(manifest.tensors[key])
    opt = manifest.opt
    return {
        "step": manifest.step,
        "created": manifest.created,
        "world_size": manifest.world_size,
        "library": manifest.library,
        "bytes": manifest.nbytes,
        "files": [{"path": file.path, "bytes": file.bytes} for file in manifest.files],
        "parts": [
            {
                "part": part,
                "tensors": len(stored),
                "elements": sum(math.prod(t.shape) for t in stored),
                "bytes": sum(_nbytes(t.dtype, t.shape) for t in stored),
                "dtypes": sorted(Counter(t.dtype for t in stored)),
            }
            for part, stored in parts.items()
        ],
        "groups": [{"params": list(g.params), "options": dict(g.options)} for g in opt.groups] if opt else [],
        "scheduler": manifest.scheduler,
        "scaler": manifest.scaler,
        "loader": list(manifest.loader),
        "extra": manifest.extra,
    }


def _nbytes(dtype: str, shape: Shape) -> int:
    return math.prod(shape) * DTYPES[dtype].itemsize


def _tensors(manifest: Manifest, text: str | None) -> list[dict[str, Any]]:
    return [
        {
            "key": key,
            "dtype": tensor.dtype,
            "shape": list(tensor.shape),
            "bytes": _nbytes(tensor.dtype, tensor.shape),
            "ranks": len({rank_of(manifest.files[int(n)].name) for n in tensor.shards.file}),
        }
        for key, tensor in sorted(manifest.tensors.items())
        if text is None or text in key
    ]


def draw(manifest: Manifest, file: str) -> None:
    """Draw a plot into `file`."""
    if Path(file).suffix.lower() not in {".png", ".svg", ".pdf"}:
        raise CheckpointError(f"cannot draw {file}: the name of a plot ends with .png, .svg or .pdf")
    folder = os.path.dirname(file) or "."
    if not os.path.isdir(folder):
        raise CheckpointError(f"cannot draw {file}: there is no folder {folder}")
    from .plot import draw_ranks

    draw_ranks(manifest, file)
