"""The pictures that the small preset's world is made of: dead leaves, and photographs that nothing is trained on."""

import math
import os
from functools import lru_cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from core.config import require
from core.files import atomic
from core.media import cover_frames, read_picture

CANVAS = 256  # side of a picture, of which videos show parts
SPLITS = {"train": 0, "validation": 1 << 40, "test": 2 << 40, "photographs": 3 << 40}  # first seed of each
BANK = {"train": 512, "validation": 128, "test": 128}  # pictures of each split
PHOTOGRAPHS = ("astronaut.png", "camera.png", "chelsea.png", "coffee.png", "motorcycle_left.png", "rocket.jpg")


@lru_cache
def picture_bank(split: str, device: torch.device) -> Tensor:
    """The pictures of a split, uint8 [N, 3, CANVAS, CANVAS]. Dead leaves are drawn once, in a minute, and cached.

    "photographs": the middle squares of scikit-image's photographs. UserError without the package.
    """
    if split == "photographs":
        package = find_spec("skimage")
        require(package, "photographs: come with scikit-image; pip install -r requirements-dev.txt")
        files = [Path(package.origin).parent / "data" / name for name in PHOTOGRAPHS]
        squares = [cover_frames(read_picture(file)[None], (CANVAS, CANVAS)).byte()[None, :, 0] for file in files]
        return torch.cat(squares).to(device)
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    file = cache / f"flashmotion/dead_leaves_{split}_{BANK[split]}x{CANVAS}.npy"
    if not file.exists():
        print(f"{file}: drawing the world's pictures, once", flush=True)
        pictures = np.stack([dead_leaves(SPLITS[split] + i) for i in range(BANK[split])])
        with atomic(file) as temporary, temporary.open("wb") as out:
            np.save(out, (pictures * 255).round().astype(np.uint8))
    return torch.from_numpy(np.load(file, mmap_mode="c")).to(device)  # a CPU reads each when it is shown


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
    power_law = (least**-2 + u * (most**-2 - least**-2)) ** -0.5
    radii = power_law if draw.random() < 0.6 else least * (most / least) ** u
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
