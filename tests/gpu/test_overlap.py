"""Over NCCL on two GPUs: communication runs beside computing, memory is what the formula says, precision holds."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.profiler import ProfilerActivity, profile
from torch.utils.checkpoint import checkpoint

import fastopt
from fastopt.distributed import shard

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")

WIDTH, DEPTH, ROWS = 4096, 8, 16384


def on_gpus(rank: int) -> Any:
    """Take this rank's GPU; a process group over NCCL."""
    torch.cuda.set_device(rank)
    return dist.new_group(backend="nccl")


def stack(width: int = WIDTH, depth: int = DEPTH, dtype: torch.dtype = torch.bfloat16) -> nn.Sequential:
    """Equal layers with the same weights everywhere."""
    torch.manual_seed(0)
    layers: list[nn.Module] = []
    for _ in range(depth):
        layers += [nn.Linear(width, width, bias=False), nn.GELU()]
    return nn.Sequential(*layers).to("cuda", dtype)


def spans(events: Any, *words: str) -> list[tuple[int, int]]:
    """Start and end of the kernels with one of `words` in their name, in nanoseconds."""
    found = [
        (e.start_ns(), e.start_ns() + e.duration_ns())
        for e in events
        if e.device_type() == torch.autograd.DeviceType.CUDA and any(word in e.name() for word in words)
    ]
    return sorted(found)


def beside(some: list[tuple[int, int]], others: list[tuple[int, int]]) -> int:
    """How many of `some` run while one of `others` does."""
    return sum(any(a < d and c < b for c, d in others) for a, b in some)


def overlap(rank: int, world_size: int) -> dict[str, tuple[int, int]]:
    """How many collectives ran beside a matrix product, of how many."""
    group = on_gpus(rank)
    model = stack()
    size = WIDTH * WIDTH * 2
    opt = shard(fastopt.Adam(model.parameters()), model, group=group, bucket_bytes=size, master_weights=True)
    x = torch.randn(ROWS, WIDTH, device="cuda", dtype=torch.bfloat16)

    def iteration() -> None:
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()

    for _ in range(3):
        iteration()
    torch.cuda.synchronize()
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as prof:
        for _ in range(4):
            iteration()
        torch.cuda.synchronize()
    events = prof.profiler.kineto_results.events()
    labels = {e.name() for e in events if "fastopt" in e.name()}
    assert any("fastopt reduce bucket 0 (0.weight .. 0.weight)" in label for label in labels), labels
    assert any("fastopt gather bucket 7" in label for label in labels), labels
    products = spans(events, "gemm", "nvjet", "cutlass", "sm90")
    told = {}
    for kind in ("ReduceScatter", "AllGather"):
        collectives = spans(events, f"{kind}")
        told[kind] = beside(collectives, products), len(collectives)
    return told


def test_collectives_run_beside_matrix_products(ranks: Any) -> None:
    for told in ranks(2).run(overlap, timeout=200):
        for kind, (overlapped, number) in told.items():
            assert number == 4 * DEPTH, f"{kind}: {told}"
            # The last reduction of a backward pass and the first gather of a step have nothing beside them; gathers
            # run beside other kernels of the forward pass too.
            assert overlapped >= number // 2, f"{kind}: {told}"


