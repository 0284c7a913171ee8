"""Measure speed: this project's networks beside diffusers', in one process, with the same weights and inputs.

    python bench.py                      # a transformer of width 1536 at 4,032 tokens, the VAE at 17 frames of 256x256
    python bench.py --preset wan5b       # the real shapes; needs a GPU

Ours and theirs take turns; each pair gives a ratio (below 1: ours is faster), and the median counts. Outputs are
compared before anything is timed. What has no peer (training steps, growth with the number of tokens, 8-bit weights)
stands alone. Needs requirements-dev.txt. Writes `--out` and a table in Markdown beside it.
"""

import json
import re
import statistics
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Literal

import torch
from torch import Tensor, nn

import common
import costs
import flow
import parallel
import vae
from adapter import AdapterConfig, ControlNetAdapter, ResNetAdapter, steer
from model import DIFFUSERS_NAMES, DiTConfig, VideoDiT
from timing import SHAPES, Row, agree, flop, matmul_rate, pairs, peak, seconds
from vae import VAEConfig, WanVAE, diffusers_names
from weights import rename

PARTS = ("limits", "forward", "loop", "vae", "training", "growth", "frugal")


@dataclass(frozen=True)
class Config:
    """Options of the benchmark."""

    preset: Literal["wide", "wan5b", "small"] = "wide"  # shapes
    parts: str = ",".join(PARTS)  # which of these to measure, with commas between
    repeats: int = 3  # timed pairs
    threads: int = 0  # of a CPU; 0 leaves the choice to torch
    out: str = "out/bench.json"  # rows; the table goes beside it


def diffusers_transformer(config: DiTConfig) -> nn.Module:
    """Diffusers' network of the same shapes."""
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=config.patch, num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads,
        in_channels=config.channels, out_channels=config.channels, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.layers, cross_attn_norm=True, qk_norm="rms_norm_across_heads",
        eps=config.eps,
    )  # fmt: skip


def diffusers_vae(config: VAEConfig) -> nn.Module:
    """Diffusers' network of the same shapes."""
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=config.width, decoder_base_dim=config.decoder_width, z_dim=config.channels,
        dim_mult=list(config.multipliers), num_res_blocks=config.blocks, temperal_downsample=list(config.temporal),
        is_residual=True, in_channels=12, out_channels=12, patch_size=config.patch,
        scale_factor_spatial=config.patch * 2 ** len(config.temporal),
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


