"""Stage 3: fine-tune the SlowAdapter into the FastAdapter, which steers the FastGenerator in four steps.

    python finetune_hybrid.py                                  # preset small on this machine, from the shipped networks
    torchrun --nproc_per_node=8 finetune_hybrid.py

The diffusion loss alone keeps to the trajectory and blurs; the adversarial loss alone drifts. The adapter gets both,
weighed `loss = gan_scale * adversarial + lambda(step) * diffusion` (paper, stage 3). The discriminator judges what all
four steps together make. It learns at every step and the adapter at every fifth; all else is frozen. On the toy the
diffusion loss has the first steps to itself. To resume, run the same command again.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Literal, NamedTuple

import torch
from torch import Tensor
from torch.optim import Optimizer

import discriminator as discriminators
import flow
from adapter import Adapter, check_fit, controlled, read_adapter
from core import optim, parallel
from core.codec import Batch
from core.config import UserError, run_script, shipped
from core.memory import send
from core.noise import sample_uniform, step_noise
from core.parallel import Processes, Recompute
from core.runs import Run, check_options, due
from core.weights import save_network
from data import Source, open_codec, training_data
from discriminator import Classifier, DiffusionDiscriminator, adversarial_loss, discriminator_loss
from flow import Velocity
from model import PRESETS, VideoDiT, check_preset, frozen_dtype

MOMENTUM = {"small": 0.9, "wan5b": 0.0}  # AdamW's beta1 (paper: its stage3.yaml)
DIFFUSION_STEP = 3  # the random stream that draws at which of the four noise levels the diffusion loss looks


@dataclass(frozen=True)
class Config:
    name: str = "fast_adapter"  # run folder under runs/
    preset: Literal["small", "wan5b"] = "small"  # size of the networks
    data: str = ""  # folder of prepared clips (tools.prepare_clips); the small preset's world if empty
    weights: str = "Wan2.2-TI2V-5B"  # preset wan5b: its folder as published, whose VAE shows samples
    generator: str = shipped("checkpoints/small/fast_generator.safetensors")  # the frozen FastGenerator
    adapter: str = shipped("checkpoints/small/slow_adapter.safetensors")  # the SlowAdapter that training starts from
    backbone: str = shipped("checkpoints/small/slow_generator.safetensors")  # the SlowGenerator in the discriminator
    steps: int = 400  # of training; the adapter learns in every `ratio`-th
    ratio: int = 5  # discriminator updates for one of the adapter
    diffusion_first: int = 100  # steps of the diffusion loss alone, before the discriminator begins
    adapter_start: int = 60  # further steps in which only the discriminator learns, before it teaches the adapter
    denoising_steps: int = flow.FAST["small"].steps  # of the generator
    use_gan: bool = True  # the adversarial loss
    use_diffusion: bool = True  # the diffusion loss
    gan_scale: float = 0.25  # weight of the adversarial loss
    diffusion_scale: Literal["decay", "grow", "constant"] = "decay"  # lambda, the diffusion loss's weight over time
    semantic: bool = True  # the discriminator's attention to first frame and text
    trajectory: bool = True  # the discriminator's attention to the trajectory
    video: bool = True  # the discriminator's attention to the video
    sparse: float = 0.15  # share of trajectories with frames blacked out; of clips, tools.prepare_clips chose them
    batch: int = 8  # videos a step, over all processes
    accumulate: int = 1  # micro-batches a step; 0 is one video in each
    lr: float = 6e-4  # peak learning rate of the adapter
    classifier_lr: float = 3e-3  # peak learning rate of the discriminator's classifier
    warmup: int = 20  # steps of linear warm-up before the cosine
    weight_decay: float = 0.01  # decoupled
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.95  # decay of the averaged adapter, the one exported
    shift: float = flow.FAST["small"].shift  # warp of all noise levels towards noise
    judge_sigma_min: float = 0.05  # least noise level at which videos are judged
    judge_sigma_max: float = 0.5  # greatest; levels are spread between the two
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is the faster one
    compile: bool = True  # torch.compile each block
    recompute: Recompute = "none"  # which activations the backward pass computes again instead of keeping them
    sequence: int = 1  # neighbouring processes that share one video
    seed: int = 0  # of the classifier's weights, data order and noise
    log_every: int = 20  # steps
    save_every: int = 50  # steps
    sample_every: int = 300  # steps; 0 for no samples


# Where each value comes from stands beside it, and in --help. What stage3.yaml says is known from a third party.
WAN5B = {
    "generator": "fast_generator.safetensors",
    "adapter": "slow_adapter.safetensors",
    "backbone": "Wan2.2-TI2V-5B",
    "steps": 1000,  # (paper)
    "ratio": 5,  # (paper)
    "diffusion_first": 0,  # (paper)
    "adapter_start": 0,  # (paper)
    "denoising_steps": flow.FAST["wan5b"].steps,  # (paper)
    "gan_scale": 0.01,  # (paper: its stage3.yaml; there the discriminator's loss too, which Adam hardly sees)
    "diffusion_scale": "decay",  # (paper: one of two readings; grow is the other)
    "sparse": 0.15,  # (guess; tools.prepare_clips has applied it)
    "batch": 4,  # (paper: its 4 GPUs, one video on each)
    "lr": 2e-6,  # (paper: its stage3.yaml)
    "classifier_lr": 2e-6,  # (paper: its stage3.yaml)
    "warmup": 20,  # (guess, as the cosine after it is)
    "weight_decay": 0.01,  # (Turbo)
    "clip": 1.0,  # (guess)
    "ema": 0.95,  # (guess)
    "shift": flow.FAST["wan5b"].shift,  # (Turbo)
    "judge_sigma_min": 0.02,  # (paper: its stage3.yaml)
    "judge_sigma_max": 0.98,  # (paper: its stage3.yaml)
    "accumulate": 0,
    "recompute": "full",
}


def diffusion_weight(kind: str, progress: float) -> float:
    """lambda at `progress` in [0, 1] of the training. The paper's formulas are over its 1,000 steps."""
    step = 1000 * progress
    return {"decay": 1 / (4e-3 * step + 0.1), "grow": 0.25e-3 * step + 0.1, "constant": 1.0}[kind]


