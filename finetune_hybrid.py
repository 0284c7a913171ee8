"""Stage 3: fine-tune the SlowAdapter into the FastAdapter, which steers the FastGenerator in four steps.

    python finetune_hybrid.py                                  # preset tiny on this machine, from the shipped networks
    torchrun --nproc_per_node=8 finetune_hybrid.py

The diffusion loss alone keeps to the trajectory and blurs; the adversarial loss alone is sharp and drifts. The adapter
gets both, weighed `loss = adversarial + lambda(step) * diffusion` (paper, stage 3). On the toy the diffusion loss has
the first steps to itself, and the discriminator begins with what that leaves blurred. It judges what all four steps
together make, and learns at every step, the adapter at every fifth; all else is frozen. To resume, run the same command
again.
"""

from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import common
import discriminator as discriminators
import flow
import optim
import parallel
from adapter import read_adapter, steer
from codec import open_codec
from data import training_data
from discriminator import Classifier, DiffusionDiscriminator, adversarial_loss, discriminator_loss
from flow import Velocity
from model import FROZEN, VideoDiT
from parallel import Recompute
from runs import Run, check_counts
from weights import save_network


@dataclass(frozen=True)
class Config:
    """Options of stage 3."""

    name: str = "fast_adapter"  # run folder under runs/
    preset: Literal["tiny", "wan5b"] = "tiny"  # size of the networks and their world
    data: str = ""  # folder of clips prepared by data.py; the toy world if empty
    weights: str = "Wan2.2-TI2V-5B"  # preset wan5b: its folder as published, whose VAE shows samples
    generator: str = "checkpoints/tiny/fast_generator.safetensors"  # the frozen FastGenerator
    adapter: str = "checkpoints/tiny/slow_adapter.safetensors"  # the SlowAdapter that training starts from
    backbone: str = "checkpoints/tiny/slow_generator.safetensors"  # the SlowGenerator inside the discriminator
    steps: int = 600  # of training; the adapter learns in every `ratio`-th
    ratio: int = 5  # discriminator updates for one of the adapter
    diffusion_first: int = 300  # steps of the diffusion loss alone, before the discriminator begins
    adapter_start: int = 60  # steps after those in which the discriminator alone learns: it has nothing to say yet
    denoising_steps: int = flow.FAST["tiny"].steps  # of the generator
    use_gan: bool = True  # the adversarial loss
    use_diffusion: bool = True  # the diffusion loss
    gan_scale: float = 1.5  # weight of the adversarial loss
    diffusion_scale: Literal["decay", "grow", "constant"] = "decay"  # lambda, the diffusion loss's weight over time
    semantic: bool = True  # the discriminator's attention to first frame and text
    trajectory: bool = True  # the discriminator's attention to the trajectory
    video: bool = True  # the discriminator's attention to the video
    sparse: float = 0.15  # share of trajectories with frames blacked out
    batch: int = 8  # videos a step, over all processes
    accumulate: int = 1  # micro-batches a step
    lr: float = 6e-4  # peak learning rate of the adapter
    classifier_lr: float = 3e-3  # peak learning rate of the discriminator's classifier
    classifier_muon: bool = True  # Muon for its matrices that read tokens, AdamW at 0.05 of the rate for all else
    warmup: int = 20  # steps of linear warm-up before the cosine
    momentum: float = 0.9  # of AdamW, beta1: the adapter's, and the classifier's where there is no Muon
    weight_decay: float = 0.01  # decoupled
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.95  # decay of the averaged adapter, the one exported
    shift: float = flow.FAST["tiny"].shift  # warp of all noise levels towards noise
    judge_low: float = 0.05  # least noise level at which videos are judged
    judge_high: float = 0.5  # most
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is bfloat16 unless emulated
    compile: bool = True  # torch.compile each block
    recompute: Recompute = "none"  # of what the gradient needs of a block, what is computed again: less memory
    sequence: int = 1  # neighbouring processes that share one video
    seed: int = 0  # of the classifier's weights, data order and noise
    log_every: int = 20  # steps
    save_every: int = 50  # steps
    sample_every: int = 300  # steps


# The paper's steps and Adam without momentum; rates, weight and noise levels as a third party read them.
WAN5B = {
    "generator": "fast_generator.safetensors", "adapter": "slow_adapter.safetensors", "backbone": "Wan2.2-TI2V-5B",
    "steps": 1000, "diffusion_first": 0, "gan_scale": 0.01, "batch": 4, "lr": 2e-6, "classifier_lr": 2e-6,
    "classifier_muon": False, "momentum": 0.0, "adapter_start": 0, "shift": flow.FAST["wan5b"].shift,
    "judge_low": 0.02, "judge_high": 0.98, "recompute": "full",
}  # fmt: skip


def diffusion_weight(kind: str, progress: float) -> float:
    """lambda at `progress` in [0, 1] of the training. The paper's formulas are over its 1,000 steps."""
    step = 1000 * progress
    return {"decay": 1 / (4e-3 * step + 0.1), "grow": 0.25e-3 * step + 0.1, "constant": 1.0}[kind]


