"""The page behind `sample.py --serve`, tools/draw.html: videos that it asks for, and what they will take."""

import base64
import contextlib
import io
import json
import os
import shlex
import time
from collections.abc import Callable
from dataclasses import replace
from functools import cache, lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from core.codec import Codec
from core.config import ROOT, UserError, flags, require, warn
from core.media import MOST_VIDEO_SIDE, Size, complaint, start_ffmpeg
from core.memory import free_memory, seconds
from flow import FAST, Sampling
from model import PRESETS
from tools.server import serve

ASKED = {"prompt": str, "seed": int, "steps": int, "size": str, "frames": int}  # the options that the page sets
MOST_SLOW_STEPS = 200
# What the page exports a video to, and ffmpeg's options for that.
EXPORTS = {"gif": ("-vf", "split[a][b];[a]palettegen[p];[b][p]paletteuse", "video.gif"), "png": ("frame_%04d.png",)}


def serve_page(
    cfg, usual: dict[str, object], sampling: Sampling, codec: Codec, networks: tuple[nn.Module, nn.Module],
    read_condition: Callable, make_video: Callable, written_size: Callable[[Size, Size], Size],
) -> None:  # fmt: skip
    """Draw, generate and watch in a page of this machine, until Ctrl+C or SIGTERM.

    `cfg`: sample.py's options, and `usual` those of the preset; `networks` are generator and adapter. `read_condition`
    and `make_video` are sample.py's. `written_size(picture, size)`: in what size a video of this size is written.
    """
    pace = Pace(cfg, sampling, codec, next(networks[0].parameters()).device)
    # Reading the text encoder takes longer than most videos.
    text_encoder = cache(codec.text_encoder) if cfg.memory == "high" else codec.text_encoder

    @lru_cache(16)
    def embed(prompt: str) -> Tensor:
        for network in networks if cfg.memory == "low" else ():
            network.to("cpu")  # the text encoder takes their place
        return text_encoder()([prompt])

    def answer(request: dict, folder: Path, tell: Callable[..., None]) -> list[Path]:
        if request.get("export") in EXPORTS:
            return export(request["export"], request.get("video"), folder)
        began = {}

        def stage(name: str) -> contextlib.AbstractContextManager:
            began[name] = time.perf_counter()
            tell(says=name.capitalize())
            return contextlib.nullcontext()

        job = replace(cfg, **unpack(request, folder, sampling.steps, pace.most_steps))
        try:
            with contextlib.redirect_stderr(io.StringIO()) as said:
                condition = read_condition(job)
            size = condition.image.shape[-2:]
            shape = size, condition.full[0].shape[:2] if condition.full else size, job.frames
            pace.check_memory(*shape)
        except UserError as error:
            raise UserError(str(error).replace(f"{folder}{os.sep}", "")) from None
        for line in said.getvalue().replace(f"{folder}{os.sep}", "").splitlines():
            warn(line)
            tell(warns=line)
        with stage("encode prompt"):
            text, negative = embed(job.prompt), embed(codec.negative)
        for network in networks:
            network.to(pace.device)
        with_boxes = not request.get("live")
        make_video(job, condition, text, negative, stage, lambda share: tell(share=share), with_boxes=with_boxes)
        pace.learn(*shape, job.steps, began["decode"] - began["denoise"], time.perf_counter() - began["decode"])
        return [path for name in ("video.mp4", "video.boxes.mp4") if (path := folder / name).exists()]

    def about(asked: dict) -> dict:
        picture = asked.get("width"), asked.get("height")
        if not all(type(n) is int and 0 < n <= MOST_VIDEO_SIDE for n in picture):
            return facts
        size = codec.video_size(asked["size"], asked["frames"], picture[::-1])
        shape = size, written_size(picture[::-1], size), asked["frames"]
        return {"size": size, "written": shape[1], "seconds": pace.seconds(*shape, asked["steps"] or sampling.steps),
                "gigabytes": pace.check_memory(*shape) / 1e9}  # fmt: skip

    # The rest of the command is the page's. Its steps, if it gives any, come after these.
    pages = {*ASKED, "image", "traj", "out", "serve"} - {"steps"}
    others = {name: shlex.quote(str(v)) for name, v in vars(cfg).items() if v != usual[name] and name not in pages}
    facts = {"preset": cfg.preset, "size": cfg.size, "frames": cfg.frames, "fps": codec.fps, "steps": sampling.steps,
             "most_steps": pace.most_steps, "options": flags(others)}  # fmt: skip
    serve(ROOT / "tools/draw.html", about, answer=answer)


