"""Many devices: torchrun's processes, FSDP2 and HSDP, recomputed activations, sequence parallelism."""

import os
import re
import shutil
import sys
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
import torch.distributed._functional_collectives as collectives
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core.config import UserError, require

PATIENCE = timedelta(hours=6)  # for which processes wait for one another: their work ends at very different times


@dataclass(frozen=True)
class TokenSplit:
    """Processes that share a video (Ulysses). Each holds a part of every frame's tokens, and in attention some heads.

    A loss has the same value on all of them, and its gradient is the mean of theirs, which FSDP takes anyway. Without a
    `group` one process holds the whole video, and the methods return what they get.
    """

    group: dist.ProcessGroup | None = None

    def own_tokens(self, x: Tensor, frames: int) -> Tensor:
        """This process's part of every frame's tokens, padded with zeros: [..., F*n, D] -> [..., F*n/P, D]."""
        if self.group is None:
            return x
        x, size = x.unflatten(-2, (frames, -1)), self.group.size()
        return F.pad(x, (0, 0, 0, -x.shape[-2] % size)).chunk(size, -2)[self.group.rank()].flatten(-3, -2)

    def all_tokens(self, x: Tensor, frames: int, count: int) -> Tensor:
        """The inverse of `own_tokens`, `count` being n: [B, F*n/P, D] -> [B, F*n, D]."""
        if self.group is None:
            return x
        parts = collectives.all_gather_single_autograd(x.contiguous(), 0, self.group)
        parts = rearrange(parts, "(p b) (f n) d -> b f (p n) d", p=self.group.size(), f=frames)
        return parts[:, :, :count].flatten(1, 2)

    def not_padding(self, frames: int, count: int, device: torch.device) -> Tensor | None:
        """Indices, among all tokens that `to_heads` returns, of those that aren't padding. None if none is."""
        if self.group is None or count % self.group.size() == 0:
            return None
        places = torch.arange(count + -count % self.group.size()).view(self.group.size(), 1, -1)  # in a frame
        return (places < count).expand(-1, frames, -1).flatten().nonzero()[:, 0].to(device)

    def to_heads(self, x: Tensor) -> Tensor:
        """All heads of own tokens -> own heads of all tokens, reordered: [B, n, P*h, d] -> [B, P*n, h, d]."""
        return self.exchange(x, sent=2, received=1)

    def to_tokens(self, x: Tensor) -> Tensor:
        """The inverse of `to_heads`."""
        return self.exchange(x, sent=1, received=2)

    def exchange(self, x: Tensor, sent: int, received: int) -> Tensor:
        """All-to-all: a part of axis `sent` goes to each process, and what arrives is joined along axis `received`."""
        if self.group is None:
            return x
        parts = torch.stack(x.chunk(self.group.size(), sent))  # the compiler would take seconds to read einops
        parts = collectives.all_to_all_single_autograd(parts, None, None, self.group)
        return torch.cat(parts.unbind(), received)


