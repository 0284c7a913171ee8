"""Optimizers, learning rate and weight averages for the training scripts."""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from core.parallel import fast_bfloat16, full


class Muon(Optimizer):
    """Muon (Jordan et al. 2024): orthogonalised momentum, for matrices and convolution kernels [out, ...]."""

    # `torch.optim.Muon` iterates in bfloat16, which older CPUs emulate 60 times slower than float32, and it iterates
    # shard by shard, with hundreds of collectives per step. Here matrices of one shape iterate as one batch, as many as
    # are small. A sharded one is gathered once; its momentum stays sharded.
    most = 2**26  # numbers in a batch: 256 MiB

    def __init__(self, params: Iterable[nn.Parameter], weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        for group in self.param_groups:
            shapes = defaultdict(list)
            for p in group["params"]:
                if p.grad is not None:
                    shapes[p.shape].append(p)
            for params in batches(shapes.values(), self.most):
                updates = []
                for p in params:
                    if not self.state[p]:
                        self.state[p]["momentum"] = torch.zeros_like(p)
                    momentum = self.state[p]["momentum"]
                    momentum.lerp_(p.grad, 1 - group["momentum"])
                    updates.append(full(p.grad.lerp(momentum, group["momentum"])))  # Nesterov
                matrices = torch.stack(updates).flatten(2)
                scale = 0.2 * max(matrices.shape[1:]) ** 0.5  # AdamW's typical RMS, to share its rate
                for p, update in zip(params, orthogonal(matrices).view(-1, *params[0].shape), strict=True):
                    if hasattr(p, "full_tensor"):  # sharded
                        from torch.distributed.tensor import distribute_tensor  # two seconds, else not needed

                        update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                    p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def batches(groups: Iterable[list[nn.Parameter]], most: int) -> Iterator[list[nn.Parameter]]:
    """Parameters of one shape each, in parts of at most so many numbers, or of one parameter."""
    for params in groups:
        size = max(1, most // params[0].numel())
        yield from (params[i : i + size] for i in range(0, len(params), size))


def orthogonal(matrices: Tensor, steps: int = 5) -> Tensor:
    """Moves singular values close to 1 (0.7 to 1.2), keeps singular vectors: [n, rows, columns] -> the same shape."""
    x = matrices.to(torch.bfloat16 if fast_bfloat16(matrices.device) else torch.float32)
    if tall := x.shape[1] > x.shape[2]:
        x = x.mT
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


def make_optimizers(model: nn.Module, blocks: nn.Module, weight_decay: float, rest: float = 0.4) -> list[Optimizer]:
    """Muon for the matrices inside the blocks, AdamW at `rest` times its rate for embeddings, head, biases, norms."""
    layers = [m for m in blocks.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]
    inside = [layer.weight for layer in layers if layer.weight.requires_grad]
    outside = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in inside)]
    adamw = AdamW([{"params": outside, "lr_scale": rest}], betas=(0.9, 0.99), weight_decay=weight_decay)
    return [Muon(inside, weight_decay), adamw]


def adamw(model: nn.Module, weight_decay: float, momentum: float = 0.0) -> Optimizer:
    """AdamW. No momentum by default, as in adversarial and score-matching training; betas of Wan2.2-TI2V-5B-Turbo."""
    trained = [p for p in model.parameters() if p.requires_grad]
    return AdamW(trained, betas=(momentum, 0.999), weight_decay=weight_decay)


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


def clip_and_step(model: nn.Module, optimizers: Sequence[Optimizer], clip: float) -> Tensor:
    """Clip the gradient, take a step, clear the gradient. Returns the norm before clipping."""
    norm = nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], clip)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    return full(norm)


class EMA:
    """Exponential moving average of a network's trainable parameters, in float32, sharded as they are."""

    def __init__(self, model: nn.Module, decay: float):
        self.decay = decay
        self.source = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self.average = {n: p.detach().float().clone() for n, p in self.source.items()}
        self.buffers = dict(model.named_buffers())

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
        fill(self.source, self.average)
        try:
            yield
        finally:
            fill(self.source, saved)

    def weights(self, keep: bool = True) -> dict[str, Tensor]:
        """The averages as whole tensors in host memory, and the network's buffers; every rank must call.

        They are gathered one by one. A rank that doesn't `keep` them gets none.
        """
        whole = {}
        for name, average in self.average.items():
            gathered = full(average)
            if keep:
                whole[name] = gathered.cpu()
        return whole | self.buffers if keep else {}

    def state_dict(self) -> dict[str, Tensor]:
        return self.average

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        fill(self.average, state)


@torch.no_grad()
def fill(tensors: dict[str, Tensor], values: dict[str, Tensor]) -> None:
    """Copy the values into the tensors of the same names."""
    for name, tensor in tensors.items():
        tensor.copy_(values[name])
