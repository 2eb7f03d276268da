"""Save and load in one process: everything comes back, to whatever it fits, and nothing else."""

from __future__ import annotations

import json
import math
import random
import uuid
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import nn
from torch.optim import lr_scheduler as schedules

from fastopt import SGD, Adam, Lamb, Larc, OptimWrapper, QHAdam, RAdam, RMSProp, ranger
from fastopt.checkpoint import CheckpointError, latest, load, save

from .jobs import Small, adam_job, bits, data_files, everything, groups_of, states_by_name, train


def test_a_job_goes_on_as_if_it_had_never_stopped(tmp_path: Path) -> None:
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    place = save(tmp_path, step=3, model=model, opt=opt, scheduler=schedule, extra={"epoch": 1.5})
    assert place == f"{tmp_path}/step-00000003"
    losses = train(model, opt, schedule, 4), random.random(), np.random.rand()
    other = adam_job(seed=1)
    train(*other, steps=1)
    found = load(tmp_path, model=other[0], opt=other[1], scheduler=other[2])
    assert (found.step, found.url, found.world_size, found.extra) == (3, place, 1, {"epoch": 1.5})
    assert (train(*other, steps=4), random.random(), np.random.rand()) == losses
    assert everything(*other) == everything(model, opt, schedule)


def wrapped(params: Any, lr: float) -> OptimWrapper:
    """A torch optimizer behind the library's interface."""
    return OptimWrapper(params, torch.optim.AdamW, lr=lr)


@pytest.mark.parametrize("make", [SGD, RMSProp, Adam, RAdam, QHAdam, Larc, Lamb, ranger, wrapped])
@pytest.mark.parametrize("url", ["path", "file", "memory"])
def test_every_optimizer_comes_back_on_every_storage(make: Any, url: str, tmp_path: Path) -> None:
    url = {"path": str(tmp_path / "a/b"), "file": f"file://{tmp_path}/x", "memory": f"memory://{uuid.uuid4()}"}[url]
    model = Small()
    opt = make(groups_of(model), lr=0.01)
    train(model, opt, steps=2)
    opt.freeze_to(1)
    save(url, step=1, model=model, opt=opt)
    other = Small(1)
    fresh = make(groups_of(other), lr=1.0)
    load(url, model=other, opt=fresh)
    assert states_by_name(other, fresh) == states_by_name(model, opt)
    assert bits(fresh.state_dict()["param_groups"]) == bits(opt.state_dict()["param_groups"])
    assert fresh.is_frozen(0)
    assert not fresh.is_frozen(1)


def test_flags_and_values_of_a_state_come_back(tmp_path: Path) -> None:
    model, opt, _ = adam_job()
    train(model, opt)
    opt.state[model.body[0].weight]["force_train"] = True
    opt.state[model.scale]["do_wd"] = False
    save(tmp_path, step=0, model=model, opt=opt)
    other, fresh, _ = adam_job(1)
    load(tmp_path, model=other, opt=fresh)
    assert fresh.state[other.body[0].weight]["force_train"] is True
    assert fresh.state[other.scale]["do_wd"] is False
    assert fresh.state[other.scale]["step"] == 3


def test_a_state_may_hold_nested_values(tmp_path: Path) -> None:
    """Of any optimizer: dicts, lists, nothing, numbers that JSON lacks, small tensors inside of them."""
    model = nn.Linear(3, 3)
    state = {"a": {"b": [1, {"c": torch.ones(2), 4: math.inf}], "none": None}, "flag": True, "pair": (1, 2.5)}
    opt, other = torch.optim.SGD(model.parameters()), torch.optim.SGD(model.parameters())
    opt.state[model.weight] = state
    save(tmp_path, step=1, model=model, opt=opt)
    load(tmp_path, model=model, opt=other)
    assert bits(other.state[model.weight]) == bits(state)
    opt.state[model.weight] = {"list": [torch.ones(20_000)]}
    with pytest.raises(CheckpointError, match=r"state 'list' of 'weight'\[0\] is a tensor of 80000 bytes"):
        save(tmp_path, step=2, model=model, opt=opt)


