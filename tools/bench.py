"""Measure speed: this project's networks beside diffusers', in one process, with the same weights and inputs.

    python -m tools.bench                      # a transformer of width 1536 at 4,032 tokens, the VAE at 17 x 256 x 256
    python -m tools.bench --out results/bench-h100.json     # on a GPU: the real shapes, and what it does alone

Ours and theirs take turns, after their outputs are compared. Each pair gives a ratio (below 1: ours is faster); the
table has the median. sample.py's four steps, the VAE and the small decoder are timed alone. Needs requirements-dev.txt.
Writes rows to `--out`, each as it comes, and a Markdown table beside it.
"""

import contextlib
import gc
import importlib.metadata
import importlib.util
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from typing import Literal

import torch
from torch import Tensor, nn

import distill_fast
import flow
import sample
import train_slow_adapter
from adapter import AdapterConfig, ResNetAdapter
from core import parallel
from core.codec import Batch
from core.config import UserError, run_script
from core.files import output_path
from core.memory import peak_memory, reset_peak, seconds
from core.tables import markdown, provenance, three_digits, write_rows
from core.weights import Stored, load, rename
from discriminator import Classifier, ClassifierConfig, DiffusionDiscriminator, adversarial_loss
from model import PRESETS, DiTConfig, VideoDiT
from wan import vae
from wan.published import DIFFUSERS_NAMES, vae_names
from wan.tiny_decoder import TinyDecoder

ROW = ("name", "ours", "reference", "ratio", "unit", "shape", "dtype", "compiled", "share_of_limit")
SHAPES = {  # the transformer, its latents; blocks and latents of a training step; the VAE, its frames, height and width
    "wide": (DiTConfig(1536, 6144, 12, 8, 4096, 512), (7, 48, 48), 4, (8, 32, 32), vae.VAEConfig(), (17, 256, 256)),
    "wan5b": (PRESETS["wan5b"], (31, 44, 80), 30, (31, 44, 80), vae.VAEConfig(), (121, 704, 1280)),
}


def measure(
    cfg: "Config", device: torch.device, name: str, ours: Callable, reference: Callable | None,
    about: tuple[str, str, bool], flop: float = 0, memory: bool = False,
) -> Iterator[dict]:  # fmt: skip
    """The row of a call's time, beside the reference's or alone. RuntimeError if their outputs differ.

    `about`: shape, dtype, whether compiled. `flop`: of a call, to state its share of this machine's rate. `memory`:
    another row, of peak memory beyond what both hold before; without a reference, of all that is held.
    """
    gc.collect()  # compiled blocks refer to themselves
    dtype, calls = getattr(torch, about[1]), [call for call in (ours, reference) if call]
    outputs = [call() for call in calls]
    if reference:
        agree(*outputs, dtype, name)
    del outputs
    measured = {name: ("s", [[seconds(call, device) for call in calls] for _ in range(cfg.repeats)])}
    if memory:
        measured[f"{name}, peak memory"] = "GiB", [[peak(call, device, whole=not reference) for call in calls]]
    for label, (unit, pairs) in measured.items():
        if pairs[0][-1] > 0:  # what fits into memory already held shows no peak
            medians = (*map(statistics.median, zip(*pairs, strict=True)), None)[:2]
            ratio = statistics.median(a / b for a, b in pairs) if reference else None
            share = flop / medians[0] / matmul_rate(dtype, device) if flop and unit == "s" else None
            yield dict(zip(ROW, (label, *medians, ratio, unit, *about, share), strict=True))


def agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype, what: str) -> None:
    """RuntimeError unless both are the same up to the dtype's rounding."""
    theirs = theirs.to(ours.device)  # our VAE decodes into host memory
    error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    if not error < (1e-4 if dtype == torch.float32 else 0.05):  # NaN is no agreement
        raise RuntimeError(f"{what}: ours and the reference differ by {error:.1e}; their times mean nothing")


def peak(call: Callable[[], object], device: torch.device, whole: bool) -> float:
    """The most memory of a call, in GiB: as a whole, or beyond what is held before it."""
    gc.collect()
    reset_peak(device)
    before = 0 if whole else peak_memory(device)
    call()
    return peak_memory(device) - before


