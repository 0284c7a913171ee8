"""What things cost on this machine: its limits, and the parts of this project that have no peer to run beside.

For bench.py, which writes the rows; and what it measures with.
"""

import copy
import gc
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

import distill_fast
import finetune_hybrid
import flow
import memory
import optim
import parallel
from adapter import AdapterConfig, ResNetAdapter
from discriminator import Classifier, ClassifierConfig, DiffusionDiscriminator, adversarial_loss, discriminator_loss
from model import PRESETS, Block, DiTConfig, VideoDiT, attend, rotary_table

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
    n = 8192 if device.type == "cuda" else 2048
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


def limits(preset: str, repeats: int, device: torch.device) -> list[Row]:
    """What the machine can do, and which share of it attention and a linear layer reach at the transformer's shape."""
    return [row for dtype in (torch.float32, torch.bfloat16) for row in limits_of(preset, repeats, dtype, device)]


def limits_of(preset: str, repeats: int, dtype: torch.dtype, device: torch.device) -> list[Row]:
    """In one type."""
    config, (frames, height, width), *_ = SHAPES[preset]
    n, about, rate = frames * height * width // 4, str(dtype).removeprefix("torch."), matmul_rate(dtype, device)
    rows = [Row("limit: matrix product", rate / 1e12, None, None, "TFLOP/s", "square", about, False, 1.0)]
    big = torch.zeros(2**28 // dtype.itemsize, dtype=dtype, device=device)
    taken = min(seconds(big.clone, device) for _ in range(5))
    rows.append(Row("limit: copy", 2 * 2**28 / taken / 1e9, None, None, "GB/s", "256 MiB", about, False))
    x, layer = torch.randn(n, config.dim, device=device, dtype=dtype), nn.Linear(config.dim, config.ffn_dim)
    layer.to(device, dtype)
    taken = min(seconds(lambda: layer(x), device) for _ in range(5))
    work = 2 * n * config.dim * config.ffn_dim
    rows.append(Row("linear layer", taken, None, None, "s", f"{n} tokens", about, False, work / taken / rate))
    q, k, v = torch.randn(3, 1, n, config.heads, config.dim // config.heads, device=device, dtype=dtype).transpose(2, 3)
    fast, plain = torch.compile(attend), nn.functional.scaled_dot_product_attention
    agree(fast(q, k, v), plain(q, k, v), dtype, "attention")
    a, b, ratio = pairs(lambda: fast(q, k, v), lambda: plain(q, k, v), repeats, device)
    share = 4 * n * n * config.dim / a / rate
    return [*rows, Row("attention, reference torch's", a, b, ratio, "s", f"{n} tokens", about, True, share)]


def growth(preset: str, repeats: int, device: torch.device) -> list[Row]:
    """Time of one block against its tokens, N: a N + b N^2. Ours: b / a; reference: what the FLOP say."""
    config = replace(SHAPES[preset][0], layers=1)
    block, times = Block(config).to(device), []
    x, text = (
        torch.randn(1, 8192, config.dim, device=device),
        torch.randn(1, config.text_tokens, config.dim, device=device),
    )
    for p in block.parameters():
        nn.init.normal_(p, std=0.02)
    sizes = (256, 512, 1024, 2048, 4096, 8192) if preset != "small" else (256, 512)
    for n in sizes:
        rope = rotary_table(n // 64, 8, 8, config.dim // config.heads, device)
        e = torch.randn(1, n // 64, 6, config.dim, device=device)
        times.append(min(seconds(lambda: block(x[:, :n], e, text, rope), device) for _ in range(1 + repeats)))
    n = torch.tensor(sizes, dtype=torch.float64)
    taken = torch.tensor(times, dtype=torch.float64)
    a, b = torch.linalg.lstsq(torch.stack([n, n * n], 1) / taken[:, None], torch.ones(len(n), 1).double()).solution[
        :, 0
    ]
    fixed = config.text_tokens * 4 * config.dim**2  # keys and values of the text
    linear, square = (flop(config, 1) - 4 * config.dim - fixed), 4 * config.dim
    worst = ((a * n + b * n * n) / taken - 1).abs().max().item()
    about = (f"{sizes[0]} to {sizes[-1]} tokens", "float32", False)
    return [
        Row(
            "block: b / a of a N + b N^2",
            (b / a).item(),
            square / linear,
            (b / a).item() * linear / square,
            "1",
            *about,
        ),
        Row("block: worst error of the fit", worst, None, None, "1", *about),
    ]


def shortened(block: nn.Module) -> nn.Module:
    """A copy in bfloat16 with its linear layers in 8 bits."""
    short = copy.deepcopy(block).to(torch.bfloat16)
    layers = dict(short.named_modules())
    memory.use_int8(short)
    for name, layer in short.named_modules():
        if isinstance(layer, memory.Int8Linear):
            layer.fill(layers[name].weight.data)
    return short


def frugal(preset: str, repeats: int, device: torch.device) -> list[Row]:
    """`sample.py --memory`: a forward pass with blocks in host memory, then also in 8 bits; reference: all at hand.

    And what 8 bits do to one block, of wan5b's shapes unless the preset is small; reference: bfloat16.
    """
    config = replace(SHAPES["small" if preset == "small" else "wan5b"][0], layers=1)
    block = Block(config).to(device)
    for p in block.parameters():
        nn.init.normal_(p, std=config.dim**-0.5)
    x, text = torch.randn(2, 1, 1024, config.dim, device=device)
    rope = rotary_table(4, 16, 16, config.dim // config.heads, device)
    e = torch.randn(1, 4, 6, config.dim, device=device)
    want, nets = block(x, e, text, rope), (shortened(block), copy.deepcopy(block).to(torch.bfloat16))
    errors = [relative(net(x.bfloat16(), e, text.bfloat16(), rope) - x, want - x) for net in nets]
    sizes = [sum(t.nbytes for t in (*net.parameters(), *net.buffers())) / 2**30 for net in nets]
    about = (f"1 block of {config.dim}", "int8", False)
    rows = [Row("8 bits: error of what a block adds", *errors, errors[0] / errors[1], "relative", *about)]
    rows.append(Row("8 bits: weights", *sizes, sizes[0] / sizes[1], "GiB", *about))

    config, _, _, (frames, height, width) = SHAPES[preset]
    whole = VideoDiT(config).to(torch.bfloat16)
    nn.init.normal_(whole.head.head.weight, std=0.02)
    short = copy.deepcopy(whole)
    short.blocks = nn.ModuleList(shortened(block) for block in whole.blocks)
    aside = memory.offload(copy.deepcopy(whole), device=device)
    whole, short = whole.to(device), memory.offload(short, device=device)
    x = torch.randn(1, config.channels, frames, height, width, device=device)
    inputs = x, torch.full((1, frames), 700.0, device=device), torch.randn(1, config.text_tokens, config.text_dim).to(x)
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


def training(preset: str, repeats: int, device: torch.device) -> list[Row]:
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

    def steered(x: Tensor, t: Tensor) -> Tensor:
        return frozen(x, t, text, adapter(x, t, text, traj))

    for_adapter, for_classifier = optim.adamw(adapter, 0.0), optim.adamw(classifier, 0.0)

    def stage1() -> None:
        update(flow.flow_matching_loss(steered, x0, noise, sigma), for_adapter)

    def stage3() -> None:
        with torch.no_grad():
            features = discriminator.features(flow.add_noise(x0, noise, level), flow.timestep(level), text)
        real = classifier(features, text, traj)
        update(discriminator_loss(real, real), for_classifier)
        fake = flow.backward_simulation(steered, x0[:, :, :1], many, sigmas, 3)
        logits = discriminator(flow.add_noise(fake, noise, level), flow.timestep(level), text, traj)
        update(adversarial_loss(logits) + finetune_hybrid.diffusion_loss(steered, x0, noise, sigma), for_adapter)

    stages = {"stage 1, a step": (stage1, 2 * work), "stage 3, a step": (stage3, 10 * work)}
    if not on_gpu:
        learner, fake = (network(lambda: VideoDiT(config), True) for _ in range(2))
        for_learner, for_fake = optim.adamw(learner, 0.0), optim.adamw(fake, 0.0)
        ours, theirs, truth = (partial(net, text=text) for net in (learner, fake, frozen))
        rest = (x0[:, :, :1], many, sigmas, 2, noise, sigma)

        def stage2() -> None:
            for _ in range(5):
                update(distill_fast.fake_score_loss(theirs, ours, *rest), for_fake)
            guided = flow.guided(truth, truth, 7.0)
            update(distill_fast.generator_loss(ours, theirs, guided, *rest), for_learner)

        stages["stage 2, a cycle"] = (stage2, 5 * (3 + 3) * work + (2 + 3 + 1 + 2) * work)
    rows = []
    for name, (step, cost) in stages.items():
        with parallel.autocast(device, "auto"), torch.enable_grad():
            step()
            memory.reset_peak(device)
            taken = statistics.median(seconds(step, device) for _ in range(repeats))
        held = memory.peak_memory(device)
        rows.append(Row(name, taken, None, None, "s", *about, cost / taken / rate))
        rows.append(Row(f"{name}, speed", tokens / taken, None, None, "tokens/s", *about))
        rows.append(Row(f"{name}, peak memory", held, None, None, "GiB", *about))
    return rows
