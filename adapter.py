"""Trajectory adapters: networks that read the drawn trajectory and add one residual to every block of a VideoDiT.

A projection, zero at first, takes block i's output to DiT block i, so a fresh adapter changes nothing, to the bit; but
the small preset's makes what its maps show.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

import flow
from core.codec import Batch
from core.config import require
from core.memory import send
from core.noise import sample_noise, step_noise
from core.parallel import TokenSplit
from core.weights import load, read_network
from model import OTHER_FILE, DiTConfig, PatchEmbedding, Shown, VideoDiT, init_xavier
from trajectory import Maps

REACH = 3  # latent positions from what moves within which the small preset's videos may change


@dataclass(frozen=True)
class AdapterConfig:
    """Shapes of a ResNetAdapter."""

    dim: int  # width of the DiT it serves
    layers: int  # of the DiT, and so of the adapter
    hidden: int = 128
    channels: int = 48  # of the trajectory latent
    patch: tuple[int, int, int] = (1, 2, 2)
    fixed_norm: bool = False  # trajectory latents normed by fixed statistics, not by the clip's own
    maps: Maps = "outline"  # how its trajectories are painted: Trajectory.maps
    copies: float = 0.0  # latents of later frames are differences from frame 0's times this, and "pixels" added


PRESETS = {
    "small": AdapterConfig(256, 6, hidden=192, channels=24, fixed_norm=True, maps="pixels", copies=1.5),
    "wan5b": AdapterConfig(3072, 30, fixed_norm=True),
}


@dataclass(frozen=True)
class ControlNetConfig(DiTConfig):
    """Its generator's config, and how its trajectories are painted."""

    maps: Maps = "outline"


