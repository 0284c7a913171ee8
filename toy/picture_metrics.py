"""How good a video of the world of pictures is. The truth is known exactly, so no learned network has to judge.

    mask_iou, box_iou        is each thing where the trajectory wants it? The true video says how much can be reached
    thing_error              mean squared error of RGB in [0, 1], inside the things
    ground_psnr              of the background in dB, where a thing left a hole too
    sharpness                detail inside the things; the true video has 1, a blurred one less, a noisy one more
    fvd                      Frechet video distance to the true videos, by toy/metrics.py's own features
    prompt_accuracy          share of the things that spin as their caption says; chance gets half
    clockwise_when_untold    share of the spinning things that turn clockwise where the caption doesn't say

Shapes: B videos, K slots, T frames of H x W pixels.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from core.frechet import frechet_distance
from toy import metrics
from toy.pictures import PictureBatch

DIFFERENT = 0.08  # of RGB in [0, 1]: by more than this in some channel a pixel differs from the background
REACH = 8  # pixels around a thing in which what differs from the background counts as that thing
TURNS = torch.deg2rad(torch.arange(-24.0, 25, 2))  # rotations a frame among which the spin is looked for


def find_things(video: Tensor, batch: PictureBatch) -> Tensor:
    """Which pixels show which thing: video [B,3,T,H,W] in [-1, 1] -> bool [B,K,T,H,W].

    What differs from the background belongs to the thing that should be nearest. Single pixels are dropped. Where a
    thing has the background's colour it isn't seen, so true videos don't reach an IoU of 1.
    """
    moved = (video - batch.plate[:, :, None]).abs().amax(1) / 2 > DIFFERENT  # (B, T, H, W)
    shares = F.avg_pool2d(moved.flatten(0, 1)[:, None].float(), 3, stride=1, padding=1)[:, 0].view(moved.shape)
    moved = shares > 0.5  # most of the pixels around, so gaps close too
    owned, free = batch.masks.clone(), ~batch.masks.any(1)
    for _ in range(REACH):  # grow by a pixel; where two meet the earlier has it
        grown = F.max_pool2d(owned.flatten(0, 1).float(), 3, stride=1, padding=1).view(owned.shape) > 0
        for k in range(owned.shape[1]):
            new = grown[:, k] & free
            owned[:, k] |= new
            free = free & ~new
    return owned & moved[:, None]


def inside(batch: PictureBatch) -> Tensor:
    """Where things are, frames 1 to T-1: bool [B,1,T-1,H,W]."""
    return batch.masks.any(1, keepdim=True)[:, :, 1:]


def squared_error(video: Tensor, batch: PictureBatch) -> Tensor:
    """Of RGB in [0, 1], mean over the channels, frames 1 to T-1: [B,1,T-1,H,W]."""
    return ((video - batch.video)[:, :, 1:] / 2).square().mean(1, keepdim=True)


def thing_error(video: Tensor, batch: PictureBatch) -> float:
    """Mean squared error inside the things, over all of the set's pixels."""
    return float(squared_error(video, batch)[inside(batch)].mean())


def ground_psnr(video: Tensor, batch: PictureBatch) -> float:
    """Peak signal-to-noise ratio of what the background shows, two pixels away from things. 100 dB at most."""
    near = F.max_pool3d(inside(batch).float(), (1, 5, 5), stride=1, padding=(0, 2, 2)) > 0
    return float(-10 * squared_error(video, batch)[~near].mean().clamp(min=1e-10).log10())


def sharpness(video: Tensor, batch: PictureBatch) -> float:
    """Detail inside the true masks, relative to the true videos: a ratio of sums over the set."""
    made, true = (metrics.detail(clip, batch.masks)[0].sum() for clip in (video, batch.video))
    return float(made / true)