class Phase(NamedTuple):
    """What happens at a step, and how far its part of the training has come."""

    judged: bool  # the discriminator is at work
    adapter_learns: bool
    age: int  # steps since the discriminator's rate began to warm up, of `lifetime`
    lifetime: int
    adapter_age: int  # the same for the adapter's rate and for lambda
    adapter_lifetime: int


def phase(step: int, steps: int, ratio: int, diffusion_first: int, adapter_start: int) -> Phase:
    """Training has two parts, each with its own warm-up, cosine and lambda.

    First `diffusion_first` steps of the diffusion loss alone. Then both losses, while the adapter rests for
    `adapter_start` steps. The adapter learns in the last step of every cycle of `ratio` steps.
    """
    judged = step >= diffusion_first
    age, lifetime = (step - diffusion_first, steps - diffusion_first) if judged else (step, diffusion_first)
    rest = adapter_start if judged else 0
    learns = age >= rest and (step + 1) % ratio == 0
    return Phase(judged, learns, age, lifetime, age - rest, lifetime - rest)


class Inputs(NamedTuple):
    """Videos and everything random that a loss needs."""

    x0: Tensor  # true videos [B,C,F,H,W]
    text: Tensor  # [B,L,text_dim]
    traj: Tensor  # [B,C,F,H,W]
    noise: Tensor  # of the generator's sampling [steps,B,C,F,H,W]
    renoise: Tensor  # with which both true and generated videos are noised before they are judged [B,C,F,H,W]
    level: Tensor  # how far [B,F]