class FixedNorm(nn.Module):
    """Norms channels of trajectory latents [B, C, F, H, W] by statistics of many clips: lines do not depend on area."""

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class ResNetBlock(nn.Module):
    """A 3x3 convolution in space and one of 3 frames in time, with a skip; then a projection to the DiT's width."""

    def __init__(self, hidden: int, dim: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(8, hidden) for _ in range(3))
        self.space = nn.Conv3d(hidden, hidden, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(hidden, hidden, (3, 1, 1))
        self.project = nn.Linear(hidden, dim)  # the zero-initialised 1x1 convolution, on tokens

    def forward(self, h: Tensor, split: TokenSplit) -> tuple[Tensor, Tensor]:
        """h [B, hidden, F, h, w] -> the next h, and this block's residual [B, N, dim]."""
        y = self.space(F.silu(self.norm1(h)))
        # Not padded by Conv3d: for two frames in bfloat16 oneDNN then leaves a part of the weight's gradient unwritten.
        h = h + self.time(F.pad(F.silu(self.norm2(y)), (0, 0, 0, 0, 1, 1)))
        tokens = F.silu(self.norm3(h)).flatten(2).transpose(1, 2)
        return h, self.project(split.own_tokens(tokens, h.shape[2]))


class ResNetAdapter(nn.Module):
    """The light adapter (paper: base + adapter = 5.02B). It reads the trajectory alone, so it runs once a clip.

    With `copies`, a habit of the small preset: maps of pixels show nearly what later frames are to look like, and a
    network so small takes hours to pass that on. So the generator's output is what is to be added to them.
    """

    static = True  # its output depends on neither x, t nor text
    split = TokenSplit()  # `prepare` gives another where processes share a video

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        # Most of a map is black, whose latent is far from 0: without a norm, constants drown the lines.
        c = config.channels
        self.norm = FixedNorm(c) if config.fixed_norm else nn.GroupNorm(c, c)
        # Every frame has frame 0's masks beside its own map, so identity needs no long reach in time.
        self.patch_embedding = nn.Linear(2 * c * config.patch[1] * config.patch[2], config.hidden)
        self.blocks = nn.ModuleList(ResNetBlock(config.hidden, config.dim) for _ in range(config.layers))
        init_xavier(self.patch_embedding)
        for block in () if self.patch_embedding.weight.is_meta else self.blocks:  # there, weights are about to be read
            for layer in (block.space, block.time):
                nn.init.kaiming_normal_(layer.weight)
            for parameter in (block.space.bias, block.time.bias, *block.project.parameters()):
                nn.init.zeros_(parameter)
        self.copies = config.copies if config.maps == "pixels" else 0.0
        if self.copies:
            self.register_buffer("black", torch.zeros(c, 1, 1, 1))  # latents of a black map

    def fit(self, latents: Sequence[Tensor]) -> None:
        """Set what is fixed from trajectory latents [B, C, F, H, W] of several clips. Most of a frame 0 is black."""
        channels = [traj.float().transpose(0, 1) for traj in latents]  # (C, B, F, H, W) each, perhaps of several shapes
        if self.config.fixed_norm:
            std, mean = torch.std_mean(torch.cat([x.flatten(1) for x in channels], dim=1), 1)
            self.norm.mean.copy_(mean.view(-1, 1, 1, 1))
            self.norm.std.copy_(std.clamp_min(1e-6).view(-1, 1, 1, 1))
        if self.copies:
            first = torch.cat([x[:, :, 0].flatten(1) for x in channels], dim=1)  # (C, n)
            self.black.copy_(first.median(1).values.view(-1, 1, 1, 1))

    def forward(self, traj: Tensor, *_x_t_text: Tensor) -> list[Tensor]:
        """Residuals for each DiT block, [B, N, dim], from traj [B, C, F, H, W]. x, t and text are not read."""
        return list(self.residuals(traj))

    def residuals(self, traj: Tensor, *_x_t_text: Tensor) -> Iterator[Tensor]:
        """The same one by one, each made when it is asked for."""
        traj, (_, q, r) = self.norm(traj), self.config.patch
        traj = torch.cat([traj, traj[:, :, :1].expand_as(traj)], dim=1)
        tokens = rearrange(traj, "b c f (h q) (w r) -> b f h w (c q r)", q=q, r=r)
        h = rearrange(self.patch_embedding(tokens), "b f h w c -> b c f h w")
        for block in self.blocks:
            h, residual = block(h, self.split)
            yield residual

    def shown(self, traj: Tensor, picture: Tensor) -> Shown | None:
        """What the maps of a picture, latent [B, C, 1, H, W], show, if the generator's output is to be added to it."""
        if not self.copies:
            return None
        frames = traj + self.copies * traj[:, :, :1]  # no longer differences from the maps' frame 0
        drawn = ((frames - self.copies * self.black).abs() > 0.1).any((1, 3, 4), keepdim=True)  # files round `black`
        moved, objects = frames - self.copies * picture, (traj[:, :, :1] - self.black).abs() > 0.05
        free = (moved.abs() > 0.05).any(1, keepdim=True) | objects.any(1, keepdim=True)
        free = F.max_pool3d(free.float(), (1, 2 * REACH + 1, 2 * REACH + 1), stride=1, padding=(0, REACH, REACH))
        return Shown(moved, free, drawn)


class ControlNetAdapter(VideoDiT):
    """The heavy adapter (paper: base + adapter = 10.28B): a copy of the generator that sees the trajectory too."""

    static = False  # its output depends on the noisy latent, so it runs at every step

    def __init__(self, config: ControlNetConfig):
        super().__init__(config)
        del self.head
        inputs = 2 * config.channels * (1 + config.sees_first)  # latent and trajectory, and then frame 0 of both
        self.patch_embedding = PatchEmbedding(inputs, config.patch, config.dim)
        self.project = nn.ModuleList(nn.Linear(config.dim, config.dim) for _ in range(config.layers))
        init_xavier(self.patch_embedding)
        for parameter in self.project.parameters():
            nn.init.zeros_(parameter)

    @torch.no_grad()
    def copy_generator(self, generator: VideoDiT) -> None:
        """Start from a generator's weights; those for the trajectory's channels start at zero."""
        own = {name: value for name, value in generator.state_dict().items() if not name.startswith("head.")}
        parts = own["patch_embedding.weight"].split(self.config.channels, dim=1)  # the latent's, and perhaps frame 0's
        own["patch_embedding.weight"] = torch.cat([w for part in parts for w in (part, torch.zeros_like(part))], dim=1)
        self.load_state_dict(own | {f"project.{n}": p for n, p in self.project.state_dict().items()})

    def forward(self, traj: Tensor, x: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
        """traj, x [B,C,F,H,W], t [B,F], text [B,L,text_dim] -> one residual [B,N,dim] per DiT block."""
        return list(self.residuals(traj, x, t, text))

    def residuals(self, traj: Tensor, x: Tensor, t: Tensor, text: Tensor) -> Iterator[Tensor]:
        """The same one by one, each made when it is asked for: so the memory never holds all of them."""
        tokens, _, e, text, rope = self.embed(torch.cat([x, traj.to(x)], dim=1), t, text)
        for block, project in zip(self.blocks, self.project, strict=True):
            tokens = block(tokens, e, text, rope)
            yield project(tokens.type_as(text))


Adapter = ResNetAdapter | ControlNetAdapter


def with_adapter(generator: VideoDiT, adapter: Adapter | None, text: Tensor, traj: Tensor) -> flow.Velocity:
    """The generator's velocity with an adapter's residuals: those of a static one are made once, for all calls."""
    if adapter is None:
        return partial(generator, text=text)
    if adapter.static:
        residuals = adapter(traj)
        return lambda x, t, **more: generator(x, t, text, residuals, adapter.shown(traj, x[:, :, :1]), **more)
    return lambda x, t: generator(x, t, text, adapter(traj, x, t, text))


def sample_clips(
    generator: VideoDiT, adapters: Sequence[Adapter | None], sampling: flow.Sampling, seed: int, batch: Batch,
    samples: Sequence[int], euler: bool = False,
) -> list[Tensor]:  # fmt: skip
    """Latents of videos with the clips' first frames, texts and trajectories: for each adapter, where None is without.

    `samples`: the clips' numbers, which fix the noise. `euler`: by Euler steps, not by the few-step sampler.
    """
    (steps, shift, _), first, shape = sampling, batch.x0[:, :, :1], batch.x0.shape[1:]
    noise = sample_noise(shape, samples, seed) if euler else step_noise(steps, shape, samples, seed)
    sampler, noise = flow.sample_multistep if euler else flow.sample_fewstep, send(noise, first.device)
    velocities = (with_adapter(generator, adapter, batch.text, batch.traj) for adapter in adapters)
    return [sampler(velocity, first, noise, flow.sigma_schedule(steps, shift)) for velocity in velocities]


def check_fit(adapter: Adapter, path: Path | str, generator: VideoDiT, generator_path: Path | str) -> None:
    """UserError unless the adapter's output has the generator's shape, and its input is of the same codec."""
    own, wanted = ([getattr(n.config, k) for k in ("dim", "layers", "channels", "patch")] for n in (adapter, generator))
    require(own == wanted, f"{path}: was made for a generator of other shape than {generator_path}; {OTHER_FILE}")


def read_adapter(
    path: Path | str, network: str, dtype: torch.dtype = torch.float32, shapes_only: bool = False
) -> Adapter:
    """The adapter in an own export, of either kind. `network`: the name it must carry. `shapes_only` as in `load`.

    `dtype` is a ControlNetAdapter's; a ResNetAdapter stays in float32, because it is small and runs once.
    """
    config, tensors = read_network(path, network, AdapterConfig, ControlNetConfig)
    if isinstance(config, AdapterConfig):
        return load(lambda: ResNetAdapter(config), tensors, path, shapes_only=shapes_only)
    return load(lambda: ControlNetAdapter(config), tensors, path, dtype, shapes_only)


def read_maps(path: Path | str, network: str) -> Maps:
    """How an adapter's trajectories are painted, from its file's header. UserError as in `read_adapter`."""
    return read_network(path, network, AdapterConfig, ControlNetConfig)[0].maps
