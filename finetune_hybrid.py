"""Stage 3: fine-tune the SlowAdapter into the FastAdapter, which steers the FastGenerator in four steps.

    python finetune_hybrid.py                                  # preset small on this machine, from the shipped networks
    torchrun --nproc_per_node=8 finetune_hybrid.py

The diffusion loss alone keeps to the trajectory and blurs; the adversarial loss alone drifts. The adapter gets both,
`loss = gan_scale * adversarial + lambda(step) * diffusion` (paper, stage 3). The discriminator judges the videos
of all four steps, or with wan5b of a random number of them. It learns at every step and the adapter at every fifth; all
else is frozen. In the small preset the first steps have the diffusion loss alone. To resume, run the command again.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import discriminator as discriminators
import flow
from adapter import Adapter, check_fit, read_adapter, sample_clips, with_adapter
from core import optim, parallel
from core.config import UserError, require, run_script, shipped
from core.memory import send
from core.noise import sample_noise, sample_uniform
from core.parallel import Processes
from core.runs import Run, due, start_processes
from data import Source, make_draw, open_codec, training_data
from discriminator import Classifier, DiffusionDiscriminator, adversarial_loss, discriminator_loss, r1_penalty
from model import PRESETS, VideoDiT, frozen_dtype
from toy.muon import muon_and_adamw

DIFFUSION_STEP = 3  # the random stream that draws at which of the four noise levels the diffusion loss looks
NEAR, R1_NOISE = 4, 0.1  # the stream of the R1 penalty's noise, and its deviation (FastGen)


@dataclass(frozen=True)
class Recipe:
    """Values that come with the preset. To try others, edit them here or in WAN5B."""

    ratio: int = 5  # discriminator updates for one of the adapter
    gan_scale: float = 0.6  # weight of the adversarial loss
    sparse: float = 0.15  # share of trajectories with frames blacked out; of clips, tools.prepare_clips chose them
    classifier_lr: float = 3e-3  # peak learning rate of the discriminator's classifier
    muon: bool = True  # for the classifier, which learns nothing by AdamW alone in so few steps
    momentum: float = 0.9  # AdamW's beta1
    warmup: int = 20  # steps of linear warm-up before the cosine
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rates after it
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.95  # decay of the averaged adapter, the one exported
    exit_step: Literal["last", "random"] = "last"  # of the generator's four: whose videos are judged, and teach
    judge_sigma_max: float = 0.5  # highest noise level at which videos are judged
    r1: float = 0.0  # weight of the discriminator's approximate R1 penalty; 100 to 1000 where it is used (FastGen)


@dataclass(frozen=True)
class Config(Recipe):
    name: str = "fast_adapter"  # run folder under runs/
    preset: Literal["small", "wan5b"] = "small"  # size of the networks
    data: str = ""  # folder of prepared clips (tools.prepare_clips); the small preset's world if empty
    weights: str = "Wan2.2-TI2V-5B"  # preset wan5b: its folder as published, whose VAE shows samples
    generator: str = shipped("checkpoints/small/fast_generator.safetensors")  # the frozen FastGenerator
    adapter: str = shipped("checkpoints/small/slow_adapter.safetensors")  # the SlowAdapter that training starts from
    backbone: str = shipped("checkpoints/small/slow_generator.safetensors")  # the SlowGenerator in the discriminator
    steps: int = 1060  # of training; the adapter learns in every `ratio`-th
    diffusion_first: int = 900  # steps of the diffusion loss alone, before the discriminator begins
    adapter_start: int = 30  # further steps in which only the discriminator learns, before it teaches the adapter
    use_gan: bool = True  # the adversarial loss
    use_diffusion: bool = True  # the diffusion loss
    diffusion_scale: Literal["decay", "grow", "constant"] = "decay"  # lambda, the diffusion loss's weight over time
    without: Literal["", "semantic", "trajectory", "video"] = ""  # an attention that the discriminator does not get
    batch: int = 8  # videos a step, over all processes
    accumulate: int = 1  # micro-batches a step; 0 is one video in each
    lr: float = 1.5e-3  # peak learning rate of the adapter
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is the faster one
    compile: bool = True  # torch.compile each block
    recompute: Literal["none", "full"] = "none"  # activations that the backward pass computes again, to save memory
    sequence: int = 1  # neighbouring processes that share one video
    seed: int = 0  # of the classifier's weights, data order and noise
    save_every: int = 50  # steps
    sample_every: int = 300  # steps; 0 for no samples
    wandb: str = ""  # project on Weights & Biases to which the log goes too


# The source of each value stands beside it. What stage3.yaml says is known from a third party.
WAN5B = replace(
    Config(),
    preset="wan5b",
    generator="fast_generator.safetensors",
    adapter="slow_adapter.safetensors",
    backbone="Wan2.2-TI2V-5B",
    steps=1000,  # (paper)
    ratio=5,  # (paper)
    diffusion_first=0,  # (paper)
    adapter_start=0,  # (paper)
    gan_scale=0.01,  # (paper: its stage3.yaml; there the discriminator's loss too, which Adam hardly sees)
    diffusion_scale="decay",  # (paper: one of two readings; grow is the other)
    batch=4,  # (paper: its 4 GPUs, one video on each)
    lr=2e-6,  # (paper: its stage3.yaml)
    classifier_lr=2e-6,  # (paper: its stage3.yaml)
    muon=False,  # (paper: its stage3.yaml)
    momentum=0.0,  # (paper: its stage3.yaml)
    warmup=20,  # (guess)
    schedule="constant",  # (Turbo)
    clip=10.0,  # (Turbo)
    ema=0.99,  # (Turbo: from step 200 on)
    exit_step="random",  # (Turbo)
    judge_sigma_max=1.0,  # (Turbo; levels below 0.02 and above 0.98 are set to these)
    r1=0.0,  # (FastGen: its default, and that of its configs for Wan2.2 5B)
    accumulate=0,
    recompute="full",
    save_every=100,  # a ControlNet's checkpoint has 85 GB
)


def diffusion_weight(kind: str, progress: float) -> float:
    """lambda at `progress` in [0, 1] of the training. The paper's formulas are over its 1,000 steps."""
    step = 1000 * progress
    return {"decay": 1 / (4e-3 * step + 0.1), "grow": 0.25e-3 * step + 0.1, "constant": 1.0}[kind]


