"""What training reads: batches of latents, text and trajectory maps, of the toy world or of prepared clips.

`training_data` gives two sources, one to train on and one held out. Both have one method,

    x0, text, traj = source.batch(samples, kind="box")     # a Batch: core/codec.py

whose result depends on the sample numbers and a seed alone. `python -m tools.prepare_clips` prepares clips.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from core.codec import Batch, Codec
from core.config import UserError
from core.weights import Stored, read_config, read_safetensors
from toy.codec import ToyCodec
from toy.latents import ToyLatents
from trajectory import Maps
from wan.codec import WanCodec


class ClipLatents:
    """Prepared clips, read as ToyLatents reads the toy world.

    Every epoch has an order of its own. If the clips have several shapes, all `batch` samples of a step share one. The
    first four clips of the most frequent shape are held out, as the split "validation".
    """

    held_out = 4

    def __init__(self, folder: Path | str, text_tokens: int, split: str = "train", seed: int = 0, batch: int = 1):
        self.folder, self.text_tokens, self.seed, self.step_size = Path(folder), text_tokens, seed, batch
        if not (self.folder / "rejected.csv").exists():
            raise UserError(f"{folder}: holds no finished shards; run python -m tools.prepare_clips")
        self.maps: Maps = read_config(self.folder / "config.json").get("maps", "outline")  # older folders do not say
        self.latents: dict[str, Stored] = {}
        self.texts: dict[str, Stored] = {}
        for kind, tensors in (("latents", self.latents), ("text", self.texts)):
            for file in sorted(self.folder.glob(f"{kind}-*.safetensors")):
                tensors |= read_safetensors(file)[1]
        numbers = sorted({int(name.split(".")[0]) for name in self.latents})
        if len(numbers) <= self.held_out:
            raise UserError(f"{folder}: holds {len(numbers)} clips; training needs over {self.held_out}")
        self.channels = self.latents[f"{numbers[0]}.video"].shape[0]
        shapes: dict[tuple[int, ...], list[int]] = {}
        for number in numbers:
            shapes.setdefault(self.latents[f"{number}.video"].shape, []).append(number)
        held = max(shapes.values(), key=len)[: self.held_out]
        if len(held) < self.held_out:
            raise UserError(f"{folder}: no shape has {self.held_out} clips, which are held out; prepare more clips")
        if lacking := [number for number in numbers if str(number) not in self.texts]:
            raise UserError(f"{folder}: clip {lacking[0]} has no caption; run python -m tools.prepare_clips again")
        if split == "validation":
            shapes = {(): held}
        self.shapes = [
            left for clips in shapes.values() if (left := [n for n in clips if n not in held or split == "validation"])
        ]
        self.one_shape = len(self.shapes) == 1

    def batch(self, samples: list[int], kind: str | None = None, sparse: float = 0, drop_text: float = 0) -> Batch:
        """x0 [B,C,F,H,W], text [B,L,Dt], traj [B,C,F,H,W] (None if `kind` is None, else "mask" or "box" maps).

        `sparse` is ignored: tools.prepare_clips has chosen the clips that have frames without boxes.
        """
        picked = [self.pick(sample) for sample in samples]
        chance = [np.random.default_rng([self.seed, sample, 1]).random() for sample in samples]
        names = ["empty" if u < drop_text else str(n) for n, u in zip(picked, chance, strict=True)]
        texts = [self.texts[name].read().float() for name in names]
        text = torch.stack([F.pad(t, (0, 0, 0, self.text_tokens - len(t))) for t in texts])
        x0 = torch.stack([self.latents[f"{n}.video"].read().float() for n in picked])
        if kind is None:
            return Batch(x0, text, None)
        if absent := [n for n in picked if f"{n}.{kind}" not in self.latents]:
            mend = "pass --mask_steps 0" if kind == "mask" else "prepare it anew"
            raise UserError(f"{self.folder}: clip {absent[0]} has no {kind} maps; {mend}")
        return Batch(x0, text, torch.stack([self.latents[f"{n}.{kind}"].read().float() for n in picked]))

    def unconditional(self) -> Tensor:
        """Embeddings [1, L, text_dim] of guidance's negative prompt."""
        if "negative" not in self.texts:
            raise UserError(f"{self.folder}: holds no negative prompt; prepare the clips anew")
        text = self.texts["negative"].read().float()
        return F.pad(text, (0, 0, 0, self.text_tokens - len(text)))[None]

    def pick(self, sample: int) -> int:
        """The clip's number, for a sample's."""
        if self.one_shape:
            epoch, place = divmod(sample, len(self.shapes[0]))
            return self.shapes[0][shuffled(len(self.shapes[0]), self.seed, epoch)[place]]
        step, place = divmod(sample, self.step_size)
        steps = sum(-(-len(clips) // self.step_size) for clips in self.shapes)
        return self.epoch(step // steps)[step % steps][place]

    def epoch(self, number: int) -> list[list[int]]:
        """The clips of every step of an epoch. If a shape's clips don't fill its last step, its first ones repeat."""
        batches = []
        for shape, clips in enumerate(self.shapes):
            order = [clips[i] for i in shuffled(len(clips), self.seed, number, shape)]
            order += order * (self.step_size // len(order) + 1)
            batches += [order[i : i + self.step_size] for i in range(0, len(clips), self.step_size)]
        return [batches[i] for i in shuffled(len(batches), self.seed, number)]


Source = ToyLatents | ClipLatents


@lru_cache(maxsize=16)
def shuffled(number: int, *key: int) -> np.ndarray:
    """0 to number - 1 in an order that the key fixes."""
    return np.random.default_rng(key).permutation(number)


def open_codec(preset: str, folder: Path | str, device: torch.device, **options) -> Codec:
    """The preset's codec; `folder`, of Wan2.2-TI2V-5B, and `options` are WanCodec's."""
    return WanCodec(folder, device, **options) if preset == "wan5b" else ToyCodec()


def training_data(folder: str, codec: Codec, seed: int, batch: int, maps: Maps | None = None) -> tuple[Source, Source]:
    """The training set and the held-out one: prepared clips from `folder`, or the toy world if that is empty.

    `maps`: the style of maps that the adapter reads; None if no maps are read.
    """
    if folder:
        both = tuple(ClipLatents(folder, codec.text_tokens, split, seed, batch) for split in ("train", "validation"))
        if both[0].channels != codec.channels:
            raise UserError(f"{folder}: was prepared with another preset; pass it with --preset, or prepare clips anew")
        if maps and both[0].maps != maps:
            mend = f"prepare the clips anew with --maps {maps}, or give an adapter that reads {both[0].maps}"
            raise UserError(f"{folder}: holds {both[0].maps} maps, and the adapter reads {maps}; {mend}")
        return both
    if not isinstance(codec, ToyCodec):
        raise UserError("--data: missing; preset wan5b trains on clips that python -m tools.prepare_clips has encoded")
    return tuple(ToyLatents(codec, maps, split, seed, **codec.learned_on) for split in ("train", "validation"))
