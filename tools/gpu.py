"""What one GPU does at the true shapes, with random weights: `python -m tools.bench --gpu`, about eight minutes.

Seconds of four steps (eager by each attention backend, and compiled, with both adapters), of the VAE both ways (plain,
by Winograd's convolutions, compiled) and of the small decoder, of a video end to end, and of training steps of stages 1
and 3 with the share of the GPU's peak that they reach; and the real peak of memory of each. Then the peaks of
`--memory` medium and low, beside the rehearsed ones (high is what the rows before hold). Nothing here compares with
another project: `tools.bench` does.
"""

import contextlib
import gc
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from itertools import product
from unittest import mock

import torch
from torch import Tensor, nn
from torch.nn.attention import sdpa_kernel

import discriminator as discriminators
import distill_fast
import finetune_hybrid
import flow
import train_slow_adapter
from adapter import AdapterConfig, ControlNetAdapter, ResNetAdapter
from core import attention, memory, parallel
from core.codec import Batch
from model import PRESETS, DiTConfig, VideoDiT
from tools.rehearse import rehearse_sample, sampling, typed
from wan import vae
from wan.tiny_decoder import TinyDecoder

PEAK = 989e12  # FLOP/s of an H100 or H200 in bfloat16


def timed(name: str, call: Callable, device: torch.device, repeats: int = 2) -> dict:
    """A row: the best seconds of a call, after one that warms up, and the most GB held."""
    call()
    gc.collect()
    memory.reset_peak(device)
    best = min(memory.seconds(call, device) for _ in range(repeats))
    return {"name": name, "seconds": best, "GB": memory.peak_memory(device) * 2**30 / 1e9, "share_of_peak": None}


