"""Make a video from one image, a prompt and boxes drawn over time.

    python sample.py                                                       # the shipped example
    python sample.py --image x.png --traj boxes.json                       # any picture, a photograph too
    python sample.py --speed slow
    python sample.py --batch jobs.csv                                      # a table of videos
    python sample.py --serve                                               # draw, generate and watch in a page
    python sample.py --preset wan5b --weights Wan2.2-TI2V-5B --image x.png --traj boxes.json --prompt "a cat jumps"

Writes `--out` and, beside it, the same video with the boxes drawn over it. Fast: FastGenerator + FastAdapter in 4
steps, each of which predicts the clean video and adds noise again. Slow: SlowGenerator + SlowAdapter in 50 Euler steps.
An image of another shape than the video's is resized until it covers it and cut to its middle, and the boxes with it.
Small videos are written as large as the image, with its own detail wherever they show what it shows: toy/detail.py.
`--serve` serves tools/draw.html on 127.0.0.1, with the networks kept loaded: core/serve.py.
For preset wan5b, `--weights` is Wan2.2-TI2V-5B as published, with the networks of this project in it.
"""

import gc
import math
import os
import re
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache, lru_cache, partial
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

import flow
from adapter import Adapter, check_fit, read_adapter, read_maps
from core import memory, parallel
from core.attention import gpu_kernels
from core.codec import Codec
from core.config import ROOT, UserError, flags, reason, run_script, shipped
from core.files import keep_inputs, output_path
from core.media import BROKEN, MOST_PICTURE, MOST_VIDEO, fit_frames, pictures, read_picture, to_uint8, write_video
from core.noise import sample_noise, step_noise
from core.serve import ASKED, serve, unpack
from core.tables import read_table
from core.weights import split_key
from data import open_codec
from model import PRESETS, VideoDiT, check_preset, frozen_dtype
from toy.detail import add_detail, enlarge, full_size
from trajectory import Maps, Trajectory, draw_overlay, load_trajectory
from wan.codec import NEGATIVE_PROMPT
from wan.lora import merge
from wan.umt5 import read_text, save_text

SAMPLING = {"fast": flow.FAST, "slow": flow.SLOW}


@dataclass(frozen=True)
class Config:
    image: str = shipped("examples/balloons.jpg")  # the first frame
    traj: str = shipped("examples/balloons.json")  # boxes.json, a map video, or a folder of PNG maps
    prompt: str = ""  # what the video shows
    batch: str = ""  # CSV file of many videos, with columns image, traj, prompt and perhaps out and seed
    text: str = ""  # file of the prompt's embeddings: read if it exists, else written; spares the text encoder
    out: str = "out/sample.mp4"  # the video; <out>.boxes.mp4 is written beside it
    preset: Literal["small", "wan5b"] = "small"  # size of the networks
    weights: str = shipped("checkpoints/small")  # folder of <speed>_generator.safetensors and its adapter
    generator: str = ""  # another file or folder of the generator; file.pt:key for one network of several
    lora: str = ""  # a LoRA to merge into the generator: FILE or FILE:strength
    adapter: str = ""  # another file of the adapter
    speed: Literal["fast", "slow"] = "fast"  # which networks, and their sampler
    steps: int = 0  # denoising steps; 0 is the sampler's own number: 4 fast, 50 slow
    guidance: float = 0.0  # slow only: strength of the prompt; 1 is none, at half the work; 0 is the preset's own
    negative: str = ""  # slow only: what the video shall not show, guidance's other branch
    trajectory_guidance: float = 1.0  # slow only: strength of the trajectory; any but 1 costs a forward pass more
    shift: float = 60.0  # warp of noise levels towards noise, where today's networks know most; 0: the sampler's own
    seed: int = 0  # another seed, another video
    size: str = "auto"  # height x width of the video, or auto: the image's own shape
    frames: int = 9  # length of the video
    fps: int = 8  # frames a second
    detail: bool = True  # put the picture's own detail back: the video is as large as the picture, up to 1280 pixels
    memory: Literal["high", "low"] = "high"  # for a GPU of 24 GB, or of 12: 8 bits, decoding in tiles; see docs/WAN.md
    decoder: str = ""  # preset wan5b: file of the small decoder taew2_2, fast and a little softer, instead of the VAE's
    dtype: Literal["auto", "bfloat16", "float32"] = "auto"  # of the forward pass; auto is the faster one
    compile: bool = torch.cuda.is_available()  # torch.compile each block: takes a minute, then is faster; on for GPUs
    serve: bool = False  # draw, generate and watch in a page on 127.0.0.1 instead
    port: int = 7860  # of that page; 0 is any that is free