class Phase(NamedTuple):
    """What happens at a step. Learning rates and lambda go from `begin`, or the adapter's, to `end`."""

    judged: bool  # the discriminator learns, and teaches
    adapter_learns: bool
    begin: int
    adapter_begin: int
    end: int


def phase(step: int, steps: int, ratio: int, diffusion_first: int, adapter_start: int) -> Phase:
    """Training has two phases, each with a warm-up, cosine and lambda: the diffusion loss alone, then both losses.

    The adapter rests in the first `adapter_start` steps of the second, and learns in the last step of every `ratio`.
    """
    judged = step >= diffusion_first
    begin, rest, end = (diffusion_first, adapter_start, steps) if judged else (0, 0, diffusion_first)
    return Phase(judged, step >= begin + rest and (step + 1) % ratio == 0, begin, begin + rest, end)


def discriminator_step(
    step: int, cfg: Config, generator: VideoDiT, adapter: Adapter, discriminator: DiffusionDiscriminator,
    optimizers: list[Optimizer], data: Source, procs: Processes,
) -> dict[str, Tensor]:  # fmt: skip
    """The classifier learns to tell true videos from those of the generator and the adapter as it is now, of the same
    images, texts and trajectories. Both are noised alike. Nothing else gets a gradient.
    """
    turn, losses = 2 * step, []
    shares = procs.share(cfg.batch, cfg.accumulate, turn)
    for samples in shares:
        draw = make_draw(samples, turn, cfg, data, procs.device, "box", cfg.sparse, cfg.exit_step)
        (x0, text, traj), level = draw.batch, flow.frame_sigma(draw.sigma, draw.renoise.shape[2])
        with parallel.autocast(procs.device, cfg.dtype):
            with torch.no_grad():
                velocity = with_adapter(generator, adapter, text, traj)
                fake = flow.backward_simulation(velocity, x0[:, :, :1], draw.noise, draw.sigmas, draw.exit_step)
                videos = [x0, fake]
                if cfg.r1:  # a true video with a little noise, but for its first frame
                    away = R1_NOISE * sample_noise(x0.shape[1:], samples, cfg.seed, turn, NEAR)
                    videos.append(torch.cat([x0[:, :, :1], (x0 + send(away, procs.device))[:, :, 1:]], 2))
                # One after the other: one batch would take twice the memory, and a compiled block of its own.
                noisy = (flow.add_noise(video, draw.renoise, level) for video in videos)
                seen = [discriminator.features(x_t, flow.timestep(level), text) for x_t in noisy]
                features, count = [torch.cat(parts) for parts in zip(*seen, strict=True)], len(videos)
            logits = discriminator.classifier(features, torch.cat([text] * count), torch.cat([traj] * count))
            real, fake, *near = logits.chunk(count)
            loss = discriminator_loss(real, fake)
            if near:
                loss = loss + cfg.r1 * r1_penalty(real, *near)
        (loss / len(shares)).backward()
        losses.append(loss.detach())
    norm = optim.clip_and_step(discriminator.classifier, optimizers, cfg.clip)
    return {"discriminator_loss": torch.stack(losses).mean(), "discriminator_grad_norm": norm}


