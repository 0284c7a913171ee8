"""Stage 0: train the SlowGenerator, an image-to-video VideoDiT, with the flow-matching loss.

    python train_slow_generator.py                                # preset tiny on this machine
    torchrun --nproc_per_node=8 train_slow_generator.py

The paper starts from Wan2.2-TI2V-5B, whose owners did this stage; the toy world has no published generator, so we train
one. To resume, run the same command again.
"""

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor
from tqdm import tqdm

import common
import flow
import optim
from codec import ToyCodec
from data import ToyLatents
from model import PRESETS, VideoDiT, save_network


@dataclass(frozen=True)
class Config:
    """Options of stage 0."""

    name: str = "slow_generator"  # run folder under runs/
    preset: Literal["tiny"] = "tiny"  # size of the network and its world
    init: str = ""  # a SlowGenerator to fine-tune; random weights if empty
    steps: int = 8000  # optimizer steps in all
    batch: int = 16  # videos a step, over all processes
    accumulate: int = 1  # micro-batches a step
    lr: float = 6e-3  # peak learning rate of the matrices
    warmup: int = 100  # steps of linear warm-up before the cosine
    weight_decay: float = 0.05  # decoupled
    clip: float = 1.0  # largest gradient norm
    ema: float = 0.999  # decay of the averaged weights, the ones exported
    shift: float = 2.0  # warp of training noise levels towards noise
    drop_text: float = 0.1  # share of empty captions, for guidance
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is bfloat16 unless emulated
    compile: bool = True  # torch.compile each block
    seed: int = 0  # of weights, data order and noise
    log_every: int = 20  # steps
    save_every: int = 500  # steps
    sample_every: int = 1000  # steps


def main(cfg: Config) -> None:
    procs = common.init_processes()
    torch.manual_seed(cfg.seed)  # the same initial weights on every rank
    model = VideoDiT.from_pretrained(cfg.init, "SlowGenerator") if cfg.init else VideoDiT(PRESETS[cfg.preset])
    model = common.prepare(model, procs, cfg.compile)
    optimizers = optim.make_optimizers(model, model.blocks, cfg.weight_decay)
    ema = optim.EMA(model, cfg.ema)
    codec = ToyCodec()
    data, held_out = ToyLatents(codec, seed=cfg.seed), ToyLatents(codec, "validation")

    parts = {"generator": (model, optimizers, ema)}
    run = common.Run(f"runs/{cfg.name}", cfg, procs)
    start = common.load_checkpoint(run.folder, parts, procs)
    run.rewind(start)

    def train_step(step: int) -> tuple[Tensor, Tensor]:
        losses = []
        for samples in procs.share(cfg.batch, cfg.accumulate, step):
            x0, text, _ = (x if x is None else x.to(procs.device) for x in data.batch(samples, drop_text=cfg.drop_text))
            noise = common.sample_noise(x0.shape[1:], samples, cfg.seed, step).to(procs.device)
            u = common.sample_uniform(samples, cfg.batch, cfg.seed, step).to(procs.device)
            sigma = flow.shift_sigma(u, cfg.shift)
            with common.autocast(procs.device, cfg.dtype):
                loss = flow.flow_matching_loss(lambda x, t: model(x, t, text), x0, noise, sigma)
            (loss / cfg.accumulate).backward()
            losses.append(loss.detach())
        return torch.stack(losses).mean(), optim.clip_and_step(model, optimizers, cfg.clip)

    def write_samples(step: int) -> None:
        """Four held-out images set in motion: truth and sample in turn."""
        x0, text, _ = (x if x is None else x.to(procs.device) for x in held_out.batch(list(range(4))))
        noise = common.sample_noise(x0.shape[1:], range(4), cfg.seed).to(procs.device)
        with ema.applied(), torch.no_grad(), common.autocast(procs.device, cfg.dtype):
            out = flow.sample_multistep(
                lambda x, t: model(x, t, text), x0[:, :, :1], noise, flow.sigma_schedule(20, cfg.shift)
            )
        pairs = torch.stack([codec.decode_video(x0), codec.decode_video(out)], dim=1)
        run.samples(step, pairs.flatten(0, 1))

    for step in tqdm(range(start, cfg.steps + 1), initial=start, total=cfg.steps, disable=procs.rank > 0):
        last = step == cfg.steps
        if (step % cfg.sample_every == 0 and step > start) or last:
            write_samples(step)
        if (step % cfg.save_every == 0 and step > start) or last:
            common.save_checkpoint(run.folder, step, parts, procs)
        if last:
            break
        lr = optim.learning_rate(step, cfg.lr, cfg.warmup, cfg.steps)
        optim.set_lr(optimizers, lr)
        loss, norm = train_step(step)
        ema.update(step)
        if (step + 1) % cfg.log_every == 0:
            run.log(step + 1, loss=procs.mean(loss), grad_norm=norm.item(), lr=lr)
    weights = ema.weights()
    if procs.rank == 0:
        save_network(run.folder / "slow_generator.safetensors", "SlowGenerator", model.config, weights)


if __name__ == "__main__":
    common.run_script(main, Config)
