"""The small preset's world: pieces of pictures move over a picture, and everything about it is known.

    python -m toy.world --video 3      # writes a held-out video as a user's input: image, masks, boxes.json, prompt

The pictures are dead leaves: random shapes that cover one another, of power-law sizes, shaded, with gratings and grain,
mostly in dull colours as photographs are. One to six things (blobs, polygons, rectangles) with a texture of their own
move on cubic Bezier paths, change size, pass in front of one another and cross the picture's edge; some throw a shadow,
some spin, some appear later. In a quarter of the videos the camera pans and zooms. Half of the things are told by their
boxes alone, drawn more or less closely, so networks learn to find the thing in its box. A video follows from one
integer; the splits use disjoint seeds, and pictures of their own. Dead leaves carry over to photographs in low-level
tasks (Baradad et al. 2021, "Learning to see by looking at noise"; Achddou et al. 2021, "Synthetic images as a
regularity prior").
"""

import json
import math
import os
from collections.abc import Sequence
from dataclasses import dataclass, fields
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.config import UserError, run_script
from core.files import atomic, write_text
from core.media import fit_frames, read_picture, to_uint8, write_image, write_video
from trajectory import PALETTE, Trajectory

CANVAS = 256  # side of a dead-leaves picture, of which videos show parts
BANK = {"train": 512, "validation": 128, "test": 128}  # pictures of each split
PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")
SPLITS = {"train": 0, "validation": 1 << 40, "test": 2 << 40, "photographs": 3 << 40}  # first seed of each
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
    by_box: Tensor  # [B, K] bool: told by its box alone, not by its mask
    cover: Tensor  # [B, height, width] in [0, 1]: how much of the background things and shadows hide in frame 0
    middle: Tensor  # [B, K, T, 2] x and y in pixels of the point that a thing turns around
    spin: Tensor  # [B, K] radians per frame; positive turns clockwise on the screen, 0 does not turn
    captions: list[str]
    told: Tensor  # [B] bool: the caption says the direction

    def trajectory(self, i: int, kind: Literal["box", "mask"] = "box") -> Trajectory:
        """What a user would have drawn for video i. With "mask" every thing is told by its masks, in all frames."""
        slots = self.used[i].nonzero()[:, 0].tolist()
        boxes = self.boxes[i, slots].double().masked_fill(~self.shown[i, slots, :, None], math.nan)
        masks = self.masks[i, slots]
        if kind == "box":
            masks = masks[:, 0].clone()
            height, width = masks.shape[-2:]
            for n, k in enumerate(slots):
                if self.by_box[i, k] and self.shown[i, k, 0]:
                    x0, y0, x1, y1 = self.boxes[i, k, 0].round().long().tolist()
                    masks[n, max(y0, 0) : min(y1, height), max(x0, 0) : min(x1, width)] = True
        return Trajectory(
            boxes=boxes.cpu().numpy(),
            masks=masks.cpu().numpy(),
            colors=np.array(PALETTE[: len(slots)], dtype=np.uint8),
            names=["the camera" if k == 0 else f"thing {k}" for k in slots],
        )

    def maps(
        self, style: Literal["outline", "pixels"], kind: Literal["box", "mask"], dark: Tensor | None = None
    ) -> Tensor:
        """Painted maps of all videos, [B, 3, T, height, width]. dark [B, T] bool: frames in which nothing is told."""
        painted = []
        for i in range(len(self.video)):
            trajectory = self.trajectory(i, kind)
            if dark is not None and dark[i].any():
                trajectory = trajectory.sparse((~dark[i]).nonzero()[:, 0].tolist())
            painted.append(trajectory.maps(kind, self.video[i, :, 0].cpu() if style == "pixels" else None))
        return torch.stack(painted).to(self.video.device)

    def subset(self, keep: Sequence[int]) -> "WorldBatch":
        """These videos of the batch."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return WorldBatch(**{n: [v[i] for i in keep] if n == "captions" else v[list(keep)] for n, v in values.items()})


class World:
    """`World("train").batch([0, 1, 2])` renders videos 0, 1 and 2 of the split.

    The split "photographs" has scikit-image's photographs instead of dead leaves, which nothing is trained on.
    """

    def __init__(self, split: str = "train", size: tuple[int, int] = (128, 128), frames: int = 9):
        self.split, self.first, self.size, self.frames = split, SPLITS[split], size, frames

    def batch(self, indices: Sequence[int]) -> WorldBatch:
        # Each video has draws of its own: it is the same in any batch.
        u = np.stack([np.random.default_rng([6, self.first + int(i)]).random(736) for i in indices])
        draw, bank = Draws(u), picture_bank(self.split, torch.get_default_device())
        B, K, T, (height, width) = len(indices), MOST, self.frames, self.size
        short, extent = min(self.size), torch.tensor([width, height]).double()
        time = torch.linspace(0, 1, T).double()

        # 1. The camera: where the middle of the first frame goes, and how large that frame becomes.
        camera, way = draw(()) < 0.25, draw.integer((), 0, 2)  # pans, zooms, or both
        pan = bezier(draw((4, 2)) * 0.8 - 0.4, time)  # (B, T, 2)
        pan = (pan - pan[:, :1]) * extent * (camera & (way != 1))[:, None, None]
        zoom = (draw.between((), -0.3, 0.45) * (camera & (way != 0)))[:, None] * (time * time * (3 - 2 * time))
        zoom = zoom.exp()  # (B, T)

        # 2. The background, a part of a picture whose pixels are about as fine as the video's.
        behind, density = draw.integer((), 0, len(bank) - 1), draw.between((), 0.5, 1.1)
        place, mirror = draw((2,)), 1 - 2 * (draw(()) < 0.5).double()
        tint = draw.between((3,), 0.85, 1.15).float()
        middle = inner_place(place, density[:, None] * extent / 2)
        plate = torch.empty(B, 3, T, height, width)
        for some, frames in ((~camera, 1), (camera, T)):  # without a camera one frame serves all
            scale = (density[some, None] / zoom[some, :frames])[..., None]  # bank pixels to a pixel
            lines = []
            for n, flip in ((0, mirror[some, None, None]), (1, 1)):
                line = torch.arange(self.size[1 - n]) + 0.5 - extent[n] / 2 - pan[some, :frames, n, None]
                lines.append((line * scale * flip + middle[some, n, None, None]).float())  # (b, frames, W or H)
            whole = (-1, -1, height, width)
            x, y = lines[0][:, :, None].expand(whole), lines[1][..., None].expand(whole)
            plate[some] = look_up(bank[behind[some]], x, y)
        plate = (plate * tint[..., None, None, None]).clamp_(0, 1)

        # 3. How many things, of which shape, and what they are made of: in one of three, the picture behind.
        count = torch.bucketize(draw(()).contiguous(), torch.tensor([0.3, 0.55, 0.73, 0.83, 0.92]).double()) + 1
        used = torch.arange(K) < count[:, None]  # (B, K)
        shape, corners = draw.integer((K,), 0, len(SHAPES) - 1), draw.integer((K,), 3, 6)
        stretch = draw.between((K, 1), -0.225, 0.225).exp()
        stretch = torch.cat([1 / stretch, stretch], -1)  # (B, K, 2)
        waves, offsets = draw.between((K, 4), -0.12, 0.12), draw.between((K, 4), 0, 2 * math.pi)
        upright = shape == 2
        turns = (draw((K,)) < 0.4) & ~upright
        spin = (draw((K,)) * 2 - 1).sign() * torch.deg2rad(draw.between((K,), 5, 15)) * turns
        angle = (draw.between((K,), 0, 2 * math.pi) * ~upright)[..., None] + spin[..., None] * torch.arange(T)
        other = draw.integer((K,), 0, len(bank) - 1)
        source = torch.where(draw((K,)) < 1 / 3, behind[:, None], other)
        fine, own_place, own_tint = draw.between((K,), 0.5, 1.1), draw((K, 2)), draw.between((K, 3), 0.75, 1.25).float()
        soft = draw.between((K,), -0.3, 1).exp()  # pixels from the ground to a thing's own colour
        appears = (draw((K,)) < 0.1) * (1 + (draw((K,)) * (T - 1) / 2).floor())  # the frame from which a thing is there
        shaded, shade = draw((K,)) < 0.25, draw.between((K,), 0.2, 0.5)
        away = torch.stack([draw.between((K,), -0.3, 0.3), draw.between((K,), 0.1, 0.5)], -1)
        by_box, loose = draw((K,)) < 0.5, draw((K,)) < 0.5
        margin = draw.between((K, 4), 0, 0.15) * (by_box & loose)[..., None]

        # 4. Sizes and paths. The fewer things, the larger they can be. The first frame shows nearly every thing whole,
        # and they still cross, enter and leave later. Half of them go along with the camera.
        most = torch.tensor([0.45, 0.36, 0.3, 0.25, 0.22, 0.2])[count - 1].double()[:, None]
        first, ratio = 0.1 * (most / 0.1) ** draw((K,)), draw.between((K,), 0.7, 1.4)
        last = torch.minimum((first * ratio).clamp(min=0.09), most)
        radius = short * torch.lerp(first[..., None], last[..., None], time)  # (B, K, T)
        path = bezier(draw((8, K, 4, 2)), time)  # (B, 8, K, T, 2)
        drift = draw.between((8, K, 1, 2), -0.5, 0.5) * time[:, None]
        start = 1.1 * path[..., :1, :] - 0.05
        path = (start + 0.5 * (path - path[..., :1, :]) + drift).clamp(-0.4, 1.4)  # 0 to 1 lies within the picture
        wide = 2 * radius[:, None, ..., None]
        at = extent / 2 + (path - 0.5) * torch.maximum(extent - wide, extent / 2)
        center = at[torch.arange(B), furthest_apart(at, used, enough=short / 2, later=0.3)]  # (B, K, T, 2)
        along = (draw((K,)) < 0.5)[..., None]
        moved = extent / 2 + pan[:, None] + zoom[:, None, :, None] * (center - extent / 2)
        center, radius = center.where(~along[..., None], moved), radius.where(~along, radius * zoom[:, None])

        # 5. Only slots in use are drawn: P pairs of a video and a thing. Silhouettes are the distance from the middle
        # to the edge, by direction, in units of the radius; boxes come from points on them.
        b, k = used.nonzero(as_tuple=True)
        radius_, center_, stretch_ = radius[b, k], center[b, k], stretch[b, k]  # (P, T), (P, T, 2), (P, 2)

        def edge(direction: Tensor) -> Tensor:
            """[P, ...] -> the same shape."""
            out = torch.empty_like(direction)
            kinds, over = shape[b, k], (...,) + (None,) * (direction.ndim - 1)
            for kind in range(3):
                some = (kinds == kind).nonzero()[:, 0]
                i, n, at = b[some], k[some], direction[some]
                if kind == 0:
                    wave, offset = waves[i, n].to(at), offsets[i, n].to(at)
                    out[some] = 0.8 + sum(
                        wave[:, m][over] * torch.cos((m + 1) * at + offset[:, m][over]) for m in range(4)
                    )
                elif kind == 1:
                    part = (2 * math.pi / corners[i, n].to(at))[over]
                    out[some] = torch.cos(part / 2) / torch.cos(torch.remainder(at, part) - part / 2)
                else:
                    out[some] = 0.8 / torch.maximum(at.cos().abs(), at.sin().abs())
            return out

        around = torch.linspace(0, 2 * math.pi, CORNERS + 1, dtype=torch.float64)[:-1].expand(len(b), -1)
        points = edge(around)[..., None] * torch.stack([around.cos(), around.sin()], -1) * stretch_[:, None]
        cos, sin = angle[b, k].cos()[..., None], angle[b, k].sin()[..., None]  # (P, T, 1)
        x, y = (points[:, None, :, n] for n in range(2))  # (P, 1, CORNERS)
        turned = radius_[..., None, None] * torch.stack([cos * x - sin * y, sin * x + cos * y], -1)
        low, high = (f(turned, 2) + center_ for f in (torch.amin, torch.amax))
        extra = margin[b, k][:, None] * torch.cat([high - low, high - low], -1)  # (P, T, 4)
        low, high = low - extra[..., :2], high + extra[..., 2:]

        # 6. Every pixel in the things' own coordinates; alpha, colour and shadow there.
        center_, radius_ = center_.float()[..., None, None], radius_.float()[..., None, None]
        dx = (torch.arange(width) + 0.5 - center_[:, :, 0]) / radius_  # (P, T, 1, W)
        dy = ((torch.arange(height) + 0.5)[:, None] - center_[:, :, 1]) / radius_  # (P, T, H, 1)
        cos, sin = (z[..., None].float() for z in (cos, sin))
        wide, high_ = stretch_.float().T[..., None, None, None]
        x, y = cos * dx + sin * dy, cos * dy - sin * dx  # (P, T, H, W)
        distance = length(x / wide, y / high_) / edge(torch.atan2(y / high_, x / wide))
        there = (torch.arange(T) >= appears[b, k][:, None])[..., None, None]  # (P, T, 1, 1)
        alpha = (radius_ / soft[b, k].float()[:, None, None, None] * (1 - distance) + 0.5).clamp(0, 1) * there
        grain = (fine * short * first)[b, k]  # bank pixels to a radius
        inset = inner_place(own_place[b, k], grain[:, None] * stretch_)
        grain, inset = grain.float()[:, None, None, None], inset.float()[..., None, None, None]
        colors = look_up(bank[source[b, k]], x * grain + inset[:, 0], y * grain + inset[:, 1])
        colors = (colors * own_tint[b, k][..., None, None, None]).clamp_(0, 1)  # (P, 3, T, H, W)
        aside, below = away[b, k].float().T[..., None, None, None]
        under = length((dx - aside) / wide, (dy - below) / high_)
        dim = (shade * shaded)[b, k].float()[:, None, None, None] * ((1 - under) / 0.4 + 0.5).clamp(0, 1) * there

        # 7. From back to front.
        video, inside = plate.clone(), alpha > 0.5
        masks = torch.zeros(B, K, T, height, width, dtype=torch.bool)
        masks[b, k] = inside
        clear = torch.ones(B, height, width)
        for n in range(K):
            pairs = (k == n).nonzero()[:, 0]
            i, a = b[pairs], alpha[pairs][:, None]
            video[i] = torch.lerp(video[i] * (1 - dim[pairs][:, None]), colors[pairs], a)
            masks[i, :n] &= ~inside[pairs][:, None]
            clear[i] *= (1 - alpha[pairs, 0]) * (1 - dim[pairs, 0])

        # 8. The camera is slot 0: the first frame's rectangle, as it moves.
        corner = torch.stack([-extent / 2, extent / 2]) * zoom[..., None, None] + (extent / 2 + pan)[:, :, None]
        boxes = torch.zeros(B, K + 1, T, 4)
        boxes[:, 0] = corner.flatten(2).float()  # (B, T, 4)
        boxes[b, k + 1] = torch.cat([low, high], -1).float()
        x0, y0, x1, y1 = boxes[:, 0, :, :, None].unbind(2)  # (B, T, 1)
        x, y = torch.arange(width) + 0.5, torch.arange(height) + 0.5
        view = ((x >= x0) & (x < x1))[:, :, None] & ((y >= y0) & (y < y1))[..., None]  # (B, T, H, W)
        masks = torch.cat([(view & camera[:, None, None, None])[:, None], masks], 1)
        used = torch.cat([camera[:, None], used], 1)
        shown = torch.zeros(B, K + 1, T, dtype=torch.bool)
        shown[:, 0], shown[b, k + 1] = camera[:, None], there[..., 0, 0]
        no, whole = torch.zeros(B, 1), (extent / 2 + pan)[:, None]

        # 9. What a caption says.
        told = draw(()) < 0.5
        core = (distance < 0.6)[:, None].float()
        mean = (colors * core).sum((2, 3, 4)) / core.sum((2, 3, 4)).clamp(min=1)  # (P, 3)
        nearest = (mean[:, None] - torch.tensor(list(COLORS.values()))).square().sum(-1).argmin(-1).tolist()
        ways = {1: " spinning clockwise", -1: " spinning counterclockwise", 0: ""}
        clauses: list[list[str]] = [[] for _ in range(B)]
        for i, n, color in zip(b.tolist(), k.tolist(), nearest, strict=True):
            name = f"a {list(COLORS)[color]} {SHAPES[shape[i, n]]}"
            clauses[i].append(name + ways[int(spin[i, n].sign())] * bool(told[i]))
        return WorldBatch(
            video=video * 2 - 1, plate=plate * 2 - 1, masks=masks, boxes=boxes, used=used, shown=shown,
            by_box=torch.cat([no > 0, by_box], 1), cover=1 - clear, middle=torch.cat([whole, center], 1).float(),
            spin=torch.cat([no.double(), spin], 1) * used, captions=[", ".join(names) for names in clauses], told=told,
        )  # fmt: skip


def look_up(pictures: Tensor, x: Tensor, y: Tensor) -> Tensor:
    """Colours at places in pictures: uint8 [N, 3, S, S]; x and y [N, T, H, W] in pixels -> [N, 3, T, H, W], 0 to 1."""
    grid = torch.stack([x, y], -1).flatten(1, 2) * (2 / pictures.shape[-1]) - 1
    found = F.grid_sample(pictures.float() / 255, grid, padding_mode="reflection", align_corners=False)
    return found.unflatten(2, x.shape[1:3])


def length(x: Tensor, y: Tensor) -> Tensor:
    return (x * x + y * y).sqrt()  # far faster than hypot


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


class Draws:
    """Hands out a batch's uniform numbers [B, n] in order, on the device where tensors are made."""

    def __init__(self, u: np.ndarray):
        self.u, self.at = torch.from_numpy(u).to(torch.get_default_device()), 0

    def __call__(self, shape: tuple[int, ...]) -> Tensor:
        n = math.prod(shape)
        self.at += n
        return self.u[:, self.at - n : self.at].reshape(len(self.u), *shape)  # an error if too few are left

    def between(self, shape: tuple[int, ...], low: float, high: float) -> Tensor:
        return low + (high - low) * self(shape)

    def integer(self, shape: tuple[int, ...], low: int, high: int) -> Tensor:
        return (low + (high - low + 1) * self(shape)).floor().long()