def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The FLOP per second of one large matrix product: the most that this machine gives."""
    slow = dtype == torch.bfloat16 and not parallel.fast_bfloat16(device)  # at any size
    n = 8192 if device.type == "cuda" else 512 if slow else 2048
    a, b = (torch.randn(n, n, device=device, dtype=dtype) for _ in range(2))
    return 2 * n**3 / min(seconds(lambda: a @ b, device) for _ in range(8))


def flop(config: DiTConfig, tokens: int) -> float:
    """FLOP of one video's forward pass: linear layers and attention, a multiplication and addition counted as two."""
    d, length = config.dim, config.text_tokens
    block = tokens * (8 * d * d + 4 * d * d + 4 * d * config.ffn_dim) + length * 4 * d * d
    return config.layers * (block + 4 * tokens * tokens * d + 4 * tokens * length * d)


def random(build: Callable[[], nn.Module], dtype: torch.dtype, device: torch.device) -> nn.Module:
    """A network with random weights, read as from a file."""
    with torch.device("meta"):
        shapes = {name: tensor.shape for name, tensor in build().state_dict().items()}
    tensors = {n: Stored(tuple(s), partial(torch.normal, 0.0, 0.02, s, device=device)) for n, s in shapes.items()}
    return load(build, tensors, "random", dtype).eval().requires_grad_(False)


def diffusers_transformer(config: DiTConfig) -> nn.Module:
    """diffusers' transformer of these shapes."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=config.patch, num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads,
        in_channels=config.channels, out_channels=config.channels, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.layers, eps=config.eps,
    )  # fmt: skip


def diffusers_vae(config: vae.VAEConfig) -> nn.Module:
    """diffusers' VAE of these shapes."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=config.width, decoder_base_dim=config.decoder_width, z_dim=config.channels,
        dim_mult=list(config.multipliers), num_res_blocks=config.blocks, temperal_downsample=list(config.temporal),
        is_residual=True, in_channels=12, out_channels=12, patch_size=config.patch,
        scale_factor_spatial=config.patch * 2 ** len(config.temporal),
        latents_mean=list(vae.MEAN), latents_std=list(vae.STD),
    )  # fmt: skip


