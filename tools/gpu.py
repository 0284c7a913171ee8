"""What one GPU does at the true shapes, with random weights: `python -m tools.bench --gpu`, about eight minutes.

Seconds of four steps (eager by each attention backend, and compiled, with both adapters), of the VAE both ways and of
the small decoder, of a video end to end, and of a training step of stage 1 with the share of the GPU's peak that it
reaches; and the real peak of memory of each. Nothing here compares with another project: `tools.bench` does.
"""

import gc
import time
from collections.abc import Callable, Iterator
from functools import partial

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

import flow
import train_slow_adapter
from adapter import AdapterConfig, ControlNetAdapter, ResNetAdapter
from core import attention, memory, parallel
from core.codec import Batch
from model import PRESETS, DiTConfig, VideoDiT
from tools.rehearse import typed
from wan.tiny_decoder import TinyDecoder
from wan.vae import VAEConfig, WanVAE

PEAK = 989e12  # FLOP/s of an H100 or H200 in bfloat16


def timed(name: str, call: Callable, device: torch.device, repeats: int = 2) -> dict:
    """A row: the best seconds of a call, after one that warms up, and the most GB held."""
    call()
    gc.collect()
    memory.reset_peak(device)
    wait = partial(torch.cuda.synchronize, device) if device.type == "cuda" else lambda: None
    best = float("inf")
    for _ in range(repeats):
        wait()
        began = time.perf_counter()
        call()
        wait()
        best = min(best, time.perf_counter() - began)
    return {"name": name, "seconds": best, "GB": memory.peak_memory(device) * 2**30 / 1e9, "share_of_peak": None}


def random(network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network built on the meta device, with random weights in the types in which it is read."""
    network = typed(network.to_empty(device=device), dtype)
    for p in network.parameters():
        nn.init.normal_(p, std=0.02)
    return network.requires_grad_(False)


def measure(
    device: torch.device, config: DiTConfig = PRESETS["wan5b"], grid: tuple[int, int, int] = (31, 44, 80),
    vae_config: VAEConfig | None = None, dtype: torch.dtype = torch.bfloat16,
) -> Iterator[dict]:  # fmt: skip
    """Rows, each when it is measured. `grid`: of the latents. Tests give small shapes."""
    tokens = grid[0] * grid[1] * grid[2] // 4
    first, traj = (torch.randn(1, config.channels, f, *grid[1:], device=device) for f in (1, grid[0]))
    text = torch.randn(1, config.text_tokens, config.text_dim, device=device, dtype=dtype)
    noise, sigmas = torch.randn(4, *traj.shape, device=device), flow.sigma_schedule(4, 5.0)
    cast = partial(parallel.autocast, device, "bfloat16" if dtype == torch.bfloat16 else "float32")
    with torch.device("meta"):
        light = ResNetAdapter(AdapterConfig(config.dim, config.layers, channels=config.channels))
        networks = {"resnet": light, "controlnet": ControlNetAdapter(config)}
        generator = VideoDiT(config)
    generator = random(generator, dtype, device)

    # 1. Four steps.
    @torch.no_grad()
    def steps(adapter: nn.Module) -> Tensor:
        def velocity(x: Tensor, t: Tensor) -> Tensor:
            return generator(x, t, text, adapter.residuals(traj, x, t, text))

        with cast():
            return flow.sample_fewstep(velocity, first, noise, sigmas)

    for kind in ("controlnet", "resnet"):
        adapter = random(networks.pop(kind), torch.float32 if kind == "resnet" else dtype, device)
        for backend in attention.BACKENDS if device.type == "cuda" and kind == "resnet" else ():
            with sdpa_kernel(backend):
                yield timed(f"4 steps, {kind}, eager, {backend.name}", lambda: steps(adapter), device, repeats=1)
        for block in (*generator.blocks, *adapter.blocks):
            block.compile()
        with attention.fastest(config.heads, config.dim, tokens, device):
            yield (row := timed(f"4 steps, {kind}, compiled", lambda: steps(adapter), device))
    four = row["seconds"]

    # 2. A training step of stage 1: forward, again, gradient; no optimizer.
    frozen = parallel.Processes(0, 1, device, None)
    adapter = parallel.prepare(adapter.requires_grad_(True), frozen, False, "full")
    parallel.prepare(generator, frozen, True, "full")
    batch, sigma = Batch(noise[0], text, traj), torch.tensor([0.5], device=device)

    def learn() -> None:
        with cast(), attention.fastest(config.heads, config.dim, tokens, device):
            train_slow_adapter.adapter_loss(generator, adapter, batch, noise[1], sigma).backward()

    row = timed("step of stage 1, resnet", learn, device)
    d = config.dim
    block = tokens * (12 * d * d + 4 * d * config.ffn_dim) + 4 * d * tokens * (tokens + config.text_tokens)
    yield row | {"share_of_peak": 3 * config.layers * block / row["seconds"] / PEAK}
    generator = adapter = None  # the VAE needs the room

    # 3. The VAE both ways, and the small decoder.
    vae_config = vae_config or VAEConfig()
    with torch.device("meta"):
        networks = {"VAE": WanVAE(vae_config), "small decoder": TinyDecoder(vae_config.channels)}
    vae, small = (random(network, dtype, device) for network in networks.values())
    video = torch.rand(1, 3, 4 * grid[0] - 3, grid[1] * vae.spatial, grid[2] * vae.spatial)
    latents = torch.randn(1, vae_config.channels, *grid, device=device)
    both = (
        timed("VAE encode", lambda: vae.encode(video), device, repeats=1),
        timed("VAE decode", lambda: [None for _ in vae.frames(latents)], device, repeats=1),
    )
    yield from both
    whole = four + sum(row["seconds"] for row in both)
    yield {"name": "encode, 4 steps with resnet, decode", "seconds": whole, "GB": None, "share_of_peak": None}
    yield timed("small decoder", lambda: [None for _ in small.frames(latents)], device, repeats=1)
