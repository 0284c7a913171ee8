"""How good a toy video is. The truth is known exactly, so no learned network has to judge.

    mask_iou, box_iou        is each object where the trajectory wants it? 1 is perfect (paper: mask IoU, box IoU)
    sharpness                detail inside the objects; the true video has 1, a blurred one less, a noisy one more
    fvd                      Frechet video distance to the true videos; 0 is perfect. Its features are this file's own:
                             compare it only between sets of equally many videos, never with published values
    prompt_accuracy          share of objects that spin as their caption says; chance gets half
    clockwise_when_untold    share of objects that spin clockwise where the caption doesn't say; half in the true world

Shapes: B videos, K object slots, T frames of S x S pixels.
"""

import math
from collections.abc import Sequence
from dataclasses import fields
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from core.frechet import frechet_distance
from core.noise import rng
from toy.world import COLORS, ToyBatch

SATURATED = 0.42  # max - min of RGB in [0, 1]: object colours have 0.75 and more, backgrounds 0.16 at most
VISIBLE = 20  # pixels: an object of which a frame shows fewer isn't scored there
FEATURES = 64  # numbers that describe a video to the Frechet distance


def find_objects(video: Tensor, batch: ToyBatch) -> Tensor:
    """Which pixels show which object: video [B,3,T,S,S] in [-1, 1] -> bool [B,K,T,S,S]; a true video gives batch.masks.

    Saturated pixels belong to the object with the nearest colour in RGB. Where an object's two colours blur into grey,
    pixels belong to none: a blurred object loses IoU too.
    """
    rgb, distance = (video + 1) / 2, []
    for k in range(batch.masks.shape[1]):
        nearest = _color_distances(rgb, batch, k).amin(0)  # (B, T, S, S)
        distance.append(nearest.masked_fill((batch.count <= k)[:, None, None, None], math.inf))
    owner = torch.stack(distance).argmin(0)
    saturated = rgb.amax(1) - rgb.amin(1) > SATURATED
    return torch.stack([saturated & (owner == k) for k in range(len(distance))], dim=1)


def _color_distances(rgb: Tensor, batch: ToyBatch, k: int) -> Tensor:
    """Squared distance of each pixel to both colours of object k: [B,3,T,S,S] in [0, 1] -> [2,B,T,S,S]."""
    pair = torch.tensor(list(COLORS.values()))[batch.colors[:, k]]  # (B, 2, 3)
    return torch.stack([(rgb - pair[:, i, :, None, None, None]).square().sum(1) for i in range(2)])


