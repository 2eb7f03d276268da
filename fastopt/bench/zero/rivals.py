"""The ways to train on several ranks that are timed: `shard` of this library, and what others have.

Each is a function from a `Setting` to one or several named iterations, which share a model and an optimizer.
"""

from __future__ import annotations

import importlib.util
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

from ... import Adam
from ...distributed import shard
from ...distributed.ownership.cutting import BUCKETS
from .model import LanguageModel, Size

Iteration = Callable[[], Any]
Iterations = dict[str, Iteration]

COMPUTE = "compute only"
OURS = "fastopt stage 2"
OTHERS = ("deepspeed1", "deepspeed2", "megatron")
"""Of other packages: each is measured by itself, so that the rest goes on where one of these fails."""
_TORCH_ADAMW: dict[str, Any] = {"lr": 1e-4, "betas": (0.9, 0.99), "eps": 1e-5, "weight_decay": 0.01}


@dataclass(frozen=True)
class Setting:
    """What all of them train, on which device, with which data of this rank."""

    size: Size
    device: torch.device
    words: Tensor
    following: Tensor

    def model(self, dtype: torch.dtype = torch.bfloat16) -> LanguageModel:
        """The same model on every rank and for everybody."""
        torch.manual_seed(0)
        with self.device:
            return LanguageModel(self.size).to(dtype)

    def ddp(self, dtype: torch.dtype = torch.bfloat16) -> DistributedDataParallel:
        """The model in DistributedDataParallel."""
        ids = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(self.model(dtype), device_ids=ids, gradient_as_bucket_view=True)

    def backward(self, model: Any) -> None:
        """One forward and one backward pass."""
        model(self.words, self.following).backward()


def compute_only(s: Setting) -> Iterations:
    """Forward and backward, and a tiny all-reduce, so that no rank runs ahead of the slowest."""
    model, one = s.model(), torch.ones(1, device=s.device)

    def iterate() -> None:
        s.backward(model)
        dist.all_reduce(one)
        one.fill_(1)
        model.zero_grad(set_to_none=True)

    return {COMPUTE: iterate}


def _ours(s: Setting, opt: Any, model: Any, name: str) -> Iterations:
    def iterate() -> None:
        s.backward(model)
        opt.step()
        opt.zero_grad()

    def clipping() -> None:
        s.backward(model)
        opt.clip_grad_norm_(1.0)
        opt.step()
        opt.zero_grad()

    return {name: iterate, f"{name}, clipping": clipping}


def _adam(params: Any) -> Adam:
    return Adam(params, lr=1e-4, master_weights=True)


def stage_2(s: Setting) -> Iterations:
    """One group of parameters."""
    model = s.model()
    return _ours(s, shard(_adam(model.parameters()), model, stage=2), model, OURS)


def stage_2_groups(s: Setting) -> Iterations:
    """As many groups as there are tensors."""
    model = s.model()
    groups = [[p] for p in model.parameters()]
    name = f"{OURS}, {len(groups)} groups"
    return {name: _ours(s, shard(_adam(groups), model, stage=2), model, name)[name]}


def stage_2_fine(s: Setting) -> Iterations:
    """Twice as many buckets as by default, each half as large."""
    model, name = s.model(), f"{OURS}, twice as many buckets"
    half = sum(p.numel() * p.element_size() for p in model.parameters()) // (2 * BUCKETS)
    opt = shard(_adam(model.parameters()), model, stage=2, bucket_bytes=half)
    return {name: _ours(s, opt, model, name)[name]}


def stage_2_in_backward(s: Setting) -> Iterations:
    """Each bucket steps as soon as it is reduced."""
    model, name = s.model(), f"{OURS}, stepping in backward"
    opt = shard(_adam(model.parameters()), model, stage=2, step_in_backward=True)
    return {name: _ours(s, opt, model, name)[name]}