@lru_cache
def picture_bank(split: str, device: torch.device) -> Tensor:
    """The pictures of a split, uint8 [N, 3, CANVAS, CANVAS]. Dead leaves are drawn once, in a minute, and kept."""
    if split == "photographs":
        return photographs().to(device)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = cache / f"flashmotion/dead_leaves_{split}_{BANK[split]}x{CANVAS}.npy"
    if not file.exists():
        print(f"{file}: drawing the world's pictures, once", flush=True)
        pictures = np.stack([dead_leaves(SPLITS[split] + i) for i in range(BANK[split])])
        with atomic(file) as temporary, temporary.open("wb") as out:
            np.save(out, (pictures * 255).round().astype(np.uint8))
    return torch.from_numpy(np.load(file)).to(device)


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
    # As a lens blurs: what is finer than two pixels could not move by half a pixel and stay the same.
    for axis in (1, 2):
        picture = picture / 2 + (np.roll(picture, 1, axis) + np.roll(picture, -1, axis)) / 4
    low, high = np.quantile(picture, [0.01, 0.99])
    contrast, floor = draw.uniform(0.5, 1), draw.uniform(0, 0.3)
    return np.clip((picture - low) / max(high - low, 1e-3) * contrast + floor, 0, 1).astype(np.float32)


