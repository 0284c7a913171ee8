"""Measure speed: this project's networks beside diffusers', in one process, with the same weights and inputs.

    python -m tools.bench                      # a transformer of width 1536 at 4,032 tokens, the VAE at 17 x 256 x 256
    python -m tools.bench --out results/bench-h100.json     # on a GPU: the real shapes, and what it does alone

Ours and theirs take turns, after their outputs are compared. Each pair gives a ratio (below 1: ours is faster); the
table has the median. sample.py's four steps, the VAE and the small decoder are timed alone. Needs requirements-dev.txt.
"""

import gc
import math
import re
import statistics
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.metadata import version
from importlib.util import find_spec
from itertools import chain, product
from typing import NamedTuple

import torch
from torch import Tensor, nn

import distill_fast
import flow
import sample
import train_slow_adapter
from adapter import AdapterConfig, ResNetAdapter
from core import parallel
from core.codec import Batch
from core.config import require, run_script, warn
from core.memory import peak_memory, reset_peak, seconds
from core.tables import markdown, provenance, table_path, write_rows
from core.weights import Stored, load, rename
from discriminator import Classifier, ClassifierConfig, DiffusionDiscriminator, adversarial_loss
from model import PRESETS, DiTConfig, VideoDiT
from wan import vae
from wan.published import DIFFUSERS_NAMES, vae_names
from wan.tiny_decoder import TinyDecoder


class Shape(NamedTuple):
    """The size of everything that is measured."""

    transformer: DiTConfig
    grid: tuple[int, int, int]  # its latents: frames, height and width
    step_layers: int  # the transformer's in a training step
    step_grid: tuple[int, int, int]
    vae: vae.VAEConfig
    video: tuple[int, int, int]  # the VAE's: frames, height and width


SHAPES = {
    "cpu": Shape(DiTConfig(1536, 6144, 12, 8, 4096, 512), (7, 48, 48), 4, (8, 32, 32), vae.VAEConfig(), (17, 256, 256)),
    "cuda": Shape(PRESETS["wan5b"], (31, 44, 80), 30, (31, 44, 80), vae.VAEConfig(), (121, 704, 1280)),
}


class Case(NamedTuple):
    """A call to measure, beside a reference that returns the same or alone."""

    name: str
    ours: Callable
    reference: Callable | None
    shape: str
    dtype: torch.dtype
    compiled: bool = False
    flop: float = 0  # of a call, to state its share of this machine's rate
    memory: bool = False  # another row: peak memory beyond what is held before; without a reference, all of it


def measure(case: Case, repeats: int, device: torch.device) -> Iterator[dict]:
    """The rows of a case. RuntimeError if the reference returns something else, beyond the dtype's rounding."""
    gc.collect()  # compiled blocks refer to themselves
    calls = [call for call in (case.ours, case.reference) if call]
    outputs = [call() for call in calls]
    if case.reference:
        ours, theirs = (output.float().cpu() for output in outputs)
        error = ((ours - theirs).norm() / theirs.norm()).item()
        if not error < (1e-4 if case.dtype == torch.float32 else 0.05):  # NaN is no agreement
            raise RuntimeError(f"{case.name}: ours and the reference differ by {error:.1e}; their times mean nothing")
    del outputs
    measured = [(case.name, "s", [[seconds(call, device) for call in calls] for _ in range(repeats)])]
    peaks = []
    for call in calls if case.memory else ():
        gc.collect()
        reset_peak(device)
        before = peak_memory(device) if case.reference else 0
        call()
        peaks.append(peak_memory(device) - before)
    if peaks and peaks[-1] > 0:  # what fits into memory held shows no peak
        measured.append((f"{case.name}, peak memory", "GiB", [peaks]))
    for name, unit, pairs in measured:
        ours, reference = (*map(statistics.median, zip(*pairs, strict=True)), None)[:2]
        yield {
            "name": name, "ours": ours, "reference": reference,
            "ratio": statistics.median(a / b for a, b in pairs) if case.reference else None,
            "unit": unit, "shape": case.shape, "dtype": str(case.dtype).removeprefix("torch."),
            "compiled": case.compiled,
            "share_of_limit": case.flop / ours / matmul_rate(case.dtype, device) if case.flop else None,
        }  # fmt: skip


@cache
def matmul_rate(dtype: torch.dtype, device: torch.device) -> float:
    """The FLOP per second of one large matrix product, measured once: the most that this machine gives."""
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
    from diffusers import WanTransformer3DModel

    return WanTransformer3DModel(
        patch_size=config.patch, num_attention_heads=config.heads, attention_head_dim=config.dim // config.heads,
        in_channels=config.channels, out_channels=config.channels, text_dim=config.text_dim, freq_dim=config.freq_dim,
        ffn_dim=config.ffn_dim, num_layers=config.layers, eps=config.eps,
    )  # fmt: skip


