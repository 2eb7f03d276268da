"""The text, its split by file, and the order of the rows.

Everything here is a pure function of the files, the seed and the step. No rank, no world size and no state comes in,
so a run that resumes on another number of ranks sees the same rows in the same order.
"""

from __future__ import annotations

import hashlib
import itertools
import posixpath
import struct
import sysconfig
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import fsspec
import fsspec.core
import numpy as np
import torch
from torch import Tensor

from .config import check_shares
from .errors import JobError

VALIDATION_SHARE = 0.1
SKIPPED_FOLDERS = frozenset({"site-packages", "dist-packages", "__pycache__", "test", "tests", "idle_test"})


@dataclass(frozen=True)
class Source:
    """One file: the name that decides its side and place, and how it is read."""

    name: str
    fs: fsspec.AbstractFileSystem
    path: str

    def read(self, limit: int) -> bytes:
        """At most the first `limit` bytes."""
        with self.fs.open(self.path, "rb") as file:
            data: bytes = file.read(limit)
        return data


@dataclass(frozen=True)
class Corpus:
    """The bytes to learn from and to be judged on."""

    train: Tensor  # [n_train] uint8
    val: Tensor  # [n_val] uint8
    train_files: tuple[str, ...]
    val_files: tuple[str, ...]

    @property
    def fingerprint(self) -> str:
        """A digest of both texts: equal where and only where the data is."""
        digest = hashlib.blake2b(digest_size=16)
        for text in (self.train, self.val):
            digest.update(struct.pack("<Q", text.numel()))
            digest.update(text.numpy().tobytes())
        return digest.hexdigest()


def _hash(*parts: object) -> int:
    """64 bits that depend on `parts` alone: the same on every machine and in every version."""
    text = "\0".join(str(part) for part in parts).encode("utf-8", "surrogateescape")
    return int.from_bytes(hashlib.blake2b(text, digest_size=8).digest(), "little")


def standard_library() -> list[Source]:
    """The `.py` files of the standard library that runs this, without tests and installed packages."""
    root = Path(sysconfig.get_path("stdlib"))
    fs = fsspec.filesystem("file")
    found = (path for path in root.rglob("*.py") if path.is_file())
    relative = ((path.relative_to(root), path) for path in found)
    return [Source(r.as_posix(), fs, str(path)) for r, path in relative if not SKIPPED_FOLDERS & set(r.parts[:-1])]


def find_sources(urls: Sequence[str]) -> list[Source]:
    """The files behind files, folders, globs and fsspec URLs; names are relative to the folder given."""
    sources: list[Source] = []
    for url in urls:
        try:
            found = _find(url)
        except Exception as error:  # a store of fsspec may raise anything
            raise JobError(f"--data {url} cannot be read: {error}") from error
        if not found:
            raise JobError(f"--data {url} matches no file")
        sources += found
    return sources


def _find(url: str) -> list[Source]:
    fs, path = fsspec.core.url_to_fs(url)
    if any(c in path for c in "*?["):
        files = [p for p in fs.glob(path) if fs.isfile(p)]
        fixed = path[: min(path.index(c) for c in "*?[" if c in path)]
        root = fixed.rpartition("/")[0]
    elif fs.isdir(path):
        root = path.rstrip("/")
        found = fs.find(path, detail=True).items()  # a linked folder is among them, neither file nor followed
        files = [p for p, about in found if not _hidden(p[len(root) :]) and (about["type"] == "file" or fs.isfile(p))]
    else:
        root, files = posixpath.dirname(path), [path] if fs.exists(path) else []
    return [Source(p[len(root) :].lstrip("/"), fs, p) for p in files]


def _hidden(relative: str) -> bool:
    return any(part.startswith(".") for part in relative.split("/"))


