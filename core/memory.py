"""Memory: how much is held, and two ways to hold less of a network.

Weights of 8 bits take half the memory of bfloat16 and change the result a little. Blocks that stay in the host's memory
take almost none of the device's and change nothing; each is copied while the one before it works.
"""

import contextlib
import re
import resource
import sys
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear layer with a weight of 8 bits and one scale an output, which it multiplies out at every call.

    That costs a pass over the weight, little beside a product with thousands of tokens.
    """

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", torch.empty_like(linear.weight, dtype=torch.int8))
        self.register_buffer("scale", torch.empty_like(linear.weight[:, :1]))
        self.bias = linear.bias

    def fill(self, weight: Tensor) -> None:
        """Round a weight [out, in] to the nearest of 255 steps between its row's extremes."""
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        self.weight, self.scale = (weight.float() / scale).round().to(torch.int8), scale.to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)
        return F.linear(x, weight, self.bias.to(x.dtype))


def use_int8(blocks: nn.Module) -> None:
    """Put an Int8Linear, not yet filled, in the place of every linear layer inside."""
    for module in list(blocks.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


class Offload:
    """Keeps blocks of one shape in the host's memory, and on the device copies of two: one works, the next arrives.

    The blocks must be called in their order, round after round. On a GPU the copies come from pinned memory on a stream
    of their own; a CPU, which has nothing to gain, makes the same moves, for the tests.
    """

    def __init__(self, blocks: nn.ModuleList, device: torch.device):
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.blocks = [[*block.parameters(), *block.buffers()] for block in blocks]
        if any([t.shape for t in one] != [t.shape for t in self.blocks[0]] for one in self.blocks):
            raise ValueError("blocks of several shapes can't take turns in one place")
        for tensor in (t for one in self.blocks for t in one) if self.stream else ():
            tensor.data = tensor.data.pin_memory()
        self.home = [[t.data for t in one] for one in self.blocks]
        self.slots = [[torch.empty_like(t, device=device) for t in self.home[0]] for _ in range(2)]
        self.arrived, self.free = ([torch.cuda.Event() for _ in range(2)] if self.stream else [] for _ in range(2))
        for number, block in enumerate(blocks):
            block.forward = self.staged(number, block.forward)
        self.turn = 0  # calls so far: the slot of the block at work is this modulo 2
        self.fetch(0, slot=0)

    def fetch(self, number: int, slot: int) -> None:
        """Begin to copy a block into a slot, once whoever worked there is done."""
        with torch.cuda.stream(self.stream):  # no stream, no effect
            if self.stream:
                self.stream.wait_event(self.free[slot])
            for to, origin in zip(self.slots[slot], self.home[number], strict=True):
                to.copy_(origin, non_blocking=True)
            if self.stream:
                self.arrived[slot].record(self.stream)

    def staged(self, number: int, forward: Callable) -> Callable:
        """The block's forward pass, with its parameters where it works."""

        def call(*args, **kwargs):
            slot = self.turn % 2
            self.fetch((number + 1) % len(self.blocks), 1 - slot)
            if self.stream:
                torch.cuda.current_stream().wait_event(self.arrived[slot])
            for tensor, copy in zip(self.blocks[number], self.slots[slot], strict=True):
                tensor.data = copy
            out = forward(*args, **kwargs)
            for tensor, origin in zip(self.blocks[number], self.home[number], strict=True):
                tensor.data = origin
            if self.stream:
                self.free[slot].record()
            self.turn += 1
            return out

        return call


def offload(network: nn.Module, device: torch.device) -> nn.Module:
    """The network on the device, but for its blocks, which come when they are called."""
    blocks = network.blocks if hasattr(network, "blocks") else network.block  # transformers' name
    for child in network.children():
        if child is not blocks:
            child.to(device)
    Offload(blocks, device)
    return network


def reset_peak(device: torch.device) -> None:
    """From here on `peak_memory` counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with contextlib.suppress(OSError):  # some containers forbid it
            Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """The most memory held since `reset_peak`, in GiB: a GPU's, or the process's resident set (since its start, where
    Linux or its /proc is not at hand).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS
