"""Many devices: torchrun's processes, FSDP2 and HSDP, recomputed activations, sequence parallelism.

Parameters are sharded over all processes. Each process gets videos of its own, or several share one (Ulysses): each
holds a part of every frame's tokens, and for attention they exchange tokens for heads.
"""

import contextlib
import os
import re
import shutil
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from core.config import UserError

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; without torchrun, the only one."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None  # None for a single process
    sequence: int = 1  # how many neighbouring ranks share a video
    group: dist.ProcessGroup | None = None  # those ranks, if there are several

    def share(self, batch: int, accumulate: int, step: int) -> list[list[int]]:
        """This rank's sample numbers at a step, by micro-batch. The whole batch is the same for any number of ranks."""
        teams, team = self.world // self.sequence, self.rank // self.sequence
        if batch % (teams * accumulate):
            among = f"{teams} processes" if self.sequence == 1 else f"{teams} x {self.sequence} processes"
            raise UserError(f"--batch {batch} does not divide into {among} x {accumulate} micro-batches")
        own = range(step * batch, (step + 1) * batch)[team * batch // teams :][: batch // teams]
        size = len(own) // accumulate
        return [list(own[i * size : (i + 1) * size]) for i in range(accumulate)]

    def mean(self, value: Tensor) -> float:
        """Average of a scalar over all ranks."""
        value = value.detach().float().clone()
        if self.mesh is not None:
            dist.all_reduce(value)
        return value.item() / self.world

    def gather(self, own: list) -> list:
        """The lists of all ranks, joined."""
        if self.mesh is None:
            return own
        lists = [None] * self.world
        dist.all_gather_object(lists, own)
        return [item for items in lists for item in items]

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


def init_processes(sequence: int = 1) -> Processes:
    """Start torchrun's processes: nccl on GPUs, gloo on CPUs. `sequence`: how many ranks share a video; 0 for all."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    world = int(os.environ.get("WORLD_SIZE", 1))
    sequence = sequence or world
    if sequence < 0 or world % sequence:
        raise UserError(f"--sequence {sequence}: must divide the number of processes, {world}")
    if "RANK" not in os.environ:
        return Processes(0, 1, torch.device(kind), None)
    rank, local, local_world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if world > local_world:  # shard within a node, replicate over nodes (HSDP)
        mesh = init_device_mesh(kind, (world // local_world, local_world), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    group = None
    if sequence > 1:
        teams = init_device_mesh(kind, (world // sequence, sequence), mesh_dim_names=("team", "sequence"))
        group = teams["sequence"].get_group()
    return Processes(rank, world, device, mesh, sequence, group)


def check_compiler(device: torch.device) -> None:
    """UserError if torch.compile wouldn't find the C++ compiler that it needs on a CPU."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and sys.platform != "win32" and not shutil.which(name):
        raise UserError(f"torch.compile: no C++ compiler {name}; install it, or pass --compile false")


def prepare(
    model: nn.Module, procs: Processes, compile: bool, recompute: Recompute = "none", dtype: str = "auto"
) -> nn.Module:
    """Move a network to the device, and recompute, compile and (with several processes) shard it block by block."""
    if compile:
        check_compiler(procs.device)
    model.to(procs.device)
    split_sequence(model, procs.group)
    for block in model.blocks:
        if recompute != "none":
            block.forward = recomputed(block.forward, recompute)
        if compile:
            block.compile()
    if procs.mesh is not None:
        shard(model, procs, dtype)
    return model


def shard(model: nn.Module, procs: Processes, dtype: str) -> None:
    """FSDP2, block by block."""
    # Imported late: it takes seconds, which one process need not wait.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    policy = precision(procs.device, dtype)
    for block in model.blocks:
        fully_shard(block, mesh=procs.mesh, mp_policy=policy)
    for name, child in model.named_children():  # parts that the network wants in float32
        if re.search(getattr(model, "float32", "$^"), name):
            fully_shard(child, mesh=procs.mesh, mp_policy=MixedPrecisionPolicy())
    fully_shard(model, mesh=procs.mesh, mp_policy=policy)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # it is about in-place ops; we have none


def precision(device: torch.device, dtype: str):
    """FSDP's policy: on GPUs parameters are gathered in bfloat16, unless `dtype` is "float32"; on CPUs in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Gradients are reduced in float32. Inputs aren't cast, because timesteps and rotary tables need float32.
    if device.type == "cuda" and dtype != "float32":
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy()


def recomputed(forward, how: Recompute):
    """`forward` that recomputes activations in the backward pass. "selective" keeps the costliest, "full" none."""
    aten = torch.ops.aten
    kept = [  # matrix products and attention
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
    ]  # fmt: skip
    options = {"use_reentrant": False, "preserve_rng_state": False}  # no network here draws random numbers
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)
    return partial(checkpoint, forward, **options)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies in bfloat16 natively. Older CPUs emulate it, very slowly."""
    can = torch.cpu.get_capabilities()
    return bool(device.type == "cuda" or can.get("avx512_bf16") or can.get("amx_bf16"))


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """`dtype` is "bfloat16", "float32", or "auto": bfloat16 unless the CPU would have to emulate it."""
    if dtype == "auto":
        dtype = "bfloat16" if has_bfloat16(device) else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered (every rank must call); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def split_sequence(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Tell every module that has an attribute `group` which processes share a video with this one."""
    # A loss then has the same value on all of them, and its gradient is the mean of theirs, which FSDP takes anyway.
    for part in model.modules():
        if hasattr(part, "group"):
            part.group = group


def own_tokens(x: Tensor, frames: int, group: dist.ProcessGroup | None) -> Tensor:
    """This process's part of every frame's tokens: [..., F*n, D] -> [..., F*n/P, D]."""
    if group is None:
        return x
    by_frame = x.unflatten(-2, (frames, -1))
    if (count := by_frame.shape[-2]) % group.size():
        raise UserError(f"{count} tokens a frame do not divide among {group.size()} processes; start fewer")
    return by_frame.chunk(group.size(), dim=-2)[group.rank()].flatten(-3, -2)


def all_tokens(x: Tensor, frames: int, group: dist.ProcessGroup | None) -> Tensor:
    """The inverse of `own_tokens`: [B, F*n/P, D] -> [B, F*n, D]."""
    if group is None:
        return x
    parts = collectives.all_gather_tensor_autograd(x.contiguous(), 0, group)
    return rearrange(parts, "(p b) (f n) d -> b (f p n) d", p=group.size(), f=frames)


def tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """From this process's tokens of all heads to all tokens of its heads: [B, n, heads, d] -> [B, P*n, heads/P, d]."""
    if x.shape[2] % group.size():
        raise UserError(f"{x.shape[2]} attention heads do not divide among {group.size()} processes; start fewer")
    return exchange(x, "b n (p h) d", "b (p n) h d", group)  # in another order, which attention doesn't see


def heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `tokens_to_heads`."""
    return exchange(x, "b (p n) h d", "b n (p h) d", group)


def exchange(x: Tensor, split: str, joined: str, group: dist.ProcessGroup) -> Tensor:
    """All-to-all: axis p of `split` counts the parts to send, axis p of `joined` those received."""
    parts = rearrange(x, f"{split} -> p b n h d", p=group.size()).contiguous()
    parts = collectives.all_to_all_single_autograd(parts, None, None, group)
    return rearrange(parts, f"p b n h d -> {joined}")
