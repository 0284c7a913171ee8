"""Measure speed: this project's networks beside diffusers', in one process, with the same weights and inputs.

    python -m tools.bench                      # a transformer of width 1536 at 4,032 tokens, the VAE at 17 x 256 x 256
    python -m tools.bench --preset wan5b       # the real shapes; needs a GPU

Ours and theirs take turns; each pair gives a ratio (below 1: ours is faster), and the median counts. Outputs are
compared before anything is timed. What has no peer (training steps, the memory modes) stands alone. Needs
requirements-dev.txt. Writes `--out` and a table in Markdown beside it.
"""

import copy
import gc
import re
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn

import distill_fast
import finetune_hybrid
import flow
from adapter import AdapterConfig, ControlNetAdapter, ResNetAdapter
from core import memory, optim, parallel
from core.config import UserError, run_script
from core.files import output_path
from core.tables import markdown, provenance, three_digits, write_rows
from core.weights import rename
from discriminator import Classifier, ClassifierConfig, DiffusionDiscriminator, adversarial_loss, discriminator_loss
from model import DIFFUSERS_NAMES, PRESETS, DiTConfig, VideoDiT
from wan import vae
from wan.vae import VAEConfig, WanVAE, diffusers_names

PARTS = ("forward", "loop", "vae", "training", "memory")
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
    emulated = dtype == torch.bfloat16 and not parallel.has_bfloat16(device)
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


def controlled(
    generator: VideoDiT, adapter: ResNetAdapter | ControlNetAdapter, text: Tensor, traj: Tensor
) -> flow.Velocity:
    """As sample.py has it: a static adapter runs once a clip, any other at every step."""
    if adapter.static:
        return partial(generator, text=text, residuals=adapter(traj))
    return lambda x, t: generator(x, t, text, adapter.residuals(traj, x, t, text))


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
        added = iter(adapter(traj))
        hooks = [b.register_forward_hook(lambda _m, _i, out: out + next(added).type_as(out)) for b in theirs.blocks]
        try:
            return reference(x, t)
        finally:
            for hook in hooks:
                hook.remove()

    noise, sigmas = torch.randn(4, *x.shape, device=device), flow.sigma_schedule(4, 5.0)

    def our_loop() -> Tensor:
        return flow.sample_fewstep(controlled(ours, adapter, text, traj), x[:, :, :1], noise, sigmas)

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


def shortened(block: nn.Module) -> nn.Module:
    """A copy in bfloat16 with its linear layers in 8 bits."""
    short = copy.deepcopy(block).to(torch.bfloat16)
    layers = dict(short.named_modules())
    memory.use_int8(short)
    for name, layer in short.named_modules():
        if isinstance(layer, memory.Int8Linear):
            layer.fill(layers[name].weight.data)
    return short


def bench_memory(preset: str, repeats: int, device: torch.device) -> list[Row]:
    """`sample.py --memory`: a forward pass with blocks in host memory, then also in 8 bits; reference: all at hand."""
    config, _, _, (frames, height, width) = SHAPES[preset]
    whole = VideoDiT(config).to(torch.bfloat16)
    nn.init.normal_(whole.head.head.weight, std=0.02)
    short = copy.deepcopy(whole)
    short.blocks = nn.ModuleList(shortened(block) for block in whole.blocks)
    aside = memory.offload(copy.deepcopy(whole), device=device)
    whole, short = whole.to(device), memory.offload(short, device=device)
    x = torch.randn(1, config.channels, frames, height, width, device=device)
    inputs = x, torch.full((1, frames), 700.0, device=device), torch.randn(1, config.text_tokens, config.text_dim).to(x)
    rows = []
    for mode, network in (("medium", aside), ("low", short)):
        about = (f"{config.layers} blocks, {frames * height * width // 4} tokens", "bfloat16", False)
        error = relative(network(*inputs), whole(*inputs))
        rows.append(Row(f"--memory {mode}: error of a forward pass", error, None, None, "relative", *about))
        times = pairs(lambda: network(*inputs), lambda: whole(*inputs), repeats, device)
        rows.append(Row(f"--memory {mode}: forward", *times, "s", *about))
    if device.type == "cuda":
        whole.cpu()
        torch.cuda.empty_cache()
        for mode, network in (("medium", aside), ("low", short)):
            memory.reset_peak(device)
            network(*inputs)
            held = memory.peak_memory(device)
            rows.append(Row(f"--memory {mode}: peak memory", held, None, None, "GiB", *about))
    return rows