def draw_inputs(samples: list[int], turn: int, cfg: Config, data: Source, device: torch.device) -> Inputs:
    x0, text, traj = data.batch(samples, "box", cfg.sparse).to(device)
    noise = send(step_noise(cfg.denoising_steps + 1, x0.shape[1:], samples, cfg.seed, turn), device)
    u = flow.shift_sigma(send(sample_uniform(samples, cfg.batch, cfg.seed, turn), device), cfg.shift)
    sigma = cfg.judge_sigma_min + (cfg.judge_sigma_max - cfg.judge_sigma_min) * u
    return Inputs(x0, text, traj, noise[:-1], noise[-1], flow.frame_sigma(sigma, x0.shape[2]))


def discriminator_step(
    step: int, cfg: Config, generator: VideoDiT, adapter: Adapter, discriminator: DiffusionDiscriminator,
    optimizers: Sequence[Optimizer], data: Source, procs: Processes,
) -> dict[str, Tensor]:  # fmt: skip
    """The classifier learns to tell true videos from what the generator and the adapter make now of the same images,
    texts and trajectories. Both are noised alike. No gradient but its own.
    """
    turn, losses, classifier = 2 * step, [], discriminator.classifier
    sigmas, shares = flow.sigma_schedule(cfg.denoising_steps, cfg.shift), procs.share(cfg.batch, cfg.accumulate, turn)
    for samples in shares:
        x0, text, traj, noise, renoise, level = draw_inputs(samples, turn, cfg, data, procs.device)
        with parallel.autocast(procs.device, cfg.dtype):
            with torch.no_grad():
                fake = flow.sample_fewstep(controlled(generator, adapter, text, traj), x0[:, :, :1], noise, sigmas)
                # One after the other: one batch would take twice the memory, and a compiled block of its own.
                seen = [
                    discriminator.features(flow.add_noise(video, renoise, level), flow.timestep(level), text)
                    for video in (x0, fake)
                ]
                features = [torch.cat(pair) for pair in zip(*seen, strict=True)]
            loss = discriminator_loss(*classifier(features, torch.cat([text] * 2), torch.cat([traj] * 2)).chunk(2))
        (loss / len(shares)).backward()
        losses.append(loss.detach())
    norm = optim.clip_and_step(classifier, optimizers, cfg.clip)
    return {"discriminator_loss": torch.stack(losses).mean(), "discriminator_grad_norm": norm}


def adapter_step(
    step: int, weight: float, judged: bool, cfg: Config, generator: VideoDiT, adapter: Adapter,
    discriminator: DiffusionDiscriminator, optimizers: Sequence[Optimizer], data: Source, procs: Processes,
) -> dict[str, Tensor]:  # fmt: skip
    """The adapter learns from both losses; gradients pass through frozen networks.

    `weight` is the diffusion loss's. `judged`: the adversarial loss counts too.
    """
    turn, logged, sigmas = 2 * step + 1, [], flow.sigma_schedule(cfg.denoising_steps, cfg.shift)
    shares = procs.share(cfg.batch, cfg.accumulate, turn)
    pulls = {"adversarial": [], "diffusion": []}  # squared norms of each loss's gradient at the adapter's outputs
    for samples in shares:
        x0, text, traj, noise, renoise, level = draw_inputs(samples, turn, cfg, data, procs.device)
        diffusion = adversarial = torch.zeros((), device=procs.device)
        with parallel.autocast(procs.device, cfg.dtype):
            residuals = adapter(traj) if adapter.static else None  # once for both losses
            if cfg.use_diffusion:  # the true video, seen at one of the sampler's noise levels
                u = sample_uniform(samples, cfg.batch, cfg.seed, turn, DIFFUSION_STEP)
                picked = [sigmas[int(v * cfg.denoising_steps)] for v in u]
                velocity = watched_velocity(generator, adapter, text, traj, residuals, pulls["diffusion"])
                sigma = send(torch.tensor(picked), procs.device)
                diffusion = flow.flow_matching_loss(velocity, x0, renoise, sigma, "x0")
            if judged:  # what all steps together make, noised, is to pass for real
                velocity = watched_velocity(generator, adapter, text, traj, residuals, pulls["adversarial"])
                fake = flow.backward_simulation(velocity, x0[:, :, :1], noise, sigmas, cfg.denoising_steps - 1)
                x_t = flow.add_noise(fake, renoise, level)
                adversarial = adversarial_loss(discriminator(x_t, flow.timestep(level), text, traj))
        ((cfg.gan_scale * adversarial + weight * diffusion) / len(shares)).backward()
        logged.append(torch.stack([adversarial.detach(), diffusion.detach()]))
    discriminator.zero_grad()  # the gradient passed through it on its way; its own comes from discriminator_step
    norm = optim.clip_and_step(adapter, optimizers, cfg.clip)
    adversarial, diffusion = torch.stack(logged).mean(0)
    values = {"adversarial_loss": adversarial, "diffusion_loss": diffusion, "adapter_grad_norm": norm}
    for name, squares in pulls.items():
        if squares:  # gradients are averaged over the processes
            values[f"{name}_pull"] = procs.total(torch.stack(squares).sum()).sqrt() / procs.world
    return values