class Pace:
    """What videos take on this machine: a guess at first, then as the last one took."""

    def __init__(self, cfg, sampling: Sampling, codec: Codec, device: torch.device):
        self.codec, self.network, self.device = codec, PRESETS[cfg.preset], device
        self.passes = 2 if cfg.speed == "slow" and sampling.guidance != 1 else 1
        self.most_steps = max(sampling.steps, FAST[cfg.preset].steps if cfg.speed == "fast" else MOST_SLOW_STEPS)
        square = torch.ones(512, 512, device=device)
        self.speed = 512**3 / min(seconds(lambda: square @ square, device) for _ in range(3))  # half of the most
        self.rest = 2e-7  # seconds of decoding and writing, for each pixel

    def tokens(self, size: Size, frames: int) -> int:
        unit = self.codec.spatial * self.codec.patch
        return ((frames - 1) // self.codec.temporal + 1) * (size[0] // unit) * (size[1] // unit)

    def work(self, size: Size, frames: int, steps: int) -> float:
        """Multiplications and additions of the denoising."""
        tokens, net = self.tokens(size, frames), self.network
        dense, attention = 16 * net.dim**2 + 4 * net.dim * net.ffn_dim, 4 * net.dim * tokens
        return steps * self.passes * net.layers * tokens * (dense + attention)

    def seconds(self, size: Size, written: Size, frames: int, steps: int) -> float:
        return self.work(size, frames, steps) / self.speed + self.rest * frames * written[0] * written[1]

    def learn(self, size: Size, written: Size, frames: int, steps: int, denoised: float, rest: float) -> None:
        self.speed, self.rest = self.work(size, frames, steps) / denoised, rest / (frames * written[0] * written[1])

    def check_memory(self, size: Size, written: Size, frames: int) -> float:
        """Bytes of memory beside those of the networks. UserError if fewer are free."""
        values = self.tokens(size, frames) * self.network.dim * (20 + self.network.layers)
        need = 5e7 + 4 * values + frames * (40 * size[0] * size[1] + 9 * written[0] * written[1])
        free = free_memory(self.device)
        problem = f"takes about {need / 1e9:.1f} GB, {free / 1e9:.1f} GB are free"
        require(need <= free, f"--frames {frames}: {problem}; give fewer frames or a smaller size")
        return need


def export(kind: str, video: object, folder: Path) -> list[Path]:
    """The page's mp4 as one GIF, or as a PNG of each frame."""
    store(folder, "video.mp4", video)
    *options, name = EXPORTS[kind]
    job = start_ffmpeg("-nostdin", "-v", "error", "-i", folder / "video.mp4", *options, folder / name)
    said = job.communicate()[1]
    if job.returncode:
        raise UserError(f"video: {complaint(folder / 'video.mp4', job.returncode, said)}; make it again")
    return sorted(folder.glob(f"*.{kind}"))


def store(folder: Path, name: str, text: object) -> str:
    """A file of the request, under our name, which is returned."""
    try:
        (folder / name).write_bytes(base64.b64decode(text, validate=True))
    except (TypeError, ValueError):
        raise UserError(f"{name}: is not in base64; reload the page") from None
    return name


def unpack(request: dict, folder: Path, steps: int, most_steps: int) -> dict[str, object]:
    """The page's request as options; its files go to this folder, under our names. `steps`: where it asks for 0."""
    for name, kind in ASKED.items():
        if type(request.get(name)) is not kind:
            raise UserError(f"{name}: {request.get(name)!r:.60} is no {kind.__name__}; reload the page")
    if request["steps"] > most_steps:
        raise UserError(f"steps: {request['steps']:.5g} are more than the {most_steps} of these networks; give fewer")
    boxes, masks = request.get("boxes"), request.get("masks")
    try:
        for k, (item, mask) in enumerate(zip(boxes["objects"], masks, strict=True)):
            item.pop("mask", None)  # a path of theirs
            if mask:
                item["mask"] = store(folder, f"mask_{k}.png", mask)
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError("boxes: not a boxes.json with a mask, or none, for each object; reload the page") from None
    (folder / "boxes.json").write_text(json.dumps(boxes), encoding="utf-8")
    names = {"image": store(folder, "image", request.get("image")), "traj": "boxes.json", "out": "video.mp4"}
    options = {name: str(folder / file) for name, file in names.items()} | {name: request[name] for name in ASKED}
    return options | {"steps": request["steps"] or steps}
