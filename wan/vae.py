"""The Wan2.2 VAE: videos to latents with 48 channels, 16 times smaller in space and 4 times in time, and back.

It is causal: frame 0 becomes one latent frame, and so do every four frames after it. So a video streams through, a
latent frame at a time, and layers keep what they need of the past in a `Stream`. Names are those of `Wan2.2_VAE.pth`.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from core.config import require
from core.parallel import Processes
from core.weights import load, read_checkpoint, read_config, read_folder, rename
from wan.published import vae_names
from wan.stream import Stream

# Statistics of the latents, per channel, as published: the DiT works on (z - MEAN) / STD.
MEAN = (-0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
        -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
        0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
        0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667)  # fmt: skip
STD = (0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
       0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
       0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
       0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744)  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    """Sizes of a WanVAE; the defaults are Wan2.2's."""

    width: int = 160  # of the encoder at full resolution
    decoder_width: int = 256
    channels: int = 48  # of the latent
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of the width, per level
    blocks: int = 2  # residual blocks per level of the encoder; the decoder has one more
    temporal: tuple[bool, ...] = (False, True, True)  # which of the encoder's downsamplings halve time too
    patch: int = 2  # side of the pixel squares that become channels before anything else


class Layers(nn.Sequential):
    """Layers one after the other; those with a memory get the stream."""

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        streamed = (Layers, CausalConv3d, ResidualBlock, Downsample, Upsample, DownBlock, UpBlock)
        for layer in self:
            x = layer(x, stream) if isinstance(layer, streamed) else layer(x)
        return x


