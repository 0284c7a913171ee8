"""Make a video from one image, a prompt and boxes drawn over time.

    python sample.py                                                       # the shipped example
    python sample.py --image x.png --traj boxes.json --prompt "a red and blue disc spinning clockwise"
    python sample.py --speed slow
    python sample.py --preset wan5b --weights Wan2.2-TI2V-5B --image x.png --traj boxes.json --prompt "a cat jumps"

Writes `--out` and, beside it, the same video with the boxes drawn over it. Fast: FastGenerator + FastAdapter in 4 steps
that predict the clean video and noise it again. Slow: SlowGenerator + SlowAdapter in 50 Euler steps. An image of
another shape than the video's is resized until it covers it and cut to its middle, and the boxes with it.

For preset wan5b, `--weights` is Wan2.2-TI2V-5B as published, in its own layout or diffusers', with the networks of this
project in it: fast_generator.safetensors (or a generator.pt), fast_adapter.safetensors, slow_adapter.safetensors.
"""

import contextlib
import gc
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

import common
import flow
import memory
import parallel
from adapter import Adapter, read_adapter, serves, steer
from codec import Codec, open_codec
from jobs import read_jobs
from maps import BROKEN, Size, fit_frames, read_picture
from model import FROZEN, PRESETS, VideoDiT
from trajectory import Trajectory, TrajectoryError, draw_overlay, load_trajectory
from umt5 import read_text, save_text

EXAMPLE = "a yellow and red disc spinning clockwise, a cyan and green diamond spinning counterclockwise"


@dataclass(frozen=True)
class Config:
    """Options of sampling."""

    image: str = "examples/image.png"  # the first frame
    traj: str = "examples/boxes.json"  # boxes.json, a map video, or a folder of PNG maps
    prompt: str = EXAMPLE  # what the video shows
    batch: str = ""  # CSV file of many videos, with columns image, traj, prompt and perhaps out and seed; see README
    text: str = ""  # file of the prompt's embeddings: read if it exists, else written; spares the text encoder
    out: str = "out/sample.mp4"  # the video; <out>.boxes.mp4 is written beside it
    preset: Literal["tiny", "wan5b"] = "tiny"  # size of the networks and their world
    weights: str = "checkpoints/tiny"  # folder of <speed>_generator.safetensors and <speed>_adapter.safetensors
    generator: str = ""  # another file or folder of the generator
    adapter: str = ""  # another file of the adapter
    speed: Literal["fast", "slow"] = "fast"  # which networks, and their sampler
    steps: int = 0  # denoising steps; 0 is the sampler's own number: 4 fast, 50 slow
    guidance: float = 0.0  # slow only: strength of prompt and trajectory; 1 is none, at half the work; 0 the preset's
    seed: int = 0  # another seed, another video
    size: str = "48x48"  # height x width of the video
    frames: int = 9  # length of the video
    fps: int = 8  # frames a second
    scale: int = 8  # enlarge the written video so many times
    memory: Literal["high", "medium", "low"] = "high"  # of a GPU that is to do: above 24 GB, 24, or 12; see README
    tile: int = 0  # decode the video in squares of so many latent positions; 0 is all at once, 16 with low memory
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is bfloat16 unless emulated
    compile: bool = False  # torch.compile each block: a minute at first, to make long videos faster


WAN5B = {"prompt": "", "weights": "Wan2.2-TI2V-5B", "size": "704x1280", "frames": 121, "fps": 24, "scale": 1}


def load_image(path: str, size: Size) -> tuple[Tensor, Size]:
    """The image as [1, 3, 1, *size] in [-1, 1], and its own (height, width). UserError if it can't be used."""
    if not Path(path).is_file():
        raise common.UserError(f"{path}: no such image; give a PNG or JPEG with --image")
    try:
        pixels = read_picture(path)
    except BROKEN as error:
        raise common.UserError(f"{path}: not a readable image ({common.reason(error)}); give a PNG or JPEG") from None
    return fit_frames(pixels[None], size)[None] / 127.5 - 1, pixels.shape[:2]


