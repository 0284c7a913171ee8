"""The picture's own detail, put back into a small video wherever the video shows what the picture shows.

The networks make small videos, but what they show is known at full size: the picture where it
stands still, and its parts where they move along their boxes. So for each frame the picture's parts are moved as the
boxes say, and what comes of it is made as small as the video. Where both agree, what making it small took away is
added to the enlarged video. The networks alone decide what is seen: what they made otherwise stays theirs, and soft.
"""

from functools import lru_cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from core.media import Size, kept
from trajectory import Trajectory, move

LONGEST = 1280  # pixels, of the longer side of what is written
# Errors that pass for none, in [0, 1], as a codec leaves them; and the share of the contrast that does, in variance.
# Tried on photographs whose parts moved: with half the share good copies lose much of their detail, with twice as much
# smeared ones get doubled lines.
NOISE, LENIENCE = 0.02, 0.2
SMALLER, LARGER, SOFT = Image.Resampling.LANCZOS, Image.Resampling.BICUBIC, Image.Resampling.BILINEAR


def full_size(picture: np.ndarray, size: Size) -> np.ndarray:
    """What a video of this size shows of its first frame's picture, at the picture's own resolution.

    uint8 [height, width, 3] -> the same with even sides, 1280 at most, but never smaller than `size`.
    """
    left, top, right, bottom = kept(picture.shape[:2], size)
    sides = bottom - top, right - left
    scale = min(1, LONGEST / max(sides))
    height, width = (int(scale * side + 1e-6) // 2 * 2 for side in sides)
    if height < size[0] or width < size[1]:
        height, width = size
    elif scale == 1:  # between whole pixels, so that they stay as they are
        y, x = round((top + bottom - height) / 2), round((left + right - width) / 2)
        return picture[y : y + height, x : x + width]
    return np.asarray(Image.fromarray(picture).resize((width, height), SMALLER, (left, top, right, bottom)))


def add_detail(video: np.ndarray, picture: np.ndarray, trajectory: Trajectory) -> np.ndarray:
    """uint8 [T, h, w, 3], and its first frame at full size [H, W, 3] -> [T, H, W, 3]. The trajectory is in its pixels.

    Frame 0 is the picture. Objects without a box in frame 0 or in frame t have no place to come from or to go to.
    """
    small, size = video.shape[1:3], picture.shape[:2]
    shrink = [resizer(*sides, SMALLER) for sides in zip(size, small, strict=True)]  # as the networks' first frame was
    grow, soften = ([resizer(*sides, kind) for sides in zip(small, size, strict=True)] for kind in (LARGER, SOFT))
    known = values(picture)
    still = resize(known, *shrink)
    boxes, masks = torch.from_numpy(trajectory.boxes).float(), torch.from_numpy(trajectory.masks)
    out = np.empty((len(video), *picture.shape), np.uint8)
    out[0] = picture
    for t in range(1, len(video)):
        made, guess, low = values(video[t]), known.clone(), still  # low: the guess made small
        for first, now, mask in zip(boxes[:, 0], boxes[:, t], masks, strict=True):
            if first.isnan().any() or now.isnan().any():
                continue
            # All of it happens where the box was and is.
            corners = torch.cat([torch.minimum(first, now)[:2] - 1, torch.maximum(first, now)[2:] + 1]).round().int()
            x0, y0, x1, y1 = corners.clamp(min=0).tolist()
            rows, columns = slice(y0, y1), slice(x0, x1)
            if not mask[rows, columns].any():
                continue
            here, shape = np.array([x0, y0, x0, y0]), mask[rows, columns][None].float()
            height, width = shape.shape[1:]
            thing = torch.cat([known[:, rows, columns] * shape, shape])
            thing = move(thing, first.numpy() - here, now.numpy() - here, (0, height, 0, width))
            thing, shape = thing.split([3, 1])
            change = thing - shape * guess[:, rows, columns]
            # Moved or not? Whichever is more like what the networks made.
            inner = shrink[0][:, rows], shrink[1][:, columns]
            both = low, low + resize(change, *inner)
            likeness = torch.stack([agreement(one.clamp(0, 1), made) for one in both]) ** 4
            share = likeness[1] / likeness.sum(0).clamp(min=1e-12)
            change *= resize(share, soften[0][rows], soften[1][columns])
            guess[:, rows, columns] += change
            low = low + resize(change, *inner)
        low = low.clamp(0, 1)  # as pictures are, which Lanczos's filter leaves
        detail = (guess - resize(low, *grow)) * resize(agreement(low, made), *soften)
        frame = (resize(made, *grow) + detail).clamp(0, 1)
        out[t] = (frame * 255).round().byte().permute(1, 2, 0).numpy()
    return out


def agreement(a: Tensor, b: Tensor) -> Tensor:
    """How alike two pictures are around each pixel, from 0 to 1: [3, h, w] in [0, 1], twice -> [1, h, w].

    Differences count relative to the contrast there: an edge a little beside its place is a small error, but where
    little is to be seen the same error tells another thing.
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