WAN5B = replace(
    Config(),
    preset="wan5b",
    weights="Wan2.2-TI2V-5B",
    steps=0,  # (4 fast: paper; 50 slow: Wan)
    guidance=0.0,  # (5: Wan)
    negative=NEGATIVE_PROMPT,  # (Wan)
    trajectory_guidance=1.0,  # (guess)
    shift=0.0,  # (5: Wan, Turbo)
    size="auto",  # (Wan)
    frames=121,  # (Wan)
    fps=24,  # (Wan)
    detail=False,
)
# Columns of a --batch table -> options: this project's own names, and those of MagicMotion's tables.
COLUMNS = {name: name for name in ("image", "traj", "prompt", "out", "seed")} | {
    "validation_images": "image", "validation_trajectory_maps": "traj", "validation_prompt": "prompt",
    "output_path": "out", "controlnet_weights": "",
}  # fmt: skip
PATHS = ("image", "traj", "out")  # relative to the table
# What else lies in folders of weights.
NO_GENERATOR = r"(?i)slow_|diffusion_pytorch_model|.*(adapter|classifier|vae|tae|lora|umt5|t5)"


def load_image(path: str) -> np.ndarray:
    """The image, uint8 [height, width, 3]. UserError if it can't be used."""
    if not Path(path).is_file():
        raise UserError(f"{path}: no such image; give a PNG or JPEG with --image")
    try:
        if (count := pictures(path)) > 1:
            print(f"{path}: holds {count} pictures; the first is taken", file=sys.stderr)
        return read_picture(path)
    except BROKEN as error:
        mend = f"give a PNG or JPEG of at most {MOST_PICTURE // 10**6} million pixels"
        raise UserError(f"{path}: not a readable image ({reason(error)}); {mend}") from None


def check(cfg: Config) -> None:
    """UserError if an option can't be."""
    if cfg.steps < 0:
        raise UserError(f"--steps {cfg.steps}: at least 1, or 0 for the sampler's own number")
    for name, none in (("guidance", (0, 1)), ("trajectory_guidance", (1,))):
        if cfg.speed == "fast" and (given := getattr(cfg, name)) not in none:
            raise UserError(f"--{name} {given}: the fast networks have none; add --speed slow")
    if cfg.shift < 0:
        raise UserError(f"--shift {cfg.shift}: greater than 0, or 0 for the sampler's own")
    if cfg.fps < 1:
        raise UserError(f"--fps {cfg.fps}: at least 1")
    if cfg.detail and cfg.preset == "wan5b":
        raise UserError("--detail true: preset wan5b makes large videos as it is; leave it out")
    if cfg.serve and (cfg.batch or cfg.text or "RANK" in os.environ):
        raise UserError("--serve: goes without --batch, --text and torchrun; leave them out")
    if cfg.text and not Path(cfg.text).exists():
        output_path(cfg.text, ".safetensors", "text")
    if cfg.decoder and cfg.preset != "wan5b":
        raise UserError(f"--decoder {cfg.decoder}: preset {cfg.preset} has one of its own; leave it out")


