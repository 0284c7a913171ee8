"""The small preset's world: pieces of pictures move over a picture, and everything about it is known.

Pictures are dead leaves: random shapes that cover one another, of power-law sizes, shaded, with gratings and grain. In
low-level tasks they carry over to photographs (Baradad et al. 2021, "Learning to see by looking at noise"; Achddou et
al. 2021, "Synthetic images as a regularity prior"). One to six things (blobs, polygons, rectangles) with a texture of
their own move on cubic Bezier paths, change size, pass in front of one another and cross the picture's edge; some cast
a shadow, some spin, some appear later. Videos differ in contrast and brightness; some are grey. In a quarter of them
the camera pans and zooms. Half of the things have a box but no mask. A video follows from one integer; splits share
neither seeds nor pictures.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.boxes import fill_box
from core.media import to_uint8
from toy.pictures import CANVAS, SPLITS, picture_bank
from trajectory import PALETTE, Fill, Maps, Trajectory

MOST = 6  # things in one video
SHAPES = ("blob", "polygon", "rectangle")
CORNERS = 90  # points of a silhouette, by which its box is measured
COLORS = {
    "black": (0.1, 0.1, 0.1), "grey": (0.45, 0.45, 0.45), "white": (0.9, 0.9, 0.9), "red": (0.7, 0.2, 0.2),
    "brown": (0.5, 0.35, 0.2), "yellow": (0.8, 0.75, 0.3), "green": (0.25, 0.6, 0.25), "cyan": (0.3, 0.7, 0.7),
    "blue": (0.25, 0.35, 0.7), "purple": (0.55, 0.25, 0.6),
}  # fmt: skip


@dataclass(frozen=True)
class WorldBatch:
    """B videos and their truth. Slot 0 of K = 7 is the camera, slots 1 to 6 are things; later things pass in front."""

    video: Tensor  # [B, 3, T, height, width] in [-1, 1]
    plate: Tensor  # [B, 3, T, height, width] in [-1, 1], the background without anything before it
    masks: Tensor  # [B, K, T, height, width] bool: the visible part of each thing; of the camera, of the first frame
    boxes: Tensor  # [B, K, T, 4] float: x0, y0, x1, y1 as a user would draw it, which may reach past the picture's edge
    used: Tensor  # [B, K] bool
    shown: Tensor  # [B, K, T] bool: the thing is there
    by_box: Tensor  # [B, K] bool: the thing has a box alone, no mask
    middle: Tensor  # [B, K, T, 2] x and y in pixels of the point that a thing turns around
    spin: Tensor  # [B, K] radians per frame; positive turns clockwise on the screen, 0 does not turn
    captions: list[str]
    says_spin: Tensor  # [B] bool: the caption says which way things spin

    def trajectory(self, i: int, kind: Literal["box", "mask"] = "box", fill: Fill = fill_box) -> Trajectory:
        """What a user would have drawn for video i. With "mask" every thing has its masks, in all frames.

        `fill` gives the masks of things that have a box alone.
        """
        slots = self.used[i].nonzero()[:, 0].tolist()
        boxes = self.boxes[i, slots].double().masked_fill(~self.shown[i, slots, :, None], math.nan).cpu().numpy()
        masks = self.masks[i, slots].cpu().numpy()
        if kind == "box":
            parts = zip(boxes[:, 0], masks[:, 0], self.by_box[i, slots].tolist(), strict=True)
            masks = np.stack([fill(box, mask.shape) if by_box else mask for box, mask, by_box in parts])
        names = ["the camera" if k == 0 else f"thing {k}" for k in slots]
        return Trajectory(boxes, masks, np.array(PALETTE[: len(slots)], dtype=np.uint8), names)

    def maps(self, style: Maps, kind: Literal["box", "mask"], find: Callable | None = None) -> Tensor:
        """Painted maps of all videos, [B, 3, T, height, width]. `find`: toy/segment.py's `segment`, as in use."""
        maps = []
        for i, first in enumerate(self.video[:, :, 0].cpu()):
            fill = partial(find, to_uint8(first[:, None])[0]) if find else fill_box
            maps.append(self.trajectory(i, kind, fill).maps(kind, first if style == "pixels" else None))
        return torch.stack(maps).to(self.video.device)

    def subset(self, videos: Sequence[int]) -> "WorldBatch":
        """These videos of the batch."""
        parts = {name: value[list(videos)] for name, value in vars(self).items() if name != "captions"}
        return WorldBatch(**parts, captions=[self.captions[i] for i in videos])


