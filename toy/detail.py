"""The picture's own detail, put back into a small video wherever the video shows what the picture shows.

The networks make small videos, but what they show is known at full size: the picture where it stands still, and its
parts where they move along their boxes. So for each frame a guess is made: the picture, its parts moved as the boxes
say. It is shrunk to the video's size, and where both agree, the detail lost by shrinking is added to the enlarged
video. The networks alone decide what is seen: where they made something else, the video stays theirs, and soft.
"""

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from core.boxes import fill_box, move, whole_pixels
from core.media import Size, crop_box, read_mask
from trajectory import Fill, Trajectory, read_boxes_json

LONGEST = 1280  # pixels, of the longer side of what is written
# Errors that still count as agreement: a codec's, in [0, 1], and a share of the contrast's variance. On photographs,
# half the share takes much of their detail from good copies, and twice the share gives smeared ones doubled lines.
NOISE, LENIENCE = 0.02, 0.2
SMALLER, LARGER, SOFT = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def written_size(picture: Size, size: Size) -> Size:
    """How large a video of this size is written: as the picture, with even sides, 1280 at most, but never smaller."""
    left, top, right, bottom = crop_box(picture, size)
    sides = bottom - top, right - left
    height, width = (int(min(1, LONGEST / max(sides)) * side + 1e-6) // 2 * 2 for side in sides)
    return size if height < size[0] or width < size[1] else (height, width)


def full_size(picture: np.ndarray, size: Size) -> np.ndarray:
    """What a video of this size shows of its first picture, as large as it is written: uint8 [height, width, 3]."""
    left, top, right, bottom = crop_box(picture.shape[:2], size)
    height, width = written_size(picture.shape[:2], size)
    if height <= bottom - top <= LONGEST and width <= right - left <= LONGEST:
        y, x = round((top + bottom - height) / 2), round((left + right - width) / 2)  # so that pixels stay as they are
        return picture[y : y + height, x : x + width]
    return np.asarray(Image.fromarray(picture).resize((width, height), SMALLER, (left, top, right, bottom)))


def enlarge(trajectory: Trajectory, path: str | Path, size: Size, fill: Fill = fill_box) -> Trajectory:
    """The trajectory read from `path`, in pixels of the same video at another size; masks in all detail."""

    def resize_mask(mask: np.ndarray, box: tuple[float, ...] | None = None) -> np.ndarray:
        return np.asarray(Image.fromarray(mask.astype(np.uint8) * 255).resize(size[::-1], LARGER, box)) > 127

    boxes = trajectory.boxes * (np.array(size[::-1] * 2) / (trajectory.size[::-1] * 2))
    masks = np.stack([resize_mask(mask) for mask in trajectory.masks])
    for k, item in enumerate(read_boxes_json(Path(path))["objects"] if trajectory.maps_given is None else []):
        if "mask" in item and trajectory.masks[k].any():
            painted = read_mask(Path(path).parent / item["mask"])
            masks[k] = resize_mask(painted, crop_box(painted.shape, trajectory.size))
        else:  # if it enters later, it has no box in frame 0, and nothing is filled
            masks[k] = fill(boxes[k, 0], size)
    return replace(trajectory, boxes=boxes, masks=masks, maps_given=None)


def add_detail(video: np.ndarray, picture: np.ndarray, trajectory: Trajectory) -> np.ndarray:
    """uint8 [T, h, w, 3], and its first frame at full size [H, W, 3] -> [T, H, W, 3]. The trajectory is in its pixels.

    Frame 0 is the picture. Objects without a box in frame 0 or in frame t have no place to come from or to go to.
    """
    small, size = video.shape[1:3], picture.shape[:2]
    shrink = [resizer(*sides, SMALLER) for sides in zip(size, small, strict=True)]  # as the networks' first frame was
    grow, soften = ([resizer(*sides, kind) for sides in zip(small, size, strict=True)] for kind in (LARGER, SOFT))
    known = values(picture)
    known_small = resize(known, *shrink)
    boxes, masks = trajectory.boxes, torch.from_numpy(trajectory.masks).float()
    out = np.repeat(picture[None], len(video), 0)
    for t in range(1, len(video)):
        made, guess, low = values(video[t]), known.clone(), known_small  # low: the guess, shrunk
        for first, now, mask in zip(boxes[:, 0], boxes[:, t], masks, strict=True):
            x0, y0, x1, y1 = whole_pixels(now + np.array([-1, -1, 1, 1]), size)  # the area that changes
            if np.isnan(first).any() or x0 == x1 or not mask.any():
                continue
            rows, columns = slice(y0, y1), slice(x0, x1)
            thing, shape = move(torch.cat([known * mask, mask[None]]), first, now, (y0, y1, x0, x1)).split([3, 1])
            change = thing - shape * guess[:, rows, columns]
            # Moved or not? Whichever looks more like what the networks made.
            inner = shrink[0][:, rows], shrink[1][:, columns]
            both = low, low + resize(change, *inner)
            likeness = torch.stack([agreement(one.clamp(0, 1), made) for one in both]) ** 4
            share = likeness[1] / likeness.sum(0).clamp(min=1e-12)
            change *= resize(share, soften[0][rows], soften[1][columns])
            guess[:, rows, columns] += change
            low = low + resize(change, *inner)
        low = low.clamp(0, 1)  # Lanczos's filter overshoots
        detail = (guess - resize(low, *grow)) * resize(agreement(low, made), *soften)
        out[t] = ((resize(made, *grow) + detail).clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    return out


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """How alike two pictures are around each pixel, from 0 to 1: [3, h, w] in [0, 1], twice -> [1, h, w].

    Differences count relative to the contrast there: beside an edge an error may only mean that the edge is slightly
    off; on a flat area the same error means something else is shown.
    """

    def around(x: Tensor, width: int = 5) -> Tensor:
        return F.avg_pool2d(x, width, 1, width // 2, count_include_pad=False)

    contrast = sum(around(x.square()) - around(x).square() for x in (a, b)).clamp(min=0) / 2
    error, contrast = (x.mean(0, keepdim=True) for x in (around((a - b).square()), contrast))
    return around((-error / (2 * (NOISE**2 + LENIENCE * contrast))).exp(), 3)  # smooth: no speckles, less flicker


def values(picture: np.ndarray) -> Tensor:
    """uint8 [H, W, 3] -> float32 [3, H, W] in [0, 1]."""
    return torch.from_numpy(picture.transpose(2, 0, 1).astype(np.float32) / 255)


@lru_cache(maxsize=64)
def resizer(old: int, new: int, kind: Image.Resampling) -> Tensor:
    """Pillow's resizing along one side as a matrix [new, old], some rows or columns of which resize a part."""
    return torch.from_numpy(np.array(Image.fromarray(np.eye(old, dtype=np.float32)).resize((old, new), kind)))


def resize(x: Tensor, down: Tensor, across: Tensor) -> Tensor:
    """[C, H, W] by matrices [h, H] and [w, W] -> [C, h, w]."""
    return down @ x @ across.T
