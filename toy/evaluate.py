"""Measure the networks on held-out toy videos. metrics.py and picture_metrics.py say what the measures mean.

    python -m toy.evaluate                                  # the shipped networks, slow and fast
    python -m toy.evaluate --videos 32 --steps 10 --out runs/evaluate/quick.json
    python -m toy.evaluate --preset pictures                # the same in the world of pictures
    python -m toy.evaluate --ablation                       # the runs of `make ablation`: what each part is for
    python -m toy.evaluate --guidance_table --videos 64     # the slow networks, guided by prompt and by trajectory

Prints a table and writes its rows as JSON, the same in Markdown, and a contact sheet: trajectory maps, the truth, and
what each network makes of it. The first rows score the true videos and what the codec leaves of them: no generator does
better. The ablation's file has a row for each run, its table the mean over training seeds, with the lowest and the
highest. To resume it, run the same command again.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import flow
from adapter import Adapter, fits, read_adapter
from core import parallel
from core.config import UserError, run_script, shipped
from core.files import output_path, write_text
from core.media import contact_sheet, to_uint8, write_animation, write_image
from core.noise import sample_noise, step_noise
from core.tables import markdown, provenance, table
from model import VideoDiT
from toy import metrics, picture_metrics
from toy.codec import CODECS, ToyCodec
from toy.metrics import FEATURES, subset
from toy.pictures import PictureBatch
from toy.world import ToyBatch
from trajectory import draw_overlay

MEASURES = ("mask_iou", "box_iou", "thing_error", "ground_psnr", "sharpness", "fvd", "prompt_accuracy")
RUNS = Path("runs/ablation")  # <preset>/<variant>_<seed>/fast_adapter.safetensors
VARIANTS = {  # of stage 3, and the baselines, by the folder's name; the Makefile has their flags
    "no_diffusion": "hybrid without diffusion loss",
    "no_gan": "hybrid without GAN loss",
    "constant": "hybrid, constant scale",
    "decay": "hybrid, decaying scale",
    "grow": "hybrid, growing scale",
    "no_semantic": "discriminator without semantic attention",
    "no_trajectory": "discriminator without trajectory attention",
    "no_video": "discriminator without video attention",
    "lcm": "LCM applied to the adapter",
    "dmd": "DMD applied to the adapter",
}
METHOD = "decay"  # the full method: the hybrid with the default scale
SCORES = {"tiny": metrics.score, "pictures": picture_metrics.score}
AnyBatch = ToyBatch | PictureBatch


@dataclass(frozen=True)
class Config:
    preset: Literal["tiny", "pictures"] = "tiny"  # size of the networks and their world
    slow_generator: str = shipped("checkpoints/tiny/slow_generator.safetensors")  # of stage 0
    slow_adapter: str = shipped("checkpoints/tiny/slow_adapter.safetensors")  # of stage 1
    fast_generator: str = shipped("checkpoints/tiny/fast_generator.safetensors")  # of stage 2
    fast_adapter: str = shipped("checkpoints/tiny/fast_adapter.safetensors")  # of stage 3
    ablation: bool = False  # the runs under runs/ablation/<preset> instead of the shipped FastAdapter
    guidance_table: bool = False  # the slow networks under several strengths of guidance instead
    out: str = "runs/evaluate/rows.json"  # rows; the table (.md), the contact sheet (.png) and a .gif go beside it
    split: Literal["test", "validation", "photographs"] = "test"  # of the world; none is trained on
    videos: int = 256  # how many, from the first of the split
    maps: Literal["box", "mask"] = "box"  # how the trajectory is drawn
    steps: int = flow.SLOW["tiny"].steps  # of the slow sampler
    shift: float = flow.SLOW["tiny"].shift  # warp of the slow sampler's noise levels towards noise
    guidance: float = 1.0  # of the slow sampler, by the prompt; 1 switches it off and halves the work
    batch: int = 32  # videos sampled at once
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is the faster one
    compile: bool = True  # torch.compile each block
    seed: int = 0  # of the noise that sampling starts from


PICTURES = {
    "slow_generator": shipped("checkpoints/pictures/slow_generator.safetensors"),
    "slow_adapter": shipped("checkpoints/pictures/slow_adapter.safetensors"),
    "fast_generator": shipped("checkpoints/pictures/fast_generator.safetensors"),
    "fast_adapter": shipped("checkpoints/pictures/fast_adapter.safetensors"),
    "steps": flow.SLOW["pictures"].steps,
    "shift": flow.SLOW["pictures"].shift,
}
# (first-frame latents [B,C,1,H,W], text, empty text, the maps' latents [B,C,F,H,W], sample numbers) -> [B,C,F,H,W]
Sampler = Callable[[Tensor, Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def controlled(generator: VideoDiT, adapter: Adapter | None, text: Tensor, traj: Tensor) -> partial:
    """The generator's velocity, with the adapter's residuals if there is one. The toy's are static: one call a clip."""
    return partial(generator, text=text, residuals=adapter(traj) if adapter else None)