class World:
    """`World("train").batch([0, 1, 2])` renders videos 0, 1 and 2 of the split, each the same in any batch."""

    def __init__(self, split: str = "train", size: tuple[int, int] = (128, 128), frames: int = 9):
        self.split, self.first, self.size, self.frames = split, SPLITS[split], size, frames

    def batch(self, indices: Sequence[int]) -> WorldBatch:
        """Rendered eight at a time: more at once take far more memory, and on a CPU more time."""
        parts = [vars(self.render(indices[n : n + 8])) for n in range(0, len(indices), 8)]
        captions = [caption for part in parts for caption in part.pop("captions")]
        return WorldBatch(**{name: torch.cat([part[name] for part in parts]) for name in parts[0]}, captions=captions)

    def render(self, indices: Sequence[int]) -> WorldBatch:
        """`batch`, of all videos at once."""
        B, K, T, (height, width) = len(indices), MOST, self.frames, self.size
        short, extent = min(self.size), torch.tensor([width, height]).double()
        time, bank = torch.linspace(0, 1, T).double(), picture_bank(self.split, extent.device)
        u = np.stack([np.random.default_rng([6, self.first + int(i)]).random(739) for i in indices])
        u, drawn = torch.from_numpy(u).to(extent), 0

        def draw(*shape: int, low: float = 0, high: float = 1) -> Tensor:
            """Each video's next random numbers, uniform from low to high: [B, *shape]."""
            nonlocal drawn
            drawn += math.prod(shape)
            return low + (high - low) * u[:, drawn - math.prod(shape) : drawn].reshape(B, *shape)

        # 1. The camera: where the middle of the first frame goes, and how large that frame becomes.
        camera, way = draw() < 0.25, draw(high=3).long()  # pans, zooms, or both
        pan = bezier(draw(4, 2) * 0.8 - 0.4, time)  # (B, T, 2)
        pan = (pan - pan[:, :1]) * extent * (camera & (way != 1))[:, None, None]
        zoom = (draw(low=-0.3, high=0.45) * (camera & (way != 0)))[:, None] * (time * time * (3 - 2 * time))
        zoom = zoom.exp()  # (B, T)

        # 2. The background, a part of a picture whose pixels are about as fine as the video's.
        behind, density = draw(high=len(bank)).long(), draw(low=0.5, high=1.1)
        place, mirror = draw(2), 1 - 2 * (draw() < 0.5).double()
        grey, contrast, level = draw() < 0.15, draw(low=0.6, high=1.5), draw(low=0.35, high=0.65)
        tint = draw(3, low=0.85, high=1.15).float()
        middle = inner_place(place, density[:, None] * extent / 2)
        scale = (density[:, None] / zoom)[..., None]  # bank pixels to a pixel, (B, T, 1)
        x, y = (torch.arange(side) + 0.5 - side / 2 - pan[..., n, None] for n, side in enumerate((width, height)))
        x, y = x * scale * mirror[:, None, None] + middle[:, :1, None], y * scale + middle[:, 1:, None]
        plate = torch.empty(B, 3, T, height, width)
        for some, frames in ((~camera, 1), (camera, T)):  # without a camera one frame serves all
            there = x[some, :frames, None].float(), y[some, :frames, :, None].float()
            plate[some] = look_up(bank[behind[some]], *there)

        def tone(pictures: Tensor, videos: Tensor | slice) -> Tensor:
            """Pictures [N, 3, T, H, W] of these videos as a camera might have taken them."""
            share, gain, middle = (v[videos].float()[:, None, None, None, None] for v in (grey, contrast, level))
            colors = pictures.lerp(pictures.mean(1, keepdim=True), share)
            return ((colors - 0.5) * gain + middle).clamp_(0, 1)

        plate = tone(plate * tint[..., None, None, None], slice(None))

        # 3. How many things, of which shape, and what they are made of: in one of three, the picture behind.
        count = torch.bucketize(draw(), torch.tensor([0.3, 0.55, 0.73, 0.83, 0.92]).double()) + 1
        used = torch.arange(K) < count[:, None]  # (B, K)
        shape, corners = draw(K, high=len(SHAPES)).long(), draw(K, low=3, high=7).long()
        stretch = draw(K, 1, low=-0.225, high=0.225).exp()
        stretch = torch.cat([1 / stretch, stretch], -1)  # (B, K, 2)
        waves, offsets = draw(K, 4, low=-0.12, high=0.12), draw(K, 4, high=2 * math.pi)
        upright = shape == 2
        turns = (draw(K) < 0.4) & ~upright
        spin = (draw(K) * 2 - 1).sign() * torch.deg2rad(draw(K, low=5, high=15)) * turns
        angle = (draw(K, high=2 * math.pi) * ~upright)[..., None] + spin[..., None] * torch.arange(T)
        other = draw(K, high=len(bank)).long()
        source = torch.where(draw(K) < 1 / 3, behind[:, None], other)
        fine, own_place, own_tint = draw(K, low=0.5, high=1.1), draw(K, 2), draw(K, 3, low=0.75, high=1.25).float()
        soft = draw(K, low=-0.3, high=1).exp()  # pixels from the ground to a thing's own colour
        appears = (draw(K) < 0.1) * (1 + (draw(K) * (T - 1) / 2).floor())
        shown = used[..., None] & (torch.arange(T) >= appears[..., None])  # (B, K, T)
        shaded, shade = draw(K) < 0.25, draw(K, low=0.2, high=0.5)
        away = torch.stack([draw(K, low=-0.3, high=0.3), draw(K, low=0.1, high=0.5)], -1)
        by_box, loose = draw(K) < 0.5, draw(K) < 0.5
        margin = draw(K, 4, high=0.15) * (by_box & loose)[..., None]

        # 4. Sizes and paths. The fewer things, the larger they can be. The first frame shows nearly every thing whole,
        # and they still cross, enter and leave later. Half of them go along with the camera.
        most = torch.tensor([0.6, 0.48, 0.38, 0.3, 0.25, 0.22])[count - 1].double()[:, None]
        first, ratio = 0.1 * (most / 0.1) ** draw(K), draw(K, low=0.7, high=1.4)
        last = torch.minimum((first * ratio).clamp(min=0.09), most)
        radius = short * torch.lerp(first[..., None], last[..., None], time)  # (B, K, T)
        path = bezier(draw(8, K, 4, 2), time)  # (B, 8, K, T, 2)
        drift = draw(8, K, 1, 2, low=-0.5, high=0.5) * time[:, None]
        start = 1.1 * path[..., :1, :] - 0.05
        path = (start + 0.5 * (path - path[..., :1, :]) + drift).clamp(-0.4, 1.4)  # 0 to 1 lies within the picture
        wide = 2 * radius[:, None, ..., None]
        at = extent / 2 + (path - 0.5) * torch.maximum(extent - wide, extent / 2)
        center = at[torch.arange(B), furthest_apart(at, used, enough=short / 2, later=0.3)]  # (B, K, T, 2)
        along = (draw(K) < 0.5)[..., None]
        moved = extent / 2 + pan[:, None] + zoom[:, None, :, None] * (center - extent / 2)
        center, radius = center.where(~along[..., None], moved), radius.where(~along, radius * zoom[:, None])

        # 5. Only slots in use are drawn: P pairs of a video and a thing. Silhouettes are the distance from the middle
        # to the edge, by direction, in units of the radius; boxes come from points on them.
        b, k = used.nonzero(as_tuple=True)

        def edge(direction: Tensor) -> Tensor:
            """[P, ...] -> the same shape."""
            out = torch.empty_like(direction)
            for kind in range(len(SHAPES)):
                some = shape[b, k] == kind
                at = direction[some]
                parts = (values[b, k][some].to(at).T for values in (waves, offsets, corners[..., None]))
                wave, offset, (count,) = (values[(..., *[None] * (at.ndim - 1))] for values in parts)
                if kind == 0:
                    out[some] = 0.8 + sum(wave[m] * torch.cos((m + 1) * at + offset[m]) for m in range(4))
                elif kind == 1:
                    part = 2 * math.pi / count
                    out[some] = torch.cos(part / 2) / torch.cos(torch.remainder(at, part) - part / 2)
                else:
                    out[some] = 0.8 / torch.maximum(at.cos().abs(), at.sin().abs())
            return out

        around = torch.linspace(0, 2 * math.pi, CORNERS + 1, dtype=torch.float64)[:-1].expand(len(b), -1)
        points = edge(around)[..., None] * torch.stack([around.cos(), around.sin()], -1) * stretch[b, k][:, None]
        x, y = points[:, None].unbind(-1)  # (P, 1, CORNERS)
        cos, sin = angle[b, k].cos()[..., None], angle[b, k].sin()[..., None]  # (P, T, 1)
        turned = radius[b, k][..., None, None] * torch.stack([cos * x - sin * y, sin * x + cos * y], -1)
        low, high = turned.amin(2) + center[b, k], turned.amax(2) + center[b, k]
        extra = margin[b, k][:, None] * torch.cat([high - low, high - low], -1)  # (P, T, 4)
        low, high = low - extra[..., :2], high + extra[..., 2:]

        # 6. Every pixel in the things' own coordinates; alpha, colour and shadow there.
        def wide(values: Tensor) -> Tensor:
            """[B, K, ...] -> [P, ..., 1, 1, 1], to broadcast over frames and pixels."""
            return values[b, k].float()[..., None, None, None]

        radius_, center_ = (values[b, k].float()[..., None, None] for values in (radius, center))
        dx = (torch.arange(width) + 0.5 - center_[:, :, 0]) / radius_  # (P, T, 1, W)
        dy = ((torch.arange(height) + 0.5)[:, None] - center_[:, :, 1]) / radius_  # (P, T, H, 1)
        cos, sin = cos[..., None].float(), sin[..., None].float()
        x, y = cos * dx + sin * dy, cos * dy - sin * dx  # (P, T, H, W)
        sides, away = wide(stretch).unbind(1), wide(away).unbind(1)
        x_, y_ = x / sides[0], y / sides[1]
        distance = (x_.square() + y_.square()).sqrt() / edge(torch.atan2(y_, x_))  # hypot is far slower
        there = shown[b, k][..., None, None]
        alpha = (radius_ / wide(soft) * (1 - distance) + 0.5).clamp(0, 1) * there
        grain = fine * short * first  # bank pixels to a radius
        inset = wide(inner_place(own_place, grain[..., None] * stretch))
        colors = look_up(bank[source[b, k]], x * wide(grain) + inset[:, 0], y * wide(grain) + inset[:, 1])
        colors = tone(colors * wide(own_tint), b)  # (P, 3, T, H, W)
        under = (((dx - away[0]) / sides[0]).square() + ((dy - away[1]) / sides[1]).square()).sqrt()
        dim = wide(shade * shaded) * ((1 - under) / 0.4 + 0.5).clamp(0, 1) * there

        # 7. From back to front. Slot 0 is the camera: the first frame's rectangle, as it moves.
        view = torch.stack([-extent / 2, extent / 2]) * zoom[..., None, None] + (extent / 2 + pan)[:, :, None]
        boxes = torch.zeros(B, K + 1, T, 4)
        boxes[:, 0], boxes[b, k + 1] = view.flatten(2).float(), torch.cat([low, high], -1).float()
        masks = torch.zeros(B, K + 1, T, height, width, dtype=torch.bool)
        masks[:, 0] = inside_box(boxes[:, 0], self.size) & camera[:, None, None, None]
        video = plate.clone()
        for n in range(K):
            pairs = (k == n).nonzero()[:, 0]
            i, a = b[pairs], alpha[pairs]
            video[i] = torch.lerp(video[i] * (1 - dim[pairs][:, None]), colors[pairs], a[:, None])
            masks[i, n + 1] = a > 0.5
            masks[i, 1 : n + 1] &= (a <= 0.5)[:, None]

        # 8. What a caption says.
        says_spin = draw() < 0.5
        core = (distance < 0.6)[:, None].float()
        mean = (colors * core).sum((2, 3, 4)) / core.sum((2, 3, 4)).clamp(min=1)  # (P, 3)
        nearest = (mean[:, None] - torch.tensor(list(COLORS.values()))).square().sum(-1).argmin(-1).tolist()
        ways = {1: " spinning clockwise", -1: " spinning counterclockwise", 0: ""}
        clauses: list[list[str]] = [[] for _ in range(B)]
        for i, n, color in zip(b.tolist(), k.tolist(), nearest, strict=True):
            name = f"a {list(COLORS)[color]} {SHAPES[shape[i, n]]}"
            clauses[i].append(name + ways[int(spin[i, n].sign())] * bool(says_spin[i]))
        return WorldBatch(
            video=video * 2 - 1, plate=plate * 2 - 1, masks=masks, boxes=boxes,
            used=torch.cat([camera[:, None], used], 1),
            shown=torch.cat([camera[:, None, None].expand(-1, -1, T), shown], 1),
            by_box=F.pad(by_box, (1, 0)), spin=F.pad(spin * used, (1, 0)),
            middle=torch.cat([(extent / 2 + pan)[:, None], center], 1).float(),
            captions=[", ".join(names) for names in clauses], says_spin=says_spin,
        )  # fmt: skip


