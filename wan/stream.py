"""What the VAE's layers remember of a video between its chunks, in one process or in many that take them in turn."""

import torch.distributed as dist
from einops import rearrange
from torch import Tensor, nn

from core.parallel import Processes


class Stream(dict[nn.Module, Tensor | None]):
    """What layers remember of a video between its chunks: layer -> its last input frames. Empty when a video starts."""

    def turn(self, chunk: int, chunks: int, seen: int) -> bool:
        """Called before each chunk, after `seen` latent frames: whether this process decodes it."""
        return True

    def before(self, layer: nn.Module, x: Tensor, frames: int) -> Tensor | None:
        """The frames that came before the chunk x [B,C,T,H,W]; None at the start of the video."""
        return self.get(layer)

    def wait(self) -> None:
        """Wait until everything sent has arrived."""


class Relay(Stream):
    """The stream of processes that take chunks in turn: what a layer remembers goes to the next process at once.

    That process starts on its own chunk, a layer behind, before this one is done. The pixels are those of one process.
    """

    def __init__(self, procs: Processes):
        super().__init__()
        self.rank, self.world, self.sending, self.seen, self.last = procs.rank, procs.world, [], 0, False
        # The last process sends to the first over a second connection: with two processes and a single one, that would
        # queue behind what comes back.
        self.groups = dist.new_group(), dist.new_group()

    def turn(self, chunk: int, chunks: int, seen: int) -> bool:
        if chunk % self.world != self.rank:
            return False
        self.wait()  # for the last turn's sends
        self.seen, self.last = seen, chunk == chunks - 1
        return True

    def __contains__(self, layer: object) -> bool:
        return self.seen > 0

    def before(self, layer: nn.Module, x: Tensor, frames: int) -> Tensor | None:
        if self.seen <= layer.skips:
            return None
        received = x.new_empty(x.shape[0], frames, *x.shape[3:], x.shape[1])
        dist.recv(received, (self.rank - 1) % self.world, self.groups[self.rank == 0])
        return rearrange(received, "b t h w c -> b c t h w")

    def __setitem__(self, layer: nn.Module, frames: Tensor | None) -> None:
        if frames is None or self.last:
            return
        to, group = (self.rank + 1) % self.world, self.groups[self.rank == self.world - 1]
        sent = rearrange(frames, "b c t h w -> b t h w c").contiguous()
        self.sending.append((dist.isend(sent, to, group), sent))

    def wait(self) -> None:
        while self.sending:
            self.sending.pop()[0].wait()
