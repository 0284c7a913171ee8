"""The toy world: procedural videos about which everything is known.

    python -m toy.world --video 3      # writes a held-out video as a user's input: image, masks, boxes.json, prompt

One to three pinwheels (discs, squares and diamonds cut into sectors of two neighbouring hues) move on cubic Bezier
paths over a soft gradient, change size, pass in front of one another, and spin. Rate and direction of the spin are
random: half the captions tell the direction, none the rate. So image and boxes don't determine the video, and a model
that averages over what it can't know blurs. A video follows from one integer; the splits use disjoint ranges.
"""

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from core.config import UserError, run_script
from core.files import write_text
from core.media import to_uint8, write_image, write_video
from trajectory import PALETTE, Trajectory, paint_places

SPLITS = {"train": 0, "validation": 1 << 40, "test": 2 << 40}  # first seed of each split
COLORS = {  # by hue: a mixture of two neighbours is as saturated as they are
    "red": (1.0, 0.1, 0.1), "yellow": (1.0, 1.0, 0.1), "green": (0.1, 1.0, 0.1),
    "cyan": (0.1, 1.0, 1.0), "blue": (0.1, 0.1, 1.0), "magenta": (1.0, 0.1, 1.0),
}  # fmt: skip
SHAPES = ("disc", "square", "diamond")
MOST = 3  # objects in one video
RAMP = 3  # pixels from one sector's colour to the next: as sharp as a lens would show it