def look_up(pictures: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Colours of pictures, uint8 [N, 3, S, S], at pixels x and y, which broadcast to [N, T, H, W]: [N, 3, T, H, W]."""
    grid = torch.stack(torch.broadcast_tensors(x, y), -1)  # (N, T, H, W, 2)
    at = grid.flatten(1, 2) * (2 / pictures.shape[-1]) - 1
    found = F.grid_sample(pictures.float() / 255, at, padding_mode="reflection", align_corners=False)
    return found.unflatten(2, grid.shape[1:3])


def inside_box(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Which pixels of a picture have their centre in a box: [..., 4] -> bool [..., height, width]."""
    x0, y0, x1, y1 = boxes[..., None].unbind(-2)
    y, x = (torch.arange(side, device=boxes.device) + 0.5 for side in size)
    return ((x >= x0) & (x < x1))[..., None, :] & ((y >= y0) & (y < y1))[..., None]


def inner_place(u: Tensor, half: Tensor) -> Tensor:
    """A point around which `half` pixels each way lie in a picture, if there is one. u [..., 2] in [0, 1]."""
    half = half.clamp(max=CANVAS / 2)
    return half + u * (CANVAS - 2 * half)


def bezier(control: Tensor, time: Tensor) -> Tensor:
    """Cubic Bezier paths: control points [..., 4, 2], times [T] from 0 to 1 -> [..., T, 2]."""
    weights = torch.stack([(1 - time) ** 3, 3 * time * (1 - time) ** 2, 3 * time**2 * (1 - time), time**3])  # (4, T)
    return torch.einsum("...cx,ct->...tx", control, weights)


def furthest_apart(at: Tensor, used: Tensor, enough: float, later: float) -> Tensor:
    """Which of n sets of paths keeps its closest pair furthest apart: [B, n, K, T, 2], used [B, K] bool -> [B].

    Frame 0 counts once, all frames together `later` times. A gap of `enough` pixels is as good as any larger one.
    """
    gap = (at[:, :, :, None] - at[:, :, None]).abs().amax(-1).clamp(max=enough)  # (B, n, K, K, T)
    gap = gap[..., 0] + later * gap.mean(-1)
    pair = used[:, None, :, None] & used[:, None, None, :] & ~torch.eye(used.shape[1], dtype=torch.bool)
    return gap.masked_fill(~pair, torch.inf).amin((2, 3)).argmax(1)
