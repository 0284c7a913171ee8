"""Stage 2: distil the SlowGenerator into the FastGenerator, which needs four steps, by distribution matching.

    python distill_fast.py                                  # preset small on this machine, from the shipped generator
    torchrun --nproc_per_node=8 distill_fast.py

Three networks start from the SlowGenerator. The *student* learns to turn noise into clean videos in four steps. The
frozen *real score* says where a noisy video should go to look like data; the *fake score*, trained on the student's
videos all along, where it should go to look like one of those. Their difference is the student's gradient (DMD; paper,
stage 2). There is no trajectory; the adapter comes back in stage 3. To resume, run the same command again.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import flow
from adapter import sample_clips
from core import optim, parallel
from core.config import run_script, shipped
from core.memory import send
from core.parallel import Processes
from core.runs import Run, due, start_processes
from data import Draw, Source, make_draw, open_codec, training_data
from flow import Velocity
from model import PRESETS, VideoDiT, frozen_dtype


@dataclass(frozen=True)
class Recipe:
    """Values that come with the preset. To try others, edit them here or in WAN5B."""

    ratio: int = 5  # fake-score updates for one of the student
    fake_lr: float = 1e-3  # peak learning rate of the fake score
    warmup: int = 20  # steps of linear warm-up
    schedule: Literal["cosine", "constant"] = "cosine"  # of the learning rates after it
    judge_sigma_max: float = 0.5  # highest noise level at which the scores judge
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.99  # decay of the averaged student, the one exported
    guidance: float = 1.0  # of the real score; the fake score has none
    fake_error: Literal["x0", "velocity"] = "x0"  # of what the fake score predicts, in its loss


@dataclass(frozen=True)
class Config(Recipe):
    name: str = "fast_generator"  # run folder under runs/
    preset: Literal["small", "wan5b"] = "small"  # size of the networks
    data: str = ""  # folder of prepared clips (tools.prepare_clips); the small preset's world if empty
    weights: str = "Wan2.2-TI2V-5B"  # preset wan5b: its folder as published, whose VAE shows samples
    generator: str = shipped("checkpoints/small/slow_generator.safetensors")  # the SlowGenerator that all start from
    steps: int = 200  # updates of the fake score; the student learns in every `ratio`-th
    batch: int = 8  # videos a step, over all processes
    accumulate: int = 1  # micro-batches a step; 0 is one video in each
    lr: float = 1e-4  # peak learning rate of the student
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is the faster one
    compile: bool = True  # torch.compile each block
    recompute: Literal["none", "full"] = "none"  # activations that the backward pass computes again, to save memory
    sequence: int = 1  # neighbouring processes that share one video
    seed: int = 0  # of data order and noise
    save_every: int = 50  # steps
    sample_every: int = 200  # steps; 0 for no samples
    wandb: str = ""  # project on Weights & Biases to which the log goes too


# The source of each value stands beside it.
WAN5B = replace(
    Config(),
    preset="wan5b",
    generator="Wan2.2-TI2V-5B",
    steps=5500,  # (paper)
    ratio=5,  # (Turbo)
    batch=16,  # (Turbo)
    lr=5e-7,  # (Turbo)
    fake_lr=1e-7,  # (Turbo)
    warmup=0,  # (Turbo)
    schedule="constant",  # (Turbo)
    judge_sigma_max=1.0,  # (Turbo)
    clip=10.0,  # (Turbo)
    ema=0.99,  # (Turbo: from step 200 on)
    guidance=7.0,  # (Turbo: written there as cond + 6 (cond - uncond))
    accumulate=0,
    recompute="full",
    save_every=250,  # a checkpoint has 140 GB
)


def student_loss(student: Velocity, real_score: Velocity, fake_score: Velocity, draw: Draw) -> Tensor:
    """Distribution matching: move the student's x0 against `fake_score(x_t) - real_score(x_t)`, read as clean videos.

    The student samples up to `draw.exit_step`, from first frames and noise, and that step alone gets the gradient. The
    difference is divided by the mean of |x0 - real_score(x_t)| of each video, so that all noise levels pull alike (DMD,
    eq. 8). The returned value has that gradient; it is no distance, and does not fall.
    """
    # 1. The student makes videos, by the same steps as in use.
    x0 = flow.backward_simulation(student, draw.batch.x0[:, :, :1], draw.noise, draw.sigmas, draw.exit_step)
    with torch.no_grad():
        # 2. They are noised again, and both scores predict the clean video.
        level = flow.frame_sigma(draw.sigma, x0.shape[2])
        x_t, t = flow.add_noise(x0, draw.renoise, level), flow.timestep(level)
        velocities = fake_score(x_t, t), real_score(x_t, t)
        x_fake, x_real = (flow.velocity_to_x0(x_t, v.float(), level)[:, :, 1:] for v in velocities)
        # 3. The video should move from the fake score's prediction towards the real score's.
        scale = (x0[:, :, 1:] - x_real).abs().mean((1, 2, 3, 4), keepdim=True).clamp_min(1e-6)
        target = x0[:, :, 1:] - (x_fake - x_real) / scale
    return 0.5 * (x0[:, :, 1:] - target).square().mean()


def fake_score_loss(fake_score: Velocity, student: Velocity, draw: Draw, on: str = "x0") -> Tensor:
    """The flow-matching loss of the fake score on the student's videos: the error of "x0" or of the "velocity"."""
    with torch.no_grad():
        x0 = flow.backward_simulation(student, draw.batch.x0[:, :, :1], draw.noise, draw.sigmas, draw.exit_step)
    return flow.flow_matching_loss(fake_score, x0, draw.renoise, draw.sigma, on)