def find_networks(cfg: Config) -> tuple[str, Path]:
    """Where generator and adapter lie: as the flags say, else the first of their usual places in `--weights`.

    UserError if one is not there, or if it can't be told which of several files is the generator.
    """
    folder, adapter = Path(cfg.weights), Path(cfg.adapter or Path(cfg.weights) / f"{cfg.speed}_adapter.safetensors")
    own = folder / f"{cfg.speed}_generator.safetensors"
    if cfg.speed == "fast":  # a distilled generator under any of the names that others give it
        others = [folder / name for name in ("generator.pt", "model.pt", "model.safetensors")]
        single = [file for file in sorted(folder.glob("*.safetensors")) if not re.match(NO_GENERATOR, file.name)]
        if len(single) > 1 and not cfg.generator and not any(place.exists() for place in (own, *others)):
            names = ", ".join(file.name for file in single)
            raise UserError(f"{folder}: which is the generator, of {names}? give --generator")
        others += single
    else:
        others = [folder / "transformer", folder / "config.json", *sorted(folder.glob("diffusion_pytorch_model*"))]
    found = next((place for place in (own, *others) if place.exists()), own)
    if found.name == "config.json" or found.name.startswith("diffusion_pytorch_model"):
        found = folder
    generator, mend = cfg.generator or str(found), "correct --weights, or give --generator and --adapter"
    for path in (split_key(generator)[0], adapter):
        if not path.exists():
            raise UserError(f"{path}: no such file; {mend}")
    if adapter.is_dir():
        raise UserError(f"--adapter {adapter}: is a folder; give the file in it")
    return generator, adapter


def read_jobs(path: Path) -> list[dict]:
    """The rows of a --batch table as options. UserError if the table as a whole can't be used.

    `out` is by default the table's name and the row's number; the column `controlnet_weights` is passed over. What is
    wrong in a single row is for whoever takes it up: a seed that is no number stays text, a missing image "".
    """
    names, rows = read_table(path)
    known = ", ".join(COLUMNS)
    if unknown := [name for name in names if name not in COLUMNS]:
        raise UserError(f"{path}: column {unknown[0]!r} is unknown; the known ones are {known}")
    if lacking := sorted({"image", "traj", "prompt"} - {COLUMNS[name] for name in names}):
        raise UserError(f"{path}: no column {lacking[0]}; the first line names the columns, of {known}")
    jobs = []
    for number, row in enumerate(rows):
        values = {}
        for name, text in row.items():
            option = COLUMNS[name]
            if values.get(option) and text.strip():
                raise UserError(f"{path}: row {number + 1}: two columns say its {option}; empty one of them")
            if option:
                values[option] = values.get(option) or text.strip()
        values["out"] = values.get("out") or f"{path.stem}_{number:05d}.mp4"
        if not values.get("seed"):
            values.pop("seed", None)
        elif re.fullmatch(r"\d+(\.0*)?", values["seed"]):  # 3.0: as a table has it whose column has gaps
            values["seed"] = int(values["seed"].split(".")[0])
        jobs.append(values | {name: os.path.normpath(path.parent / values[name]) for name in PATHS if values[name]})
    written = [path for job in jobs for path in (job["out"], str(overlay_path(job["out"])))]
    if len(set(written)) < len(written):
        raise UserError(f"{path}: two rows write the same file; give each another in the column out")
    if lost := sorted({job.get(name) for job in jobs for name in ("image", "traj")} & set(written)):
        raise UserError(f"{path}: {lost[0]} is read by one row and written by another; change the column out")
    return jobs


def overlay_path(out: str) -> Path:
    """Where the video with its boxes goes."""
    return Path(out).with_suffix(".boxes.mp4")


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


class Inputs(NamedTuple):
    """What one video is made of."""

    image: Tensor  # its first frame [1,3,1,height,width] in [-1, 1]
    trajectory: Trajectory
    full: tuple[np.ndarray, Trajectory] | None  # both at the size that is written, uint8 [H,W,3], if detail is put back


