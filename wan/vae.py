"""The Wan2.2 VAE: videos to latents of 48 channels, 16 times smaller each way and 4 times in time, and back.

Causal in time: frame 0 becomes a latent frame of its own, every four frames after it another (T = 4 n + 1 frames, n + 1
latent frames). So a video streams through in chunks; what a layer needs of the past it finds in a `Stream`. Whole at
once or a latent frame at a time: the same numbers. Parameter names are those of `Wan2.2_VAE.pth`.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise, product
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from core.config import UserError
from core.weights import load, read_checkpoint, read_config, read_folder, rename

# Of the published latents, per channel: what the DiT sees is (z - MEAN) / STD.
MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891, 0.1570,
    -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502, -0.2055, -0.0322,
    0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723, -0.2839, -0.2083, -0.0520,
    0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901, 0.6885, 0.6165,
    0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659, 0.7069, 0.5338, 0.4889, 0.4917,
    0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944, 0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600,
    0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


@dataclass(frozen=True)
class VAEConfig:
    """Shapes of a WanVAE; the defaults are Wan2.2's."""

    width: int = 160  # of the encoder at full resolution
    decoder_width: int = 256
    channels: int = 48  # of the latent
    multipliers: tuple[int, ...] = (1, 2, 4, 4)  # of the width, level by level
    blocks: int = 2  # residual blocks a level of the encoder; the decoder has one more
    temporal: tuple[bool, ...] = (False, True, True)  # which of the encoder's halvings halve time too
    patch: int = 2  # pixels of a square that become channels before anything else


class Stream(dict):
    """What the layers remember of a video between its chunks: layer -> its last input frames. Empty when it starts."""

    def starts(self, layer: nn.Module) -> bool:
        """Is this the layer's first chunk of the video? True once."""
        first = layer not in self
        self[layer] = None
        return first


class CausalConv3d(nn.Conv3d):
    """A convolution that sees the past alone: its first frames have zeros before them. [B,C,T,H,W] -> the same T."""

    def __init__(self, inputs: int, outputs: int, kernel: tuple[int, int, int] = (3, 3, 3)):
        super().__init__(inputs, outputs, kernel, padding=(0, kernel[1] // 2, kernel[2] // 2))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if past := self.kernel_size[0] - 1:
            before = stream.get(self)
            x = F.pad(x, (0, 0, 0, 0, past, 0)) if before is None else torch.cat([before, x], dim=2)
            stream[self] = x[:, :, -past:].clone(memory_format=torch.channels_last_3d)
            if before is None and x.shape[2] == past + 1:  # the video's first frame: all before it is zero
                return F.conv3d(x[:, :, -1:], self.weight[:, :, -1:], self.bias, padding=self.padding)
        return conv_pairs(x, self.weight, self.bias) if self.kernel_size == (3, 3, 3) else super().forward(x)


def conv_pairs(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """A convolution of 3x3x3: [B,C,T+2,H,W] -> [B,O,T,H,W].

    Two frames have four inputs, d0 to d3, and share four products of frames instead of three each: Winograd's F(2, 3)
    along time. An odd number of frames goes the plain way.
    """
    length = x.shape[2] - 2
    if length % 2:
        return F.conv3d(x, weight, bias, padding=(0, 1, 1))
    d0, d1, d2, d3 = (x[:, :, n : n + length - 1 : 2] for n in range(4))
    first, middle, last = weight.unbind(2)
    outer, middle = (first + last) / 2, middle / 2

    def conv(frames: Tensor, kernel: Tensor, bias: Tensor | None = None) -> Tensor:
        return by_frame(lambda y: F.conv2d(y, kernel, bias, padding=1), frames)

    a, b = conv(d0 - d2, first), conv(d1 + d2, outer + middle, bias)
    c, d = conv(d2 - d1, outer - middle), conv(d1 - d3, last)
    shape = (len(x), len(weight), length, *x.shape[3:])
    out = torch.empty(shape, dtype=x.dtype, device=x.device, memory_format=torch.channels_last_3d)
    out[:, :, ::2] = a.add_(b).add_(c)
    out[:, :, 1::2] = b.sub_(c).sub_(d)
    return out


def double_and_conv(frames: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    """Every pixel doubled each way, then a convolution of 3x3: [n,C,h,w] -> [n,O,2h,2w].

    Two of three neighbours of a new pixel are copies of one, so their weights add up: a new pixel sees 2x2 old ones.
    """
    sums = torch.tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]).to(weight)  # new pixel, old one, weight
    kernel = torch.einsum("aru,bsv,ocuv->abocrs", sums, sums, weight).flatten(0, 2)
    (n, _, h, w), width = frames.shape, len(weight)
    parts = F.conv2d(frames, kernel, bias.repeat(4), padding=1).split(width, dim=1)  # a pixel more each way
    shape = (n, width, 2 * h, 2 * w)
    out = torch.empty(shape, dtype=frames.dtype, device=frames.device, memory_format=torch.channels_last)
    for (a, b), part in zip(product(range(2), repeat=2), parts, strict=True):
        out[:, :, a::2, b::2] = part[:, :, a : a + h, b : b + w]
    return out


class RMSNorm(nn.Module):
    """The channels of every position to a root mean square of gamma. gamma [C, 1, 1(, 1)], as published."""

    def __init__(self, width: int, axes: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * axes))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=1, keepdim=True, dtype=torch.float32).clamp_min(1e-12)
        return (x * (x.shape[1] ** 0.5 / size).type_as(x)).mul_(self.gamma)


