"""Measure the networks on held-out videos of the small world. metrics.py says what the measures mean.

    python -m toy.evaluate                                  # the shipped networks, slow and fast
    python -m toy.evaluate --split photographs --videos 64  # the same with parts of photographs
    python -m toy.evaluate --ablation --videos 64           # the runs of `make ablation`: what each part is for

Prints a table and writes its rows as JSON, the same in Markdown, and a contact sheet of maps, true videos and what each
network makes. The first rows score the true videos, what the codec leaves of them, and things cut out and pasted. The
ablation's file has a row for each run, its table the mean and range over training seeds; to resume it, run it again.
"""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

import flow
from adapter import check_fit, read_adapter, sample_clips
from core import parallel
from core.codec import Batch
from core.config import require, run_script, shipped
from core.media import contact_sheet, read_record, to_uint8, write_image
from core.memory import seconds
from core.record import checksum
from core.tables import markdown, provenance, table_path, write_rows
from model import VideoDiT
from toy import metrics
from toy.codec import ToyCodec
from toy.segment import segment
from toy.world import World, WorldBatch
from trajectory import Maps

FEW = flow.FAST["small"].steps
BATCH = 16  # videos sampled at once
MEASURES = ("thing_error", "thing_error_by_mask", "thing_error_by_box", "thing_error_turning",
            "ground_psnr", "camera_psnr", "hole_psnr", "seam", "sharpness", "fvd", "prompt_accuracy")  # fmt: skip