def matching_step(
    step: int, learner: Literal["fake", "generator"], cfg: Config, student: nn.Module, fake_score: nn.Module,
    real_score: nn.Module, negative: Tensor, optimizers: list[Optimizer], data: Source, procs: Processes,
    kind: str | None = None,
) -> dict[str, Tensor]:  # fmt: skip
    """One update of the fake score, on videos of the student as it is now, or of the student.

    `negative`: the prompt [1,L,text_dim] that the real score's guidance goes away from. `kind`: of the trajectories'
    maps, for networks that have an adapter.
    """
    turn, losses = 2 * step + (learner == "generator"), []
    shares = procs.share(cfg.batch, cfg.accumulate, turn)
    for samples in shares:
        draw = make_draw(samples, turn, cfg, data, procs.device, kind)
        given = {"text": draw.batch.text} | ({"traj": draw.batch.traj} if kind else {})
        made, fake, real = (partial(network, **given) for network in (student, fake_score, real_score))
        with parallel.autocast(procs.device, cfg.dtype):
            if learner == "fake":
                loss = fake_score_loss(fake, made, draw, cfg.fake_error)
            else:
                unconditional = partial(real, text=negative.expand_as(draw.batch.text))
                loss = student_loss(made, flow.guided(real, unconditional, cfg.guidance), fake, draw)
        (loss / len(shares)).backward()
        losses.append(loss.detach())
    norm = optim.clip_and_step(fake_score if learner == "fake" else student, optimizers, cfg.clip)
    return {f"{learner}_loss": torch.stack(losses).mean(), f"{learner}_grad_norm": norm}


def main(cfg: Config) -> None:
    procs = start_processes(cfg, PRESETS[cfg.preset].heads)

    # 1. Three copies of the SlowGenerator, one after the other: rank 0 reads the weights, and sends them to the others.
    def copy(dtype: torch.dtype, learns: bool) -> VideoDiT:
        network = VideoDiT.from_pretrained(cfg.generator, "SlowGenerator", dtype, procs.rank > 0, cfg.preset)
        return parallel.prepare(network.requires_grad_(learns), procs, cfg.compile, cfg.recompute, cfg.dtype)

    frozen = frozen_dtype(cfg.preset, cfg.dtype)
    student, fake_score, real_score = copy(torch.float32, True), copy(torch.float32, True), copy(frozen, False)
    optimizers, fake_optimizers = [optim.adamw(student)], [optim.adamw(fake_score)]
    ema = optim.EMA(student, cfg.ema)

    # 2. The data, and the run's folder, from which a killed run resumes.
    codec = open_codec(cfg.preset, cfg.weights, procs.device, dtype=frozen)
    data, held_out = training_data(cfg.data, codec, cfg.seed, cfg.batch)
    networks = student, fake_score, real_score, send(data.unconditional(), procs.device)
    parts = {"generator": (student, optimizers, ema), "fake": (fake_score, fake_optimizers, None)}
    run = Run(f"runs/{cfg.name}", cfg, procs, parts)

    # 3. The loop: the fake score follows the student, and every few steps the student learns from both scores.
    make = partial(sample_clips, student, [None], flow.FAST[cfg.preset], cfg.seed)
    for step in range(run.resume(), cfg.steps):
        for learners, peak in ((optimizers, cfg.lr), (fake_optimizers, cfg.fake_lr)):
            optim.set_lr(learners, optim.learning_rate(step, peak, cfg.warmup, cfg.steps, cfg.schedule))
        values = matching_step(step, "fake", cfg, *networks, fake_optimizers, data, procs)
        if (step + 1) % cfg.ratio == 0:
            values |= matching_step(step, "generator", cfg, *networks, optimizers, data, procs)
            ema.update(step)
        run.log(step + 1, **values)
        if due(step + 1, cfg.save_every, cfg.steps):
            run.save(step + 1)
        if due(step + 1, cfg.sample_every, cfg.steps):
            with ema.applied():
                run.write_samples(step + 1, codec, held_out, make)

    # 4. The averaged student is the FastGenerator.
    run.export("fast_generator", student, ema)


if __name__ == "__main__":
    run_script(main, Config, {"wan5b": WAN5B})
