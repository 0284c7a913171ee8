"""Measure speed: this project's networks beside diffusers', in one process, with the same weights and inputs.

    python -m tools.bench                      # a transformer of width 1536 at 4,032 tokens, the VAE at 17 x 256 x 256
    python -m tools.bench --preset wan5b       # the real shapes; needs a GPU
    python -m tools.bench --rehearse           # memory of every stage at full size, on pretended GPUs; needs none
    python -m tools.bench --gpu --out results/bench-h100.json    # on a machine with one GPU

Ours and theirs take turns, and outputs are compared before anything is timed. Each pair gives a ratio (below 1: ours is
faster); the table has the median. Needs requirements-dev.txt. Writes rows to `--out`, and a Markdown table beside it.
"""

import gc
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

import flow
from adapter import AdapterConfig, ResNetAdapter
from core import memory, parallel
from core.codec import Batch
from core.config import UserError, run_script
from core.files import output_path
from core.memory import seconds
from core.tables import markdown, provenance, three_digits, write_rows
from core.weights import rename
from discriminator import Classifier, ClassifierConfig, DiffusionDiscriminator
from model import PRESETS, DiTConfig, VideoDiT
from wan import vae
from wan.published import DIFFUSERS_NAMES

PARTS = ("forward", "loop", "vae", "steps")
SHAPES = {  # the transformer; then frames, height and width of its latents, and of the VAE's video
    "wide": (DiTConfig(1536, 6144, 12, 8, 4096, 512), (7, 48, 48), (17, 256, 256)),
    "wan5b": (PRESETS["wan5b"], (31, 44, 80), (121, 704, 1280)),
    "small": (DiTConfig(128, 256, 4, 2, 64, 32), (3, 8, 8), (5, 32, 32)),
}


def pairs(ours: Callable, theirs: Callable, repeats: int, device: torch.device) -> tuple[float, float, float]:
    """Median time of either, and the median ratio of a pair. Both are warm: `agree` has called them."""
    taken = [(seconds(ours, device), seconds(theirs, device)) for _ in range(repeats)]
    return (*(statistics.median(t) for t in zip(*taken, strict=True)), statistics.median(a / b for a, b in taken))


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


def row(name: str, ours: float, reference: float, ratio: float, unit: str, about: tuple, share=None) -> dict:
    """A row of the table. `share_of_limit`: of the rate of plain matrix products on this machine."""
    names = ("name", "ours", "reference", "ratio", "unit", "shape", "dtype", "compiled", "share_of_limit")
    return dict(zip(names, (name, ours, reference, ratio, unit, *about, share), strict=True))


def agree(ours: Tensor, theirs: Tensor, dtype: torch.dtype, what: str) -> None:
    """RuntimeError unless both are the same up to the type's rounding."""
    theirs = theirs.to(ours.device)  # our VAE decodes into host memory
    error = ((ours.float() - theirs.float()).norm() / theirs.float().norm()).item()
    if not error < (1e-4 if dtype == torch.float32 else 0.05):  # NaN is no agreement
        raise RuntimeError(f"{what}: ours and the reference differ by {error:.1e}; their times mean nothing")


def peak(function: Callable, device: torch.device) -> float:
    """The most memory that a call needs beyond what is held before it, in GiB."""
    gc.collect()
    memory.reset_peak(device)
    before = memory.peak_memory(device)
    function()
    return memory.peak_memory(device) - before


@dataclass(frozen=True)
class Config:
    preset: Literal["wide", "wan5b", "small"] = "wide"  # shapes
    parts: str = ",".join(PARTS)  # what to measure, separated by commas
    gpu: bool = False  # what one GPU does, in five minutes: give it --out results/bench-<gpu>.json
    rehearse: bool = False  # measure nothing: count the memory of every stage on pretended GPUs
    repeats: int = 3  # timed pairs
    out: str = "out/bench.json"  # rows; the table goes beside it


def diffusers_transformer(config: DiTConfig) -> nn.Module:
    """The network of diffusers with these shapes."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=config.patch, num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads,
        in_channels=config.channels, out_channels=config.channels, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        eps=config.eps,
    )  # fmt: skip


def diffusers_vae(config: vae.VAEConfig) -> nn.Module:
    """The network of diffusers with these shapes."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=config.width, decoder_base_dim=config.decoder_width, z_dim=config.channels,
        dim_mult=list(config.multipliers), num_res_blocks=config.blocks, temperal_downsample=list(config.temporal),
        is_residual=True, in_channels=12, out_channels=12, patch_size=config.patch,
        scale_factor_spatial=config.patch * 2 ** len(config.temporal),
        latents_mean=list(vae.MEAN), latents_std=list(vae.STD),
    )  # fmt: skip