def random(network: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network built on the meta device, with random weights in the types in which it is read."""
    network = typed(network.to_empty(device=device), dtype)
    for p in network.parameters():
        nn.init.normal_(p, std=0.02)
    return network.requires_grad_(False)


def learning_losses(
    generator: VideoDiT, adapter: ResNetAdapter, discriminator: discriminators.DiffusionDiscriminator | None,
    batch: Batch, noise: Tensor, sigmas: Sequence[float],
) -> dict[str, Callable[[], Tensor]]:  # fmt: skip
    """What a step of stages 1 to 3 goes down on. Stage 2's fake score is the discriminator's backbone."""
    first, sigma = batch.x0[:, :, :1], torch.full((len(batch.x0),), 0.5, device=batch.x0.device)

    def stage_2() -> Tensor:
        draw = distill_fast.Draw(first, sigmas, 0, noise, noise[1], sigma)
        student, fake = (partial(network, text=batch.text) for network in (generator, discriminator.backbone))
        return distill_fast.student_loss(student, student, fake, draw)

    def stage_3() -> Tensor:
        velocity = partial(generator, text=batch.text, residuals=adapter(batch.traj))
        learned = finetune_hybrid.diffusion_loss(velocity, batch.x0, noise[1], sigma)
        fake = flow.backward_simulation(velocity, first, noise, sigmas, len(sigmas) - 2)
        level = flow.frame_sigma(sigma, fake.shape[2])
        x_t = flow.add_noise(fake, noise[1], level)
        logits = discriminator(x_t, flow.timestep(level), batch.text, batch.traj)
        return learned + discriminators.adversarial_loss(logits)

    return {
        "stage 1": lambda: train_slow_adapter.adapter_loss(generator, adapter, batch, noise[1], sigma),
        "stage 2": stage_2, "stage 3": stage_3,
    }  # fmt: skip


def measure(
    device: torch.device, config: DiTConfig = PRESETS["wan5b"], grid: tuple[int, int, int] = (31, 44, 80),
    vae_config: vae.VAEConfig | None = None, dtype: torch.dtype = torch.bfloat16,
    judge_config: discriminators.ClassifierConfig | None = None,
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
        backends = attention.ranking(config.heads, config.dim, tokens, device) if device.type == "cuda" else []
        for backend in backends if kind == "resnet" else backends[:1]:
            with sdpa_kernel(backend):
                yield timed(f"4 steps, {kind}, eager, {backend.name}", lambda: steps(adapter), device, repeats=1)
        for block in (*generator.blocks, *adapter.blocks):
            block.compile()
        with attention.fastest(config.heads, config.dim, tokens, device):
            yield (row := timed(f"4 steps, {kind}, compiled", lambda: steps(adapter), device))
    four = row["seconds"]

    # 2. Training steps without the optimizer: stage 1's; and the adapter's of stage 3, which is judged by a second
    # copy of the generator.
    alone = parallel.Processes(0, 1, device, None)
    adapter = parallel.prepare(adapter.requires_grad_(True), alone, False, "full")
    parallel.prepare(generator, alone, True, "full")
    batch = Batch(noise[0], text, traj)

    def step(stage: str, discriminator: discriminators.DiffusionDiscriminator | None = None) -> None:
        with cast(), attention.fastest(config.heads, config.dim, tokens, device):
            learning_losses(generator, adapter, discriminator, batch, noise, sigmas)[stage]().backward()

    d = config.dim
    block = tokens * (12 * d * d + 4 * d * config.ffn_dim) + 4 * d * tokens * (tokens + config.text_tokens)

    def share(row: dict, passes: int) -> dict:
        return row | {"share_of_peak": passes * config.layers * block / row["seconds"] / PEAK}

    yield share(timed("step of stage 1, resnet", lambda: step("stage 1"), device), 3)
    with torch.device("meta"):
        backbone, judge = VideoDiT(config), judge_config or discriminators.PRESETS["wan5b"]
        judge = discriminators.Classifier(judge)
    backbone, judge = random(backbone, dtype, device), random(judge, torch.float32, device)
    parallel.prepare(backbone, alone, True, "full")
    discriminator = discriminators.DiffusionDiscriminator(backbone, judge)

    # Three passes of the sampler that keep nothing; three each of its last, the true video's, the judge's.
    row = timed("step of stage 3's adapter, resnet", lambda: step("stage 3", discriminator), device, repeats=1)
    yield share(row, 3 + 3 * 3)
    generator = adapter = backbone = judge = discriminator = None  # the VAE needs the room

    # 3. The VAE both ways, and the small decoder.
    vae_config = vae_config or vae.VAEConfig()
    with torch.device("meta"):
        networks = vae.WanVAE(vae_config), TinyDecoder(vae_config.channels)
    codec, small = (random(network, dtype, device) for network in networks)
    video = torch.rand(1, 3, 4 * grid[0] - 3, grid[1] * codec.spatial, grid[2] * codec.spatial)
    latents = torch.randn(1, vae_config.channels, *grid, device=device)

    def both_ways(how: str) -> Iterator[dict]:
        yield timed(f"VAE encode{how}", lambda: codec.encode(video), device, repeats=1)
        yield timed(f"VAE decode{how}", lambda: [None for _ in codec.frames(latents)], device, repeats=1)

    with mock.patch.object(vae.CausalConv3d, "paired_on", ("cpu", "cuda")):
        yield from both_ways(", Winograd")
    plain = list(both_ways(""))
    yield from plain
    whole = four + sum(row["seconds"] for row in plain)
    yield {"name": "encode, 4 steps with resnet, decode", "seconds": whole, "GB": None, "share_of_peak": None}
    yield timed("small decoder", lambda: [None for _ in small.frames(latents)], device, repeats=1)
    codec = small = None

    # 4. The modes of --memory, beside what was rehearsed.
    if device.type == "cuda" and config == PRESETS["wan5b"]:
        for mode, kind in product(("low", "medium"), ("resnet", "controlnet")):
            peaks = rehearse_sample(mode, kind)
            with contextlib.ExitStack() as stack, torch.no_grad():
                for part, call in sampling(stack, mode, kind, layers=4, offload=memory.offload).items():
                    gc.collect()
                    memory.reset_peak(device)
                    call()
                    most = memory.peak_memory(device) * 2**30 / 1e9
                    name = f"--memory {mode}, {kind}: {part}; rehearsed {peaks[part]:.1f} GB"
                    yield {"name": name, "seconds": None, "GB": most, "share_of_peak": None}

    # 5. Last, for it is the one that may fail: the VAE compiled.
    with torch.device("meta"):
        codec = vae.WanVAE(vae_config)
    codec = random(codec, dtype, device)
    for module in codec.modules():
        if isinstance(module, vae.ResidualBlock):
            module.compile()
    yield from both_ways(", compiled")
