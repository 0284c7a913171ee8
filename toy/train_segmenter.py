"""Train the network that finds the thing in a box, toy/segment.py, from nothing.

    python -m toy.train_segmenter

Its crops are made up. A thing has one to four parts, each with a texture of dead leaves; its box is tight or loose;
others lie behind it, beside it and at times before it. Shapes are wilder than the world's, as they are in photographs.
To resume, run the same command again.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.optim import AdamW, Optimizer

from core import optim, parallel
from core.config import run_script
from core.noise import rng
from core.runs import Run, due
from toy.pictures import CANVAS, picture_bank
from toy.segment import CROP, INNER, BoxSegmenter, SegmenterConfig
from toy.world import look_up

PARTS = 6  # of a thing, at most
HELD_OUT = 1 << 32  # the step whose crops nothing is trained on


@dataclass(frozen=True)
class Recipe:
    """Values to be edited here."""

    name: str = "box_segmenter"  # run folder under runs/
    batch: int = 32  # crops a step
    lr: float = 2e-3  # peak learning rate
    warmup: int = 50  # steps of linear warm-up before the cosine
    ema: float = 0.99  # decay of the averaged weights, the ones exported
    save_every: int = 100  # steps
    seed: int = 0  # of weights and crops


@dataclass(frozen=True)
class Config(Recipe):
    steps: int = 3500  # optimizer steps in all


def make_crops(count: int, *key: int) -> tuple[Tensor, Tensor]:
    """P crops as `look` makes them [P,4,CROP,CROP], and where their things show [P,1,CROP,CROP], from 0 to 1."""
    draws, bank = rng(*key), picture_bank("train", torch.device("cpu"))
    grid = (torch.arange(CROP) + 0.5 - CROP / 2) / INNER  # the box reaches from -0.5 to 0.5

    def draw(*shape: int, low: float = 0, high: float = 1) -> Tensor:
        return low + (high - low) * torch.rand(count, *shape, generator=draws)

    def silhouette() -> Callable[[Tensor, Tensor], Tensor]:
        """A function of points x [P,1,1,W] and y [P,1,H,1]: how deep they lie inside each part, [P,PARTS,H,W].

        The thing is about two units wide. Its first part is the body; others lie at its edge, thin limbs pointing away.
        """
        number = 1 + torch.bucketize(draw(1), torch.tensor([0.35, 0.5, 0.65, 0.8, 0.9]))
        body, (size, away) = torch.arange(PARTS) == 0, (draw(PARTS, low=0.15, high=0.7), draw(PARTS, low=0.4, high=0.9))
        long = size.masked_fill(body, 1) * draw(PARTS, low=0.5, high=1)
        limb, way = (draw(PARTS) < 0.4) & ~body, draw(PARTS, high=6.3)
        wide = long * draw(PARTS, low=0.1, high=0.4).where(limb, draw(PARTS, low=0.35, high=1))
        turn = draw(PARTS, high=3.15) * (draw(PARTS) < 0.5)  # upright rectangles can fill their boxes
        turn, away = way.where(limb, turn), away.minimum(0.35 + 0.8 * long)  # parts touch the body, mostly
        offset = away.masked_fill(body, 0) * torch.stack([way.cos(), way.sin()])
        waves, phases, kind = draw(PARTS, 4, low=-0.22, high=0.22), draw(PARTS, 4, high=6.3), draw(PARTS)

        def depth(x: Tensor, y: Tensor) -> Tensor:
            def each(values: Tensor) -> Tensor:
                return values[..., None, None]

            dx, dy, cos, sin = x - each(offset[0]), y - each(offset[1]), each(turn.cos()), each(turn.sin())
            a, b = (cos * dx + sin * dy) / each(long), (cos * dy - sin * dx) / each(wide)
            angle = torch.atan2(b, a)
            edge = 1 + sum(each(waves[..., m]) * ((m + 1) * angle + each(phases[..., m])).cos() for m in range(4))
            blob = (a.square() + b.square()).sqrt() / edge
            rectangle, diamond = 1.15 * torch.maximum(a.abs(), b.abs()), 0.9 * (a.abs() + b.abs())
            out = blob.where(each(kind) < 0.5, rectangle.where(each(kind) < 0.85, diamond))
            return ((1 - out) * each(wide)).masked_fill(each(torch.arange(PARTS) >= number), -9)

        return depth

    def paint(tint: float) -> Tensor:
        """A part of a dead leaves picture, in colours of its own: [P,3,CROP,CROP]."""
        fine = INNER * draw(1, 1, low=-1.2, high=0.7).exp()  # the bank's pixels to a box
        x, y = (fine * grid + CANVAS * draw(1, 1) for _ in range(2))
        picture = look_up(bank[draw(high=len(bank)).long()], x[:, None], y.mT[:, None])[:, :, 0]
        return picture * draw(3, 1, 1, low=1 - tint, high=1 + tint)

    def other(share: float, near: float = 0.4, far: float = 0.8) -> Tensor:
        """Where another thing shows, near to far from the box's middle, in a share of the crops: [P,1,CROP,CROP]."""
        half, way, away = draw(1, 1, 1, low=0.2, high=0.5), draw(1, 1, 1, high=6.3), draw(1, 1, 1, low=near, high=far)
        depth = silhouette()((grid - away * way.cos()) / half, (grid[:, None] - away * way.sin()) / half)
        return (depth * half * INNER + 0.5).clamp(0, 1).amax(1, keepdim=True) * (draw(1, 1, 1) < share)

    # 1. A thing's box, tight or up to a sixth wider on each side, and the thing in the crop around it.
    thing, points = silhouette(), torch.linspace(-2, 2, 65)
    there = (thing(points, points[:, None]) > 0).any(1)  # (P, 65, 65)
    spans = torch.stack([there.any(1), there.any(2)], 1)  # (P, 2, 65): across and down
    low, high = points.where(spans, 9).amin(2) - 0.03, points.where(spans, -9).amax(2) + 0.03
    loose = draw(2, 2, low=-0.03, high=0.18) * (draw(1, 1) < 0.5)
    low, high = low - (high - low) * loose[:, 0], high + (high - low) * loose[:, 1]
    x, y = ((low + high)[:, n, None] / 2 + (high - low)[:, n, None] * grid for n in range(2))  # (P, CROP)
    pixel = (high - low).prod(1).sqrt()[:, None, None, None] / INNER * draw(1, 1, 1, low=-0.3, high=1.3).exp()
    parts = (thing(x[:, None, None], y[:, None, :, None]) / pixel + 0.5).clamp(0, 1)  # soft edges
    shown = parts.amax(1, keepdim=True)

    # 2. From back to front: ground and neighbours, perhaps blurred; the shadow; parts, the body in front; a neighbour.
    picture = paint(0.15)
    for _ in range(2):
        picture = torch.lerp(picture, paint(0.25), other(0.4))
    for across, down in ((8, 8), (12, 1)):  # out of focus, and passing by
        blurred = F.interpolate(F.avg_pool2d(picture, (down, across)), (CROP, CROP), mode="bilinear")
        picture = torch.lerp(picture, blurred, draw(1, 1, 1, high=2).clamp(max=1) * (draw(1, 1, 1) < 0.15))
    dark = draw(1, 1, 1, low=0.2, high=0.5) * (draw(1, 1, 1) < 0.25)
    picture, skin = picture * (1 - dark * shown.roll((6, 3), (2, 3))), paint(0.25)
    gap = (picture - skin).mean((2, 3), keepdim=True)
    skin = skin + draw(1, 1, 1) * (draw(1, 1, 1) < 0.3) * gap  # nearly the ground's colour
    for _ in range(2):
        skin = torch.lerp(skin, paint(0.25), other(0.3, 0, 0.4))  # markings
    for n in range(1, PARTS):
        picture = torch.lerp(picture, paint(0.25).where(draw(1, 1, 1) < 0.5, skin), parts[:, n : n + 1])
    picture, before = torch.lerp(picture, skin, parts[:, :1]), other(0.2)
    picture, shown = torch.lerp(picture, paint(0.25), before), shown * (1 - before)

    # 3. Of any contrast, at times grey, with noise, cut by the picture's edge.
    picture = picture.clamp(0, 1).lerp(picture.mean(1, keepdim=True), (draw(1, 1, 1) < 0.15).float())
    contrast = draw(1, 1, 1, low=0.4, high=1.2) * (draw(1, 1, 1) - 0.5).sign()  # half of them are negatives
    picture = (picture - 0.5) * contrast + draw(1, 1, 1, low=0.4, high=0.6)
    picture = picture + draw(1, 1, 1, high=0.03) * torch.randn(picture.shape, generator=draws)
    cut, at = draw(4, 1, 1, low=0.04, high=0.4) * (draw(4, 1, 1) < 0.08), grid / 1.5 + 0.5
    seen = (at > cut[:, :1]) & (at < 1 - cut[:, 1:2]) & (at[:, None] > cut[:, 2:3]) & (at[:, None] < 1 - cut[:, 3:])
    return torch.cat([(2 * picture.clamp(0, 1) - 1) * seen, seen], 1), shown * seen