def read_inputs(job: Config, codec: Codec) -> Inputs:
    """What a video is made of, or the reason why it can't be made."""
    if not isinstance(job.seed, int) or job.seed < 0:
        raise UserError(f"--seed {job.seed}: a whole number, 0 at least")
    for name in ("image", "traj"):
        if not getattr(job, name):
            raise UserError(f"--{name}: empty; name a file")
    for written in (output_path(job.out, ".mp4"), output_path(str(overlay_path(job.out)), ".mp4")):
        keep_inputs(written, "out", image=job.image, traj=job.traj)
    pixels = load_image(job.image)
    size = codec.check_size(job.size, job.frames, pixels.shape[:2])
    image = fit_frames(pixels[None], size)[None] / 127.5 - 1
    trajectory = load_trajectory(job.traj, size, job.frames, pixels.shape[:2])
    if not job.detail:
        return Inputs(image, trajectory, None)
    picture = full_size(pixels, size)
    if (total := math.prod(picture.shape[:2]) * job.frames) > MOST_VIDEO:
        raise UserError(f"--frames {job.frames}: {total} pixels; {MOST_VIDEO} is the most; add --detail false")
    return Inputs(image, trajectory, (picture, enlarge(trajectory, job.traj, picture.shape[:2])))


def load(cfg: Config, files: tuple[str, Path], procs: parallel.Processes) -> tuple[VideoDiT, Adapter]:
    """Generator and adapter, ready to work. UserError if they don't fit the preset or one another."""
    name, dtype = cfg.speed.title(), torch.int8 if cfg.memory == "low" else frozen_dtype(cfg.preset, cfg.dtype)
    edit = partial(merge, text=cfg.lora) if cfg.lora else None
    generator = VideoDiT.from_pretrained(files[0], f"{name}Generator", dtype, edit=edit)
    check_preset(generator, files[0], cfg.preset)
    adapter = read_adapter(files[1], f"{name}Adapter", dtype)
    check_fit(adapter, files[1], generator, files[0])
    for network in (generator, adapter):
        network.split = procs.split
        for block in network.blocks if cfg.compile else ():
            block.forward = torch.compile(block.forward)
        network.to(procs.device)
    return generator, adapter


def encode(codec: Codec, inputs: Inputs, maps: Maps, device: torch.device) -> tuple[Tensor, Tensor]:
    """Latents of the first frame [1,C,1,H,W] and of the trajectory's maps [1,C,F,H,W]. `maps`: how they are painted."""
    painted = inputs.trajectory.maps("box", inputs.image[0, :, 0] if maps == "pixels" else None)[None]
    return codec.encode_video(inputs.image).to(device), codec.encode_video(painted).to(device)


@torch.no_grad()
def denoise(
    cfg: Config, generator: VideoDiT, adapter: Adapter, first: Tensor, traj: Tensor, text: Tensor, negative: Tensor
) -> Tensor:
    """Sample the latents [1,C,F,H,W] of a video. Both branches of guidance get the trajectory, as in MagicMotion."""
    residuals = None
    if adapter.static and cfg.preset == "small":
        with parallel.autocast(first.device, cfg.dtype):
            residuals = adapter(traj)  # once for all steps: it sees the trajectory alone

    def told(x: Tensor, t: Tensor, text: Tensor) -> Tensor:
        # Else at every step, each when its block asks for it: at wan5b's full size 5 GB less, for 0.2% of the work.
        return generator(x, t, text, residuals or adapter.residuals(traj, x, t, text))

    sampling = SAMPLING[cfg.speed][cfg.preset]
    steps = cfg.steps or sampling.steps
    sigmas, shape = flow.sigma_schedule(steps, cfg.shift or sampling.shift), traj.shape[1:]
    velocity = partial(told, text=text)
    with parallel.autocast(first.device, cfg.dtype), gpu_kernels(first.device):
        if cfg.speed == "fast":
            noise = step_noise(steps, shape, [0], cfg.seed).to(first.device)
            return flow.sample_fewstep(velocity, first, noise, sigmas)
        noise = sample_noise(shape, [0], cfg.seed).to(first.device)
        negated, untold = partial(told, text=negative), partial(generator, text=text)
        scales = cfg.guidance or sampling.guidance, cfg.trajectory_guidance
        velocity = flow.guided(velocity, negated, scales[0], untold, scales[1])
        return flow.sample_multistep(velocity, first, noise, sigmas)


