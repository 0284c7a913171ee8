"""Stage 2: distil the SlowGenerator into the FastGenerator, which needs four steps, by distribution matching.

    python distill_fast.py                                  # preset tiny on this machine, from the shipped generator
    torchrun --nproc_per_node=8 distill_fast.py

Three copies of the SlowGenerator. The *generator* learns to predict, in four steps, clean videos from noise. The *real
score*, frozen, tells where a noisy video should go to look like data; the *fake score*, trained all along on what the
generator makes, where it should go to look like the generator's. Their difference is the gradient (DMD; paper, stage
2). No trajectory takes part: the adapter comes back in stage 3. To resume, run the same command again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import common
import flow
import optim
import parallel
from codec import open_codec
from data import training_data
from flow import Velocity
from model import FROZEN, VideoDiT
from parallel import Recompute
from runs import Run, check_counts
from weights import save_network


@dataclass(frozen=True)
class Config:
    """Options of stage 2."""

    name: str = "fast_generator"  # run folder under runs/
    preset: Literal["tiny", "wan5b"] = "tiny"  # size of the networks and their world
    data: str = ""  # folder of clips prepared by data.py; the toy world if empty
    weights: str = "Wan2.2-TI2V-5B"  # preset wan5b: its folder as published, whose VAE shows samples
    generator: str = "checkpoints/tiny/slow_generator.safetensors"  # the SlowGenerator all three networks start from
    steps: int = 2500  # updates of the fake score; the generator learns in every `ratio`-th
    ratio: int = 5  # fake-score updates for one of the generator
    denoising_steps: int = flow.FAST["tiny"].steps  # of the generator
    batch: int = 8  # videos a step, over all processes
    accumulate: int = 1  # micro-batches a step
    lr: float = 2e-4  # peak learning rate of the generator
    fake_lr: float = 4e-4  # peak learning rate of the fake score
    warmup: int = 50  # steps of linear warm-up before the cosine
    weight_decay: float = 0.01  # decoupled
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.99  # decay of the averaged generator, the one exported
    guidance: float = 6.0  # of the real score; the fake score has none
    shift: float = flow.FAST["tiny"].shift  # warp of all noise levels towards noise
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is bfloat16 unless emulated
    compile: bool = True  # torch.compile each block
    recompute: Recompute = "none"  # of what the gradient needs of a block, what is computed again: less memory
    sequence: int = 1  # neighbouring processes that share one video
    seed: int = 0  # of data order and noise
    log_every: int = 20  # steps
    save_every: int = 250  # steps
    sample_every: int = 500  # steps


# As in Wan2.2-TI2V-5B-Turbo; its guidance is cond + 6 (cond - uncond).
WAN5B = {
    "generator": "Wan2.2-TI2V-5B", "steps": 5500, "batch": 64, "lr": 5e-7, "fake_lr": 1e-7, "guidance": 7.0,
    "shift": flow.FAST["wan5b"].shift, "warmup": 0, "recompute": "full",
}  # fmt: skip


def generator_loss(
    generator: Velocity, fake: Velocity, real: Velocity, first: Tensor, noise: Tensor, sigmas: Sequence[float],
    last: int, renoise: Tensor, sigma: Tensor,
) -> Tensor:  # fmt: skip
    """Distribution matching: move the generator's x0 against `fake(x_t) - real(x_t)`, both read as clean videos.

    first [B,C,1,H,W]; noise [steps,B,C,F,H,W] for the generator's own sampling, whose step `last` gets the gradient;
    renoise [B,C,F,H,W] and sigma [B] make x_t of its result. The difference is divided by the mean of |x0 - real(x_t)|
    of each video, so that all noise levels pull alike (DMD, eq. 8). The returned value has that gradient; it is no
    distance, and does not fall.
    """
    x0 = flow.backward_simulation(generator, first, noise, sigmas, last)
    with torch.no_grad():
        level = flow.frame_sigma(sigma, x0.shape[2])
        x_t, t = flow.add_noise(x0, renoise, level), flow.timestep(level)
        x_fake, x_real = (flow.velocity_to_x0(x_t, score(x_t, t).float(), level)[:, :, 1:] for score in (fake, real))
        scale = (x0[:, :, 1:] - x_real).abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-6)
        target = x0[:, :, 1:] - (x_fake - x_real) / scale
    return 0.5 * (x0[:, :, 1:] - target).square().mean()


def fake_score_loss(
    fake: Velocity, generator: Velocity, first: Tensor, noise: Tensor, sigmas: Sequence[float],
    last: int, renoise: Tensor, sigma: Tensor,
) -> Tensor:  # fmt: skip
    """The flow-matching loss of the fake score on what the generator makes. Arguments as in `generator_loss`."""
    with torch.no_grad():
        x0 = flow.backward_simulation(generator, first, noise, sigmas, last)
    return flow.flow_matching_loss(fake, x0, renoise, sigma)


def levels_above(u: Tensor, last: int, steps: int) -> Tensor:
    """Uniform u in [0, 1) -> uniform over the levels, before the shift, from that of step `last + 1` to pure noise.

    To that level the sampler noises what step `last` predicts, so how its prediction looks with less noise is never
    seen. Judged there as well, the vague predictions of the first steps blend with those of the last step in the fake
    score, and the last step overshoots to make up for them. (As in trajectory distribution matching and Self-Forcing.)
    """
    return 1 - (1 - u) * (last + 1) / steps


def main(cfg: Config) -> None:
    check_counts(cfg)
    procs = parallel.init_processes(cfg.sequence)
    generator, fake = (VideoDiT.from_pretrained(cfg.generator, "SlowGenerator") for _ in range(2))
    real = VideoDiT.from_pretrained(cfg.generator, "SlowGenerator", FROZEN[cfg.preset]).requires_grad_(False)
    generator, fake, real = (
        parallel.prepare(network, procs, cfg.compile, cfg.recompute, cfg.dtype) for network in (generator, fake, real)
    )
    optimizers = [optim.adamw(generator, cfg.weight_decay)]
    fake_optimizers = [optim.adamw(fake, cfg.weight_decay)]
    ema = optim.EMA(generator, cfg.ema)
    codec = open_codec(cfg.preset, cfg.weights, procs.device)
    data, held_out = training_data(cfg.data, codec, cfg.seed)
    empty = data.batch([0], drop_text=1.0)[1].to(procs.device)
    sigmas = flow.sigma_schedule(cfg.denoising_steps, cfg.shift)

    parts = {"generator": (generator, optimizers, ema), "fake": (fake, fake_optimizers, None)}
    run = Run(f"runs/{cfg.name}", cfg, procs, parts)
    start = run.resume()

    def inputs(samples: list[int], turn: int, last: int) -> tuple[Tensor, ...]:
        """First frames, text, the sampler's noise, and the noise and its level that x_t is made with."""
        x0, text, _ = (x if x is None else x.to(procs.device) for x in data.batch(samples))
        noise = common.step_noise(cfg.denoising_steps + 1, x0.shape[1:], samples, cfg.seed, turn).to(procs.device)
        u = common.sample_uniform(samples, cfg.batch, cfg.seed, turn).to(procs.device)
        sigma = flow.shift_sigma(levels_above(u, last, cfg.denoising_steps), cfg.shift).clamp(0.02, 0.98)
        return x0[:, :, :1], text, noise[:-1], noise[-1], sigma

    def train_step(step: int, learner: Literal["fake", "generator"]) -> dict[str, Tensor]:
        turn, losses = 2 * step + (learner == "generator"), []
        # Where backward simulation ends: the same on every rank, for they run in lockstep.
        last = int(torch.randint(cfg.denoising_steps, (), generator=common.generator(cfg.seed, turn, 2)))
        for samples in procs.share(cfg.batch, cfg.accumulate, turn):
            first, text, noise, renoise, sigma = inputs(samples, turn, last)
            ours, theirs = partial(generator, text=text), partial(fake, text=text)
            truth = flow.guided(partial(real, text=text), partial(real, text=empty.expand_as(text)), cfg.guidance)
            rest = (first, noise, sigmas, last, renoise, sigma)
            with parallel.autocast(procs.device, cfg.dtype):
                if learner == "fake":
                    loss = fake_score_loss(theirs, ours, *rest)
                else:
                    loss = generator_loss(ours, theirs, truth, *rest)
            (loss / cfg.accumulate).backward()
            losses.append(loss.detach())
        network, its_optimizers = (fake, fake_optimizers) if learner == "fake" else (generator, optimizers)
        norm = optim.clip_and_step(network, its_optimizers, cfg.clip)
        return {f"{learner}_loss": torch.stack(losses).mean(), f"{learner}_grad_norm": norm}

    def write_samples(step: int) -> None:
        """Four held-out images set in motion in a few steps: truth and sample in turn."""
        x0, text, _ = (x if x is None else x.to(procs.device) for x in held_out.batch(list(range(4))))
        noise = common.step_noise(cfg.denoising_steps, x0.shape[1:], range(4), cfg.seed).to(procs.device)
        with ema.applied(), torch.no_grad(), parallel.autocast(procs.device, cfg.dtype):
            out = flow.sample_fewstep(partial(generator, text=text), x0[:, :, :1], noise, sigmas)
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
        optim.set_lr(optimizers, optim.learning_rate(step, cfg.lr, cfg.warmup, cfg.steps))
        optim.set_lr(fake_optimizers, optim.learning_rate(step, cfg.fake_lr, cfg.warmup, cfg.steps))
        values = train_step(step, "fake")
        if (step + 1) % cfg.ratio == 0:
            values |= train_step(step, "generator")
            ema.update(step)
        if (step + 1) % cfg.log_every == 0:
            run.log(step + 1, **{name: procs.mean(value) for name, value in values.items()})
    weights = ema.weights()
    if procs.rank == 0:
        save_network(run.folder / "fast_generator.safetensors", "FastGenerator", generator.config, weights)


if __name__ == "__main__":
    common.run_script(main, Config, presets={"wan5b": WAN5B})
