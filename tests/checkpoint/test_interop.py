"""Other libraries read the files as they are."""

from __future__ import annotations

import json
import math
import runpy
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors import safe_open
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint._consolidate_hf_safetensors import consolidate_safetensors_files

from fastopt.checkpoint import save
from fastopt.checkpoint.format.values import decode, encode

from ..commands import ROOT
from ..ranks import RankPool
from .jobs import adam_job, data_files, element_values, train
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


READER: dict[str, Any] = runpy.run_path(str(ROOT / "docs" / "examples" / "read_checkpoint.py"))


def test_a_reader_written_from_the_document_finds_everything(folder: Path) -> None:
    found = READER["read_tensors"](folder, READER["read_manifest"](folder))
    for key, tensor in expected().items():
        raw = tensor.contiguous().reshape(-1).view(torch.uint8).numpy()
        stored = found.pop(key) if key.startswith("state/") else found.pop(f"model/{key}")
        assert stored.shape == (*tensor.shape, tensor.element_size())
        assert stored.tobytes() == raw.tobytes()
    assert {key.split("/")[0] for key in found} == {"rng"}


def test_that_reader_finds_groups_states_and_values(tmp_path: Path) -> None:
    model, opt, scheduler = adam_job()
    train(model, opt, scheduler)
    extra = {"note": "\u00e9", "$": 1, "list": [1, 2.5, None]}
    for step in (1, 2):  # the second names files of the first
        save(tmp_path, step=step, model=model, opt=opt, scheduler=scheduler, extra=extra)
    manifest = READER["read_manifest"](tmp_path / "step-00000002")
    tensors, value = READER["read_tensors"](tmp_path / "step-00000002", manifest), READER["value"]
    assert manifest["extra"] == extra
    assert value(manifest["scheduler"]) == scheduler.state_dict()
    names = {id(p): name for name, p in model.named_parameters()}
    for stored, group in zip(manifest["opt"]["groups"], opt.param_groups, strict=True):
        assert stored["params"] == [names[id(p)] for p in group["params"]]
        found = {key: value(option) for key, option in stored["options"].items()}
        assert found == {key: option for key, option in group.items() if key not in ("params", "param_names")}
    for p, state in opt.state.items():
        stored = manifest["opt"]["states"][names[id(p)]]
        assert {key: value(each) for key, each in stored["values"].items()} == {"step": state["step"]}
        for key in stored["tensors"]:
            raw = state[key].contiguous().reshape(-1).view(torch.uint8).numpy()
            assert tensors[READER["state_key"](names[id(p)], key)].tobytes() == raw.tobytes()


@pytest.mark.parametrize(
    ("stored", "is_"),
    [
        ({"$": "float", "v": "-inf"}, -math.inf),
        ({"$": "complex", "v": [1.0, -2.0]}, 1 - 2j),
        ({"$": "tuple", "v": [1, {"$": "tuple", "v": []}]}, (1, ())),
        ({"$": "dict", "v": [[3, "a"], ["$", 2]]}, {3: "a", "$": 2}),
        ({"$": "counter", "v": [["a", 2]]}, Counter(a=2)),
        ({"$": "bytes", "v": "AAE="}, b"\0\1"),
    ],
)
def test_that_reader_and_ours_agree_on_values(stored: Any, is_: Any) -> None:
    assert READER["value"](stored) == decode(stored, "here") == is_
    assert encode(is_, "here") == stored


@pytest.mark.parametrize("where", ["manifest", "header", "data"])
def test_that_reader_refuses_a_flipped_bit(where: str, tmp_path: Path) -> None:
    model, opt, _ = adam_job()
    folder = Path(save(tmp_path, step=1, model=model, opt=opt))
    file = folder / "manifest.json" if where == "manifest" else data_files(folder)[0]
    data = bytearray(file.read_bytes())
    data[{"manifest": 100, "header": 20, "data": -1}[where]] ^= 4
    file.write_bytes(data)
    with pytest.raises(ValueError, match="damaged"):
        READER["read_tensors"](folder, READER["read_manifest"](folder))


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


def test_torch_merges_them(folder: Path, tmp_path: Path) -> None:
    whole = {key: tensor for key, tensor in expected().items() if tensor.ndim and math.prod(tensor.shape)}
    (tmp_path / "to").mkdir()
    consolidate_safetensors_files(str(folder), str(tmp_path / "to"), dict.fromkeys(whole, 1))
    (merged,) = (tmp_path / "to").glob("*.safetensors")
    with safe_open(merged, "pt") as opened:
        for key, tensor in whole.items():
            assert torch.equal(opened.get_tensor(key), tensor), key
