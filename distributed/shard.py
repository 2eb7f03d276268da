"""`shard`: from an optimizer and a model to the same optimizer with its state spread over the ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.parallel import DistributedDataParallel

from ..bare import bare_optimizer
from ..engine import cb_name, executor_for, requested, undeclared
from ..optimizer import Optimizer
from ..spread import is_spread, part_of
from ..wrapper import TorchStep, evaluates_closure
from .around import is_within
from .checks.consistency import RanksDiffer, agree_fully
from .checks.other_dimensions import Along
from .communication.collectives import Ranks
from .communication.copy_transport import copies
from .communication.meshes import seat
from .communication.transport import Transport
from .ownership.layout import Kind, Layout
from .ownership.places import ParamSpec
from .ownership.tensor_parallel import Spread
from .parameters.gathering import synchronize_model
from .parameters.members import about_groups, specs_of
from .sharded import ShardedOptimizer


def shard(
    opt: Optimizer,
    model: nn.Module,
    stage: int = 2,
    group: dist.ProcessGroup | DeviceMesh | None = None,
    *,
    layout: Kind | None = None,
    cost: Callable[[Tensor], float] | None = None,
    bucket_bytes: int | None = None,
    master_weights: bool | None = None,
    reduce_dtype: torch.dtype | None = None,
    step_in_backward: bool = False,
    transport: Literal["copy"] | None = None,
    overlap: bool = True,
    check_gradients: bool = True,
) -> ShardedOptimizer:
    """The optimizer `opt` of `model`, with its state (and in stage 2 its gradients) spread over the ranks. Collective.

    Parameters and buffers of the model take the values of rank 0. The parameters become views of flat buffers: move the
    model to its device and dtype before. Parameters of the model that `opt` does not have are never updated.
    Without an initialised process group, or with one rank, the result works without communication.

    Args:
        opt: an optimizer of this library; its chain decides how parameters are cut (`opt.needs`).
        model: the module that has the parameters. In stage 1 it may be wrapped in DistributedDataParallel.
        stage: 1: gradients are averaged already when `step` is called, by DistributedDataParallel or by hand; the first
            step compares them.
            2: the model is not wrapped; gradients are summed over the ranks as backward makes them, each rank keeps its
            part of the average, and `p.grad` is gone. Every rank must make equally many synchronised backward passes.
        group: the ranks that take part, all by default; or a mesh of one dimension, or of two for hybrid sharding: the
            state is spread over the second dimension, and the first one holds copies. For a model that is tensor
            parallel on another dimension of a mesh, the data parallel one: `mesh["dp"]`.
        layout: 'even' cuts every bucket into equal slices, 'whole' gives each parameter to one rank. By default what
            the chain needs: `opt.needs` is found by recording where a callback does not declare it.
        cost: what a step on a parameter costs, in any unit: balances the owners of whole parameters. Its number of
            elements by default.
        bucket_bytes: size of the flat buffers in bytes; by default a 12th of the parameters, between 25 and 256 MiB.
        master_weights: whether parameters in bfloat16 or float16 step on a float32 copy, of which each rank holds its
            slices; by default what `opt` was made with.
        reduce_dtype: stage 2: gradients are exchanged in their own dtype and summed in this one, in the order of the
            ranks, so that sums are the same in every run. By default the backend sums them in their own dtype.
        step_in_backward: stage 2: step each bucket as soon as it is reduced, beside the rest of the backward pass;
            `step` then only counts. Gives up clipping, `GradScaler`, and changing hypers between backward and step.
        transport: 'copy' moves buckets between the GPUs of a node by copies over NVLink instead of by kernels of NCCL,
            which leaves the multiprocessors to the model. By default what the process group has.
        overlap: whether parameters come back under the next forward pass. Without, they are complete when `step`
            returns (on CUDA: for what is enqueued next), for code that reads them in ways of its own.
        check_gradients: stage 1: whether the first step of each parameter compares its gradients on all ranks, and is
            refused where they have not been averaged. False is for gradients that differ on purpose.

    Raises:
        RuntimeError: torchrun has started several processes, and no process group has been initialised.
        RanksDiffer: on all ranks, naming what differs: names, shapes, dtypes, groups, hyper-parameters, chain, stage.
        TypeError, ValueError: on all ranks, something that cannot be sharded.
    """
    if group is None:
        _check_started()
    ranks = seat(group)
    kind: Kind = "even"
    masters = False
    params: list[Tensor] = []
    specs: list[ParamSpec] = []
    moved: Transport | None = None
    problem: Exception | None = None
    try:
        _check(opt, model, stage)
        _check_dtype(reduce_dtype, stage)
        _check_numbers(bucket_bytes, cost)
        if step_in_backward:
            _check_in_backward(opt, stage)
        moved = _transport(opt, ranks, transport)
        kind = _kind(opt, layout)
        params = [p for each in opt.param_groups for p in each["params"]]
        specs = specs_of(opt, model, ranks, cost)
        masters = opt.master_weights if master_weights is None else bool(master_weights)
        about = _about(opt, stage, bucket_bytes, masters, reduce_dtype)
        report = {
            **about,
            "step_in_backward": bool(step_in_backward),
            "transport": transport,
            "check_gradients": bool(check_gradients),
            "layout": kind,
            **about_groups(opt, specs),
        }
    except Exception as error:  # also of functions of the user, which `cost` and the chain are
        told = str(error) if isinstance(error, TypeError | ValueError) else f"{type(error).__name__}: {error}"
        problem, report = error, {"problem": told}
    try:
        agree_fully(ranks, report)
    except RanksDiffer as different:
        raise different from problem
    if problem:
        raise problem
    along = Along(Spread(params).groups)
    along.compare(lambda: {subject: value for subject, value in report.items() if not _of_parameters(subject)})
    if moved is not None:
        ranks.transport = moved
    synchronize_model(model)  # what another optimizer has stepped
    opt.master_weights = opt.runner.masters = masters
    made = Layout.make(kind, specs, ranks.world_size, bucket_bytes)
    at = cast(Literal[1, 2], stage)
    sharded = ShardedOptimizer(opt, model, ranks, made, params, at, reduce_dtype, step_in_backward, check_gradients)
    sharded.cost, sharded.overlap, sharded.along = cost, overlap, along
    _broadcast_rest(model, params, ranks)
    return sharded


def _of_parameters(subject: str) -> bool:
    """Whether a subject of a report is about this rank's parts."""
    return subject.startswith(("params[", "order in"))


