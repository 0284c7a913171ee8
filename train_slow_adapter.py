"""Stage 1, and the loop to read first: train the SlowAdapter, which makes a frozen SlowGenerator follow a trajectory.

    python train_slow_adapter.py                # preset small on this machine, from the shipped generator
    torchrun --nproc_per_node=8 train_slow_adapter.py

The loss is the generator's own flow-matching loss, but only the adapter learns (paper, stage 1). Trajectories are dense
masks at first, then boxes, some of them sparse. To resume, run the same command again.
"""

from dataclasses import dataclass, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor
from torch.optim import Optimizer

import adapter as adapters
import flow
from adapter import Adapter, with_adapter
from core import optim, parallel
from core.codec import Batch
from core.config import run_script, shipped
from core.memory import send
from core.noise import sample_noise, sample_uniform
from core.parallel import Processes
from core.runs import Run, due, start_processes
from data import Source, open_codec, training_data
from model import PRESETS, VideoDiT, frozen_dtype
from toy.muon import muon_and_adamw
from trajectory import Maps


@dataclass(frozen=True)
class Recipe:
    """Values that come with the preset. To try others, edit them here or in WAN5B."""

    sparse: float = 0.15  # share of boxes with frames blacked out; of clips, tools.prepare_clips chose them
    muon: bool = True  # Muon for the matrices inside the blocks, AdamW at 0.4 of the rate for the rest; or AdamW alone
    warmup: int = 50  # steps of linear warm-up before the cosine
    ema: float = 0.995  # decay of the averaged weights, the ones exported
    shift: float = 3.0  # warp of training noise levels towards noise
    loss_weight: Literal["none", "bell"] = "none"  # of noise levels in the loss: alike, or more in the middle


@dataclass(frozen=True)
class Config(Recipe):
    name: str = "slow_adapter"  # run folder under runs/
    preset: Literal["small", "wan5b"] = "small"  # size of the networks
    data: str = ""  # folder of prepared clips (tools.prepare_clips); the small preset's world if empty
    weights: str = "Wan2.2-TI2V-5B"  # preset wan5b: its folder as published, whose VAE shows samples
    generator: str = shipped("checkpoints/small/slow_generator.safetensors")  # the frozen SlowGenerator
    kind: Literal["resnet", "controlnet"] = "resnet"  # of a new adapter: light and static, or a copy of the generator
    maps: Maps = "pixels"  # how a new adapter's trajectories are painted: outlines, or frame 0's own pixels
    init: str = ""  # a SlowAdapter to go on from, such as stage 0's guide; random weights if empty
    steps: int = 2400  # optimizer steps in all
    mask_steps: int = 480  # first steps with dense masks; boxes from then on
    batch: int = 8  # videos a step, over all processes
    accumulate: int = 1  # micro-batches a step; 0 is one video in each
    lr: float = 6e-3  # peak learning rate
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is the faster one
    compile: bool = True  # torch.compile each block
    recompute: Literal["none", "full"] = "none"  # activations that the backward pass computes again, to save memory
    sequence: int = 1  # neighbouring processes that share one video
    seed: int = 1  # of weights, data order and noise
    save_every: int = 500  # steps
    sample_every: int = 1000  # steps; 0 for no samples
    wandb: str = ""  # project on Weights & Biases to which the log goes too


# The source of each value stands beside it.
WAN5B = replace(
    Config(),
    preset="wan5b",
    generator="Wan2.2-TI2V-5B",
    maps="outline",  # (paper)
    steps=10000,  # (paper)
    mask_steps=4600,  # (paper)
    batch=16,  # (paper: its 16 GPUs, one video on each)
    lr=1e-4,  # (guess)
    muon=False,  # (guess)
    warmup=200,  # (guess, as the cosine after it is)
    ema=0.999,  # (guess)
    shift=5.0,  # (guess: Turbo's trainer of the diffusion loss has it, as Wan's sampling has; FastGen has none)
    loss_weight="bell",  # (Turbo: the same trainer; FastGen has none)
    accumulate=0,
    recompute="full",
)


def bell(sigma: Tensor, shift: float) -> Tensor:
    """Weights of noise levels [Turbo, utils/scheduler.py]: a bell, 0 at 0 and 1, of mean 1 over the levels drawn."""
    drawn = flow.shift_sigma(torch.arange(1, 1001) / 1000, shift)
    h = [torch.expm1(2 * s * (1 - s)).clamp(min=0) for s in (sigma, drawn)]  # ~ exp(-2 (s - 1/2)^2) - exp(-1/2)
    return h[0] / h[1].mean()