def bench_transformer(cfg: Config, dtype: torch.dtype, compiled: bool, device: torch.device) -> list[Row]:
    """One forward pass, and the four steps with a ResNet adapter, which diffusers' loop runs at every step."""
    config, (frames, height, width), *_ = SHAPES[cfg.preset]
    tokens = frames * height * width // 4
    about = (f"{config.layers} blocks of {config.dim}, {tokens} tokens", str(dtype).removeprefix("torch."), compiled)
    torch.manual_seed(0)
    ours, theirs = build_pair(config, dtype, device)
    adapter = ResNetAdapter(AdapterConfig(config.dim, config.layers)).to(device)
    for block in adapter.blocks:
        nn.init.normal_(block.project.weight, std=0.01)
    if compiled:
        for block in (*ours.blocks, *theirs.blocks):
            block.compile()
    x, traj = torch.randn(2, 1, config.channels, frames, height, width, device=device)
    text = torch.randn(1, config.text_tokens, config.text_dim, device=device, dtype=dtype)
    t = torch.full((1, frames), 700.0, device=device)
    t[:, 0] = 0  # image-to-video

    def reference(x: Tensor, t: Tensor) -> Tensor:
        return theirs(x.to(dtype), t.repeat_interleave(height * width // 4, 1), text, return_dict=False)[0]

    rows = []
    if "forward" in cfg.parts:
        agree(ours(x, t, text), reference(x, t), dtype, "forward")
        a, b, ratio = pairs(lambda: ours(x, t, text), lambda: reference(x, t), cfg.repeats, device)
        share = flop(config, tokens) / a / matmul_rate(dtype, device)
        rows.append(Row("DiT forward", a, b, ratio, "s", *about, share))
        for block in theirs.blocks:
            block.attn1.fuse_projections()
            block.attn2.fuse_projections()
        agree(ours(x, t, text), reference(x, t), dtype, "forward, fused")
        fused = pairs(lambda: ours(x, t, text), lambda: reference(x, t), cfg.repeats, device)
        rows.append(Row("DiT forward, reference fused", *fused, "s", *about, share))
    if "loop" not in cfg.parts or not compiled or dtype == torch.float32:
        return rows

    def adapted(x: Tensor, t: Tensor) -> Tensor:
        added = iter(adapter(None, None, None, traj))
        hooks = [b.register_forward_hook(lambda _m, _i, out: out + next(added).type_as(out)) for b in theirs.blocks]
        try:
            return reference(x, t)
        finally:
            for hook in hooks:
                hook.remove()

    noise, sigmas = torch.randn(4, *x.shape, device=device), flow.sigma_schedule(4, 5.0)

    def our_loop() -> Tensor:
        return flow.sample_fewstep(steer(ours, adapter, text, traj), x[:, :, :1], noise, sigmas)

    def their_loop() -> Tensor:
        return flow.sample_fewstep(adapted, x[:, :, :1], noise, sigmas)

    agree(our_loop(), their_loop(), dtype, "loop")
    rows.append(Row("4 steps with adapter", *pairs(our_loop, their_loop, cfg.repeats, device), "s", *about))
    if cfg.preset == "wide":  # twice the work, for no comparison
        return rows
    with torch.device(device):
        adapter = ControlNetAdapter(config).to(dtype)  # our_loop's from here on
    for block in adapter.blocks:
        block.compile()
    our_loop()
    taken = statistics.median(seconds(our_loop, device) for _ in range(cfg.repeats))
    return [*rows, Row("4 steps with ControlNet", taken, None, None, "s", *about)]


def bench_vae(cfg: Config, device: torch.device) -> list[Row]:
    """Decode and encode, time and peak memory, at the true widths (the small preset's are small)."""
    (frames, height, width), dtype = SHAPES[cfg.preset][2], torch.bfloat16
    config = VAEConfig(width=8, decoder_width=12) if cfg.preset == "small" else VAEConfig()
    about = (f"{frames} frames of {height}x{width}", str(dtype).removeprefix("torch."), False)
    with torch.device(device):
        ours, theirs = WanVAE(config), diffusers_vae(config)
    ours.load_state_dict(rename(theirs.state_dict(), diffusers_names(config)))
    ours, theirs = (network.to(dtype).eval() for network in (ours, theirs))
    video = torch.rand(1, 3, frames, height, width, device=device, dtype=dtype) * 2 - 1
    latents = ours.encode(video)
    mean, std = (x.to(latents) for x in vae.statistics(latents))
    raw, rows = latents * std + mean, []
    agree(ours.decode(latents), theirs.decode(raw).sample, dtype, "VAE decode")
    agree(latents * std + mean, theirs.encode(video).latent_dist.mode(), dtype, "VAE encode")
    for name, mine, other in (
        ("VAE decode", lambda: ours.decode(latents), lambda: theirs.decode(raw)),
        ("VAE encode", lambda: ours.encode(video), lambda: theirs.encode(video)),
    ):
        rows.append(Row(name, *pairs(mine, other, cfg.repeats, device), "s", *about))
        a, b = (peak(function, device) for function in (mine, other))
        if b > 0:  # a small one fits into memory that was held before
            rows.append(Row(f"{name}, peak memory", a, b, a / b, "GiB", *about))
    for times in (1, 2) if cfg.preset != "wan5b" else ():
        longer = latents.repeat(1, 1, times, 1, 1)
        # What is decoded is as long as the video; the rest is not.
        rest = peak(lambda: [part.sum() for part in ours.frames(longer)], device)
        rows.append(Row(f"VAE decode piece by piece, {longer.shape[2]} latent frames, peak memory", rest, None, None,
                        "GiB", *about))  # fmt: skip
    return rows


def markdown(rows: Sequence[Row]) -> str:
    """The rows as a table, for a page that quotes it."""
    lines = ["| " + " | ".join(Row.__dataclass_fields__) + " |", "|" + " --- |" * len(Row.__dataclass_fields__)]
    for row in rows:
        cells = [f"{v:.3g}" if isinstance(v, float) else "" if v is None else str(v) for v in asdict(row).values()]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(cfg: Config) -> None:
    if cfg.repeats < 1 or cfg.threads < 0:
        raise common.UserError(f"--repeats {cfg.repeats} --threads {cfg.threads}: at least 1, and at least 0")
    parts = set(cfg.parts.split(","))
    if unknown := parts - set(PARTS):
        raise common.UserError(f"--parts {cfg.parts}: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    out = common.output_path(cfg.out, ".json")
    try:
        import diffusers
    except ImportError:
        raise common.UserError("diffusers: not installed; pip install -r requirements-dev.txt") from None
    if cfg.threads:
        torch.set_num_threads(cfg.threads)
    device = parallel.init_processes().device
    rows: list[Row] = []

    def add(new: list[Row]) -> None:
        rows.extend(new)
        for row in new:
            beside = f", ratio {row.ratio:.3f}" if row.ratio else ""
            print(f"{row.name}, {row.dtype}: {row.ours:.4g} {row.unit}{beside}", file=sys.stderr, flush=True)

    with torch.no_grad():
        for dtype in (torch.float32, torch.bfloat16) if parts & {"forward", "loop"} else ():
            for compiled in (False, True):
                add(bench_transformer(cfg, dtype, compiled, device))
        if "vae" in parts:
            add(bench_vae(cfg, device))
        for part in (part for part in PARTS if part in parts and hasattr(costs, part)):
            add(getattr(costs, part)(cfg.preset, cfg.repeats, device))
    about = common.provenance("bench.py", cfg, device)
    about["machine"] += f", diffusers {diffusers.__version__}"
    with common.atomic(out) as temporary:
        temporary.write_text(json.dumps([asdict(row) | about for row in rows], indent=1) + "\n")
    print(markdown(rows))
    with common.atomic(out.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(rows) + "\n")


if __name__ == "__main__":
    common.run_script(main, Config)
