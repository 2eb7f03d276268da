"""A reader of checkpoints that needs neither fastopt nor torch: json, struct, numpy and xxhash.

python read_checkpoint.py /tmp/run/step-00000010
"""

import base64
import json
import math
import struct
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import xxhash

WIDTH = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "C64": 8, "BOOL": 1}  # bytes of an element
WIDTH |= {f"{sign}{bits}": bits // 8 for sign in "IU" for bits in (8, 16, 32, 64)}
WIDTH |= dict.fromkeys(("F8_E4M3", "F8_E4M3FNUZ", "F8_E5M2", "F8_E5M2FNUZ"), 1)


def read_manifest(folder):
    """The manifest of a step folder, after its digest has been checked."""
    data = Path(folder, "manifest.json").read_bytes()
    head, digest, comma, rest = data[:11], data[11:27], data[27:29], data[29:]
    if head != b'{"digest":"' or comma != b'",' or digest.decode() != xxhash.xxh3_64_hexdigest(rest):
        raise ValueError("the manifest is damaged")
    manifest = json.loads(data)
    if (manifest["format"], manifest["version"]) != ("fastopt-checkpoint", 1):
        raise ValueError("a format that this reader does not know")
    return manifest


def read_file(folder, entry, block):
    """The bytes of one data file, all of them checked."""
    data = Path(folder).parent.joinpath(f"step-{entry['step']:08d}", entry["name"]).read_bytes()
    start = entry["header"]
    (length,) = struct.unpack("<Q", data[:8])
    if len(data) != entry["bytes"] or start != 8 + length or xxhash.xxh3_64_hexdigest(data[:start]) != entry["digest"]:
        raise ValueError(f"{entry['name']} is damaged")
    for i, at in enumerate(range(start, len(data), block)):
        if xxhash.xxh3_64_hexdigest(data[at : at + block]) != entry["blocks"][16 * i : 16 * i + 16]:
            raise ValueError(f"{entry['name']}: the block at byte {at} is damaged")
    return data


def read_tensors(folder, manifest):
    """Every tensor by its key, as an array of bytes in the shape `[*shape, bytes of an element]`."""
    files = [read_file(folder, entry, manifest["block"]) for entry in manifest["files"]]
    cursor = [entry["header"] for entry in manifest["files"]]  # where the next part of each file begins

    def take(file, count, width):
        raw = files[file][cursor[file] : cursor[file] + count * width]
        cursor[file] += len(raw)
        return np.frombuffer(raw, np.uint8)

    tensors = {}
    in_order = sorted(manifest["tensors"].items(), key=lambda item: (-WIDTH[item[1]["dtype"]], item[0]))
    for key, tensor in in_order:
        width, shape = WIDTH[tensor["dtype"]], tensor["shape"]
        flat = np.zeros((math.prod(shape), width), np.uint8)
        for file, start, count, *run in tensor.get("shards", []):
            times, files_on, elements_on = run or (1, 0, 0)
            for i in range(times):
                first = start + i * elements_on
                flat[first : first + count] = take(file + i * files_on, count, width).reshape(-1, width)
        whole = flat.reshape(*shape, width)
        for file, offset, extent in tensor.get("boxes", []):
            box = tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))
            whole[box] = take(file, math.prod(extent), width).reshape(*extent, width)
        tensors[key] = whole
    if cursor != [len(data) for data in files]:
        raise ValueError("the files hold more than the manifest says")
    return tensors


def value(stored):
    """A stored value; a tensor in one becomes `(dtype, shape, bytes)`."""
    if isinstance(stored, list):
        return [value(item) for item in stored]
    if not isinstance(stored, dict):
        return stored
    if "$" not in stored:
        return {key: value(item) for key, item in stored.items()}
    kind, content = stored["$"], stored["v"]
    if kind == "float":
        return float(content)
    if kind == "complex":
        return complex(*content)
    if kind == "bytes":
        return base64.b64decode(content)
    if kind == "tensor":
        return stored["dtype"], stored["shape"], base64.b64decode(content)
    if kind == "array":
        return np.frombuffer(base64.b64decode(content), stored["dtype"]).reshape(stored["shape"])
    items = value(content)
    if kind in ("dict", "counter"):
        return dict(items) if kind == "dict" else Counter(dict(items))
    return {"tuple": tuple, "set": set}[kind](items)


def state_key(name, key):
    """Where the state `key` of the parameter `name` is among the tensors."""
    return f"state/{key.replace('%', '%25').replace('/', '%2F')}/{name}"


if __name__ == "__main__":
    manifest = read_manifest(sys.argv[1])
    tensors = read_tensors(sys.argv[1], manifest)
    print(f"step {manifest['step']}, saved by {manifest['world_size']} ranks in {len(manifest['files'])} files")
    for group in manifest["opt"]["groups"] if manifest["opt"] else []:
        print("group", group["params"], {key: value(option) for key, option in group["options"].items()})
    for key in sorted(tensors):
        print(f"{key}: {manifest['tensors'][key]['dtype']} {manifest['tensors'][key]['shape']}")
