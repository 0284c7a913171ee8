"""Rectified-flow maths, pure functions: the noise path, the loss, guidance and the samplers.

The project's conventions: `sigma` in [0, 1] is the noise level, and the model receives the timestep `t = 1000 * sigma`.
On the straight path from data to noise

    x_t = (1 - sigma) * x0 + sigma * noise            (1)
    v   = d x_t / d sigma = noise - x0                (2)
    x0  = x_t - sigma * v                             (3)

and the model predicts v. Latents are [B, C, F, H, W]. Noise levels are per latent frame, [B, F], because image-to-video
keeps frame 0 clean: its sigma is 0, and (1) then leaves it untouched without any special case.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor


class Sampling(NamedTuple):
    """How many steps, over noise levels warped by how much, and the strength of guidance."""

    steps: int
    shift: float
    guidance: float = 1.0


# By preset: wan5b's are Wan's, and its four steps the paper's. Small networks know most near pure noise: docs/LOG.md.
SLOW = {"small": Sampling(50, 60.0), "wan5b": Sampling(50, 5.0, 5.0)}
FAST = {"small": Sampling(4, 60.0), "wan5b": Sampling(4, 5.0)}

Velocity = Callable[[Tensor, Tensor], Tensor]  # (x_t [B,C,F,H,W], t [B,F]) -> v [B,C,F,H,W]


def shift_sigma(u: Tensor | float, shift: float) -> Tensor | float:
    """Warp uniform noise levels towards noise: `s*u / (1 + (s-1)*u)`. Large latents need a large shift (Wan2.2: 5)."""
    return shift * u / (1 + (shift - 1) * u)


def frame_sigma(sigma: Tensor, frames: int) -> Tensor:
    """Noise level of every latent frame in image-to-video: [B] -> [B, F], frame 0 clean."""
    return sigma[:, None] * (torch.arange(frames, device=sigma.device) > 0)


def timestep(sigma: Tensor) -> Tensor:
    """The model's time input, `1000 * sigma`."""
    return 1000 * sigma


def _wide(sigma: Tensor) -> Tensor:
    return sigma[:, None, :, None, None]  # [B, F] -> [B, 1, F, 1, 1], to broadcast over channels and pixels


def add_noise(x0: Tensor, noise: Tensor, sigma: Tensor) -> Tensor:
    """Equation (1). x0, noise [B,C,F,H,W], sigma [B,F]."""
    return (1 - _wide(sigma)) * x0 + _wide(sigma) * noise


def velocity_to_x0(x_t: Tensor, v: Tensor, sigma: Tensor) -> Tensor:
    """Equation (3). Where sigma is 0 this returns x_t itself, so a clean first frame stays what it was."""
    return x_t - _wide(sigma) * v


def flow_matching_loss(
    velocity: Velocity, x0: Tensor, noise: Tensor, sigma: Tensor, on: str = "velocity", weight: Tensor | None = None,
    by_video: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """`|| v(x_t, t) - (noise - x0) ||^2`, averaged over every frame but the given first one.

    x0, noise [B,C,F,H,W]; sigma [B]. `on` "x0": the error of the clean video that v gives, sigma times the velocity's.
    `weight` [B,1 or C,F,H,W]: how much each value counts, relative to the mean of its video. `by_video` [B]: its own.
    """
    level = frame_sigma(sigma, x0.shape[2])  # (B, F)
    error = velocity(add_noise(x0, noise, level), timestep(level)).float() - (noise - x0)
    if on == "x0":
        error = _wide(level) * error
    error = error[:, :, 1:].square()
    if weight is not None:
        weight = weight[:, :, 1:]
        error = error * (weight / weight.mean((1, 2, 3, 4), keepdim=True))
    return error.mean() if by_video is None else (error.mean((1, 2, 3, 4)) * by_video).mean()


def sigma_schedule(steps: int, shift: float, begin: float = 1.0) -> list[float]:
    """`steps + 1` noise levels to 0, uniform before the shift; from 1, 4 steps are t = 1000, 750, 500, 250 warped."""
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return [shift_sigma(begin * (1 - i / steps), shift) for i in range(steps + 1)]


def guided(conditional: Velocity, unconditional: Velocity, scale: float) -> Velocity:
    """Classifier-free guidance, `uncond + scale * (cond - uncond)`. A scale of 1 never evaluates `unconditional`."""
    if scale == 1:
        return conditional

    def velocity(x: Tensor, t: Tensor) -> Tensor:
        cond, uncond = conditional(x, t), unconditional(x, t)
        return uncond + scale * (cond - uncond)

    return velocity


@torch.no_grad()
def sample_multistep(velocity: Velocity, first: Tensor, noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Integrate (2) from noise to data with Euler steps: the slow sampler.

    first [B,C,1,H,W] is the clean first-frame latent, noise [B,C,F,H,W]; returns x0 [B,C,F,H,W] in float32.
    """
    x = torch.cat([first, noise[:, :, 1:]], dim=2).float()
    for sigma, following in pairwise(sigmas):
        level = frame_sigma(x.new_full((x.shape[0],), sigma), x.shape[2])  # (B, F)
        x[:, :, 1:] += (following - sigma) * velocity(x, timestep(level))[:, :, 1:].float()
    return x


def backward_simulation(velocity: Velocity, first: Tensor, noise: Tensor, sigmas: Sequence[float], last: int) -> Tensor:
    """The few-step sampler from its start to step `last`, whose prediction of x0 is returned and alone has a gradient.

    first [B,C,1,H,W]; noise [steps,B,C,F,H,W], fresh for every step; returns x0 [B,C,F,H,W] in float32. In training
    the generator thus sees what it will see in use, its own earlier predictions (DMD2, section 4.5).
    """
    x0 = first.float().expand_as(noise[0])  # at noise level 1 nothing of it shows but frame 0
    for step in range(last + 1):
        level = frame_sigma(x0.new_full((x0.shape[0],), sigmas[step]), x0.shape[2])
        x = add_noise(x0, noise[step].float(), level)
        with torch.set_grad_enabled(torch.is_grad_enabled() and step == last):
            x0 = velocity_to_x0(x, velocity(x, timestep(level)).float(), level)  # frame 0 has sigma 0: unchanged
    return x0


@torch.no_grad()
def sample_fewstep(velocity: Velocity, first: Tensor, noise: Tensor, sigmas: Sequence[float]) -> Tensor:
    """Predict x0, noise it again to the next level, repeat: the sampler of distilled generators (DMD, consistency).

    `sigmas` as `sigma_schedule` makes them, 0 at the end. Shapes as in `backward_simulation`.
    """
    return backward_simulation(velocity, first, noise, sigmas, len(sigmas) - 2)