class Drawn:
    """What a user would have drawn for B videos, from their `masks`, `boxes`, `count` and `captions`."""

    def trajectory(self, i: int) -> Trajectory:
        """Of video i."""
        n = int(self.count[i])
        return Trajectory(
            boxes=self.boxes[i, :n].double().cpu().numpy(),
            masks=self.masks[i, :n].cpu().numpy(),
            colors=np.array(PALETTE[:n], dtype=np.uint8),
            names=[caption.split(" spinning")[0] for caption in self.captions[i].split(", ")],
        )

    def maps(self, kind: Literal["box", "mask"], dark: Tensor, places: bool = False) -> Tensor:
        """What `Trajectory.maps` paints, of all videos at once: float32 [B, 3, T, height, width] in [-1, 1].

        dark [B, T] bool: in which frames nothing is drawn. Frame 0 always is.
        """
        masks, device = self.masks, self.masks.device
        height, width = masks.shape[-2:]
        x, y = torch.arange(width, device=device), torch.arange(height, device=device)
        x0, y0, x1, y1 = (side[..., None] for side in self.boxes.unbind(-1))  # (B, K, T, 1)
        x0, x1, y0, y1 = x0.clamp(0, width), x1.clamp(0, width), y0.clamp(0, height), y1.clamp(0, height)
        columns, rows = (x >= x0) & (x < x1), (y >= y0) & (y < y1)  # (B, K, T, W) and (B, K, T, H)
        drawn = columns[..., None, :] & rows[..., None]
        if not places:
            thick = max(1, min(height, width) // 100)
            sides, ends = (x < x0 + thick) | (x >= x1 - thick), (y < y0 + thick) | (y >= y1 - thick)
            drawn &= sides[..., None, :] | ends[..., None]
        if kind == "mask":
            drawn = masks.clone()
        drawn[:, :, 0] = masks[:, :, 0]
        used = torch.arange(masks.shape[1], device=device) < self.count[:, None]
        lit = ~dark.to(device) | (torch.arange(masks.shape[2], device=device) == 0)  # (B, T)
        drawn = drawn & used[:, :, None, None, None] & lit[:, None, :, None, None]
        if places:
            return paint_places(self.boxes, drawn)
        canvas = torch.full((len(masks), 3, *masks.shape[2:]), -1.0, device=device)
        colors = torch.tensor(PALETTE[: masks.shape[1]], device=device).float() / 127.5 - 1
        for k, color in enumerate(colors):
            canvas = torch.where(drawn[:, k, None], color[:, None, None, None], canvas)
        return canvas


@dataclass(frozen=True)
class ToyBatch(Drawn):
    """B toy videos and their truth. Of K = 3 object slots `count` are in use; later objects pass in front."""

    video: Tensor  # [B, 3, T, S, S] in [-1, 1]
    masks: Tensor  # [B, K, T, S, S] bool, the visible part of each object
    boxes: Tensor  # [B, K, T, 4] int: x0, y0, x1, y1 of the whole object, covered or not; x1 and y1 are exclusive
    count: Tensor  # [B] int
    colors: Tensor  # [B, K, 2] indices into COLORS
    sectors: Tensor  # [B, K] 2 or 4
    spin: Tensor  # [B, K] radians per frame; positive turns clockwise on the screen
    captions: list[str]
    told: Tensor  # [B] bool: the caption says the direction


class ToyWorld:
    """`ToyWorld("train").batch([0, 1, 2])` renders videos 0, 1 and 2 of the split."""

    def __init__(self, split: str = "train", size: int = 48, frames: int = 9):
        self.first, self.size, self.frames = SPLITS[split], size, frames

    def batch(self, indices: list[int]) -> ToyBatch:
        # Each video has draws of its own: it is the same in any batch.
        u = np.stack([np.random.default_rng(self.first + int(i)).random(256) for i in indices])
        draw = Draws(u)
        size, B, K, T = self.size, len(indices), MOST, self.frames

        count = draw.integer((), 1, MOST)
        shape = draw.integer((K,), 0, len(SHAPES) - 1)
        sectors = 2 * draw.integer((K,), 1, 2)
        hue = 2 * draw((K,)).argsort(1) + draw.integer((1,), 0, 1)  # no colour twice in one video
        order = draw.integer((K,), 0, 1)
        colors = torch.stack([hue + order, hue + 1 - order], dim=2) % len(COLORS)  # (B, K, 2)
        spin = (draw((K,)) * 2 - 1).sign() * torch.deg2rad(draw.between((K,), 10, 20))
        phase = draw.between((K,), 0, 2 * math.pi)
        first, last = draw.between((2, K, 1), 14, 23).unbind(1)
        diameter = torch.lerp(first, last, torch.linspace(0, 1, T).double())  # (B, K, T)

        # Paths that keep the whole object inside. The image shows every object, and they still cross later.
        path = bezier(draw((8, K, 4, 2)), torch.linspace(0, 1, T).double())  # (B, 8, K, T, 2)
        start = (1.4 * path[..., :1, :] - 0.2).clamp(0, 1)
        path = (start + 0.65 * (path - path[..., :1, :])).clamp(0, 1)
        at = path * (size - diameter)[:, None, ..., None]
        used = torch.arange(K) < count[:, None]  # (B, K)
        path = path[torch.arange(B), furthest_apart(at, used, enough=23, later=1)]  # (B, K, T, 2)

        side = diameter.round()
        corner = (path * (size - side)[..., None]).round()
        boxes = torch.cat([corner, corner + side[..., None]], -1)  # whole pixels: a box tells its silhouette exactly

        # Silhouettes and sectors, from pixel centres relative to the box.
        center, side = (boxes[..., :2] + boxes[..., 2:]).float() / 2, side.float()
        radius = (side / 2)[..., None, None]
        pixel = torch.arange(size) + 0.5
        dx = (pixel - center[..., 0:1])[..., None, :] / radius  # (B, K, T, 1, S)
        dy = (pixel - center[..., 1:2])[..., :, None] / radius  # (B, K, T, S, 1)
        inside = torch.stack([dx**2 + dy**2 <= 1, torch.maximum(dx.abs(), dy.abs()) <= 1, dx.abs() + dy.abs() <= 1], 2)
        inside = inside[torch.arange(B)[:, None], torch.arange(K), shape] & used[:, :, None, None, None]
        angle = (phase[:, :, None] + spin[:, :, None] * torch.arange(T)).float()  # (B, K, T)
        periods = (sectors / 2)[..., None, None, None]
        wave = (periods * (torch.atan2(dy, dx) - angle[..., None, None])).sin() / periods
        across = wave * torch.hypot(dx, dy) * radius  # pixels to the sectors' edge, near it
        mix = (0.5 - across / RAMP).clamp(0, 1)  # (B, K, T, S, S)

        # A gradient between two greyish colours, then the objects from back to front.
        ends = (draw.between((2, 1), 0.2, 0.8) + draw.between((2, 3), -0.08, 0.08)).float()
        direction = draw.between((), 0, 2 * math.pi).float()
        ramp = pixel / size - 0.5
        slope = direction.cos()[:, None, None] * ramp + direction.sin()[:, None, None] * ramp[:, None] + 0.5
        frame = ends[:, 0, :, None, None] + (ends[:, 1] - ends[:, 0])[..., None, None] * slope[:, None].clamp(0, 1)
        video = frame[:, :, None].repeat(1, 1, T, 1, 1)
        palette = torch.tensor(list(COLORS.values()))[colors]  # (B, K, 2, 3)
        masks = inside.clone()
        for k in range(K):
            first, other = (palette[:, k, i, :, None, None, None] for i in range(2))
            video = torch.where(inside[:, None, k], torch.lerp(first, other, mix[:, None, k]), video)
            masks[:, :k] &= ~inside[:, k : k + 1]

        told = draw(()) < 0.5
        names, kinds = list(COLORS), shape.tolist()
        captions = []
        for b in range(B):
            clauses = []
            for k in range(int(count[b])):
                turning = ("counterclockwise", "clockwise")[int(spin[b, k] > 0)]
                one, two = (names[c] for c in colors[b, k])
                article = "an" if one[0] in "aeiou" else "a"
                clause = f"{article} {one} and {two} {SHAPES[kinds[b][k]]}"
                clauses.append(f"{clause} spinning {turning}" if told[b] else clause)
            captions.append(", ".join(clauses))
        return ToyBatch(video * 2 - 1, masks, boxes.long(), count, colors, sectors, spin, captions, told)


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


@dataclass(frozen=True)
class Config:
    out: str = "out/toy"  # folder for image.png, boxes.json, the masks it names, prompt.txt and truth.mp4
    split: Literal["train", "validation", "test"] = "test"  # which seeds
    video: int = 0  # its number in the split
    every: int = 4  # frames from one keyframe to the next; the path between is interpolated


def main(cfg: Config) -> None:
    if cfg.video < 0 or cfg.every < 1:
        raise UserError(f"--video {cfg.video} --every {cfg.every}: give a video from 0 and a distance from 1")
    world, out = ToyWorld(cfg.split), Path(cfg.out)
    batch = world.batch([cfg.video])
    trajectory, frames, objects = batch.trajectory(0), to_uint8(batch.video[0], scale=8), []
    for k, name in enumerate(trajectory.names):
        mask = f"mask_{k}.png"
        write_image(out / mask, trajectory.masks[k, 0].astype(np.uint8) * 255)
        keys = sorted({*range(0, world.frames, cfg.every), world.frames - 1})
        objects.append({"name": name, "mask": mask, "boxes": {str(t): batch.boxes[0, k, t].tolist() for t in keys}})
    write_image(out / "image.png", to_uint8(batch.video[0, :, :1])[0])
    top = {"num_frames": world.frames, "width": world.size, "height": world.size, "objects": objects}
    write_text(out / "boxes.json", json.dumps(top, indent=1))
    write_text(out / "prompt.txt", batch.captions[0])
    write_video(out / "truth.mp4", frames, fps=8)
    print(f"{out}: {batch.captions[0]}")


if __name__ == "__main__":
    run_script(main, Config)
