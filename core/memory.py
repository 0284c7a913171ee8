"""Measuring memory and time, and weights of 8 bits: half the memory of bfloat16, and nearly the same result."""

import contextlib
import os
import re
import resource
import sys
import time
from collections.abc import Callable, Iterator
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
        return F.linear(x, weight, None if self.bias is None else self.bias.to(x.dtype))


def use_int8(network: nn.Module) -> None:
    """Replace every linear layer inside a network's blocks by an Int8Linear that is yet to be filled."""
    for name, module in list(network.named_modules()):
        if isinstance(module, nn.Linear) and re.match(r"blocks?\.", name):  # transformers calls them `block`
            network.set_submodule(name, Int8Linear(module))


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Move to the device, without waiting for a GPU's earlier work."""
    return tensor.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else tensor.to(device)


def fetch(tensor: Tensor) -> Callable[[], Tensor]:
    """Begin to copy a tensor to host memory. Calling what is returned waits for the copy alone, and gives it."""
    if tensor.device.type != "cuda":
        return lambda: tensor
    # To read the GPU's own tensor later is to wait for all the work that the GPU was given in between.
    copy = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    (arrived := torch.cuda.Event()).record()

    def read() -> Tensor:
        arrived.synchronize()
        return copy

    return read


def reset_peak(device: torch.device) -> None:
    """Make `peak_memory` count from here."""
    if device.type == "cuda":
        return torch.cuda.reset_peak_memory_stats(device)
    with contextlib.suppress(OSError):  # only Linux has this file, and some containers forbid writing it
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """Peak memory in GiB since `reset_peak`: the GPU's, or the process's (since its start if it couldn't be reset)."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":
        return int(re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def free_memory(device: torch.device) -> float:
    """Bytes that can still be taken: of the GPU, or of the machine (of all it has, where the system does not say)."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    if sys.platform == "linux":
        return 1024 * int(re.search(r"MemAvailable:\s+(\d+) kB", Path("/proc/meminfo").read_text())[1])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """How long a call takes, the GPU's part included."""
    wait = torch.cuda.synchronize if device.type == "cuda" else lambda device: None
    wait(device)
    began = time.perf_counter()
    call()
    wait(device)
    return time.perf_counter() - began


def shortage(error: BaseException) -> str:
    """What was asked for and what there is, if an error says that memory is out; else empty."""
    text, signs = str(error), "out of memory|t allocate memory|bad_alloc|ALLOC_FAILED"
    if not isinstance(error, MemoryError) and not re.search(signs, text):
        return ""
    asked, free = re.search(r"llocate ([\d.]+ ?\w+)", text), re.search(r"of which ([\d.]+ \w+) is free", text)
    limits = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"), resource.getrlimit(resource.RLIMIT_AS)[0]
    there = f"this process may have {min(n for n in limits if n > 0) / 2**30:.1f} GiB"
    there = f"{free[1]} of the GPU are free" if free else there
    return f"out of memory: {asked[1] if asked else 'more'} asked for, and {there}"


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