def spin_rate(video: Tensor, batch: PictureBatch) -> Tensor:
    """Measured rotation of each spinning thing, [B,K] radians a frame, positive clockwise; NaN for all others.

    Six rings around the point that a thing should turn around are read from every frame, where the thing shows. Of the
    rotations TURNS that one is taken by which the rings of successive frames agree best, by the sum of their products.
    """
    B, K, T = batch.boxes.shape[:3]
    height, width = video.shape[-2:]
    half = (batch.boxes[..., 2:] - batch.boxes[..., :2]).float().amin(-1) / 2  # (B, K, T)
    around = torch.deg2rad(torch.arange(0.0, 360, 2))
    unit = torch.stack([around.cos(), around.sin()], -1)  # (A, 2)
    radius = half[..., None] * torch.linspace(0.2, 0.8, 6)  # (B, K, T, R)
    at = batch.middle[:, :, :, None, None] + radius[..., None, None] * unit  # (B, K, T, R, A, 2)
    grid = 2 * at / torch.tensor([width, height]) - 1
    frames = video.transpose(1, 2)[:, None].expand(-1, K, -1, -1, -1, -1)  # (B, K, T, 3, H, W)
    seen = torch.cat([frames, batch.masks[:, :, :, None].float()], 3).flatten(0, 2)
    rings, shown = F.grid_sample(seen, grid.flatten(0, 2), align_corners=False).split([3, 1], 1)  # (BKT, 3, R, A)
    mean = (rings * shown).sum(-1, keepdim=True) / shown.sum(-1, keepdim=True).clamp(min=1)
    rings = ((rings - mean) * shown).view(B, K, T, -1, len(around))  # (B, K, T, 3R, A)
    before, after = rings[:, :, :-1], rings[:, :, 1:]
    shifts = torch.rad2deg(TURNS).div(2).round().long().tolist()
    fit = torch.stack([(before * after.roll(-shift, -1)).sum((2, 3, 4)) for shift in shifts], -1)  # (B, K, len(TURNS))
    return TURNS[fit.argmax(-1)].where(batch.spin != 0, math.nan)


def score(video: Tensor, batch: PictureBatch) -> dict[str, float]:
    """All measures of video [B,3,T,H,W] against its truth. IoUs weigh things equally. NaN if none counts."""
    found, rotation = find_things(video, batch), spin_rate(video, batch)
    return {
        "mask_iou": float(metrics.mask_iou(found, batch.masks).nanmean()),
        "box_iou": float(metrics.box_iou(found, batch.masks).nanmean()),
        "thing_error": thing_error(video, batch),
        "ground_psnr": ground_psnr(video, batch),
        "sharpness": sharpness(video, batch),
        "fvd": frechet_distance(metrics.video_features(video), metrics.video_features(batch.video)),
        "prompt_accuracy": metrics.prompt_accuracy(rotation, batch),
        "clockwise_when_untold": metrics.clockwise_when_untold(rotation, batch),
    }


def still(batch: PictureBatch) -> Tensor:
    """The first frame all along: what a video has to beat. [B,3,T,H,W]."""
    return batch.video[:, :, :1].expand_as(batch.video)


def pasted(batch: PictureBatch) -> Tensor:
    """Things cut out of the first frame and pasted along the boxes, their holes filled by blur. [B,3,T,H,W]."""
    first, masks = batch.video[:, :, 0], batch.masks[:, :, 0].float()  # (B, 3, H, W), (B, K, H, W)
    video = fill(first, masks.any(1, keepdim=True))[:, :, None].repeat(1, 1, batch.video.shape[2], 1, 1)
    height, width = first.shape[-2:]
    pixel = torch.stack(torch.meshgrid(torch.arange(width), torch.arange(height), indexing="xy"), -1) + 0.5
    boxes = batch.boxes.float()
    for t in range(1, video.shape[2]):
        for k in range(masks.shape[1]):
            low, high = (boxes[:, k, (0, t), i : i + 2][:, :, None, None] for i in (0, 2))  # (B, 2, 1, 1, 2)
            side = (high - low).clamp(min=1)
            source = low[:, 0] + (pixel - low[:, 1]) / side[:, 1] * side[:, 0]  # (B, H, W, 2)
            grid = 2 * source / torch.tensor([width, height]) - 1
            moved = F.grid_sample(torch.cat([first, masks[:, k : k + 1]], 1), grid, align_corners=False)
            video[:, :, t] = torch.where(moved[:, 3:] > 0.5, moved[:, :3], video[:, :, t])
    video[:, :, 0] = first
    return video


def holes_filled(batch: PictureBatch) -> Tensor:
    """The true videos, but what frame 0 hides is filled as in `pasted`: every thing is right. [B,3,T,H,W]."""
    first, plate = batch.video[:, :, 0], batch.plate
    filled = fill(first, (first != plate).any(1, keepdim=True))[:, :, None]
    video = torch.where((batch.video == plate[:, :, None]).all(1, keepdim=True), filled, batch.video)
    video[:, :, 0] = first
    return video


def fill(pictures: Tensor, hole: Tensor) -> Tensor:
    """The hole gets the mean of what is around, in ever wider windows. [B,3,H,W], bool [B,1,H,W] -> [B,3,H,W]."""
    out, left = pictures.clone(), hole.clone()
    for window in (5, 9, 17, 33, 65, 129):
        weight = F.avg_pool2d((~hole).float(), window, stride=1, padding=window // 2)
        mean = F.avg_pool2d(pictures * ~hole, window, stride=1, padding=window // 2) / weight.clamp(min=1e-6)
        now = left & (weight > 0.1)
        out, left = torch.where(now, mean, out), left & ~now
    return out