def bench_training(preset: str, repeats: int, device: torch.device) -> list[Row]:
    """A step of each stage, compiled, in mixed precision, with recomputed blocks where there is a GPU.

    `share_of_limit` is the model's FLOP utilisation, without what is recomputed. Stage 2 is a cycle of five updates of
    the fake score and one of the generator; wan5b's needs more than one GPU. Stage 3 is one update of each.
    """
    config, _, _, (frames, height, width) = SHAPES[preset]
    tokens, alone = frames * height * width // 4, parallel.Processes(0, 1, device, None)
    on_gpu, work = device.type == "cuda", flop(config, tokens)
    rate, about = matmul_rate(torch.bfloat16, device), (f"{tokens} tokens", "bfloat16", preset != "small")

    def network(make: Callable, trained: bool) -> nn.Module:
        with torch.device(device):
            made = make().requires_grad_(trained)
        made = made if trained or not on_gpu else made.to(torch.bfloat16)
        return parallel.prepare(made, alone, preset != "small", "full" if on_gpu else "none")

    adapter_shape = AdapterConfig(config.dim, config.layers, channels=config.channels)
    judge = ClassifierConfig(
        config.dim, config.text_dim, (0, config.layers - 1), position_dim=config.dim // config.heads
    )
    frozen, backbone = (network(lambda: VideoDiT(config), False) for _ in range(2))
    adapter, classifier = network(lambda: ResNetAdapter(adapter_shape), True), network(lambda: Classifier(judge), True)
    x0, noise, traj = torch.randn(3, 1, config.channels, frames, height, width, device=device)
    many = torch.randn(4, *x0.shape, device=device)
    text, sigma = torch.randn(1, config.text_tokens, config.text_dim, device=device), torch.tensor([0.5], device=device)
    level, sigmas = flow.frame_sigma(sigma, frames), flow.sigma_schedule(4, 5.0)
    discriminator = DiffusionDiscriminator(backbone, classifier)

    def update(loss: Tensor, *optimizers: torch.optim.Optimizer) -> None:
        loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()

    def controlled(x: Tensor, t: Tensor) -> Tensor:
        return frozen(x, t, text, adapter(traj, x, t, text))

    for_adapter, for_classifier = optim.adamw(adapter, 0.0), optim.adamw(classifier, 0.0)

    def stage1() -> None:
        update(flow.flow_matching_loss(controlled, x0, noise, sigma), for_adapter)

    def stage3() -> None:
        with torch.no_grad():
            x_t = flow.add_noise(x0, noise, level)
            both = (torch.cat([y, y]) for y in (x_t, flow.timestep(level), text))
            features = discriminator.features(*both)
        logits = classifier(features, *(torch.cat([y, y]) for y in (text, traj)))
        update(discriminator_loss(*logits.chunk(2)), for_classifier)
        fake = flow.backward_simulation(controlled, x0[:, :, :1], many, sigmas, 3)
        logits = discriminator(flow.add_noise(fake, noise, level), flow.timestep(level), text, traj)
        update(adversarial_loss(logits) + finetune_hybrid.diffusion_loss(controlled, x0, noise, sigma), for_adapter)

    stages = {"stage 1, a step": (stage1, 2 * work), "stage 3, a step": (stage3, 11 * work)}
    if not on_gpu:
        learner, fake = (network(lambda: VideoDiT(config), True) for _ in range(2))
        for_learner, for_fake = optim.adamw(learner, 0.0), optim.adamw(fake, 0.0)
        makes, fake_score, real = (partial(net, text=text) for net in (learner, fake, frozen))
        draw = distill_fast.Draw(x0[:, :, :1], many, noise, sigma)

        def stage2() -> None:
            for _ in range(5):
                loss = distill_fast.fake_score_loss(fake_score, student=makes, draw=draw, sigmas=sigmas, exit_step=2)
                update(loss, for_fake)
            real_score = flow.guided(real, real, 7.0)
            loss = distill_fast.student_loss(
                makes, real_score=real_score, fake_score=fake_score, draw=draw, sigmas=sigmas, exit_step=2
            )
            update(loss, for_learner)

        stages["stage 2, a cycle"] = (stage2, 5 * (3 + 3) * work + (2 + 3 + 1 + 2) * work)
    rows = []
    for name, (step, cost) in stages.items():
        torch.compiler.reset()  # a script compiles for its own stage alone; all in one would exceed a limit
        with parallel.autocast(device, "auto"), torch.enable_grad():
            step()
            memory.reset_peak(device)
            taken = statistics.median(seconds(step, device) for _ in range(repeats))
        held = memory.peak_memory(device)
        rows.append(Row(name, taken, None, None, "s", *about, cost / taken / rate))
        rows.append(Row(f"{name}, speed", tokens / taken, None, None, "tokens/s", *about))
        rows.append(Row(f"{name}, peak memory", held, None, None, "GiB", *about))
    return rows


def main(cfg: Config) -> None:
    if cfg.repeats < 1 or cfg.threads < 0:
        raise UserError(f"--repeats {cfg.repeats} --threads {cfg.threads}: at least 1, and at least 0")
    parts = set(cfg.parts.split(","))
    if unknown := parts - set(PARTS):
        raise UserError(f"--parts {cfg.parts}: {', '.join(sorted(unknown))} is none of {', '.join(PARTS)}")
    out = output_path(cfg.out, ".json")
    try:
        import diffusers
    except ImportError:
        raise UserError("diffusers: not installed; pip install -r requirements-dev.txt") from None
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
        if "training" in parts:
            add(bench_training(cfg.preset, cfg.repeats, device))
        if "memory" in parts:
            add(bench_memory(cfg.preset, cfg.repeats, device))
    about = provenance("-m tools.bench", cfg, device)
    about["machine"] += f", diffusers {diffusers.__version__}"
    out_rows = [asdict(row) | about for row in rows]
    write_rows(out, out_rows, three_digits)
    print(markdown(out_rows, three_digits))


if __name__ == "__main__":
    run_script(main, Config)
