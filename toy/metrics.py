"""How good a video of the small world is. The truth is known exactly, so no learned network has to judge.

    thing_error              mean squared error of RGB in [0, 1] inside the things; split by whether a thing has a mask
                             or a box alone, and whether it spins, for what spins can't be pasted
    ground_psnr              of the background that frame 0 shows, in dB, where the camera stands still
    camera_psnr              the same where the camera moves
    hole_psnr                of the background that frame 0 doesn't show; nobody can know it; smooth is a bar
    seam                     gradient across the edges of boxes without a mask, on background that frame 0 shows,
                             relative to the true videos: above 1 where a rectangle came along with its thing
    sharpness                detail of what frame 0 shows of things; the true video has 1, blur less, noise more
    fvd                      Frechet video distance to the true videos, by features of this project's own
    prompt_accuracy          share of the things that spin as their caption says; chance gets half
    clockwise_unprompted     share of the spinning things that turn clockwise where the caption doesn't say

Shapes: B videos, K slots, T frames of H x W pixels. Measures leave out frame 0, which is given.
"""

import math
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor

from core.boxes import move
from core.frechet import frechet_distance
from core.noise import rng
from toy.codec import ToyCodec
from toy.world import WorldBatch, inside_box

FEATURES = 128  # of a video, for the distance
TURNS = range(-12, 13)  # candidates for the spin, in steps of two degrees a frame


def squared_error(video: Tensor, batch: WorldBatch) -> Tensor:
    """Of RGB in [0, 1], mean over the channels, frames 1 to T-1: [B,T-1,H,W]."""
    return ((video - batch.video)[:, :, 1:] / 2).square().mean(1)


def thing_errors(video: Tensor, batch: WorldBatch) -> dict[str, float]:
    """Mean squared error over all pixels that show a thing: any, one with a mask, with a box alone, or turning.

    Things that appear later are left out: nothing shows what they look like.
    """
    error, given, by_box, still = squared_error(video, batch), batch.shown[..., 0], batch.by_box, batch.spin == 0
    kinds = {"": given, "_by_mask": ~by_box & still, "_by_box": by_box & still, "_turning": ~still}
    masks = batch.masks[:, 1:, 1:]  # slot 0 is the camera
    inside = {name: (masks & (given & kind)[:, 1:, None, None, None]).any(1) for name, kind in kinds.items()}
    return {f"thing_error{name}": float(error[pixels].mean()) for name, pixels in inside.items()}


def background(batch: WorldBatch) -> tuple[Tensor, Tensor]:
    """Background without things or shadows before it, and background that frame 0 shows: bool [B,T-1,H,W] each.

    The second lies two pixels away from what frame 0 hides; the camera may have moved. Neither lies in a box whose
    silhouette nobody can know: of a thing that appears later, or turns in a way that the caption doesn't say.
    """
    bare = (batch.video == batch.plate).all(1).float()  # (B, T, H, W)
    bare, clear = bare[:, 1:], bare[:, :1].expand_as(bare[:, 1:]).clone()
    for i in batch.used[:, 0].nonzero()[:, 0].tolist():
        clear[i] = along(clear[i, 0], batch.boxes[i, 0])
    unknown = batch.used & (~batch.shown[..., 0] | ((batch.spin != 0) & ~batch.says_spin[:, None]))
    boxes = inside_box(batch.boxes[:, :, 1:], bare.shape[-2:]) & unknown[..., None, None, None]
    free = ~boxes.any(1)
    return (bare > 0) & free, erode(clear) & free


def erode(values: Tensor) -> Tensor:
    """Pixels two pixels inside an area of ones: [..., H, W] -> bool [..., H, W]."""
    return -F.max_pool2d(-values, 5, stride=1, padding=2) > 0.99


def ground(batch: WorldBatch) -> tuple[Tensor, Tensor]:
    """Pixels of the background that frame 0 shows, and those that it doesn't: bool [B,T-1,H,W] each.

    Both lie two pixels away from things, shadows, and what hid the background in frame 0.
    """
    bare, shown = background(batch)
    bare = erode(bare.float())
    return bare & shown, bare & ~shown


def along(layer: Tensor, boxes: Tensor) -> Tensor:
    """A layer of frame 0, [H,W], as it moves with an object's boxes [T,4]: frames 1 to T-1, [T-1,H,W]."""
    first, *later = boxes.double().numpy()
    return torch.cat([move(layer[None], first, now, (0, layer.shape[0], 0, layer.shape[1])) for now in later])


def psnr(error: Tensor) -> float:
    """Of squared errors: 100 dB at most, NaN if there are none."""
    return float(-10 * error.mean().clamp(min=1e-10).log10())


def box_edges(batch: WorldBatch) -> tuple[Tensor, Tensor]:
    """Pairs of neighbouring pixels of background that frame 0 shows, with a maskless thing's box's edge between them.

    Frames 1 to T-1: bool [B,T-1,H,W-1] for pairs side by side, [B,T-1,H-1,W] for pairs one above the other.
    """
    boxes, free = batch.boxes[:, :, 1:], ~batch.masks[:, 1:, 1:].any(1) & background(batch)[1]
    inside = inside_box(boxes, batch.video.shape[-2:]) & (batch.by_box & batch.shown[..., 0])[..., None, None, None]
    return tuple(inside.diff(dim=dim).any(1) & free.unfold(dim, 2, 1).all(-1) for dim in (-1, -2))


def seam(video: Tensor, batch: WorldBatch) -> float:
    """Mean absolute gradient across `box_edges`, relative to the true videos."""
    edges = box_edges(batch)

    def steps(clip: Tensor) -> Tensor:
        across = (clip[:, :, 1:].diff(dim=dim).abs().mean(1) for dim in (-1, -2))
        return sum((step * pairs).double().sum() for step, pairs in zip(across, edges, strict=True))

    return float(steps(video) / steps(batch.video))


