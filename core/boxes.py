"""Boxes in videos, x0, y0, x1, y1 in pixels, x1 and y1 exclusive: interpolated, drawn, and found again in maps."""

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from core.media import Size, cover

NEAR = 28  # distance in RGB by which a codec may shift a colour
DARK = 24  # a pixel whose brightest channel is at most this is background, whatever a codec did to it


def place(source: Size, target: Size, xy: np.ndarray) -> np.ndarray:
    """Points [..., 2] or boxes [..., 4] of a source frame, in pixels of the target that covers it."""
    resized, top, left = cover(source, target)
    corners = xy.shape[-1] // 2
    return xy * ([resized[1] / source[1], resized[0] / source[0]] * corners) - [left, top] * corners


def interpolate(frames: np.ndarray, keys: np.ndarray, num_frames: int, kind: str) -> np.ndarray:
    """Keyframes [n] and their boxes [n, 4] -> boxes [T, 4], held before the first and after the last keyframe.

    "smooth" is a monotone cubic per coordinate: Hermite pieces whose slope at an inner keyframe is the weighted
    harmonic mean of the two secants, 0 where their signs differ (Fritsch & Butland 1984), and at both ends the secant.
    A side thus stays between its two keyframes, and two keyframes alone make a straight line.
    """
    track = np.stack([np.interp(np.arange(num_frames), frames, side) for side in keys.T], axis=1)
    if kind == "none":
        track[:] = np.nan
    if kind == "smooth" and len(frames) > 2:
        h = np.diff(frames)[:, None].astype(float)  # (n - 1, 1)
        secant = np.diff(keys, axis=0) / h  # (n - 1, 4)
        slope = np.concatenate([secant[:1], np.zeros_like(secant[1:]), secant[-1:]])  # (n, 4)
        before, after = 2 * h[1:] + h[:-1], h[1:] + 2 * h[:-1]  # weights of the secants
        with np.errstate(divide="ignore", invalid="ignore"):
            mean = (before + after) / (before / secant[:-1] + after / secant[1:])
        slope[1:-1] = np.where(secant[:-1] * secant[1:] > 0, mean, 0)
        inner = np.arange(frames[0], frames[-1])
        i = np.searchsorted(frames, inner, side="right") - 1  # the piece that a frame lies in
        s = (inner - frames[i])[:, None] / h[i]
        # The Hermite cubic is the chord and a correction that vanishes at both keyframes.
        track[inner] += h[i] * s * (1 - s) * ((1 - s) * (slope[i] - secant[i]) - s * (slope[i + 1] - secant[i]))
    track[frames] = keys  # to the last bit
    return track


def move(
    picture: Tensor, source: np.ndarray, target: np.ndarray, area: tuple[int, int, int, int], beyond: str = "zeros"
) -> Tensor:
    """The part of a picture [C, height, width] in the box `source` [4], moved and scaled to fill the box `target`.

    `area`, (y0, y1, x0, x1): the rows and columns wanted -> [C, y1 - y0, x1 - x0]. `beyond` the picture lie "zeros", or
    its "reflection". Interpolation is bicubic; no value leaves the range that its channel and 0 have.
    """
    y0, y1, x0, x1 = area
    height, width = picture.shape[-2:]
    scale = (source[2:] - source[:2]) / (target[2:] - target[:2])
    x = (np.arange(x0, x1) + 0.5 - target[0]) * scale[0] + source[0]
    y = (np.arange(y0, y1) + 0.5 - target[1]) * scale[1] + source[1]
    grid = torch.from_numpy(np.stack(np.meshgrid(2 * x / width - 1, 2 * y / height - 1), -1)).float()
    moved = F.grid_sample(picture[None], grid[None], "bicubic", beyond, align_corners=False)[0]
    low, high = picture.amin((1, 2), keepdim=True), picture.amax((1, 2), keepdim=True)
    return moved.clamp(low.clamp(max=0), high.clamp(min=0))