@dataclass(frozen=True)
class Config:
    out: str = "out/toy"  # folder for image.png, boxes.json, the masks it names, prompt.txt and truth.mp4
    split: Literal["train", "validation", "test"] = "test"  # which seeds
    video: int = 0  # its number in the split
    every: int = 4  # frames from one keyframe to the next; the path between is interpolated


def main(cfg: Config) -> None:
    if cfg.video < 0 or cfg.every < 1:
        raise UserError(f"--video {cfg.video} --every {cfg.every}: give a video from 0 and a distance from 1")
    world, out = World(cfg.split), Path(cfg.out)
    batch = world.batch([cfg.video])
    trajectory, objects = batch.trajectory(0), []
    for k, name in enumerate(trajectory.names):
        frames = np.flatnonzero(~np.isnan(trajectory.boxes[k, :, 0]))
        keys = sorted({*frames[:: cfg.every].tolist(), int(frames[-1])})
        item = {"name": name, "boxes": {str(t): trajectory.boxes[k, t].round(1).tolist() for t in keys}}
        if frames[0] > 0:
            item["visible"] = [[int(frames[0]), world.frames - 1]]
        elif not batch.by_box[0, batch.used[0].nonzero()[k, 0]]:
            item["mask"] = f"mask_{k}.png"
            write_image(out / item["mask"], trajectory.masks[k].astype(np.uint8) * 255)
        objects.append(item)
    write_image(out / "image.png", to_uint8(batch.video[0, :, :1])[0])
    top = {"num_frames": world.frames, "width": world.size[1], "height": world.size[0], "objects": objects}
    write_text(out / "boxes.json", json.dumps(top, indent=1))
    write_text(out / "prompt.txt", batch.captions[0])
    write_video(out / "truth.mp4", to_uint8(batch.video[0], scale=4), fps=8)
    print(f"{out}: {batch.captions[0]}")


if __name__ == "__main__":
    run_script(main, Config)
