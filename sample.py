"""Make a video from one image, a prompt and boxes drawn over time.

    python sample.py                                                       # the shipped example
    python sample.py --image x.png --traj boxes.json                       # any picture, a photograph too
    python sample.py --speed slow
    python sample.py --batch jobs.csv                                      # a table of videos: tools/batch.py
    python sample.py --serve                  # draw, generate and watch in a page, tools/draw.html: tools/serve.py
    python sample.py --preset wan5b --weights Wan2.2-TI2V-5B --image x.png --traj boxes.json --prompt "a cat jumps"

Fast: FastGenerator + FastAdapter in 4 steps, each of which predicts the clean video and adds noise again. Slow:
SlowGenerator + SlowAdapter in 50 steps along the flow.
An image of another shape than the video's is resized until it covers it and cut to its middle, and the boxes with it.
For preset wan5b, `--weights` is Wan2.2-TI2V-5B as published, with the networks of this project in it.
"""

import gc
import io
import math
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, redirect_stderr
from dataclasses import dataclass, replace
from functools import cache, partial
from itertools import count
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import sdpa_kernel

import flow
from adapter import Adapter, check_fit, read_adapter, read_maps
from core import memory, parallel
from core.attention import BACKENDS
from core.boxes import draw_overlay
from core.codec import Codec
from core.config import UserError, check_options, require, run_script, shipped, warn
from core.files import no_pointer, output_path
from core.media import MOST_VIDEO, cover_frames, ffmpeg_version, load_image, read_record, to_uint8, write_video
from core.noise import sample_noise, step_noise
from core.weights import split_key
from data import open_codec
from model import PRESETS, VideoDiT, frozen_dtype
from tools.batch import make_table, overlay_path
from tools.serve import serve_page
from toy.detail import add_detail, enlarge, full_size, written_size
from toy.segment import segment
from trajectory import Maps, Trajectory, load_trajectory
from wan import lora, unipc
from wan.published import find_generator


@dataclass(frozen=True)
class Config:
    image: str = shipped("examples/balloons.jpg")  # the first frame
    traj: str = shipped("examples/balloons.json")  # boxes.json, a map video, or a folder of PNG maps
    prompt: str = ""  # what the video shows
    batch: str = ""  # CSV file of many videos, with columns image, traj and perhaps prompt, out and seed
    out: str = "out/sample.mp4"  # the video; <out>.boxes.mp4 is written beside it
    preset: Literal["small", "wan5b"] = "small"  # size of the networks
    weights: str = shipped("checkpoints/small")  # folder of <speed>_generator.safetensors and its adapter
    generator: str = ""  # another file or folder of the generator; file.pt:key for one network of several
    lora: str = ""  # a LoRA to merge into the generator: FILE or FILE:strength
    adapter: str = ""  # another file of the adapter
    speed: Literal["fast", "slow"] = "fast"  # which networks, and their sampler
    steps: int = 0  # denoising steps; 0 is the sampler's own number: 4 fast, 50 slow
    guidance: float = 0.0  # slow only: strength of the prompt; 1 is none, at half the work; 0 is the preset's own
    solver: Literal["euler", "unipc"] = "euler"  # slow only: its steps; unipc is of second order
    shift: float = 0.0  # warp of noise levels towards noise; 0 is the sampler's own
    seed: int = 0  # another seed, another video
    size: str = "auto"  # height x width of the video, or auto: the image's own shape
    frames: int = 9  # length of the video
    detail: bool = True  # about as large as the picture, up to 1280 pixels, its own detail put back: toy/detail.py
    memory: Literal["high", "low"] = "high"  # for a GPU of 24 GB, or of 12: 8 bits, decoding in tiles; see docs/WAN.md
    decoder: str = ""  # preset wan5b: file of the small decoder taew2_2, fast and a little softer, instead of the VAE's
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is the faster one
    compile: bool = torch.cuda.is_available()  # torch.compile each block: takes a minute, then is faster; on for GPUs
    serve: bool = False  # draw, generate and watch in a page on 127.0.0.1 instead: port 7860, or any free one