def decode(codec: Codec, latents: Tensor, procs: parallel.Processes) -> np.ndarray:
    """Latents [1,C,F,H,W] -> uint8 [T, height, width, 3]. Processes may take pieces of it in turn."""
    own = [(turn, procs.rank, to_uint8(piece[0])) for turn, piece in enumerate(codec.pieces(latents, procs))]
    return np.concatenate([frames for *_, frames in sorted(procs.gather(own), key=lambda piece: piece[:2])])


def write(out: str, video: np.ndarray, inputs: Inputs, fps: int) -> Path:
    """The video, and beside it, under the name that is returned, the same with its boxes."""
    overlay, trajectory = overlay_path(out), inputs.trajectory
    if inputs.full:
        picture, trajectory = inputs.full
        video = add_detail(video, picture, trajectory)
    write_video(overlay, draw_overlay(video, trajectory), fps)
    write_video(out, video, fps)  # last: what stands is done
    return overlay


def answer(
    request: dict, folder: Path, tell: Callable[..., None], *, cfg: Config, codec: Codec,
    networks: tuple[VideoDiT, Adapter], embed: Callable[[str], Tensor], procs: parallel.Processes,
) -> list[Path]:  # fmt: skip
    """One video for the page, which is told of every step and can leave between any two."""
    job = replace(cfg, **unpack(request, folder))
    check(job)
    try:
        inputs = read_inputs(job, codec)
    except UserError as error:
        raise UserError(str(error).replace(f"{folder}{os.sep}", "")) from None
    tell(says="Reading the prompt")
    text = [embed(prompt).to(procs.device) for prompt in (job.prompt, cfg.negative)]
    encoded, levels = encode(codec, inputs, networks[1].config.maps, procs.device), []

    def watch(_, given: tuple) -> None:  # guidance calls the network more than once at a noise level
        level = given[1].max().item()
        if level not in levels:
            levels.append(level)
            tell(step=len(levels), of=job.steps or SAMPLING[cfg.speed][cfg.preset].steps)

    hook = networks[0].register_forward_pre_hook(watch)
    try:
        latents = denoise(job, *networks, *encoded, *text)
    finally:
        hook.remove()
    if not latents.isfinite().all():
        raise UserError("the networks give values that are no numbers; give other weights, or --dtype float32")
    tell(says="Decoding")
    return [Path(job.out), write(job.out, decode(codec, latents, procs), inputs, cfg.fps)]


def serve_page(cfg: Config, codec: Codec, procs: parallel.Processes) -> None:
    """tools/draw.html, with these networks behind its button."""
    networks = load(cfg, find_networks(cfg), procs)
    if cfg.memory == "high":
        codec.text_encoder = cache(codec.text_encoder)  # reading it would take longer than most videos

    @lru_cache(16)
    def embed(prompt: str) -> Tensor:
        for network in networks if cfg.memory == "low" else ():
            network.to("cpu")  # the text encoder gets their place, and gives it back
        text = embed_prompts(cfg, [prompt], codec, False)[prompt]
        for network in networks:
            network.to(procs.device)
        return text

    usual = vars(WAN5B if cfg.preset == "wan5b" else Config())
    of_the_page = (*ASKED, "image", "traj", "out", "serve", "port")
    others = {name: value for name, value in vars(cfg).items() if value != usual[name] and name not in of_the_page}
    about = {name: getattr(cfg, name) for name in ("preset", "size", "frames", "fps")}
    about["steps"] = cfg.steps or SAMPLING[cfg.speed][cfg.preset].steps
    about["options"] = flags({name: shlex.quote(str(value)) for name, value in others.items()})
    make = partial(answer, cfg=cfg, codec=codec, networks=networks, embed=embed, procs=procs)
    serve(ROOT / "tools/draw.html", about, make, cfg.port)