def test_what_was_not_there_yet_is_not_there_afterwards(tmp_path: Path) -> None:
    """An optimizer before its first step, and a group that was added later."""
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    opt = Adam(model[0].parameters(), lr=0.1)
    save(tmp_path, step=0, model=model, opt=opt)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    opt.step()
    load(tmp_path, model=model, opt=opt)
    assert not opt.state
    assert opt.state_dict()["state"] == {}
    opt.add_param_group({"params": list(model[1].parameters()), "lr": 0.5})
    opt.step()
    save(tmp_path, step=1, model=model, opt=opt)
    with pytest.raises(CheckpointError, match=r"missing in the checkpoint's optimizer: 1\.weight, 1\.bias"):
        load(tmp_path, model=model, opt=opt, step=0)
    with pytest.raises(CheckpointError, match=r"unexpected in the checkpoint's optimizer: 1\.weight, 1\.bias"):
        load(tmp_path, model=model, opt=Adam(model[0].parameters()))
    fresh = Adam(model[0].parameters())
    fresh.add_param_group({"params": list(model[1].parameters())})
    load(tmp_path, model=model, opt=fresh)
    assert bits(fresh.state_dict()) == bits(opt.state_dict())


def test_a_model_of_nothing(tmp_path: Path) -> None:
    save(tmp_path, step=1, model=nn.Module(), extra="x")
    assert load(tmp_path, model=nn.Module()).extra == "x"


def test_parameters_are_known_by_name_not_by_place(tmp_path: Path) -> None:
    model, opt, schedule = adam_job()
    train(model, opt, schedule)
    save(tmp_path, step=3, model=model, opt=opt, scheduler=schedule)
    other = Small(1)
    first, second = groups_of(other)
    fresh = Adam([second[::-1], first], lr=slice(1e-2, 1e-3))
    after = torch.optim.lr_scheduler.StepLR(fresh, 2)
    load(tmp_path, model=other, opt=fresh, scheduler=after)
    assert states_by_name(other, fresh) == states_by_name(model, opt)
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in opt.param_groups][::-1]
    assert after.base_lrs == schedule.base_lrs[::-1]
    train(model, opt, schedule)
    train(other, fresh, after)
    assert [g["lr"] for g in fresh.param_groups] == [g["lr"] for g in opt.param_groups][::-1]


def test_names_from_named_parameters_need_no_model(tmp_path: Path) -> None:
    model = Small()
    opt = Adam(model.named_parameters(), lr=0.1)
    train(model, opt)
    save(tmp_path, step=1, opt=opt)
    other = Small(1)
    fresh = Adam(list(other.named_parameters())[::-1], lr=0.2)
    load(tmp_path, opt=fresh)
    assert states_by_name(other, fresh) == states_by_name(model, opt)
    assert fresh.param_groups[0]["param_names"] == [n for n, _ in other.named_parameters()][::-1]
    with pytest.raises(CheckpointError, match=r"number 0 of group 0 \(shape \(\)\).*model="):
        save(tmp_path, step=2, opt=Adam(model.parameters(), lr=0.1))
    with pytest.raises(CheckpointError, match="no model"):
        load(tmp_path, model=other)


def test_torch_optimizers_are_saved_too(tmp_path: Path) -> None:
    model, other = Small(), Small(1)
    opt = torch.optim.AdamW(model.parameters(), lr=torch.tensor(0.1), betas=(0.8, 0.9))
    train(model, opt)
    save(tmp_path, step=1, model=model, opt=opt)
    fresh = torch.optim.AdamW(other.parameters(), lr=torch.tensor(0.5))
    load(tmp_path, model=other, opt=fresh)
    assert bits(fresh.state_dict()) == bits(opt.state_dict())


