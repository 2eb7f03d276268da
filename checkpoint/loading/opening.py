"""A checkpoint as state dicts, read when they are loaded.

opt.load_state_dict(fastopt.checkpoint.open("/data/run1"))
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from functools import cached_property
from typing import Any

from ...pieces import Box
from .. import catalog
from ..arguments import check_whole_number
from ..errors import CheckpointError
from ..format.manifest import from_bytes
from ..format.records import Manifest, model_key, state_key
from ..format.values import decode
from ..io.storage import Storage, open_storage
from .optimizer_target import OptTarget, has_positions
from .reading import Wanted, read


def open(url: str | os.PathLike[str], step: int | None = None) -> Mapping[str, Any]:
    """The checkpoint of `step`, or the newest complete one, under the root `url`, as the state dict that was saved.

    Of an optimizer: `state` and `param_groups`. Of a model: its tensors by name. Of both: `{"model": ..., "opt": ...}`.
    Nothing but the manifest is read until something is taken out. An optimizer of fastopt, sharded or not, reads only
    what this rank holds when it is given the state dict to load; anybody else gets whole tensors. What is read is
    verified. Not collective: every rank opens for itself.

    Raises CheckpointError where there is no such checkpoint, and when something damaged is read.
    """
    check_whole_number("step", step, 0, "a whole number from 0")
    storage = open_storage(url)
    manifest = from_bytes(catalog.find(storage, step)[1])
    parts: dict[str, Mapping[str, Any]] = {}
    if manifest.model is not None:
        parts["model"] = ModelState(storage, manifest)
    if manifest.opt is not None:
        parts["opt"] = OptState(storage, manifest)
    return next(iter(parts.values())) if len(parts) == 1 else parts


class ModelState(Mapping[str, Any]):
    """The state dict of a model in a checkpoint. Taking an entry reads that tensor."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage, self._manifest = storage, manifest
        assert manifest.model is not None
        self._part = manifest.model
        self._homes = {name: name for name in self._part.tensors} | self._part.aliases

    def __getitem__(self, name: str) -> Any:
        if name in self._part.values:
            return decode(self._part.values[name], name)
        return _read_whole(self._storage, self._manifest, [model_key(self._homes[name])])[0]

    def __iter__(self) -> Iterator[str]:
        return iter((*self._homes, *self._part.values))

    def __len__(self) -> int:
        return len(self._homes) + len(self._part.values)

    def copy(self) -> dict[str, Any]:
        """All of it, read."""
        return dict(self)


class OptState(Mapping[str, Any]):
    """The state dict of an optimizer in a checkpoint, in torch's shape. Taking `state` reads all of it."""

    def __init__(self, storage: Storage, manifest: Manifest) -> None:
        self._storage, self._manifest = storage, manifest
        assert manifest.opt is not None
        self._part = manifest.opt

    def __getitem__(self, key: str) -> Any:
        if key == "state":
            return self._state
        if key == "param_groups":
            return self._groups()
        raise KeyError(key)

    def __iter__(self) -> Iterator[str]:
        return iter(("state", "param_groups"))

    def __len__(self) -> int:
        return 2

    def copy(self) -> dict[str, Any]:
        """All of it, read."""
        return dict(self)

    def for_optimizer(self, opt: Any) -> dict[str, Any]:
        """The state dict that `opt` needs: what this rank holds of each state, as whole tensors or pieces.

        Raises CheckpointError that lists what does not fit.
        """
        target = OptTarget(self._manifest, opt, None)
        if target.problems:
            raise CheckpointError("\n  ".join(["the checkpoint does not fit the optimizer:", *target.problems]))
        target.plan(in_place=False)
        read(self._storage, self._manifest, target.fresh)
        return target.state_dict()

    @cached_property
    def _state(self) -> dict[int, dict[str, Any]]:
        names = [name for group in self._part.groups for name in group.params]
        known = [
            (number, name, self._part.states[name]) for number, name in enumerate(names) if name in self._part.states
        ]
        state = {
            number: {key: decode(value, f"{key} of {name}") for key, value in states.values.items()}
            for number, name, states in known
        }
        places = [(number, key, state_key(name, key)) for number, name, states in known for key in states.tensors]
        tensors = _read_whole(self._storage, self._manifest, [stored for _, _, stored in places])
        for (number, key, _), tensor in zip(places, tensors, strict=True):
            state[number][key] = tensor
        return state

    def _groups(self) -> list[dict[str, Any]]:
        groups, first = [], 0
        for group in self._part.groups:
            options = {key: decode(value, key) for key, value in group.options.items()}
            options["params"] = list(range(first, first + len(group.params)))
            if not has_positions(self._manifest):
                options["param_names"] = list(group.params)
            groups.append(options)
            first += len(group.params)
        return groups


def _read_whole(storage: Storage, manifest: Manifest, keys: list[str]) -> list[Any]:
    wanted = [Wanted(key, [Box.whole(manifest.tensors[key].shape)]) for key in keys]
    read(storage, manifest, wanted)
    return [want.buffers[0] for want in wanted]
