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
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import Literal

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from core.config import UserError

Recompute = Literal["none", "selective", "full"]


PATIENCE = timedelta(hours=6)  # of processes that wait for one another: their work ends at very different times


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
        """This rank's sample numbers at a step, by micro-batch. The whole batch is the same for any number of ranks.

        `accumulate`: how many micro-batches; 0 is one for each sample.
        """
        teams, team = self.world // self.sequence, self.rank // self.sequence
        accumulate = accumulate or max(1, batch // teams)
        if batch % (teams * accumulate):
            among = f"{teams} processes" if self.sequence == 1 else f"{teams} x {self.sequence} processes"
            raise UserError(f"--batch {batch} does not divide into {among} x {accumulate} micro-batches")
        own = range(step * batch, (step + 1) * batch)[team * batch // teams :][: batch // teams]
        size = len(own) // accumulate
        return [list(own[i * size : (i + 1) * size]) for i in range(accumulate)]

    def total(self, value: Tensor) -> Tensor:
        """Sum of a scalar over all ranks."""
        value = value.detach().float().clone()
        if self.mesh is not None:
            dist.all_reduce(value)
        return value

    def mean(self, value: Tensor) -> float:
        """Average of a scalar over all ranks. This waits for the device."""
        return self.total(value).item() / self.world

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

    def wait_for_first(self, what: str) -> None:
        """Rank 0 says that something of this name is done; the others wait for it, as long as it takes."""
        # Not by a collective: those time out, and keep a GPU busy that waits.
        if self.mesh is not None:
            store = dist.distributed_c10d._get_default_store()
            store.set(what, "done") if self.rank == 0 else store.wait([what], PATIENCE)


def init_processes(sequence: int = 1, heads: int = 0) -> Processes:
    """Start torchrun's processes: nccl on GPUs, gloo on CPUs. `sequence`: how many ranks share a video; 0 for all.

    `heads`: of attention, which must divide among those.
    """
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    torch.backends.cudnn.allow_tf32 = False  # so that float32 means float32 on GPUs too
    world = int(os.environ.get("WORLD_SIZE", 1))
    sequence = sequence or world
    if sequence < 0 or world % sequence:
        raise UserError(f"--sequence {sequence}: must divide the number of processes, {world}")
    if heads % sequence:
        raise UserError(f"{heads} attention heads do not divide among {sequence} processes; start fewer")
    if "RANK" not in os.environ:
        return Processes(0, 1, torch.device(kind, 0) if kind == "cuda" else torch.device(kind), None)
    rank, local, local_world = (int(os.environ[name]) for name in ("RANK", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", timeout=PATIENCE)
    if world > local_world:  # shard within a node, replicate over nodes (HSDP)
        mesh = init_device_mesh(kind, (world // local_world, local_world), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    group = None
    if sequence > 1:
        teams = init_device_mesh(kind, (world // sequence, sequence), mesh_dim_names=("team", "sequence"))
        group = teams["sequence"].get_group()
    return Processes(rank, world, device, mesh, sequence, group)


def start_compiler(device: torch.device) -> None:
    """Before torch.compile: UserError if it wouldn't find the C++ compiler that it needs on a CPU.

    And from here on it stops where it would go back to eager code without a word: at too many variants of a block.
    """
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and sys.platform != "win32" and not shutil.which(name):
        raise UserError(f"torch.compile: no C++ compiler {name}; install it, or pass --compile false")
    import torch._dynamo  # takes seconds

    # A block has 4 to 7: with and without gradients, of its input and its weights. Clips of other shapes add to them.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True


def prepare(
    model: nn.Module, procs: Processes, compile: bool, recompute: Recompute = "none", dtype: str = "auto"
) -> nn.Module:
    """Move a network to the device, and recompute, compile and (with several processes) shard it block by block.

    Of several processes, rank 0 has the weights; of the other ranks' networks only the shapes count.
    """
    if compile:
        start_compiler(procs.device)
    if procs.mesh is None:
        model.to(procs.device)
    split_sequence(model, procs.group)
    for block in model.blocks:
        if recompute != "none":
            block.forward = recomputed(block, recompute)
        if compile:
            block.compile()
    if procs.mesh is not None:
        shard(model, procs, dtype)
    return model


def shard(model: nn.Module, procs: Processes, dtype: str) -> None:
    """FSDP2, block by block."""
    # Imported late: it takes seconds, which one process need not wait.
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor import distribute_tensor

    whole = model.state_dict()
    model.to("meta")
    policy = precision(procs.device, dtype)
    for block in model.blocks:
        fully_shard(block, mesh=procs.mesh, mp_policy=policy)
    for name, child in model.named_children():  # parts that the network wants in float32
        if re.search(getattr(model, "float32", "$^"), name):
            fully_shard(child, mesh=procs.mesh, mp_policy=MixedPrecisionPolicy())
    fully_shard(model, mesh=procs.mesh, mp_policy=policy)
    model.to_empty(device=procs.device)
    for name, own in model.state_dict().items():  # one by one: no device, and no host but rank 0's, holds the whole
        kind = {"dtype": own.dtype, "device": procs.device}
        value = whole[name].to(**kind) if procs.rank == 0 else torch.empty(own.shape, **kind)
        dist.broadcast(value, 0)
        sharded = hasattr(own, "full_tensor")
        own.copy_(distribute_tensor(value, own.device_mesh, own.placements, src_data_rank=None) if sharded else value)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # it is about in-place ops; we have none


def precision(device: torch.device, dtype: str):
    """FSDP's policy: on GPUs parameters are gathered in bfloat16, unless `dtype` is "float32"; on CPUs in float32."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    # Gradients are reduced in float32. Inputs aren't cast, because timesteps and rotary tables need float32.
    if device.type == "cuda" and dtype != "float32":
        return MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    return MixedPrecisionPolicy()


def recomputed(block: nn.Module, how: Recompute) -> Callable:
    """Its forward pass, recomputed in the backward pass. "selective" keeps the costliest activations, "full" none."""
    forward, aten = block.forward, torch.ops.aten
    kept = [  # matrix products and attention
        aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default,
        aten._scaled_dot_product_flash_attention.default, aten._scaled_dot_product_flash_attention_for_cpu.default,
        aten._scaled_dot_product_efficient_attention.default, aten._scaled_dot_product_cudnn_attention.default,
    ]  # fmt: skip
    options = {"use_reentrant": False, "preserve_rng_state": False}  # no network here draws random numbers
    if how == "selective":
        options["context_fn"] = partial(create_selective_checkpoint_contexts, kept)

    def call(*args):
        tensors = (x for x in (*args, *block.parameters()) if isinstance(x, Tensor))
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return forward(*args)  # nothing to keep, and the compiler can't recompute what has no gradient
        # Written out: behind a `functools.partial` the compiler would pass it over, and all it calls with it.
        return checkpoint(forward, *args, **options)

    return call


def fast_bfloat16(device: torch.device) -> bool:
    """Whether the device multiplies faster in bfloat16 than in float32. Most CPUs emulate it, a hundred times slower.

    Told by what the processor is, not by a stopwatch: all processes, and all runs on a machine, must choose alike.
    """
    can = torch.cpu.get_capabilities()
    if device.type == "cuda" or can.get("amx_bf16"):
        return True
    # Measured without AMX: in bfloat16 Intel's takes 1.7 times as long as in float32, AMD's a half to a quarter.
    return bool(can.get("avx512_bf16")) and "Intel" not in can.get("cpu_name", "")


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """`dtype` is "bfloat16", "float32", or "auto": the faster one."""
    if dtype == "auto":
        dtype = "bfloat16" if fast_bfloat16(device) else "float32"
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
    """This process's part of every frame's tokens: [..., F*n, D] -> [..., F*n/P, D].

    Where the n tokens of a frame don't divide among the P processes, zeros are added to them.
    """
    if group is None:
        return x
    by_frame = x.unflatten(-2, (frames, -1))
    by_frame = F.pad(by_frame, (0, 0, 0, -by_frame.shape[-2] % group.size()))
    return by_frame.chunk(group.size(), dim=-2)[group.rank()].flatten(-3, -2)


def all_tokens(x: Tensor, frames: int, count: int, group: dist.ProcessGroup | None) -> Tensor:
    """The inverse of `own_tokens`: [B, F*n/P, D] -> [B, F*n, D], `count` being n, without what was added."""
    if group is None:
        return x
    parts = collectives.all_gather_single_autograd(x.contiguous(), 0, group)
    return rearrange(parts, "(p b) (f n) d -> b f (p n) d", p=group.size(), f=frames)[:, :, :count].flatten(1, 2)


def true_tokens(frames: int, count: int, group: dist.ProcessGroup | None, device: torch.device) -> Tensor | None:
    """The places, among all that `tokens_to_heads` returns, of tokens that `own_tokens` hasn't added. None: all are."""
    if group is None or count % group.size() == 0:
        return None
    places = torch.arange(count + -count % group.size()).view(group.size(), 1, -1)  # in a frame, by process
    return (places < count).expand(-1, frames, -1).flatten().nonzero()[:, 0].to(device)


def tokens_to_heads(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """From this process's tokens of all heads to all tokens of its heads: [B, n, heads, d] -> [B, P*n, heads/P, d]."""
    return exchange(x, "b n (p h) d", "b (p n) h d", group)  # in another order, which attention doesn't see


def heads_to_tokens(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """The inverse of `tokens_to_heads`."""
    return exchange(x, "b (p n) h d", "b n (p h) d", group)


def exchange(x: Tensor, split: str, joined: str, group: dist.ProcessGroup) -> Tensor:
    """All-to-all: axis p of `split` counts the parts to send, axis p of `joined` those received."""
    parts = rearrange(x, f"{split} -> p b n h d", p=group.size()).contiguous()
    parts = collectives.all_to_all_single_autograd(parts, None, None, group)
    return rearrange(parts, f"p b n h d -> {joined}")