def main(cfg: Config) -> None:
    check(cfg)
    sequence = 1 if cfg.batch else 0  # a video for each process, or one for all
    procs = parallel.init_processes(sequence, PRESETS[cfg.preset].heads)
    device, team = procs.device, replace(procs, rank=0, world=1, mesh=None) if cfg.batch else procs  # who share a video
    if cfg.compile:
        parallel.start_compiler(device)
    codec = open_codec(
        cfg.preset, cfg.weights, device, dtype=frozen_dtype(cfg.preset, cfg.dtype), low=cfg.memory == "low",
        decoder=cfg.decoder,
    )  # fmt: skip
    codec.check_size(cfg.size, cfg.frames)
    if cfg.serve:
        return serve_page(cfg, codec, procs)
    clock, failed = memory.Clock(device), []
    jobs = [replace(cfg, **row) for row in (read_jobs(Path(cfg.batch)) if cfg.batch else [{}])]
    left = jobs
    if cfg.batch:  # rank 0 looks for all: another might look when the first new ones stand already
        stand = set(procs.gather([job.out for job in jobs if procs.rank == 0 and os.path.exists(job.out)]))
        if procs.rank == 0 and stand:
            says = f"{len(stand)} of {len(jobs)} videos stand already, and are not made again"
            print(f"{says}; to make one anew, delete it")
        left = [job for job in jobs if job.out not in stand][procs.rank :: procs.world]
    with clock("read inputs"):
        files = find_networks(cfg)
        maps = read_maps(files[1], f"{cfg.speed.title()}Adapter")
        early = None if cfg.batch else read_inputs(cfg, codec)  # before anything large is read
    if cfg.preset == "wan5b" and procs.rank == 0 and (blank := sum(not job.prompt.strip() for job in jobs)):
        where = f" in {blank} of {len(jobs)} rows" if cfg.batch else ""
        print(f"--prompt is empty{where}: say what the video shows, or it will be poor", file=sys.stderr)
    with clock("encode prompt"):
        asked = [job.prompt for job in (jobs if cfg.text else left)]  # a file serves all
        prompts = dict.fromkeys([*asked, cfg.negative])
        text = embed_prompts(cfg, list(prompts), codec, procs.rank == 0)
    encoded = None
    if early:
        with clock("encode image and boxes"):
            encoded = encode(codec, early, maps, device)  # before the networks take their memory
    with clock("read networks"):
        networks = load(cfg, files, procs)

    for number, job in enumerate(left):
        try:
            inputs = early or read_inputs(job, codec)
            if cfg.batch:
                with clock("encode image and boxes"):
                    encoded = encode(codec, inputs, maps, device)
            with clock("denoise"):
                latents = denoise(job, *networks, *encoded, text[job.prompt].to(device), text[cfg.negative].to(device))
            if not cfg.batch:
                del networks  # decoding needs the memory
                gc.collect()  # blocks whose forward pass is wrapped hold themselves
            if not latents.isfinite().all():
                raise UserError("the networks give values that are no numbers; give other weights, or --dtype float32")
            with clock("decode"):
                video = decode(codec, latents, team)
            if team.rank > 0:
                return
            with clock("write"):
                overlay = write(job.out, video, inputs, cfg.fps)
        except Exception as error:  # whatever it is: a video that can't be made does not stop the rest
            if not cfg.batch:
                raise
            failed.append(f"{job.out}: {reason(error)}")
            continue
        steps = cfg.steps or SAMPLING[cfg.speed][cfg.preset].steps
        progress = f" ({number + 1} of {len(left)})" if cfg.batch else ""
        print(f"{steps} steps on {device}: {job.out} and {overlay}{progress}")
    print(clock)
    if cfg.batch and (failed := procs.gather(failed)):
        raise UserError(f"{cfg.batch}: {len(failed)} of {len(jobs)} videos could not be made: {'; '.join(failed)}")


if __name__ == "__main__":
    run_script(main, Config, {"wan5b": WAN5B})