def stage_2_copies(s: Setting) -> Iterations:
    """Buckets moved by copies between the GPUs instead of by NCCL."""
    model, name = s.model(), f"{OURS}, copies"
    return _ours(s, shard(_adam(model.parameters()), model, stage=2, transport="copy"), model, name)


def stage_2_copies_in_backward(s: Setting) -> Iterations:
    """Both."""
    model, name = s.model(), f"{OURS}, copies, stepping in backward"
    opt = shard(_adam(model.parameters()), model, stage=2, transport="copy", step_in_backward=True)
    return {name: _ours(s, opt, model, name)[name]}


def stage_2_float32_sums(s: Setting) -> Iterations:
    """Gradients summed over the ranks in float32, in the order of the ranks."""
    model, name = s.model(), f"{OURS}, float32 sums"
    opt = shard(_adam(model.parameters()), model, stage=2, reduce_dtype=torch.float32)
    return {name: _ours(s, opt, model, name)[name]}


def stage_1(s: Setting) -> Iterations:
    """DistributedDataParallel averages the gradients."""
    model = s.ddp()
    return _ours(s, shard(_adam(model.parameters()), model, stage=1), model, "fastopt stage 1")


def _torch_step(s: Setting, opt: Any, model: Any, autocast: bool) -> Iteration:
    def iterate() -> None:
        with torch.autocast(s.device.type, torch.bfloat16, enabled=autocast):
            loss = model(s.words, s.following)
        loss.backward()
        opt.step()
        opt.zero_grad(set_to_none=True)

    return iterate


def ddp_bfloat16(s: Setting) -> Iterations:
    """No float32 master weights: less work and less precision than all the others."""
    model = s.ddp()
    opt = torch.optim.AdamW(model.parameters(), **_TORCH_ADAMW, fused=True)
    return {"DDP bfloat16 without master, torch fused": _torch_step(s, opt, model, False)}


def ddp_float32(s: Setting) -> Iterations:
    """Float32 parameters under autocast."""
    model = s.ddp(torch.float32)
    opt = torch.optim.AdamW(model.parameters(), **_TORCH_ADAMW, fused=True)
    return {"DDP float32, torch fused": _torch_step(s, opt, model, True)}


def ddp_zero_redundancy(s: Setting) -> Iterations:
    """torch's optimizer with sharded state."""
    model = s.ddp(torch.float32)
    opt = ZeroRedundancyOptimizer(
        model.parameters(), torch.optim.AdamW, parameters_as_bucket_view=True, **_TORCH_ADAMW, fused=True
    )
    return {"DDP float32, ZeroRedundancyOptimizer": _torch_step(s, opt, model, True)}


def _fully_shard(s: Setting, reshard: bool) -> Iteration:
    model = s.model(torch.float32)
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)
    options: dict[str, Any] = {
        "mesh": init_device_mesh(s.device.type, (dist.get_world_size(),)),
        "mp_policy": policy,
        "reshard_after_forward": reshard,
    }
    for layer in model.layers:
        fully_shard(layer, **options)
    fully_shard(model, **options)
    opt = torch.optim.AdamW(model.parameters(), **_TORCH_ADAMW, fused=True)
    return _torch_step(s, opt, model, False)


def fully_shard_2(s: Setting) -> Iterations:
    """Parameters stay whole between forward and backward."""
    return {"fully_shard without resharding, torch fused": _fully_shard(s, False)}


def fully_shard_3(s: Setting) -> Iterations:
    """Parameters are gathered again in backward."""
    return {"fully_shard, torch fused": _fully_shard(s, True)}


