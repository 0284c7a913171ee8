"""UniPC of order 2 (Zhao et al. 2023, B(h) = e^h - 1), Wan's own slow sampler."""

import math
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

import flow

BEGIN = 0.999  # where its noise levels begin (Wan): at 1 the log of signal to noise has no value


@torch.no_grad()
def sample_unipc(velocity: flow.Velocity, first: Tensor, noise: Tensor, steps: int, shift: float) -> Tensor:
    """As `flow.sample_multistep`, by UniPC, over noise levels of its own.

    Two predictions of x0 make each step; the prediction where it ends makes it once more. Timesteps are whole numbers.
    """
    x, begin = torch.cat([first, noise[:, :, 1:]], dim=2).float(), None
    seen, levels = [], []  # the last two predictions, and their noise levels
    for sigma, following in pairwise(flow.sigma_schedule(steps, shift, BEGIN)):
        level = flow.frame_sigma(x.new_full((x.shape[0],), sigma), x.shape[2])
        x0 = flow.velocity_to_x0(x, velocity(x, flow.timestep(level).floor()).float(), level)
        begin = x = unipc_step(begin, seen, [*levels, sigma], x0) if seen else x
        seen, levels = [*seen[-1:], x0], [*levels[-1:], sigma]
        x = unipc_step(x, seen, [*levels, following]) if following else x0
        x[:, :, :1] = first
    return x


def unipc_step(x: Tensor, seen: Sequence[Tensor], levels: Sequence[float], end: Tensor | None = None) -> Tensor:
    """x at the last but one of `levels` -> at the last. seen: x0 predicted at all but the last, `end` at that too."""
    ages = [math.log((1 - sigma) / sigma) for sigma in levels]  # half the log of the signal-to-noise ratio
    h, x0 = ages[-1] - ages[-2], seen[-1]
    phi, change = math.expm1(-h), 0.0 if end is None else (end - x0) / 2
    if len(seen) > 1:
        rate = (ages[-3] - ages[-2]) / h
        slope = (seen[-2] - x0) / rate
        change = slope / 2
        if end is not None:  # exact for polynomials of degree 2
            total, moment = -1 / h - 1 / phi, (2 * (1 + phi / h) / h - 1) / phi
            share = (total - moment) / (1 - rate)
            change = share * slope + (total - share) * (end - x0)
    return levels[-1] / levels[-2] * x - (1 - levels[-1]) * phi * (x0 + change)