def slow_sampler(
    generator: VideoDiT, adapter: Adapter | None, cfg: Config, trajectory_guidance: float = 1.0, both: bool = True
) -> Sampler:
    """Euler steps. `both`: the adapter works in both branches of guidance, as in sample.py; else in the first alone."""

    def sample(first: Tensor, text: Tensor, empty: Tensor, traj: Tensor, samples: Sequence[int]) -> Tensor:
        noise, told = sample_noise(traj.shape[1:], samples, cfg.seed), controlled(generator, adapter, text, traj)
        residuals = told.keywords["residuals"] if both else None
        other, untold = partial(generator, text=empty, residuals=residuals), partial(generator, text=text)
        velocity = flow.guided(told, other, cfg.guidance, untold, trajectory_guidance)
        return flow.sample_multistep(velocity, first, noise.to(first.device), flow.sigma_schedule(cfg.steps, cfg.shift))

    return sample


def fast_sampler(generator: VideoDiT, adapter: Adapter | None, cfg: Config, steps: int) -> Sampler:
    """The few steps that stages 2 and 3 train for, or even fewer."""

    def sample(first: Tensor, text: Tensor, empty: Tensor, traj: Tensor, samples: Sequence[int]) -> Tensor:
        noise = step_noise(steps, traj.shape[1:], samples, cfg.seed).to(first.device)
        sigmas = flow.sigma_schedule(steps, flow.FAST[cfg.preset].shift)
        return flow.sample_fewstep(controlled(generator, adapter, text, traj), first, noise, sigmas)

    return sample


def inputs(batch: AnyBatch, samples: Sequence[int], codec: ToyCodec, cfg: Config, device: torch.device) -> list[Tensor]:
    """What a sampler takes, for these videos of the batch."""
    maps = codec.encode_video(torch.stack([batch.trajectory(i).maps(cfg.maps, codec.places) for i in samples]))
    first, captions = codec.encode_video(batch.video[samples][:, :, :1]), [batch.captions[i] for i in samples]
    text, empty = codec.encode_text(captions), codec.encode_text([""] * len(samples))
    return [x.to(device) for x in (first, text, empty, maps)]


def generate(sample: Sampler, batch: AnyBatch, cfg: Config, procs: parallel.Processes, name: str) -> Tensor:
    """Every video of the batch, sampled from its first frame, caption and trajectory: [B,3,T,H,W]."""
    codec, videos = CODECS[cfg.preset](), []
    for start in tqdm(range(0, len(batch.video), cfg.batch), desc=name):
        samples = list(range(start, min(start + cfg.batch, len(batch.video))))
        with torch.no_grad(), parallel.autocast(procs.device, cfg.dtype):
            latents = sample(*inputs(batch, samples, codec, cfg, procs.device), samples)
        videos.append(codec.decode_video(latents).cpu())
    video = torch.cat(videos)
    if not video.isfinite().all():
        raise UserError(f"{name}: generates values that are no numbers; give other weights")
    return video


def seconds_per_video(samplers: list[Sampler], batch: AnyBatch, cfg: Config, procs: parallel.Processes) -> list[float]:
    """Seconds to denoise one clip, samplers timed alternately: the median of five rounds."""
    clip, rounds = inputs(batch, [0], CODECS[cfg.preset](), cfg, procs.device), []
    for _ in range(6):
        rounds.append([])
        for sample in samplers:
            began = time.perf_counter()
            with torch.no_grad(), parallel.autocast(procs.device, cfg.dtype):
                sample(*clip, [0]).sum().item()  # waits for the device
            rounds[-1].append(time.perf_counter() - began)
    return np.median(rounds[1:], axis=0).tolist()  # the first round compiles


