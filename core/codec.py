"""What every codec is: pixels and prompts to latents and embeddings, and back. And what training reads of them."""

import re
from typing import NamedTuple

import torch
from torch import Tensor

from core.config import UserError
from core.media import MOST_VIDEO


class Batch(NamedTuple):
    """B videos as training reads them."""

    x0: Tensor  # latents of the videos [B, C, F, H, W]
    text: Tensor  # embeddings of their captions [B, L, text_dim]
    traj: Tensor | None  # latents of their trajectory maps [B, C, F, H, W], if asked for

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if part is None else part.to(device) for part in self))


class Codec:
    """`encode_video`, `decode_video` and `encode_text` are the subclass's; nothing else knows which one it holds."""

    channels: int  # of the latent
    spatial: int  # pixels of a latent position, each way
    temporal: int  # video frames of a latent frame; the first is alone
    patch = 2  # latent positions of a token, each way

    def check_size(self, size: str, frames: int) -> tuple[int, int]:
        """ "704x1280" -> (704, 1280). UserError unless the networks can make such videos."""
        unit = self.spatial * self.patch
        sides = re.fullmatch(r"(\d+)x(\d+)", size)
        if not sides or any(int(n) % unit or int(n) < unit for n in sides.groups()):
            example = f"as {4 * unit}x{6 * unit}"
            raise UserError(f"--size {size}: takes height x width, both multiples of {unit}, {example}")
        if frames < 2 or (frames - 1) % self.temporal:
            near = self.temporal * max((frames - 1) // self.temporal, 1) + 1
            raise UserError(f"--frames {frames}: must be {self.temporal} n + 1, at least 2; {near} is")
        pixels = int(sides[1]) * int(sides[2]) * frames
        if pixels > MOST_VIDEO:
            raise UserError(f"--size {size} --frames {frames}: {pixels} pixels; {MOST_VIDEO} is the most")
        return int(sides[1]), int(sides[2])
