"""Measure the networks on held-out toy videos. Every truth is known there, so nothing is judged by a learned network.

    python evaluate.py                                            # the shipped SlowGenerator and SlowAdapter
    python evaluate.py --videos 32 --steps 10 --out runs/evaluate/quick.json

Prints a table, writes its rows as a JSON list, and beside it the table in Markdown and a contact sheet that shows, from
top to bottom, a video's trajectory maps, the truth, the generator alone, and the generator with its adapter. Measures:

    mask_iou, box_iou        is each object where the trajectory wants it? 1 is perfect (paper: mask IoU, box IoU)
    sharpness                detail inside the objects; the true video is 1, a blurred one less, a noisy one more
    fvd                      Frechet video distance to the true videos; 0 is perfect. The features are this file's own:
                             compare it only between rows of as many videos, never with published values
    prompt_accuracy          share of objects that spin as their caption says; chance gets half of them right
    clockwise_when_untold    share of objects that spin clockwise where the caption doesn't say; the world has half

The first row scores the true videos, the second what the codec leaves of them: no generator does better. A measure
without a single case is null. Shapes: B videos, K object slots, T frames of S x S pixels.
"""

import json
import math
import platform
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from pathlib import Path
from time import perf_counter
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

import common
import flow
from adapter import ResNetAdapter
from codec import ToyCodec
from data import COLORS, ToyBatch, ToyWorld
from model import VideoDiT

SATURATED = 0.42  # max - min of RGB in [0, 1]: object colours have 0.75 and more, backgrounds 0.16 at most
VISIBLE = 20  # pixels: with fewer in sight, an object's place in a frame says little and isn't scored
FEATURES = 64  # numbers that describe a video to the Frechet distance


@dataclass(frozen=True)
class Config:
    """Options of the evaluation."""

    generator: str = "checkpoints/tiny/slow_generator.safetensors"  # the SlowGenerator
    adapter: str = "checkpoints/tiny/slow_adapter.safetensors"  # the SlowAdapter
    out: str = "runs/evaluate/slow.json"  # rows; the contact sheet goes beside it as .png
    split: Literal["test", "validation"] = "test"  # of the toy world; neither is trained on
    videos: int = 256  # how many of the split, from its first
    maps: Literal["box", "mask"] = "box"  # how the trajectory is drawn
    steps: int = 30  # of the slow sampler
    guidance: float = 1.0  # strength of prompt and trajectory; 1 switches guidance off and halves the work
    shift: float = 3.0  # warp of the sampler's noise levels towards noise
    batch: int = 32  # videos sampled at once
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is bfloat16 unless emulated
    compile: bool = True  # torch.compile each block
    seed: int = 0  # of the noise that sampling starts from


def find_objects(video: Tensor, batch: ToyBatch) -> Tensor:
    """Which pixels show which object: video [B,3,T,S,S] in [-1, 1] -> bool [B,K,T,S,S]; a true video gives batch.masks.

    Saturated pixels are objects'; each belongs to the object that has the colour nearest to it in RGB. Pixels where an
    object's two colours blur into grey belong to none: a blurred object loses IoU too.
    """
    rgb, distance = (video + 1) / 2, []
    for k in range(batch.masks.shape[1]):
        nearest = _color_distances(rgb, batch, k).amin(0)  # (B, T, S, S)
        distance.append(nearest.masked_fill((batch.count <= k)[:, None, None, None], math.inf))
    owner = torch.stack(distance).argmin(0)
    saturated = rgb.amax(1) - rgb.amin(1) > SATURATED
    return torch.stack([saturated & (owner == k) for k in range(len(distance))], dim=1)


def _color_distances(rgb: Tensor, batch: ToyBatch, k: int) -> Tensor:
    """Squared distance of every pixel to both colours of object k: [B,3,T,S,S] in [0, 1] -> [2,B,T,S,S]."""
    pair = torch.tensor(list(COLORS.values()))[batch.colors[:, k]]  # (B, 2, 3)
    return torch.stack([(rgb - pair[:, i, :, None, None, None]).square().sum(1) for i in range(2)])


