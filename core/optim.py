"""Optimizers, learning rate and weight averages of the training scripts."""

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor, distribute_tensor

from core.parallel import full


class Muon(torch.optim.Optimizer):
    """Momentum whose update is made orthogonal by Newton-Schulz iterations (Jordan et al. 2024).

    For matrices, and for the kernels of convolutions, whose rows are output channels.

    `torch.optim.Muon` iterates in bfloat16, which a CPU without such instructions emulates 60 times slower than
    float32, and shard by shard, with hundreds of collectives a step. Here matrices of one shape iterate as one batch,
    and a sharded one is gathered once; its momentum stays sharded.
    """

    def __init__(self, params: Iterable[nn.Parameter], weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes: dict[torch.Size, list[nn.Parameter]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    shapes.setdefault(p.shape, []).append(p)
            for params in shapes.values():
                updates = []
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(full(p.grad.lerp(momentum, group["momentum"])))  # Nesterov's
                matrices = torch.stack(updates).flatten(2)
                scale = 0.2 * max(matrices.shape[1:]) ** 0.5  # the usual size of an AdamW update: both share a rate
                for p, update in zip(params, orthogonal(matrices).view(-1, *params[0].shape), strict=True):
                    if isinstance(p, DTensor):
                        update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Singular values moved close to 1 (0.7 to 1.2), singular vectors kept: [n, rows, columns] -> the same shape."""
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizers(
    model: nn.Module, blocks: nn.Module, weight_decay: float, rest: float = 0.4
) -> list[torch.optim.Optimizer]:
    """Muon for the matrices inside the blocks, AdamW at `rest` of its rate for all else (embeddings, head, biases)."""
    layers = [m for m in blocks.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]
    inside = [layer.weight for layer in layers if layer.weight.requires_grad]
    outside = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in inside)]
    adamw = torch.optim.AdamW([{"params": outside, "lr_scale": rest}], betas=(0.9, 0.99), weight_decay=weight_decay)
    return [Muon(inside, weight_decay), adamw]


def adamw(model: nn.Module, weight_decay: float, momentum: float = 0.0) -> torch.optim.Optimizer:
    """AdamW, by default without momentum, as adversarial and score-matching games are played (betas as in
    Wan2.2-TI2V-5B-Turbo).
    """
    params = [p for p in model.parameters() if p.requires_grad]
    return torch.optim.AdamW(params, betas=(momentum, 0.999), weight_decay=weight_decay)


def learning_rate(step: int, peak: float, warmup: int, steps: int) -> float:
    """Linear warm-up, then cosine to zero."""
    if step < warmup:
        return peak * (step + 1) / warmup
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def set_lr(optimizers: Sequence[torch.optim.Optimizer], lr: float) -> None:
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = lr * group.get("lr_scale", 1)


def clip_and_step(model: nn.Module, optimizers: Sequence[torch.optim.Optimizer], clip: float) -> Tensor:
    """Clip the gradient, step, clear the gradient. Returns the norm before clipping."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return full(norm)


class EMA:
    """Exponential moving average of a network's trainable parameters, in float32, sharded as they are."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.average = {n: p.detach().float().clone() for n, p in model.named_parameters() if p.requires_grad}
        self.source = {n: p for n, p in model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def update(self, step: int) -> None:
        """The decay warms up, so that a short run isn't dominated by its initial weights."""
        decay = min(self.decay, (1 + step) / (10 + step))
        for name, average in self.average.items():
            average.lerp_(self.source[name].float(), 1 - decay)

    @contextlib.contextmanager
    def applied(self) -> Iterator[None]:
        """Inside this context the network holds the averages."""
        saved = {n: p.detach().clone() for n, p in self.source.items()}
        self._fill(self.average)
        try:
            yield
        finally:
            self._fill(saved)

    def weights(self) -> dict[str, Tensor]:
        """The averages as whole tensors; every rank must call."""
        return {name: full(average) for name, average in self.average.items()}

    @torch.no_grad()
    def _fill(self, values: dict[str, Tensor]) -> None:
        for name, parameter in self.source.items():
            parameter.copy_(values[name])

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        for name, average in self.average.items():
            average.copy_(state[name])
