"""Files that somebody made up: an error, before any memory is set aside for what they claim to hold."""

from __future__ import annotations

import contextlib
import copy
import json
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fastopt.checkpoint import CheckpointError, load, save, verify
from fastopt.checkpoint.format.manifest import from_bytes

from .jobs import adam_job, data_files, everything, train

json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.sampled_from([0, -1, 1, 1 << 31, 1 << 62, 1 << 63, 10**30, 0.5, -0.0])
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.sampled_from(["", "..", "/etc/passwd", "../x", "F32", "s-00000000-r00000-000.safetensors", "$", "\x00", "é"])
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8) | st.just("$"), inner, max_size=4),
    max_leaves=8,
)


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of a checkpoint."""
    root = tmp_path_factory.mktemp("good")
    model, opt, scheduler = adam_job(1)
    train(model, opt, scheduler)
    save(root, step=1, model=model, opt=opt, scheduler=scheduler, extra={"a": [1, None]})
    return root


def sealed(tree: Any) -> bytes:
    """A manifest of this content with the right digest: as a forger, not an accident, makes it."""
    body = json.dumps(tree, sort_keys=True).encode()[1:]
    return b'{"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'",' + body


def tree_of(root: Path) -> Any:
    """The content of the manifest."""
    data = (root / "step-00000001" / "manifest.json").read_bytes()
    return json.loads(b"{" + data[29:])


def places(tree: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value in it."""
    found = [path] if path else []
    items = tree.items() if isinstance(tree, dict) else enumerate(tree) if isinstance(tree, list) else ()
    for key, value in items:
        found += places(value, (*path, key))
    return found


def changed(tree: Any, path: tuple[Any, ...], value: Any) -> Any:
    """A copy of the tree with another value at a path."""
    tree = copy.deepcopy(tree)
    inner = tree
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    return tree


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_forged_manifest_loads_nothing_but_what_it_should(
    data: st.DataObject, good: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = tree_of(good)
    for _ in range(data.draw(st.integers(1, 3))):
        tree = changed(tree, data.draw(st.sampled_from(places(tree))), data.draw(json_values))
    folder = tmp_path / "step-00000001"
    folder.mkdir(exist_ok=True)
    (folder / "manifest.json").write_bytes(sealed(tree))
    files = data_files(good / "step-00000001")
    for file in files:
        if not (folder / file.name).exists():
            (folder / file.name).write_bytes(file.read_bytes())
    room = 2 * sum(file.stat().st_size for file in files) + (1 << 20)
    empty = torch.empty
    asked: list[int] = []

    def counted(*shape: Any, **kwargs: Any) -> torch.Tensor:
        asked.append(torch.Size(shape[0] if isinstance(shape[0], list | tuple) else shape).numel())
        assert asked[-1] < room
        return empty(*shape, **kwargs)

    live = adam_job(3)
    before = everything(*live)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "empty", counted)
        try:
            load(tmp_path, model=live[0], opt=live[1], scheduler=live[2], step=1)
        except CheckpointError:
            assert everything(*live) == before
        assert sum(asked) < 4 * room
        with contextlib.suppress(CheckpointError):
            verify(tmp_path, step=1, mark=False)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_bytes_are_a_manifest_or_an_error(data: st.DataObject, good: Path) -> None:
    valid = (good / "step-00000001" / "manifest.json").read_bytes()
    kind = data.draw(st.sampled_from(["noise", "cut", "spliced", "sealed noise"]))
    if kind == "noise":
        made = data.draw(st.binary(max_size=300))
    elif kind == "cut":
        made = valid[: data.draw(st.integers(0, len(valid) - 1))]
    elif kind == "spliced":
        at = data.draw(st.integers(0, len(valid)))
        made = valid[:at] + data.draw(st.binary(min_size=1, max_size=30)) + valid[at + data.draw(st.integers(0, 30)) :]
    else:
        body = data.draw(st.binary(max_size=300))
        made = b'{"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'",' + body
    if made != valid:
        with pytest.raises(CheckpointError):
            from_bytes(made)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("tensors", "model/embed.weight", "shape"), [1 << 40, 1 << 20]),
        (("tensors", "model/embed.weight", "shards"), [[0, 0, 1, 1 << 60, 0, 0]]),
        (("tensors", "model/embed.weight", "shards"), [[0, 0, 78, 1 << 40, 0, 1]]),
        (("files", 0, "bytes"), 1 << 61),
        (("world_size",), 1 << 24),
        (("extra",), "[" * 100_000),
    ],
)
def test_a_small_manifest_does_not_take_much_memory(path: tuple[Any, ...], value: Any, good: Path) -> None:
    made = sealed(changed(tree_of(good), path, value))
    tracemalloc.start()
    try:
        from_bytes(made)
    except CheckpointError:
        assert path != ("extra",)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 40 * len(made) + (4 << 20)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_a_forged_header_changes_nothing_and_is_found(data: st.DataObject, good: Path, tmp_path: Path) -> None:
    folder = tmp_path / "step-00000001"
    folder.mkdir(exist_ok=True)
    for file in (good / "step-00000001").iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    file = data.draw(st.sampled_from(data_files(folder)))
    content = file.read_bytes()
    length = 8 + int.from_bytes(content[:8], "little")
    start = data.draw(st.integers(0, length - 1))
    noise = data.draw(st.binary(min_size=1, max_size=min(64, length - start)))
    made = content[:start] + noise + content[start + len(noise) :]
    file.write_bytes(made)
    live, reference = adam_job(3), adam_job(4)
    load(tmp_path, model=live[0], opt=live[1], scheduler=live[2])
    load(good, model=reference[0], opt=reference[1], scheduler=reference[2])
    assert everything(*live) == everything(*reference)
    assert verify(tmp_path, mark=False).sound == (made == content)