def fill_hole(picture: Tensor, hole: Tensor) -> Tensor:
    """A hole, bool [H, W], gets smooth colours between those around it, or 0: [C, H, W] -> [C, H, W]."""
    if hole.all() or not hole.any():
        return picture.masked_fill(hole, 0)
    # Push-pull (Gortler et al. 1996, "The lumigraph"): filled at half the resolution, enlarged and smoothed.
    seen = F.avg_pool2d(torch.cat([picture.masked_fill(hole, 0), (~hole).float()[None]]), 2, ceil_mode=True)
    half = fill_hole(seen[:-1] / seen[-1], seen[-1] == 0)  # where it is 0 / 0, it is a hole again
    filled = F.interpolate(half[None], scale_factor=2, mode="bilinear")[0, :, : hole.shape[0], : hole.shape[1]]
    for _ in range(4):
        filled = F.avg_pool2d(F.pad(torch.where(hole, filled, picture), [1] * 4, mode="replicate"), 3, stride=1)
    return torch.where(hole, filled, picture)


def whole_pixels(boxes: np.ndarray, size: Size) -> np.ndarray:
    """Boxes [..., 4] to whole pixels inside a picture: at least one of any box that shows, none of others or NaN."""
    edges = size[1], size[0]
    shows = ((boxes[..., :2] < edges) & (boxes[..., 2:] > 0)).all(-1, keepdims=True)  # false for NaN
    boxes = boxes.clip(0, edges * 2)
    low, high = np.floor(boxes[..., :2] + 0.5), np.floor(boxes[..., 2:] + 0.5)
    low = np.where(high <= low, np.floor((boxes[..., :2] + boxes[..., 2:]) / 2), low)  # thinner than a pixel
    high = np.maximum(high, low + 1)
    return np.where(shows, np.concatenate([low, high], axis=-1), 0).astype(int)


def fill_box(box: np.ndarray, size: Size) -> np.ndarray:
    """The mask of a box [4], bool [height, width]."""
    x0, y0, x1, y1 = whole_pixels(box, size)
    mask = np.zeros(size, dtype=bool)
    mask[y0:y1, x0:x1] = True
    return mask


def half_line(size: Size) -> int:
    """How far a line reaches to either side of a box's edge, in pixels: OpenCV draws 2 * half + 1 of them."""
    width = min(size) // 100
    return (width + 1) // 2 if width > 1 else 0


def draw_outlines(video: np.ndarray, boxes: np.ndarray, color: np.ndarray) -> None:
    """Draw boxes [T, 4] into a video [3, T, H, W], pixel for pixel as OpenCV's `rectangle` does for MagicMotion.

    The line is centred on the edges (x1 and y1 count as corners, too), its outer corners are round. Nothing is drawn
    along the picture's border where that cuts a box. NaN draws nothing.
    """
    half = half_line(video.shape[2:])
    for t in np.flatnonzero(~np.isnan(boxes[:, 0])):
        x0, y0, x1, y1 = np.floor(boxes[t] + 0.5).astype(int)
        for row in range(-half, half + 1):
            reach = math.isqrt(half**2 - row**2)
            for y in (y0 + row, y1 + row):
                video[:, t, max(0, y) : max(0, y + 1), max(0, x0 - reach) : max(0, x1 + reach + 1)] = color
        for x in (x0, x1):
            video[:, t, max(0, y0) : max(0, y1 + 1), max(0, x - half) : max(0, x + half + 1)] = color