def _check(opt: Any, model: Any, stage: Any) -> None:
    """Refuse what is no optimizer, no model or no stage."""
    if bare_optimizer(opt) is not opt:
        raise TypeError(
            f"this is a {type(opt).__name__}, which stands for an optimizer: shard the optimizer itself, and give what "
            f"shard() makes to prepare() or setup_optimizers()"
        )
    if isinstance(opt, ShardedOptimizer):
        raise TypeError("this optimizer is sharded already")
    if is_within(opt):
        raise TypeError(
            "this optimizer has been sharded, and holds only this rank's part of its state: go on with the one that "
            "shard() gave, or shard a new one"
        )
    if not isinstance(opt, Optimizer):
        hint = ": wrap it in fastopt.OptimWrapper" if isinstance(opt, torch.optim.Optimizer) else ""
        raise TypeError(f"shard() takes an optimizer of fastopt, got a {type(opt).__name__}{hint}")
    for cb in opt.cbs:
        if isinstance(cb, TorchStep) and evaluates_closure(cb.opt):
            raise TypeError(
                f"{type(cb.opt).__name__} couples all parameters and evaluates the loss itself: not shardable"
            )
        if isinstance(cb, TorchStep) and isinstance(cb.opt, torch.optim.SparseAdam):
            raise TypeError("SparseAdam takes sparse gradients, which have no slices: use Adam with dense gradients")
        if isinstance(cb, TorchStep) and any(is_spread(p) for group in opt.param_groups for p in group["params"]):
            raise TypeError(
                f"{type(cb.opt).__name__} steps DTensors in its own way, without shard(): use an optimizer of fastopt, "
                f"or fully_shard(model, mesh=mesh['dp'])"
            )
    if any(group.get("capturable") for group in opt.param_groups):
        raise ValueError(
            "a group is capturable=True, but a sharded step cannot be captured in a CUDA graph: its ranks agree on the "
            "host on what steps. Build the optimizer without it, or use fully_shard(model), whose steps can be captured"
        )
    if not isinstance(model, nn.Module):
        raise TypeError(f"shard() takes the model as an nn.Module, got a {type(model).__name__}")
    if stage not in (1, 2):
        hint = ", stage 3 is torch.distributed.fsdp.fully_shard(model)" if stage == 3 else ""
        raise ValueError(f"stage is 1 or 2{hint}; got {stage!r}")
    if stage == 2 and isinstance(model, DistributedDataParallel):
        raise ValueError("stage 2 averages gradients itself: pass model.module and train that, or use stage=1")
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag) and module.sparse:
            raise ValueError(f"{name!r} makes sparse gradients, which have no slices: build it with sparse=False")
        if isinstance(module, torch.jit.ScriptModule):
            raise ValueError(
                f"{name or 'the model'!r} has been compiled by torch.jit, whose modules cannot wait for parameters: "
                f"use torch.compile, or script the model after training"
            )


