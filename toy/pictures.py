"""A world of pictures: parts of one picture move over another, and everything about it is known.

The pictures are dead leaves: random shapes that cover one another, of power-law sizes, shaded, with gratings and grain,
mostly in dull colours as photographs are. One to three things (blobs, polygons, rectangles) with a texture of their own
move on cubic Bezier paths, change size, pass in front of one another and cross the picture's edge. Half of the blobs
and polygons spin, and half the captions tell the direction. A video follows from one integer; the splits use disjoint
seeds, and pictures of their own. Dead leaves carry over to photographs in low-level tasks (Baradad et al. 2021,
"Learning to see by looking at noise"; Achddou et al. 2021, "Synthetic images as a regularity prior").
"""

import math
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import UserError
from core.media import fit_frames, read_picture
from toy.world import MOST, SPLITS, Drawn, Draws, bezier, furthest_apart

CANVAS = 192  # side of a dead-leaves picture, of which videos show parts
BANK = {"train": 512, "validation": 128, "test": 128}  # pictures of each split
PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
FIRST = SPLITS | {"photographs": 3 << 40}  # first seed of each split
SHAPES = ("blob", "polygon", "rectangle")
CORNERS = 90  # points of a silhouette, by which its box is measured
COLORS = {
    "black": (0.1, 0.1, 0.1), "grey": (0.45, 0.45, 0.45), "white": (0.9, 0.9, 0.9), "red": (0.7, 0.2, 0.2),
    "brown": (0.5, 0.35, 0.2), "yellow": (0.8, 0.75, 0.3), "green": (0.25, 0.6, 0.25), "cyan": (0.3, 0.7, 0.7),
    "blue": (0.25, 0.35, 0.7), "purple": (0.55, 0.25, 0.6),
}  # fmt: skip


@dataclass(frozen=True)
class PictureBatch(Drawn):
    """B videos and their truth. Of K = 3 slots `count` hold things; later things pass in front."""

    video: Tensor  # [B, 3, T, height, width] in [-1, 1]
    plate: Tensor  # [B, 3, height, width] in [-1, 1], the background without anything before it
    masks: Tensor  # [B, K, T, height, width] bool, the visible part of each thing
    boxes: Tensor  # [B, K, T, 4] int: x0, y0, x1, y1 of the whole thing, which may reach past the picture's edge
    middle: Tensor  # [B, K, T, 2] x and y in pixels of the point that a thing turns around
    count: Tensor  # [B] int
    spin: Tensor  # [B, K] radians per frame; positive turns clockwise on the screen, 0 does not turn
    captions: list[str]
    told: Tensor  # [B] bool: the caption says the direction


