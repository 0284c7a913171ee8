"""The thing in a box: which pixels of a picture belong to it. So a box alone moves the thing, not its rectangle.

A small U-Net sees the box and what is around it, scaled to one size. It has learned from dead leaves alone
(toy/train_segmenter.py), which carries over to photographs.
"""

from dataclasses import dataclass
from functools import cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from core.boxes import fill_box, move, whole_pixels
from core.config import ROOT
from core.media import Size
from core.weights import load, read_network

INNER, MARGIN = 64, 16  # pixels of the crop that the network sees, each way: the box, and what is around it
CROP = INNER + 2 * MARGIN
WEIGHTS = ROOT / "checkpoints/small/box_segmenter.safetensors"
COLORS = 12  # steps of each colour's brightness, by which colours are told apart
LEAST = 0.1  # share of its box below which what is found is no thing
THRESHOLD = -1.5  # of the logits; below 0, for a part that is lost shows more than ground that comes along


@dataclass(frozen=True)
class SegmenterConfig:
    """Shapes of a BoxSegmenter."""

    widths: tuple[int, ...] = (32, 48, 80, 128, 128)  # from half of the crop's resolution to a 32nd


class Block(nn.Module):
    """Two 3x3 convolutions and a skip: [P, in, H, W] -> [P, out, H, W]."""

    def __init__(self, width_in: int, width_out: int):
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(width, width_out, 3, padding=1) for width in (width_in, width_out))
        self.norms = nn.ModuleList(nn.GroupNorm(8, width_out) for _ in range(2))
        self.skip = nn.Conv2d(width_in, width_out, 1)

    def forward(self, x: Tensor) -> Tensor:
        h = F.silu(self.norms[0](self.convs[0](x)))
        return F.silu(self.skip(x) + self.norms[1](self.convs[1](h)))


class BoxSegmenter(nn.Module):
    """A U-Net: P crops as `look` makes them [P, 4, CROP, CROP] -> logits of their things [P, 1, CROP, CROP]."""

    def __init__(self, config: SegmenterConfig):
        super().__init__()
        self.config, widths = config, config.widths
        self.down = nn.ModuleList(map(Block, (20, *widths), widths))
        self.up = nn.ModuleList(Block(deep + here, here) for here, deep in pairwise(widths))
        self.head = nn.Conv2d(widths[0], 4, 1)

    def forward(self, crops: Tensor) -> Tensor:
        box = F.pad(crops.new_ones(len(crops), 1, INNER, INNER), [MARGIN] * 4)
        h, seen = F.pixel_unshuffle(torch.cat([crops, box], 1), 2), []
        for number, block in enumerate(self.down):
            h = block(F.avg_pool2d(h, 2) if number else h)
            seen.append(h)
        for number in reversed(range(len(self.up))):
            h = self.up[number](torch.cat([F.interpolate(h, scale_factor=2), seen[number]], 1))
        return F.pixel_shuffle(self.head(h), 2)


def look(picture: np.ndarray, box: np.ndarray) -> Tensor:
    """A box [4] of a picture, uint8 [H, W, 3], and what is around it: colours in [-1, 1], and 1 where the picture is.

    [4, CROP, CROP], of which the box fills the middle INNER each way, whatever its shape. 0 beyond the picture.
    """
    pixel = (box[2:] - box[:2]) / INNER  # width and height of one of the crop's, in the picture's
    corner = (box[:2] + box[2:] - CROP * pixel) / 2
    edges = np.array(picture.shape[1::-1])
    low = np.ceil(-corner / pixel - 1e-6).clip(0, CROP).astype(int)  # whole pixels that lie in the picture
    high = np.floor((edges - corner) / pixel + 1e-6).clip(0, CROP).astype(int)
    crop = torch.zeros(4, CROP, CROP)
    if (high > low).all():
        part = np.concatenate([corner + low * pixel, corner + high * pixel]).clip(0, np.tile(edges, 2))
        seen = np.asarray(Image.fromarray(picture).resize(tuple(high - low), Image.Resampling.LANCZOS, tuple(part)))
        rgb = torch.from_numpy(seen.transpose(2, 0, 1) / 127.5 - 1).float()
        crop[:, low[1] : high[1], low[0] : high[0]] = F.pad(rgb, (0, 0, 0, 0, 0, 1), value=1)
    return crop


def thing_logits(network: BoxSegmenter, crops: Tensor) -> Tensor:
    """P crops -> logits [P, 1, CROP, CROP], the network's mean of four looks: at mirror images and negatives too.

    Then the log-likelihood ratio of each pixel's colour is added: how much more of it the thing has, as first found,
    than the rest of the crop, by smooth histograms.
    """
    negatives = torch.cat([-crops[:, :3], crops[:, 3:]], 1)
    logits = sum(network(x) + network(x.flip(3)).flip(3) for x in (crops, negatives)) / 4
    inside = F.pad(logits[..., MARGIN:-MARGIN, MARGIN:-MARGIN].sigmoid(), [MARGIN] * 4)
    code = ((crops[:, :3] + 1) / 2 * (COLORS - 1)).round().long().clamp(0, COLORS - 1)
    code = torch.einsum("pchw,c->phw", code, torch.tensor([COLORS**2, COLORS, 1])).flatten(1)[:, None]  # (P, 1, H W)
    weights = (torch.cat([inside, 1 - inside], 1) * crops[:, 3:]).flatten(2)  # (P, 2, H W)
    share = torch.zeros(len(crops), 2, COLORS**3).scatter_add_(2, code.expand_as(weights), weights)
    share = F.avg_pool3d(share.unflatten(2, [COLORS] * 3), 3, stride=1, padding=1).flatten(2)
    share = (share / share.sum(2, keepdim=True).clamp(min=1e-6) + 1e-4).log()
    likelier = (share[:, :1] - share[:, 1:]).gather(2, code).view_as(logits)
    return logits + F.avg_pool2d(likelier, 3, stride=1, padding=1)


@cache
def segmenter() -> BoxSegmenter:
    """The shipped network."""
    config, tensors = read_network(WEIGHTS, "BoxSegmenter", SegmenterConfig)
    return load(lambda: BoxSegmenter(config), tensors, WEIGHTS).eval().requires_grad_(False)


def segment(picture: np.ndarray, box: np.ndarray, size: Size) -> np.ndarray:
    """The mask of the thing in a box [4], bool [height, width]: as `fill_box`, for a picture uint8 [H, W, 3].

    The box is in pixels of this size, and the picture shows the same view at any. All of the box where no thing is
    found in it, and where it holds the whole picture.
    """
    filled = fill_box(box, size)
    if np.isnan(box).any() or filled.all():
        return filled
    scale = np.array(picture.shape[1::-1]) / size[::-1]
    found = thing_logits(segmenter(), look(picture, box * np.tile(scale, 2))[None])[0]
    (x0, y0, x1, y1), inner, mask = whole_pixels(box, size), np.repeat([MARGIN, CROP - MARGIN], 2), filled.copy()
    mask[y0:y1, x0:x1] = move(found, inner, box, (y0, y1, x0, x1))[0] > THRESHOLD
    return mask if mask.sum() > LEAST * filled.sum() else filled
