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
    whole = {f"model/{name}": tensor.detach() for name, tensor in model.state_dict().items() if "tied" not in name}
    for name, p in model.named_parameters():
        whole[f"state/avg/{name}"] = element_values(f"avg {name}", tuple(p.shape))
        whole[f"state/rows/{name}"] = element_values(f"rows {name}", (*p.shape[:1], 2))
        whole[f"state/count/{name}"] = torch.tensor(len(name), dtype=torch.int32)
    return whole


def read_by_the_document(folder: Path) -> dict[str, np.ndarray]:
    """All tensors of a step folder, by nothing but docs/checkpoint-format.md; sizes and checksums looked at."""
    data = (folder / "manifest.json").read_bytes()
    assert data[:11] == b'{"digest":"'
    assert data[27:29] == b'",'
    assert data[11:27].decode() == xxhash.xxh3_64_hexdigest(data[29:])
    manifest = json.loads(data)
    files = [(folder / file["name"]).read_bytes() for file in manifest["files"]]
    for file, content in zip(manifest["files"], files, strict=True):
        assert file["bytes"] == len(content)
        assert file["header"] == 8 + int.from_bytes(content[:8], "little")
        assert file["digest"] == xxhash.xxh3_64_hexdigest(content[: file["header"]])
    tensors = {}
    for key, tensor in manifest["tensors"].items():
        itemsize = {"F32": 4, "BF16": 2, "I32": 4, "U8": 1}[tensor["dtype"]]
        whole = np.zeros((*tensor["shape"], itemsize), np.uint8)
        for number, at, offset, shape, blocks in tensor["shards"]:
            raw = files[number][at : at + math.prod(shape) * itemsize]
            for i, start in enumerate(range(0, len(raw), manifest["block"])):
                digest = xxhash.xxh3_64_hexdigest(raw[start : start + manifest["block"]])
                assert digest == blocks[16 * i : 16 * i + 16]
            box = tuple(slice(o, o + n) for o, n in zip(offset, shape, strict=True))
            whole[box] = np.frombuffer(raw, np.uint8).reshape(*shape, itemsize)
        tensors[key] = whole
    return tensors


def test_a_reader_written_from_the_document_finds_everything(folder: Path) -> None:
    found = read_by_the_document(folder)
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


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
def test_torch_reads_and_reshards_them(folder: Path) -> None:
    whole = {key: tensor for key, tensor in expected().items() if math.prod(tensor.shape)}
    into: dict[str, Any] = {key: torch.zeros_like(tensor) for key, tensor in whole.items()}
    dcp.load(into, storage_reader=HuggingFaceStorageReader(str(folder)), no_dist=True)
    for key, tensor in whole.items():
        assert torch.equal(into[key], tensor), key
