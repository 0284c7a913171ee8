"""What all codecs share: they turn videos and prompts into latents and embeddings, and latents back into videos."""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from core.config import UserError
from core.media import MOST_VIDEO


class Batch(NamedTuple):
    """B training videos."""

    x0: Tensor  # latents of the videos [B, C, F, H, W]
    text: Tensor  # embeddings of their captions [B, L, text_dim]
    traj: Tensor | None  # latents of their trajectory maps [B, C, F, H, W], if asked for

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if part is None else part.to(device) for part in self))


class Codec:
    """Subclasses add `encode_video`, `decode_video` and `encode_text`."""

    channels: int  # of the latent
    spatial: int  # pixels per latent position, in height and width
    temporal: int  # video frames per latent frame; frame 0 has one to itself
    patch = 2  # latent positions per token, in height and width

    def check_size(self, size: str, frames: int) -> tuple[int, int]:
        """ "704x1280" -> (704, 1280). UserError if the networks can't make such a video."""
        unit = self.spatial * self.patch
        sides = re.fullmatch(r"(\d+)x(\d+)", size)
        height, width = map(int, sides.groups()) if sides else (0, 0)
        if not height or not width or height % unit or width % unit:
            raise UserError(f"--size {size}: takes height x width, both multiples of {unit}, as {4 * unit}x{6 * unit}")
        if frames < 2 or (frames - 1) % self.temporal:
            near = self.temporal * max((frames - 1) // self.temporal, 1) + 1
            raise UserError(f"--frames {frames}: must be {self.temporal} n + 1, at least 2; {near} is")
        if (pixels := height * width * frames) > MOST_VIDEO:
            raise UserError(f"--size {size} --frames {frames}: {pixels} pixels; {MOST_VIDEO} is the most")
        return height, width