def mask_iou(found: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of masks [B,K,T,S,S], averaged over frames 1 to T-1: [B,K].

    Frames that show fewer than VISIBLE pixels of the object are left out; NaN where no frame remains.
    """
    both, either = (found & truth).sum((-1, -2)), (found | truth).sum((-1, -2))
    return _over_frames(both / either.clamp(min=1), truth.sum((-1, -2)) >= VISIBLE)


def box_iou(found: Tensor, truth: Tensor) -> Tensor:
    """Intersection over union of the masks' bounding boxes, averaged as in `mask_iou`: [B,K,T,S,S] -> [B,K].

    Found and truth are both opened first, so that a stray pixel or a thin line of mixed colours can't stretch a box.
    Nothing found scores 0. Frames where the truth is nowhere two pixels wide are left out too.
    """
    found, wanted = bounding_boxes(open_mask(found)), bounding_boxes(open_mask(truth))
    low, high = torch.maximum(found[..., :2], wanted[..., :2]), torch.minimum(found[..., 2:], wanted[..., 2:])
    both = (high - low).clamp(min=0).prod(-1)
    areas = [(box[..., 2:] - box[..., :2]).prod(-1) for box in (found, wanted)]
    seen = (truth.sum((-1, -2)) >= VISIBLE) & (areas[1] > 0)
    return _over_frames(both / (sum(areas) - both).clamp(min=1), seen)


def _over_frames(values: Tensor, seen: Tensor) -> Tensor:
    """Mean of [B,K,T] over the frames from 1 in which the object is seen; NaN where there are none."""
    return values.where(seen, math.nan)[:, :, 1:].nanmean(-1)


def open_mask(masks: Tensor) -> Tensor:
    """Keep the pixels that lie in a full 2x2 square of the mask: morphological opening. bool [..., S, S] -> same."""
    x = masks.reshape(-1, 1, *masks.shape[-2:]).float()
    squares = -F.max_pool2d(-x, 2, stride=1)
    return F.max_pool2d(F.pad(squares, (1, 1, 1, 1)), 2, stride=1).reshape(masks.shape) > 0


def bounding_boxes(masks: Tensor) -> Tensor:
    """[..., S, S] bool -> [..., 4] x0, y0, x1, y1 in pixels, x1 and y1 exclusive; zeros where the mask is empty."""
    lines = torch.stack([masks.any(-2), masks.any(-1)], dim=-2).int()  # columns, rows: (..., 2, S)
    low, high = lines.argmax(-1), lines.shape[-1] - lines.flip(-1).argmax(-1)
    return torch.cat([low, high.where(lines.any(-1), 0)], dim=-1)


def detail(video: Tensor, masks: Tensor) -> tuple[Tensor, Tensor]:
    """Squared RGB Laplacian summed inside the masks, frames 1 to T-1, and the number of pixels it is from: [B] and [B].

    video [B,3,T,S,S], masks [B,K,T,S,S]. Masks are eroded by two pixels (5x5), over which a codec may spread a
    silhouette without its counting as detail.
    """
    laplacian = 4 * common.laplacian(video)[..., 1:-1, 1:-1]  # as far inside as the eroded masks reach
    inner = -F.max_pool2d(-masks.flatten(0, 2).float()[:, None], 5, stride=1)
    inside = inner[:, 0].unflatten(0, masks.shape[:3]).bool().any(1)[:, 1:]  # (B, T-1, S-4, S-4)
    energy = laplacian[:, :, 1:].square().sum(1) * inside
    return energy.double().sum((1, 2, 3)), inside.sum((1, 2, 3))


def sharpness(video: Tensor, found: Tensor, batch: ToyBatch) -> float:
    """Detail per pixel inside the objects, over that of the true videos; both are ratios of sums over the set.

    A video is measured inside the objects found in it: inside the true masks a displaced object would show its
    silhouette, and gain. If fewer pixels are found than the truth has, the missing ones count as flat: else a blurred
    set would be measured only where its colours survived. One video is a set too: see `subset`.
    """
    (energy, pixels), (true_energy, true_pixels) = detail(video, found), detail(batch.video, batch.masks)
    per_pixel = energy.sum() / pixels.sum().clamp(min=int(true_pixels.sum()))
    return float(per_pixel / (true_energy.sum() / true_pixels.sum()))


def spin_direction(video: Tensor, found: Tensor, batch: ToyBatch) -> Tensor:
    """Measured rotation of each object, [B,K] radians a frame, positive clockwise on the screen; NaN for unused slots.

    An object of m = sectors / 2 periods a turn has the phase m * rotation in its moment
        c_t = sum over its pixels of s * exp(i m angle), s = 1 where nearer to its first colour and -1 elsewhere;
    the angles of c_{t+1} conj(c_t), weighted by its magnitude so that blurred and covered frames count little, tell the
    rotation. Angles are about the middle of the object as found, not of the asked box: a generator without an adapter
    goes its own way. Exactly 0 if nothing is found.
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
    """Share of objects [B,K] that spin as told, where captions tell. NaN if none does."""
    told = batch.told[:, None] & ~rotation.isnan()
    return float((rotation.sign() == batch.spin.sign())[told].float().mean())


def clockwise_when_untold(rotation: Tensor, batch: ToyBatch) -> float:
    """Share of objects [B,K] that turn clockwise, of those that turn and whose caption doesn't say. NaN if none."""
    free = rotation[~batch.told]
    return float((free[free.abs() > 0] > 0).float().mean())


def video_features(video: Tensor) -> Tensor:
    """What a fixed random network sees: video [B,3,T,S,S], T at least 7, S at least 15 -> float64 [B, FEATURES].

    Three 3-D convolutions whose every 3x3x3 kernel has zero mean, so that change in space and time counts, not plain
    colour; then mean and deviation over the positions that remain.
    """
    seeded, pooled = common.generator(64), []
    sizes = pairwise((3, 16, 32, FEATURES // 2))
    kernels = [torch.randn(n, m, 3, 3, 3, generator=seeded) * (2 / (27 * m)) ** 0.5 for m, n in sizes]
    for x in video.split(32):  # bounds memory
        for kernel in kernels:
            x = F.conv3d(x, kernel - kernel.mean((2, 3, 4), keepdim=True), stride=(1, 2, 2)).relu()
        pooled.append(torch.cat([x.mean((2, 3, 4)), x.std((2, 3, 4))], dim=1))
    return 10 * torch.cat(pooled).double()  # of order 1


def frechet_video_distance(features_a: Tensor, features_b: Tensor) -> float:
    """Frechet distance of Gaussians fitted to features [n, D] and [m, D], in float64 (small sets bias it upwards):
    `|mu_a - mu_b|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2)` with covariances A and B.
    """
    a, b = features_a.double(), features_b.double()
    between = (a.mean(0) - b.mean(0)).square().sum()
    a, b = (x.T.cov(correction=0).reshape(x.shape[1], -1) for x in (a, b))  # one number's covariance is a scalar
    values, vectors = torch.linalg.eigh(a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # A^1/2: rounding can leave eigenvalues just below 0
    cross = torch.linalg.eigvalsh(root @ b @ root).clamp(min=0).sqrt().sum()
    return max(0.0, float(between + a.trace() + b.trace() - 2 * cross))


def score(video: Tensor, batch: ToyBatch) -> dict[str, float]:
    """All measures of video [B,3,T,S,S] against its truth. IoUs weigh every object equally. NaN if there is no case."""
    found = find_objects(video, batch)
    rotation = spin_direction(video, found, batch)
    return {
        "mask_iou": float(mask_iou(found, batch.masks).nanmean()),
        "box_iou": float(box_iou(found, batch.masks).nanmean()),
        "sharpness": sharpness(video, found, batch),
        "fvd": frechet_video_distance(video_features(video), video_features(batch.video)),
        "prompt_accuracy": prompt_accuracy(rotation, batch),
        "clockwise_when_untold": clockwise_when_untold(rotation, batch),
    }


def subset(batch: ToyBatch, keep: Sequence[int]) -> ToyBatch:
    """These videos of the batch."""
    values = {field.name: getattr(batch, field.name) for field in fields(batch)}
    return ToyBatch(**{n: [v[i] for i in keep] if n == "captions" else v[list(keep)] for n, v in values.items()})


# (first-frame latents [B,C,1,H,W], text, empty text, the maps' latents [B,C,F,H,W], sample numbers) -> [B,C,F,H,W]
Sampler = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def slow_sampler(generator: VideoDiT, adapter: ResNetAdapter | None, cfg: Config) -> Sampler:
    """Euler steps of the SlowGenerator, with the SlowAdapter unless that is None, guided away from what the generator
    makes of the image alone.
    """

    def sample(first: Tensor, text: Tensor, empty: Tensor, traj: Tensor, samples: Sequence[int]) -> Tensor:
        noise = common.sample_noise(traj.shape[1:], samples, cfg.seed).to(first.device)
        residuals = None if adapter is None else adapter(None, None, None, traj)  # once a clip: the adapter is static
        velocity = flow.guided(
            lambda x, t: generator(x, t, text, residuals), lambda x, t: generator(x, t, empty), cfg.guidance
        )
        return flow.sample_multistep(velocity, first, noise, flow.sigma_schedule(cfg.steps, cfg.shift))

    return sample


def generate(sample: Sampler, batch: ToyBatch, cfg: Config, procs: common.Processes, name: str) -> tuple[Tensor, float]:
    """Sample every video of the batch from its first frame, caption and trajectory: [B,3,T,S,S], and seconds a video.

    The time is the median batch's, from noise to pixels: with three batches or more, compilation is not in it.
    """
    codec, videos, seconds = ToyCodec(), [], []
    for start in tqdm(range(0, len(batch.video), cfg.batch), desc=name):
        samples = list(range(start, min(start + cfg.batch, len(batch.video))))
        maps = codec.encode_video(torch.stack([batch.trajectory(i).maps(cfg.maps) for i in samples]))
        first, captions = codec.encode_video(batch.video[samples][:, :, :1]), [batch.captions[i] for i in samples]
        text, empty = codec.encode_text(captions), codec.encode_text([""] * len(samples))
        clock = perf_counter()
        with torch.no_grad(), common.autocast(procs.device, cfg.dtype):
            latents = sample(*(x.to(procs.device) for x in (first, text, empty, maps)), samples)
        videos.append(codec.decode_video(latents).cpu())
        seconds.append((perf_counter() - clock) / len(samples))
    if not torch.cat(videos).isfinite().all():
        raise common.UserError(f"{name}: generates values that are no numbers; give other weights")
    return torch.cat(videos), float(np.median(seconds))


def make_row(name: str, steps: int, video: Tensor, batch: ToyBatch, seconds: float, objects: str | int = "all") -> dict:
    """One row: what was scored, the measures to four decimals, null where there is no case."""
    scores = {**score(video, batch), "seconds_per_video": seconds}
    if objects != "all" and len(video) <= FEATURES:
        scores["fvd"] = math.nan  # the covariance of so few videos is singular
    rounded = {key: round(value, 4) if math.isfinite(value) else None for key, value in scores.items()}
    return {"name": name, "steps": steps, "videos": len(video), "objects": objects, **rounded}


def table(rows: Sequence[dict]) -> str:
    """Rows of equal keys as aligned text."""
    cells = [list(rows[0]), *(["-" if value is None else str(value) for value in row.values()] for row in rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return "\n".join("  ".join(cell.rjust(w) for cell, w in zip(line, widths, strict=True)) for line in cells)


def markdown(rows: Sequence[dict]) -> str:
    """The same as a Markdown table, for a page that quotes it."""
    keys = [key for key in rows[0] if key not in ("command", "machine")]
    lines = [[str(key).replace("_", " ") for key in keys], ["---"] * len(keys)]
    lines += [["" if row[key] is None else str(row[key]) for key in keys] for row in rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def provenance(cfg: Config, procs: common.Processes) -> dict[str, str]:
    """The command that makes these rows again, and the machine that made them."""
    values = [(field.name, getattr(cfg, field.name), field.default) for field in fields(cfg)]
    flags = [f" --{name} {str(v).lower() if isinstance(v, bool) else v}" for name, v, default in values if v != default]
    info = Path("/proc/cpuinfo")  # Linux only
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    if procs.device.type == "cuda":
        models = [torch.cuda.get_device_name(procs.device)]
    machine = f"{(models or [platform.machine()])[0]}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return {"command": "python evaluate.py" + "".join(flags), "machine": machine}


def contact_sheet(videos: Sequence[Tensor], batch: ToyBatch, kind: str) -> np.ndarray:
    """Maps and `videos` [B,3,T,S,S] below one another, for two clips of each number of objects: uint8 [h, w, 3]."""
    picks, blocks = [i for n in range(1, 4) for i in torch.nonzero(batch.count == n)[:2, 0].tolist()], []
    for i in picks[: len(picks) // 2 * 2]:  # two columns
        clips = [batch.trajectory(i).maps(kind), *(video[i] for video in videos)]
        sheet = common.contact_sheet([common.to_uint8(clip, scale=2) for clip in clips])
        blocks.append(np.pad(sheet, ((0, 12), (0, 12), (0, 0)), constant_values=255))
    return np.concatenate([np.concatenate(blocks[column::2]) for column in range(2)], axis=1)


def main(cfg: Config) -> None:
    for name, least in (("videos", 2), ("steps", 1), ("batch", 1), ("seed", 0), ("shift", 0.01)):
        if getattr(cfg, name) < least:
            raise common.UserError(f"--{name} {getattr(cfg, name)}: must be at least {least}")
    out = Path(cfg.out)
    if out.suffix != ".json":
        raise common.UserError(f"--out {out}: must end in .json")
    procs = common.init_processes()
    generator = common.prepare(VideoDiT.from_pretrained(cfg.generator, "SlowGenerator"), procs, cfg.compile)
    adapter = common.prepare(ResNetAdapter.from_pretrained(cfg.adapter, "SlowAdapter"), procs, cfg.compile)
    shapes = [f"{net.config.layers} blocks of width {net.config.dim}" for net in (generator, adapter)]
    if shapes[0] != shapes[1]:
        raise common.UserError(f"{cfg.adapter}: has {shapes[1]}, but --generator {cfg.generator} has {shapes[0]}")
    out.parent.mkdir(parents=True, exist_ok=True)  # if it can't be written to, say so before the sampling
    batch = ToyWorld(cfg.split).batch(list(range(cfg.videos)))

    codec = ToyCodec()
    coded = torch.cat([codec.decode_video(codec.encode_video(part)) for part in batch.video.split(cfg.batch)])
    rows = [
        make_row("true video", 0, batch.video, batch, math.nan),
        make_row("through the codec", 0, coded, batch, math.nan),
    ]
    videos = [batch.video]
    for name, helper in (("SlowGenerator", None), ("SlowGenerator + SlowAdapter", adapter)):
        video, seconds = generate(slow_sampler(generator, helper, cfg), batch, cfg, procs, name)
        rows.append(make_row(name, cfg.steps, video, batch, seconds))
        videos.append(video)
    for n in batch.count.unique().tolist():  # the last one again, by number of objects
        keep = torch.nonzero(batch.count == n)[:, 0].tolist()
        rows.append(make_row(name, cfg.steps, video[keep], subset(batch, keep), seconds, n))

    print(table(rows))
    with common.atomic(out) as temporary:
        temporary.write_text(json.dumps([row | provenance(cfg, procs) for row in rows], indent=1) + "\n")
    with common.atomic(out.with_suffix(".md")) as temporary:
        temporary.write_text(markdown(rows) + "\n")
    common.write_image(out.with_suffix(".png"), contact_sheet(videos, batch, cfg.maps))


if __name__ == "__main__":
    common.run_script(main, Config, OSError)
