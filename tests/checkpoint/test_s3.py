"""Checkpoints on S3: a real server on loopback, which fails in the middle where a test says so."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from fastopt import Adam
from fastopt.checkpoint import Checkpointer, CheckpointError, latest, load, prune, save, steps, verify
from fastopt.checkpoint.errors import StorageError
from fastopt.checkpoint.io import retries
from fastopt.checkpoint.io.storage import Storage, open_storage
from fastopt.distributed import shard

from ..ranks import RankPool
from .jobs import Small, adam_job, bits, everything, groups_of, train
from .s3_server import BUCKET, S3Server
from .test_storage import (
    test_an_error_while_writing_leaves_no_file,  # noqa: F401  (what every storage must do, on this one)
    test_files_are_made_listed_read_and_removed,  # noqa: F401
    test_files_know_when_they_were_written,  # noqa: F401
    test_nothing_is_overwritten,  # noqa: F401
    test_reading_past_the_end_is_an_error,  # noqa: F401
)


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    """The server; this process finds it, and those that it starts."""
    with S3Server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in {**server.env, "AWS_MAX_ATTEMPTS": "1"}.items():  # the retries here are ours, not botocore's
            patch.setenv(name, value)
        yield server


@pytest.fixture
def root(server: S3Server) -> str:
    """An empty root; the server is whole."""
    server.heal()
    return f"s3://{BUCKET}/runs/{uuid.uuid4()}"


@pytest.fixture
def storage(root: str) -> Storage:
    """The storage at `root`."""
    return open_storage(root)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attempts follow each other at once."""
    monkeypatch.setattr(retries, "WAITS", (0.01,) * 3)


def test_saved_and_loaded(root: str) -> None:
    job = adam_job(1)
    train(*job)
    save(root, step=3, model=job[0], opt=job[1], scheduler=job[2])
    train(*job)
    place = save(root, step=6, model=job[0], opt=job[1], scheduler=job[2], extra={"a": 1})
    assert place == f"{root}/step-00000006"
    saved = everything(*job)
    fresh = adam_job(2)
    assert load(root, model=fresh[0], opt=fresh[1], scheduler=fresh[2]).extra == {"a": 1}
    assert everything(*fresh) == saved
    with pytest.raises(CheckpointError, match="already saved"):
        save(root, step=6, model=job[0])
    assert steps(root) == [3, 6]
    assert prune(root, keep=1) == [3]
    assert open_storage(root).sizes("") == {"step-00000006": None}


def test_a_prefix_of_any_characters(root: str) -> None:
    url = f"{root}/with space/ü?a=b&c#d+%20*[x]"
    for step in (1, 2):
        save(url, step=step, model=Small(step))
    model = Small()
    load(url, model=model)
    assert bits(dict(model.state_dict())) == bits(dict(Small(2).state_dict()))
    assert prune(url, keep=1) == [1]
    assert steps(url) == [2]
    assert verify(url).sound


@pytest.mark.parametrize(
    "call", [latest, steps, load, verify, lambda url: save(url, step=2, extra={}), lambda url: prune(url, 1)]
)
def test_wrong_credentials_are_no_empty_place(call: Any, root: str, server: S3Server, impatient: None) -> None:
    save(root, step=1, model=Small())
    server.fail(status=403, code="InvalidAccessKeyId", method="", times=99)
    with pytest.raises(StorageError, match=rf"{root}.*InvalidAccessKeyId"):
        call(root)
    with Checkpointer(root) as checkpoints, pytest.raises(CheckpointError, match="InvalidAccessKeyId"):
        checkpoints.load(model=Small())


def test_only_new_objects_are_put_and_none_is_copied(root: str, server: S3Server) -> None:
    save(root, step=1, model=Small())
    save(root, step=2, model=Small())
    puts = [path for _, path, _ in server.requests("PUT")]
    assert len(puts) == len(set(puts))
    names = [path.rsplit("/", 1)[-1] for path in puts if "step-00000002" in path]
    assert [name.split("-")[0] for name in sorted(names[:-2])] == ["model", "s"]
    assert names[-2:] == ["model.safetensors.index.json", "manifest.json"]
    gone = {path.rsplit("/", 1)[-1] for _, path, _ in server.requests("DELETE")}
    assert gone <= {"model.safetensors.index.json"}  # of a save that died before its manifest


@pytest.mark.parametrize(
    "fault",
    [
        {"status": 503, "code": "SlowDown"},
        {"status": 500, "code": "InternalError", "times": 2},
        {"status": 500, "code": "InternalError", "done": True},
        {"status": 429, "code": "TooManyRequests"},
        {"status": 0, "times": 2},
        {"status": 0, "done": True},
    ],
    ids=lambda fault: " ".join(f"{k}={v}" for k, v in fault.items()),
)
@pytest.mark.parametrize("path", ["/s-", "manifest.json"])
def test_trouble_in_the_middle_of_a_save_passes(
    fault: dict[str, Any], path: str, root: str, server: S3Server, impatient: None
) -> None:
    server.fail(**fault, path=path)
    model = Small(1)
    save(root, step=1, model=model)
    fresh = Small(2)
    server.fail(**{**fault, "done": False}, method="GET", path=path)
    load(root, model=fresh)
    assert bits(dict(fresh.state_dict())) == bits(dict(model.state_dict()))
    assert [status for _, name, status in server.requests("PUT") if path in name].count(200) == 1 - fault.get("done", 0)


