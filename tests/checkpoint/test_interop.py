"""Other libraries read the files as they are."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed.checkpoint as dcp
import xxhash
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader

from ..ranks import RankPool
from .jobs import data_files, element_values
from .test_many_ranks import Values, save_cut

Ranks = Callable[[int], RankPool]


@pytest.fixture(scope="module")
def folder(ranks: Ranks, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The step folder of a job on three ranks."""
    root = tmp_path_factory.mktemp("interop")
    ranks(3).run(save_cut, str(root), 1, False)
    return root / "step-00000001"


def expected() -> dict[str, torch.Tensor]:
    """Whole tensors by their key in the files, from their names."""
    model = Values()
    model.fill()
    whole = {name: tensor.detach() for name, tensor in model.state_dict().items() if "tied" not in name}
    for name, p in model.named_parameters():
        whole[f"state/avg/{name}"] = element_values(f"avg {name}", tuple(p.shape))
        whole[f"state/rows/{name}"] = element_values(f"rows {name}", (*p.shape[:1], 2))
        whole[f"state/count/{name}"] = torch.tensor(len(name), dtype=torch.int32)
    return whole


WIDTH = {"F32": 4, "BF16": 2, "I32": 4, "U8": 1}


def read_by_the_document(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a step folder, by nothing but docs/checkpoint-format.md; sizes and checksums looked at."""
    data = (folder / "manifest.json").read_bytes()
    assert data[:11] == b'{"digest":"'
    assert data[27:29] == b'",'
    assert data[11:27].decode() == xxhash.xxh3_64_hexdigest(data[29:])
    manifest = json.loads(data)
    homes = [folder.parent / f"step-{file['step']:08d}" / file["name"] for file in manifest["files"]]
    files = [home.read_bytes() for home in homes]
    for file, content in zip(manifest["files"], files, strict=True):
        assert file["bytes"] == len(content)
        assert file["header"] == 8 + int.from_bytes(content[:8], "little")
        assert file["digest"] == xxhash.xxh3_64_hexdigest(content[: file["header"]])
        body = content[file["header"] :]
        for i, start in enumerate(range(0, len(body), manifest["block"])):
            digest = xxhash.xxh3_64_hexdigest(body[start : start + manifest["block"]])
            assert digest == file["blocks"][16 * i : 16 * i + 16]
    cursor = [file["header"] for file in manifest["files"]]
    tensors = {}
    for key, tensor in sorted(manifest["tensors"].items(), key=lambda each: (-WIDTH[each[1]["dtype"]], each[0])):
        itemsize, shape = WIDTH[tensor["dtype"]], tensor["shape"]
        whole = np.zeros((math.prod(shape), itemsize), np.uint8)
        parts = []
        for file, start, count, *run in tensor.get("shards", []):
            times, files_on, elements_on = run or (1, 0, 0)
            parts += [(file + i * files_on, slice(start + i * elements_on, None), count) for i in range(times)]
        for number, place, count in parts:
            raw = files[number][cursor[number] : cursor[number] + count * itemsize]
            whole[place][:count] = np.frombuffer(raw, np.uint8).reshape(-1, itemsize)
            cursor[number] += len(raw)
        boxed = whole.reshape(*shape, itemsize)
        for number, offset, extent in tensor.get("boxes", []):
            raw = files[number][cursor[number] : cursor[number] + math.prod(extent) * itemsize]
            box = tuple(slice(o, o + n) for o, n in zip(offset, extent, strict=True))
            boxed[box] = np.frombuffer(raw, np.uint8).reshape(*extent, itemsize)
            cursor[number] += len(raw)
        tensors[key] = boxed
    assert cursor == [len(content) for content in files]
    return tensors


def test_a_reader_written_from_the_document_finds_everything(folder: Path) -> None:
    found = {key.removeprefix("model/"): value for key, value in read_by_the_document(folder).items()}
    for key, tensor in expected().items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        assert found.pop(key).tobytes() == raw.tobytes()
    assert {key.split("/")[0] for key in found} == {"rng"}


def test_safetensors_opens_every_file(folder: Path) -> None:
    elements: dict[str, int] = {}
    for file in data_files(folder):
        with safe_open(file, "pt") as opened:
            for key in opened.keys():  # noqa: SIM118
                elements[key] = elements.get(key, 0) + opened.get_tensor(key).numel()
    for key, tensor in expected().items():
        assert elements.get(key, 0) == tensor.numel()


def test_the_step_folder_is_a_hugging_face_checkpoint(folder: Path) -> None:
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    weights = {key: tensor for key, tensor in expected().items() if not key.startswith("state/")}
    assert index["weight_map"].keys() == weights.keys()
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in weights.values())
    assert len(set(index["weight_map"].values())) > 1, "the ranks share the tensors out"
    for name, file in index["weight_map"].items():
        assert file.startswith("model-")
        with safe_open(folder / file, "pt") as opened:
            assert torch.equal(opened.get_tensor(name), weights[name])


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_and_reshards_them(folder: Path) -> None:
    whole = {key: tensor for key, tensor in expected().items() if math.prod(tensor.shape)}
    into: dict[str, Any] = {key: torch.zeros_like(tensor) for key, tensor in whole.items()}
    dcp.load(into, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    for key, tensor in whole.items():
        assert torch.equal(into[key], tensor), key