def split(names: Sequence[str]) -> tuple[list[int], list[int]]:
    """Indices of the train and of the validation files, each in the order of the hashes of their names.

    A name goes to validation when its hash is in the lowest tenth, so adding a file moves no other. Both sides get at
    least one file where there are two.
    """
    order = sorted(range(len(names)), key=lambda i: (_hash("split", names[i]), names[i]))
    low = sum(_hash("split", name) < VALIDATION_SHARE * 2**64 for name in names)
    cut = min(max(low, 1), len(names) - 1) if len(names) > 1 else 0
    return order[cut:], order[:cut]


def _gather(sources: Sequence[Source], chosen: Sequence[int], limit: int) -> tuple[Tensor, tuple[str, ...]]:
    """The text of files until `limit` bytes are full, put together in the order of their names."""
    texts: dict[str, bytes] = {}
    for i in chosen:
        if limit <= 0:
            break
        text = sources[i].read(limit)
        limit -= len(text)
        texts[f"{sources[i].name}\0{i}"] = text
    keys = sorted(texts)
    joined = np.frombuffer(b"".join(texts[key] for key in keys), dtype=np.uint8).copy()
    return torch.from_numpy(joined), tuple(key.partition("\0")[0] for key in keys)


def read_corpus(urls: Sequence[str], limit: int, context: int) -> Corpus:
    """Both sides of the text, at most `limit` bytes together. A single file gives its last tenth to validation."""
    sources = sorted(find_sources(urls) if urls else standard_library(), key=lambda s: (s.name, s.path))
    if not sources:
        raise JobError("this Python has no readable standard library: pass --data with some text")
    train_ids, val_ids = split([source.name for source in sources])
    val_limit = int(limit * VALIDATION_SHARE)
    try:
        if val_ids:
            train, train_files = _gather(sources, train_ids, limit - val_limit)
            val, val_files = _gather(sources, val_ids, val_limit)
        else:
            text, train_files = _gather(sources, train_ids, limit)
            cut = text.numel() - int(text.numel() * VALIDATION_SHARE)
            train, val, val_files = text[:cut].clone(), text[cut:].clone(), train_files
    except Exception as error:
        raise JobError(f"a file of --data cannot be read: {error}") from error
    for side, part in (("train", train), ("validation", val)):
        if part.numel() <= context:
            raise JobError(f"the {side} text has {part.numel()} bytes, --context {context} needs more: add to --data")
    return Corpus(train, val, train_files, val_files)


def row_starts(seed: int, step: int, rows: Sequence[int], n_bytes: int, context: int) -> list[int]:
    """Where the rows `rows` of the global batch of step `step` begin in a text of `n_bytes` bytes."""
    return [_hash("row", seed, step, row) % (n_bytes - context) for row in rows]


def cut_rows(text: Tensor, starts: Sequence[int], context: int) -> Tensor:
    """`[len(starts), context + 1]` int64: each row with the byte after it."""
    at = torch.tensor(list(starts), dtype=torch.int64)[:, None] + torch.arange(context + 1)
    return text[at].long()


def shares(batch: int, world: int, accumulate: int) -> list[list[range]]:
    """Rows of the global batch per micro-batch and rank, `[accumulate][world]`: contiguous and as even as can be."""
    parts = world * accumulate
    check_shares(batch, world, accumulate)
    edges = [batch * i // parts for i in range(parts + 1)]
    ranges = [range(a, b) for a, b in itertools.pairwise(edges)]
    return [ranges[i * world : (i + 1) * world] for i in range(accumulate)]


def validation_starts(n_bytes: int, n_rows: int, context: int) -> list[int]:
    """Starts of `n_rows` rows spread evenly over a text of `n_bytes` bytes; fewer where they would overlap."""
    n_rows = max(1, min(n_rows, n_bytes // (context + 1)))
    last = n_bytes - context - 1
    return [last * i // max(n_rows - 1, 1) for i in range(n_rows)]


def byte_frequency_bits(train: Tensor, targets: Tensor) -> float:
    """Bits per byte of `targets` under the byte frequencies of `train`, each byte counted once more than it occurs."""
    counts = torch.bincount(train.long(), minlength=256).double() + 1
    bits = -(counts / counts.sum()).log2()
    return float(bits[targets.long()].mean())