def watched_velocity(
    generator: VideoDiT, adapter: Adapter, text: Tensor, traj: Tensor, residuals: list[Tensor] | None,
    norms: list[Tensor],
) -> Velocity:  # fmt: skip
    """The generator's velocity with these residuals, or with those that the adapter makes at each call, watched."""

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        added = adapter(traj, x, t, text) if residuals is None else residuals
        return generator(x, t, text, watch_gradients(added, norms))

    return velocity


def watch_gradients(tensors: list[Tensor], norms: list[Tensor]) -> list[Tensor]:
    """The same tensors. When a gradient comes back through them, the square of its norm is put into `norms`."""
    aliases = [tensor.view_as(tensor) for tensor in tensors]
    for alias in aliases:
        if alias.requires_grad:
            alias.register_hook(lambda grad: norms.append(grad.float().square().sum()))
    return aliases


def make_video(batch: Batch, number: int, cfg: Config, generator: VideoDiT, adapter: Adapter) -> list[Tensor]:
    """Latents of what the networks make of a held-out clip's first frame, text and trajectory."""
    noise = send(step_noise(cfg.denoising_steps, batch.x0.shape[1:], [number], cfg.seed), batch.x0.device)
    velocity = controlled(generator, adapter, batch.text, batch.traj)
    return [
        flow.sample_fewstep(velocity, batch.x0[:, :, :1], noise, flow.sigma_schedule(cfg.denoising_steps, cfg.shift))
    ]


def check(cfg: Config) -> None:
    """UserError if the options contradict one another."""
    check_options(cfg)
    if not (cfg.use_gan or cfg.use_diffusion):
        raise UserError("--use_gan false --use_diffusion false: no loss is left; use one or both")
    if cfg.judge_sigma_min > cfg.judge_sigma_max:
        least, most = cfg.judge_sigma_min, cfg.judge_sigma_max
        raise UserError(f"--judge_sigma_min {least} --judge_sigma_max {most}: the first must not be the greater one")
    first, rest = cfg.diffusion_first, cfg.adapter_start
    if min(first, rest) < 0 or first + rest >= cfg.steps:
        mend = f"give steps from 0 on, together below --steps {cfg.steps}"
        raise UserError(f"--adapter_start {rest} --diffusion_first {first}: {mend}")
    if first and not cfg.use_diffusion:
        raise UserError(f"--diffusion_first {first}: needs --use_diffusion true")


