"""What training reads of the toy world: its videos, captions and trajectories, through the toy codec."""

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from core.codec import Batch, drop_caption
from core.config import require
from core.noise import random_blackout
from toy.codec import ToyCodec
from toy.world import World
from trajectory import Maps

FOUND = 0.75  # share of things told by a box alone that are shown cut out, as toy/segment.py does in use


class ToyLatents:
    """Seed and sample numbers fix everything: each seed, 0 to 255, has 2^32 videos of the split to itself.

    `maps`: how trajectories are painted, if any are asked for. `shape`: size and frames. `device` renders all.
    """

    def __init__(
        self, codec: ToyCodec, maps: Maps | None = None, split: str = "train", seed: int = 0,
        device: torch.device | str = "cpu", **shape,
    ):  # fmt: skip
        require(0 <= seed < 256, f"--seed {seed}: use 0 to 255")
        self.codec, self.maps, self.offset, self.device = codec, maps, seed << 32, device
        self.world = World(split, **shape)

    def batch(self, samples: list[int], kind: str | None = None, sparse: float = 0, drop_text: float = 0) -> Batch:
        """x0 [B,C,F,H,W], text [B,L,Dt], traj [B,C,F,H,W] (None if `kind` is None, else "mask" or "box" maps).

        A share `sparse` of the trajectories is blacked out in a random subset of frames; a share `drop_text` of the
        captions is dropped, to train the other branch of guidance.
        """
        samples = [self.offset + s for s in samples]
        with torch.device(self.device):  # where all new tensors go
            batch = self.world.batch(samples)
        chance = [np.random.default_rng([self.world.first, s, 1]).random(2 + self.world.frames) for s in samples]
        each = zip(chance, batch.captions, strict=True)
        captions = [drop_caption(drop_text, u[0], caption, "", self.codec.negative) for u, caption in each]
        x0, text = self.codec.encode_video(batch.video), self.codec.encode_text(captions)
        if kind is None:
            return Batch(x0, text, None)
        if self.maps is None:
            raise ValueError("maps are asked for, and nothing says how they are painted")
        alone = [np.random.default_rng([self.world.first, s, 2]).random(batch.by_box.shape[1]) > FOUND for s in samples]
        batch = replace(batch, by_box=batch.by_box & torch.from_numpy(np.stack(alone)).to(batch.by_box.device))
        black = torch.from_numpy(np.stack([random_blackout(u[1:], sparse) for u in chance]))  # [B, T]
        maps = batch.maps(self.maps, kind).masked_fill(black[:, None, :, None, None].to(batch.video.device), -1)
        return Batch(x0, text, self.codec.encode_video(maps))

    def unconditional(self) -> Tensor:
        """Embeddings [1, L, text_dim] of the empty prompt, which guidance moves away from."""
        return self.codec.encode_text([self.codec.negative])