def check(cfg: Config) -> None:
    """UserError if an option can't be."""
    if cfg.steps < 0:
        raise common.UserError(f"--steps {cfg.steps}: at least 1, or 0 for the sampler's own number")
    if cfg.speed == "fast" and cfg.guidance not in (0, 1):
        raise common.UserError(f"--guidance {cfg.guidance}: the fast networks have none; add --speed slow")
    if cfg.scale < 1 or cfg.fps < 1:
        raise common.UserError(f"--scale {cfg.scale} --fps {cfg.fps}: both at least 1")
    if cfg.memory == "medium" and not torch.cuda.is_available():
        raise common.UserError("--memory medium: keeps weights off a GPU, and there is none; give high, or low")
    if cfg.text and not Path(cfg.text).exists():
        common.output_path(cfg.text, ".safetensors", "text")
    if cfg.tile < 0 or cfg.tile == 1:
        raise common.UserError(f"--tile {cfg.tile}: at least 2, or 0 for no tiles")


def find_networks(cfg: Config) -> tuple[Path, Path]:
    """Where generator and adapter lie: as the flags say, else the first of their usual places in `--weights`."""
    folder, published = Path(cfg.weights), ["generator.pt"] if cfg.speed == "fast" else ["transformer", "config.json"]
    places = [folder / name for name in (f"{cfg.speed}_generator.safetensors", *published)]
    found = Path(cfg.generator) if cfg.generator else next((p for p in places if p.exists()), places[0])
    adapter = Path(cfg.adapter) if cfg.adapter else folder / f"{cfg.speed}_adapter.safetensors"
    for path in (found, adapter):
        if not path.exists():
            raise common.UserError(f"{path}: no such file; correct --weights, or give --generator and --adapter")
    return found.parent if found.name == "config.json" else found, adapter


def embed_prompts(cfg: Config, prompts: list[str], codec: Codec, writes: bool) -> dict[str, Tensor]:
    """Embeddings of these prompts, [1, L, text_dim] each. `writes`: this process leaves them in `--text`."""
    file = Path(cfg.text)
    if cfg.text and file.exists():
        text = read_text(file, prompts)
    else:
        encode = codec.text_encoder()
        text = torch.cat([encode(prompts[i : i + 16]) for i in range(0, len(prompts), 16)])
        if cfg.text and writes:
            save_text(file, prompts, text)
    return dict(zip(prompts, text.split(1), strict=True))


def read_inputs(job: Config, size: Size) -> tuple[Tensor, Trajectory]:
    """First frame and trajectory of a video, and every reason why it can't be made."""
    if not isinstance(job.seed, int) or job.seed < 0:
        raise common.UserError(f"--seed {job.seed}: a whole number, 0 at least")
    for name in ("image", "traj"):
        if not getattr(job, name):
            raise common.UserError(f"--{name}: empty; name a file")
    common.output_path(job.out, ".mp4")
    image, source_size = load_image(job.image, size)
    return image, load_trajectory(job.traj, size, job.frames, source_size)