def build_pair(config: DiTConfig, dtype: torch.dtype, device: torch.device) -> tuple[VideoDiT, nn.Module]:
    """Our transformer and diffusers', with the same random weights."""
    with torch.device(device):
        ours, theirs = VideoDiT(config), diffusers_transformer(config)
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5 * config.dim**-0.5)
    ours.load_state_dict(rename(theirs.state_dict(), DIFFUSERS_NAMES))
    for network, kept in ((ours, VideoDiT.float32), (theirs, "time_embedder|scale_shift_table|norm[123]")):
        for name, p in network.named_parameters():  # both leave the same parts in float32, as Wan does
            p.data = p.data.to(torch.float32 if re.search(kept, name) else dtype)
    return ours.eval(), theirs.eval()


def bench_transformer(cfg: Config, dtype: torch.dtype, compiled: bool, device: torch.device) -> Iterator[dict]:
    """One forward pass; and four steps with a ResNet adapter, which diffusers' loop calls at every step."""
    config, (frames, height, width), *_ = SHAPES[cfg.preset]
    tokens = frames * height * width // 4
    about = (f"{config.layers} blocks of {config.dim}, {tokens} tokens", str(dtype).removeprefix("torch."), compiled)
    torch.manual_seed(0)
    ours, theirs = build_pair(config, dtype, device)
    adapter = ResNetAdapter(AdapterConfig(config.dim, config.layers)).to(device)
    for block in adapter.blocks:
        nn.init.normal_(block.project.weight, std=0.01)
    for block in (*ours.blocks, *theirs.blocks) if compiled else ():
        block.compile()
    x, traj = torch.randn(2, 1, config.channels, frames, height, width, device=device)
    text = torch.randn(1, config.text_tokens, config.text_dim, device=device, dtype=dtype)
    t = torch.full((1, frames), 700.0, device=device)
    t[:, 0] = 0  # image-to-video

    def reference(x: Tensor, t: Tensor) -> Tensor:
        return theirs(x.to(dtype), t.repeat_interleave(height * width // 4, 1), text, return_dict=False)[0]

    if "forward" in cfg.parts:
        both = partial(ours, x, t, text), partial(reference, x, t)
        agree(*(call() for call in both), dtype, "forward")
        times = pairs(*both, cfg.repeats, device)
        share = flop(config, tokens) / times[0] / matmul_rate(dtype, device)
        yield row("DiT forward", *times, "s", about, share)
        theirs.fuse_qkv_projections()
        agree(*(call() for call in both), dtype, "forward, fused")
        yield row("DiT forward, reference fused", *pairs(*both, cfg.repeats, device), "s", about, share)
    if "loop" not in cfg.parts or not compiled or dtype == torch.float32:
        return

    def adapted(x: Tensor, t: Tensor) -> Tensor:
        added = iter(adapter(traj))
        hooks = [b.register_forward_hook(lambda _m, _i, out: out + next(added).type_as(out)) for b in theirs.blocks]
        v = reference(x, t)
        for hook in hooks:
            hook.remove()
        return v

    noise, sigmas = torch.randn(4, *x.shape, device=device), flow.sigma_schedule(4, 5.0)

    def our_loop() -> Tensor:
        return flow.sample_fewstep(partial(ours, text=text, residuals=adapter(traj)), x[:, :, :1], noise, sigmas)

    their_loop = partial(flow.sample_fewstep, adapted, x[:, :, :1], noise, sigmas)
    agree(our_loop(), their_loop(), dtype, "loop")
    yield row("4 steps with adapter", *pairs(our_loop, their_loop, cfg.repeats, device), "s", about)


def bench_vae(cfg: Config, device: torch.device) -> Iterator[dict]:
    """Time and peak memory of decoding and encoding, at the true widths (but for preset small)."""
    (frames, height, width), dtype = SHAPES[cfg.preset][2], torch.bfloat16
    config = vae.VAEConfig(width=8, decoder_width=12) if cfg.preset == "small" else vae.VAEConfig()
    about = (f"{frames} frames of {height}x{width}", "bfloat16", False)
    with torch.device(device):
        ours, theirs = vae.WanVAE(config), diffusers_vae(config)
    ours.load_state_dict(rename(theirs.state_dict(), vae.diffusers_names(config)))
    ours, theirs = (network.to(dtype).eval() for network in (ours, theirs))
    video = torch.rand(1, 3, frames, height, width, device=device, dtype=dtype) * 2 - 1
    latents = ours.encode(video)
    mean, std = (x.to(latents) for x in vae.statistics(latents))
    raw = latents * std + mean  # diffusers' latents are not normalised
    agree(ours.decode(latents), theirs.decode(raw).sample, dtype, "VAE decode")
    agree(raw, theirs.encode(video).latent_dist.mode(), dtype, "VAE encode")
    for name, *both in (
        ("VAE decode", partial(ours.decode, latents), partial(theirs.decode, raw)),
        ("VAE encode", partial(ours.encode, video), partial(theirs.encode, video)),
    ):
        yield row(name, *pairs(*both, cfg.repeats, device), "s", about)
        a, b = (peak(call, device) for call in both)
        if b > 0:  # what fits into memory already held shows no peak
            yield row(f"{name}, peak memory", a, b, a / b, "GiB", about)


def bench_steps(cfg: Config, device: torch.device) -> Iterator[dict]:
    """A training step of each stage with blocks recomputed, without the optimizer: compiled, beside not compiled."""
    from tools.gpu import learning_losses  # it imports every stage

    config, grid, _ = SHAPES[cfg.preset]
    config = replace(config, layers=min(config.layers, 4))  # with all of wan5b's, three networks would be too large
    grid = (8, 32, 32) if cfg.preset == "wide" else grid
    tokens, dtype = math.prod(grid) // 4, torch.bfloat16 if parallel.fast_bfloat16(device) else torch.float32
    about = (f"{config.layers} blocks of {config.dim}, {tokens} tokens", str(dtype).removeprefix("torch."), True)
    torch.manual_seed(0)
    judge = ClassifierConfig(config.dim, config.text_dim, tuple(range(config.layers))[-3:], channels=config.channels)
    with torch.device(device):
        adapter = ResNetAdapter(AdapterConfig(config.dim, config.layers, channels=config.channels))
        generator, backbone, classifier = VideoDiT(config), VideoDiT(config), Classifier(judge)
        x0, traj, *noise = torch.randn(6, 1, config.channels, *grid)
        batch = Batch(x0, torch.randn(1, config.text_tokens, config.text_dim), traj)
    for network in (generator, backbone):
        nn.init.normal_(network.head.head.weight, std=0.02)
    alone = parallel.Processes(0, 1, device, None)
    networks = [parallel.prepare(n, alone, True, "full") for n in (generator, adapter, backbone, classifier)]
    discriminator, sigmas = DiffusionDiscriminator(backbone, classifier), flow.sigma_schedule(4, 5.0)
    losses = learning_losses(generator, adapter, discriminator, batch, torch.stack(noise), sigmas)
    for stage, loss in losses.items():
        generator.requires_grad_(stage == "stage 2")

        def step(stance: str, loss: Callable[[], Tensor] = loss) -> Tensor:
            with torch.enable_grad(), torch.compiler.set_stance(stance), parallel.autocast(device, about[1]):
                value = loss()
                value.backward()
            for network in networks:
                network.zero_grad()
            return value.detach()

        both = partial(step, "default"), partial(step, "force_eager")
        agree(*(call() for call in both), dtype, f"step of {stage}")
        yield row(f"step of {stage}, reference not compiled", *pairs(*both, cfg.repeats, device), "s", about)


def main(cfg: Config) -> None:
    if cfg.repeats < 1:
        raise UserError(f"--repeats {cfg.repeats}: at least 1")
    parts = set(cfg.parts.split(","))
    if unknown := parts - set(PARTS):
        raise UserError(f"--parts {cfg.parts}: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    out = output_path(cfg.out, ".json")
    if cfg.rehearse or cfg.gpu:
        from tools import gpu, rehearse, resident  # they import every stage

        device = parallel.init_processes().device if cfg.gpu else torch.device("cpu")
        if cfg.gpu and device.type != "cuda":
            raise UserError("--gpu: there is none here; --rehearse needs none")
        origin, rows = provenance("-m tools.bench", cfg, device), []
        for counted in gpu.measure(device) if cfg.gpu else chain(rehearse.table(), resident.rows()):
            print(counted, file=sys.stderr, flush=True)
            rows.append(counted | origin)
            write_rows(out, rows, three_digits)  # each as it comes: the run may be cut short
        print(markdown(rows, three_digits))
        return
    try:
        import diffusers
    except ImportError:
        raise UserError("diffusers: not installed; pip install -r requirements-dev.txt") from None
    device = parallel.init_processes().device
    origin = provenance("-m tools.bench", cfg, device)
    origin["machine"] += f", diffusers {diffusers.__version__}"
    ways = product((torch.float32, torch.bfloat16), (False, True)) if parts & {"forward", "loop"} else ()
    benches = [bench_transformer(cfg, dtype, compiled, device) for dtype, compiled in ways]
    benches += [bench_vae(cfg, device)] if "vae" in parts else []
    benches += [bench_steps(cfg, device)] if "steps" in parts else []
    rows = []
    with torch.no_grad():
        for measured in chain(*benches):  # generators: each row is measured when it is asked for
            rows.append(measured | origin)
            line = "{name}, {dtype}: {ours:.4g} {unit}, ratio {ratio:.3f}"
            print(line.format(**measured), file=sys.stderr, flush=True)
    write_rows(out, rows, three_digits)
    print(markdown(rows, three_digits))


if __name__ == "__main__":
    run_script(main, Config)