def draw_overlay(video: np.ndarray, boxes: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Boxes [K, T, 4], and their paths as dots, in brightened colours [K, 3], on a copy of uint8 [T, H, W, 3]."""
    overlay, size, centers = video.copy(), video.shape[1:3], (boxes[..., :2] + boxes[..., 2:]) / 2
    canvas = overlay.transpose(3, 0, 1, 2)  # a view
    reach = np.array([-1, -1, 1, 1]) * max(1, min(size) // 100) / 2  # a dot is as wide as a line
    dots = whole_pixels(np.tile(centers, 2) + reach, size)  # (K, T, 4), all drawn in every frame
    bright = colors.astype(float) / colors.max(axis=1, keepdims=True).clip(1) * 255
    for k, color in enumerate(bright.round().astype(np.uint8)[..., None, None]):
        for x0, y0, x1, y1 in dots[k]:
            canvas[..., y0:y1, x0:x1] = color[..., None]
        draw_outlines(canvas, boxes[k], color)
    return overlay


def flat_colors(frame: np.ndarray, most: int) -> np.ndarray:
    """Colours of the objects painted on black, largest first, `most` + 1 of them at most: [H, W, 3] -> float [K, 3]."""
    # Only pixels like all their neighbours count: at an edge two colours blend into ones that no object has.
    windows = np.lib.stride_tricks.sliding_window_view(frame, (3, 3), axis=(0, 1))  # (H - 2, W - 2, 3, 3, 3)
    flat = (windows.max((-1, -2)) - windows.min((-1, -2))).max(-1) <= 16
    inner = frame[1:-1, 1:-1]
    pixels = inner[flat & (inner.max(-1) > DARK)].astype(float)  # (n, 3)
    base = np.array([65536, 256, 1])
    codes, counts = np.unique(pixels.astype(int) @ base, return_counts=True)
    exact = codes[np.argsort(-counts), None][: most + 1] // base % 256.0
    gaps = abs(exact[:, None] - exact).max(-1) + 255 * np.eye(len(exact))
    if len(codes) <= most and gaps.min(initial=255) > 5:  # no codec has touched them: each is an object's
        return exact
    colors = []
    while len(pixels) and len(colors) <= most:
        code = pixels.astype(int) // 8 @ np.array([1024, 32, 1])
        color = pixels[code == np.bincount(code).argmax()].mean(0)  # of the fullest 8x8x8 cell, then of all around it
        near = np.linalg.norm(pixels - color, axis=1) < 14
        if near.sum() < 3 + frame.size // 30000:  # only specks are left
            break
        colors.append(pixels[near].mean(0))
        pixels = pixels[np.linalg.norm(pixels - colors[-1], axis=1) > 24]
    return np.array(colors).reshape(-1, 3)


def label_pixels(frame: np.ndarray, colors: np.ndarray) -> np.ndarray:
    """Which of the colours each pixel shows: [height, width, 3] -> int8 [height, width], -1 for none."""
    # 4:2:0 video halves the chroma of lines one or two pixels thick, so in small frames anything between a colour and
    # itself at half chroma counts as that colour. Large frames have thicker lines. There, anything narrower than two
    # pixels is a blend of two colours that may look like a third, and is dropped.
    thick = min(frame.shape[:2]) >= 300
    label, bright = np.full(frame.shape[:2], -1, dtype=np.int8), frame.max(-1) > DARK
    distance = np.empty((len(colors), np.count_nonzero(bright)))
    for k, color in enumerate(colors):
        offset = frame[bright] - color  # (n, 3)
        if not thick:
            pale = (color @ [0.299, 0.587, 0.114] - color) / 2  # from the colour to half its chroma
            offset -= (offset @ pale / (pale @ pale + 1e-9)).clip(0, 1)[:, None] * pale
        distance[k] = np.linalg.norm(offset, axis=1)
    label[bright] = np.where(distance.min(0) < NEAR, distance.argmin(0), -1)
    for k, color in enumerate(colors):  # of two near colours the very one, where no codec has touched them
        label[(frame == color).all(-1)] = k
    if thick:
        across = label[:, 1:] == label[:, :-1]
        square = np.pad(across[1:] & across[:-1] & (label[1:, 1:] == label[:-1, 1:]), 1)  # 2x2 equal labels
        label[~(square[1:, 1:] | square[1:, :-1] | square[:-1, 1:] | square[:-1, :-1])] = -1
    return label


def extents(label: np.ndarray, count: int) -> np.ndarray:
    """The box around each label's pixels, [count, 4]; NaN for a label that has none."""
    boxes = [Image.fromarray(label == k).getbbox() or [np.nan] * 4 for k in range(count)]
    return np.array(boxes, dtype=float).reshape(count, 4)


def edges_of_outlines(label: np.ndarray, count: int) -> np.ndarray:
    """The box of each label, [count, 4], as `draw_outlines` was given it. What is no outline has its extents."""
    boxes, half, (height, width) = extents(label, count), half_line(label.shape), label.shape
    for k in np.flatnonzero(~np.isnan(boxes[:, 0])):
        x0, y0, x1, y1 = boxes[k].astype(int)
        x0, y0 = (side + half if side else 0 for side in (x0, y0))  # 0: the box was cut there
        x1, y1 = (side - half - 1 if side < most else most for side, most in ((x1, width), (y1, height)))
        if x0 < x1 and y0 < y1 and not (label[y0 + half + 1 : y1 - half, x0 + half + 1 : x1 - half] == k).any():
            boxes[k] = x0, y0, x1, y1
    return boxes