@pytest.mark.parametrize(
    "make",
    [
        lambda opt: schedules.MultiStepLR(opt, [1, 3, 3]),
        lambda opt: schedules.OneCycleLR(opt, [0.1, 0.2], total_steps=20),
        lambda opt: schedules.CyclicLR(opt, [0.1, 0.2], [0.3, 0.5], step_size_up=2),
        lambda opt: schedules.LambdaLR(opt, lambda n: 1 / (n + 1)),
        lambda opt: schedules.MultiplicativeLR(opt, lambda n: 0.9),
        lambda opt: schedules.PolynomialLR(opt, 5),
        lambda opt: schedules.CosineAnnealingLR(opt, 7),
        lambda opt: schedules.CosineAnnealingWarmRestarts(opt, 3),
        lambda opt: schedules.ReduceLROnPlateau(opt, patience=1, min_lr=[0.01, 0.02]),
        lambda opt: schedules.ChainedScheduler([schedules.LinearLR(opt), schedules.ExponentialLR(opt, 0.5)]),
        lambda opt: schedules.SequentialLR(
            opt, [schedules.ConstantLR(opt), schedules.ExponentialLR(opt, 0.5)], milestones=[2]
        ),
        lambda opt: torch.optim.swa_utils.SWALR(opt, [0.1, 0.2]),
    ],
)
@pytest.mark.parametrize("order", [1, -1])
def test_schedules_come_back(make: Any, order: int, tmp_path: Path) -> None:
    """Of every kind that torch has, also with the groups the other way round."""

    def job_of(seed: int, order: int) -> Any:
        model = Small(seed)
        opt = Adam([{"params": p, "lr": lr} for p, lr in zip(groups_of(model), (0.01, 0.1), strict=True)][::order])
        return model, opt, make(opt)

    def go_on(opt: Any, schedule: Any, steps: range) -> list[Any]:
        rates = []
        for n in steps:
            opt.step()
            schedule.step(*[n % 3] if isinstance(schedule, schedules.ReduceLROnPlateau) else [])
            rates.append([(group["lr"], group["betas"]) for group in opt.param_groups])
        return rates

    model, opt, schedule = job_of(0, 1)
    go_on(opt, schedule, range(3))
    save(tmp_path, step=1, model=model, opt=opt, scheduler=schedule)
    other, fresh, after = job_of(1, order)
    load(tmp_path, model=other, opt=fresh, scheduler=after)
    expected = go_on(opt, schedule, range(3, 8))
    assert [rates[::order] for rates in go_on(fresh, after, range(3, 8))] == expected


DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.float8_e5m2,
    torch.complex64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.uint16, torch.uint32,
    torch.uint64, torch.bool,
]  # fmt: skip


def test_every_dtype_rank_and_layout_comes_back(tmp_path: Path) -> None:
    def fill(module: nn.Module, make: Any) -> nn.Module:
        for dtype in DTYPES:
            for shape in [(), (0,), (3,), (2, 0, 4), (2, 3, 5)]:
                module.register_buffer(f"{dtype}{shape}".replace(".", "_"), make(dtype, shape))
        return module

    def random_bits(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
        size = math.prod(shape)
        if dtype is torch.bool:
            return torch.rand(shape) > 0.5
        raw = torch.randint(0, 256, (size * dtype.itemsize,), dtype=torch.uint8)
        return raw.view(dtype).reshape(shape)

    model = fill(nn.Module(), random_bits)
    base = torch.arange(24.0).reshape(2, 3, 4)
    for name, view in {
        "t": base.mT,
        "s": base[:, ::2],
        "e": base[:1, :1].expand(5, 1, 4),
        "c": (base * 1j).conj()[0],
    }.items():
        model.register_buffer(name, view)
    other = fill(nn.Module(), lambda dtype, shape: torch.zeros(shape, dtype=dtype))
    for name in "tsec":
        other.register_buffer(name, torch.zeros_like(model.get_buffer(name), memory_format=torch.contiguous_format))
    save(tmp_path, step=1, model=model)
    load(tmp_path, model=other)
    assert bits(dict(other.state_dict())) == bits({k: v.resolve_conj() for k, v in model.state_dict().items()})


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (torch.zeros(2, dtype=torch.complex128), "'x' has dtype torch.complex128"),
        (torch.zeros(2, device="meta"), "'x' has no plain data"),
        (torch.eye(2).to_sparse(), "'x' has no plain data"),
    ],
)
def test_what_the_files_cannot_hold_is_named_and_nothing_is_written(
    bad: torch.Tensor, message: str, tmp_path: Path
) -> None:
    model = nn.Module()
    model.register_buffer("x", bad)
    with pytest.raises(CheckpointError, match=message):
        save(tmp_path, step=1, model=model)
    assert not list(tmp_path.iterdir())


NAMES = ["../../x", "a/b", "a", "/", "%2F", "ü/é 模型", "state/x", "model/", "$", "__metadata__", "with space", "\n"]


@pytest.mark.parametrize("staging", [0, 2**40])
@pytest.mark.parametrize("trained", [True, False])
def test_states_have_the_strides_of_their_parameters(trained: bool, staging: int, tmp_path: Path) -> None:
    """Executors take other ways through other strides, some of which round otherwise."""

    def job(seed: int) -> tuple[torch.nn.Module, Adam]:
        torch.manual_seed(seed)
        model = torch.nn.Module()
        model.turned = torch.nn.Parameter(torch.randn(4, 9).t())
        opt = Adam(model.parameters(), lr=0.1)
        if trained or seed == 1:
            model.turned.square().sum().backward()  # type: ignore[operator, union-attr]
            opt.step()
        return model, opt

    model, opt = job(1)
    save(tmp_path, step=1, model=model, opt=opt)
    other, live = job(2)
    load(tmp_path, model=other, opt=live, staging=staging)
    for key, value in opt.state[model.turned].items():
        if isinstance(value, torch.Tensor):
            found = live.state[other.turned][key]
            assert torch.equal(found, value)
            assert found.stride() == value.stride() == (1, 9)