def main(cfg: Config) -> None:
    check(cfg)
    procs = parallel.init_processes(cfg.sequence, PRESETS[cfg.preset].heads)
    procs.share(cfg.batch, cfg.accumulate, 0)  # a batch that doesn't divide is refused before weights are read
    torch.manual_seed(cfg.seed)  # the same initial classifier on every rank

    # 1. The frozen FastGenerator, the adapter that learns, and the discriminator: a frozen SlowGenerator and a
    # classifier on top, which learns too.
    dtype = frozen_dtype(cfg.preset, cfg.dtype)
    elsewhere = procs.rank > 0  # rank 0 reads the weights, and hands them on
    generator = VideoDiT.from_pretrained(cfg.generator, "FastGenerator", dtype, shapes_only=elsewhere)
    backbone = VideoDiT.from_pretrained(cfg.backbone, "SlowGenerator", dtype, shapes_only=elsewhere)
    adapter = read_adapter(cfg.adapter, "SlowAdapter", shapes_only=elsewhere)
    check_preset(generator, cfg.generator, cfg.preset)
    check_preset(backbone, cfg.backbone, cfg.preset)
    check_fit(adapter, cfg.adapter, generator, cfg.generator)
    attentions = {"semantic": cfg.semantic, "trajectory": cfg.trajectory, "video": cfg.video}
    classifier = Classifier(replace(discriminators.PRESETS[cfg.preset], **attentions))
    generator, backbone, adapter, classifier = (
        parallel.prepare(network, procs, cfg.compile, cfg.recompute, cfg.dtype)
        for network in (generator.requires_grad_(False), backbone.requires_grad_(False), adapter, classifier)
    )
    discriminator = DiffusionDiscriminator(backbone, classifier)
    optimizers = [optim.adamw(adapter, cfg.weight_decay, MOMENTUM[cfg.preset])]
    if cfg.preset == "small":  # Muon for the matrices that read tokens: within its few steps AdamW alone learns nothing
        classifier_optimizers = optim.make_optimizers(classifier, classifier.tokens, cfg.weight_decay, rest=0.05)
    else:
        classifier_optimizers = [optim.adamw(classifier, cfg.weight_decay, MOMENTUM[cfg.preset])]
    ema = optim.EMA(adapter, cfg.ema)

    # 2. What they learn from, and the folder in which a killed run finds itself again.
    codec = open_codec(cfg.preset, cfg.weights, procs.device, dtype=dtype)
    data, held_out = training_data(cfg.data, codec, cfg.seed, cfg.batch, adapter.config.maps)
    parts = {"adapter": (adapter, optimizers, ema), "classifier": (classifier, classifier_optimizers, None)}
    run = Run(f"runs/{cfg.name}", cfg, procs, parts)
    start = run.resume()

    # 3. The loop: the discriminator learns from true videos and fakes, then the adapter from both losses.
    for step in range(start, cfg.steps + 1):
        last = step == cfg.steps
        if due(step, cfg.save_every, start, last):
            run.save(step, wait=last)
        if due(step, cfg.sample_every, start, last):
            with ema.applied():
                make = partial(make_video, cfg=cfg, generator=generator, adapter=adapter)
                run.write_samples(step, codec, held_out, make, "box")
        if last:
            break
        now = phase(step, cfg.steps, cfg.ratio, cfg.diffusion_first, cfg.adapter_start)
        judged, values = cfg.use_gan and now.judged, {}
        if judged:
            lr = optim.learning_rate(now.age, cfg.classifier_lr, cfg.warmup, now.lifetime)
            optim.set_lr(classifier_optimizers, lr)
            values |= discriminator_step(
                step, cfg, generator, adapter, discriminator, classifier_optimizers, data, procs
            )
        if now.adapter_learns:
            optim.set_lr(optimizers, optim.learning_rate(now.adapter_age, cfg.lr, cfg.warmup, now.adapter_lifetime))
            weight = diffusion_weight(cfg.diffusion_scale, now.adapter_age / now.adapter_lifetime)
            values |= adapter_step(
                step, weight, judged, cfg, generator, adapter, discriminator, optimizers, data, procs
            )
            ema.update(step)
        run.log(step + 1, **values)

    # 4. The averaged adapter is the FastAdapter.
    weights = ema.weights(keep=procs.rank == 0)
    classifier_weights = {n: parallel.full(p) for n, p in classifier.named_parameters()}
    if procs.rank == 0:
        save_network(run.folder / "fast_adapter.safetensors", "FastAdapter", adapter.config, weights)
        save_network(run.folder / "classifier.safetensors", "Classifier", classifier.config, classifier_weights)


if __name__ == "__main__":
    run_script(main, Config, {"wan5b": WAN5B})
