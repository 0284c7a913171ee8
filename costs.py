"""What things cost on this machine: its limits, and the parts of this project that have no peer to run beside.

Each function gives bench.py rows.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import replace
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
from model import Block, DiTConfig, VideoDiT, attend, rotary_table
from timing import SHAPES, Row, agree, flop, matmul_rate, pairs, relative, seconds


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


def one_block(config: DiTConfig, tokens: int, device: torch.device) -> tuple[Block, Tensor, tuple]:
    """A block with random weights, its tokens, and the rest of what it sees, its keys of the text among them."""
    block, frames = Block(config).to(device), tokens // 64
    for p in block.parameters():
        nn.init.normal_(p, std=config.dim**-0.5)
    x, e = torch.randn(1, tokens, config.dim, device=device), torch.randn(1, frames, 6, config.dim, device=device)
    text = block.cross_attn.keys(torch.randn(1, config.text_tokens, config.dim, device=device))
    return block, x, (e, text, rotary_table(frames, 8, 8, config.dim // config.heads, device))


def growth(preset: str, repeats: int, device: torch.device) -> list[Row]:
    """Time of one block against its tokens, N: a N + b N^2. Ours: b / a; reference: what the FLOP say."""
    config = replace(SHAPES[preset][0], layers=1)
    sizes, times = (256, 512) if preset == "small" else (256, 512, 1024, 2048, 4096, 8192), []
    for n in sizes:
        block, x, rest = one_block(config, n, device)
        times.append(min(seconds(lambda: block(x, *rest), device) for _ in range(1 + repeats)))
    n, taken = (torch.tensor(values).double() for values in (sizes, times))
    relative_terms = torch.stack([n, n * n], 1) / taken[:, None]
    a, b = torch.linalg.lstsq(relative_terms, torch.ones_like(n)[:, None]).solution[:, 0].tolist()
    keys = config.text_tokens * 4 * config.dim**2  # of the text, made beforehand
    linear, square = flop(config, 1) - 4 * config.dim - keys, 4 * config.dim
    worst = ((a * n + b * n * n) / taken - 1).abs().max().item()
    about = (f"{sizes[0]} to {sizes[-1]} tokens", "float32", False)
    return [
        Row("block: b / a of a N + b N^2", b / a, square / linear, b / a * linear / square, "1", *about),
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
    block, x, (e, text, rope) = one_block(config, 1024, device)
    want, nets = block(x, e, text, rope), (shortened(block), copy.deepcopy(block).to(torch.bfloat16))
    half = tuple(y.bfloat16() for y in text)
    errors = [relative(net(x.bfloat16(), e, half, rope) - x, want - x) for net in nets]
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
            x_t = flow.add_noise(x0, noise, level)
            both = (torch.cat([y, y]) for y in (x_t, flow.timestep(level), text))
            features = discriminator.features(*both)
        logits = classifier(features, *(torch.cat([y, y]) for y in (text, traj)))
        update(discriminator_loss(*logits.chunk(2)), for_classifier)
        fake = flow.backward_simulation(steered, x0[:, :, :1], many, sigmas, 3)
        logits = discriminator(flow.add_noise(fake, noise, level), flow.timestep(level), text, traj)
        update(adversarial_loss(logits) + finetune_hybrid.diffusion_loss(steered, x0, noise, sigma), for_adapter)

    stages = {"stage 1, a step": (stage1, 2 * work), "stage 3, a step": (stage3, 11 * work)}
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