@pytest.mark.parametrize("status", [500, 403])
@pytest.mark.parametrize("path", ["safetensors", "manifest.json"])
def test_trouble_that_stays_fails_the_save_and_nothing_else(
    status: int, path: str, root: str, server: S3Server, impatient: None
) -> None:
    save(root, step=1, model=Small(1))
    code = {500: "InternalError", 403: "AccessDenied"}[status]
    server.fail(status=status, code=code, path=f"step-00000002/{'s-' if path != 'manifest.json' else path}", times=99)
    with pytest.raises(CheckpointError, match=f"step-00000002/.*{code}"):
        save(root, step=2, model=Small(2))
    server.heal()
    assert latest(root).step == 1
    assert "step-00000002" not in open_storage(root).sizes("")
    save(root, step=2, model=Small(2))
    assert latest(root).step == 2


def test_a_storage_out_of_reach_is_no_reason_to_go_on_with_an_older_checkpoint(
    root: str, server: S3Server, impatient: None
) -> None:
    save(root, step=1, model=Small(1))
    save(root, step=2, model=Small(2))
    server.fail(status=500, code="InternalError", method="GET", path="step-00000002/manifest.json", times=99)
    for look in (latest, steps):
        with pytest.raises(StorageError, match=r"step-00000002/manifest\.json"):
            look(root)
    with pytest.raises(CheckpointError, match=r"step-00000002/manifest\.json"):
        load(root, model=Small())


def test_no_bucket_is_made_and_its_absence_is_named(server: S3Server) -> None:
    server.heal()
    with pytest.raises(CheckpointError, match=r"s3://nosuch/run.*bucket"):
        save("s3://nosuch/run", step=1, model=Small())
    assert latest("s3://nosuch/run") is None
    assert [status for _, path, status in server.requests("PUT") if path == "/nosuch"] == []


# ---- ranks -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def ranks(server: S3Server) -> Iterator[Callable[[int], RankPool]]:
    """Pools of ranks that know the server."""
    env = {**server.env, "AWS_MAX_ATTEMPTS": "1"}
    pools = {size: RankPool(size, env=env) for size in (1, 2, 3)}
    yield pools.__getitem__
    for pool in pools.values():
        pool.close()


def sharded(seed: int, stage: int) -> tuple[nn.Module, Any]:
    """A model and its sharded optimizer."""
    model = Small(seed)
    return model, shard(Adam(groups_of(model), lr=0.01), model, stage=stage)


def step(model: nn.Module, opt: Any, number: int) -> None:
    """One step, the same on every rank."""
    torch.manual_seed(number)
    train(model, opt, steps=1)


def start(rank: int, world: int, root: str) -> Any:
    """Two steps and a save; the weights."""
    model, opt = sharded(0, 2)
    step(model, opt, 0)
    step(model, opt, 1)
    save(root, step=world, model=model, opt=opt)
    return bits(dict(model.state_dict()))


def go_on(rank: int, world: int, root: str, number: int) -> Any:
    """Load and one more step; the weights before and after it."""
    model, opt = sharded(7, 1)
    load(root, model=model, opt=opt, step=number)
    loaded = bits(dict(model.state_dict()))
    step(model, opt, 2)
    return loaded, bits(dict(model.state_dict()))


@pytest.mark.parametrize(("n", "m"), [(2, 3), (3, 1), (1, 2)])
def test_n_ranks_to_m_over_s3(n: int, m: int, root: str, ranks: Callable[[int], RankPool]) -> None:
    (weights, *_) = ranks(n).run(start, root)
    results = ranks(m).run(go_on, root, n)
    assert all(result == results[0] for result in results)
    assert results[0][0] == weights
    assert results[0][1] != weights


def failing_save(rank: int, world: int, root: str) -> str:
    """A save that must fail; what every rank says, and the step that is left."""
    retries.WAITS = (0.01, 0.01)
    model, opt = sharded(0, 2)
    save(root, step=1, model=model, opt=opt)
    step(model, opt, 0)
    with pytest.raises(CheckpointError) as caught:
        save(root, step=2, model=model, opt=opt)
    assert load(root, model=model, opt=opt).step == 1
    return str(caught.value)


def test_a_store_that_refuses_one_rank_is_an_error_on_all(
    root: str, server: S3Server, ranks: Callable[[int], RankPool]
) -> None:
    server.fail(status=500, code="InternalError", path="step-00000002/s-", times=10**6, skip=1)
    texts = ranks(3).run(failing_save, root)
    assert len(set(texts)) == 1
    assert "InternalError" in texts[0]
    assert list(open_storage(root).sizes("")) == ["step-00000001"]
