"""The manifest: comes back the same, and anything else than a sound one is refused."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import xxhash
from hypothesis import given
from hypothesis import strategies as st

from fastopt import Box
from fastopt.checkpoint import CheckpointError
from fastopt.checkpoint.format.manifest import from_bytes, place, to_bytes
from fastopt.checkpoint.format.records import (
    DataFile,
    Group,
    Manifest,
    ModelPart,
    OptPart,
    ParamStates,
    StoredTensor,
    rng_key,
    state_key,
)
from fastopt.checkpoint.format.shards import Shards

A, B, C = (f"s-00c0ffee-r0000{i}-000.safetensors" for i in range(3))
D = "0123456789abcdef"


def example() -> Manifest:
    """Two ranks, a split tensor, one in boxes, a tied one, a state, a generator, a file of an earlier step."""
    files = (
        DataFile(A, 4096 + 64 + 16, 4096, D, 12, D),
        DataFile(B, 4096 + 32 + 2 + 32 + 1900, 4096, D, 12, D * 2),
        DataFile(C.replace("c0ffee", "c0ffef"), 4096 + 96, 4096, D, 7, D),
    )
    whole = Shards.intervals
    tensors = {
        "model/w": StoredTensor("F32", (6, 4), whole((6, 4), [0, 1], [0, 16], [16, 8])),
        "model/é/../b": StoredTensor("BF16", (), whole((), [1], [0], [1])),
        "model/none": StoredTensor("F32", (0, 3), whole((0, 3), [], [], [])),
        "state/avg/w": StoredTensor("F32", (6, 4), whole((6, 4), [2], [0], [24])),
        "state/rows/w": StoredTensor(
            "F32", (4, 3), Shards.of_boxes((4, 3), [0, 1], [Box((0, 0), (4, 1)), Box((0, 1), (4, 2))])
        ),
        "rng/0/torch": StoredTensor("U8", (1900,), whole((1900,), [1], [0], [1900])),
    }
    return Manifest(
        step=12,
        save_id="00c0ffee",
        created="2026-01-02T03:04:05Z",
        world_size=2,
        library={"fastopt": "0.1.0", "torch": "2.13.0"},
        block=1024,
        files=files,
        tensors=place(files, tensors),
        model=ModelPart(("w", "é/../b", "none"), {"tied": "w"}, {"note": 1}),
        opt=OptPart(
            {"w": (6, 4), "v": None},
            (Group(("w", "v"), {"lr": 0.1}),),
            {"w": ParamStates(("avg", "rows"), {"step": 3})},
        ),
        scheduler={"last_epoch": 3},
        scaler={"scale": 65536.0},
        loader=({"at": 5}, {"at": 6}),
        rng=(("torch",), ()),
        extra={"any": ["json", None, 1.5]},
    )


def sealed(tree: dict[str, Any]) -> bytes:
    """A manifest with a right digest, whatever is in it."""
    body = json.dumps(tree).encode()[1:]
    return b'{"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'",' + body


def tree() -> dict[str, Any]:
    """The example as parsed JSON without its digest."""
    parsed: dict[str, Any] = json.loads(to_bytes(example()))
    del parsed["digest"]
    return parsed


def test_it_comes_back_and_is_canonical() -> None:
    data = to_bytes(example())
    assert from_bytes(data) == example()
    assert to_bytes(from_bytes(data)) == data
    assert from_bytes(sealed(tree())) == example()


def test_the_digest_covers_every_bit() -> None:
    data = to_bytes(example())
    generator = random.Random(0)
    for _ in range(300):
        at, bit = generator.randrange(len(data)), generator.randrange(8)
        broken = bytearray(data)
        broken[at] ^= 1 << bit
        with pytest.raises(CheckpointError):
            from_bytes(bytes(broken))
    for broken in (b"", data[:-1], data + b" ", data[:20], b"{}", b"\x00" * 50):
        with pytest.raises(CheckpointError):
            from_bytes(broken)


def put(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """A change of the tree: set the value at a path like `files/0/name`."""

    def change(tree: Any) -> None:
        *way, last = path.split("|")
        for key in way:
            tree = tree[int(key) if isinstance(tree, list) else key]
        tree[int(last) if isinstance(tree, list) else last] = value

    return change


HUGE = 1 << 61
HOSTILE = [
    (put("format", "other"), "format: not 'fastopt-checkpoint'"),
    (put("version", 2), "version"),
    (put("version", True), "version"),
    (put("step", -1), "step"),
    (put("step", "12"), "step"),
    (put("step", 1.0), "step"),
    (put("unknown", 1), "unknown"),
    (put("world_size", 0), "world_size"),
    (put("block", 0), "block"),
    (put("block", 1000), "power of two"),
    (put("block", 1 << 40), "block"),
    (put("checksum", "none"), "checksum"),
    (put("save_id", "../x"), "save_id"),
    (put("files|0|name", "../../etc/passwd"), "files"),
    (put("files|0|name", "/etc/passwd"), "files"),
    (put("files|0|name", A + "\n"), "files"),
    (put("files|0|name", A.replace("00c0ffee", "00c0ffef")), "another save"),
    (put("files|0|name", B), "listed twice"),
    (put("files|0|bytes", -5), "bytes"),
    (put("files|0|bytes", 1e9), "bytes"),
    (put("files|0|header", 10_000), "header"),
    (put("files|0|digest", "zz"), "digest"),
    (put("files|0|header", 4097), "multiple of 16"),
    (put("files|0|step", 11), None),
    (put("files|2|step", 13), "step"),
    (put("files|2|step", 12), "another save"),
    (put("files|0|blocks", D * 2), "checksums"),
    (put("files|0|blocks", "g" * 16), "blocks"),
    (put("files|0|bytes", 4096 + 76), "its files 2138"),
    (put("files", {}), "expected a list"),
    (put("tensors|model/w|dtype", "F33"), "unknown dtype"),
    (put("tensors|model/w|dtype", ["F32"]), "unknown dtype"),
    (put("tensors|model/w|dtype", "F64"), "its tensors have"),
    (put("tensors|model/w|shape", [HUGE, HUGE]), "impossible shape"),
    (put("tensors|model/w|shape", [HUGE, 2]), "elements of shape"),
    (put("tensors|model/w|shape", [0, HUGE, HUGE]), "impossible shape"),
    (put("tensors|model/w|shape", [7, 4]), "24 of the 28 elements"),
    (put("tensors|model/w|shape", [-6, -4]), "whole number"),
    (put("tensors|model/w|shape", [1] * 65), "impossible shape"),
    (put("tensors|model/w|shards|1|1", 15), "overlap"),
    (put("tensors|model/w|shards|1|1", 17), "outside shape"),
    (put("tensors|model/w|shards|0|2", 15), "leave a gap"),
    (put("tensors|model/w|shards|1|2", 7), "23 of the 24"),
    (put("tensors|model/w|shards|1|2", HUGE), "outside shape"),
    (put("tensors|model/w|shards|1|0", 0), "in the same file"),
    (put("tensors|model/w|shards|1|0", 3), "not listed"),
    (put("tensors|model/w|shards|1|0", -1), "whole number"),
    (put("tensors|model/w|shards|1", [0]), "1 fields"),
    (put("tensors|model/w|shards", [[0, 0, 0, HUGE, 0, 0]]), "more parts than"),
    (put("tensors|model/w|shards", [[0, 0, 8, 3, HUGE, 8]]), "not listed"),
    (put("tensors|model/w|shards", [[0, 0, 8, 3, 1, HUGE]]), "outside shape"),
    (put("tensors|model/w|shards", [[0, 0, 12, 2, 1, 12]]), "end at byte"),
    (put("tensors|model/w|boxes", []), "shards"),
    (put("tensors|state/rows/w|boxes|0|1", [0, 1]), "overlap"),
    (put("tensors|state/rows/w|boxes|0|1", [0]), "does not go with"),
    (put("tensors|state/rows/w|boxes|0|2", [5, 1]), "outside shape"),
    (put("tensors|state/rows/w|boxes|0|0", 3), "whole number"),
    (put("scaler", {"a": {"$": "code"}}), "unknown form"),
    (put("loader", [1, 2, 3]), "3 positions for 2 ranks"),
    (put("loader", [{"$": "code"}]), "unknown form"),
    (put("rng", [["torch"]]), "1 entries for 2 ranks"),
    (put("rng", [["torch"], ["torch"]]), "no data"),
    (put("tensors|rng/0/torch|dtype", "I8"), "no data"),
    (put("model|tensors", ["w", "w"]), "twice"),
    (put("model|tensors", ["w", "absent"]), "'absent' has no data"),
    (put("model|aliases", {"tied": "absent"}), "unknown"),
    (put("model|aliases", {"w": "w"}), "model.aliases"),
    (put("model|values", {"note": {"$": "code"}}), "unknown form"),
    (put("opt|params|w", [6, -4]), "whole number"),
    (put("opt|params|u", [1]), "not the parameters"),
    (put("opt|groups|0|params", ["w", "w"]), "twice"),
    (put("opt|groups", [{"params": ["w", "v"], "options": {}}] * 2), "two groups"),
    (put("opt|groups|0|options", {"lr": {"$": "tensor", "dtype": "F32", "shape": [HUGE], "v": ""}}), "0 bytes for"),
    (put("opt|states|u", {"tensors": [], "values": {}}), "no such parameter"),
    (put("opt|states|w|tensors", ["avg", "absent"]), "'absent' has no data"),
    (put("opt|states|w|values", {"avg": 1}), "twice"),
    (put("scheduler", {"a": {"$": "float", "v": "1"}}), "unknown form"),
    (put("library", {"torch": 2}), "library"),
]


@pytest.mark.parametrize(("change", "message"), HOSTILE, ids=range(len(HOSTILE)))
def test_a_hostile_manifest_is_refused(change: Callable[[dict[str, Any]], None], message: str | None) -> None:
    bad = tree()
    change(bad)
    if message is None:  # odd but harmless: the file is looked for elsewhere
        from_bytes(sealed(bad))
        return
    with pytest.raises(CheckpointError, match=message):
        from_bytes(sealed(bad))


@pytest.mark.parametrize(
    "text", ['{"a":1,"a":2}', '{"a":NaN}', '{"a":' + "[" * 100_000, "[1]", "{", '{"a":' + "9" * 5000 + "}"]
)
def test_json_that_hides_something_is_refused(text: str) -> None:
    body = text.encode()[1:]
    with pytest.raises(CheckpointError):
        from_bytes(b'{"digest":"' + xxhash.xxh3_64_hexdigest(body).encode() + b'",' + body)


junk = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(allow_nan=False),
    st.text(max_size=5),
    st.lists(st.integers(), max_size=3),
    st.dictionaries(st.text(max_size=3), st.integers(), max_size=2),
)


@given(st.data())
def test_any_value_anywhere_gives_a_manifest_or_a_checkpoint_error(data: st.DataObject) -> None:
    changed = copy.deepcopy(tree())
    node: Any = changed
    while True:
        keys = list(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if not isinstance(node[key], dict | list) or not node[key] or data.draw(st.booleans()):
            node[key] = data.draw(junk)
            break
        node = node[key]
    try:
        from_bytes(sealed(changed))
    except CheckpointError:
        return


def test_keys_of_states_cannot_collide() -> None:
    assert state_key("a/b", "c") == "state/c/a/b"
    assert state_key("b", "c/a") == "state/c%2Fa/b"
    assert state_key("b", "c%2Fa") == "state/c%252Fa/b"
    assert rng_key(3, "cuda:0") == "rng/3/cuda:0"