RUNS = Path("runs/ablation")  # <variant>_<seed>/fast_adapter.safetensors
VARIANTS = {  # of stage 3, and the baselines, by the folder's name; the Makefile has their flags
    "no_diffusion": "hybrid without diffusion loss",
    "no_gan": "hybrid without GAN loss",
    "constant": "hybrid, constant scale",
    "decay": "FlashMotion: hybrid, decaying scale",
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
    weights: tuple[str, ...] = (shipped("checkpoints/small"),)  # folders; of each network the first that has it counts
    ablation: bool = False  # the runs under runs/ablation instead of the FastAdapter
    out: str = "runs/evaluate/rows.json"  # rows; the table (.md) and the contact sheet (.png) go beside it
    split: Literal["test", "validation", "photographs"] = "test"  # of the world; none is trained on
    videos: int = 256  # how many, from the first of the split
    steps: int = 6  # of the slow sampler
    seed: int = 0  # of the noise that sampling starts from
    compile: bool = True  # torch.compile each block


class Way(NamedTuple):
    """What a row of the table measures: a generator, perhaps with an adapter, in so many steps."""

    name: str
    steps: int
    generator: Path
    adapter: Path | None
    run: str = ""  # the ablation's, by its folder's name


def find_ways(cfg: Config) -> list[Way]:
    """The networks of `--weights`, or the runs of the ablation, in fewer and fewer steps."""
    names = ("slow_generator", "slow_adapter", "fast_generator", "fast_adapter")
    places = [[Path(folder) / f"{name}.safetensors" for folder in cfg.weights or Config.weights] for name in names]
    slow, slow_adapter, fast, fast_adapter = (next(filter(Path.exists, files), files[0]) for files in places)
    if not cfg.ablation:
        return [
            Way("SlowGenerator", cfg.steps, slow, None),
            Way("SlowGenerator + SlowAdapter", cfg.steps, slow, slow_adapter),
            Way("FastGenerator", FEW, fast, None),
            Way("FastGenerator + SlowAdapter", FEW, fast, slow_adapter),
            Way("FastGenerator + FastAdapter", FEW, fast, fast_adapter),
        ]
    runs = {variant: sorted(RUNS.glob(f"{variant}_*/fast_adapter.safetensors")) for variant in VARIANTS}
    require(runs[METHOD], f"{RUNS / METHOD}_0/fast_adapter.safetensors: no such run; run `make ablation`")
    for variant in (variant for variant, files in runs.items() if not files):
        print(f"{RUNS / variant}_0/fast_adapter.safetensors: no such run; the table leaves out: {VARIANTS[variant]}")
    ways = [Way("SlowGenerator + SlowAdapter", steps, slow, slow_adapter) for steps in (cfg.steps, FEW)]
    for steps in (FEW, 2, 1):
        ways.append(Way("FastGenerator + SlowAdapter", steps, fast, slow_adapter))
        for variant, files in runs.items():
            if steps == FEW or not VARIANTS[variant].startswith("discriminator"):
                ways += [Way(VARIANTS[variant], steps, fast, file, file.parent.name) for file in files]
    return ways


def conditions(batch: WorldBatch, codec: ToyCodec, style: Maps, device: torch.device) -> Batch:
    """What a sampler takes of these videos, as in `sample.py`; x0 repeats the first frame."""
    first, maps = (codec.encode_video(video) for video in (batch.video[:, :, :1], batch.maps(style, "box", segment)))
    return Batch(first.expand_as(maps), codec.encode_text(batch.captions), maps).to(device)


def generate(sample: Callable, batch: WorldBatch, device: torch.device, name: str, style: Maps) -> Tensor:
    """Every video of the batch, sampled from its first frame, caption and maps of this `style`: [B,3,T,H,W]."""
    codec, videos, numbers = ToyCodec(), [], range(len(batch.video))
    for samples in tqdm([numbers[i : i + BATCH] for i in numbers[::BATCH]], desc=name):
        with torch.no_grad(), parallel.autocast(device, "auto"):
            (latents,) = sample(conditions(batch.subset(samples), codec, style, device), samples)
        videos.append(codec.decode_video(latents).cpu())
    video = torch.cat(videos)
    require(video.isfinite().all(), f"{name}: generates values that are no numbers; give other weights")
    return video


def seconds_per_video(samplers: list[Callable], batch: WorldBatch, device: torch.device) -> list[float]:
    """Seconds to denoise one clip, samplers timed alternately: the median of five rounds."""
    clip = conditions(batch.subset([0]), ToyCodec(), "outline", device)  # the maps' style costs nothing here
    with torch.no_grad(), parallel.autocast(device, "auto"):
        rounds = [[seconds(partial(sample, clip, [0]), device) for sample in samplers] for _ in range(6)]
    return np.median(rounds[1:], axis=0).tolist()  # the first round compiles


def measure(name: str, steps: int, video: Tensor, batch: WorldBatch, seconds: float = math.nan) -> dict:
    """One row of the table: measures to four decimals, None for those that no object counts for."""
    scores = {**metrics.score(video, batch), "seconds_per_video": seconds}
    rounded = {key: round(value, 4) if math.isfinite(value) else None for key, value in scores.items()}
    return {"name": name, "steps": steps, "videos": len(video), **rounded}


def comparison(videos: Sequence[Tensor], batch: WorldBatch, style: Maps) -> np.ndarray:
    """Maps and `videos` [B,3,T,H,W] below one another, for six clips of few and many things: uint8 [h, w, 3]."""
    picks = batch.used.sum(1).argsort(stable=True)[:: max(1, len(batch.used) // 6)][:6].tolist()
    columns = [batch.subset(picks).maps(style, "box"), *(video[picks] for video in videos)]
    sheets = [contact_sheet([to_uint8(clip) for clip in clips]) for clips in zip(*columns, strict=True)]
    return contact_sheet([sheets[row : row + 2] for row in range(0, len(sheets) - 1, 2)], gap=12)  # two columns


def over_seeds(rows: Sequence[dict]) -> list[dict]:
    """Rows of several seeds, neighbours of one name and number of steps, as one each: "mean (lowest to highest)"."""
    merged = []
    for (name, steps), group in groupby(rows, key=itemgetter("name", "steps")):
        seeds = list(group)
        merged.append({"name": name, "steps": steps, "videos": seeds[0]["videos"], "seeds": len(seeds)})
        for key in MEASURES:
            values = [row[key] for row in seeds if row[key] is not None]
            mean = round(sum(values) / len(values), 4) if values else None
            merged[-1][key] = f"{mean} ({min(values)} to {max(values)})" if len(set(values)) > 1 else mean
    return merged


def earlier_rows(out: Path, command: str) -> dict[tuple, dict]:
    """The rows of `out` that this command made, by name, steps, run and weights."""
    try:
        rows = json.loads(out.read_text(encoding="utf-8")) if out.exists() else []
        return {itemgetter("name", "steps", "run", "weights")(row): row for row in rows if row["command"] == command}
    except (ValueError, TypeError, KeyError):
        return {}  # rows of another kind


def main(cfg: Config) -> None:
    out = table_path(cfg.out)
    if (sheet := out.with_suffix(".png")).exists():
        read_record(sheet)  # only what was made here is made anew
    procs = parallel.init_processes()
    about = provenance("-m toy.evaluate", cfg, procs.device)
    ways, networks, samplers = find_ways(cfg), {None: None}, []
    for way in ways:
        for file, read in ((way.generator, VideoDiT.from_pretrained), (way.adapter, read_adapter)):
            if file not in networks:
                kind = file.stem.title().replace("_", "")  # fast_adapter.safetensors holds a FastAdapter
                networks[file] = parallel.prepare(read(str(file), kind), procs, cfg.compile)
        generator, adapter = networks[way.generator], networks[way.adapter]
        if adapter:
            check_fit(adapter, way.adapter, generator, way.generator)
        slow = "slow" in way.generator.stem
        sampling = flow.Sampling(way.steps, (flow.SLOW if slow else flow.FAST)["small"].shift)
        samplers.append(partial(sample_clips, generator, [adapter], sampling, cfg.seed, euler=slow))
    batch = World(cfg.split).batch(range(cfg.videos))  # which takes longer than finding out that a file is wrong
    done, times, known = earlier_rows(out, about["command"]), [math.nan] * len(ways), {}
    if not cfg.ablation:
        done, times, known = {}, seconds_per_video(samplers, batch, procs.device), metrics.baselines(batch, ToyCodec())
    rows, videos = [measure(name, 0, video, batch) | about for name, video in known.items()], {}
    for way, sample, taken in zip(ways, samplers, times, strict=True):
        files = ToyCodec.weights, way.generator, way.adapter
        made_by = {"run": way.run, "weights": checksum(*files)} if cfg.ablation else {}
        key, video = (way.name, way.steps, *made_by.values()), None
        if key not in done:
            style = networks[way.adapter].config.maps if way.adapter else "pixels"
            video = generate(sample, batch, procs.device, f"{way.run or way.name}, {way.steps} steps", style)
            done[key] = measure(way.name, way.steps, video, batch, taken) | made_by | about
            if cfg.ablation:
                write_rows(out, [*done.values()])
        rows.append(done[key])
        if way.steps >= FEW or not cfg.ablation:
            videos.setdefault((way.name, way.steps), video)  # of the first seed

    shown = over_seeds(rows) if cfg.ablation else rows
    print(markdown(shown))
    write_rows(out, rows, table=shown)
    if any(video is None for video in videos.values()):
        return print(f"{sheet}: not written; it needs videos that an earlier call made")
    write_image(sheet, comparison([batch.video, *videos.values()], batch, style))


if __name__ == "__main__":
    run_script(main, Config)