def make_row(
    cfg: Config, name: str, steps: int, video: Tensor, batch: AnyBatch, seconds=math.nan, objects: str | int = "all"
) -> dict:
    """One row of the table: measures to four decimals, None for those that no object counts for."""
    scores = {**SCORES[cfg.preset](video, batch), "seconds_per_video": seconds}
    if objects != "all" and len(video) <= FEATURES:
        scores["fvd"] = math.nan  # the covariance of so few videos is singular
    rounded = {key: round(value, 4) if math.isfinite(value) else None for key, value in scores.items()}
    return {"name": name, "steps": steps, "videos": len(video), "objects": objects, **rounded}


def over_seeds(rows: Sequence[dict]) -> list[dict]:
    """The rows of several training seeds as one each: mean and range of every measure, and the number of seeds."""
    merged = []
    for (name, steps), group in groupby(rows, key=itemgetter("name", "steps")):
        seeds = list(group)
        merged.append({"name": name, "steps": steps, "videos": seeds[0]["videos"], "seeds": len(seeds)})
        for key in (key for key in MEASURES if key in seeds[0]):
            values = [row[key] for row in seeds]
            merged[-1] |= {key: round(sum(values) / len(values), 4), f"{key}_range": [min(values), max(values)]}
    return merged


def comparison(videos: Sequence[Tensor], batch: AnyBatch, kind: str) -> np.ndarray:
    """Maps and `videos` [B,3,T,H,W] below one another, for two clips of each number of objects: uint8 [h, w, 3]."""
    picks, sheets = [i for n in range(1, 4) for i in torch.nonzero(batch.count == n)[:2, 0].tolist()], []
    for i in picks[: len(picks) // 2 * 2]:
        clips = [batch.trajectory(i).maps(kind), *(video[i] for video in videos)]
        sheets.append(contact_sheet([to_uint8(clip, scale=2) for clip in clips]))
    return contact_sheet([sheets[row : row + 2] for row in range(0, len(sheets), 2)], gap=12)  # two columns


def animation(videos: Sequence[Tensor], batch: AnyBatch) -> np.ndarray:
    """What a user gives and gets, for one clip of each number of objects: the image with its boxes, and `videos`
    [B,3,T,H,W] beside it. uint8 [T, h, w, 3].
    """
    rows = []
    for i in [torch.nonzero(batch.count == n)[0].item() for n in batch.count.unique()]:
        still = batch.video[i][:, :1].expand_as(batch.video[i])
        drawn = draw_overlay(to_uint8(still, scale=4), batch.trajectory(i))
        rows.append([drawn, *(to_uint8(video[i], scale=4) for video in videos)])
    frames = zip(*(zip(*row, strict=True) for row in rows), strict=True)  # frame by frame, rows of tiles
    return np.stack([contact_sheet(frame, gap=4) for frame in frames])


def load_pair(generator: str, adapter: str, speed: str, cfg: Config, procs: parallel.Processes) -> tuple:
    """A generator and its adapter, from files made by the stages called `speed`, "Slow" or "Fast"."""
    pair = VideoDiT.from_pretrained(generator, f"{speed}Generator"), read_adapter(adapter, f"{speed}Adapter")
    if not fits(pair[1], pair[0]):
        shapes = [f"{net.config.layers} blocks of width {net.config.dim}" for net in pair]
        raise UserError(f"{adapter}: has {shapes[1]}, but {generator} has {shapes[0]}")
    return tuple(parallel.prepare(network, procs, cfg.compile) for network in pair)


def compare(cfg: Config, batch: AnyBatch, procs: parallel.Processes) -> tuple[list[dict], list[Tensor]]:
    """Rows of the shipped networks, and the videos of the contact sheet."""
    codec, fast_steps = CODECS[cfg.preset](), flow.FAST[cfg.preset].steps
    slow, slow_adapter = load_pair(cfg.slow_generator, cfg.slow_adapter, "Slow", cfg, procs)
    fast, fast_adapter = load_pair(cfg.fast_generator, cfg.fast_adapter, "Fast", cfg, procs)
    int8 = VideoDiT.from_pretrained(cfg.fast_generator, "FastGenerator", torch.int8)
    parallel.prepare(int8, procs, cfg.compile)
    coded = torch.cat([codec.decode_video(codec.encode_video(part)) for part in batch.video.split(cfg.batch)])
    floor, videos = {"true video": batch.video, "through the codec": coded}, []
    if cfg.preset == "pictures":
        floor |= {
            "the first frame, still": picture_metrics.still(batch),
            "true things, holes filled by blur": picture_metrics.holes_filled(batch),
            "cut out and pasted": picture_metrics.pasted(batch),
        }
    rows = [make_row(cfg, name, 0, video, batch) for name, video in floor.items()]
    ways = {
        "SlowGenerator": (cfg.steps, slow_sampler(slow, None, cfg)),
        "SlowGenerator + SlowAdapter": (cfg.steps, slow_sampler(slow, slow_adapter, cfg)),
        "FastGenerator": (fast_steps, fast_sampler(fast, None, cfg, fast_steps)),
        "FastGenerator + FastAdapter": (fast_steps, fast_sampler(fast, fast_adapter, cfg, fast_steps)),
        "the same in 8 bits": (fast_steps, fast_sampler(int8, fast_adapter, cfg, fast_steps)),
    }
    seconds = seconds_per_video([sample for _, sample in ways.values()], batch, cfg, procs)
    for (name, (steps, sample)), taken in zip(ways.items(), seconds, strict=True):
        videos.append(generate(sample, batch, cfg, procs, name))
        rows.append(make_row(cfg, name, steps, videos[-1], batch, taken))
        for n in batch.count.unique().tolist() if name.endswith("Adapter") else ():
            keep = torch.nonzero(batch.count == n)[:, 0].tolist()
            rows.append(make_row(cfg, name, steps, videos[-1][keep], subset(batch, keep), objects=n))
    return rows, [batch.video, *videos[:-1]]  # 8 bits look the same


def checksum(*files: Path | str) -> str:
    """Twelve digits that tell whether the files hold what they held."""
    return hashlib.sha256(b"".join(Path(file).read_bytes() for file in files)).hexdigest()[:12]


def measured(out: Path, about: dict[str, str], weights: dict[str, str]) -> list[dict]:
    """The rows of `out` that this command would make again from these weights of the runs."""
    same = {(about["command"], about["networks"], run, file) for run, file in weights.items()}
    try:
        rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        return [row for row in rows if tuple(map(row.get, ("command", "networks", "run", "weights"))) in same]
    except (ValueError, TypeError, AttributeError):
        return []  # another kind of file, to be overwritten like any other


def ablate(cfg: Config, batch: AnyBatch, procs: parallel.Processes) -> tuple[list[dict], list[Tensor | None]]:
    """Rows of the paper's ablation, one for each run of stage 3 and number of steps, and the contact sheet's videos, of
    each first seed. What `--out` holds already is not measured again, and None stands for its videos.
    """
    slow, adapter = load_pair(cfg.slow_generator, cfg.slow_adapter, "Slow", cfg, procs)
    fast = parallel.prepare(VideoDiT.from_pretrained(cfg.fast_generator, "FastGenerator"), procs, cfg.compile)
    adapters, weights, runs = {"": adapter}, {"": ""}, {"FastGenerator + SlowAdapter": [""]}
    for variant, label in VARIANTS.items():
        files = sorted((RUNS / cfg.preset).glob(f"{variant}_*/fast_adapter.safetensors"))
        absent = f"{RUNS / cfg.preset / variant}_0/fast_adapter.safetensors: no such run;"
        for file in files:
            name = file.parent.name
            adapters[name] = parallel.prepare(read_adapter(file, "FastAdapter"), procs, cfg.compile)
            weights[name] = checksum(file)
        if files:
            runs[f"FlashMotion: {label}" if variant == METHOD else label] = [file.parent.name for file in files]
        elif variant == METHOD:
            raise UserError(f"{absent} run `make ablation`")
        else:
            print(f"{absent} the table leaves out: {label}")

    usual, name = flow.FAST[cfg.preset], "SlowGenerator + SlowAdapter"
    few = replace(cfg, steps=usual.steps, shift=usual.shift)
    ways = [(name, c.steps, "", slow_sampler(slow, adapter, c)) for c in (cfg, few)]
    for steps in (usual.steps, 2, 1):
        for name, some in runs.items():
            if steps == usual.steps or not name.startswith("discriminator"):
                ways += [(name, steps, run, fast_sampler(fast, adapters[run], cfg, steps)) for run in some]

    networks = checksum(CODECS[cfg.preset].weights, cfg.slow_generator, cfg.slow_adapter, cfg.fast_generator)
    about = provenance("-m toy.evaluate", cfg, procs.device) | {"networks": networks}
    rows, videos = measured(Path(cfg.out), about, weights), {}
    for name, steps, run, sample in ways:
        video = None
        if not any((name, steps, run) == (row["name"], row["steps"], row["run"]) for row in rows):
            video = generate(sample, batch, cfg, procs, f"{run or name}, {steps} steps")
            rows.append(make_row(cfg, name, steps, video, batch) | {"run": run, "weights": weights[run]} | about)
            write_text(cfg.out, json.dumps(rows, indent=1))
        if steps >= usual.steps:
            videos.setdefault((name, steps), video)
    order = [way[:3] for way in ways]
    rows.sort(key=lambda row: order.index((row["name"], row["steps"], row["run"])))
    return rows, [batch.video, *videos.values()]


def guidance_table(cfg: Config, batch: AnyBatch, procs: parallel.Processes) -> tuple[list[dict], list[Tensor]]:
    """Rows of the slow networks with guidance 5: the adapter in one branch or both, and trajectory guidance."""
    slow, adapter = load_pair(cfg.slow_generator, cfg.slow_adapter, "Slow", cfg, procs)
    strong = replace(cfg, guidance=5.0)
    ways = {
        "no guidance": slow_sampler(slow, adapter, cfg),
        "guidance 5, adapter in the first branch": slow_sampler(slow, adapter, strong, both=False),
        "guidance 5, adapter in both": slow_sampler(slow, adapter, strong),
    }
    for scale in (1.5, 2.0, 3.0):
        ways[f"guidance 5, trajectory guidance {scale:g}"] = slow_sampler(slow, adapter, strong, scale)
    videos = [generate(sample, batch, cfg, procs, name) for name, sample in ways.items()]
    rows = [make_row(cfg, name, cfg.steps, video, batch) for name, video in zip(ways, videos, strict=True)]
    return rows, [batch.video, *videos]


def main(cfg: Config) -> None:
    for name, least in (("videos", 2), ("steps", 1), ("batch", 1), ("seed", 0), ("shift", 0.01)):
        if getattr(cfg, name) < least:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least {least}")
    if cfg.split == "photographs" and cfg.preset != "pictures":
        raise UserError("--split photographs: needs --preset pictures")
    out = output_path(cfg.out, ".json")
    procs = parallel.init_processes()
    batch = CODECS[cfg.preset].world(cfg.split).batch(list(range(cfg.videos)))
    measure = ablate if cfg.ablation else guidance_table if cfg.guidance_table else compare
    rows, videos = measure(cfg, batch, procs)

    shown = over_seeds(rows) if cfg.ablation else rows
    print(table(shown))
    about = provenance("-m toy.evaluate", cfg, procs.device)  # an earlier call's rows keep their own machine
    write_text(out, json.dumps([row | about | row for row in rows], indent=1))
    write_text(out.with_suffix(".md"), markdown(shown))
    if any(video is None for video in videos):
        print(f"{out.with_suffix('.png')}: not written; it needs videos that an earlier call made")
    else:
        write_image(out.with_suffix(".png"), comparison(videos, batch, cfg.maps))
    if measure is compare:
        write_animation(out.with_suffix(".gif"), animation([videos[2], videos[4]], batch), fps=6)


if __name__ == "__main__":
    run_script(main, Config, {"pictures": PICTURES})
