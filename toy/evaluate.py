"""Measure the networks on held-out videos of the small world. metrics.py says what the measures mean.

    python -m toy.evaluate                                  # the shipped networks, slow and fast
    python -m toy.evaluate --split photographs --videos 64  # the same with parts of photographs
    python -m toy.evaluate --ablation --videos 64           # the runs of `make ablation`: what each part is for

Prints a table and writes its rows as JSON, the same in Markdown, and a contact sheet: trajectory maps, the truth, and
what each network makes of it. The first rows score the true videos, what the codec leaves of them, and things cut out
and pasted. The ablation's file has a row for each run, its table the mean over training seeds, with the lowest and the
highest. To resume it, run the same command again.
"""

import hashlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
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
from adapter import Adapter, check_fit, read_adapter, read_maps
from core import parallel
from core.config import UserError, run_script, shipped
from core.files import output_path, write_text
from core.media import contact_sheet, to_uint8, write_animation, write_image
from core.noise import sample_noise, step_noise
from core.tables import markdown, provenance, table
from model import VideoDiT
from toy import metrics
from toy.codec import ToyCodec
from toy.world import World, WorldBatch
from trajectory import Maps, draw_overlay

MEASURES = ("thing_error", "thing_error_told_by_mask", "thing_error_told_by_box", "thing_error_turning",
            "ground_psnr", "camera_psnr", "hole_psnr", "seam", "sharpness", "fvd", "prompt_accuracy")  # fmt: skip
RUNS = Path("runs/ablation")  # <variant>_<seed>/fast_adapter.safetensors
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


@dataclass(frozen=True)
class Config:
    slow_generator: str = shipped("checkpoints/small/slow_generator.safetensors")  # of stage 0
    slow_adapter: str = shipped("checkpoints/small/slow_adapter.safetensors")  # of stage 1
    fast_generator: str = shipped("checkpoints/small/fast_generator.safetensors")  # of stage 2
    fast_adapter: str = shipped("checkpoints/small/fast_adapter.safetensors")  # of stage 3
    ablation: bool = False  # the runs under runs/ablation instead of the shipped FastAdapter
    out: str = "runs/evaluate/rows.json"  # rows; the table (.md), the contact sheet (.png) and a .gif go beside it
    split: Literal["test", "validation", "photographs"] = "test"  # of the world; none is trained on
    videos: int = 256  # how many, from the first of the split
    steps: int = 6  # of the slow sampler
    batch: int = 16  # videos sampled at once
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is the faster one
    compile: bool = True  # torch.compile each block
    seed: int = 0  # of the noise that sampling starts from


# (first-frame latents [B,C,1,H,W], text, the maps' latents [B,C,F,H,W], sample numbers) -> [B,C,F,H,W]
Sampler = Callable[[Tensor, Tensor, Tensor, Sequence[int]], Tensor]


def sampler(generator: VideoDiT, adapter: Adapter | None, steps: int, seed: int, slow: bool = False) -> Sampler:
    """Euler steps from one noise if slow, else the few steps that stages 2 and 3 train for, or fewer."""

    def sample(first: Tensor, text: Tensor, traj: Tensor, samples: Sequence[int]) -> Tensor:
        velocity = partial(generator, text=text, residuals=adapter(traj) if adapter else None)
        if slow:
            noise = sample_noise(traj.shape[1:], samples, seed).to(first.device)
            return flow.sample_multistep(velocity, first, noise, flow.sigma_schedule(steps, flow.SLOW["small"].shift))
        noise = step_noise(steps, traj.shape[1:], samples, seed).to(first.device)
        return flow.sample_fewstep(velocity, first, noise, flow.sigma_schedule(steps, flow.FAST["small"].shift))

    return sample


def inputs(batch: WorldBatch, samples: list[int], codec: ToyCodec, device: torch.device, style: Maps) -> list[Tensor]:
    """What a sampler takes, for these videos of the batch."""
    some = batch.subset(samples)
    maps, first = codec.encode_video(some.maps(style, "box")), codec.encode_video(some.video[:, :, :1])
    return [x.to(device) for x in (first, codec.encode_text(some.captions), maps)]


def generate(
    sample: Sampler, batch: WorldBatch, cfg: Config, procs: parallel.Processes, name: str, style: Maps
) -> Tensor:
    """Every video of the batch, sampled from its first frame, caption and trajectory: [B,3,T,H,W].

    `style`: how the trajectories that the adapter reads are painted.
    """
    codec, videos = ToyCodec(), []
    for start in tqdm(range(0, len(batch.video), cfg.batch), desc=name):
        samples = list(range(start, min(start + cfg.batch, len(batch.video))))
        with torch.no_grad(), parallel.autocast(procs.device, cfg.dtype):
            latents = sample(*inputs(batch, samples, codec, procs.device, style), samples)
        videos.append(codec.decode_video(latents).cpu())
    video = torch.cat(videos)
    if not video.isfinite().all():
        raise UserError(f"{name}: generates values that are no numbers; give other weights")
    return video