@dataclass(frozen=True)
class Processes:
    """This process among those that torchrun started; without torchrun, the only one."""

    rank: int
    world: int
    device: torch.device
    mesh: dist.DeviceMesh | None  # None for a single process
    sequence: int = 1  # how many neighbouring ranks share a video
    split: TokenSplit = TokenSplit()  # how they do

    def share(self, batch: int, accumulate: int, step: int) -> list[list[int]]:
        """This rank's sample numbers at a step, by micro-batch. The whole batch is the same for any number of ranks."""
        teams, team = self.world // self.sequence, self.rank // self.sequence
        accumulate = accumulate or max(1, batch // teams)  # 0: a micro-batch for each sample
        size, rest = divmod(batch, teams * accumulate)
        among = f"{teams} processes" if self.sequence == 1 else f"{teams} x {self.sequence} processes"
        require(not rest, f"--batch {batch} does not divide into {among} x {accumulate} micro-batches")
        first = step * batch + team * accumulate * size
        return [list(range(first + i * size, first + (i + 1) * size)) for i in range(accumulate)]

    def gather(self, own: list) -> list:
        """The lists of all ranks, joined."""
        lists = [own] * self.world
        if self.mesh is not None:
            dist.all_gather_object(lists, own)
        return [item for items in lists for item in items]

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


def init_processes(sequence: int = 1, heads: int = 0) -> Processes:
    """Start torchrun's processes. `sequence` of them share a video and its heads; UserError if they don't divide."""
    torch.backends.cudnn.allow_tf32 = False  # so that float32 means float32 on GPUs too
    names, meet = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"), ("MASTER_ADDR", "MASTER_PORT")
    launched = "RANK" in os.environ  # others set a part of these, and WORLD_SIZE alone says nothing
    wrong = [n for n in names if not os.environ.get(n, "").isdigit()] + [n for n in meet if n not in os.environ]
    if launched and wrong:
        raise UserError(f"RANK is set, and {wrong[0]} is not, or is no number; start with torchrun, or unset RANK")
    rank, world, local, local_world = (int(os.environ[name]) for name in names) if launched else (0, 1, 0, 1)
    sequence = sequence or world  # 0: all of them
    require(world % sequence == 0, f"--sequence {sequence}: must divide the number of processes, {world}")
    require(heads % sequence == 0, f"{heads} attention heads do not divide among {sequence} processes; start fewer")
    device = torch.device("cuda", local) if torch.cuda.is_available() else torch.device("cpu")
    if not launched:
        return Processes(0, 1, device, None)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=PATIENCE)
    # Shard within a node, replicate over nodes (HSDP).
    shape = {"replicate": world // local_world, "shard": local_world} if world > local_world else {"shard": world}
    mesh = dist.init_device_mesh(device.type, tuple(shape.values()), mesh_dim_names=tuple(shape))
    split = TokenSplit(dist.new_subgroups(sequence, timeout=PATIENCE)[0] if sequence > 1 else None)
    return Processes(rank, world, device, mesh, sequence, split)


def start_compiler(device: torch.device) -> None:
    """Before torch.compile: UserError if it lacks a C++ compiler; and too many variants of a block become an error."""
    name = os.environ.get("CXX") or ("clang++" if sys.platform == "darwin" else "g++")
    if device.type == "cpu" and not shutil.which(name):
        raise UserError(f"torch.compile: no C++ compiler {name}; install it, or pass --compile false")
    import torch._dynamo  # takes seconds

    # A block has 4 to 7: with and without gradients of its input and its weights. Clips of other shapes add some.
    torch._dynamo.config.recompile_limit, torch._dynamo.config.fail_on_recompile_limit_hit = 64, True


def prepare(model: nn.Module, procs: Processes, compile: bool, recompute: str = "none", dtype="auto") -> nn.Module:
    """Move a network to the device, split its videos' tokens, and recompute, compile and shard it block by block.

    Of several processes, rank 0 has the weights; of the other ranks' networks only the shapes count.
    """
    if compile:
        start_compiler(procs.device)
    model.split = procs.split
    for block in model.blocks:
        if recompute == "full":
            block.forward = recompute_forward(block)
        if compile:
            block.compile()
    if procs.mesh is None:
        return model.to(procs.device)
    from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict  # take seconds
    from torch.distributed.fsdp import fully_shard

    whole = model.state_dict()
    model.to("meta")
    in_float32 = [child for name, child in model.named_children() if re.search(getattr(model, "float32", "$^"), name)]
    for part in (*model.blocks, *in_float32, model):
        policy = precision(procs.device, "float32" if part in in_float32 else dtype)
        fully_shard(part, mesh=procs.mesh, mp_policy=policy)
    model.to_empty(device=procs.device)
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True)  # one by one: only rank 0 holds all
    set_model_state_dict(model, whole if procs.rank == 0 else {}, options=options)
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # about in-place operations; we have none
    return model


def precision(device: torch.device, dtype: str):
    """FSDP's policy: on GPUs parameters are gathered in bfloat16, unless `dtype` is "float32"; on CPUs as they are."""
    from torch.distributed.fsdp import MixedPrecisionPolicy

    gathered = torch.bfloat16 if device.type == "cuda" and dtype != "float32" else None
    # Gradients are reduced in float32. Inputs aren't cast: timesteps and rotary tables need float32.
    return MixedPrecisionPolicy(gathered, torch.float32, cast_forward_inputs=False)


def recompute_forward(block: nn.Module) -> Callable:
    """The block's forward pass, of which only the inputs are kept: the backward pass computes the rest again."""
    forward = block.forward

    def call(*args):
        tensors = (x for x in (*args, *block.parameters()) if isinstance(x, Tensor))
        if not torch.is_grad_enabled() or not any(x.requires_grad for x in tensors):
            return forward(*args)  # the compiler can't recompute what has no gradient
        return checkpoint(forward, *args, use_reentrant=False, preserve_rng_state=False)  # nothing here is random

    return call


def fast_bfloat16(device: torch.device) -> bool:
    """Whether bfloat16 multiplies faster than float32. From CPU features, not timing, so that all ranks agree."""
    can = torch.cpu.get_capabilities()
    # Measured without AMX: Intel's bfloat16 takes 1.7 times as long as float32, AMD's a half to a quarter.
    fast = can.get("amx_bf16") or (can.get("avx512_bf16") and "Intel" not in can.get("cpu_name", ""))
    return device.type == "cuda" or bool(fast)


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """`dtype` is "bfloat16", "float32", or "auto": the faster one."""
    fast = fast_bfloat16(device) if dtype == "auto" else dtype == "bfloat16"
    return torch.autocast(device.type, torch.bfloat16, enabled=fast)


def full(tensor: Tensor) -> Tensor:
    """A sharded tensor, gathered (every rank must call); any other tensor as it is."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