def mask_iou(found: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks [B,K,T,S,S], averaged over frames 1 to T-1: [B,K].

    Frames that show fewer than VISIBLE pixels of the object don't count; NaN if none is left.
    """
    both, either = (found & truth).sum((-1, -2)), (found | truth).sum((-1, -2))
    return _over_frames(both / either.clamp(min=1), truth.sum((-1, -2)) >= VISIBLE)


def box_iou(found: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of the masks' bounding boxes, averaged as in `mask_iou`: [B,K,T,S,S] -> [B,K].

    Both are opened first, so that a stray pixel or a thin line of mixed colours can't stretch a box. Nothing found
    scores 0. Frames in which the truth is nowhere two pixels wide don't count either.
    """
    found, wanted = bounding_boxes(open_mask(found)), bounding_boxes(open_mask(truth))
    low, high = torch.maximum(found[..., :2], wanted[..., :2]), torch.minimum(found[..., 2:], wanted[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (found, wanted)]
    seen = (truth.sum((-1, -2)) >= VISIBLE) & (areas[1] > 0)
    return _over_frames(both / (sum(areas) - both).clamp(min=1), seen)


def _over_frames(values: Tensor, seen: Tensor) -> Tensor:
    """Mean of [B,K,T] over those frames from 1 on in which the object is seen; NaN if there are none."""
    return values.where(seen, math.nan)[:, :, 1:].nanmean(-1)


def open_mask(masks: Tensor) -> Tensor:
    """Morphological opening: keep the pixels that lie in a full 2x2 square. bool [..., S, S] -> same."""
    x = masks.reshape(-1, 1, *masks.shape[-2:]).float()
    squares = -F.max_pool2d(-x, 2, stride=1)
    return F.max_pool2d(F.pad(squares, (1, 1, 1, 1)), 2, stride=1).reshape(masks.shape) > 0


def bounding_boxes(masks: Tensor) -> Tensor:
    """[..., S, S] bool -> [..., 4] x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros where the mask is empty."""
    lines = torch.stack([masks.any(-2), masks.any(-1)], dim=-2).int()  # columns, rows: (..., 2, S)
    low, high = lines.argmax(-1), lines.shape[-1] - lines.flip(-1).argmax(-1)
    return torch.cat([low, high.where(lines.any(-1), 0)], dim=-1)


def laplacian(frames: Tensor) -> Tensor:
    """Difference of each pixel to the mean of its four neighbours: [..., H, W] -> [..., H - 2, W - 2]."""
    x, y = frames[..., 1:-1], frames[..., 1:-1, :]
    return x[..., 1:-1, :] - (x[..., :-2, :] + x[..., 2:, :] + y[..., :-2] + y[..., 2:]) / 4


def detail(video: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Squared RGB Laplacian summed inside the masks, frames 1 to T-1, and over how many pixels: [B] and [B].

    video [B,3,T,S,S], masks [B,K,T,S,S]. Masks are eroded by two pixels, over which a codec may smear a silhouette:
    that is no detail.
    """
    inner_laplacian = laplacian(video)[..., 1:-1, 1:-1]  # as far inside as the eroded masks reach
    inner = -F.max_pool2d(-masks.flatten(0, 2).float()[:, None], 5, stride=1)
    inside = inner[:, 0].unflatten(0, masks.shape[:3]).bool().any(1)[:, 1:]  # (B, T-1, S-4, S-4)
    energy = inner_laplacian[:, :, 1:].square().sum(1) * inside
    return energy.double().sum((1, 2, 3)), inside.sum((1, 2, 3))


def sharpness(video: Tensor, found: Tensor, batch: ToyBatch) -> float:
    """Detail per pixel inside the objects, relative to the true videos; both are ratios of sums over the set.

    A video is measured inside the objects found in it: inside the true masks, a displaced object's silhouette would
    count as detail. If fewer pixels are found than the truth has, the missing ones count as flat: else a blurred set
    would be measured only where its colours survived.
    """
    (energy, pixels), (true_energy, true_pixels) = detail(video, found), detail(batch.video, batch.masks)
    per_pixel = energy.sum() / pixels.sum().clamp(min=int(true_pixels.sum()))
    return float(per_pixel / (true_energy.sum() / true_pixels.sum()))


def spin_direction(video: Tensor, found: Tensor, batch: ToyBatch) -> Tensor:
    """Measured rotation of each object, [B,K] radians per frame, positive clockwise; NaN for unused slots.

    An object of m = sectors / 2 periods a turn has the phase m * rotation in its moment
        c_t = sum over its pixels of s * exp(i m angle), s = 1 where nearer to its first colour and -1 elsewhere;
    the angle of c_{t+1} conj(c_t), summed over frames so that blurred and covered ones count little, is m times the
    rotation. Angles are around the middle of the object as found, not of the given box, which a generator without an
    adapter doesn't know. Exactly 0 if nothing is found.
    """
    boxes = bounding_boxes(open_mask(found))
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2  # (B, K, T, 2)
    rgb, pixel, rotation = (video + 1) / 2, torch.arange(video.shape[-1]) + 0.5, []
    for k in range(found.shape[1]):
        to_first, to_other = _color_distances(rgb, batch, k)
        sign = torch.where(to_first < to_other, 1.0, -1.0) * found[:, k]  # (B, T, S, S)
        dx, dy = pixel - middle[:, k, :, None, :1], pixel[:, None] - middle[:, k, :, None, 1:]
        periods = batch.sectors[:, k] / 2
        angle = periods[:, None, None, None] * torch.atan2(dy, dx)  # (B, T, S, S) from (B, T, S, 1) and (B, T, 1, S)
        moment = torch.complex((sign * angle.cos()).sum((2, 3)), (sign * angle.sin()).sum((2, 3)))  # (B, T)
        turned = (moment[:, 1:] * moment[:, :-1].conj()).sum(1).angle() / periods
        rotation.append(turned.where(batch.count > k, math.nan))
    return torch.stack(rotation, dim=1)


def prompt_accuracy(rotation: Tensor, batch: ToyBatch) -> float:
    """Share of objects [B,K] that spin as told, where captions tell; NaN if none does."""
    told = batch.told[:, None] & ~rotation.isnan()
    return float((rotation.sign() == batch.spin.sign())[told].float().mean())


def clockwise_when_untold(rotation: Tensor, batch: ToyBatch) -> float:
    """Share of objects [B,K] that turn clockwise, of those that turn and whose caption doesn't say; NaN if none."""
    free = rotation[~batch.told]
    return float((free[free.abs() > 0] > 0).float().mean())


def video_features(video: Tensor) -> Tensor:
    """Features of a fixed random network: video [B,3,T,S,S], T at least 7, S at least 15 -> float64 [B, FEATURES].

    Three 3D convolutions, whose 3x3x3 kernels have zero mean so that change in space and time counts, not plain colour;
    then mean and deviation over the remaining positions.
    """
    seeded, pooled = rng(64), []
    sizes = pairwise((3, 16, 32, FEATURES // 2))
    kernels = [torch.randn(n, m, 3, 3, 3, generator=seeded) * (2 / (27 * m)) ** 0.5 for m, n in sizes]
    for x in video.split(32):  # bounds memory
        for kernel in kernels:
            x = F.conv3d(x, kernel - kernel.mean((2, 3, 4), keepdim=True), stride=(1, 2, 2)).relu()
        pooled.append(torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4))], dim=1))
    return 10 * torch.cat(pooled).double()  # of order 1


def score(video: Tensor, batch: ToyBatch) -> dict[str, float]:
    """All measures of video [B,3,T,S,S] against its truth. IoUs weigh objects equally. NaN if no object counts."""
    found = find_objects(video, batch)
    rotation = spin_direction(video, found, batch)
    return {
        "mask_iou": float(mask_iou(found, batch.masks).nanmean()),
        "box_iou": float(box_iou(found, batch.masks).nanmean()),
        "sharpness": sharpness(video, found, batch),
        "fvd": frechet_distance(video_features(video), video_features(batch.video)),
        "prompt_accuracy": prompt_accuracy(rotation, batch),
        "clockwise_when_untold": clockwise_when_untold(rotation, batch),
    }


def subset(batch: ToyBatch, keep: Sequence[int]) -> ToyBatch:
    """These videos of the batch."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return type(batch)(**{n: [v[i] for i in keep] if n == "captions" else v[list(keep)] for n, v in values.items()})