def diffusion_loss(velocity: Velocity, x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """`|| G(x_t, t, traj) - x0 ||^2` at one of the sampler's noise levels [paper, L_diffusion], but for frame 0.

    x0, noise [B,C,F,H,W], sigma [B].
    """
    level = flow.frame_sigma(sigma, x0.shape[2])
    x_t = flow.add_noise(x0, noise, level)
    predicted = flow.velocity_to_x0(x_t, velocity(x_t, flow.timestep(level)).float(), level)
    return (predicted - x0)[:, :, 1:].square().mean()


def main(cfg: Config) -> None:
    check_counts(cfg)
    if not (cfg.use_gan or cfg.use_diffusion):
        raise common.UserError("--use_gan false --use_diffusion false: no loss is left; use one or both")
    if min(cfg.adapter_start, cfg.diffusion_first) < 0 or cfg.adapter_start + cfg.diffusion_first >= cfg.steps:
        raise common.UserError(
            f"--adapter_start {cfg.adapter_start} --diffusion_first {cfg.diffusion_first}: give steps from 0 on,"
            f" together below --steps {cfg.steps}"
        )
    if cfg.diffusion_first and not cfg.use_diffusion:
        raise common.UserError(f"--diffusion_first {cfg.diffusion_first}: needs --use_diffusion true")
    procs = parallel.init_processes(cfg.sequence)
    torch.manual_seed(cfg.seed)  # the same initial classifier on every rank
    generator = VideoDiT.from_pretrained(cfg.generator, "FastGenerator", FROZEN[cfg.preset]).requires_grad_(False)
    backbone = VideoDiT.from_pretrained(cfg.backbone, "SlowGenerator", FROZEN[cfg.preset]).requires_grad_(False)
    adapter = read_adapter(cfg.adapter, "SlowAdapter")
    shape = replace(
        discriminators.PRESETS[cfg.preset], semantic=cfg.semantic, trajectory=cfg.trajectory, video=cfg.video
    )
    generator, backbone, adapter, classifier = (
        parallel.prepare(network, procs, cfg.compile, cfg.recompute, cfg.dtype)
        for network in (generator, backbone, adapter, Classifier(shape))
    )
    discriminator = DiffusionDiscriminator(backbone, classifier)
    optimizers = [optim.adamw(adapter, cfg.weight_decay, cfg.momentum)]
    if cfg.classifier_muon:
        classifier_optimizers = optim.make_optimizers(classifier, classifier.tokens, cfg.weight_decay, rest=0.05)
    else:
        classifier_optimizers = [optim.adamw(classifier, cfg.weight_decay, cfg.momentum)]
    ema = optim.EMA(adapter, cfg.ema)
    codec = open_codec(cfg.preset, cfg.weights, procs.device)
    data, held_out = training_data(cfg.data, codec, cfg.seed)
    sigmas = flow.sigma_schedule(cfg.denoising_steps, cfg.shift)

    parts = {"adapter": (adapter, optimizers, ema), "classifier": (classifier, classifier_optimizers, None)}
    run = Run(f"runs/{cfg.name}", cfg, procs, parts)
    start = run.resume()

    def inputs(samples: list[int], turn: int) -> tuple[Tensor, ...]:
        """Videos, text, trajectories, the sampler's noise, and the noise and its level that both judged videos get."""
        x0, text, traj = (x.to(procs.device) for x in data.batch(samples, "box", cfg.sparse))
        noise = common.step_noise(cfg.denoising_steps + 1, x0.shape[1:], samples, cfg.seed, turn).to(procs.device)
        u = flow.shift_sigma(common.sample_uniform(samples, cfg.batch, cfg.seed, turn).to(procs.device), cfg.shift)
        sigma = cfg.judge_low + (cfg.judge_high - cfg.judge_low) * u
        return x0, text, traj, noise[:-1], noise[-1], flow.frame_sigma(sigma, x0.shape[2])

    @lru_cache(maxsize=1)
    def generated(cycle: int) -> list[tuple[Tensor, Tensor, Tensor]]:
        """What the generator makes in a cycle, with its text and trajectory; the adapter stays as it is throughout."""
        turn, fakes = 2 * cycle * cfg.ratio, []
        for samples in procs.share(cfg.batch, cfg.accumulate, turn):
            x0, text, traj, noise, _, _ = inputs(samples, turn)
            with torch.no_grad(), parallel.autocast(procs.device, cfg.dtype):
                velocity = steer(generator, adapter, text, traj)
                fakes.append((flow.sample_fewstep(velocity, x0[:, :, :1], noise, sigmas), text, traj))
        return fakes

    def discriminator_step(step: int) -> dict[str, Tensor]:
        """The classifier learns to tell noisy videos from what the generator makes. No gradient but its own."""
        turn, losses = 2 * step, []
        micro_batches = procs.share(cfg.batch, cfg.accumulate, turn)
        for samples, fake in zip(micro_batches, generated(step // cfg.ratio), strict=True):
            x0, text, traj, _, renoise, level = inputs(samples, turn)
            with parallel.autocast(procs.device, cfg.dtype):
                with torch.no_grad():
                    x_t = torch.cat([flow.add_noise(x, renoise, level) for x in (x0, fake[0])])
                    text, traj = torch.cat([text, fake[1]]), torch.cat([traj, fake[2]])
                    features = discriminator.features(x_t, torch.cat([flow.timestep(level)] * 2), text)
                loss = discriminator_loss(*classifier(features, text, traj).chunk(2))
            (loss / cfg.accumulate).backward()
            losses.append(loss.detach())
        norm = optim.clip_and_step(classifier, classifier_optimizers, cfg.clip)
        return {"discriminator_loss": torch.stack(losses).mean(), "discriminator_grad_norm": norm}

    def adapter_step(step: int, weight: float, judged: bool) -> dict[str, Tensor]:
        """The adapter learns, judged from both losses, diffusion's weighed; gradient passes through frozen networks."""
        turn, logged = 2 * step + 1, []
        for samples in procs.share(cfg.batch, cfg.accumulate, turn):
            x0, text, traj, noise, renoise, level = inputs(samples, turn)
            zero = torch.zeros((), device=procs.device)
            with parallel.autocast(procs.device, cfg.dtype):
                velocity = steer(generator, adapter, text, traj)

                # 1. Diffusion: the true video, seen at one of the sampler's noise levels.
                diffusion = zero
                if cfg.use_diffusion:
                    u = common.sample_uniform(samples, cfg.batch, cfg.seed, turn, 3)
                    picked = [sigmas[int(v * cfg.denoising_steps)] for v in u]
                    diffusion = diffusion_loss(velocity, x0, renoise, torch.tensor(picked, device=procs.device))

                # 2. Generator: what a few steps make, noised, is to pass for real.
                adversarial = zero
                if judged:
                    fake = flow.backward_simulation(velocity, x0[:, :, :1], noise, sigmas, cfg.denoising_steps - 1)
                    x_t = flow.add_noise(fake, renoise, level)
                    adversarial = adversarial_loss(discriminator(x_t, flow.timestep(level), text, traj))
            ((cfg.gan_scale * adversarial + weight * diffusion) / cfg.accumulate).backward()
            logged.append(torch.stack([adversarial.detach(), diffusion.detach()]))
        classifier.zero_grad()  # the gradient passed through it on its way; its own comes from the step above
        norm = optim.clip_and_step(adapter, optimizers, cfg.clip)
        adversarial, diffusion = torch.stack(logged).mean(0)
        return {"adversarial_loss": adversarial, "diffusion_loss": diffusion, "adapter_grad_norm": norm}

    def write_samples(step: int) -> None:
        """Four held-out trajectories: truth and sample in turn."""
        x0, text, traj = (x.to(procs.device) for x in held_out.batch(list(range(4)), "box"))
        noise = common.step_noise(cfg.denoising_steps, x0.shape[1:], range(4), cfg.seed).to(procs.device)
        with ema.applied(), torch.no_grad(), parallel.autocast(procs.device, cfg.dtype):
            velocity = steer(generator, adapter, text, traj)
            out = flow.sample_fewstep(velocity, x0[:, :, :1], noise, sigmas)
        pairs = torch.stack([codec.decode_video(x0), codec.decode_video(out)], dim=1)
        run.samples(step, pairs.flatten(0, 1))

    for step in tqdm(range(start, cfg.steps + 1), initial=start, total=cfg.steps, disable=procs.rank > 0):
        last = step == cfg.steps
        if (step % cfg.sample_every == 0 and step > start) or last:
            write_samples(step)
        if (step % cfg.save_every == 0 and step > start) or last:
            run.save(step, wait=last)
        if last:
            break
        # Each of the two parts has its own warm-up, cosine and lambda; in the second the adapter rests at first.
        values, alone, first = {}, step < cfg.diffusion_first, cfg.diffusion_first
        age, lifetime = (step, first) if alone else (step - first, cfg.steps - first)
        rest = 0 if alone else cfg.adapter_start
        judged = cfg.use_gan and not alone
        if judged:
            optim.set_lr(classifier_optimizers, optim.learning_rate(age, cfg.classifier_lr, cfg.warmup, lifetime))
            values = discriminator_step(step)
        if age >= rest and (step + 1) % cfg.ratio == 0:
            age, lifetime = age - rest, lifetime - rest
            optim.set_lr(optimizers, optim.learning_rate(age, cfg.lr, cfg.warmup, lifetime))
            values |= adapter_step(step, diffusion_weight(cfg.diffusion_scale, age / lifetime), judged)
            ema.update(step)
        if (step + 1) % cfg.log_every == 0:
            run.log(step + 1, **{name: procs.mean(value) for name, value in values.items()})
    weights, classifier_weights = ema.weights(), {n: parallel.full(p) for n, p in classifier.named_parameters()}
    if procs.rank == 0:
        save_network(run.folder / "fast_adapter.safetensors", "FastAdapter", adapter.config, weights)
        save_network(run.folder / "classifier.safetensors", "Classifier", classifier.config, classifier_weights)


if __name__ == "__main__":
    common.run_script(main, Config, presets={"wan5b": WAN5B})
