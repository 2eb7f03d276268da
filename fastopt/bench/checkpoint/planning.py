"""What many ranks work out for a save and a load, measured in one process and without any data."""

from __future__ import annotations

import math
import time
from typing import Any

import torch

from ...checkpoint.contents.plan import Use, Whole, block_bytes, pack, reads, share_out
from ...checkpoint.format.datafile import Item
from ...checkpoint.format.manifest import from_bytes, to_bytes
from ...checkpoint.format.records import (
    DataFile,
    Group,
    Manifest,
    ModelPart,
    OptPart,
    ParamStates,
    model_key,
    state_key,
)
from ...checkpoint.saving.assemble import assemble, rank_record
from ...checkpoint.saving.writing import PART_BYTES, FileRecord
from ...distributed import Layout, ParamSpec
from ...pieces import Box
from .state import llama

Shapes = list[tuple[str, tuple[int, ...]]]
Held = list[tuple[int, Box]]
"""What a rank has: numbers of parameters and boxes in them."""

STATES = ("grad_avg", "sqr_avg")


def plan(ranks: int) -> dict[str, Any]:
    """What rank 0 and each rank work out for a save and a load on many ranks, without any data: the layout that `shard`
    makes with its default buckets, two states per parameter, weights that all ranks have. In seconds of a processor."""
    shapes = list(llama().items())
    layout = Layout.even([ParamSpec(name, shape, torch.float32, 0) for name, shape in shapes], ranks)
    held = [
        [(n, box) for n in range(len(shapes)) for box in layout.boxes(n, rank) if box.numel] for rank in range(ranks)
    ]
    block = block_bytes(sum(3 * 4 * math.prod(shape) for _, shape in shapes))
    data, times = save_on_all(shapes, held, block)
    parsed, requests, more = load_on_one(shapes, held[ranks // 2], data, block)
    return {
        "ranks": ranks,
        "parts": sum(len(tensor.shards) for tensor in parsed.tensors.values()),
        "files": len(parsed.files),
        "manifest bytes": len(data),
        **times,
        **more,
        "requests of a rank": requests,
    }


def save_on_all(shapes: Shapes, held: list[Held], block: int) -> tuple[bytes, dict[str, float]]:
    """The manifest of a save by all ranks, and the seconds of the slowest and of rank 0."""
    start = time.process_time()
    weights = share_out([Whole(model_key(n), s, 4, cut=False) for n, s in shapes], [0] * len(held))
    shared = time.process_time() - start
    expected = {model_key(name): shape for name, shape in shapes}
    expected |= {state_key(name, key): shape for name, shape in shapes for key in STATES}
    keys = sorted(expected)
    number = {key: i for i, key in enumerate(keys)}
    records, slowest = [], 0.0
    for rank, own in enumerate(held):
        start = time.process_time()
        items = weights[rank] + [(state_key(shapes[n][0], key), box) for n, box in own for key in STATES]
        records.append(rank_record(files_of(rank, items, expected, block), number, expected))
        slowest = max(slowest, time.process_time() - start)
    start = time.process_time()
    files, tensors = assemble(records, keys, expected)
    opt = OptPart(
        dict(shapes),
        (Group(tuple(n for n, _ in shapes), {"lr": 1e-3}),),
        {n: ParamStates(STATES, {"step": 1}) for n, _ in shapes},
    )
    library = {"fastopt": "0", "torch": str(torch.__version__)}
    model = ModelPart(tuple(name for name, _ in shapes))
    manifest = Manifest(
        1, "0123abcd", "", len(held), library, block, files, tensors, model, opt, None, None, (), (), None
    )
    data = to_bytes(manifest)
    seconds = time.process_time() - start
    return data, {"save, each rank (slowest), s": shared + slowest, "save, rank 0, s": seconds}


def files_of(
    rank: int, items: list[tuple[str, Box]], expected: dict[str, tuple[int, ...]], block: int
) -> list[FileRecord]:
    """The files that a rank would write, with checksums of nothing."""
    empty = torch.empty(0)
    files = []
    for kind in ("model", "s"):
        mine = [(key, box, 4) for key, box in items if key.startswith("model/") == (kind == "model")]
        for part, written in enumerate(pack(mine, PART_BYTES, cut=kind != "model")):
            size = sum(each.nbytes for each in written)
            name = f"{kind}-0123abcd-r{rank:05d}-{part:03d}.safetensors"
            file = DataFile(name, 4096 + size, 4096, "0" * 16, 1, "0" * 16 * -(-size // block))
            stored = [Item(each.key, "F32", expected[each.key], each.box, empty) for each in written]
            files.append(FileRecord(kind, part, file, stored))
    return files


def load_on_one(shapes: Shapes, held: Held, data: bytes, block: int) -> tuple[Manifest, int, dict[str, float]]:
    """The manifest as it is read, the requests of a rank that holds `held`, and the seconds of both."""
    start = time.process_time()
    parsed = from_bytes(data)
    parse = time.process_time() - start
    start = time.process_time()
    uses: list[Use] = []
    for n, box in held:
        for key in STATES:
            for shard, common in parsed.tensors[state_key(shapes[n][0], key)].shards.meeting(box, 4):
                uses.append(Use(len(uses), shard.file, shard.at, shard.box, common, 4))
    requests = reads(uses, [(file.header, file.bytes) for file in parsed.files], block)
    each = time.process_time() - start
    return parsed, len(requests), {"load, parse, s": parse, "load, each rank, s": each}
