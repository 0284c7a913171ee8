"""Softmax attention: PyTorch's own, and two ways that are faster on a CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend

# Products of queries and keys computed at once on a CPU: parts of a second, after which the page can cancel a job.
LONG = 2**24
AMX = bool(torch.cpu.get_capabilities().get("amx_bf16"))
# For `sdpa_kernel` on GPUs, likely the fastest first; every GPU has the last. On a CPU they change nothing.
BACKENDS = [SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention. q [B, heads, N, head_dim]; k, v [B, heads, L, head_dim] -> [B, heads, N, head_dim]."""
    cpu, scale = q.device.type == "cpu", q.shape[-1] ** -0.5
    # On a CPU fused attention's backward pass is slow: on small grids the plain formula is three times as fast.
    if cpu and q.requires_grad and q.shape[2] * k.shape[2] <= 1024**2:
        return (q * scale @ k.transpose(-1, -2)).float().softmax(-1).to(v.dtype) @ v
    # On a CPU without AMX fused attention in bfloat16 has 40% of the speed of matrix products. Compiled, in chunks of a
    # few hundred queries whose weights fit into the cache, it has 70%. With AMX the fused one is twice as fast.
    if cpu and not AMX and q.dtype == torch.bfloat16 and not q.requires_grad and torch.compiler.is_compiling():
        k, v, outputs = k.contiguous(), v.contiguous(), []
        for chunk in q.split(max(256, q.shape[2] // 16), dim=2):
            scores = chunk @ k.transpose(-1, -2)
            weights = ((scores.float() - scores.amax(-1, keepdim=True).float()) * scale).exp()
            outputs.append((weights.to(v.dtype) @ v).float() / weights.sum(-1, keepdim=True))
        return torch.cat(outputs, dim=2).to(v.dtype)
    if cpu and not q.requires_grad and q.shape[2] * k.shape[2] > LONG:
        rows = max(1, LONG // k.shape[2])
        return torch.cat([F.scaled_dot_product_attention(part, k, v) for part in q.split(rows, dim=2)], dim=2)
    return F.scaled_dot_product_attention(q, k, v)