WAN5B = replace(
    Config(),
    preset="wan5b",
    weights="Wan2.2-TI2V-5B",
    solver="unipc",  # (Wan)
    frames=121,  # (Wan)
    detail=False,
)


def check(cfg: Config) -> None:
    """UserError if an option can't be."""
    if cfg.speed == "fast" and cfg.guidance not in (0, 1):
        raise UserError(f"--guidance {cfg.guidance}: the fast networks have none; add --speed slow")
    require(isinstance(cfg.seed, int), f"--seed {cfg.seed}: a whole number, 0 at least")  # a table may hold anything
    check_options(cfg)
    if cfg.detail and cfg.preset == "wan5b":
        raise UserError("--detail true: preset wan5b makes large videos as it is; leave it out")
    if cfg.serve and (cfg.batch or "RANK" in os.environ):
        raise UserError("--serve: goes without --batch and torchrun; leave them out")
    if given := [n for n in ("image", "traj", "out") if cfg.batch and getattr(cfg, n) != getattr(Config, n)]:
        raise UserError(f"--{given[0]}: each row of --batch says its own; leave it out")
    if cfg.decoder and cfg.preset != "wan5b":
        raise UserError(f"--decoder {cfg.decoder}: preset {cfg.preset} has one of its own; leave it out")


def sampling(cfg: Config) -> flow.Sampling:
    """Steps, shift and guidance: the options', or else the sampler's own."""
    own = (flow.FAST if cfg.speed == "fast" else flow.SLOW)[cfg.preset]
    return flow.Sampling(cfg.steps or own.steps, cfg.shift or own.shift, cfg.guidance or own.guidance)


def find_networks(cfg: Config) -> tuple[str, Path]:
    """Files of generator and adapter: the options', else those in `--weights`. UserError if one is missing."""
    generator = cfg.generator or str(find_generator(Path(cfg.weights), cfg.speed))
    adapter = Path(cfg.adapter or Path(cfg.weights) / f"{cfg.speed}_adapter.safetensors")
    for path in (split_key(generator)[0], adapter):
        fix = "correct --weights, or give --generator and --adapter"
        require(no_pointer(path).exists(), f"{path}: no such file; {fix}")
    require(not adapter.is_dir(), f"--adapter {adapter}: is a folder; give the file in it")
    return generator, adapter


def embed_prompts(codec: Codec, prompts: list[str]) -> dict[str, Tensor]:
    """Embeddings of these prompts, [1, L, text_dim] each."""
    encode, prompts = codec.text_encoder(), list(dict.fromkeys(prompts))
    text = torch.cat([encode(prompts[i : i + 16]) for i in range(0, len(prompts), 16)])
    return dict(zip(prompts, text.split(1), strict=True))


class Condition(NamedTuple):
    """What one video is made from, besides the prompt."""

    image: Tensor  # the first frame [1,3,1,height,width] in [-1, 1]
    trajectory: Trajectory
    full: tuple[np.ndarray, Trajectory] | None  # with --detail: both at the size that is written, uint8 [H,W,3]


def read_condition(job: Config, codec: Codec, maps: Maps) -> Condition:
    """Read and check what a video is made from, and where it goes. UserError if it can't be made.

    Warns on stderr of what would make the video poor. `maps`: how the trajectory will be painted.
    """
    check(job)
    ffmpeg_version()  # before any work
    for name in ("image", "traj"):
        require(getattr(job, name), f"--{name}: empty; name a file")
    paths = [output_path(str(p), ".mp4", image=job.image, traj=job.traj) for p in (job.out, overlay_path(job.out))]
    for path in filter(Path.exists, paths):
        read_record(path)  # only what was made here is made anew
    pixels = load_image(job.image)
    size = codec.video_size(job.size, job.frames, pixels.shape[:2])
    image = cover_frames(pixels[None], size)[None] / 127.5 - 1
    picture = full_size(pixels, size)
    mask_in = partial(segment, picture)
    trajectory = load_trajectory(job.traj, size, job.frames, pixels.shape[:2], fill=mask_in)
    if job.preset == "wan5b" and not job.prompt.strip():
        warn("--prompt is empty: say what the video shows, or it will be poor")
    if job.preset == "wan5b" and maps == "outline" and (names := trajectory.unmasked):
        shown = f"frame 0 shows {', '.join(names)} by filled boxes"
        warn(f"{job.traj}: {shown}, which the paper's training never saw; give masks")
    if not job.detail:
        return Condition(image, trajectory, None)
    if (total := math.prod(picture.shape[:2]) * job.frames) > MOST_VIDEO:
        raise UserError(f"--frames {job.frames}: {total} pixels; {MOST_VIDEO} is the most; add --detail false")
    return Condition(image, trajectory, (picture, enlarge(trajectory, job.traj, picture.shape[:2], mask_in)))