class PictureWorld:
    """`PictureWorld("train").batch([0, 1, 2])` renders videos 0, 1 and 2 of the split.

    The split "photographs" has scikit-image's photographs instead of dead leaves, which nothing is trained on.
    """

    def __init__(self, split: str = "train", size: tuple[int, int] = (64, 64), frames: int = 9):
        self.split, self.first, self.size, self.frames = split, FIRST[split], size, frames

    def batch(self, indices: list[int]) -> PictureBatch:
        # Each video has draws of its own: it is the same in any batch.
        u = np.stack([np.random.default_rng([5, self.first + int(i)]).random(328) for i in indices])
        draw, bank = Draws(u), picture_bank(self.split, torch.get_default_device())
        B, K, T, (height, width) = len(indices), MOST, self.frames, self.size
        short, extent = min(self.size), torch.tensor([width, height]).double()

        # The picture behind, and a piece of a picture for each thing: in one of three, of the same picture.
        count = draw.integer((), 1, MOST)
        behind, zoom = draw.integer((), 0, len(bank) - 1), draw.between((), 0.25, 0.6)
        plate = crop(bank[behind], zoom, draw((2,)), draw(()) < 0.5, self.size)
        plate = plate * draw.between((3,), 0.85, 1.15).float()[..., None, None]
        other = draw.integer((K,), 0, len(bank) - 1)
        source = torch.where(draw((K,)) < 1 / 3, behind[:, None], other).flatten()
        side = 2 * int(0.3 * short)
        texture = crop(bank[source], *(draw.between((K,), 0.1, 0.35).flatten(), draw((K, 2)).flatten(0, 1)),
                       draw((K,)).flatten() < 0.5, (side, side))  # fmt: skip
        texture = texture * draw.between((K, 3), 0.75, 1.25).float().flatten(0, 1)[..., None, None]
        plate, texture = plate.clamp(0, 1), texture.clamp(0, 1)

        # Silhouettes: the distance from the middle to the edge, by direction, in units of half a side.
        shape = draw.integer((K,), 0, len(SHAPES) - 1)
        aspect = draw.between((K,), -0.45, 0.45).exp()
        waves, offsets = draw.between((K, 4), -0.12, 0.12), draw.between((K, 4), 0, 2 * math.pi)
        corners = draw.integer((K,), 3, 6)

        def edge(angle: Tensor) -> Tensor:
            """[B, K, ...] -> the same shape."""
            over = (...,) + (None,) * (angle.ndim - 2)
            order = torch.arange(1, 5)
            blob = 0.8 + sum(
                waves[:, :, i][over] * torch.cos(order[i] * angle + offsets[:, :, i][over]) for i in range(4)
            )
            part = 2 * math.pi / corners[over]
            polygon = torch.cos(part / 2) / torch.cos(torch.remainder(angle, part) - part / 2)
            rectangle = 0.8 / torch.maximum(angle.cos().abs(), angle.sin().abs())
            return torch.where(shape[over] == 0, blob, torch.where(shape[over] == 1, polygon, rectangle))

        upright = shape == 2
        turns = (draw((K,)) < 0.5) & ~upright
        spin = (draw((K,)) * 2 - 1).sign() * torch.deg2rad(draw.between((K,), 5, 15)) * turns
        phase = draw.between((K,), 0, 2 * math.pi) * ~upright
        angle = phase[:, :, None] + spin[:, :, None] * torch.arange(T)  # (B, K, T)
        most = torch.tensor([0.45, 0.33, 0.25])[count - 1].double()[:, None]  # the fewer things, the larger they can be
        first, ratio = 0.12 * (most / 0.12) ** draw((K,)), draw.between((K,), 0.7, 1.4)
        time = torch.linspace(0, 1, T).double()
        last = torch.minimum((first * ratio).clamp(min=0.11), most)
        radius = short * torch.lerp(first[..., None], last[..., None], time)  # (B, K, T)

        # The image shows nearly every thing whole, and they still cross, enter and leave later.
        path = bezier(draw((8, K, 4, 2)), time)  # (B, 8, K, T, 2)
        drift = draw.between((8, K, 1, 2), -0.5, 0.5) * time[:, None]
        start = 1.1 * path[..., :1, :] - 0.05
        path = (start + 0.5 * (path - path[..., :1, :]) + drift).clamp(-0.4, 1.4)  # 0 to 1 lies within the picture
        wide = 2 * radius[:, None, ..., None]
        at = extent / 2 + (path - 0.5) * torch.maximum(extent - wide, extent / 2)
        used = torch.arange(K) < count[:, None]  # (B, K)
        center = at[torch.arange(B), furthest_apart(at, used, enough=short / 2, later=0.3)]  # (B, K, T, 2)

        # Boxes, from points on the silhouettes.
        stretch = torch.stack([aspect.rsqrt(), aspect.sqrt()], -1)  # (B, K, 2)
        around = torch.linspace(0, 2 * math.pi, CORNERS + 1, dtype=torch.float64)[:-1].expand(B, K, -1)
        points = edge(around)[..., None] * torch.stack([around.cos(), around.sin()], -1) * stretch[:, :, None]
        cos, sin = angle.cos()[..., None], angle.sin()[..., None]  # (B, K, T, 1)
        x, y = (points[:, :, None, :, i] for i in range(2))  # (B, K, 1, CORNERS)
        turned = radius[..., None, None] * torch.stack([cos * x - sin * y, sin * x + cos * y], -1)
        low, high = (f(turned, 3) + center for f in (torch.amin, torch.amax))
        boxes = torch.cat([low.round(), high.round()], -1).long()

        # Every pixel in the things' own coordinates.
        dx = (torch.arange(width) + 0.5 - center[..., :1])[..., None, :] / radius[..., None, None]  # (B, K, T, 1, W)
        dy = (torch.arange(height) + 0.5 - center[..., 1:])[..., :, None] / radius[..., None, None]  # (B, K, T, H, 1)
        cos, sin, dx, dy = (z.float() for z in (cos[..., None], sin[..., None], dx, dy))
        own = torch.stack([cos * dx + sin * dy, cos * dy - sin * dx], -1) / stretch[:, :, None, None, None].float()
        distance = torch.linalg.vector_norm(own, dim=-1) / edge(torch.atan2(own[..., 1], own[..., 0])).float()
        alpha = (0.8 * radius.float()[..., None, None] * (1 - distance) + 0.5).clamp(0, 1) * used[
            :, :, None, None, None
        ]
        colors = F.grid_sample(texture, own.flatten(0, 1).flatten(1, 2), padding_mode="reflection", align_corners=False)
        colors = colors.view(B, K, 3, T, height, width)

        # From back to front.
        video, inside = plate[:, :, None].repeat(1, 1, T, 1, 1), alpha > 0.5
        masks = inside.clone()
        for k in range(K):
            video = torch.lerp(video, colors[:, k], alpha[:, None, k])
            masks[:, :k] &= ~inside[:, k : k + 1]

        told = draw(()) < 0.5
        palette = torch.tensor(list(COLORS.values()))
        middle = texture.unflatten(0, (B, K))[..., side // 4 : -side // 4, side // 4 : -side // 4].mean((-1, -2))
        nearest = (middle[:, :, None] - palette).square().sum(-1).argmin(-1).tolist()
        ways = {1: " spinning clockwise", -1: " spinning counterclockwise", 0: ""}
        kinds, signs, says = shape.tolist(), spin.sign().tolist(), told.tolist()
        captions = []
        for b, n in enumerate(count.tolist()):
            names = [f"a {list(COLORS)[nearest[b][k]]} {SHAPES[kinds[b][k]]}" for k in range(n)]
            captions.append(", ".join(name + ways[signs[b][k]] * says[b] for k, name in enumerate(names)))
        return PictureBatch(video * 2 - 1, plate * 2 - 1, masks, boxes, center.float(), count, spin, captions, told)


def crop(pictures: Tensor, zoom: Tensor, place: Tensor, flip: Tensor, size: tuple[int, int]) -> Tensor:
    """A part of each picture, resized smoothly: uint8 [N, 3, CANVAS, CANVAS] -> float [N, 3, *size] in [0, 1].

    zoom [N]: the part's shorter side, as a share of the picture's. place [N, 2] in [0, 1]: which part. flip [N] bool.
    """
    short = min(size)
    axes = []
    for i, n in ((0, size[1]), (1, size[0])):
        half = (zoom * n / short).clamp(max=1)[:, None]
        line = (torch.arange(n) * 2 + 1) / n - 1  # pixel centres
        axes.append((half * line + (2 * place[:, i : i + 1] - 1) * (1 - half)).float())
    x, y = axes
    x = torch.where(flip[:, None], -x, x)
    grid = torch.stack([x[:, None].expand(-1, size[0], -1), y[:, :, None].expand(-1, -1, size[1])], -1)
    return F.grid_sample(pictures.float() / 255, grid, padding_mode="reflection", align_corners=False)


@lru_cache
def picture_bank(split: str, device: torch.device) -> Tensor:
    """The pictures of a split, uint8 [N, 3, CANVAS, CANVAS]. Dead leaves are made once a process, in some seconds."""
    if split == "photographs":
        return photographs().to(device)
    pictures = np.stack([dead_leaves(SPLITS[split] + i) for i in range(BANK[split])])
    return torch.from_numpy((pictures * 255).round().astype(np.uint8)).to(device)


def photographs() -> Tensor:
    """The middle squares of scikit-image's photographs, uint8 [N, 3, CANVAS, CANVAS]. UserError without the package."""
    package = find_spec("skimage")
    if package is None:
        raise UserError("photographs: come with scikit-image; pip install -r requirements-dev.txt")
    files = [Path(package.origin).parent / "data" / name for name in PHOTOGRAPHS]
    return torch.cat([fit_frames(read_picture(file)[None], (CANVAS, CANVAS)).byte()[None, :, 0] for file in files])


def dead_leaves(seed: int) -> np.ndarray:
    """A picture of shapes that cover one another, float [3, CANVAS, CANVAS] in [0, 1]."""
    draw = np.random.default_rng([7, seed])
    picture = np.zeros((3, CANVAS, CANVAS), np.float32)
    # A palette of a few colours, of any brightness but mostly dull.
    bases = draw.integers(3, 9)
    brightness, dullness = draw.random(bases), draw.choice([0.03, 0.08, 0.2], (bases, 1))
    chroma = draw.normal(0, 1, (bases, 2)) * dullness

    # Radii by a power law, or as many at every scale. Mostly the large ones lie behind.
    count, least, most = draw.integers(40, 220), draw.choice([3.0, 6.0, 12.0]), CANVAS * draw.uniform(0.25, 0.7)
    u = draw.random(count)
    if draw.random() < 0.6:
        radii = (least**-2 + u * (most**-2 - least**-2)) ** -0.5
    else:
        radii = least * (most / least) ** u
    if draw.random() < 0.7:
        radii = np.sort(radii)[::-1]
    radii[0] = 2 * CANVAS  # nothing stays bare

    rows, columns = np.mgrid[:CANVAS, :CANVAS].astype(np.float32)
    for radius in radii:
        x, y = draw.random(2) * CANVAS
        flatness, turn, kind = draw.uniform(0.4, 1), draw.uniform(0, math.pi), draw.integers(3)
        softness = draw.choice([0.7, 1.5, 4.0])
        base = draw.integers(bases)
        light, tint = brightness[base] + draw.normal(0, 0.08), chroma[base] + draw.normal(0, 0.02, 2)
        slope, textures = draw.normal(0, 0.15, 2), draw.random(2) < (0.4, 0.3)
        reach = 1.5 * radius + 2
        here = tuple(slice(int(max(c - reach, 0)), int(min(c + reach, CANVAS)) + 1) for c in (y, x))
        dx, dy = columns[here] - x, rows[here] - y
        if not dx.size:
            continue
        a = (math.cos(turn) * dx + math.sin(turn) * dy) / radius
        b = (math.cos(turn) * dy - math.sin(turn) * dx) / (radius * flatness)
        distance = (np.hypot(a, b), 1.1 * np.maximum(abs(a), abs(b)), 0.8 * (abs(a) + abs(b)))[kind]
        shade = light + slope[0] * a + slope[1] * b
        if textures[0]:  # a grating
            rate, way, start = draw.uniform(0.3, 2), draw.uniform(0, 2 * math.pi), draw.uniform(0, 6)
            shade += draw.uniform(0.02, 0.15) * np.sin(rate * (math.cos(way) * dx + math.sin(way) * dy) + start)
        if textures[1]:  # grain
            shade += draw.uniform(0.02, 0.1) * draw.standard_normal(dx.shape, dtype=np.float32)
        color = np.stack([shade + tint[0], shade - 0.5 * tint[0] - 0.3 * tint[1], shade + tint[1]])
        cover = np.clip((1 - distance) * radius / softness + 0.5, 0, 1)
        picture[(slice(None), *here)] += cover * (color - picture[(slice(None), *here)])
    low, high = np.quantile(picture, [0.01, 0.99])
    contrast, floor = draw.uniform(0.5, 1), draw.uniform(0, 0.3)
    return np.clip((picture - low) / max(high - low, 1e-3) * contrast + floor, 0, 1).astype(np.float32)
