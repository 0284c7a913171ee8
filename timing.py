"""What bench.py and costs.py measure with, and the shapes that they measure."""

import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

import memory
from model import PRESETS, DiTConfig
from parallel import has_bfloat16

WIDE, SMALL = DiTConfig(1536, 6144, 12, 8, text_dim=4096, text_tokens=512), DiTConfig(128, 256, 4, 2, 64, 32)
# Transformer; latent frames, height and width; video frames, height and width for the VAE; latents of a training step.
SHAPES = {
    "wide": (WIDE, (7, 48, 48), (17, 256, 256), (3, 24, 24)),
    "wan5b": (PRESETS["wan5b"], (31, 44, 80), (121, 704, 1280), (31, 44, 80)),
    "small": (SMALL, (3, 8, 8), (5, 32, 32), (3, 8, 8)),
}


@dataclass(frozen=True)
class Row:
    """A comparison, or ours alone. `share_of_limit`: of the machine's own rate of matrix products."""

    name: str
    ours: float
    reference: float | None
    ratio: float | None
    unit: str
    shape: str
    dtype: str
    compiled: bool
    share_of_limit: float | None = None


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(function: Callable, device: torch.device) -> float:
    synchronise(device)
    began = time.perf_counter()
    function()
    synchronise(device)
    return time.perf_counter() - began


def pairs(ours: Callable, theirs: Callable, repeats: int, device: torch.device) -> tuple[float, float, float]:
    """Medians of both times and of the ratios of the pairs. Both have been called before: see `agree`."""
    taken = [(seconds(ours, device), seconds(theirs, device)) for _ in range(repeats)]
    return (*(statistics.median(t) for t in zip(*taken, strict=True)), statistics.median(a / b for a, b in taken))


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The most FLOP a second that the machine gives in one matrix product."""
    emulated = dtype == torch.bfloat16 and not has_bfloat16(device)
    n = 8192 if device.type == "cuda" else 512 if emulated else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def flop(config: DiTConfig, tokens: int) -> float:
    """Of one forward pass and video: linear layers and attention, two for every multiplication."""
    d, length = config.dim, config.text_tokens
    block = tokens * (8 * d * d + 4 * d * d + 4 * d * config.ffn_dim) + length * 4 * d * d
    return config.layers * (block + 4 * tokens * tokens * d + 4 * tokens * length * d)


def relative(got: Tensor, want: Tensor) -> float:
    """The size of their difference, in that of the second."""
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


def agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype, what: str) -> None:
    """Raises RuntimeError unless both are the same up to the type's rounding."""
    error = relative(ours, theirs)
    if not error < (1e-4 if dtype == torch.float32 else 0.05):
        raise RuntimeError(f"{what}: ours and the reference differ by {error:.1e}; their times mean nothing")


def peak(function: Callable, device: torch.device) -> float:
    """The most memory that a call holds beyond what was held before it, in GiB."""
    gc.collect()
    memory.reset_peak(device)
    before = memory.peak_memory(device)
    function()
    return memory.peak_memory(device) - before