def seconds_per_video(
    samplers: list[Sampler], batch: WorldBatch, cfg: Config, procs: parallel.Processes
) -> list[float]:
    """Seconds to denoise one clip, samplers timed alternately: the median of five rounds."""
    clip, rounds = inputs(batch, [0], ToyCodec(), procs.device, "outline"), []  # the maps' style costs nothing here
    for _ in range(6):
        rounds.append([])
        for sample in samplers:
            began = time.perf_counter()
            with torch.no_grad(), parallel.autocast(procs.device, cfg.dtype):
                sample(*clip, [0]).sum().item()  # waits for the device
            rounds[-1].append(time.perf_counter() - began)
    return np.median(rounds[1:], axis=0).tolist()  # the first round compiles


def make_row(name: str, steps: int, video: Tensor, batch: WorldBatch, seconds: float = math.nan) -> dict:
    """One row of the table: measures to four decimals, None for those that no object counts for."""
    scores = {**metrics.score(video, batch), "seconds_per_video": seconds}
    rounded = {key: round(value, 4) if math.isfinite(value) else None for key, value in scores.items()}
    return {"name": name, "steps": steps, "videos": len(video), **rounded}


def over_seeds(rows: Sequence[dict]) -> list[dict]:
    """The rows of several training seeds as one each: mean and range of every measure, and the number of seeds."""
    merged = []
    for (name, steps), group in groupby(rows, key=itemgetter("name", "steps")):
        seeds = list(group)
        merged.append({"name": name, "steps": steps, "videos": seeds[0]["videos"], "seeds": len(seeds)})
        for key in MEASURES:
            values = [row[key] for row in seeds if row[key] is not None]
            merged[-1] |= {key: round(sum(values) / len(values), 4) if values else None}
            merged[-1] |= {f"{key}_range": [min(values), max(values)] if values else None}
    return merged


