"""Writing one rank's data files, or finding that an earlier checkpoint has them already.

See [Note: unchanged files].
"""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain

import xxhash

from ..contents.plan import Written, pack
from ..format.datafile import Body, Item, Origin, header
from ..format.records import DataFile, Manifest
from ..format.shards import Shard
from ..io.gpu_copies import Devices
from ..io.storage import Storage

# [Note: unchanged files]
# What is not trained does not change between two checkpoints, and is the larger part of many jobs. Tensors of frozen
# parameters are kept in files of their own. A file whose tensors, boxes and checksums are all those of a file of the
# checkpoint before is not written again: the manifest names the earlier one, with the step in whose folder it lies.
# Names always refer to the file itself, never to another reference, and a file of less than 1 MiB is written
# anyway, so that it keeps no old step alive.

PART_BYTES = 512 << 20
LEAST_REUSED = 1 << 20
_AT_ONCE = 2  # files


@dataclass(frozen=True)
class FileRecord:
    """A data file and the items in it (without their data), in order."""

    kind: str
    part: int
    file: DataFile
    items: list[Item]


class Writer:
    """Writes the files of one rank for one save. `created` are the paths of those that it made, finished or not.

    block: bytes per checksum.
    """

    def __init__(self, storage: Storage, folder: str, origin: Origin, block: int) -> None:
        self.storage, self.folder, self.origin, self.block = storage, folder, origin, block
        self.created: list[str] = []
        self._parts = {"model": 0, "s": 0}
        self._lock = threading.Lock()

    def write(self, items: Sequence[Item], base: Manifest | None = None) -> list[FileRecord]:
        """Write `items`: the model's apart from all others, and those of frozen parameters apart from the rest.

        What the caller has queued on the current streams of the GPUs that they are on is waited for.

        base: an earlier checkpoint whose files may be used again.
        """
        Devices(item.data for item in items).wait()
        jobs: list[tuple[str, list[Item]]] = []
        if base is not None and (base.block != self.block or base.step >= self.origin.step):
            base = None
        for kind in ("model", "s"):
            for frozen in (False, True):
                chosen = [i for i in items if i.key.startswith("model/") == (kind == "model") and i.frozen is frozen]
                boxes = [(i.key, i.box, i.data.element_size()) for i in chosen]
                for part in pack(boxes, PART_BYTES, cut=kind != "model"):
                    jobs.append((kind, [_cut(chosen[w.source], w) for w in part]))
        with ThreadPoolExecutor(_AT_ONCE) as pool:  # the next is written while the one before is being synced
            done = [pool.submit(self._file, kind, cuts, base) for kind, cuts in jobs]
            return [each.result() for each in done]

    def _file(self, kind: str, items: list[Item], base: Manifest | None) -> FileRecord:
        body = Body(items, self.block)
        found = None if base is None else _unchanged(base, items, body)
        if found is not None:
            return FileRecord(kind, _part_of(found.name), found, items)
        with self._lock:
            part = self._parts[kind]
            self._parts[kind] += 1
        origin = Origin(**{**vars(self.origin), "kind": kind, "part": part})
        head = header(items, origin)
        path = f"{self.folder}/{origin.file_name}"
        self.created.append(path)
        self.storage.create(path, chain([head], body.chunks()))
        size = len(head) + sum(item.nbytes for item in items)
        digest = xxhash.xxh3_64_hexdigest(head)
        file = DataFile(origin.file_name, size, len(head), digest, origin.step, "".join(body.blocks))
        return FileRecord(kind, part, file, items)


def _unchanged(base: Manifest, items: Sequence[Item], body: Body) -> DataFile | None:
    """The file of `base` that holds exactly these items with the same data."""
    total = sum(item.nbytes for item in items)
    if total < LEAST_REUSED:
        return None
    homes = {_home(base, item) for item in items}
    number = homes.pop()
    if homes or number is None:
        return None
    file = base.files[number]
    return file if file.bytes - file.header == total and body.same_as(file.blocks) else None


def _home(base: Manifest, item: Item) -> int | None:
    """The number of the file of `base` that holds the item, in any state of it."""
    stored = base.tensors.get(item.key)
    if stored is None or (stored.dtype, stored.shape) != (item.dtype, item.shape):
        return None
    here: Iterator[Shard] = (shard for shard, _ in stored.shards.meeting(item.box, item.data.element_size()))
    return next((shard.file for shard in here if shard.box == item.box), None)


def _part_of(name: str) -> int:
    return int(name.removesuffix(".safetensors").rpartition("-")[2])


def _cut(item: Item, written: Written) -> Item:
    if written.box == item.box:
        return item
    local = written.box.relative_to(item.box)
    return Item(item.key, item.dtype, item.shape, written.box, item.data[local.slices], item.frozen)
