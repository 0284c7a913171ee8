"""What the VAE's layers remember of a video between its chunks, in one process or in many that take them in turn."""

from collections.abc import Iterator, Sequence

import torch
import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from core.parallel import Processes


class Stream:
    """The last frames that each layer has seen. Processes hand them on: to the one that has the next chunk, at once.

    That process starts on its own chunk, a layer behind, before this one is done. The pixels are those of one process.
    """

    def __init__(self, procs: Processes | None = None):
        self.rank, self.world = (procs.rank, procs.world) if procs else (0, 1)
        self.frames: dict[nn.Module, Tensor] = {}
        self.kernels: dict[nn.Module, Tensor] = {}  # what layers compute of their weights, once a video
        self.sending: list[tuple[dist.Work, Tensor]] = []
        # The last process sends to the first over a second connection: with two processes and a single one, that would
        # queue behind what comes back.
        self.groups = [dist.new_group() for _ in range(2)] if self.world > 1 else []

    def chunks(self, parts: Sequence[Tensor]) -> Iterator[Tensor]:
        """This process's chunks of a video."""
        for number in range(self.rank, len(parts), self.world):
            self.first, self.last = number == 0, number == len(parts) - 1  # before the first nothing is remembered
            yield parts[number]
            while self.sending:
                self.sending.pop()[0].wait()

    def take(self, layer: nn.Module, x: Tensor, count: int) -> Tensor:
        """The `count` frames that came before the layer's input x [B,C,T,H,W]."""
        if self.world == 1:
            frames = self.frames.pop(layer)
        else:
            frames = x.new_empty(x.shape[0], count, *x.shape[3:], x.shape[1])
            dist.recv(frames, (self.rank - 1) % self.world, self.groups[self.rank == 0])
        return rearrange(frames, "b t h w c -> b c t h w")

    def keep(self, layer: nn.Module, frames: Tensor) -> None:
        """Remember a layer's last frames [B,C,T,H,W] for the next chunk."""
        frames = rearrange(frames, "b c t h w -> b t h w c").clone(memory_format=torch.contiguous_format)
        if self.world == 1:
            self.frames[layer] = frames
        elif not self.last:
            to, group = (self.rank + 1) % self.world, self.groups[self.rank == self.world - 1]
            self.sending.append((dist.isend(frames, to, group), frames))
