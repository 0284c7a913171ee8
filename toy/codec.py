"""The toy world's codec: a small learned autoencoder of single frames, and a fixed embedding of words."""

import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.codec import Codec
from core.config import ROOT
from core.parallel import Processes
from core.weights import load, read_network


@dataclass(frozen=True)
class AutoencoderConfig:
    """Shapes of a ToyAutoencoder."""

    spatial: int = 4  # pixels per latent position, each way
    channels: int = 16  # of the latent
    hidden: int = 64  # width of the decoder
    depth: int = 3  # residual blocks of the decoder
    fine: int = 24  # width of the decoder at full resolution
    change: float = 1.5  # factor of the frames after the first, for variance 1 where things move


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions and a skip: [B, width, H, W] -> the same shape."""

    def __init__(self, width: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width, 3, padding=1) for _ in range(2))

    def forward(self, h: Tensor) -> Tensor:
        return h + self.convs[1](F.silu(self.convs[0](F.silu(h))))


class ToyAutoencoder(nn.Module):
    """Frames to latents and back. The encoder is linear, principal components of patches, so latents change as smoothly
    as pixels do. The decoder is its linear inverse plus a network for what was lost.

    `encoder`: [B, 3, height, width] in [-1, 1] -> [B, channels, height / spatial, width / spatial].
    """

    def __init__(self, config: AutoencoderConfig):
        super().__init__()
        self.config = config
        width, values = config.hidden, 3 * config.spatial**2
        self.encoder = nn.Sequential(nn.PixelUnshuffle(config.spatial), nn.Conv2d(values, config.channels, 1))
        self.linear = nn.Sequential(nn.Conv2d(config.channels, values, 1), nn.PixelShuffle(config.spatial))
        self.detail = nn.Sequential(
            nn.Conv2d(config.channels, width, 3, padding=1),
            *(ResidualBlock(width) for _ in range(config.depth)),
            nn.SiLU(),
            nn.Conv2d(width, config.fine * config.spatial**2, 1),
            nn.PixelShuffle(config.spatial),
            nn.SiLU(),
            nn.Conv2d(config.fine, config.fine, 3, padding=1),
            nn.SiLU(),
            nn.Conv2d(config.fine, 3, 3, padding=1),
        )

    @torch.no_grad()
    def fit_linear(self, frames: Tensor) -> None:
        """Set the encoder to the principal components of frames [B, 3, height, width], and `linear` to its inverse.

        Each component is divided by the square root of its standard deviation, then all by one number that makes their
        mean variance 1. Coarse components stay stronger, and so emerge first from noise.
        """
        patches = self.encoder[0](frames).transpose(0, 1).flatten(1).double()  # (values, n)
        mean = patches.mean(1)
        variance, axes = torch.linalg.eigh(patches.cov())  # ascending
        variance, axes = variance.flip(0)[: self.config.channels], axes.flip(1)[:, : self.config.channels]
        scale = variance**-0.25
        scale = scale / (variance * scale**2).mean().sqrt()
        down, up = scale[:, None] * axes.T, axes / scale
        self.encoder[1].weight.copy_(down[..., None, None])
        self.encoder[1].bias.copy_(-down @ mean)
        self.linear[0].weight.copy_(up[..., None, None])
        self.linear[0].bias.copy_(mean)

    def pixel_weight(self) -> Tensor:
        """How much an error of each channel shows in pixels, [channels, 1, 1, 1]: the root of the energy it makes."""
        return self.linear[0].weight.flatten(1).norm(dim=0).view(-1, 1, 1, 1)

    def decode(self, latents: Tensor) -> Tensor:
        """[B, channels, H, W] -> [B, 3, spatial * H, spatial * W], not clamped."""
        return self.linear(latents) + self.detail(latents)


class ToyCodec(Codec):
    """One latent frame per video frame: frame 0's own, and the difference of each later one from it, so that what stays
    is zero. A word becomes a random vector seeded by its bytes, next to the mean vector of its clause (words between
    commas) plus one for the clause's place: "clockwise" then carries which object it is about, as from a real encoder.
    """

    temporal, area, text_dim, text_tokens = 1, 128 * 224, 64, 32
    fps = 8
    weights = ROOT / "checkpoints/small/codec.safetensors"
    learned_on: ClassVar[dict] = {"size": (64, 64), "frames": 5}  # what stages 1 to 3 read, to save time

    def __init__(self, weights: Path | str = ""):
        self.weights = Path(weights or self.weights)
        config, tensors = read_network(self.weights, "ToyAutoencoder", AutoencoderConfig)
        self.network = load(lambda: ToyAutoencoder(config), tensors, self.weights).eval().requires_grad_(False)
        self.channels, self.spatial = config.channels, config.spatial

    def files(self) -> list[Path]:
        return [self.weights]

    def encode_video(self, video: Tensor) -> Tensor:
        """[B, 3, T, height, width] in [-1, 1] -> [B, channels, T, height / spatial, width / spatial]."""
        latents = self._by_frame(self.network.encoder, video)
        first, later = latents[:, :, :1], latents[:, :, 1:]
        return torch.cat([first, self.network.config.change * (later - first)], 2)

    def decode_video(self, latents: Tensor) -> Tensor:
        """[B, channels, T, H, W] -> [B, 3, T, spatial * H, spatial * W], clamped to [-1, 1]."""
        return torch.cat(list(self.pieces(latents, length=latents.shape[2])), 2)

    def pieces(self, latents: Tensor, procs: Processes | None = None, length: int = 8) -> Iterator[Tensor]:
        """The frames of `decode_video`, this many at a time, on rank 0; WanCodec's come from processes in turn."""
        first, later = latents[:, :, :1].float(), latents[:, :, 1:].float()
        frames = torch.cat([first, first + later / self.network.config.change], 2)
        if procs is None or procs.rank == 0:
            for part in frames.split(length, 2):
                yield self._by_frame(self.network.decode, part).clamp(-1, 1)

    def _by_frame(self, function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        device = self.network.linear[0].weight.device
        with torch.no_grad(), torch.autocast(device.type, enabled=False):
            frames = function(x.float().to(device).transpose(1, 2).flatten(0, 1))
        return frames.unflatten(0, (len(x), -1)).transpose(1, 2).contiguous()

    def text_encoder(self) -> Callable[[list[str]], Tensor]:
        """`encode_text`; WanCodec reads its text encoder from disk here."""
        return self.encode_text

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompts -> [B, L, text_dim], zeros after the last word. Words past `text_tokens` are dropped."""
        out = torch.zeros(len(prompts), self.text_tokens, self.text_dim)
        for row, prompt in zip(out, prompts, strict=True):
            slots = iter(row)
            for number, clause in enumerate(prompt.lower().split(",")):
                words = [word_vector(word, self.text_dim // 2) for word in clause.split()]
                place = word_vector(f"clause {number}", self.text_dim // 2)
                for word, slot in zip(words, slots, strict=False):  # the slots may end first
                    slot[:] = torch.cat([word, torch.stack(words).mean(0) * len(words) ** 0.5 + place])
        return out


@lru_cache(maxsize=1024)
def word_vector(word: str, dim: int) -> Tensor:
    return torch.randn(dim, generator=torch.Generator().manual_seed(zlib.crc32(word.encode())))