def transformer(cfg: "Config", device: torch.device, dtype: torch.dtype, compiled: bool) -> Iterator[dict]:
    """One forward pass, and four steps with a ResNet adapter, which diffusers' loop calls at every step."""
    config, (frames, height, width), *_ = SHAPES[cfg.preset]
    tokens, sigmas = frames * height * width // 4, flow.sigma_schedule(4, 5.0)
    about = f"{config.layers} blocks of {config.dim}, {tokens} tokens", str(dtype).removeprefix("torch."), compiled
    torch.manual_seed(0)
    with torch.device(device):
        theirs, adapter = diffusers_transformer(config), ResNetAdapter(AdapterConfig(config.dim, config.layers))
        x, traj, *noise = torch.randn(6, 1, config.channels, frames, height, width)
        text, t = torch.randn(1, config.text_tokens, config.text_dim, dtype=dtype), torch.full((1, frames), 700.0)
    t[:, 0] = 0  # image-to-video
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5 * config.dim**-0.5)
    weights = rename(theirs.state_dict(), DIFFUSERS_NAMES)
    tensors = {name: Stored(tuple(p.shape), p.clone) for name, p in weights.items()}
    ours = load(lambda: VideoDiT(config), tensors, "copy", dtype).eval()
    for name, p in theirs.eval().named_parameters():  # in float32 the same parts as ours
        p.data = p.data.to(torch.float32 if re.search("time_embedder|scale_shift_table|norm[123]", name) else dtype)
    for block in adapter.blocks:
        nn.init.normal_(block.project.weight, std=0.01)
    for block in (*ours.blocks, *theirs.blocks) if compiled else ():
        block.compile()

    def reference(x: Tensor, t: Tensor) -> Tensor:
        return theirs(x.to(dtype), t.repeat_interleave(tokens // frames, 1), text, return_dict=False)[0]

    def adapted(x: Tensor, t: Tensor) -> Tensor:
        added = iter(adapter(traj))
        with contextlib.ExitStack() as hooks:
            for b in theirs.blocks:
                hooks.enter_context(b.register_forward_hook(lambda _m, _i, out: out + next(added).type_as(out)))
            return reference(x, t)

    both = partial(ours, x, t, text), partial(reference, x, t)
    yield from measure(cfg, device, "DiT forward", *both, about, flop(config, tokens))
    theirs.fuse_qkv_projections()
    yield from measure(cfg, device, "DiT forward, reference fused", *both, about, flop(config, tokens))
    if compiled and dtype == torch.bfloat16:
        start = x[:, :, :1], noise, sigmas
        both = (
            lambda: flow.sample_fewstep(partial(ours, text=text, residuals=adapter(traj)), *start),
            lambda: flow.sample_fewstep(adapted, *start),
        )
        yield from measure(cfg, device, "4 steps with adapter", *both, about)


def codec(cfg: "Config", device: torch.device) -> Iterator[dict]:
    """Decoding and encoding, at the true widths."""
    *_, config, (frames, height, width) = SHAPES[cfg.preset]
    with torch.device(device):
        ours, theirs = vae.WanVAE(config), diffusers_vae(config)
    ours.load_state_dict(rename(theirs.state_dict(), vae_names(config.blocks)))
    ours, theirs = (network.to(torch.bfloat16).eval() for network in (ours, theirs))
    video = torch.rand(1, 3, frames, height, width, device=device, dtype=torch.bfloat16) * 2 - 1
    latents = ours.encode(video)
    mean, std = (x.to(latents) for x in vae.statistics(latents))  # diffusers' latents are not normalised
    about = (f"{frames} frames of {height}x{width}", "bfloat16", False)
    decode = partial(ours.decode, latents), lambda: theirs.decode(latents * std + mean).sample
    encode = partial(ours.encode, video), lambda: (theirs.encode(video).latent_dist.mode() - mean) / std
    yield from measure(cfg, device, "VAE decode", *decode, about, memory=True)
    yield from measure(cfg, device, "VAE encode", *encode, about, memory=True)


def steps(cfg: "Config", device: torch.device) -> Iterator[dict]:
    """A training step of each stage with blocks recomputed, without the optimizer: compiled, beside not compiled."""
    config, _, layers, grid, *_ = SHAPES[cfg.preset]
    config = replace(config, layers=layers)
    tokens, dtype = math.prod(grid) // 4, torch.bfloat16 if parallel.fast_bfloat16(device) else torch.float32
    about = (f"{config.layers} blocks of {config.dim}, {tokens} tokens", str(dtype).removeprefix("torch."), True)
    torch.manual_seed(0)
    judge = ClassifierConfig(config.dim, config.text_dim, tuple(range(config.layers))[-3:], channels=config.channels)
    with torch.device(device):
        adapter = ResNetAdapter(AdapterConfig(config.dim, config.layers, channels=config.channels))
        classifier, sigma = Classifier(judge), torch.full((1,), 0.5)
        x0, traj, *noise = torch.randn(6, 1, config.channels, *grid)
        batch = Batch(x0, torch.randn(1, config.text_tokens, config.text_dim), traj)
    generator, backbone = (random(lambda: VideoDiT(config), dtype, device) for _ in range(2))
    for network in (networks := (generator, adapter, backbone, classifier)):
        parallel.prepare(network, parallel.Processes(0, 1, device, None), True, "full")
    first, sigmas, level = x0[:, :, :1], flow.sigma_schedule(4, 5.0), flow.frame_sigma(sigma, grid[0])
    velocity = partial(generator, text=batch.text)

    def stage_2() -> Tensor:
        draw = distill_fast.Draw(first, sigmas, 0, noise, noise[1], sigma)
        return distill_fast.student_loss(velocity, velocity, partial(backbone, text=batch.text), draw)

    def stage_3() -> Tensor:
        adapted = partial(velocity, residuals=adapter(traj))
        learned = flow.flow_matching_loss(adapted, x0, noise[1], sigma, "x0")
        x_t = flow.add_noise(flow.backward_simulation(adapted, first, noise, sigmas, 3), noise[1], level)
        judged = DiffusionDiscriminator(backbone, classifier)(x_t, flow.timestep(level), batch.text, traj)
        return learned + adversarial_loss(judged)

    def step(stance: str, loss: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad(), torch.compiler.set_stance(stance), parallel.autocast(device, about[1]):
            value = loss()
            value.backward()
        for network in networks:
            network.zero_grad()
        return value.detach()

    # Passes that a step costs. 2: four to learn from the student's last step, and one of each score. 3: three of the
    # sampler without gradients; three each of its last, the true video's and the discriminator's.
    stage_1 = partial(train_slow_adapter.adapter_loss, generator, adapter, batch, noise[1], sigma)
    for stage, loss, passes in ((1, stage_1, 3), (2, stage_2, 6), (3, stage_3, 3 + 3 * 3)):
        generator.requires_grad_(stage == 2)
        both, work = (partial(step, how, loss) for how in ("default", "force_eager")), passes * flop(config, tokens)
        yield from measure(cfg, device, f"step of stage {stage}, reference not compiled", *both, about, work)


def alone(cfg: "Config", device: torch.device) -> Iterator[dict]:
    """What sample.py does on a GPU: the codec, and four steps with a ResNet adapter in both modes of --memory."""
    config, grid, *_, vae_config, _ = SHAPES[cfg.preset]
    frames, height, width = 4 * grid[0] - 3, 16 * grid[1], 16 * grid[2]
    about = f"{frames} frames of {height}x{width}", "bfloat16"
    text = torch.randn(1, config.text_tokens, config.text_dim, device=device, dtype=torch.bfloat16)
    traj, z = (torch.randn(1, n, *grid, device=device) for n in (config.channels, vae_config.channels))
    network = random(lambda: vae.WanVAE(vae_config), torch.bfloat16, device)
    small = random(lambda: TinyDecoder(vae_config.channels), torch.bfloat16, device)
    decode, encode = partial(network.decode, z), partial(network.encode, torch.rand(1, 3, frames, height, width))
    calls = {"VAE decode": decode, "VAE encode": encode, "VAE decode, --memory low": partial(decode, tile=32)}
    calls["small decoder"] = lambda: [None for _ in small.frames(z)]
    for name, call in calls.items():
        yield from measure(cfg, device, name, call, None, (*about, False), memory=True)
    shape = AdapterConfig(config.dim, config.layers, channels=config.channels)
    for level, dtype in (("high", torch.bfloat16), ("low", torch.int8)):
        generator = random(lambda: VideoDiT(config), dtype, device)
        adapter = random(lambda: ResNetAdapter(shape), torch.float32, device)
        for block in (*generator.blocks, *adapter.blocks):
            block.compile()
        job = sample.Config(preset="wan5b", memory=level)
        four = partial(sample.denoise, job, generator, adapter, traj[:, :, :1], traj, text, text)
        yield from measure(cfg, device, f"4 steps, resnet, --memory {level}", four, None, (*about, True), memory=True)
        if level == "high":
            whole = partial(lambda *parts: [part() for part in parts], encode, four, decode)
            yield from measure(cfg, device, "encode, 4 steps, decode", whole, None, (*about, True))


WAYS = product((torch.float32, torch.bfloat16), (False, True))
PARTS = {"alone": [alone], "vae": [codec], "steps": [steps]}
PARTS["transformer"] = [partial(transformer, dtype=dtype, compiled=compiled) for dtype, compiled in WAYS]
GPU = torch.cuda.is_available()


@dataclass(frozen=True)
class Config:
    preset: Literal["wide", "wan5b"] = "wan5b" if GPU else "wide"  # shapes
    parts: str = ",".join(list(PARTS)[not GPU :])  # what to measure, separated by commas
    repeats: int = 3  # times that each is timed
    out: str = "out/bench.json"  # rows; the table goes beside it


def main(cfg: Config) -> None:
    if cfg.repeats < 1:
        raise UserError(f"--repeats {cfg.repeats}: at least 1")
    parts = cfg.parts.split(",")
    if unknown := set(parts) - PARTS.keys():
        raise UserError(f"--parts {cfg.parts}: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    out = output_path(cfg.out, ".json")
    if not importlib.util.find_spec("diffusers"):
        raise UserError("diffusers: not installed; pip install -r requirements-dev.txt")
    device = parallel.init_processes().device
    parallel.start_compiler(device)
    origin = provenance("-m tools.bench", cfg, device)
    origin["machine"] += f", diffusers {importlib.metadata.version('diffusers')}"
    rows = []
    with torch.no_grad():
        for measured in chain.from_iterable(way(cfg, device) for part in parts for way in PARTS[part]):
            rows.append(measured | origin)
            write_rows(out, rows, three_digits)  # each as it comes: the run may be cut short
            print(measured, file=sys.stderr, flush=True)
    print(markdown(rows, three_digits))


if __name__ == "__main__":
    run_script(main, Config)