def load_networks(cfg: Config, files: tuple[str, Path], procs: parallel.Processes) -> tuple[VideoDiT, Adapter]:
    """Generator and adapter, ready to work. UserError if they don't fit the preset or one another."""
    name, dtype = cfg.speed.title(), torch.int8 if cfg.memory == "low" else frozen_dtype(cfg.preset, cfg.dtype)
    edit = partial(lora.merge, text=cfg.lora) if cfg.lora else None
    generator = VideoDiT.from_pretrained(files[0], f"{name}Generator", dtype, preset=cfg.preset, edit=edit)
    adapter = read_adapter(files[1], f"{name}Adapter", dtype)
    check_fit(adapter, files[1], generator, files[0])
    unsharded = replace(procs, mesh=None)
    return tuple(parallel.prepare(network, unsharded, cfg.compile) for network in (generator, adapter))


@torch.no_grad()
def denoise(
    cfg: Config, generator: VideoDiT, adapter: Adapter, first: Tensor, traj: Tensor, text: Tensor, negative: Tensor,
    on_block: Callable[[float], None] | None = None,  # called after each block, with the share of the denoising done
) -> Tensor:  # fmt: skip
    """Sample the latents [1,C,F,H,W] of a video. Both branches of guidance get the trajectory, as in MagicMotion."""
    (steps, shift, guidance), shape, done = sampling(cfg), traj.shape[1:], count(1)
    blocks = steps * len(generator.blocks) * (1 if guidance == 1 else 2)

    def counted(residuals: Iterable[Tensor]) -> Iterator[Tensor]:
        for residual in residuals:  # each block asks for one when it is done
            if on_block:
                on_block(next(done) / blocks)
            yield residual

    def velocity(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        residuals = counted(kept or adapter.residuals(traj, x, t, text))
        return generator(x, t, text, residuals, shown, skip_still=True)

    with parallel.autocast(first.device, cfg.dtype), sdpa_kernel(BACKENDS, set_priority=True):
        # The small preset's residuals are kept. Those of wan5b would take 5 GB: each is made when its block asks.
        kept = adapter(traj) if cfg.preset == "small" and adapter.static else None
        shown = adapter.shown(traj, first) if adapter.static else None
        guided = flow.guided(partial(velocity, text=text), partial(velocity, text=negative), guidance)
        if cfg.speed == "fast":
            noise = step_noise(steps, shape, [0], cfg.seed).to(first.device)
            return flow.sample_fewstep(guided, first, noise, flow.sigma_schedule(steps, shift))
        noise = sample_noise(shape, [0], cfg.seed).to(first.device)
        if cfg.solver == "unipc":
            return unipc.sample_unipc(guided, first, noise, steps, shift)
        return flow.sample_multistep(guided, first, noise, flow.sigma_schedule(steps, shift))


def decode(codec: Codec, latents: Tensor, procs: parallel.Processes) -> np.ndarray:
    """Latents [1,C,F,H,W] -> uint8 [T, height, width, 3]. Processes may take pieces of it in turn."""
    own = [(turn, procs.rank, to_uint8(piece[0])) for turn, piece in enumerate(codec.pieces(latents, procs))]
    return np.concatenate([frames for *_, frames in sorted(procs.gather(own), key=lambda piece: piece[:2])])


def make_video(
    job: Config, condition: Condition, text: Tensor, negative: Tensor, stage: Callable[[str], AbstractContextManager],
    on_block: Callable | None = None, made_of: dict[str, str] | None = None, *, codec: Codec,
    networks: Callable[[], tuple[VideoDiT, Adapter]], maps: Maps, procs: parallel.Processes, with_boxes: bool = True,
) -> None:  # fmt: skip
    """Encode, denoise, decode and write one video, which `procs` share. `stage(name)` surrounds each part of the work.

    `networks()` is called when the codec has encoded and needs no more memory; what it gives is let go before decoding.
    `maps`: how the trajectory is painted. `with_boxes`: write the other video too. `made_of`: as in `write_video`.
    """
    image, trajectory, full = condition
    with stage("encode image and boxes"):
        painted = trajectory.maps("box", image[0, :, 0] if maps == "pixels" else None)[None]
        first, traj, text, negative = (
            x.to(procs.device) for x in (codec.encode_video(image), codec.encode_video(painted), text, negative)
        )
    with stage("read networks"):
        generator, adapter = networks()
    with stage("denoise"):
        latents = denoise(job, generator, adapter, first, traj, text, negative, on_block)
    del generator, adapter
    gc.collect()  # compiled blocks hold themselves
    require(latents.isfinite().all(), "the networks give values that are no numbers; give others, or --dtype float32")
    with stage("decode"):
        video = decode(codec, latents, procs)
    if procs.rank == 0:
        with stage("write"):
            if full:
                picture, trajectory = full
                video = add_detail(video, picture, trajectory)
            if with_boxes:
                write_video(overlay_path(job.out), draw_overlay(video, trajectory.boxes, trajectory.colors), codec.fps)
            write_video(job.out, video, codec.fps, made_of)  # last: a video that is there is complete


def main(cfg: Config) -> None:
    check(cfg)
    procs = parallel.init_processes(1 if cfg.batch else 0, PRESETS[cfg.preset].heads)  # a video each, or one for all
    if cfg.compile:
        parallel.start_compiler(procs.device)
    options = {"dtype": frozen_dtype(cfg.preset, cfg.dtype), "low": cfg.memory == "low", "decoder": cfg.decoder}
    codec = open_codec(cfg.preset, cfg.weights, procs.device, **options)
    codec.video_size(cfg.size, cfg.frames)
    files = find_networks(cfg)
    networks = partial(load_networks, cfg, files, procs)
    if cfg.batch or cfg.serve:
        networks = cache(networks)  # kept from one video to the next
    maps = read_maps(files[1], f"{cfg.speed.title()}Adapter")
    read, embed = partial(read_condition, codec=codec, maps=maps), partial(embed_prompts, codec)
    make = partial(make_video, codec=codec, networks=networks, maps=maps)
    if cfg.serve:
        usual = vars(WAN5B if cfg.preset == "wan5b" else Config())
        sizes = written_size if cfg.detail else lambda picture, size: size
        return serve_page(cfg, usual, sampling(cfg), codec, networks(), read, partial(make, procs=procs), sizes)
    clock = memory.Clock(procs.device)
    if cfg.batch:
        alone = replace(procs, rank=0, world=1, mesh=None)
        return make_table(cfg, codec, networks, read, embed, partial(make, procs=alone), clock, procs)

    with clock("read inputs"), redirect_stderr(sys.stderr if procs.rank == 0 else io.StringIO()):
        condition = read(cfg)  # before anything large is read
    with clock("encode prompt"):
        text = embed([cfg.prompt, codec.negative])
    make(cfg, condition, text[cfg.prompt], text[codec.negative], clock, procs=procs)
    if procs.rank == 0:
        print(f"{sampling(cfg).steps} steps on {procs.device}: {cfg.out} and {overlay_path(cfg.out)}", clock, sep="\n")


if __name__ == "__main__":
    run_script(main, Config, {"wan5b": WAN5B})
