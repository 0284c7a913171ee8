"""Trajectory adapters: networks that read the drawn trajectory and add one residual to every block of a VideoDiT.

An adapter has as many blocks as the DiT. Block i's output passes a projection that starts at zero and is added to the
output of DiT block i, so a fresh adapter changes nothing, to the bit.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.config import UserError
from core.parallel import own_tokens
from core.weights import load, read_network
from flow import Velocity
from model import OTHER_FILE, DiTConfig, PatchEmbedding, VideoDiT, init_xavier
from trajectory import Maps


@dataclass(frozen=True)
class AdapterConfig:
    """Shapes of a ResNetAdapter."""

    dim: int  # width of the DiT it serves
    layers: int  # of the DiT, and so of the adapter
    hidden: int = 128
    channels: int = 48  # of the trajectory latent
    patch: tuple[int, int, int] = (1, 2, 2)
    fixed_norm: bool = False  # trajectory latents normed by fixed statistics, not by the clip's own
    maps: Maps = "outline"  # how the trajectories that it reads are painted: Trajectory.maps


PRESETS = {
    "small": AdapterConfig(256, 6, hidden=192, channels=24, fixed_norm=True, maps="pixels"),
    "wan5b": AdapterConfig(3072, 30, fixed_norm=True),
}


@dataclass(frozen=True)
class ControlNetConfig(DiTConfig):
    """That of the generator which a ControlNetAdapter serves, and how its trajectories are painted."""

    maps: Maps = "outline"


class FixedNorm(nn.Module):
    """Channels of trajectory latents to mean 0 and deviation 1, by statistics of many: a line weighs the same however
    much of the picture the boxes cover. [B, C, F, H, W] -> the same shape.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(channels, 1, 1, 1))
        self.register_buffer("std", torch.ones(channels, 1, 1, 1))

    @torch.no_grad()
    def fit(self, latents: Iterable[Tensor]) -> None:
        """Set the statistics from trajectory latents [B, C, F, H, W], which may be of several shapes."""
        values = torch.cat([traj.float().transpose(0, 1).flatten(1) for traj in latents], dim=1)  # (C, n)
        std, mean = torch.std_mean(values, 1)
        self.mean.copy_(mean.view(-1, 1, 1, 1))
        self.std.copy_(std.clamp_min(1e-6).view(-1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std


class ResNetBlock(nn.Module):
    """A 3x3 convolution in space, then one of 3 frames in time, with a skip; and the projection to the DiT's width."""

    group = None  # processes that share a video's tokens

    def __init__(self, hidden: int, dim: int):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.GroupNorm(8, hidden) for _ in range(3))
        self.space = nn.Conv3d(hidden, hidden, (1, 3, 3), padding=(0, 1, 1))
        self.time = nn.Conv3d(hidden, hidden, (3, 1, 1))
        self.project = nn.Linear(hidden, dim)  # the zero-initialised 1x1 convolution, on tokens

    def forward(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """h [B, hidden, F, h, w] -> the next h, and this block's residual [B, N, dim]."""
        y = self.space(F.silu(self.norm1(h)))
        # Where Conv3d itself pads two frames in bfloat16, oneDNN leaves a part of the weight's gradient unwritten.
        h = h + self.time(F.pad(F.silu(self.norm2(y)), (0, 0, 0, 0, 1, 1)))
        tokens = F.silu(self.norm3(h)).flatten(2).transpose(1, 2)
        return h, self.project(own_tokens(tokens, h.shape[2], self.group))


class ResNetAdapter(nn.Module):
    """The light adapter (paper: base + adapter = 5.02B). It reads only the trajectory: it runs once a clip."""

    static = True  # its output depends on neither x, t nor text

    def __init__(self, config: AdapterConfig):
        super().__init__()
        self.config = config
        # A codec's latent of black is far from 0 and most of a map is black: without this, constants drown the lines.
        norm = FixedNorm if config.fixed_norm else partial(nn.GroupNorm, config.channels)
        self.norm = norm(config.channels)
        # Every frame sees its own map beside frame 0's masks, so identity needs no long reach in time.
        self.patch_embedding = nn.Linear(2 * config.channels * config.patch[1] * config.patch[2], config.hidden)
        self.blocks = nn.ModuleList(ResNetBlock(config.hidden, config.dim) for _ in range(config.layers))
        if not self.patch_embedding.weight.is_meta:  # there, weights are about to be read
            self.init_weights()

    def init_weights(self) -> None:
        """He initialisation for convolutions, zero for every block's projection."""
        nn.init.xavier_uniform_(self.patch_embedding.weight)
        nn.init.zeros_(self.patch_embedding.bias)
        for block in self.blocks:
            for layer in (block.space, block.time):
                nn.init.kaiming_normal_(layer.weight)
                nn.init.zeros_(layer.bias)
            nn.init.zeros_(block.project.weight)
            nn.init.zeros_(block.project.bias)

    def forward(self, traj: Tensor, *_x_t_text: Tensor) -> list[Tensor]:
        """Residuals for each DiT block, [B, N, dim], from traj [B, C, F, H, W]. x, t and text are not read."""
        return list(self.residuals(traj))

    def residuals(self, traj: Tensor, *_x_t_text: Tensor) -> Iterator[Tensor]:
        """The same, each made when it is asked for."""
        traj = self.norm(traj)
        traj = torch.cat([traj, traj[:, :, :1].expand_as(traj)], dim=1)
        _, q, r = self.config.patch
        tokens = rearrange(traj, "b c f (h q) (w r) -> b f h w (c q r)", q=q, r=r)
        h = rearrange(self.patch_embedding(tokens), "b f h w c -> b c f h w")
        for block in self.blocks:
            h, residual = block(h)
            yield residual


class ControlNetAdapter(VideoDiT):
    """The heavy adapter (paper: base + adapter = 10.28B): a copy of the generator, which sees the trajectory's latent
    beside the noisy one and gives each block's output to a projection. It runs at every step.
    """

    static = False  # its output depends on the noisy latent

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
        own = generator.state_dict()
        weight = own["patch_embedding.weight"]
        parts = weight.split(self.config.channels, dim=1)  # the latent's, and perhaps frame 0's
        own["patch_embedding.weight"] = torch.cat([w for part in parts for w in (part, torch.zeros_like(part))], dim=1)
        own = {name: value for name, value in own.items() if not name.startswith("head.")}
        self.load_state_dict(own | {n: p for n, p in self.state_dict().items() if n.startswith("project.")})

    def forward(self, traj: Tensor, x: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
        """traj, x [B,C,F,H,W], t [B,F], text [B,L,text_dim] -> one residual [B,N,dim] per DiT block."""
        return list(self.residuals(traj, x, t, text))

    def residuals(self, traj: Tensor, x: Tensor, t: Tensor, text: Tensor) -> Iterator[Tensor]:
        """The same, each made when it is asked for: then the generator needs no memory for all of them."""
        tokens, _, e, text, rope = self.embed(torch.cat([x, traj.to(x)], dim=1), t, text)
        for block, project in zip(self.blocks, self.project, strict=True):
            tokens = block(tokens, e, text, rope)
            yield project(tokens)


Adapter = ResNetAdapter | ControlNetAdapter


def controlled(generator: VideoDiT, adapter: Adapter, text: Tensor, traj: Tensor) -> Velocity:
    """The generator's velocity with the adapter's residuals: those of a static one are made once, for all calls."""
    if adapter.static:
        return partial(generator, text=text, residuals=adapter(traj))
    return lambda x, t: generator(x, t, text, adapter(traj, x, t, text))


def fits(adapter: Adapter, generator: VideoDiT) -> bool:
    """Is the adapter's output of the generator's shape, and its input of the same codec?"""
    return all(
        getattr(adapter.config, n) == getattr(generator.config, n) for n in ("dim", "layers", "channels", "patch")
    )


def check_fit(adapter: Adapter, path: Path | str, generator: VideoDiT, generator_path: Path | str) -> None:
    """UserError, which names their files, if they don't fit."""
    if not fits(adapter, generator):
        raise UserError(f"{path}: was made for a generator of other shape than {generator_path}; {OTHER_FILE}")


def read_adapter(
    path: Path | str, network: str, dtype: torch.dtype = torch.float32, shapes_only: bool = False
) -> Adapter:
    """The adapter in an own export, of either kind. `network`: the name it must carry. `shapes_only` as for a VideoDiT.

    `dtype` is a ControlNetAdapter's; a ResNetAdapter stays in float32, for it is small and runs once.
    """
    config, tensors = read_network(path, network, AdapterConfig, ControlNetConfig)
    if isinstance(config, AdapterConfig):
        return load(lambda: ResNetAdapter(config), tensors, path, shapes_only=shapes_only)
    return load(lambda: ControlNetAdapter(config), tensors, path, dtype, shapes_only)


def read_maps(path: Path | str, network: str) -> Maps:
    """How the trajectories that an adapter reads are painted, by its file's header. UserError as in `read_adapter`."""
    return read_network(path, network, AdapterConfig, ControlNetConfig)[0].maps