def adapter_step(
    step: int, weight: float, judged: bool, cfg: Config, generator: VideoDiT, adapter: Adapter,
    discriminator: DiffusionDiscriminator, optimizers: list[Optimizer], data: Source, procs: Processes,
) -> dict[str, Tensor]:  # fmt: skip
    """The adapter learns from both losses; gradients pass through frozen networks.

    `weight` is the diffusion loss's. `judged`: the adversarial loss counts too.
    """
    turn, losses = 2 * step + 1, []
    shares = procs.share(cfg.batch, cfg.accumulate, turn)
    for samples in shares:
        draw = make_draw(samples, turn, cfg, data, procs.device, "box", cfg.sparse, cfg.exit_step)
        (x0, text, traj), level = draw.batch, flow.frame_sigma(draw.sigma, draw.renoise.shape[2])
        diffusion = adversarial = torch.zeros((), device=procs.device)
        if cfg.use_diffusion:  # the true video, noised to one of the sampler's levels
            u = sample_uniform(samples, cfg.batch, cfg.seed, turn, DIFFUSION_STEP)
            sigma = send(torch.tensor([draw.sigmas[int(v * len(draw.noise))] for v in u]), procs.device)
            with parallel.autocast(procs.device, cfg.dtype):
                velocity = with_adapter(generator, adapter, text, traj)
                diffusion = flow.flow_matching_loss(velocity, x0, draw.renoise, sigma, "x0")
            (weight * diffusion / len(shares)).backward()  # one loss after the other, each with activations of its own
        if judged:  # the generator's video, noised, is to pass for real
            with parallel.autocast(procs.device, cfg.dtype):
                velocity = with_adapter(generator, adapter, text, traj)
                fake = flow.backward_simulation(velocity, x0[:, :, :1], draw.noise, draw.sigmas, draw.exit_step)
                x_t = flow.add_noise(fake, draw.renoise, level)
                adversarial = adversarial_loss(discriminator(x_t, flow.timestep(level), text, traj))
            (cfg.gan_scale * adversarial / len(shares)).backward()
        losses.append(torch.stack([adversarial.detach(), diffusion.detach()]))
    discriminator.zero_grad()  # the gradient passed through it; its own comes from discriminator_step
    norm = optim.clip_and_step(adapter, optimizers, cfg.clip)
    means = dict(zip(("adversarial_loss", "diffusion_loss"), torch.stack(losses).mean(0), strict=True))
    return means | {"adapter_grad_norm": norm, "exit_step": float(draw.exit_step)}


def check(cfg: Config) -> None:
    """UserError if the options contradict one another."""
    require(cfg.use_gan or cfg.use_diffusion, "--use_gan false --use_diffusion false: no loss is left; use one or both")
    first, rest = cfg.diffusion_first, cfg.adapter_start
    if first + rest >= cfg.steps:
        raise UserError(f"--adapter_start {rest} --diffusion_first {first}: give less than --steps {cfg.steps} in all")
    require(cfg.use_diffusion or not first, f"--diffusion_first {first}: needs --use_diffusion true")


