"""The paper's two baselines, an adapter for the FastGenerator from other losses than stage 3's.

    python -m tools.train_baseline --loss dmd        # distribution matching, as stage 2 does it, applied to the adapter
    python -m tools.train_baseline --loss lcm        # a consistency loss along the slow networks' own path

Both start from the SlowAdapter and train it alone, on the frozen FastGenerator. The paper names the two ("DMD applied
to adapter", "LCM applied to adapter") and gives no details: what their sources don't say is this project's guess. The
result, `runs/<name>/fast_adapter.safetensors`, is used as stage 3's. To resume, run the same command again.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

import flow
from adapter import read_adapter
from core import optim, parallel
from core.config import run_script, shipped
from core.noise import sample_uniform, step_noise
from core.parallel import Processes
from core.runs import Run, check_options, due
from core.weights import save_network
from data import Source, open_codec, training_data
from distill_fast import Draw, draw_exit_step, fake_score_loss, levels_above, student_learns, student_loss
from finetune_hybrid import make_video
from flow import Velocity
from model import VideoDiT


@dataclass(frozen=True)
class Config:
    name: str = "baseline"  # run folder under runs/
    preset: Literal["small"] = "small"  # size of the networks
    loss: Literal["dmd", "lcm"] = "dmd"  # distribution matching, or consistency
    slow_generator: str = shipped("checkpoints/small/slow_generator.safetensors")  # of stage 0
    slow_adapter: str = shipped("checkpoints/small/slow_adapter.safetensors")  # of stage 1, where training starts
    fast_generator: str = shipped("checkpoints/small/fast_generator.safetensors")  # of stage 2, frozen
    steps: int = 400  # of training; with dmd the adapter learns in every `ratio`-th
    ratio: int = 5  # dmd: updates of the fake score for one of the adapter
    denoising_steps: int = flow.FAST["small"].steps  # of the FastGenerator
    path: int = 40  # lcm: steps of the slow networks from noise to data
    skip: int = 2  # lcm: how many of them lie between two noise levels that are to agree
    batch: int = 8  # videos a step, over all processes
    accumulate: int = 1  # micro-batches a step; 0 is one video in each
    lr: float = 6e-4  # peak learning rate of the adapter
    fake_lr: float = 4e-4  # dmd: peak learning rate of the fake score
    warmup: int = 20  # steps of linear warm-up before the cosine
    weight_decay: float = 0.01  # decoupled
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.95  # decay of the averaged adapter: the one exported, and the target of the consistency loss
    shift: float = flow.FAST["small"].shift  # warp of all noise levels towards noise
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is the faster one
    compile: bool = True  # torch.compile each block
    seed: int = 0  # of data order and noise
    log_every: int = 20  # steps
    save_every: int = 50  # steps
    sample_every: int = 300  # steps; 0 for no samples


class Controlled(nn.Module):
    """A generator and its adapter as one network, so that both can be trained, saved and averaged together."""

    def __init__(self, generator: VideoDiT, adapter: nn.Module):
        super().__init__()
        self.generator, self.adapter = generator, adapter

    def forward(self, x: Tensor, t: Tensor, text: Tensor, traj: Tensor) -> Tensor:
        return self.generator(x, t, text, self.adapter(traj, x, t, text))


def consistency_loss(
    student: Velocity, averaged: Velocity, teacher: Velocity, x0: Tensor, noise: Tensor, high: Tensor, low: Tensor
) -> Tensor:
    """What the student predicts from noise level `high` is what its average predicts one step of the teacher below.

    x0, noise [B,C,F,H,W]; high, low [B], low < high. The teacher takes an Euler step of its path from `high` to `low`;
    at level 0 the average predicts its input (consistency models, eq. 8; latent consistency models, section 4).
    """
    above, below = (flow.frame_sigma(sigma, x0.shape[2]) for sigma in (high, low))
    x_t = flow.add_noise(x0, noise, above)
    with torch.no_grad():  # first, for the average borrows the student's parameters
        x_low = flow.velocity_to_x0(x_t, teacher(x_t, flow.timestep(above)).float(), above - below)
        target = flow.velocity_to_x0(x_low, averaged(x_low, flow.timestep(below)).float(), below)
    predicted = flow.velocity_to_x0(x_t, student(x_t, flow.timestep(above)).float(), above)
    return (predicted - target)[:, :, 1:].square().mean()


def averaged(velocity: Velocity, ema: optim.EMA) -> Velocity:
    """The same velocity, of the averaged adapter."""

    def of_average(x: Tensor, t: Tensor) -> Tensor:
        with ema.applied():
            return velocity(x, t)

    return of_average


def consistency_step(
    step: int, cfg: Config, student: Controlled, teacher: Controlled, ema: optim.EMA, optimizers: Sequence[Optimizer],
    data: Source, procs: Processes,
) -> dict[str, Tensor]:  # fmt: skip
    """One update of the adapter by the consistency loss."""
    losses, shares = [], procs.share(cfg.batch, cfg.accumulate, step)
    path = flow.sigma_schedule(cfg.path, cfg.shift)
    for samples in shares:
        x0, text, traj = data.batch(samples, "box").to(procs.device)
        noise = step_noise(1, x0.shape[1:], samples, cfg.seed, step)[0].to(procs.device)
        u = sample_uniform(samples, cfg.batch, cfg.seed, step)
        first = [int(v * (cfg.path - cfg.skip + 1)) for v in u]
        high, low = (torch.tensor([path[i + k] for i in first], device=procs.device) for k in (0, cfg.skip))
        velocity, truth = (partial(network, text=text, traj=traj) for network in (student, teacher))
        with parallel.autocast(procs.device, cfg.dtype):
            loss = consistency_loss(velocity, averaged(velocity, ema), truth, x0, noise, high, low)
        (loss / len(shares)).backward()
        losses.append(loss.detach())
    norm = optim.clip_and_step(student.adapter, optimizers, cfg.clip)
    return {"consistency_loss": torch.stack(losses).mean(), "adapter_grad_norm": norm}


def matching_step(
    step: int, learner: Literal["fake", "adapter"], cfg: Config, student: Controlled, fake_score: Controlled,
    teacher: Controlled, optimizers: Sequence[Optimizer], data: Source, procs: Processes,
) -> dict[str, Tensor]:  # fmt: skip
    """One update of the fake score or of the adapter, by stage 2's losses; every network is told the trajectory."""
    turn, losses = 2 * step + (learner == "adapter"), []
    exit_step, sigmas = draw_exit_step(cfg, turn), flow.sigma_schedule(cfg.denoising_steps, cfg.shift)
    shares = procs.share(cfg.batch, cfg.accumulate, turn)
    for samples in shares:
        x0, text, traj = data.batch(samples, "box").to(procs.device)
        noise = step_noise(cfg.denoising_steps + 1, x0.shape[1:], samples, cfg.seed, turn).to(procs.device)
        u = sample_uniform(samples, cfg.batch, cfg.seed, turn).to(procs.device)
        sigma = flow.shift_sigma(levels_above(u, exit_step, cfg.denoising_steps), cfg.shift).clamp(0.02, 0.98)
        draw = Draw(x0[:, :, :1], sigmas, exit_step, noise[:-1], noise[-1], sigma)
        makes, fake, real = (partial(n, text=text, traj=traj) for n in (student, fake_score, teacher))
        with parallel.autocast(procs.device, cfg.dtype):
            if learner == "fake":
                loss = fake_score_loss(fake, student=makes, draw=draw)
            else:
                loss = student_loss(makes, real_score=real, fake_score=fake, draw=draw)
        (loss / len(shares)).backward()
        losses.append(loss.detach())
    norm = optim.clip_and_step(fake_score if learner == "fake" else student.adapter, optimizers, cfg.clip)
    return {f"{learner}_loss": torch.stack(losses).mean(), f"{learner}_grad_norm": norm}


