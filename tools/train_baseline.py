"""The paper's two baselines, an adapter for the FastGenerator from other losses than stage 3's.

    python -m tools.train_baseline --loss dmd        # distribution matching, as stage 2 does it, applied to the adapter
    python -m tools.train_baseline --loss lcm        # a consistency loss along the slow networks' own path
    torchrun --nproc_per_node=8 -m tools.train_baseline --preset wan5b --data shards

Both start from the SlowAdapter and train it alone, on the frozen FastGenerator. The paper names the two ("DMD applied
to adapter", "LCM applied to adapter") and gives no details: what their sources don't say is this project's guess. The
result, `runs/<name>/fast_adapter.safetensors`, is used as stage 3's. To resume, run the same command again.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

import distill_fast
import flow
from adapter import check_fit, read_adapter, sample_clips, with_adapter
from core import optim, parallel
from core.config import run_script, shipped
from core.memory import send
from core.noise import sample_uniform, step_noise
from core.runs import Run, due, start_processes
from data import Source, open_codec, training_data
from distill_fast import matching_step
from flow import Velocity
from model import PRESETS, VideoDiT, frozen_dtype
from wan.published import find_generator

PATH, SKIP = 40, 2  # lcm: steps of the slow networks from noise to data, and between two levels that are to agree


@dataclass(frozen=True)
class Recipe(distill_fast.Recipe):
    """Values to be edited here; those of stage 2 are dmd's."""

    batch: int = 8  # videos a step, over all processes
    accumulate: int = 1  # micro-batches a step; 0 is one video in each
    recompute: Literal["none", "full"] = "none"  # activations that the backward pass computes again, to save memory
    sequence: int = 1  # neighbouring processes that share one video
    lr: float = 6e-4  # peak learning rate of the adapter
    fake_lr: float = 4e-4  # dmd: peak learning rate of the fake score
    fake_error: Literal["x0", "velocity"] = "velocity"
    ema: float = 0.95  # decay of the averaged adapter: the one exported, and the target of the consistency loss
    save_every: int = 50  # steps
    sample_every: int = 300  # steps


@dataclass(frozen=True)
class Config(Recipe):
    name: str = "baseline"  # run folder under runs/
    preset: Literal["small", "wan5b"] = "small"  # size of the networks
    loss: Literal["dmd", "lcm"] = "dmd"  # distribution matching, or consistency
    data: str = ""  # folder of prepared clips (tools.prepare_clips); the small preset's world if empty
    weights: str = shipped("checkpoints/small")  # folder of slow_generator, slow_adapter and fast_generator.safetensors
    steps: int = 400  # of training; with dmd the adapter learns in every `ratio`-th
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is the faster one
    compile: bool = True  # torch.compile each block
    seed: int = 0  # of data order and noise
    wandb: str = ""  # project on Weights & Biases to which the log goes too


# The paper says nothing of these. They are stage 3's values, and for the fake score stage 2's.
WAN5B = replace(
    Config(),
    preset="wan5b",
    weights="Wan2.2-TI2V-5B",  # as published, with slow_adapter and fast_generator.safetensors beside its own files
    steps=1000,  # (guess)
    batch=4,  # (guess)
    accumulate=0,
    recompute="full",
    lr=2e-6,  # (guess)
    fake_lr=1e-7,  # (guess)
    fake_error="x0",  # (guess)
    judge_sigma_max=1.0,  # (guess)
    guidance=7.0,  # (guess; for lcm too, whose teacher it strengthens)
    schedule="constant",  # (guess)
    clip=10.0,  # (guess)
    ema=0.99,  # (guess)
)


class Pair(nn.Module):
    """A generator and its adapter as one network, so that both can be trained, saved and averaged together."""

    def __init__(self, generator: VideoDiT, adapter: nn.Module):
        super().__init__()
        self.generator, self.adapter = generator, adapter

    def forward(self, x: Tensor, t: Tensor, text: Tensor, traj: Tensor) -> Tensor:
        return with_adapter(self.generator, self.adapter, text, traj)(x, t)


