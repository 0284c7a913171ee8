"""Stateless random numbers: a key of integers gives the same numbers on any device, rank and resumed run.

A key is a seed, a step, perhaps a sample, and a stream. Streams separate draws that share the rest; scripts name
theirs. Zeros at a key's end don't count: (3,) and (3, 0) are the same.
"""

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

LEVEL = 1  # the stream of uniform numbers, such as noise levels


def rng(*key: int) -> torch.Generator:
    """A CPU generator for this key."""
    seed = np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def sample_noise(shape: Sequence[int], samples: Sequence[int], *key: int) -> Tensor:
    """Gaussian noise [len(samples), *shape]; a row depends on its sample number, not on the rank that draws it."""
    return torch.stack([torch.randn(*shape, generator=rng(*key, sample)) for sample in samples])


def step_noise(steps: int, shape: Sequence[int], samples: Sequence[int], *key: int) -> Tensor:
    """Fresh noise for each step of a sampler: [steps, len(samples), *shape], seeded as in `sample_noise`."""
    return sample_noise((steps, *shape), samples, *key).transpose(0, 1)


def sample_uniform(samples: Sequence[int], batch: int, *key: int) -> Tensor:
    """One number in [0, 1) per sample, stratified: the i-th in a batch of n falls in [i/n, (i+1)/n)."""
    u = torch.cat([sample % batch + torch.rand(1, generator=rng(*key, sample, LEVEL)) for sample in samples]) / batch
    return u.clamp(max=1 - 2**-24)  # in float32 the sum can round up to `batch`


def random_blackout(u: np.ndarray, share: float) -> np.ndarray:
    """Which frames are blacked out, [T] bool: with probability `share` some, but not frame 0. u [1 + T] in [0, 1)."""
    black = (u[0] < share) & (u[1:] <= u[0] / (share or 1))  # u[0] / share is uniform again: how many frames
    black[0] = False
    return black
