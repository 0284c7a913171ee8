"""Make a video from one image, a prompt and boxes drawn over time.

    python sample.py                                                       # the shipped example
    python sample.py --image x.png --traj boxes.json --prompt "a red and blue disc spinning clockwise"
    python sample.py --speed slow

Writes `--out` and, beside it, the same video with the boxes drawn over it. Fast: FastGenerator + FastAdapter in 4 steps
that predict the clean video and noise it again. Slow: SlowGenerator + SlowAdapter in 50 Euler steps.
"""

import contextlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import imageio.v3 as iio
import numpy as np
import torch
from torch import Tensor

import common
import flow
from adapter import read_adapter, serves, steer
from codec import ToyCodec
from model import PRESETS, VideoDiT
from trajectory import TrajectoryError, draw_overlay, load_trajectory

EXAMPLE = "a yellow and red disc spinning clockwise, a cyan and green diamond spinning counterclockwise"


@dataclass(frozen=True)
class Config:
    """Options of sampling."""

    image: str = "examples/image.png"  # the first frame
    traj: str = "examples/boxes.json"  # boxes.json, a map video, or a folder of PNG maps
    prompt: str = EXAMPLE  # what the video shows
    out: str = "out/sample.mp4"  # the video; <out>.boxes.mp4 is written beside it
    preset: Literal["tiny"] = "tiny"  # size of the networks and their world
    weights: str = "checkpoints/tiny"  # folder of <speed>_generator.safetensors and <speed>_adapter.safetensors
    speed: Literal["fast", "slow"] = "fast"  # which networks, and their sampler
    steps: int = 0  # denoising steps; 0 is the sampler's own number: 4 fast, 50 slow
    guidance: float = 1.0  # slow only: strength of prompt and trajectory; 1 switches it off and halves the work
    seed: int = 0  # another seed, another video
    frames: int = 9  # length of the video
    fps: int = 8  # frames a second
    scale: int = 8  # enlarge the written video so many times
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is bfloat16 unless emulated


def load_image(path: str, size: int) -> tuple[Tensor, tuple[int, int]]:
    """The image as [1, 3, 1, size, size] in [-1, 1], and its own (height, width). UserError if it can't be used."""
    if not Path(path).is_file():
        raise common.UserError(f"{path}: no such image; give a PNG or JPEG with --image")
    try:
        pixels = iio.imread(path, mode="RGB", index=0)
    except (OSError, ValueError, SyntaxError) as error:
        reason = str(error).splitlines()[0]
        raise common.UserError(f"{path}: not a readable image ({reason}); give a PNG or JPEG") from None
    height, width = pixels.shape[:2]
    if height != width:
        raise common.UserError(f"{path}: is {width}x{height}; this preset makes square videos: crop it to a square")
    image = torch.from_numpy(np.ascontiguousarray(pixels)).permute(2, 0, 1)[None].float() / 127.5 - 1
    if height != size:
        image = torch.nn.functional.interpolate(image, (size, size), mode="bilinear", antialias=True)
    return image[:, :, None], (height, width)


def main(cfg: Config) -> None:
    if cfg.steps < 0:
        raise common.UserError(f"--steps {cfg.steps}: at least 1, or 0 for the sampler's own number")
    if cfg.speed == "fast" and cfg.guidance != 1:
        raise common.UserError(f"--guidance {cfg.guidance}: the fast networks have none; add --speed slow")
    if cfg.scale < 1 or cfg.fps < 1:
        raise common.UserError(f"--scale {cfg.scale} --fps {cfg.fps}: both at least 1")
    if cfg.frames < 2 or cfg.seed < 0:
        raise common.UserError(f"--frames {cfg.frames} --seed {cfg.seed}: at least 2, and no seed below 0")
    out = common.output_path(cfg.out, ".mp4")
    procs = common.init_processes()
    size = 48
    took: dict[str, float] = {}

    @contextlib.contextmanager
    def timed(part: str) -> Iterator[None]:
        began = time.perf_counter()
        yield
        took[part] = time.perf_counter() - began

    with timed("read inputs"):
        image, source_size = load_image(cfg.image, size)
        trajectory = load_trajectory(cfg.traj, (size, size), cfg.frames, source_size)
    with timed("load networks"):
        files = [Path(cfg.weights) / f"{cfg.speed}_{part}.safetensors" for part in ("generator", "adapter")]
        generator = VideoDiT.from_pretrained(files[0], cfg.speed.title() + "Generator").to(procs.device)
        if generator.config != PRESETS[cfg.preset]:
            raise common.UserError(f"{files[0]}: is no network of preset {cfg.preset}")
        adapter = read_adapter(files[1], cfg.speed.title() + "Adapter").to(procs.device)
        if not serves(adapter, generator):
            raise common.UserError(f"{files[1]}: was made for a generator of other shape than {files[0]}")
        codec = ToyCodec()
    with timed("encode"):
        first = codec.encode_video(image).to(procs.device)
        traj = codec.encode_video(trajectory.maps("box")[None]).to(procs.device)
        text, empty = codec.encode_text([cfg.prompt, ""]).to(procs.device).split(1)
    with timed("denoise"), torch.no_grad(), common.autocast(procs.device, cfg.dtype):
        velocity, shape = steer(generator, adapter, text, traj), (first.shape[1], cfg.frames, *first.shape[3:])
        sampling = flow.FAST if cfg.speed == "fast" else flow.SLOW
        steps = cfg.steps or sampling.steps
        sigmas = flow.sigma_schedule(steps, sampling.shift)
        if cfg.speed == "fast":
            noise = common.step_noise(steps, shape, [0], cfg.seed).to(procs.device)
            latents = flow.sample_fewstep(velocity, first, noise, sigmas)
        else:
            noise = common.sample_noise(shape, [0], cfg.seed).to(procs.device)
            velocity = flow.guided(velocity, steer(generator, None, empty), cfg.guidance)
            latents = flow.sample_multistep(velocity, first, noise, sigmas)
    with timed("decode"):
        video = codec.decode_video(latents)[0]
    with timed("write"):
        overlay = out.with_suffix(".boxes.mp4")
        common.write_video(out, common.to_uint8(video, cfg.scale), cfg.fps)
        common.write_video(overlay, draw_overlay(video, trajectory, cfg.scale), cfg.fps)
    print("  ".join(f"{part} {seconds:.2f} s" for part, seconds in took.items()))
    print(f"{steps} steps on {procs.device}: {out} and {overlay}")


if __name__ == "__main__":
    common.run_script(main, Config, TrajectoryError)
