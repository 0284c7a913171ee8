"""Before stage 0: make the small preset's codec, an autoencoder of single frames.

    python -m toy.train_codec
    python -m toy.train_codec --init checkpoints/small/codec.safetensors --name decoder  # only trains the decoder on

The encoder is computed, principal components of the first videos' frames. The decoder is trained on frames of videos
and of trajectory maps. Noise on the latents, of any level, makes it smooth a generator's errors and keep what is right.
Pixel errors alone would make it blur where it is unsure, so the amount of detail around a pixel counts too. With
`--init` the encoder stays, and with it all networks trained on its latents. To resume, run the same command again.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import Optimizer

from core import optim, parallel
from core.config import run_script
from core.noise import rng
from core.runs import Run, due
from core.weights import save_network
from model import PRESETS
from toy.codec import AutoencoderConfig, ToyAutoencoder, ToyCodec
from toy.metrics import laplacian
from toy.muon import muon_and_adamw
from toy.world import World

SIZE = (64, 64)  # of the videos; a decoder of convolutions serves any


@dataclass(frozen=True)
class Recipe:
    """Values to be edited here."""

    fit: int = 256  # videos for the principal components
    batch: int = 16  # videos a step
    frames: int = 4  # of each video; one in four shows its maps
    lr: float = 4e-3  # peak learning rate of the kernels
    warmup: int = 50  # steps of linear warm-up before the cosine
    noise: float = 0.3  # highest standard deviation of the noise on a frame's latents, whose mean variance is 1
    detail: float = 0.1  # weight of the error of the Laplacian, for crisp edges
    energy: float = 0.3  # weight of the error of the Laplacian's energy around each pixel, against blur
    save_every: int = 250  # steps
    sample_every: int = 500  # steps


@dataclass(frozen=True)
class Config(Recipe):
    name: str = "codec"  # run folder under runs/
    init: str = ""  # a codec whose decoder to train further; a new codec if empty
    steps: int = 1200  # optimizer steps in all
    seed: int = 0  # of weights, data order and noise


def frames_of(world: World, samples: Sequence[int], number: int, seed: int) -> Tensor:
    """`number` frames of each video, a quarter of them replaced by frames of its maps: [B * number, 3, S, S]."""
    batch, draw, frames = world.batch(samples), rng(seed, samples[0]), []
    painted = [batch.maps(style, "box") for style in ("pixels", "outline")]
    for i, video in enumerate(batch.video):
        for t in torch.randint(world.frames, (number,), generator=draw).tolist():
            frames.append((painted[i % 2][i] if torch.rand((), generator=draw) < 0.25 else video)[:, t])
    return torch.stack(frames)


def decoder_loss(out: Tensor, frames: Tensor, detail: float, energy: float) -> Tensor:
    """L1 errors of pixels, of their Laplacian, and of its root mean square over 5 x 5 pixels. [B, 3, S, S] each."""
    laplacians = [laplacian(x) for x in (out, frames)]
    energies = [(F.avg_pool2d(x.square().sum(1, keepdim=True), 5, stride=2) + 1e-4).sqrt() for x in laplacians]
    return F.l1_loss(out, frames) + detail * F.l1_loss(*laplacians) + energy * F.l1_loss(*energies)


def training_step(step: int, cfg: Config, model: ToyAutoencoder, optimizers: list[Optimizer], world: World) -> dict:
    """One update of the decoder."""
    frames = frames_of(world, range(step * cfg.batch, (step + 1) * cfg.batch), cfg.frames, cfg.seed)
    latents = model.encoder(frames)
    draw = rng(cfg.seed, step, 1)
    level = cfg.noise * torch.rand(len(latents), 1, 1, 1, generator=draw)
    out = model.decode(latents + level * torch.randn(latents.shape, generator=draw))
    loss = decoder_loss(out, frames, cfg.detail, cfg.energy)
    loss.backward()
    return {"loss": loss.detach(), "grad_norm": optim.clip_and_step(model.detail, optimizers)}


@torch.no_grad()
def write_samples(step: int, run: Run, model: ToyAutoencoder, world: World) -> None:
    """Held-out videos and maps, with the reconstruction below each."""
    batch = world.batch(range(3))
    videos = torch.stack([batch.video, batch.maps("pixels", "box")], 1).flatten(0, 1)  # (6, 3, T, S, S)
    back = torch.stack([model.decode(model.encoder(video.transpose(0, 1))).transpose(0, 1) for video in videos])
    run.samples(step, torch.stack([videos, back], 1).flatten(0, 1))
    print(f"step {step}: mean squared error of held-out videos and maps {F.mse_loss(back, videos):.6f}", flush=True)


def main(cfg: Config) -> None:
    procs = parallel.Processes(0, 1, torch.device("cpu"), None)
    torch.manual_seed(cfg.seed)
    world, held_out = (World(split, SIZE) for split in ("train", "validation"))
    if cfg.init:
        model = ToyCodec(cfg.init).network.train()
    else:
        model = ToyAutoencoder(AutoencoderConfig(channels=PRESETS["small"].channels))
        model.fit_linear(world.batch(range(cfg.fit)).video.transpose(1, 2).flatten(0, 1))
    decoder = model.requires_grad_(False).detail.requires_grad_(True)
    optimizers = muon_and_adamw(decoder, decoder)
    run = Run(f"runs/{cfg.name}", cfg, procs, {"codec": (model, optimizers, None)})

    for step in range(run.resume(), cfg.steps):
        optim.set_lr(optimizers, optim.learning_rate(step, cfg.lr, cfg.warmup, cfg.steps))
        run.log(step + 1, **training_step(step, cfg, model, optimizers, world))
        if due(step + 1, cfg.save_every, cfg.steps):
            run.save(step + 1)
        if due(step + 1, cfg.sample_every, cfg.steps):
            write_samples(step + 1, run, model, held_out)
    save_network(run.folder / "codec.safetensors", "ToyAutoencoder", model.config, model.state_dict())


if __name__ == "__main__":
    run_script(main, Config)
