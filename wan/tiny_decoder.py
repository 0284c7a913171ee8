"""A small decoder for Wan2.2's latents, of the community's TAEHV family (`taew2_2`): fast, light, a little softer.

It reads the DiT's latents frame by frame. A block sees its own input and that of the frame before, so memory does not
grow with a video's length. Parameter names are those of `taew2_2.pth`.
"""

from collections import OrderedDict
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import torch
import torch.nn.functional as F
from einops import rearrange
from einops.layers.torch import Rearrange
from torch import Tensor, nn

from core.weights import Stored, load, read_checkpoint, read_safetensors

WIDTHS = (256, 128, 64, 64)  # from the latent's resolution up
PATCH = 2  # pixels each way that the last layer makes of a position


class MemoryBlock(nn.Module):
    """Three convolutions of a frame and the one before it, with a skip. [n, C, h, w] -> the same shape."""

    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(2 * width, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU(),
            nn.Conv2d(width, width, 3, padding=1),
        )  # fmt: skip

    def forward(self, x: Tensor, before: Tensor | None) -> Tensor:
        """x: frames in their order; `before`: the input's frame before them, None at a video's start."""
        past = torch.cat([torch.zeros_like(x[:1]) if before is None else before, x[:-1]])
        return F.relu(self.conv(torch.cat([x, past], dim=1)) + x)


class TinyDecoder(nn.Module):
    """`frames(latents)` gives what `WanVAE.frames` gives, without gradient."""

    def __init__(self, channels: int = 48):
        super().__init__()
        layers = [nn.Identity(), nn.Conv2d(channels, WIDTHS[0], 3, padding=1), nn.ReLU()]  # numbered as published
        for (wider, width), times in zip(pairwise(WIDTHS), (1, 2, 2), strict=True):
            layers += [*(MemoryBlock(wider) for _ in range(3)), nn.Upsample(scale_factor=2)]
            conv = nn.Conv2d(wider, wider * times, 1, bias=False)  # every frame becomes `times` frames
            grow = OrderedDict(conv=conv, split=Rearrange("n (t c) h w -> (n t) c h w", t=times))
            layers += [nn.Sequential(grow), nn.Conv2d(wider, width, 3, padding=1, bias=False)]
        self.decoder = nn.Sequential(*layers, nn.ReLU(), nn.Conv2d(WIDTHS[-1], 3 * PATCH**2, 3, padding=1))

    @classmethod
    def from_pretrained(cls, path: Path | str, dtype: torch.dtype = torch.float32) -> "TinyDecoder":
        """Read `taew2_2.pth`, or the same as safetensors, without the encoder in it."""
        read = read_safetensors(path)[1] if Path(path).suffix == ".safetensors" else read_checkpoint(path)
        tensors = {name: stored for name, stored in read.items() if not name.startswith("encoder.")}
        name = "decoder.7.conv.weight"  # if it is made for two frames, the last counts
        if (whole := tensors.get(name)) and whole.shape[0] == 2 * WIDTHS[0]:
            tensors[name] = Stored((WIDTHS[0], *whole.shape[1:]), lambda: whole.read()[WIDTHS[0] :])
        return load(cls, tensors, path, dtype)

    @torch.no_grad()
    def frames(self, latents: Tensor) -> Iterator[Tensor]:
        """[1,48,F,H,W] -> the video in pieces [1,3,t,16H,16W] in [-1, 1], a latent frame's each: t is 1, then 4."""
        memory: dict[nn.Module, Tensor] = {}
        latents = latents.to(next(self.parameters()).dtype)
        for number, x in enumerate((3 * torch.tanh(latents / 3)).unbind(2)):
            for layer in self.decoder:
                if isinstance(layer, MemoryBlock):
                    memory[layer], x = x[-1:], layer(x, memory.get(layer))
                else:
                    x = layer(x)
            pixels = F.pixel_shuffle(x, PATCH).clamp(0, 1) * 2 - 1
            yield rearrange(pixels if number else pixels[3:], "t c h w -> 1 c t h w")  # frame 0 is one, not four