def _deepspeed(s: Setting, stage: int) -> Iterations:
    # The package notes the device of the machine that its wheel was built on.
    os.environ.setdefault("DS_ACCELERATOR", s.device.type)
    import deepspeed

    model = s.model()
    opt = torch.optim.AdamW(model.parameters(), **_TORCH_ADAMW, fused=True)
    config = {
        "train_micro_batch_size_per_gpu": s.size.batch,
        "gradient_accumulation_steps": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 0.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": stage,
            "overlap_comm": True,
            "contiguous_gradients": True,
            "reduce_bucket_size": 50_000_000,
            "allgather_bucket_size": 50_000_000,
        },
        "steps_per_print": 10**9,
    }
    engine = deepspeed.initialize(model=model, optimizer=opt, config=config)[0]

    def iterate() -> None:
        engine.backward(engine(s.words, s.following))
        engine.step()

    return {f"DeepSpeed stage {stage}": iterate}


def deepspeed_1(s: Setting) -> Iterations:
    """ZeRO stage 1."""
    return _deepspeed(s, 1)


def deepspeed_2(s: Setting) -> Iterations:
    """ZeRO stage 2."""
    return _deepspeed(s, 2)


def megatron(s: Setting) -> Iterations:
    """Megatron-Core's distributed optimizer with both overlaps."""
    from megatron.core import distributed, optimizer, parallel_state
    from megatron.core.transformer.transformer_config import TransformerConfig

    if not parallel_state.is_initialized():
        parallel_state.initialize_model_parallel()
    config = TransformerConfig(
        num_layers=s.size.layers,
        hidden_size=s.size.width,
        num_attention_heads=s.size.heads,
        bf16=True,
        params_dtype=torch.bfloat16,
    )
    settings = distributed.DistributedDataParallelConfig(
        grad_reduce_in_fp32=False,
        overlap_grad_reduce=True,
        overlap_param_gather=True,
        use_distributed_optimizer=True,
    )
    model = distributed.DistributedDataParallel(config, settings, s.model())
    adam = optimizer.OptimizerConfig(
        optimizer="adam",
        lr=1e-4,
        adam_beta1=0.9,
        adam_beta2=0.99,
        adam_eps=1e-5,
        weight_decay=0.01,
        bf16=True,
        params_dtype=torch.bfloat16,
        use_distributed_optimizer=True,
        overlap_param_gather=True,
        clip_grad=0.0,
    )
    opt = optimizer.get_megatron_optimizer(adam, [model])

    def iterate() -> None:
        model.zero_grad_buffer()
        opt.zero_grad()
        s.backward(model)
        model.finish_grad_sync()
        opt.step()

    return {"Megatron-Core distributed optimizer": iterate}


def _installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def builders(device: torch.device) -> dict[str, Callable[[Setting], Iterations]]:
    """All of them by the name for the command line, those of packages that are not installed left out."""
    on_gpu = device.type == "cuda"
    found: dict[str, Callable[[Setting], Iterations]] = {
        "stage2": stage_2,
        "groups": stage_2_groups,
        "fine": stage_2_fine,
        "in-backward": stage_2_in_backward,
        **({"copies": stage_2_copies, "copies-in-backward": stage_2_copies_in_backward} if on_gpu else {}),
        "float32-sums": stage_2_float32_sums,
        "stage1": stage_1,
        "ddp-bf16": ddp_bfloat16,
        "ddp": ddp_float32,
        "zero-redundancy": ddp_zero_redundancy,
        "fully-shard-2": fully_shard_2,
        "fully-shard-3": fully_shard_3,
    }
    if _installed("deepspeed"):
        found |= {"deepspeed1": deepspeed_1, "deepspeed2": deepspeed_2}
    if _installed("megatron"):
        found["megatron"] = megatron
    return found


def stretches(names: Sequence[str]) -> list[list[str]]:
    """Who is measured together: first all that is ours or torch's, then each other package by itself."""
    ours = [name for name in names if name not in OTHERS]
    return [each for each in [ours, *([name] for name in names if name in OTHERS)] if each]


def notes() -> list[str]:
    """Who is missing."""
    names = {"deepspeed": "DeepSpeed", "megatron": "Megatron-Core"}
    return [f"{name} is not installed here." for package, name in names.items() if not _installed(package)]