def main(cfg: Config) -> None:
    check_options(cfg)
    procs = parallel.init_processes()

    # 1. The student: the frozen FastGenerator and the adapter that learns. The teacher: the slow networks, frozen.
    def read(generator: str, kind: str) -> Controlled:
        network = VideoDiT.from_pretrained(generator, f"{kind}Generator").requires_grad_(False)
        adapter = read_adapter(cfg.slow_adapter, "SlowAdapter").requires_grad_(False)
        prepared = (parallel.prepare(part, procs, cfg.compile, dtype=cfg.dtype) for part in (network, adapter))
        return Controlled(*prepared)

    student, teacher = read(cfg.fast_generator, "Fast"), read(cfg.slow_generator, "Slow")
    adapter = student.adapter.requires_grad_(True)
    optimizers, ema = [optim.adamw(adapter, cfg.weight_decay)], optim.EMA(adapter, cfg.ema)
    parts = {"adapter": (adapter, optimizers, ema)}
    if cfg.loss == "dmd":
        fake_score = read(cfg.slow_generator, "Slow").requires_grad_(True)
        fake_optimizers = [optim.adamw(fake_score, cfg.weight_decay)]
        parts["fake"] = fake_score, fake_optimizers, None

    # 2. What they learn from.
    codec = open_codec(cfg.preset, "", procs.device)
    data, held_out = training_data("", codec, cfg.seed, cfg.batch, adapter.config.maps)
    run = Run(f"runs/{cfg.name}", cfg, procs, parts)
    start = run.resume()

    # 3. The loop.
    for step in range(start, cfg.steps + 1):
        last = step == cfg.steps
        if due(step, cfg.save_every, start, last):
            run.save(step, wait=last)
        if due(step, cfg.sample_every, start, last):
            with ema.applied():
                make = partial(make_video, cfg=cfg, generator=student.generator, adapter=adapter)
                run.write_samples(step, codec, held_out, make, "box")
        if last:
            break
        optim.set_lr(optimizers, optim.learning_rate(step, cfg.lr, cfg.warmup, cfg.steps))
        if cfg.loss == "lcm":
            values = consistency_step(step, cfg, student, teacher, ema, optimizers, data, procs)
            ema.update(step)
        else:
            optim.set_lr(fake_optimizers, optim.learning_rate(step, cfg.fake_lr, cfg.warmup, cfg.steps))
            networks = student, fake_score, teacher
            values = matching_step(step, "fake", cfg, *networks, fake_optimizers, data, procs)
            if student_learns(step, cfg.ratio):
                values |= matching_step(step, "adapter", cfg, *networks, optimizers, data, procs)
                ema.update(step)
        run.log(step + 1, **values)
    weights = ema.weights(keep=procs.rank == 0)
    if procs.rank == 0:
        save_network(run.folder / "fast_adapter.safetensors", "FastAdapter", adapter.config, weights)


if __name__ == "__main__":
    run_script(main, Config)