def memory(rank: int, world_size: int, reduce_dtype: torch.dtype | None) -> tuple[float, float, float]:
    """Allocated bytes between steps and after backward, over the formula's; and the passing peak in buckets."""
    group = on_gpus(rank)
    gc.collect()  # what earlier tests have left
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    model = stack()
    elements = sum(p.numel() for p in model.parameters())
    size = WIDTH * WIDTH * 2
    opt = shard(
        fastopt.Adam(model.parameters()),
        model,
        group=group,
        bucket_bytes=size,
        master_weights=True,
        reduce_dtype=reduce_dtype,
    )
    x = torch.randn(16, WIDTH, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        model(x).square().mean().backward()
        opt.step()
        opt.zero_grad()
    opt.synchronize()
    torch.cuda.synchronize()
    between = torch.cuda.memory_allocated() - start
    model(x).square().mean().backward()
    opt.clip_grad_norm_(1.0)
    torch.cuda.synchronize()
    after = torch.cuda.memory_allocated() - start
    opt.step()
    opt.zero_grad()
    opt.synchronize()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    model(x).square().mean().backward()
    torch.cuda.synchronize()
    grads = elements // world_size * (4 if reduce_dtype else 2)
    passing = torch.cuda.max_memory_allocated() - start - between - grads
    opt.step()
    resident = elements * 2 + elements * 12 // world_size
    return between / resident, after / (resident + grads), passing / size


def with_groups(rank: int, world_size: int, groups: int) -> tuple[int, int, list[Tensor]]:
    """Bytes allocated and at most, from the end of a step on, before anything waits; and the parameters."""
    group = on_gpus(rank)
    gc.collect()
    torch.cuda.synchronize()
    start = torch.cuda.memory_allocated()
    model = stack(512, 64)
    params = list(model.parameters())
    cut = [params[i * 64 // groups : (i + 1) * 64 // groups] for i in range(groups)]
    opt = shard(fastopt.Adam(cut, lr=1e-3), model, group=group, bucket_bytes=512 * 512 * 2 * 16, master_weights=True)
    x = torch.randn(16, 512, device="cuda", dtype=torch.bfloat16)
    most = 0
    for _ in range(3):
        model(x).square().mean().backward()
        torch.cuda.synchronize()
        opt.zero_grad()
        model(x).square().mean().backward()
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        opt.step()
        most = torch.cuda.max_memory_allocated() - before
    after = torch.cuda.memory_allocated() - start
    opt.synchronize()
    return after, most, [p.detach().cpu() for p in params]


def test_many_groups_need_no_more_memory_than_one(ranks: Any) -> None:
    one, many = ranks(2).run(with_groups, 1)[0], ranks(2).run(with_groups, 64)[0]
    assert many[0] <= 1.001 * one[0]
    assert many[1] <= one[1] + 2**20
    assert all(map(torch.equal, one[2], many[2]))


@pytest.mark.parametrize("reduce_dtype", [None, torch.float32], ids=["by NCCL", "in float32"])
def test_memory_is_that_of_the_formula(ranks: Any, reduce_dtype: Any) -> None:
    for between, after, passing in ranks(2).run(memory, reduce_dtype, timeout=120):
        assert between == pytest.approx(1, abs=0.01)
        assert after == pytest.approx(1, abs=0.01)
        # Two buckets, and a third that holds what has been received, where it is summed here.
        assert passing <= (3.1 if reduce_dtype else 2.1), passing


def against_one_process(rank: int, world_size: int) -> float:
    """Training through real forward passes, frozen and unfrozen, equals one process on the whole batch."""
    group = on_gpus(rank)
    model, reference = stack(512, 6, torch.float32), stack(512, 6, torch.float32)

    def build(m: nn.Sequential) -> fastopt.Optimizer:
        return fastopt.Adam([list(m[:4].parameters()), list(m[4:8].parameters()), list(m[8:].parameters())], lr=1e-3)

    opt = shard(build(model), model, group=group, bucket_bytes=2**20)
    plain = build(reference)
    for step, first in enumerate((0, 0, 2, 2, 1, 0, 0, 0, 0, 0)):
        for each in (opt, plain):
            each.freeze_to(first)
            each.set_hyper("lr", 1e-3 / (step + 1))
        x = torch.randn(world_size * 64, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
        model(x[rank * 64 : rank * 64 + 64]).square().mean().backward()
        reference(x).square().mean().backward()
        for each in (opt, plain):
            each.step()
            each.zero_grad()
    pairs = zip(model.state_dict().values(), reference.state_dict().values(), strict=True)
    return max((p - q).abs().max().item() for p, q in pairs)


def test_freezing_with_overlap_equals_one_process(ranks: Any) -> None:
    assert max(ranks(2).run(against_one_process, timeout=120)) < 1e-4


def in_backward(rank: int, world_size: int) -> None:
    """Stepping in backward, with the first layer recomputed there, gives the bits of a step after backward."""
    group = on_gpus(rank)
    runs = []
    for stepping in (False, True):
        model = stack(512, 12)
        opt = shard(
            fastopt.Adam(model.parameters(), lr=1e-3),
            model,
            group=group,
            master_weights=True,
            bucket_bytes=2**19,
            step_in_backward=stepping,
        )
        for step in range(8):
            x = torch.randn(64, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(2 * step + rank))
            hidden = checkpoint(model[:2], x.bfloat16().requires_grad_(), use_reentrant=False)
            model[2:](hidden).square().mean().backward()
            opt.step()
            # What is read right after a step is what it has left.
            averages = [opt.state[p]["grad_avg"].clone() for p in model.parameters()]
            opt.zero_grad()
        opt.synchronize()
        torch.cuda.synchronize()
        states = [opt.state[p]["grad_avg"] for p in model.parameters()]
        assert all(map(torch.equal, averages, states))
        runs.append([value.cpu() for value in (*model.state_dict().values(), *states)])
    assert all(map(torch.equal, *runs))


def test_stepping_in_backward_gives_the_same_bits(ranks: Any) -> None:
    ranks(2).run(in_backward, timeout=120)


def scaled(rank: int, world_size: int) -> list[float]:
    """float16 autocast with `GradScaler`; an inf on one rank skips the step on both. The scales."""
    group = on_gpus(rank)
    model = stack(256, 3, torch.float32)
    opt = shard(fastopt.Adam(model.parameters(), lr=1e-3), model, group=group)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    scales = []
    for step in range(4):
        x = torch.randn(32, 256, device="cuda")
        before = [value.clone() for value in model.state_dict().values()]
        with torch.autocast("cuda", torch.float16):
            loss = model(x).square().mean()
        if step == 2 and rank == 1:
            loss = loss * float("inf")
        scaler.scale(loss).backward()
        if step % 2 == 0:
            scaler.unscale_(opt)
            opt.clip_grad_norm_(1.0)
        scaler.step(opt)
        scaler.update()
        opt.zero_grad()
        same = all(map(torch.equal, before, model.state_dict().values()))
        assert same == (step == 2)
        scales.append(scaler.get_scale())
    return scales


def test_grad_scaler(ranks: Any) -> None:
    assert ranks(2).run(scaled, timeout=120) == [[2.0**10, 2.0**10, 2.0**9, 2.0**9]] * 2


def host_waits(rank: int, world_size: int) -> list[str]:
    """What waits for the device between the end of backward and the end of a step, clipping included."""
    group = on_gpus(rank)
    model = stack(1024, 4)
    opt = shard(fastopt.Adam(model.parameters()), model, group=group, master_weights=True)
    x = torch.randn(64, 1024, device="cuda", dtype=torch.bfloat16)
    for _ in range(3):
        model(x).square().mean().backward()
        opt.clip_grad_norm_(1.0)
        opt.step()
        opt.zero_grad()
    model(x).square().mean().backward()
    torch.cuda.set_sync_debug_mode("error")
    try:
        opt.clip_grad_norm_(1.0)
        opt.step()
        opt.zero_grad()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return []


def test_clipping_and_stepping_do_not_wait_for_the_device(ranks: Any) -> None:
    assert ranks(2).run(host_waits, timeout=120) == [[], []]


def deterministic(rank: int, world_size: int) -> list[list[Tensor]]:
    """Two runs with sums in float32 in the order of the ranks."""
    group = on_gpus(rank)
    runs = []
    for _ in range(2):
        model = stack(512, 4)
        opt = shard(
            fastopt.Adam(model.parameters()), model, group=group, master_weights=True, reduce_dtype=torch.float32
        )
        for step in range(5):
            x = torch.randn(64, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(2 * step + rank))
            model(x.bfloat16()).square().mean().backward()
            opt.step()
            opt.zero_grad()
        runs.append([value.cpu() for value in model.state_dict().values()])
    return runs


def test_two_runs_are_the_same(ranks: Any) -> None:
    for first, second in ranks(2).run(deterministic, timeout=120):
        assert all(map(torch.equal, first, second))


COMPILED: dict[str, Callable[[nn.Sequential], nn.Module]] = {
    "blocks": lambda m: nn.Sequential(*[torch.compile(nn.Sequential(*m[i : i + 2])) for i in range(0, len(m), 2)]),
    "model": lambda m: torch.compile(m),
}


def compiled(rank: int, world_size: int) -> dict[str, float]:
    """Compiled models train as they do without."""
    group = on_gpus(rank)
    told = {}
    for name, change in COMPILED.items():
        losses = []
        for wrap in (lambda m: m, change):
            model = wrap(stack(512, 4, torch.float32))
            opt = shard(fastopt.Adam(model.parameters(), lr=1e-3), model, group=group, bucket_bytes=2**20)
            for step in range(6):
                x = torch.randn(64, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(step))
                loss = model(x).square().mean()
                loss.backward()
                opt.step()
                opt.zero_grad()
            losses.append(loss.item())
        told[name] = abs(losses[0] - losses[1]) / losses[0]
    return told


def test_compiled_models(ranks: Any) -> None:
    for told in ranks(2).run(compiled, timeout=280):
        assert max(told.values()) < 1e-2, told