class CausalConv3d(nn.Conv3d):
    """A convolution over three frames that doesn't see the future: [B,C,T,H,W] -> the same T. T is 1 for frame 0."""

    def __init__(self, inputs: int, outputs: int, side: int = 3):
        super().__init__(inputs, outputs, (3, side, side), padding=(0, side // 2, side // 2))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if stream.first:  # all before frame 0 is zero
            stream.keep(self, F.pad(x, (0, 0, 0, 0, 1, 0)))
            return F.conv3d(x, self.weight[:, :, -1:], self.bias, padding=self.padding)
        x = torch.cat([stream.take(self, x, 2), x], dim=2)
        stream.keep(self, x[:, :, -2:])
        # On a GPU, Winograd's way would move more memory than it saves in products. It takes frames in pairs.
        paired = self.kernel_size == (3, 3, 3) and x.device.type == "cpu" and x.shape[2] % 2 == 0
        return conv_pairs(x, self.weight, self.bias) if paired else super().forward(x)


def conv_pairs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A 3x3x3 convolution by Winograd's F(2, 3) along time: [B,C,T+2,H,W] -> [B,O,T,H,W], T even."""
    length = x.shape[2] - 2
    # Two output frames see four input frames, d0 to d3. They take four 2D convolutions instead of six.
    d0, d1, d2, d3 = (x[:, :, n : n + length - 1 : 2] for n in range(4))
    first, middle, last = weight.unbind(2)
    outer, middle = (first + last) / 2, middle / 2
    a = by_frame(F.conv2d, d0 - d2, first, padding=1)
    b = by_frame(F.conv2d, d1 + d2, outer + middle, bias, padding=1)
    c = by_frame(F.conv2d, d2 - d1, outer - middle, padding=1)
    d = by_frame(F.conv2d, d1 - d3, last, padding=1)
    shape = (len(x), len(weight), length, *x.shape[3:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    out[:, :, ::2] = a.add_(b).add_(c)
    out[:, :, 1::2] = b.sub_(c).sub_(d)
    return out


def doubling_kernel(weight: Tensor) -> Tensor:
    """What `double_and_conv` needs of a 3x3 convolution's weight: [O,C,3,3] -> [4 O,C,2,2]."""
    # Of three neighbouring new pixels two are copies of one old pixel, so the weights add up to a 2x2 kernel.
    sums = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]).to(weight)  # [new pixel, old pixel, weight]
    return torch.einsum("aru,bsv,ocuv->abocrs", sums, sums, weight).flatten(0, 2)


def double_and_conv(x: Tensor, kernel: Tensor, bias: Tensor) -> Tensor:
    """Nearest-neighbour upsampling by 2, then a 3x3 convolution: [n,C,h,w] -> [n,O,2h,2w]."""
    (n, _, h, w), width = x.shape, len(bias)
    parts = F.conv2d(x, kernel, bias.repeat(4), padding=1).split(width, dim=1)  # (n, O, h + 1, w + 1) each
    out = torch.empty(n, width, 2 * h, 2 * w, dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
    for (a, b), part in zip(product(range(2), repeat=2), parts, strict=True):
        out[:, :, a::2, b::2] = part[:, :, a : a + h, b : b + w]
    return out


class RMSNorm(nn.Module):
    """RMS norm over the channels of every position; gamma is [C, 1, 1(, 1)], as published."""

    def __init__(self, width: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        return (x * (x.shape[1] ** 0.5 / size).type_as(x)).mul_(self.gamma)


class AttentionBlock(nn.Module):
    """Self-attention within each frame, with one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width, axes=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        frames = rearrange(x, "b c t h w -> (b t) c h w")
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (s c) h w -> s n 1 (h w) c", s=3)
        seen = rearrange(F.scaled_dot_product_attention(q, k, v), "n 1 (h w) c -> n c h w", h=x.shape[3])
        return x + rearrange(self.proj(seen), "(b t) c h w -> b c t h w", b=len(x))


class ResidualBlock(nn.Module):
    """Twice norm, SiLU and convolution, plus a skip connection."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.residual = Layers(
            RMSNorm(inputs), nn.SiLU(inplace=True), CausalConv3d(inputs, outputs),
            RMSNorm(outputs), nn.SiLU(inplace=True), nn.Identity(), CausalConv3d(outputs, outputs),
        )  # fmt: skip
        self.shortcut = nn.Identity() if inputs == outputs else nn.Conv3d(inputs, outputs, 1)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return self.shortcut(x) + self.residual(x, stream)


def residual_blocks(inputs: int, outputs: int, number: int) -> list[ResidualBlock]:
    """Residual blocks, the first of which changes the width."""
    return [ResidualBlock(a, b) for a, b in pairwise([inputs] + [outputs] * number)]


class Downsample(nn.Module):
    """Halves height and width, and the frames if `temporal`: frame 0 stays, then each pair becomes one."""

    def __init__(self, width: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = by_frame(self.resample, x)
        if self.time_conv is not None:
            last = x[:, :, -1:]
            if not stream.first:
                x = self.time_conv(torch.cat([stream.take(self, x, 1), x], dim=2))
            stream.keep(self, last)
        return x


class Upsample(nn.Module):
    """Doubles height and width, and the frames if `temporal`: all but frame 0 become two."""

    def __init__(self, width: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(width, width, 3, padding=1))
        self.time_conv = CausalConv3d(width, 2 * width, 1) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None:
            if stream.first:  # the convolution starts after frame 0, with zeros before it
                stream.keep(self.time_conv, torch.cat([x, x], dim=2).zero_())
            else:
                x = rearrange(self.time_conv(x, stream), "b (p c) t h w -> b c (t p) h w", p=2)
        conv = self.resample[1]
        if self not in stream.kernels:
            stream.kernels[self] = doubling_kernel(conv.weight)
        return by_frame(double_and_conv, x, stream.kernels[self], conv.bias)


class DownBlock(nn.Module):
    """A level of the encoder: residual blocks and downsampling, plus the mean of the pixels that become one."""

    def __init__(self, inputs: int, outputs: int, blocks: int, temporal: bool | None):
        super().__init__()
        self.outputs, self.space, self.time = outputs, 1 if temporal is None else 2, 2 if temporal else 1
        resample = [] if temporal is None else [Downsample(outputs, temporal)]
        self.downsamples = Layers(*residual_blocks(inputs, outputs, blocks), *resample)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        skip = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time, 0))  # frame 0 pairs with zeros before it
        skip = rearrange(skip, "b c (t p) (h q) (w r) -> b (c p q r) t h w", p=self.time, q=self.space, r=self.space)
        return self.downsamples(x, stream) + reduce(skip, "b (c g) t h w -> b c t h w", "mean", c=self.outputs)


class UpBlock(nn.Module):
    """A level of the decoder: residual blocks and upsampling, plus the input's channels repeated as new pixels."""

    def __init__(self, inputs: int, outputs: int, blocks: int, temporal: bool | None):
        super().__init__()
        self.double, self.time = temporal is not None, 2 if temporal else 1
        self.copies = outputs * self.time * 4 // inputs
        resample = [Upsample(outputs, temporal)] if self.double else []
        self.upsamples = Layers(*residual_blocks(inputs, outputs, blocks), *resample)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        out = self.upsamples(x, stream)
        if not self.double:
            return out
        skip = x.repeat_interleave(self.copies, dim=1)
        skip = rearrange(skip, "b (c p q r) t h w -> b c (t p) (h q) (w r)", p=self.time, q=2, r=2)
        return out + skip[:, :, skip.shape[2] - out.shape[2] :]  # frame 0 became one frame, not `time`


def by_frame(function: Callable[..., Tensor], x: Tensor, *more: Tensor, **options: int) -> Tensor:
    """Apply a function of images [n, C, h, w], which takes more than these, to every frame of a video."""
    frames = function(rearrange(x, "b c t h w -> (b t) c h w"), *more, **options)
    return rearrange(frames, "(b t) c h w -> b c t h w", b=len(x))


class Encoder(Layers):
    """Patches of pixels to the mean and log variance of latents: [B, 3 p p, T, h, w] -> [B, 2 C, F, h / 8, w / 8]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.width * m for m in (1, *config.multipliers)]
        levels = zip(pairwise(widths), (*config.temporal, None), strict=True)  # the last level isn't resampled
        self.conv1 = CausalConv3d(3 * config.patch**2, widths[0])
        self.downsamples = Layers(*(DownBlock(*width, config.blocks, temporal) for width, temporal in levels))
        self.middle = middle(widths[-1])
        self.head = Layers(RMSNorm(widths[-1]), nn.SiLU(inplace=True), CausalConv3d(widths[-1], 2 * config.channels))


class Decoder(Layers):
    """Latents to patches of pixels: [B, C, F, H, W] -> [B, 3 p p, T, 8 H, 8 W]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.decoder_width * m for m in (config.multipliers[-1], *reversed(config.multipliers))]
        levels = zip(pairwise(widths), (*reversed(config.temporal), None), strict=True)
        self.conv1 = CausalConv3d(config.channels, widths[0])
        self.middle = middle(widths[0])
        self.upsamples = Layers(*(UpBlock(*width, config.blocks + 1, temporal) for width, temporal in levels))
        self.head = Layers(RMSNorm(widths[-1]), nn.SiLU(inplace=True), CausalConv3d(widths[-1], 3 * config.patch**2))


def middle(width: int) -> Layers:
    """The lowest level of encoder and decoder."""
    return Layers(ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """MEAN and STD [C, 1, 1, 1], on the device and in the dtype of x."""
    return tuple(torch.tensor(v).to(x)[:, None, None, None] for v in (MEAN, STD))


class WanVAE(nn.Module):
    """The autoencoder. Neither `encode` nor `decode` tracks gradients."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.spatial, self.temporal = config.patch * 2 ** len(config.temporal), 2 ** sum(config.temporal)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.conv1 = nn.Conv3d(2 * config.channels, 2 * config.channels, 1)
        self.conv2 = nn.Conv3d(config.channels, config.channels, 1)

    @classmethod
    def from_pretrained(cls, path: Path, config: VAEConfig = VAEConfig()) -> "WanVAE":
        """Read the published file `Wan2.2_VAE.pth`, whose sizes are `config`'s, or the folder `vae/` of diffusers."""
        if not path.is_dir():
            return load(lambda: cls(config), read_checkpoint(path), path)
        file, statistics = path / "config.json", {"latents_mean": list(MEAN), "latents_std": list(STD)}
        theirs = statistics | read_config(file)
        mend = "give the vae folder of Wan2.2-TI2V-5B-Diffusers"
        for name, ours in {"_class_name": "AutoencoderKLWan", "is_residual": True, **statistics}.items():
            require(theirs.get(name) == ours, f"{file}: {name} is not that of Wan2.2; {mend}")
        names = ("base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks", "temperal_downsample",
                 "patch_size")  # in VAEConfig's order  # fmt: skip
        values = map(read_config(file, *names).get, names)
        config = VAEConfig(*(tuple(value) if isinstance(value, list) else value for value in values))
        tensors = rename(read_folder(path, "diffusion_pytorch_model"), vae_names(config.blocks))
        return load(lambda: cls(config), tensors, path)

    @torch.no_grad()
    def encode(self, video: Tensor) -> Tensor:
        """Normalised latents, without sampling: [B,3,T,h,w] in [-1, 1] -> [B,C,F,h/16,w/16]."""
        stream, latents, side = Stream(), [], self.config.patch
        for part in stream.chunks(video.tensor_split(list(range(1, video.shape[2], self.temporal)), dim=2)):
            part = part.to(self.conv1.weight)  # the whole may be too large for the device
            part = rearrange(part, "b c t (h q) (w r) -> b (c r q) t h w", q=side, r=side)
            z = self.conv1(self.encoder(part.contiguous(memory_format=torch.channels_last_3d), stream))
            latents.append(z[:, : self.config.channels].to(video.dtype))
        mean, std = statistics(latents[0])
        return (torch.cat(latents, dim=2) - mean) / std

    @torch.no_grad()
    def frames(self, latents: Tensor, procs: Processes | None = None) -> Iterator[Tensor]:
        """The video [B,3,t,h,w] in [-1, 1] in pieces as they are decoded, one latent frame's each.

        `procs`: processes that all have these latents and take the pieces in turn; each gives its own.
        """
        mean, std = statistics(latents)
        parts = (latents * std + mean).to(self.conv2.weight).split(1, dim=2)
        stream, side = Stream(procs), self.config.patch
        for part in stream.chunks(parts):
            x = self.decoder(self.conv2(part).to(memory_format=torch.channels_last_3d), stream).clamp(-1, 1)
            yield rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=side, r=side)

    def decode(self, latents: Tensor, tile: int = 0) -> Tensor:
        """Decodes normalised latents: [B,C,F,H,W] -> [B,3,T,16 H,16 W] in [-1, 1] in host memory, T = 4 (F - 1) + 1.

        `tile`: to save memory, decode squares of this many latent positions one by one.
        """
        n, _, length, height, width = latents.shape
        scale = self.spatial
        video = latents.new_zeros(n, 3, self.temporal * (length - 1) + 1, scale * height, scale * width, device="cpu")
        for (y, fade_y), (x, fade_x) in product(tiles(height, tile, scale), tiles(width, tile, scale)):
            fade, start = (fade_y[:, None] * fade_x).to(video), 0
            target = video[..., scale * y.start : scale * y.stop, scale * x.start : scale * x.stop]
            for part in self.frames(latents[..., y, x]):
                target[:, :, start : start + part.shape[2]].addcmul_(fade, part.to(video))
                start += part.shape[2]
        return video


def tiles(length: int, tile: int, scale: int) -> list[tuple[slice, Tensor]]:
    """Tiles of an axis of `length` latent positions, with weights for their pixels that add up to 1 at every pixel.

    Neighbours share a quarter of a tile, where one fades into the other. `scale`: pixels per latent position.
    """
    tile = min(tile or length, length)
    starts = sorted({min(n, length - tile) for n in range(0, length, tile - tile // 4)})
    pixels = torch.arange(scale * length) + 0.5
    # For each tile the distance of every pixel from its edge, constant beyond what neighbours share.
    distances = [torch.minimum(pixels - scale * n, scale * (n + tile) - pixels) for n in starts]
    weights = torch.stack(distances).clamp(0, scale * tile // 4)
    weights /= weights.sum(0)
    return [(slice(n, n + tile), w[scale * n : scale * (n + tile)]) for n, w in zip(starts, weights, strict=True)]