def main(cfg: Config) -> None:
    check(cfg)
    procs = start_processes(cfg, PRESETS[cfg.preset].heads)
    torch.manual_seed(cfg.seed)  # the same initial classifier on every rank

    # 1. The frozen FastGenerator, and what learns: the adapter, and a classifier on top of a frozen SlowGenerator.
    dtype = frozen_dtype(cfg.preset, cfg.dtype)
    elsewhere = procs.rank > 0  # rank 0 reads the weights, and sends them to the others
    generator = VideoDiT.from_pretrained(cfg.generator, "FastGenerator", dtype, elsewhere, cfg.preset)
    backbone = VideoDiT.from_pretrained(cfg.backbone, "SlowGenerator", dtype, elsewhere, cfg.preset)
    adapter = read_adapter(cfg.adapter, "SlowAdapter", shapes_only=elsewhere)
    check_fit(adapter, cfg.adapter, generator, cfg.generator)
    shape = discriminators.PRESETS[cfg.preset]
    classifier = Classifier(replace(shape, **{cfg.without: False}) if cfg.without else shape)
    for network in (generator.requires_grad_(False), backbone.requires_grad_(False), adapter, classifier):
        parallel.prepare(network, procs, cfg.compile, cfg.recompute, cfg.dtype)
    discriminator = DiffusionDiscriminator(backbone, classifier)
    optimizers, classifier_optimizers = ([optim.adamw(n, cfg.momentum)] for n in (adapter, classifier))
    if cfg.muon:  # for the matrices that read tokens
        classifier_optimizers = muon_and_adamw(classifier, classifier.tokens, rest=0.05)
    ema = optim.EMA(adapter, cfg.ema)

    # 2. The data, and the run's folder, from which a killed run resumes.
    codec = open_codec(cfg.preset, cfg.weights, procs.device, dtype=dtype)
    data, held_out = training_data(cfg.data, codec, cfg.seed, cfg.batch, adapter.config.maps)
    parts = {"adapter": (adapter, optimizers, ema), "classifier": (classifier, classifier_optimizers, None)}
    run = Run(f"runs/{cfg.name}", cfg, procs, parts)

    # 3. The loop: the discriminator learns from true videos and fakes, then the adapter from both losses.
    make = partial(sample_clips, generator, [adapter], flow.FAST[cfg.preset], cfg.seed)
    networks = generator, adapter, discriminator
    for step in range(run.resume(), cfg.steps):
        now = phase(step, cfg.steps, cfg.ratio, cfg.diffusion_first, cfg.adapter_start)
        judged, values = cfg.use_gan and now.judged, {}
        if judged:
            age, lifetime = step - now.begin, now.end - now.begin
            rate = optim.learning_rate(age, cfg.classifier_lr, cfg.warmup, lifetime, cfg.schedule)
            optim.set_lr(classifier_optimizers, rate)
            values |= discriminator_step(step, cfg, *networks, classifier_optimizers, data, procs)
        if now.adapter_learns:
            age, lifetime = step - now.adapter_begin, now.end - now.adapter_begin
            optim.set_lr(optimizers, optim.learning_rate(age, cfg.lr, cfg.warmup, lifetime, cfg.schedule))
            weight = diffusion_weight(cfg.diffusion_scale, age / lifetime)
            values |= adapter_step(step, weight, judged, cfg, *networks, optimizers, data, procs)
            ema.update(step)
        run.log(step + 1, **values)
        if due(step + 1, cfg.save_every, cfg.steps):
            run.save(step + 1)
        if due(step + 1, cfg.sample_every, cfg.steps):
            with ema.applied():
                run.write_samples(step + 1, codec, held_out, make, "box")

    # 4. The averaged adapter is the FastAdapter.
    run.export("fast_adapter", adapter, ema)
    run.export("classifier", classifier, None)


if __name__ == "__main__":
    run_script(main, Config, {"wan5b": WAN5B})
