"""Stage 0: train the SlowGenerator, an image-to-video VideoDiT, with the flow-matching loss.

    python -m toy.train_slow_generator                            # the world is rendered on the device that trains
    torchrun --nproc_per_node=8 -m toy.train_slow_generator

The paper starts from Wan2.2-TI2V-5B; the toy world has no published generator, so we train one. An adapter on a frozen
network this small learned slowly (docs/LOG.md). So an adapter, the *guide*, is trained along and gives a share of the
videos their trajectory; stage 1 starts from it. Training begins with pure noise: only from there did the network learn
to read the prompt. To resume, run the same command again.
"""

from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

import adapter
import flow
from core import optim, parallel
from core.config import run_script
from core.noise import sample_noise, sample_uniform
from core.runs import Run, due, start_processes
from model import PRESETS, VideoDiT
from toy.codec import ToyCodec
from toy.latents import ToyLatents
from toy.muon import muon_and_adamw
from trajectory import Maps

SHAPES = [  # a divisor of --batch, and the shape of the videos: the first one at first, then the others in turn
    (1, {"size": (64, 64), "frames": 5}),
    (4, {}),
    (8, {"size": (128, 192)}),
    (4, {"size": (64, 64), "frames": 17}),
    (8, {"size": (192, 128)}),
]
GUIDED, PURE = 2, 3  # random streams: which videos are guided, and which are pure noise


@dataclass(frozen=True)
class Recipe:
    """Values to be edited here."""

    maps: Maps = "pixels"  # how the trajectories that a new guide reads are painted
    guided: float = 0.8  # share of videos with the guide's help
    sparse: float = 0.15  # share of trajectories with frames blacked out
    change: float = 4.0  # how much more than the rest a place counts that differs from frame 0
    warmup: int = 100  # steps of linear warm-up before the cosine
    ema: float = 0.999  # decay of the averaged weights, the ones exported
    shift: float = 2.5  # warp of training noise levels towards noise
    sample_every: int = 1000  # steps


@dataclass(frozen=True)
class Config(Recipe):
    name: str = "slow_generator"  # run folder under runs/
    init: str = ""  # folder with slow_generator.safetensors and slow_adapter.safetensors to start from; random if empty
    small: float = 0.7  # share of the steps, the first ones, on videos of less width, height and length
    steps: int = 13000  # optimizer steps in all
    batch: int = 32  # videos a step, over all processes
    lr: float = 6e-3  # peak learning rate of the matrices
    pure_noise: float = 1.0  # share of videos at noise level 1, where the prompt counts most; falls linearly to none
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is the faster one
    compile: bool = True  # torch.compile each block
    seed: int = 0  # of weights, data order and noise
    save_every: int = 500  # steps
    wandb: str = ""  # project on Weights & Biases to which the log goes too


def shape_number(step: int, steps: int, small: float, shapes: int) -> int:
    """Which of the shapes a step's videos have: the first for a share `small` of the steps, then the others in turn."""
    return 0 if step < small * steps or shapes == 1 else 1 + step % (shapes - 1)