class AttentionBlock(nn.Module):
    """Each frame's positions attend to one another, with one head."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width, axes=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def attend(self, frames: Tensor) -> Tensor:
        """[n, C, h, w] -> the same shape."""
        q, k, v = rearrange(self.to_qkv(self.norm(frames)), "n (s c) h w -> s n 1 (h w) c", s=3)
        seen = F.scaled_dot_product_attention(q, k, v)
        return self.proj(rearrange(seen, "n 1 (h w) c -> n c h w", h=frames.shape[2]))

    def forward(self, x: Tensor) -> Tensor:
        return x + by_frame(self.attend, x)


class ResidualBlock(nn.Module):
    """Norm, SiLU and convolution, twice, beside a skip."""

    def __init__(self, inputs: int, outputs: int):
        super().__init__()
        self.residual = nn.Sequential(
            RMSNorm(inputs), nn.SiLU(inplace=True), CausalConv3d(inputs, outputs),
            RMSNorm(outputs), nn.SiLU(inplace=True), nn.Dropout(0.0), CausalConv3d(outputs, outputs),
        )  # fmt: skip
        self.shortcut = nn.Identity() if inputs == outputs else CausalConv3d(inputs, outputs, (1, 1, 1))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        return run([self.shortcut], x, stream) + run(self.residual, x, stream)


def residual_blocks(inputs: int, outputs: int, number: int) -> list[ResidualBlock]:
    """The first changes the width."""
    return [ResidualBlock(a, b) for a, b in pairwise([inputs] + [outputs] * number)]


class Downsample(nn.Module):
    """Half the height and width, and half the frames if `temporal`: frame 0 stays, then each pair becomes one."""

    def __init__(self, width: int, temporal: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), nn.Conv2d(width, width, 3, stride=2))
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = by_frame(self.resample, x)
        if self.time_conv is None:
            return x
        before, stream[self] = stream.get(self), x[:, :, -1:].clone()
        if before is not None:
            return self.time_conv(torch.cat([before, x], dim=2))
        return torch.cat([x[:, :, :1], self.time_conv(x)], dim=2) if x.shape[2] > 1 else x


class Upsample(nn.Module):
    """Twice the height and width, and twice the frames if `temporal`, but for frame 0, which stays one."""

    def __init__(self, width: int, temporal: bool):
        super().__init__()
        double = nn.Upsample(scale_factor=2, mode="nearest-exact")
        self.resample = nn.Sequential(double, nn.Conv2d(width, width, 3, padding=1))
        self.time_conv = CausalConv3d(width, 2 * width, (3, 1, 1)) if temporal else None

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        if self.time_conv is not None:
            alone = int(stream.starts(self))
            first, rest = x[:, :, :alone], x[:, :, alone:]
            if rest.shape[2]:
                rest = rearrange(self.time_conv(rest, stream), "b (p c) t h w -> b c (t p) h w", p=2)
            x = torch.cat([first, rest], dim=2)
        conv = self.resample[1]
        return by_frame(lambda frames: double_and_conv(frames, conv.weight, conv.bias), x)


class DownBlock(nn.Module):
    """A level of the encoder: residual blocks and a halving, beside the mean of the pixels that become one."""

    def __init__(self, inputs: int, outputs: int, blocks: int, halve: bool, temporal: bool):
        super().__init__()
        self.outputs, self.space, self.time = outputs, 1 + halve, 1 + temporal
        resample = [Downsample(outputs, temporal)] if halve else []
        self.downsamples = nn.Sequential(*residual_blocks(inputs, outputs, blocks), *resample)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        skip = F.pad(x, (0, 0, 0, 0, -x.shape[2] % self.time, 0))  # frame 0 is alone: zeros stand before it
        skip = rearrange(skip, "b c (t p) (h q) (w r) -> b (c p q r) t h w", p=self.time, q=self.space, r=self.space)
        return run(self.downsamples, x, stream) + reduce(skip, "b (c g) t h w -> b c t h w", "mean", c=self.outputs)


class UpBlock(nn.Module):
    """A level of the decoder: residual blocks and a doubling, beside copies of the input's channels as new pixels."""

    def __init__(self, inputs: int, outputs: int, blocks: int, double: bool, temporal: bool):
        super().__init__()
        self.double, self.time = double, 1 + temporal
        self.copies = outputs * self.time * 4 // inputs
        resample = [Upsample(outputs, temporal)] if double else []
        self.upsamples = nn.Sequential(*residual_blocks(inputs, outputs, blocks), *resample)

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        out = run(self.upsamples, x, stream)
        if not self.double:
            return out
        skip = x.repeat_interleave(self.copies, dim=1)
        skip = rearrange(skip, "b (c p q r) t h w -> b c (t p) (h q) (w r)", p=self.time, q=2, r=2)
        return out + skip[:, :, skip.shape[2] - out.shape[2] :]  # frame 0 became one frame, not `time`