def sharpness(video: Tensor, batch: WorldBatch) -> float:
    """Detail of things that don't turn, where frame 0 shows them, relative to the true videos: a ratio of sums."""
    masks = torch.zeros_like(batch.masks)
    for i, k in (batch.shown[:, 1:, 0] & (batch.spin[:, 1:] == 0)).nonzero().tolist():
        mask = batch.masks[i, k + 1]
        masks[i, k + 1, 1:] = mask[1:] & (along(mask[0].float(), batch.boxes[i, k + 1]) > 0.99)
    made, true = (detail(clip, masks).sum() for clip in (video, batch.video))
    return float(made / true)


def laplacian(frames: Tensor) -> Tensor:
    """Difference of each pixel to the mean of its four neighbours: [..., H, W] -> [..., H - 2, W - 2]."""
    x, y = frames[..., 1:-1], frames[..., 1:-1, :]
    return x[..., 1:-1, :] - (x[..., :-2, :] + x[..., 2:, :] + y[..., :-2] + y[..., 2:]) / 4


def detail(video: Tensor, masks: Tensor) -> Tensor:
    """Squared RGB Laplacian summed inside the masks, frames 1 to T-1: video [B,3,T,S,S], masks [B,K,T,S,S] -> [B].

    Masks are eroded by two pixels, over which a codec may smear a silhouette: that is no detail.
    """
    eroded = -F.max_pool2d(-masks.flatten(1, 2).float(), 5, stride=1)  # (B, K T, S-4, S-4)
    inside = eroded.unflatten(1, masks.shape[1:3]).bool().any(1)
    energy = laplacian(video)[..., 1:-1, 1:-1].square().sum(1) * inside  # as far inside as the eroded masks reach
    return energy[:, 1:].double().sum((1, 2, 3))


def spin_rate(video: Tensor, batch: WorldBatch) -> Tensor:
    """Measured rotation of each spinning thing, [B,K] radians a frame, positive clockwise; NaN for all others.

    Six rings around the point that a thing should turn around are read from every frame, where the thing shows. Its
    spin is the rotation among TURNS by which the rings of successive frames correlate best.
    """
    around, out = torch.deg2rad(torch.arange(0.0, 360, 2)), torch.full(batch.spin.shape, math.nan)
    unit = torch.stack([around.cos(), around.sin()], -1)  # (A, 2)
    for b, k in (batch.spin != 0).nonzero().tolist():
        half = (batch.boxes[b, k, :, 2:] - batch.boxes[b, k, :, :2]).amin(-1) / 2  # (T)
        radius = half[:, None] * torch.linspace(0.2, 0.8, 6)  # (T, R)
        at = batch.middle[b, k, :, None, None] + radius[..., None, None] * unit  # (T, R, A, 2)
        seen = torch.cat([video[b], batch.masks[b, k][None].float()]).transpose(0, 1)  # (T, 4, H, W)
        grid = 2 * at / torch.tensor(video.shape[:-3:-1]) - 1
        rings, shown = F.grid_sample(seen, grid, align_corners=False).split([3, 1], 1)  # (T, 3, R, A), (T, 1, R, A)
        mean = (rings * shown).sum(-1, keepdim=True) / shown.sum(-1, keepdim=True).clamp(min=1)
        rings = (rings - mean) * shown
        out[b, k] = math.radians(2 * max(TURNS, key=lambda turn: (rings[:-1] * rings[1:].roll(-turn, -1)).sum()))
    return out


def spin_scores(rotation: Tensor, batch: WorldBatch) -> dict[str, float]:
    """Of measured rotations [B,K]: how many are as the caption says, and clockwise where it doesn't; NaN if none."""
    says, right = batch.says_spin[:, None], rotation.sign() == batch.spin.sign()
    prompted, unprompted = says & ~rotation.isnan(), ~says & (rotation.abs() > 0)
    shares = {"prompt_accuracy": right[prompted], "clockwise_unprompted": (rotation > 0)[unprompted]}
    return {name: float(counted.float().mean()) for name, counted in shares.items()}


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


def score(video: Tensor, batch: WorldBatch) -> dict[str, float]:
    """All measures of video [B,3,T,H,W] against its truth. NaN if none counts."""
    error, (shown, holes), pans = squared_error(video, batch), ground(batch), batch.used[:, 0]
    return {
        **thing_errors(video, batch),
        "ground_psnr": psnr(error[~pans][shown[~pans]]),
        "camera_psnr": psnr(error[pans][shown[pans]]),
        "hole_psnr": psnr(error[holes]),
        "seam": seam(video, batch),
        "sharpness": sharpness(video, batch),
        "fvd": frechet_distance(video_features(video), video_features(batch.video)),
        **spin_scores(spin_rate(video, batch), batch),
    }


def baselines(batch: WorldBatch, codec: ToyCodec) -> dict[str, Tensor]:
    """Videos [B,3,T,H,W] that no network makes. What is pasted is what the maps show after the first frame.

    By mask: things are cut out along their masks; by box: as users draw them, half of them as rectangles.
    """
    maps = {kind: batch.maps("pixels", kind)[:, :, 1:] for kind in ("mask", "box")}
    return {
        "true video": batch.video,
        "through the codec": torch.cat([codec.decode_video(codec.encode_video(x)) for x in batch.video.split(16)]),
        "the first frame, still": batch.video[:, :, :1].expand_as(batch.video),
        **{f"pasted by {kind}": torch.cat([batch.video[:, :, :1], later], 2) for kind, later in maps.items()},
    }