def training_step(step: int, cfg: Config, network: BoxSegmenter, optimizers: list[Optimizer]) -> dict[str, Tensor]:
    """One update, by the cross-entropy of every pixel that shows the picture."""
    crops, shown = make_crops(cfg.batch, cfg.seed, step)
    with parallel.autocast(crops.device, "auto"):
        logits = network(crops)
    loss = F.binary_cross_entropy_with_logits(logits.float(), shown, weight=crops[:, 3:])
    loss.backward()
    return {"loss": loss.detach(), "grad_norm": optim.clip_and_step(network, optimizers)}


@torch.no_grad()
def held_out_iou(network: BoxSegmenter, count: int = 64) -> float:
    """Mean intersection over union of things that nothing was trained on with what is found in their boxes."""
    crops, shown = make_crops(count, 0, HELD_OUT)
    found, true = network(crops) * crops[:, 3:] > 0, shown > 0.5
    return float(((found & true).sum((1, 2, 3)) / (found | true).sum((1, 2, 3)).clamp(min=1)).mean())


def main(cfg: Config) -> None:
    procs = parallel.Processes(0, 1, torch.device("cpu"), None)
    torch.manual_seed(cfg.seed)
    network = BoxSegmenter(SegmenterConfig())
    optimizers, ema = [AdamW(network.parameters(), betas=(0.9, 0.99), weight_decay=0.02)], optim.EMA(network, cfg.ema)
    run = Run(f"runs/{cfg.name}", cfg, procs, {"segmenter": (network, optimizers, ema)})

    for step in range(run.resume(), cfg.steps):
        optim.set_lr(optimizers, optim.learning_rate(step, cfg.lr, cfg.warmup, cfg.steps))
        values = training_step(step, cfg, network, optimizers)
        ema.update(step)
        run.log(step + 1, **values)
        if due(step + 1, cfg.save_every, cfg.steps):
            run.save(step + 1)
            with ema.applied():
                print(f"step {step + 1}: IoU of held-out things {held_out_iou(network):.4f}", flush=True)
    run.export("box_segmenter", network, ema)


if __name__ == "__main__":
    run_script(main, Config)
