"""Muon (Jordan et al. 2024), with which the small preset learns in few steps: orthogonalised momentum.

`torch.optim.Muon` takes matrices alone, and the adapter's blocks are convolutions. It iterates in bfloat16, which older
CPUs emulate 60 times slower than float32, and shard by shard, with hundreds of collectives per step. Here matrices of
one shape iterate as one batch; a sharded one is gathered once, and its momentum stays sharded.
"""

from collections import defaultdict
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from core.parallel import fast_bfloat16, full


class Muon(Optimizer):
    """For matrices and convolution kernels [out, ...]."""

    def __init__(self, params: Iterable[nn.Parameter], weight_decay: float, momentum: float = 0.95):
        super().__init__(params, {"lr": 0.0, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:
        (group,), shapes = self.param_groups, defaultdict(list)
        for p in (p for p in group["params"] if p.grad is not None):
            if not self.state[p]:
                self.state[p]["momentum"] = torch.zeros_like(p)
            momentum = self.state[p]["momentum"].lerp_(p.grad, 1 - group["momentum"])
            shapes[p.shape].append((p, full(p.grad.lerp(momentum, group["momentum"]))))  # Nesterov
        for pairs in shapes.values():
            updates = torch.stack([update for _, update in pairs])
            scale = 0.2 * max(updates.flatten(2).shape[1:]) ** 0.5  # AdamW's typical RMS, to share its rate
            for (p, _), update in zip(pairs, orthogonal(updates.flatten(2)).view_as(updates), strict=True):
                if hasattr(p, "full_tensor"):  # sharded
                    from torch.distributed.tensor import distribute_tensor  # two seconds, else not needed

                    update = distribute_tensor(update, p.device_mesh, p.placements, src_data_rank=None)
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


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


def muon_and_adamw(model: nn.Module, part: nn.Module, weight_decay: float = 0.01, rest: float = 0.4) -> list[Optimizer]:
    """Muon for the matrices in this part of the model, its blocks, and AdamW at `rest` times its rate for all else."""
    layers = [m for m in part.modules() if isinstance(m, nn.Linear | nn.Conv2d | nn.Conv3d)]
    inside = [layer.weight for layer in layers if layer.weight.requires_grad]
    outside = [p for p in model.parameters() if p.requires_grad and not any(p is q for q in inside)]
    adamw = AdamW([{"params": outside, "lr_scale": rest}], betas=(0.9, 0.99), weight_decay=weight_decay)
    return [Muon(inside, weight_decay), adamw]