def training_step(
    step: int, cfg: Config, model: VideoDiT, guide: adapter.ResNetAdapter, optimizers: list[Optimizer],
    guide_optimizers: list[Optimizer], batch: int, data: ToyLatents, procs: parallel.Processes,
) -> dict[str, Tensor]:  # fmt: skip
    """One update of the generator and of its guide, on `batch` videos."""
    (samples,) = procs.share(batch, 1, step)
    x0, text, traj = data.batch(samples, "box", cfg.sparse, drop_text=0.1).to(procs.device)
    noise = sample_noise(x0.shape[1:], samples, cfg.seed, step).to(procs.device)
    sigma = flow.shift_sigma(sample_uniform(samples, batch, cfg.seed, step).to(procs.device), cfg.shift)
    pure = cfg.pure_noise * (1 - step / cfg.steps)
    sigma[sample_uniform(samples, 1, cfg.seed, step, PURE).to(procs.device) < pure] = 1
    guided = sample_uniform(samples, 1, cfg.seed, step, GUIDED).to(procs.device) < cfg.guided
    with parallel.autocast(procs.device, cfg.dtype):
        residuals, shown = [guided[:, None, None] * r for r in guide(traj)], guide.shown(traj, x0[:, :, :1])
        shown = shown and shown._replace(drawn=shown.drawn & guided[:, None, None, None, None])
        moves = (x0.abs() > 1e-4).any(1, keepdim=True)  # latents of later frames are differences
        velocity = partial(model, text=text, residuals=residuals, shown=shown)
        weight = (1 + (cfg.change - 1) * moves) * data.codec.network.pixel_weight()
        loss = flow.flow_matching_loss(velocity, x0, noise, sigma, model.config.predicts, weight)
    loss.backward()
    optim.clip_and_step(guide, guide_optimizers)
    return {"loss": loss.detach(), "grad_norm": optim.clip_and_step(model, optimizers)}


def main(cfg: Config) -> None:
    procs = start_processes(cfg)
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank
    if cfg.init:
        model = VideoDiT.from_pretrained(Path(cfg.init, "slow_generator.safetensors"), "SlowGenerator")
        guide = adapter.read_adapter(Path(cfg.init, "slow_adapter.safetensors"), "SlowAdapter")
    else:
        model = VideoDiT(PRESETS["small"])
        guide = adapter.ResNetAdapter(replace(adapter.PRESETS["small"], maps=cfg.maps))
    model, guide = (parallel.prepare(network, procs, cfg.compile, dtype=cfg.dtype) for network in (model, guide))
    optimizers = muon_and_adamw(model, model.blocks, weight_decay=0.05)
    guide_optimizers = muon_and_adamw(guide, guide.blocks, weight_decay=0.05)
    ema, guide_ema = optim.EMA(model, cfg.ema), optim.EMA(guide, cfg.ema)
    codec = ToyCodec()
    codec.network.to(procs.device)
    worlds = [ToyLatents(codec, guide.config.maps, seed=cfg.seed, device=procs.device, **shape) for _, shape in SHAPES]
    sources = [(max(1, cfg.batch // divisor), data) for (divisor, _), data in zip(SHAPES, worlds, strict=True)]
    for batch, _ in sources[: 1 if cfg.small == 1 else None]:
        procs.share(batch, 1, 0)  # a batch that doesn't divide is refused before anything is trained
    held_out = ToyLatents(codec, guide.config.maps, "validation")
    parts = {"generator": (model, optimizers, ema), "guide": (guide, guide_optimizers, guide_ema)}
    run = Run(f"runs/{cfg.name}", cfg, procs, parts)
    start = run.resume()
    if start == 0 and not cfg.init:
        guide.fit([sources[0][1].batch([n], "box").traj for n in range(16)])  # the same on every rank

    make = partial(adapter.sample_clips, model, [None, guide], flow.Sampling(20, cfg.shift), cfg.seed, euler=True)
    for step in range(start, cfg.steps):
        lr = optim.learning_rate(step, cfg.lr, cfg.warmup, cfg.steps)
        optim.set_lr([*optimizers, *guide_optimizers], lr)
        batch, data = sources[shape_number(step, cfg.steps, cfg.small, len(sources))]
        values = training_step(step, cfg, model, guide, optimizers, guide_optimizers, batch, data, procs)
        ema.update(step)
        guide_ema.update(step)
        run.log(step + 1, **values, lr=lr)
        if due(step + 1, cfg.save_every, cfg.steps):
            run.save(step + 1)
        if due(step + 1, cfg.sample_every, cfg.steps):
            with ema.applied(), guide_ema.applied():
                run.write_samples(step + 1, codec, held_out, make, "box")
    run.export("slow_generator", model, ema)
    run.export("slow_adapter", guide, guide_ema)


if __name__ == "__main__":
    run_script(main, Config)
