"""Many devices: the processes that torchrun starts, FSDP2 and HSDP, recomputed activations, split sequences.

Nothing here knows about FlashMotion. Parameters are sharded over all processes. Videos are shared out among them, or
one video among several (Ulysses): each holds its part of every frame's tokens, and for attention all trade them for a
part of the heads.
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
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from core.config import UserError

Recompute = Literal["none", "selective", "full"]


@dataclass(frozen=True)
class Processes:
    """Who this process is among those torchrun started (one, without torchrun)."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None  # None for a single process
    sequence: int = 1  # how many neighbouring ranks share one video
    group: dist.ProcessGroup | None = None  # those ranks, if they are several

    def share(self, batch: int, accumulate: int, step: int) -> list[list[int]]:
        """This rank's sample numbers at a step, by micro-batch. The global batch is that of any number of ranks."""
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
    """Read torchrun's environment: nccl on GPUs, gloo on CPU, a (replicate, shard) mesh over several nodes.

    `sequence`: ranks that share one video; 0 for all of them.
    """
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


# --- networks ---------------------------------------------------------------------------------------------------------


def check_compiler(device: torch.device) -> None:
    """UserError where torch.compile would not find the C++ compiler that it needs on a CPU."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and sys.platform != "win32" and not shutil.which(name):
        raise UserError(f"torch.compile: no C++ compiler {name}; install it, or pass --compile false")


def prepare(
    model: nn.Module, procs: Processes, compile: bool, recompute: Recompute = "none", dtype: str = "auto"
) -> nn.Module:
    """Move to the device and, block by block, recompute, compile and shard. With one process nothing is sharded."""
    if compile:
        check_compiler(procs.device)
    model.to(procs.device)
    policy = precision(procs.device, dtype)
    split_sequence(model, procs.group)
    for block in model.blocks:
        if recompute != "none":
            block.forward = recomputed(block.forward, recompute)
        if compile:
            block.compile()
        if procs.mesh is not None:
            fully_shard(block, mesh=procs.mesh, mp_policy=policy)
    if procs.mesh is not None:
        for name, child in model.named_children():  # parts that a network wants in float32 as a whole
            if re.search(getattr(model, "float32", "$^"), name):
                fully_shard(child, mesh=procs.mesh, mp_policy=MixedPrecisionPolicy())
        fully_shard(model, mesh=procs.mesh, mp_policy=policy)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # warns of in-place sums; there are none
    return model


def precision(device: torch.device, dtype: str) -> MixedPrecisionPolicy:
    """How shards travel: in float32, but on GPUs, unless `dtype` is "float32", they are gathered in bfloat16.

    Gradients are reduced in float32, and inputs stay as they are: timesteps and rotary tables need float32.
    """
    if device.type == "cuda" and dtype != "float32":
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy()


def recomputed(forward, how: Recompute):
    """`forward`, keeping little of what its gradient needs: that is computed again when asked for.

    "full" keeps the inputs alone. "selective" also the results of matrix products and attention, which cost the most.
    """
    aten = torch.ops.aten
    kept = {
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
    }  # fmt: skip

    def policy(_context, op, *_args, **_kwargs) -> CheckpointPolicy:
        return CheckpointPolicy.MUST_SAVE if op in kept else CheckpointPolicy.PREFER_RECOMPUTE

    options = {"use_reentrant": False, "preserve_rng_state": False}  # no network here draws random numbers
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, policy)
    return partial(checkpoint, forward, **options)


def has_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 itself: a CPU without such instructions emulates it, very slowly."""
    can = torch.cpu.get_capabilities()
    return bool(device.type == "cuda" or can.get("avx512_bf16") or can.get("amx_bf16"))


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """`dtype` is "bfloat16", "float32", or "auto": bfloat16 unless a CPU would have to emulate it."""
    if dtype == "auto":
        dtype = "bfloat16" if has_bfloat16(device) else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (every rank must call), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


# --- split sequences --------------------------------------------------------------------------------------------------


def split_sequence(model: nn.Module, group: dist.ProcessGroup | None) -> None:
    """Tell every part that works on tokens (it has an attribute `group`) who shares a video with this process.

    A loss then has the same value on every rank of the group, and the mean of their gradients is its gradient: the mean
    that FSDP takes over all ranks.
    """
    for part in model.modules():
        if hasattr(part, "group"):
            part.group = group


def own_tokens(x: Tensor, frames: int, group: dist.ProcessGroup | None) -> Tensor:
    """This process's part of every frame's tokens: [..., F*n, D] -> [..., F*n/P, D]."""
    if group is None:
        return x
    by_frame = x.unflatten(-2, (frames, -1))
    if by_frame.shape[-2] % group.size():
        raise UserError(
            f"{by_frame.shape[-2]} tokens a frame do not divide among {group.size()} processes; start fewer"
        )
    return by_frame.chunk(group.size(), dim=-2)[group.rank()].flatten(-3, -2)


def all_tokens(x: Tensor, frames: int, group: dist.ProcessGroup | None) -> Tensor:
    """The inverse of `own_tokens`: [B, F*n/P, D] -> [B, F*n, D]."""
    if group is None:
        return x
    parts = collectives.all_gather_tensor_autograd(x.contiguous(), 0, group)
    return rearrange(parts, "(p b) (f n) d -> b (f p n) d", p=group.size(), f=frames)


def tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All tokens of this process's heads for its tokens of all heads: [B, n, heads, d] -> [B, P*n, heads/P, d].

    The order of the tokens changes, which attention does not see.
    """
    if x.shape[2] % group.size():
        raise UserError(f"{x.shape[2]} attention heads do not divide among {group.size()} processes; start fewer")
    parts = rearrange(x, "b n (p h) d -> p b n h d", p=group.size()).contiguous()
    parts = collectives.all_to_all_single_autograd(parts, None, None, group)
    return rearrange(parts, "p b n h d -> b (p n) h d")


def heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `tokens_to_heads`."""
    parts = rearrange(x, "b (p n) h d -> p b n h d", p=group.size()).contiguous()
    parts = collectives.all_to_all_single_autograd(parts, None, None, group)
    return rearrange(parts, "p b n h d -> b n (p h) d")