def _check_started() -> None:
    """Refuse a rank of torchrun without a process group: each would train a model of its own."""
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if dist.is_torchelastic_launched() and started > 1 and not dist.is_initialized():
        raise RuntimeError(
            f"torchrun has started {started} processes, but there is no process group: call "
            f"torch.distributed.init_process_group() before shard()"
        )


def _check_numbers(bucket_bytes: Any, cost: Any) -> None:
    """Refuse what is no size of a bucket, and no function of a parameter."""
    if bucket_bytes is not None and (not isinstance(bucket_bytes, int) or bucket_bytes < 1):
        raise ValueError(f"bucket_bytes is a positive number of bytes, got {bucket_bytes!r}")
    if cost is not None and not callable(cost):
        raise TypeError(f"cost is a function of a parameter that returns a number, got {cost!r}")


def _check_dtype(reduce_dtype: Any, stage: int) -> None:
    """Refuse what sums cannot be made in."""
    if reduce_dtype is None:
        return
    if not isinstance(reduce_dtype, torch.dtype) or not reduce_dtype.is_floating_point:
        raise TypeError(f"reduce_dtype is a floating-point dtype such as torch.float32, got {reduce_dtype!r}")
    if stage == 1:
        raise ValueError("in stage 1 gradients are averaged by others: reduce_dtype is for stage 2")


def _transport(opt: Optimizer, ranks: Ranks, name: str | None) -> Transport | None:
    """The transport that was asked for; None for that of the group."""
    if name is None:
        return None
    if name != "copy":
        raise ValueError(f"transport is 'copy' or None, got {name!r}")
    if ranks.group is None or ranks.world_size == 1:
        return None
    return copies(ranks.group, {p.device for group in opt.param_groups for p in group["params"]})


def _check_in_backward(opt: Optimizer, stage: int) -> None:
    """Refuse what cannot step bucket by bucket while backward makes gradients."""
    if stage == 1:
        raise ValueError(
            "in stage 1 gradients are averaged by others when backward has ended: step_in_backward is for stage 2"
        )
    unsaid = undeclared(opt.cbs)
    if unsaid:
        raise ValueError(
            f"step_in_backward needs to know what {', '.join(unsaid)} must see of a parameter before the first step: "
            f"declare it (cb.needs = 'elementwise', 'norm' or 'whole')"
        )
    at_once = [cb_name(cb) for cb in opt.cbs if hasattr(cb, "step_all")]
    if at_once:
        raise ValueError(
            f"step_in_backward steps bucket by bucket, but {', '.join(at_once)} steps on all parameters at once: use "
            f"an optimizer of this library"
        )


def _kind(opt: Optimizer, layout: str | None) -> Kind:
    """The kind of layout that was asked for, or that the chain needs."""
    if layout not in (None, "even", "whole"):
        raise ValueError(f"layout is 'even' or 'whole', got {layout!r}")
    if layout == "whole":
        return "whole"
    if opt.needs != "whole":
        return "even"
    if layout == "even":
        unsaid = undeclared(opt.cbs)
        hint = f" (or says nothing and cannot be recorded: {', '.join(unsaid)})" if unsaid else ""
        raise ValueError(f"layout='even' cuts parameters, but a callback of the chain needs whole ones{hint}")
    return "whole"


def _about(
    opt: Optimizer, stage: int, bucket_bytes: int | None, masters: bool, reduce_dtype: torch.dtype | None
) -> dict[str, Any]:
    """What must be equal on all ranks, apart from the groups.

    The executors too: some chains run with other collectives by one than by another.
    """
    name = requested(opt.runner.name)[0]
    devices = {p.device.type for group in opt.param_groups for p in group["params"]}
    return {
        "optimizer": type(opt).__name__,
        "executors": ", ".join(sorted(executor_for(device, name) for device in devices)),
        "chain": ", ".join(cb_name(cb) for cb in opt.cbs),
        "stage": stage,
        "bucket_bytes": bucket_bytes,
        "master_weights": masters,
        "reduce_dtype": str(reduce_dtype),
        "number of groups": len(opt.param_groups),
    }


def _broadcast_rest(model: nn.Module, sharded: Sequence[Tensor], ranks: Ranks) -> None:
    """Give buffers, and parameters that the optimizer does not have, the values of rank 0."""
    done = {id(p) for p in sharded}
    rest: list[Tensor] = [p for p in model.parameters() if id(p) not in done]
    for tensor in [*rest, *model.buffers()]:
        if tensor.device.type != "meta":
            ranks.broadcast(part_of(tensor))
