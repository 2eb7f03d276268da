"""Where checkpoints can be kept, and whether one comes back from there as it was."""

from __future__ import annotations

import itertools
import tempfile
import uuid
from collections.abc import Iterator, Sequence

import fsspec
import torch

from ..checkpoint import load, save
from ..checkpoint.io.storage import open_storage
from .findings import Finding, sentence

STORES = {"s3": "s3fs", "gs": "gcsfs", "abfs": "adlfs", "oci": "ocifs", "oss": "ossfs"}
"""Object stores, and the packages of fsspec's filesystems for them."""


def stores(url: str | None) -> Iterator[Finding]:
    """What is installed; a checkpoint in the temporary folder, and one under `url` if there is one."""
    with tempfile.TemporaryDirectory() as folder:
        yield round_trip("temporary folder", folder)
    for protocol, package in STORES.items():
        yield _store(protocol, package)
    if url is not None:
        yield under(url)


def _store(protocol: str, package: str) -> Finding:
    try:
        kind = fsspec.get_filesystem_class(protocol)
    except ImportError:
        return Finding("stores", f"{protocol}://", "note", f"not installed: pip install {package}")
    except Exception as error:  # a broken package may raise anything
        return Finding("stores", f"{protocol}://", "broken", f"{package}: {sentence(error)}")
    return Finding("stores", f"{protocol}://", "ok", f"{kind.__module__.split('.')[0]}, `--url` tries it")


def under(url: str) -> Finding:
    """A round trip in a new folder under `url`. What was made for it is removed, also when Ctrl-C ends it."""
    place = f"{url.rstrip('/')}/fastopt-doctor-{uuid.uuid4().hex}"
    found, problem = Finding("stores", url, "broken", "interrupted"), ""
    new = _missing(place)
    try:
        found = round_trip(url, place)
    finally:
        try:
            _remove(place, new)
        except Exception as error:  # whatever the store raises
            problem = f"{place} cannot be removed: {sentence(error)}"
    return Finding("stores", url, "broken", f"{found.text}, but {problem}") if problem else found


def _missing(place: str) -> list[str]:
    """The folders above `place` that are not there yet, the innermost first."""
    try:
        fs, path = fsspec.core.url_to_fs(place)
        above = [parent := fs._parent(path)]
        while parent != (parent := fs._parent(parent)):
            above.append(parent)
        return [fs.unstrip_protocol(folder) for folder in itertools.takewhile(lambda f: not fs.exists(f), above)]
    except Exception:  # whatever the store raises, the round trip will meet it again
        return []


def _remove(place: str, new: Sequence[str]) -> None:
    """Remove what is at `place`, and the folders `new` where nothing else has come into them."""
    fs, path = fsspec.core.url_to_fs(place)
    fs.invalidate_cache()
    if fs.exists(path):
        fs.rm(path, recursive=True)
    for folder in new:
        open_storage(folder).remove_folder("")


def round_trip(name: str, place: str) -> Finding:
    """Save a checkpoint to `place` and load it."""
    try:
        saved, loaded = _model(1), _model(2)
        save(place, step=1, model=saved)
        load(place, model=loaded)
    except Exception as error:  # whatever the store raises
        return Finding("stores", name, "broken", sentence(error))
    if not torch.equal(saved.weight, loaded.weight):
        return Finding("stores", name, "broken", "a checkpoint came back otherwise than it was saved")
    return Finding("stores", name, "ok", "a checkpoint was saved, loaded and verified")


def _model(seed: int) -> torch.nn.Linear:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.nn.Linear(8, 8)