def consistency_loss(
    student: Velocity, averaged: Velocity, teacher: Velocity, x0: Tensor, noise: Tensor, high: Tensor, low: Tensor
) -> Tensor:
    """The student's prediction at noise level `high` should be its average's, one step of the teacher further down.

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


def consistency_step(
    step: int, cfg: Config, student: Pair, teacher: Pair, negative: Tensor, ema: optim.EMA,
    optimizers: list[torch.optim.Optimizer], data: Source, procs: parallel.Processes,
) -> dict[str, Tensor]:  # fmt: skip
    """One update of the adapter by the consistency loss."""
    path, losses = flow.sigma_schedule(PATH, flow.FAST[cfg.preset].shift), []
    shares = procs.share(cfg.batch, cfg.accumulate, step)
    for samples in shares:
        x0, text, traj = data.batch(samples, "box").to(procs.device)
        noise = send(step_noise(1, x0.shape[1:], samples, cfg.seed, step)[0], procs.device)
        first = [int(v * (PATH - SKIP + 1)) for v in sample_uniform(samples, cfg.batch, cfg.seed, step)]
        high, low = (send(torch.tensor([path[i + k] for i in first]), procs.device) for k in (0, SKIP))
        velocity, truth = (partial(network, text=text, traj=traj) for network in (student, teacher))
        truth = flow.guided(truth, partial(truth, text=negative.expand_as(text)), cfg.guidance)
        averaged = ema.applied()(velocity)  # a decorator, too: in every call the student has the averaged weights
        with parallel.autocast(procs.device, cfg.dtype):
            loss = consistency_loss(velocity, averaged, truth, x0, noise, high, low)
        (loss / len(shares)).backward()
        losses.append(loss.detach())
    norm = optim.clip_and_step(student, optimizers, cfg.clip)
    return {"consistency_loss": torch.stack(losses).mean(), "generator_grad_norm": norm}


def main(cfg: Config) -> None:
    procs = start_processes(cfg, PRESETS[cfg.preset].heads)

    # 1. The student: the frozen FastGenerator and the adapter that learns. The teacher: the slow networks, frozen.
    folder, dtype, elsewhere = Path(cfg.weights), frozen_dtype(cfg.preset, cfg.dtype), procs.rank > 0

    def read(kind: str, generator_learns: bool, adapter_learns: bool) -> Pair:
        file, own = find_generator(folder, kind.lower()), folder / "slow_adapter.safetensors"
        wide, narrow = (torch.float32 if learns else dtype for learns in (generator_learns, adapter_learns))
        network = VideoDiT.from_pretrained(file, f"{kind}Generator", wide, elsewhere, cfg.preset)
        adapter = read_adapter(own, "SlowAdapter", narrow, elsewhere)
        check_fit(adapter, own, network, file)
        both = network.requires_grad_(generator_learns), adapter.requires_grad_(adapter_learns)
        return Pair(*(parallel.prepare(part, procs, cfg.compile, cfg.recompute, cfg.dtype) for part in both))

    student, teacher = read("Fast", False, True), read("Slow", False, False)
    adapter = student.adapter
    optimizers, ema = [optim.adamw(adapter)], optim.EMA(adapter, cfg.ema)
    parts = {"adapter": (adapter, optimizers, ema)}
    if cfg.loss == "dmd":
        fake_score = read("Slow", True, True)
        fake_optimizers = [optim.adamw(fake_score)]
        parts["fake"] = fake_score, fake_optimizers, None

    # 2. What they learn from.
    codec = open_codec(cfg.preset, cfg.weights, procs.device, dtype=dtype)
    data, held_out = training_data(cfg.data, codec, cfg.seed, cfg.batch, adapter.config.maps)
    negative = send(data.unconditional(), procs.device)
    run = Run(f"runs/{cfg.name}", cfg, procs, parts)
    start = run.resume()

    # 3. The loop.
    make = partial(sample_clips, student.generator, [adapter], flow.FAST[cfg.preset], cfg.seed)
    for step in range(start, cfg.steps):
        optim.set_lr(optimizers, optim.learning_rate(step, cfg.lr, cfg.warmup, cfg.steps, cfg.schedule))
        if cfg.loss == "lcm":
            values = consistency_step(step, cfg, student, teacher, negative, ema, optimizers, data, procs)
            ema.update(step)
        else:
            optim.set_lr(fake_optimizers, optim.learning_rate(step, cfg.fake_lr, cfg.warmup, cfg.steps, cfg.schedule))
            networks = student, fake_score, teacher, negative
            values = matching_step(step, "fake", cfg, *networks, fake_optimizers, data, procs, "box")
            if (step + 1) % cfg.ratio == 0:
                values |= matching_step(step, "generator", cfg, *networks, optimizers, data, procs, "box")
                ema.update(step)
        run.log(step + 1, **values)
        if due(step + 1, cfg.save_every, cfg.steps):
            run.save(step + 1)
        if due(step + 1, cfg.sample_every, cfg.steps):
            with ema.applied():
                run.write_samples(step + 1, codec, held_out, make, "box")
    run.export("fast_adapter", adapter, ema)


if __name__ == "__main__":
    run_script(main, Config, {"wan5b": WAN5B})