def diffusers_vae(config: vae.VAEConfig) -> nn.Module:
    from diffusers import AutoencoderKLWan

    return AutoencoderKLWan(
        base_dim=config.width, decoder_base_dim=config.decoder_width, z_dim=config.channels,
        dim_mult=list(config.multipliers), num_res_blocks=config.blocks, temperal_downsample=list(config.temporal),
        is_residual=True, in_channels=12, out_channels=12, patch_size=config.patch,
        scale_factor_spatial=config.patch * 2 ** len(config.temporal),
        latents_mean=list(vae.MEAN), latents_std=list(vae.STD),
    )  # fmt: skip


def transformer(shape: Shape, device: torch.device) -> Iterator[Case]:
    """One forward pass beside diffusers'."""
    for dtype, compiled in product((torch.float32, torch.bfloat16), (False, True)):
        yield from forward_pass(shape, device, dtype, compiled)  # its networks are freed before the next


def forward_pass(shape: Shape, device: torch.device, dtype: torch.dtype, compiled: bool) -> Iterator[Case]:
    config, frames, tokens = shape.transformer, shape.grid[0], math.prod(shape.grid) // 4
    torch.manual_seed(0)
    with torch.device(device):
        theirs, x = diffusers_transformer(config), torch.randn(1, config.channels, *shape.grid)
        text, t = torch.randn(1, config.text_tokens, config.text_dim, dtype=dtype), torch.full((1, frames), 700.0)
    t[:, 0] = 0  # image-to-video
    for p in theirs.parameters():
        nn.init.normal_(p, std=0.5 * config.dim**-0.5)
    weights = rename(theirs.state_dict(), DIFFUSERS_NAMES)
    ours = load(lambda: VideoDiT(config), {n: Stored(tuple(p.shape), p.clone) for n, p in weights.items()}, "", dtype)
    for name, p in theirs.eval().named_parameters():  # in float32 the same parts as ours
        p.data = p.data.to(torch.float32 if re.search("time_embedder|scale_shift_table|norm[123]", name) else dtype)
    for block in (*ours.blocks, *theirs.blocks) if compiled else ():
        block.compile()
    by_token = t.repeat_interleave(tokens // frames, 1)
    both = partial(ours, x, t, text), lambda: theirs(x.to(dtype), by_token, text, return_dict=False)[0]
    about = f"{config.layers} blocks of {config.dim}, {tokens} tokens", dtype, compiled, flop(config, tokens)
    yield Case("DiT forward", *both, *about)
    theirs.fuse_qkv_projections()
    yield Case("DiT forward, reference fused", *both, *about)


def codec(shape: Shape, device: torch.device) -> Iterator[Case]:
    """Decoding and encoding beside diffusers', at the true widths."""
    with torch.device(device):
        ours, theirs = vae.WanVAE(shape.vae), diffusers_vae(shape.vae)
    ours.load_state_dict(rename(theirs.state_dict(), vae_names(shape.vae.blocks)))
    ours, theirs = (network.to(torch.bfloat16).eval() for network in (ours, theirs))
    video = torch.rand(1, 3, *shape.video, device=device, dtype=torch.bfloat16) * 2 - 1
    latents = ours.encode(video)
    mean, std = vae.statistics(latents)  # diffusers' latents are not normalised
    case = partial(Case, shape="{} frames of {}x{}".format(*shape.video), dtype=torch.bfloat16, memory=True)
    yield case("VAE decode", partial(ours.decode, latents), lambda: theirs.decode(latents * std + mean).sample)
    yield case("VAE encode", partial(ours.encode, video), lambda: (theirs.encode(video)[0].mode() - mean) / std)


def steps(shape: Shape, device: torch.device) -> Iterator[Case]:
    """A training step of each stage with blocks recomputed, without the optimizer: compiled, beside not compiled."""
    config, grid = replace(shape.transformer, layers=shape.step_layers), shape.step_grid
    tokens, dtype = math.prod(grid) // 4, torch.bfloat16 if parallel.fast_bfloat16(device) else torch.float32
    torch.manual_seed(0)
    with torch.device(device):
        adapter = ResNetAdapter(AdapterConfig(config.dim, config.layers))
        classifier = Classifier(ClassifierConfig(config.dim, config.text_dim, tuple(range(config.layers))[-3:]))
        x0, traj, *noise = torch.randn(6, 1, config.channels, *grid)
        batch, sigma = Batch(x0, torch.randn(1, config.text_tokens, config.text_dim), traj), torch.full((1,), 0.5)
    generator, backbone = (random(lambda: VideoDiT(config), dtype, device) for _ in range(2))
    for network in (networks := (generator, adapter, backbone, classifier)):
        parallel.prepare(network, parallel.Processes(0, 1, device, None), True, "full")
    first, sigmas, level = x0[:, :, :1], flow.sigma_schedule(4, 5.0), flow.frame_sigma(sigma, grid[0])
    stage_1 = partial(train_slow_adapter.adapter_loss, generator, adapter, batch, noise[1], sigma)
    student, score = (partial(network, text=batch.text) for network in (generator, backbone))
    draw = distill_fast.Draw(batch, sigmas, 0, noise, noise[1], sigma)
    stage_2 = partial(distill_fast.student_loss, student, student, score, draw)

    def stage_3() -> Tensor:
        adapted = partial(student, residuals=adapter(traj))
        x_t = flow.add_noise(flow.backward_simulation(adapted, first, noise, sigmas, 3), noise[1], level)
        judged = DiffusionDiscriminator(backbone, classifier)(x_t, flow.timestep(level), batch.text, traj)
        return flow.flow_matching_loss(adapted, x0, noise[1], sigma, "x0") + adversarial_loss(judged)

    def step(stance: str, loss: Callable[[], Tensor]) -> Tensor:
        with torch.enable_grad(), torch.compiler.set_stance(stance), parallel.autocast(device, "auto"):
            value = loss()
            value.backward()
        for network in networks:
            network.zero_grad()
        return value.detach()

    # Passes that a step costs. 2: four to learn from the student's last step, and one of each score. 3: three of the
    # sampler without gradients; three each of its last, the true video's and the discriminator's.
    about = f"{config.layers} blocks of {config.dim}, {tokens} tokens", dtype, True
    for stage, loss, passes in ((1, stage_1, 3), (2, stage_2, 6), (3, stage_3, 3 + 3 * 3)):
        generator.requires_grad_(stage == 2)
        both = (partial(step, stance, loss) for stance in ("default", "force_eager"))
        yield Case(f"step of stage {stage}, reference not compiled", *both, *about, passes * flop(config, tokens))


def alone(shape: Shape, device: torch.device) -> Iterator[Case]:
    """What sample.py does on a GPU: the codec, and four steps with a ResNet adapter in both modes of --memory."""
    config, grid = shape.transformer, shape.grid
    video = 4 * grid[0] - 3, 16 * grid[1], 16 * grid[2]
    text = torch.randn(1, config.text_tokens, config.text_dim, device=device, dtype=torch.bfloat16)
    traj, z = (torch.randn(1, n, *grid, device=device) for n in (config.channels, shape.vae.channels))
    network = random(lambda: vae.WanVAE(shape.vae), torch.bfloat16, device)
    small = random(lambda: TinyDecoder(shape.vae.channels), torch.bfloat16, device)
    case = partial(Case, reference=None, shape="{} frames of {}x{}".format(*video), dtype=torch.bfloat16, memory=True)
    yield case("VAE decode", partial(network.decode, z))
    yield case("VAE encode", partial(network.encode, torch.rand(1, 3, *video)))
    yield case("VAE decode, --memory low", partial(network.decode, z, tile=32))
    yield case("small decoder", lambda: [None for _ in small.frames(z)])
    for level, dtype in (("high", torch.bfloat16), ("low", torch.int8)):
        generator = random(lambda: VideoDiT(config), dtype, device)
        adapter = random(lambda: ResNetAdapter(AdapterConfig(config.dim, config.layers)), torch.float32, device)
        for block in (*generator.blocks, *adapter.blocks):
            block.compile()
        job = sample.Config(preset="wan5b", memory=level)
        four = partial(sample.denoise, job, generator, adapter, traj[:, :, :1], traj, text, text)
        yield case(f"4 steps, resnet, --memory {level}", four, compiled=True)


def three_digits(rows: list[dict]) -> list[dict]:
    """Rows as the table shows them, measured numbers to three significant digits."""
    return [{name: f"{v:.3g}" if isinstance(v, float) else v for name, v in row.items()} for row in rows]


PARTS = {"alone": alone, "vae": codec, "steps": steps, "transformer": transformer}


@dataclass(frozen=True)
class Config:
    parts: str = ",".join(list(PARTS)[not torch.cuda.is_available() :])  # what to measure, separated by commas
    repeats: int = 3  # times that each is timed
    out: str = "out/bench.json"  # rows; the table goes beside it


@torch.no_grad()
def main(cfg: Config) -> None:
    parts = cfg.parts.split(",")
    require(PARTS.keys() >= set(parts), f"--parts {cfg.parts}: give some of {', '.join(PARTS)}, separated by commas")
    out = table_path(cfg.out)
    require(find_spec("diffusers"), "diffusers: not installed; pip install -r requirements-dev.txt")
    device = parallel.init_processes().device
    parallel.start_compiler(device)
    origin = provenance("-m tools.bench", cfg, device)
    origin["machine"] += f", diffusers {version('diffusers')}"
    rows = []
    for part in parts:
        cases = PARTS[part](SHAPES[device.type], device)
        for row in chain.from_iterable(map(partial(measure, repeats=cfg.repeats, device=device), cases)):
            rows.append(row | origin)
            write_rows(out, rows, three_digits(rows))  # each as it comes: the run may be cut short
            warn(row)
    print(markdown(three_digits(rows)))


if __name__ == "__main__":
    run_script(main, Config)
