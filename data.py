"""What training reads: latents, text and trajectory maps, of the toy world or of clips from tools.prepare_clips.

A source's `batch(samples, kind="box")` is a Batch (core/codec.py), and follows from sample numbers and a seed alone.
"""

from collections import defaultdict
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

import flow
from core.codec import Batch, Codec, drop_caption
from core.config import UserError, require
from core.memory import send
from core.noise import rng, sample_uniform, step_noise
from core.record import checksum
from core.weights import read_config, read_folder
from toy.codec import ToyCodec
from toy.latents import ToyLatents
from trajectory import Maps

HELD_OUT = 4  # clips
EXIT_STEP = 2  # the random stream that draws the step at which backward simulation ends


class ClipLatents:
    """Prepared clips, read as ToyLatents reads the toy world.

    Every epoch has an order of its own, in which all `batch` samples of a step share one shape. The first four clips of
    the most frequent shape are held out, as the split "validation".
    """

    def __init__(self, folder: Path | str, text_tokens: int, split: str = "train", seed: int = 0, batch: int = 1):
        self.folder, self.text_tokens, self.seed, self.step_size = Path(folder), text_tokens, seed, batch
        record = self.folder / "config.json"
        if not record.exists() or "shards" not in (made_of := read_config(record)):
            raise UserError(f"{folder}: holds no finished shards; run python -m tools.prepare_clips")
        self.maps, self.codec, shards = made_of["maps"], made_of["codec"], made_of["shards"]
        found = {f.name: checksum(f) for kind in ("latents", "text") for f in self.folder.glob(f"{kind}-*.safetensors")}
        if other := sorted(name for name in shards | found if shards.get(name) != found.get(name)):
            mend = "run python -m tools.prepare_clips again, or prepare clips anew"
            raise UserError(f"{self.folder / other[0]}: isn't the file that was prepared with the others here; {mend}")
        self.latents = read_folder(self.folder, "latents")
        shapes = defaultdict(list)
        for number in sorted({int(name.split(".")[0]) for name in self.latents}):
            shapes[self.latents[f"{number}.video"].shape].append(number)
        most = max(shapes.values(), key=len, default=())
        few = f"no shape has over {HELD_OUT} clips, of which {HELD_OUT} are held out; prepare more clips"
        require(len(most) > HELD_OUT, f"{folder}: {few}")
        self.texts = read_folder(self.folder, "text")
        held = [most.pop(0) for _ in range(HELD_OUT)]
        self.channels = next(iter(shapes))[0]
        self.shapes = tuple(map(tuple, shapes.values() if split == "train" else [held]))

    def batch(self, samples: list[int], kind: str | None = None, sparse: float = 0, drop_text: float = 0) -> Batch:
        """As ToyLatents.batch. `sparse` is ignored: tools.prepare_clips has chosen clips with frames without boxes."""
        clips = [self.pick(sample) for sample in samples]
        u = [np.random.default_rng([self.seed, sample, 1]).random() for sample in samples]
        names = [drop_caption(drop_text, *each, "empty", "negative") for each in zip(u, map(str, clips), strict=True)]
        text = torch.stack([self.text(name) for name in names])
        if kind and (absent := [n for n in clips if f"{n}.{kind}" not in self.latents]):
            mend = "pass --mask_steps 0" if kind == "mask" else "prepare it anew"
            raise UserError(f"{self.folder}: clip {absent[0]} has no {kind} maps; {mend}")
        x0, *maps = ([self.latents[f"{n}.{part}"].read().float() for n in clips] for part in ("video", kind) if part)
        return Batch(torch.stack(x0), text, torch.stack(maps[0]) if maps else None)

    def text(self, name: str) -> Tensor:
        """Embeddings [L, text_dim] of a clip's caption, or of the "empty" or "negative" prompt."""
        text = self.texts[name].read().float()
        return F.pad(text, (0, 0, 0, self.text_tokens - len(text)))

    def unconditional(self) -> Tensor:
        """Embeddings [1, L, text_dim] of guidance's negative prompt."""
        return self.text("negative")[None]

    def pick(self, sample: int) -> int:
        """The clip's number, for a sample's."""
        step, place = divmod(sample, self.step_size)
        steps = sum(-(-len(clips) // self.step_size) for clips in self.shapes)
        return epoch_steps(self.shapes, self.step_size, self.seed, step // steps)[step % steps][place]


Source = ToyLatents | ClipLatents


@lru_cache(maxsize=4)
def epoch_steps(shapes: tuple[tuple[int, ...], ...], size: int, seed: int, epoch: int) -> list[list[int]]:
    """The `size` clips of each of an epoch's steps. If a shape's clips don't fill its last, its first ones repeat."""
    steps = []
    for shape, clips in enumerate(shapes):
        order = np.random.default_rng([seed, epoch, shape]).permutation(clips).tolist()
        order += order * (size // len(order) + 1)
        steps += [order[i : i + size] for i in range(0, len(clips), size)]
    return [steps[i] for i in np.random.default_rng([seed, epoch]).permutation(len(steps))]


class Draw(NamedTuple):
    """What a loss of stage 2 or 3 reads: videos, noise and the FastGenerator's schedule."""

    batch: Batch  # true videos
    sigmas: list[float]  # the generator's noise levels
    exit_step: int  # the step at which its sampling ends
    noise: Tensor  # of its sampling [steps,B,C,F,H,W]
    renoise: Tensor  # added to true and generated videos before they are judged [B,C,F,H,W]
    sigma: Tensor  # at this noise level [B]


def make_draw(
    samples: list[int], turn: int, cfg, data: Source, device: torch.device, kind: str | None = None, sparse: float = 0,
    exit_step: Literal["last", "random"] = "random",
) -> Draw:  # fmt: skip
    """`turn`: the number of the update. `cfg`: the options of stage 2 or 3. `kind` and `sparse`: as in `batch`."""
    batch = data.batch(samples, kind, sparse).to(device)
    steps, shift, _ = flow.FAST[cfg.preset]
    noise = send(step_noise(steps + 1, batch.x0.shape[1:], samples, cfg.seed, turn), device)
    u = send(sample_uniform(samples, cfg.batch, cfg.seed, turn), device)
    sigma = (cfg.judge_sigma_max * flow.shift_sigma(u, shift)).clamp(0.02, 0.98)
    drawn = int(torch.randint(steps, (), generator=rng(cfg.seed, turn, EXIT_STEP)))  # the same on every rank
    last = steps - 1 if exit_step == "last" else drawn
    return Draw(batch, flow.sigma_schedule(steps, shift), last, noise[:-1], noise[-1], sigma)


def open_codec(preset: str, folder: Path | str, device: torch.device, **options) -> Codec:
    """The preset's codec; `folder`, of Wan2.2-TI2V-5B, and `options` are WanCodec's."""
    if preset == "small":
        return ToyCodec()
    from wan.codec import WanCodec  # with the VAE and the text encoder, which preset small needs not

    return WanCodec(folder, device, **options)


def training_data(folder: str, codec: Codec, seed: int, batch: int, maps: Maps | None = None) -> tuple[Source, Source]:
    """The training set and the held-out one: clips from `folder`, or the toy world. `maps`: those an adapter reads."""
    if folder:
        both = tuple(ClipLatents(folder, codec.text_tokens, split, seed, batch) for split in ("train", "validation"))
        if both[0].channels != codec.channels:
            raise UserError(f"{folder}: was prepared with another preset; pass it with --preset, or prepare clips anew")
        encoder = codec.files()[:1]  # makes the latents
        if any(checksum(file) != both[0].codec.get(file.name) for file in encoder):
            raise UserError(f"{folder}: was prepared with another {encoder[0].name}; bring that back, or prepare anew")
        if maps and both[0].maps != maps:
            mend = f"prepare the clips anew with --maps {maps}, or give an adapter that reads {both[0].maps}"
            raise UserError(f"{folder}: holds {both[0].maps} maps, and the adapter reads {maps}; {mend}")
        return both
    if not isinstance(codec, ToyCodec):
        raise UserError("--data: missing; preset wan5b trains on clips that python -m tools.prepare_clips has encoded")
    return tuple(ToyLatents(codec, maps, split, seed, **codec.learned_on) for split in ("train", "validation"))