def comparison(videos: Sequence[Tensor], batch: WorldBatch, style: Maps) -> np.ndarray:
    """Maps and `videos` [B,3,T,H,W] below one another, for six clips of few and many things: uint8 [h, w, 3]."""
    among = min(48, len(batch.video))
    picks, sheets = batch.used[:among].sum(1).argsort(stable=True)[:: max(1, among // 6)][:6], []
    for i in picks.tolist():
        clips = [batch.subset([i]).maps(style, "box")[0], *(video[i] for video in videos)]
        sheets.append(contact_sheet([to_uint8(clip) for clip in clips]))
    return contact_sheet([sheets[row : row + 2] for row in range(0, len(sheets) - 1, 2)], gap=12)  # two columns


def animation(videos: Sequence[Tensor], batch: WorldBatch) -> np.ndarray:
    """What a user gives and gets, for three clips at most: the image with its boxes, and `videos` [B,3,T,H,W] beside
    it: uint8 [T, h, w, 3].
    """
    rows = []
    for i in range(min(3, len(batch.video))):
        still = batch.video[i][:, :1].expand_as(batch.video[i])
        drawn = draw_overlay(to_uint8(still, scale=2), batch.trajectory(i))
        rows.append([drawn, *(to_uint8(video[i], scale=2) for video in videos)])
    frames = zip(*(zip(*row, strict=True) for row in rows), strict=True)  # frame by frame, rows of tiles
    return np.stack([contact_sheet(frame, gap=4) for frame in frames])


def load_pair(generator: str, adapter: str, speed: str, cfg: Config, procs: parallel.Processes) -> tuple:
    """A generator and its adapter, from files made by the stages called `speed`, "Slow" or "Fast"."""
    pair = VideoDiT.from_pretrained(generator, f"{speed}Generator"), read_adapter(adapter, f"{speed}Adapter")
    check_fit(pair[1], adapter, pair[0], generator)
    return tuple(parallel.prepare(network, procs, cfg.compile) for network in pair)


def compare(cfg: Config, procs: parallel.Processes) -> tuple[WorldBatch, list[dict], list[Tensor]]:
    """The true videos, rows of the shipped networks, and the videos of the contact sheet."""
    codec, few = ToyCodec(), flow.FAST["small"].steps
    slow, slow_adapter = load_pair(cfg.slow_generator, cfg.slow_adapter, "Slow", cfg, procs)
    fast, fast_adapter = load_pair(cfg.fast_generator, cfg.fast_adapter, "Fast", cfg, procs)
    styles = slow_adapter.config.maps, fast_adapter.config.maps
    batch = World(cfg.split).batch(range(cfg.videos))  # which takes longer than finding out that a file is wrong
    coded = torch.cat([codec.decode_video(codec.encode_video(part)) for part in batch.video.split(cfg.batch)])
    known = {
        "true video": batch.video,
        "through the codec": coded,
        "the first frame, still": metrics.still(batch),
        "pasted by mask": metrics.pasted(batch, "mask"),
        "pasted by box": metrics.pasted(batch, "box"),
    }
    rows, videos = [make_row(name, 0, video, batch) for name, video in known.items()], []
    ways = {
        ("SlowGenerator", cfg.steps): sampler(slow, None, cfg.steps, cfg.seed, slow=True),
        ("SlowGenerator + SlowAdapter", cfg.steps): sampler(slow, slow_adapter, cfg.steps, cfg.seed, slow=True),
        ("FastGenerator", few): sampler(fast, None, few, cfg.seed),
        ("FastGenerator + SlowAdapter", few): sampler(fast, slow_adapter, few, cfg.seed),
        ("FastGenerator + FastAdapter", few): sampler(fast, fast_adapter, few, cfg.seed),
    }
    seconds = seconds_per_video(list(ways.values()), batch, cfg, procs)
    for ((name, steps), sample), taken in zip(ways.items(), seconds, strict=True):
        videos.append(generate(sample, batch, cfg, procs, name, styles[name.endswith("FastAdapter")]))
        rows.append(make_row(name, steps, videos[-1], batch, taken))
    return batch, rows, [batch.video, *videos]


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


def ablate(cfg: Config, procs: parallel.Processes) -> tuple[WorldBatch, list[dict], list[Tensor | None]]:
    """The true videos, rows of the paper's ablation, one for each run of stage 3 and number of steps, and the contact
    sheet's videos, of each first seed. What `--out` holds is not measured again, and None stands for its videos.
    """
    slow, adapter = load_pair(cfg.slow_generator, cfg.slow_adapter, "Slow", cfg, procs)
    fast = parallel.prepare(VideoDiT.from_pretrained(cfg.fast_generator, "FastGenerator"), procs, cfg.compile)
    adapters, weights, runs = {"": adapter}, {"": ""}, {"FastGenerator + SlowAdapter": [""]}
    for variant, label in VARIANTS.items():
        files = sorted(RUNS.glob(f"{variant}_*/fast_adapter.safetensors"))
        absent = f"{RUNS / variant}_0/fast_adapter.safetensors: no such run;"
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

    few = flow.FAST["small"].steps
    ways = [
        ("SlowGenerator + SlowAdapter", n, "", sampler(slow, adapter, n, cfg.seed, slow=True)) for n in (cfg.steps, few)
    ]
    for steps in (few, 2, 1):
        for name, some in runs.items():
            if steps == few or not name.startswith("discriminator"):
                ways += [(name, steps, run, sampler(fast, adapters[run], steps, cfg.seed)) for run in some]

    networks = checksum(ToyCodec.weights, cfg.slow_generator, cfg.slow_adapter, cfg.fast_generator)
    about = provenance("-m toy.evaluate", cfg, procs.device) | {"networks": networks}
    rows, videos = measured(Path(cfg.out), about, weights), {}
    batch = World(cfg.split).batch(range(cfg.videos))
    for name, steps, run, sample in ways:
        video = None
        if not any((name, steps, run) == (row["name"], row["steps"], row["run"]) for row in rows):
            video = generate(sample, batch, cfg, procs, f"{run or name}, {steps} steps", adapters[run].config.maps)
            rows.append(make_row(name, steps, video, batch) | {"run": run, "weights": weights[run]} | about)
            write_text(cfg.out, json.dumps(rows, indent=1))
        if steps >= few:
            videos.setdefault((name, steps), video)
    order = [way[:3] for way in ways]
    rows.sort(key=lambda row: order.index((row["name"], row["steps"], row["run"])))
    return batch, rows, [batch.video, *videos.values()]


def main(cfg: Config) -> None:
    for name, least in (("videos", 2), ("steps", 1), ("batch", 1), ("seed", 0)):
        if getattr(cfg, name) < least:
            raise UserError(f"--{name} {getattr(cfg, name)}: must be at least {least}")
    out = output_path(cfg.out, ".json")
    procs = parallel.init_processes()
    batch, rows, videos = (ablate if cfg.ablation else compare)(cfg, procs)

    shown = over_seeds(rows) if cfg.ablation else rows
    print(table(shown))
    about = provenance("-m toy.evaluate", cfg, procs.device)  # an earlier call's rows keep their own machine
    write_text(out, json.dumps([row | about | row for row in rows], indent=1))
    write_text(out.with_suffix(".md"), markdown(shown))
    if any(video is None for video in videos):
        print(f"{out.with_suffix('.png')}: not written; it needs videos that an earlier call made")
    else:
        sheet = comparison(videos, batch, read_maps(cfg.slow_adapter, "SlowAdapter"))
        write_image(out.with_suffix(".png"), sheet)
    if not cfg.ablation:
        write_animation(out.with_suffix(".gif"), animation([videos[2], videos[5]], batch), fps=6)


if __name__ == "__main__":
    run_script(main, Config)