def adapter_loss(
    generator: VideoDiT, adapter: Adapter, batch: Batch, noise: Tensor, sigma: Tensor, weight: Tensor | None = None
) -> Tensor:
    """`|| v(x_t, t, text, traj) - (noise - x0) ||^2` [paper, stage 1], or of x0, whichever the generator predicts.

    noise [B,C,F,H,W], sigma [B]; `weight` [B]: how much each video counts, all alike if there is none.
    """
    velocity = with_adapter(generator, adapter, batch.text, batch.traj)
    return flow.flow_matching_loss(velocity, batch.x0, noise, sigma, generator.config.predicts, by_video=weight)


def adapter_step(
    step: int, cfg: Config, generator: VideoDiT, adapter: Adapter, optimizers: list[Optimizer], data: Source,
    procs: Processes,
) -> dict[str, Tensor]:  # fmt: skip
    """One update of the adapter, over the micro-batches of this process."""
    kind, sparse = ("mask", 0.0) if step < cfg.mask_steps else ("box", cfg.sparse)
    losses, shares = [], procs.share(cfg.batch, cfg.accumulate, step)
    for samples in shares:
        batch = data.batch(samples, kind, sparse, drop_text=0.1).to(procs.device)
        noise = send(sample_noise(batch.x0.shape[1:], samples, cfg.seed, step), procs.device)
        sigma = flow.shift_sigma(send(sample_uniform(samples, cfg.batch, cfg.seed, step), procs.device), cfg.shift)
        weight = bell(sigma, cfg.shift) if cfg.loss_weight == "bell" else None
        with parallel.autocast(procs.device, cfg.dtype):
            loss = adapter_loss(generator, adapter, batch, noise, sigma, weight)
        (loss / len(shares)).backward()
        losses.append(loss.detach())
    norm = optim.clip_and_step(adapter, optimizers)
    return {"loss": torch.stack(losses).mean(), "grad_norm": norm}


def main(cfg: Config) -> None:
    procs = start_processes(cfg, PRESETS[cfg.preset].heads)
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank

    # 1. The frozen generator, and the adapter that learns: one to go on from, or a new one.
    dtype = frozen_dtype(cfg.preset, cfg.dtype)
    elsewhere = procs.rank > 0  # rank 0 reads the weights, and sends them to the others
    generator = VideoDiT.from_pretrained(cfg.generator, "SlowGenerator", dtype, elsewhere, cfg.preset)
    if cfg.init:
        adapter = adapters.read_adapter(cfg.init, "SlowAdapter", shapes_only=elsewhere)
        adapters.check_fit(adapter, cfg.init, generator, cfg.generator)
    elif cfg.kind == "resnet":
        adapter = adapters.ResNetAdapter(replace(adapters.PRESETS[cfg.preset], maps=cfg.maps))
    else:
        with torch.device("meta" if elsewhere else "cpu"):
            adapter = adapters.ControlNetAdapter(adapters.ControlNetConfig(**vars(generator.config), maps=cfg.maps))
        adapter.copy_generator(generator)
    for network in (generator.requires_grad_(False), adapter):
        parallel.prepare(network, procs, cfg.compile, cfg.recompute, cfg.dtype)
    optimizers = muon_and_adamw(adapter, adapter.blocks) if cfg.muon else [optim.adamw(adapter, 0.9)]
    ema = optim.EMA(adapter, cfg.ema)

    # 2. The data, and the run's folder, from which a killed run resumes.
    codec = open_codec(cfg.preset, cfg.weights, procs.device, dtype=dtype)
    data, held_out = training_data(cfg.data, codec, cfg.seed, cfg.batch, adapter.config.maps)
    run = Run(f"runs/{cfg.name}", cfg, procs, {"adapter": (adapter, optimizers, ema)})
    start = run.resume()
    if start == 0 and not cfg.init and isinstance(adapter, adapters.ResNetAdapter):
        adapter.fit([data.batch([n], "box").traj for n in range(16)])  # the same on every rank

    # 3. The loop.
    make = partial(adapters.sample_clips, generator, [adapter], flow.Sampling(20, cfg.shift), cfg.seed, euler=True)
    for step in range(start, cfg.steps):
        lr = optim.learning_rate(step, cfg.lr, cfg.warmup, cfg.steps)
        optim.set_lr(optimizers, lr)
        values = adapter_step(step, cfg, generator, adapter, optimizers, data, procs)
        ema.update(step)
        run.log(step + 1, **values, lr=lr)
        if due(step + 1, cfg.save_every, cfg.steps):
            run.save(step + 1)
        if due(step + 1, cfg.sample_every, cfg.steps):
            with ema.applied():
                run.write_samples(step + 1, codec, held_out, make, "box")

    # 4. The averaged weights are the result.
    run.export("slow_adapter", adapter, ema)


if __name__ == "__main__":
    run_script(main, Config, {"wan5b": WAN5B})