def test_any_name_is_only_a_key(tmp_path: Path) -> None:
    params = [(name, nn.Parameter(torch.randn(3))) for name in ["", *NAMES]]
    opt = Adam(params, lr=0.1)
    for _, p in params:
        p.grad = torch.randn(3)
    opt.step()
    opt.state[params[1][1]]["a/../b"] = torch.ones(2)
    save(tmp_path / "root", step=1, opt=opt)
    fresh = Adam([(name, nn.Parameter(torch.zeros(3))) for name, _ in params[::-1]], lr=0.2)
    load(tmp_path / "root", opt=fresh)
    for (_, p), q in zip(params, fresh.param_groups[0]["params"][::-1], strict=True):
        assert bits(dict(opt.state[p])) == bits(dict(fresh.state[q]))
    assert [p.name for p in tmp_path.iterdir()] == ["root"]
    assert {p.name for p in (tmp_path / "root").iterdir()} == {"step-00000001"}
    bad = Adam([("\ud800", nn.Parameter(torch.zeros(3)))], lr=0.1)
    bad.param_groups[0]["params"][0].grad = torch.ones(3)
    bad.step()
    with pytest.raises(CheckpointError, match="not valid unicode"):
        save(tmp_path / "root", step=2, opt=bad)


def test_tied_tensors_are_saved_once_and_restored_to_all_names(tmp_path: Path) -> None:
    model = Small()
    place = save(tmp_path, step=1, model=model)
    keys = [key for file in data_files(place) for key in safe_open(file, "pt").keys()]  # noqa: SIM118
    assert "embed.weight" in keys
    assert "head.weight" not in keys
    untied = Small(1)
    untied.head.weight = nn.Parameter(torch.zeros(13, 6))
    load(tmp_path, model=untied)
    assert torch.equal(untied.head.weight, model.embed.weight)
    assert torch.equal(untied.embed.weight, model.embed.weight)
    untied.head.weight.data += 1
    save(tmp_path, step=2, model=untied)
    before = everything(model)
    with pytest.raises(
        CheckpointError, match=r"one tensor in the model, two in the checkpoint: embed\.weight and head"
    ):
        load(tmp_path, model=model)
    assert everything(model) == before


def test_a_tied_parameter_may_go_by_its_other_name(tmp_path: Path) -> None:
    def tied(first: str, second: str) -> tuple[nn.Module, Adam]:
        model = nn.Module()
        model.register_module(first, nn.Linear(3, 4, bias=False))
        model.register_module(second, nn.Linear(3, 4, bias=False))
        model.get_submodule(second).weight = model.get_submodule(first).weight
        return model, Adam(model.parameters(), lr=0.1)

    model, opt = tied("a", "b")
    model.a.weight.grad = torch.randn(4, 3)
    opt.step()
    save(tmp_path, step=1, model=model, opt=opt)
    other, fresh = tied("b", "a")
    load(tmp_path, model=other, opt=fresh)
    assert torch.equal(other.b.weight, model.a.weight)
    assert bits(dict(fresh.state[other.b.weight])) == bits(dict(opt.state[model.a.weight]))


def test_buffers_that_are_not_saved_stay_and_extra_state_comes_back(tmp_path: Path) -> None:
    class Counting(Small):
        calls = 0

        def get_extra_state(self) -> Any:
            return {"calls": (self.calls, 2)}

        def set_extra_state(self, state: Any) -> None:
            self.calls = state["calls"][0]

    model, other = Counting(), Counting(1)
    model.calls = 4
    save(tmp_path, step=1, model=model)
    other.scratch += 5
    load(tmp_path, model=other)
    assert other.calls == 4
    assert other.scratch.tolist() == [5, 5]
    assert torch.equal(other.seen, model.seen)


def test_wrappers_of_a_model_do_not_change_its_names(tmp_path: Path) -> None:
    model, other = Small(), Small(1)
    save(tmp_path, step=1, model=torch.compile(model))
    load(tmp_path, model=other)
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))


def test_the_random_generators_may_be_left_alone(tmp_path: Path) -> None:
    model = Small()
    save(tmp_path, step=1, model=model)
    torch.manual_seed(7)
    before = torch.get_rng_state(), random.getstate()
    load(tmp_path, model=model, rng=False)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert random.getstate() == before[1]