def main(cfg: Config) -> None:
    check(cfg)
    procs = parallel.init_processes(sequence=1 if cfg.batch else 0)  # a video for each, or one for all
    device, frugal = procs.device, cfg.memory != "high"
    if cfg.compile:
        parallel.check_compiler(device)
    aside = frugal and device.type == "cuda"  # blocks stay in the host's memory
    decoder = torch.float32 if cfg.dtype == "float32" else FROZEN[cfg.preset]
    held = torch.int8 if cfg.memory == "low" else decoder
    tile = cfg.tile or (16 if cfg.memory == "low" else 0)
    codec = open_codec(cfg.preset, cfg.weights, device, dtype=decoder, tile=tile, offload=aside)
    size = codec.check_size(cfg.size, cfg.frames)
    sampling = (flow.FAST if cfg.speed == "fast" else flow.SLOW)[cfg.preset]
    steps, name = cfg.steps or sampling.steps, cfg.speed.title()
    took: dict[str, tuple[float, float]] = {}  # part -> seconds, and the most GiB held
    failed: list[str] = []

    @contextlib.contextmanager
    def timed(part: str) -> Iterator[None]:
        began = time.perf_counter()
        memory.reset_peak(device)
        yield
        seconds, most = took.get(part, (0, 0))
        took[part] = seconds + time.perf_counter() - began, max(most, memory.peak_memory(device))

    @contextlib.contextmanager
    def forgiving(job: Config) -> Iterator[None]:
        """In a batch a video that can't be made does not stop the rest."""
        try:
            yield
        except (common.UserError, TrajectoryError) as error:
            if not cfg.batch:
                raise
            failed.append(f"{job.out}: {error}")

    jobs = [replace(cfg, **row) for row in (read_jobs(Path(cfg.batch)) if cfg.batch else [{}])]
    left = [job for job in jobs if not Path(job.out).exists()][procs.rank :: procs.world] if cfg.batch else jobs
    with timed("read inputs"):
        files = find_networks(cfg)
        early = None if cfg.batch else read_inputs(cfg, size)  # before anything large is read
    with timed("encode prompt"):
        prompts = dict.fromkeys([*(job.prompt for job in (jobs if cfg.text else left)), ""])  # a file serves all
        text = embed_prompts(cfg, list(prompts), codec, procs.rank == 0)

    def encode(image: Tensor, trajectory: Trajectory) -> tuple[Tensor, Tensor, Trajectory]:
        with timed("encode image and boxes"):
            maps = trajectory.maps("box")[None]
            return codec.encode_video(image).to(device), codec.encode_video(maps).to(device), trajectory

    def ready(network: VideoDiT | Adapter) -> None:
        parallel.split_sequence(network, procs.group)
        for block in network.blocks if cfg.compile else ():
            block.forward = torch.compile(block.forward)
        heavy = isinstance(network, VideoDiT)
        memory.offload(network, device) if aside and heavy else network.to(device)

    encoded = early and encode(*early)  # before the networks take their memory
    with timed("read networks"):
        generator = VideoDiT.from_pretrained(files[0], f"{name}Generator", held)
        if generator.config != PRESETS[cfg.preset]:
            raise common.UserError(f"{files[0]}: is no network of preset {cfg.preset}")
        adapter = read_adapter(files[1], f"{name}Adapter", held)
        if not serves(adapter, generator):
            raise common.UserError(f"{files[1]}: was made for a generator of other shape than {files[0]}")
        ready(generator)
        ready(adapter)

    def denoise(job: Config, first: Tensor, traj: Tensor) -> Tensor:
        velocity = steer(generator, adapter, text[job.prompt].to(device), traj, frugal)
        sigmas, shape = flow.sigma_schedule(steps, sampling.shift), traj.shape[1:]
        if cfg.speed == "fast":
            noise = common.step_noise(steps, shape, [0], job.seed).to(device)
            return flow.sample_fewstep(velocity, first, noise, sigmas)
        noise = common.sample_noise(shape, [0], job.seed).to(device)
        plain = steer(generator, None, text[""].to(device))
        velocity = flow.guided(velocity, plain, cfg.guidance or sampling.guidance)
        return flow.sample_multistep(velocity, first, noise, sigmas)

    for number, job in enumerate(left):
        with forgiving(job):
            first, traj, trajectory = encoded or encode(*read_inputs(job, size))
            with timed("denoise"), torch.no_grad(), parallel.autocast(device, cfg.dtype):
                latents = denoise(job, first, traj)
            if procs.rank > 0 and not cfg.batch:
                return
            if not cfg.batch:
                del generator, adapter, denoise  # decoding needs the memory
                gc.collect()  # blocks whose forward pass is wrapped hold themselves
            with timed("decode"):
                video = np.concatenate([common.to_uint8(piece[0], cfg.scale) for piece in codec.pieces(latents)])
            with timed("write"):
                overlay = Path(job.out).with_suffix(".boxes.mp4")
                common.write_video(overlay, draw_overlay(video, trajectory), cfg.fps)
                common.write_video(job.out, video, cfg.fps)  # last: what stands is done
            print(
                f"{steps} steps on {device}: {job.out} and {overlay}"
                + (f" ({number + 1} of {len(left)})" if cfg.batch else "")
            )
    print("\n".join(f"{part}: {seconds:.2f} s, {most:.2f} GiB" for part, (seconds, most) in took.items()))
    if cfg.batch and (failed := procs.gather(failed)):
        raise common.UserError(
            f"{cfg.batch}: {len(failed)} of {len(jobs)} videos could not be made: {'; '.join(failed)}"
        )


if __name__ == "__main__":
    common.run_script(main, Config, TrajectoryError, presets={"wan5b": WAN5B})
