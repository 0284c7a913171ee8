"""Optimizers, learning rate and weight averages for the training scripts."""

import contextlib
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from core.parallel import full


def adamw(model: nn.Module, momentum: float = 0.0) -> Optimizer:
    """AdamW with the betas and the weight decay of Wan2.2-TI2V-5B-Turbo: no momentum, unless it is asked for."""
    return AdamW([p for p in model.parameters() if p.requires_grad], betas=(momentum, 0.999), weight_decay=0.01)


def learning_rate(step: int, peak: float, warmup: int, steps: int, schedule: str = "cosine") -> float:
    """Linear warm-up, then cosine to zero, or with schedule "constant" the peak."""
    if step < warmup:
        return peak * (step + 1) / warmup
    if schedule == "constant":
        return peak
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_lr(optimizers: Sequence[Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)


def clip_and_step(model: nn.Module, optimizers: Sequence[Optimizer], clip: float = 1.0) -> Tensor:
    """Clip the gradient's norm, take a step, clear the gradient. Returns the norm before clipping."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return full(norm)


class EMA:
    """Exponential moving average of a network's trainable parameters, in float32 and sharded like them."""

    def __init__(self, model: nn.Module, decay: float):
        self.model, self.decay = model, decay
        self.source = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().float().clone() for n, p in self.source.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """The decay warms up, so that a short run isn't dominated by its initial weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.average.items():
            average.lerp_(self.source[name].float(), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """In this context the network has the averaged weights."""
        saved = {n: p.detach().clone() for n, p in self.source.items()}
        try:  # not strict: buffers and frozen parameters stay. FSDP gathers anew after load_state_dict alone
            self.model.load_state_dict(self.average, strict=False)
            yield
        finally:
            self.model.load_state_dict(saved, strict=False)
