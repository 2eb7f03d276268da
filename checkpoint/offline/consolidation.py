"""A sharded checkpoint made whole: the same content in files that hold every tensor in one piece."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import chain

import xxhash

from ...pieces import Box
from ..catalog import check_root, find
from ..contents.plan import pack
from ..errors import CheckpointError
from ..format.datafile import Item, Origin, header
from ..format.dtypes import DTYPES, memory
from ..format.manifest import from_bytes, place, to_bytes
from ..format.records import INDEX, MANIFEST, DataFile, Manifest, StoredTensor, step_folder
from ..format.shards import Shards
from ..io.storage import Storage, open_storage
from ..saving.assemble import hugging_face_index
from .windows import Progress, Source, hashed, shapes_only

PART_BYTES = 512 << 20


def consolidate(
    url: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    step: int | None = None,
    progress: Progress | None = None,
    part_bytes: int = PART_BYTES,
) -> str:
    """Write the checkpoint of `step` (default: the newest complete one) under `url` again, under `destination`.

    There every tensor lies whole in one plain safetensors file, as if one process had saved it; files of earlier steps
    are copied in. Values, hyper-parameters and random generators of all ranks are the same. Returns the URL of the new
    step folder. Files have at most `part_bytes` of data, those of a larger tensor aside.

    Everything read is verified. Memory: some tens of MiB; where `destination` is an object store, one file. After an
    error nothing is left at `destination`. Not collective.
    """
    source, target = open_storage(url), open_storage(destination)
    check_root(target.url)
    folder, data = find(source, step)
    manifest = from_bytes(data)
    if MANIFEST in target.sizes(folder):
        raise CheckpointError(f"step {manifest.step} is already saved at {target.url}/{folder}")
    work = _Consolidation(source, target, manifest, progress, part_bytes)
    try:
        work.run()
    except BaseException:
        work.discard()
        raise
    return f"{target.url}/{folder}"


class _Consolidation:
    def __init__(
        self, source: Storage, target: Storage, manifest: Manifest, progress: Progress | None, part_bytes: int
    ) -> None:
        self.target, self.manifest, self.part_bytes = target, manifest, part_bytes
        total = sum(file.bytes - file.header for file in manifest.files)
        self.source = Source(source, manifest, progress, total)
        self.save_id = secrets.token_hex(4)
        self.folder = step_folder(manifest.step)
        self.created: list[str] = []

    def run(self) -> None:
        """Write the files, then the manifest."""
        self.target.make_folder(self.folder)
        files: list[DataFile] = []
        tensors: dict[str, StoredTensor] = {}
        for kind in ("model", "s"):
            keys = [key for key in self.manifest.tensors if key.startswith("model/") == (kind == "model")]
            items = [self._item(key) for key in keys]
            parts = pack([(i.key, i.box, i.data.element_size()) for i in items], self.part_bytes, cut=False)
            for number, part in enumerate(parts):
                chosen = [items[written.source] for written in part]
                for item in chosen:
                    shards = Shards.intervals(item.shape, [len(files)], [0], [item.data.numel()])
                    tensors[item.key] = StoredTensor(item.dtype, item.shape, shards)
                files.append(self._write(kind, number, chosen))
        whole = replace(self.manifest, save_id=self.save_id, files=tuple(files), tensors=place(tuple(files), tensors))
        self.target.sync_folder(self.folder)
        index = hugging_face_index(whole)
        if index is not None:
            self._publish(INDEX, index)
        self._publish(MANIFEST, to_bytes(whole))

    def _publish(self, name: str, data: bytes) -> None:
        path = f"{self.folder}/{name}"
        self.created.append(path)
        try:
            self.target.publish(path, data)
        except FileExistsError as error:  # of somebody else
            self.created.remove(path)
            raise CheckpointError(f"{self.target.url}/{path} is there already") from error

    def _item(self, key: str) -> Item:
        stored = self.manifest.tensors[key]
        data = shapes_only(stored.shape, DTYPES[stored.dtype])
        return Item(key, stored.dtype, stored.shape, Box.whole(stored.shape), data)

    def _write(self, kind: str, number: int, items: Sequence[Item]) -> DataFile:
        origin = Origin(kind, self.save_id, self.manifest.step, 0, self.manifest.world_size, number)
        head = header(items, origin)
        digests: list[str] = []
        path = f"{self.folder}/{origin.file_name}"
        self.created.append(path)
        self.target.create(path, chain([head], hashed(self._data(items), self.manifest.block, digests)))
        size = len(head) + sum(item.nbytes for item in items)
        digest = xxhash.xxh3_64_hexdigest(head)
        return DataFile(origin.file_name, size, len(head), digest, origin.step, "".join(digests))

    def _data(self, items: Sequence[Item]) -> Iterator[memoryview]:
        for item in items:
            for window in self.source.windows(item.key):
                yield memory(window)

    def discard(self) -> None:
        """After an error: nothing is left, as far as possible."""
        try:
            for path in reversed(self.created):  # the manifest first
                self.target.remove(path)
            self.target.remove_folder(self.folder)
        except Exception:  # the error that led here is the one to show
            return