def run(layers: Iterable[nn.Module], x: Tensor, stream: Stream) -> Tensor:
    """One layer after the other; those with a memory get the stream."""
    for layer in layers:
        x = layer(x, stream) if isinstance(layer, STREAMED) else layer(x)
    return x


STREAMED = (CausalConv3d, ResidualBlock, Downsample, Upsample, DownBlock, UpBlock)


def by_frame(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """What works on images, on each frame of a video."""
    return rearrange(function(rearrange(x, "b c t h w -> (b t) c h w")), "(b t) c h w -> b c t h w", b=len(x))


class Encoder(nn.Module):
    """Patches of pixels to latents, their mean and log variance: [B, 3 p p, T, h, w] -> [B, 2 C, F, h / 8, w / 8]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.width * m for m in (1, *config.multipliers)]
        self.conv1 = CausalConv3d(3 * config.patch**2, widths[0])
        halved = [*((True, t) for t in config.temporal), (False, False)]
        self.downsamples = nn.Sequential(
            *(DownBlock(a, b, config.blocks, *h) for (a, b), h in zip(pairwise(widths), halved, strict=True))
        )
        self.middle = middle(widths[-1])
        self.head = nn.Sequential(RMSNorm(widths[-1]), nn.SiLU(), CausalConv3d(widths[-1], 2 * config.channels))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = x.to(memory_format=torch.channels_last_3d)
        return run([self.conv1, *self.downsamples, *self.middle, *self.head], x, stream)


class Decoder(nn.Module):
    """Latents to patches of pixels: [B, C, F, H, W] -> [B, 3 p p, T, 8 H, 8 W]."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        widths = [config.decoder_width * m for m in (config.multipliers[-1], *reversed(config.multipliers))]
        self.conv1 = CausalConv3d(config.channels, widths[0])
        self.middle = middle(widths[0])
        doubled = [*((True, t) for t in reversed(config.temporal)), (False, False)]
        self.upsamples = nn.Sequential(
            *(UpBlock(a, b, config.blocks + 1, *d) for (a, b), d in zip(pairwise(widths), doubled, strict=True))
        )
        self.head = nn.Sequential(RMSNorm(widths[-1]), nn.SiLU(), CausalConv3d(widths[-1], 3 * config.patch**2))

    def forward(self, x: Tensor, stream: Stream) -> Tensor:
        x = x.to(memory_format=torch.channels_last_3d)
        return run([self.conv1, *self.middle, *self.upsamples, *self.head], x, stream)


def middle(width: int) -> nn.Sequential:
    """What encoder and decoder do at the lowest resolution."""
    return nn.Sequential(ResidualBlock(width, width), AttentionBlock(width), ResidualBlock(width, width))


def statistics(x: Tensor) -> tuple[Tensor, Tensor]:
    """MEAN and STD, [C, 1, 1, 1] each, where and of what type x is."""
    return tuple(torch.tensor(v).to(x)[:, None, None, None] for v in (MEAN, STD))


class WanVAE(nn.Module):
    """The autoencoder: `encode` and `decode`, both without gradient."""

    def __init__(self, config: VAEConfig = VAEConfig()):
        super().__init__()
        self.config = config
        self.spatial, self.temporal = config.patch * 2 ** len(config.temporal), 2 ** sum(config.temporal)
        self.encoder, self.decoder = Encoder(config), Decoder(config)
        self.conv1 = nn.Conv3d(2 * config.channels, 2 * config.channels, 1)
        self.conv2 = nn.Conv3d(config.channels, config.channels, 1)

    @classmethod
    def from_pretrained(
        cls, path: Path | str, dtype: torch.dtype = torch.float32, config: VAEConfig = VAEConfig()
    ) -> "WanVAE":
        """Read the published weights: the file `Wan2.2_VAE.pth`, or the folder `vae/` of diffusers' layout.

        `config`: the shapes of a .pth file, which does not tell them; a folder does.
        """
        path = Path(path)
        if not path.is_dir():
            return load(lambda: cls(config), read_checkpoint(path), path, dtype)
        file = path / "config.json"
        theirs = read_config(file)
        if theirs.get("_class_name") != "AutoencoderKLWan" or not theirs.get("is_residual"):
            raise UserError(f"{file}: not the VAE of Wan2.2; give the vae folder of Wan2.2-TI2V-5B-Diffusers")
        names = ["base_dim", "decoder_base_dim", "z_dim", "dim_mult", "num_res_blocks"]  # in VAEConfig's order
        names += ["temperal_downsample", "patch_size"]
        if absent := [name for name in names if name not in theirs]:
            raise UserError(f"{file}: fields are missing: {', '.join(absent)}; give the folder as it was published")
        config = VAEConfig(*(tuple(v) if isinstance(v := theirs[name], list) else v for name in names))
        tensors = rename(read_folder(path, "diffusion_pytorch_model"), diffusers_names(config))
        return load(lambda: cls(config), tensors, path, dtype)

    @torch.no_grad()
    def encode(self, video: Tensor, chunk: int = 1) -> Tensor:
        """Normalised latents, the mean of what the encoder believes: [B,3,T,h,w] in [-1, 1] -> [B,C,F,h/16,w/16].

        T = 4 n + 1. `chunk`: latent frames at a time; more cost memory, and change nothing but rounding.
        """
        x = rearrange(video, "b c t (h q) (w r) -> b (c r q) t h w", q=self.config.patch, r=self.config.patch)
        stream, latents = Stream(), []
        cuts = range(1 + self.temporal * (chunk - 1), x.shape[2], self.temporal * chunk)
        for start, end in pairwise([0, *cuts, x.shape[2]]):
            z = self.conv1(self.encoder(x[:, :, start:end].to(self.conv1.weight), stream))
            latents.append(z[:, : self.config.channels].to(video.dtype))
        z = torch.cat(latents, dim=2)
        mean, std = statistics(z)
        return (z - mean) / std

    @torch.no_grad()
    def frames(self, latents: Tensor, chunk: int = 1) -> Iterator[Tensor]:
        """The video in pieces, as they are decoded, `chunk` latent frames each: [B,3,t,h,w] in [-1, 1]."""
        mean, std = statistics(latents)
        z = (latents * std + mean).to(self.conv2.weight)
        stream = Stream()
        for part in z.split(chunk, dim=2):
            x = self.decoder(self.conv2(part), stream).clamp(-1, 1)
            yield rearrange(x, "b (c r q) t h w -> b c t (h q) (w r)", q=self.config.patch, r=self.config.patch)

    def decode(self, latents: Tensor, chunk: int = 1, tile: int = 0, overlap: int = 8) -> Tensor:
        """The video of normalised latents: [B,C,F,H,W] -> [B,3,T,16 H,16 W] in [-1, 1], T = 4 (F - 1) + 1.

        `chunk`: latent frames at a time. `tile`: decode squares of so many latent positions one after the other, for
        less memory; neighbours share `overlap` positions, where one fades into the next.
        """
        height, width = latents.shape[3:]
        length = self.temporal * (latents.shape[2] - 1) + 1
        video = latents.new_zeros(len(latents), 3, length, self.spatial * height, self.spatial * width)
        rows, columns = (tiles(n, tile, overlap, self.spatial) for n in (height, width))
        for (y, fade_y), (x, fade_x) in product(rows, columns):
            fade, start = (fade_y[:, None] * fade_x).to(video), 0
            area = (slice(self.spatial * n.start, self.spatial * n.stop) for n in (y, x))
            target = video[..., *area]
            for part in self.frames(latents[..., y, x], chunk):
                target[:, :, start : start + part.shape[2]].addcmul_(fade, part.to(video))
                start += part.shape[2]
        return video


def tiles(length: int, tile: int, overlap: int, spatial: int) -> list[tuple[slice, Tensor]]:
    """Where tiles of an axis of `length` latent positions lie, and how much each pixel of a tile counts.

    At every pixel of the axis the counts of all tiles add up to 1; where one tile alone lies, it counts 1.
    """
    if not 0 < tile < length:
        return [(slice(0, length), torch.ones(spatial * length))]
    if not 0 < 2 * overlap <= tile:
        raise ValueError(f"tile {tile}, overlap {overlap}: neighbours may share half a tile at most, and 1 at least")
    number = -(-(length - overlap) // (tile - overlap))
    starts = [min(n * (tile - overlap), length - tile) for n in range(number)]
    place = torch.arange(spatial * length) + 0.5
    inside = [torch.minimum(place - spatial * n, spatial * (n + tile) - place) for n in starts]
    depth = [x.clamp(0, spatial * overlap) for x in inside]
    total = torch.stack(depth).sum(0)
    counts = [(d / total)[spatial * n : spatial * (n + tile)] for n, d in zip(starts, depth, strict=True)]
    return [(slice(n, n + tile), count) for n, count in zip(starts, counts, strict=True)]


def diffusers_names(config: VAEConfig) -> list[tuple[str, str]]:
    """Parameter names of diffusers' AutoencoderKLWan -> Wan's own."""
    return [
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"coder\.conv_in", "coder.conv1"),
        (r"coder\.norm_out", "coder.head.0"),
        (r"coder\.conv_out", "coder.head.2"),
        (r"mid_block\.resnets\.0", "middle.0"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"mid_block\.resnets\.1", "middle.2"),
        (r"down_blocks\.(\d)\.resnets", r"downsamples.\1.downsamples"),
        (r"down_blocks\.(\d)\.downsampler", rf"downsamples.\1.downsamples.{config.blocks}"),
        (r"up_blocks\.(\d)\.resnets", r"upsamples.\1.upsamples"),
        (r"up_blocks\.(\d)\.upsampler", rf"upsamples.\1.upsamples.{config.blocks + 1}"),
        (r"(samples\.\d|middle\.[02])\.norm1", r"\1.residual.0"),
        (r"(samples\.\d|middle\.[02])\.conv1", r"\1.residual.2"),
        (r"(samples\.\d|middle\.[02])\.norm2", r"\1.residual.3"),
        (r"(samples\.\d|middle\.[02])\.conv2", r"\1.residual.6"),
        (r"conv_shortcut", "shortcut"),
    ]
