"""Measuring memory and time, and two ways for a network to need less memory.

int8 weights take half the memory of bfloat16 and change the result a little. Blocks offloaded to host memory take
almost none on the device and change nothing; each is copied over while the block before it runs.
"""

import contextlib
import re
import resource
import sys
import time
import weakref
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Int8Linear(nn.Module):
    """A linear layer with an int8 weight and one scale per output, dequantised at every call."""

    def __init__(self, linear: nn.Linear):
        super().__init__()
        self.register_buffer("weight", torch.empty_like(linear.weight, dtype=torch.int8))
        self.register_buffer("scale", torch.empty_like(linear.weight[:, :1]))
        self.bias = linear.bias

    def fill(self, weight: Tensor) -> None:
        """Quantise a weight [out, in] to -127 ... 127 times its row's scale."""
        scale = weight.float().abs().amax(1, keepdim=True).clamp_min(1e-12) / 127
        self.weight, self.scale = (weight.float() / scale).round().to(torch.int8), scale.to(weight.dtype)

    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.to(x.dtype) * self.scale.to(x.dtype)  # cheap next to a product with thousands of tokens
        return F.linear(x, weight, self.bias.to(x.dtype))


def use_int8(blocks: nn.Module) -> None:
    """Replace every linear layer inside by an Int8Linear that is yet to be filled."""
    for module in list(blocks.modules()):
        for name, child in module.named_children():
            if isinstance(child, nn.Linear):
                setattr(module, name, Int8Linear(child))


class Offload:
    """Keeps blocks, which are called in order, in host memory, and two on the device: one runs, the next arrives."""

    def __init__(self, blocks: nn.ModuleList, device: torch.device):
        # Copies have a stream of their own. A CPU has no use for copies; it makes the same ones for the tests.
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self.blocks = [[*block.parameters(), *block.buffers()] for block in blocks]
        if any([t.shape for t in block] != [t.shape for t in self.blocks[0]] for block in self.blocks):
            raise ValueError("blocks of several shapes can't take turns in one place")
        # All of a block in one buffer: one copy to make, and one piece of memory to pin.
        self.host: list[Tensor] = []
        for number, block in enumerate(self.blocks):
            self.host.append(packed(block))
            self.place(number, self.host[number])
        if self.stream:
            pin(self.host, self)
        self.slots = [torch.empty_like(self.host[0], device=device) for _ in range(2)]
        if self.stream:
            self.stream.wait_stream(torch.cuda.current_stream(device))  # whatever had their memory before
            for slot in self.slots:  # the last copy may be under way when the slots are freed
                slot.record_stream(self.stream)
        self.arrived, self.free = ([torch.cuda.Event() for _ in range(2)] if self.stream else [] for _ in range(2))
        for number, block in enumerate(blocks):
            # Hooks, and none that knows the block: with a reference in a circle its memory would outlive it.
            block.register_forward_pre_hook(partial(self.enter, number))
            block.register_forward_hook(partial(self.leave, number))
        self.turn = 0  # calls so far; modulo 2, the slot of the block that runs
        self.fetch(0, slot=0)

    def place(self, number: int, buffer: Tensor) -> None:
        """Let a block's tensors lie in this buffer."""
        start = 0
        for tensor in self.blocks[number]:
            tensor.data = buffer[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
            start += aligned(tensor.nbytes)

    def fetch(self, number: int, slot: int) -> None:
        """Start copying a block into a slot, once the block that ran there is done."""
        if self.stream:
            self.stream.wait_event(self.free[slot])
        with torch.cuda.stream(self.stream):  # has no effect without a stream
            self.slots[slot].copy_(self.host[number], non_blocking=True)
        if self.stream:
            self.arrived[slot].record(self.stream)

    def enter(self, number: int, *_: object) -> None:
        """Before a block runs: its parameters are on the device, and the next block's set out."""
        slot = self.turn % 2
        self.fetch((number + 1) % len(self.blocks), 1 - slot)
        if self.stream:
            torch.cuda.current_stream().wait_event(self.arrived[slot])
        self.place(number, self.slots[slot])

    def leave(self, number: int, *_: object) -> None:
        """After it ran: they are back home."""
        self.place(number, self.host[number])
        if self.stream:
            self.free[self.turn % 2].record()
        self.turn += 1


def aligned(size: int) -> int:
    """Bytes up to the next tensor of a buffer: kernels want their inputs at multiples of 256."""
    return -(-size // 256) * 256


def packed(tensors: Sequence[Tensor]) -> Tensor:
    """A copy of tensors one after the other, as bytes in host memory."""
    buffer, start = torch.empty(sum(aligned(t.nbytes) for t in tensors), dtype=torch.uint8), 0
    for tensor in tensors:
        buffer[start : start + tensor.nbytes] = tensor.detach().contiguous().view(-1).view(torch.uint8)
        start += aligned(tensor.nbytes)
    return buffer


def pin(buffers: Sequence[Tensor], owner: object) -> None:
    """Lock host memory in place, where a GPU can read it by itself, for as long as `owner` lives.

    torch's own pinned memory comes in powers of two: 15 GB for 10.
    """
    cuda = torch.cuda.cudart()
    for buffer in buffers:
        torch.cuda.check_error(int(cuda.cudaHostRegister(buffer.data_ptr(), buffer.nbytes, 0)))
        weakref.finalize(owner, cuda.cudaHostUnregister, buffer.data_ptr())


def offload(network: nn.Module, device: torch.device) -> nn.Module:
    """Move a network to the device, all but its blocks, which are copied there as they are called."""
    blocks = network.blocks if hasattr(network, "blocks") else network.block  # transformers' name
    for child in network.children():
        if child is not blocks:
            child.to(device)
    Offload(blocks, device)
    return network


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """To the device, without waiting until a GPU is done with what it was given before."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to host memory. What is returned gives the copy, and waits for nothing else.

    Who reads the GPU's own tensor later waits for all the work that the GPU was given in between.
    """
    if tensor.device.type != "cuda":
        return lambda: tensor
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    (arrived := torch.cuda.Event()).record()

    def read() -> Tensor:
        arrived.synchronize()
        return copy

    return read


def reset_peak(device: torch.device) -> None:
    """Let `peak_memory` start again from here."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    with contextlib.suppress(OSError):  # only Linux has this file, and some containers forbid writing it
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB since `reset_peak`: the GPU's, or the process's (since its start if it couldn't be reset)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, until the GPU is done too."""
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    wait()
    began = time.perf_counter()
    call()
    wait()
    return time.perf_counter() - began


class Clock:
    """Seconds, and the most GiB held, of each part of the work."""

    def __init__(self, device: torch.device):
        self.device, self.parts = device, {}

    @contextlib.contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        began = time.perf_counter()
        reset_peak(self.device)
        yield
        seconds, most = self.parts.get(part, (0, 0))
        self.parts[part] = seconds + time.perf_counter() - began, max(most, peak_memory(self.device))

    def __str__(self) -> str:
        return "\n".join(f"{part}: {seconds:.2f} s, {most:.2f} GiB" for part, (seconds, most) in self.parts.items())
