"""What all codecs share. They turn videos and prompts into latents and embeddings, and latents back into videos."""

import math
import re
from typing import NamedTuple

import torch
from torch import Tensor

from core.config import UserError, require
from core.media import MOST_VIDEO, MOST_VIDEO_SIDE
from core.memory import send


class Batch(NamedTuple):
    """B training videos."""

    x0: Tensor  # latents of the videos [B, C, F, H, W]
    text: Tensor  # embeddings of their captions [B, L, text_dim]
    traj: Tensor | None  # latents of the videos that steer them [B, C, F, H, W], if asked for

    def to(self, device: torch.device) -> "Batch":
        return Batch(*(None if part is None else send(part, device) for part in self))


class Codec:
    """Base of all codecs. Each adds how it encodes videos and prompts, decodes latents, and where its `files` lie."""

    channels: int  # of the latent
    spatial: int  # pixels per latent position, in height and width
    temporal: int  # video frames per latent frame; frame 0 has one to itself
    patch = 2  # latent positions per token, in height and width
    fps: int  # of the videos that the networks learned from
    negative = ""  # the prompt that guidance goes away from
    area: int  # most pixels of a picture that `--size auto` asks for

    def free(self) -> None:
        """Release networks that can be read again."""

    def video_size(self, size: str, frames: int, picture: tuple[int, int] | None = None) -> tuple[int, int]:
        """ "704x1280" -> (704, 1280); "auto" -> what fits the picture's (height, width) best, or (0, 0) without one.

        UserError if the networks can't make such a video, or if it can't be written.
        """
        unit = self.spatial * self.patch
        near = self.temporal * max(1, math.ceil((frames - 1) / self.temporal - 0.5)) + 1
        require(frames == near, f"--frames {frames}: must be {self.temporal} n + 1, at least 2; {near} is")
        if size == "auto":
            height, width = best_size(picture, self.area, unit) if picture else (0, 0)
        else:
            form = f"--size {size}: takes auto, or height x width, both multiples of {unit}"
            require(sides := re.fullmatch(r"(\d+)x(\d+)", size), f"{form}, as {4 * unit}x{6 * unit}")
            height, width = map(int, sides.groups())
            near = [max(unit, round(n / unit) * unit) for n in (height, width)]
            require(near == [height, width], f"{form}; the nearest is {near[0]}x{near[1]}")
        if (pixels := height * width * frames) > MOST_VIDEO:
            raise UserError(f"--size {size} --frames {frames}: {pixels} pixels; {MOST_VIDEO} is the most")
        require(max(height, width) <= MOST_VIDEO_SIDE, f"--size {size}: {MOST_VIDEO_SIDE} pixels a side are the most")
        return height, width


def drop_caption(share: float, u: float, caption: str, empty: str, negative: str) -> str:
    """The caption; in a `share` of the cases, told by u in [0, 1), the empty or the negative prompt, as often."""
    return caption if u >= share else empty if u >= share / 2 else negative


def best_size(picture: tuple[int, int], area: int, unit: int) -> tuple[int, int]:
    """The (height, width) in multiples of `unit`, of `area` pixels at most, whose shape is nearest to the picture's.

    As Wan2.2 does: one side is the ideal one rounded down, the other as long as the area allows; the better way of two.
    """
    ratio = picture[1] / picture[0]
    ideal = (area / ratio) ** 0.5, (area * ratio) ** 0.5
    height, width = (max(unit, int(side // unit) * unit) for side in ideal)
    ways = [(max(unit, area // width // unit * unit), width), (height, max(unit, area // height // unit * unit))]
    return min(reversed(ways), key=lambda way: max(ratio / (way[1] / way[0]), (way[1] / way[0]) / ratio))