def test_extra_must_be_json_and_is_checked_first(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"extra\.a\[1\]\.b is a Tensor"):
        save(tmp_path, step=1, model=Small(), extra={"a": [0, {"b": torch.ones(1)}]})
    assert not list(tmp_path.iterdir())
    extra = {"a": [1, 2.5, None, True, "é\ud800"], "b": {}, "$": {"v": 1}}
    save(tmp_path, step=1, extra=extra)
    assert load(tmp_path).extra == extra


@pytest.mark.parametrize("step", [-1, 1.0, "3", None, True])
def test_steps_are_whole_numbers(step: Any, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="step must be a whole number"):
        save(tmp_path, step=step)


def test_a_step_is_not_overwritten_and_leftovers_do_not_hinder(tmp_path: Path) -> None:
    model = Small()
    place = Path(save(tmp_path, step=1, model=model))
    first = {p.name: p.read_bytes() for p in place.iterdir()}
    with pytest.raises(CheckpointError, match=r"step 1 is already saved.*nothing was overwritten"):
        save(tmp_path, step=1, model=Small(1))
    assert {p.name: p.read_bytes() for p in place.iterdir()} == first
    dead = tmp_path / "step-00000002"
    dead.mkdir()
    (dead / "s-00000000-r00000-000.safetensors").write_bytes(b"half")
    (dead / ".manifest.json.0a0b0c0d").write_bytes(b"{")
    save(tmp_path, step=2, model=model)
    other = Small(1)
    assert load(tmp_path, model=other).step == 2
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))
    assert load(tmp_path, model=other, step=1).step == 1


def test_files_are_bounded_and_aligned(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastopt.checkpoint.saving.writing.PART_BYTES", 10_000)
    model = nn.Linear(100, 300)
    opt = SGD([(name, p) for name, p in model.named_parameters()], lr=0.1, mom=0.9)
    model(torch.randn(4, 100)).sum().backward()
    opt.step()
    place = save(tmp_path, step=1, model=model, opt=opt)
    files = [file for file in data_files(place) if file.name.startswith("s-")]
    assert len(files) > 10
    for file in files:
        header = int.from_bytes(file.read_bytes()[:8], "little") + 8
        assert header % 4096 == 0
        assert file.stat().st_size - header <= 10_000
    other = nn.Linear(100, 300)
    load(tmp_path, model=other)
    assert bits(dict(other.state_dict())) == bits(dict(model.state_dict()))


def test_the_files_explain_themselves(tmp_path: Path) -> None:
    model, opt, _ = adam_job()
    train(model, opt)
    place = save(tmp_path, step=1, model=model, opt=opt)
    weights, states = data_files(place)
    with safe_open(weights, "pt") as opened:
        about = opened.metadata()
        assert torch.equal(opened.get_tensor("embed.weight"), model.embed.weight)
    own = json.loads(about["fastopt"])
    assert (own["step"], own["rank"], own["world_size"], own["shapes"]["embed.weight"]) == (1, 0, 1, [13, 6])
    assert json.loads(about["DCP_SHARDING_INFO"])["narrow"] == {"saved_offsets": [0, 0]}
    with safe_open(states, "pt") as opened:
        assert torch.equal(opened.get_tensor("state/grad_avg/narrow"), opt.state[model.narrow]["grad_avg"])
    assert latest(tmp_path) is not None


def test_counts_on_the_host_go_on_on_the_device_and_back(tmp_path: Path) -> None:
    """`capturable` says where counts are, and not what steps do: an optimizer of either kind takes both checkpoints."""

    def job(capturable: bool) -> tuple[nn.Linear, Any]:
        torch.manual_seed(0)
        model = nn.Linear(4, 3)
        return model, ranger(model.named_parameters(), lr=0.1, capturable=capturable)

    def steps(model: nn.Linear, opt: Any, numbers: range) -> None:
        for number in numbers:
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(number))
            opt.step()

    for first in (False, True):
        model, opt = job(first)
        steps(model, opt, range(4))
        save(tmp_path / str(first), step=4, model=model, opt=opt)
        steps(model, opt, range(4, 9))
        for second in (False, True):
            other, resumed = job(second)
            load(tmp_path / str(first), model=other, opt=resumed)
            steps(other, resumed, range(4, 9))
            torch.testing.assert_close(other.weight, model.weight, rtol=1e-5, atol=1e-6)
            assert resumed.state[other.weight]["step"] == resumed.state[other.weight]["count"] == 9
