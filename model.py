"""VideoDiT: the diffusion transformer of Wan2.2-TI2V, with its parameter names, in plain PyTorch.

One class serves all presets: `wan5b` is Wan2.2-TI2V-5B, and `small` runs on a laptop. A video latent is cut
into patches, each a token; text enters by cross-attention; the noise level enters as a shift, scale and gate of every
layer, one row per latent frame, because image-to-video gives frame 0 another timestep than the rest. Shapes: B batch, C
latent channels, F latent frames, H W latent size, N = F*h*w tokens, D width, L text tokens.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from core.attention import attend
from core.config import UserError, require
from core.parallel import TokenSplit
from core.weights import Stored, load, read_network, read_safetensors, split_key
from wan.published import read_generator


@dataclass(frozen=True)
class DiTConfig:
    """Everything that fixes a VideoDiT's parameter shapes and meaning."""

    dim: int
    ffn_dim: int
    heads: int
    layers: int
    text_dim: int
    text_tokens: int
    channels: int = 48  # of the latent, in and out
    patch: tuple[int, int, int] = (1, 2, 2)  # frames, height, width of a token
    freq_dim: int = 256  # sinusoidal features of the timestep
    sees_first: bool = False  # every frame has frame 0 beside it, as more channels (Wan2.1 image-to-video does so)
    predicts: Literal["velocity", "x0"] = "velocity"  # what the head gives; `forward` returns the velocity of either
    float32_stream: bool = False  # the tokens between blocks are float32 in training too, not in sampling alone
    eps: float = 1e-6


PRESETS = {
    "small": DiTConfig(256, 768, 4, 6, text_dim=64, text_tokens=32, channels=24, sees_first=True, predicts="x0"),
    # Wan trains so: a bfloat16 token of size 4 can't feel an adapter's first 0.01. Costs 5 GB a network with gradient.
    "wan5b": DiTConfig(3072, 14336, 24, 30, text_dim=4096, text_tokens=512, float32_stream=True),
}
FAINT = 0.8  # what the small preset adds to its maps is mostly mistakes up to here, and a tenth of it counts
LEAST_SIGMA = 0.05  # below it the velocity of a predicted x0 is no longer magnified
OTHER_FILE = "give the --preset that it was trained with, or another file"
FROZEN_DTYPE = {"small": torch.float32, "wan5b": torch.bfloat16}


def frozen_dtype(preset: str, dtype: str) -> torch.dtype:
    """dtype of frozen networks' weights: the preset's, or float32 if the option `--dtype` is."""
    return torch.float32 if dtype == "float32" else FROZEN_DTYPE[preset]


@lru_cache(maxsize=8)
def rotary_table(frames: int, height: int, width: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosine and sine of 3D rotary position embedding, theta 10000, float32, [N, head_dim / 2] each."""
    per_axis = (head_dim // 2 - 2 * (head_dim // 6), head_dim // 6, head_dim // 6)  # of 64 pairs 22, 21, 21, as in Wan
    places = torch.cartesian_prod(*(torch.arange(n, dtype=torch.float64) for n in (frames, height, width)))  # (N, 3)
    rates = (10000.0 ** -(torch.arange(pairs, dtype=torch.float64) / pairs) for pairs in per_axis)
    angle = torch.cat([place.outer(rate) for place, rate in zip(places.T, rates, strict=True)], 1)  # (N, head_dim / 2)
    return angle.cos().float().to(device), angle.sin().float().to(device)


class Rope(NamedTuple):
    """Rotary tables of this process's tokens, and how processes share the tokens in attention."""

    cos: Tensor  # [N, head_dim / 2]
    sin: Tensor
    split: TokenSplit
    not_padding: Tensor | None  # TokenSplit.not_padding


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary embedding of neighbouring pairs. x [B, N, heads, head_dim], cos and sin [N, head_dim / 2]."""
    (even, odd), cos, sin = x.float().unflatten(-1, (-1, 2)).unbind(-1), cos[:, None], sin[:, None]
    return torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1).flatten(-2).type_as(x)


class Shown(NamedTuple):
    """What a ResNetAdapter's maps show, to which the small preset's output is added. All [B,1 or C,F,H,W]."""

    moved: Tensor  # latents of the maps' frames, less the picture's
    free: Tensor  # 1 where a video may differ from its picture, else 0
    drawn: Tensor  # bool: false where a map is black, and the output alone counts


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """`x * (1 + scale) + shift` with one row per latent frame. x [B, N, D]; shift, scale [B, F, D]."""
    x = x.unflatten(1, (shift.shape[1], -1))  # (B, F, h*w, D)
    return torch.addcmul(shift[:, :, None], x, 1 + scale[:, :, None]).flatten(1, 2)


def add_gated(x: Tensor, y: Tensor, amount: Tensor) -> Tensor:
    """`x + y * amount` with one row per latent frame, in float32. x, y [B, N, D]; amount [B, F, D] -> x's dtype."""
    x, y = (z.unflatten(1, (amount.shape[1], -1)) for z in (x, y))
    return torch.addcmul(x, y, amount[:, :, None]).flatten(1, 2).type_as(x)


class FloatLayerNorm(nn.LayerNorm):
    """Layer norm in float32, whatever the weights' dtype; returns float32."""

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (None, None) if self.weight is None else (self.weight.float(), self.bias.float())
        return F.layer_norm(x.float(), self.normalized_shape, weight, bias, self.eps)


class FloatRMSNorm(nn.RMSNorm):
    """RMS norm in float32, whatever the weights' dtype; returns x's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.float(), self.normalized_shape, self.weight.float(), self.eps).type_as(x)


class PatchEmbedding(nn.Module):
    """Wan's patch convolution as a matrix product: its kernel equals its stride, so each patch is one row."""

    def __init__(self, channels: int, patch: tuple[int, int, int], dim: int):
        super().__init__()
        self.patch = patch
        self.weight = nn.Parameter(torch.empty(dim, channels, *patch))  # the published Conv3d shape
        self.bias = nn.Parameter(torch.empty(dim))

    def forward(self, x: Tensor) -> Tensor:
        p, q, r = self.patch
        x = rearrange(x, "b c (f p) (h q) (w r) -> b (f h w) (c p q r)", p=p, q=q, r=r)
        return F.linear(x.to(self.weight.dtype), self.weight.flatten(1), self.bias)  # (B, N, D)


def init_xavier(model: nn.Module) -> None:
    """Xavier matrices and zero biases, in every linear layer and patch embedding."""
    for module in model.modules():
        if isinstance(module, nn.Linear | PatchEmbedding):
            nn.init.xavier_uniform_(module.weight.flatten(1))
            nn.init.zeros_(module.bias)


class Attention(nn.Module):
    """Self- or cross-attention, with RMS norm of queries and keys over the full width."""

    def __init__(self, dim: int, heads: int, eps: float):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_q, self.norm_k = (FloatRMSNorm(dim, eps=eps) for _ in range(2))

    def forward(self, x: Tensor, context: Tensor, rope: Rope | None = None) -> Tensor:
        """x [B, N, dim] attends to a context [B, L, dim], or, with `rope`, to itself."""
        k = self.norm_k(self.k(context)).unflatten(-1, (self.heads, -1))
        v = self.v(context).unflatten(-1, (self.heads, -1))
        q = self.norm_q(self.q(x)).unflatten(-1, (self.heads, -1))
        if rope is not None:
            q, k = (rotate(y, rope.cos, rope.sin) for y in (q, k))
            q, k, v = (rope.split.to_heads(y) for y in (q, k, v))
            if rope.not_padding is not None:
                k, v = k[:, rope.not_padding], v[:, rope.not_padding]
        out = attend(*(y.to(v.dtype).transpose(1, 2) for y in (q, k, v))).transpose(1, 2)
        return self.o((out if rope is None else rope.split.to_tokens(out)).flatten(-2))


class Block(nn.Module):
    """Self-attention, cross-attention to text and a feed-forward; the timestep modulates the first and the last."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        dim = config.dim
        self.norm1, self.norm2 = (FloatLayerNorm(dim, config.eps, elementwise_affine=False) for _ in range(2))
        self.self_attn = Attention(dim, config.heads, config.eps)
        self.norm3 = FloatLayerNorm(dim, config.eps)
        self.cross_attn = Attention(dim, config.heads, config.eps)
        self.ffn = nn.Sequential(nn.Linear(dim, config.ffn_dim), nn.GELU("tanh"), nn.Linear(config.ffn_dim, dim))
        self.modulation = nn.Parameter(torch.empty(1, 6, dim))

    def forward(self, x: Tensor, e: Tensor, text: Tensor, rope: Rope) -> Tensor:
        """x [B,N,D], e [B,F,6,D] float32, text [B,L,D] -> [B,N,D] in x's dtype; text's is that of the products."""
        shift1, scale1, gate1, shift2, scale2, gate2 = (self.modulation.float() + e).unbind(2)  # (B, F, D) each
        y = modulate(self.norm1(x), shift1, scale1).type_as(text)
        x = add_gated(x, self.self_attn(y, y, rope), gate1)
        x = x + self.cross_attn(self.norm3(x).type_as(text), text)
        y = modulate(self.norm2(x), shift2, scale2).type_as(text)
        return add_gated(x, self.ffn(y), gate2)


class Head(nn.Module):
    """Last norm, modulation and projection to patches, in float32 whatever the weights' dtype."""

    def __init__(self, config: DiTConfig):
        super().__init__()
        p, q, r = config.patch
        self.norm = FloatLayerNorm(config.dim, config.eps, elementwise_affine=False)
        self.head = nn.Linear(config.dim, p * q * r * config.channels)
        self.modulation = nn.Parameter(torch.empty(1, 2, config.dim))

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        shift, scale = (self.modulation.float() + e[:, :, None]).unbind(2)  # (B, F, D)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(modulate(self.norm(x), shift, scale), self.head.weight.float(), self.head.bias.float())


class VideoDiT(nn.Module):
    """The generator. `forward(x, t, text)` predicts the velocity `noise - x0` (flow.py, eq. 2)."""

    float32 = r"^time_|modulation$|norm"  # parameters that stay float32 in a network read in bfloat16, as in Wan
    split = TokenSplit()  # `prepare` gives another where processes share a video

    def __init__(self, config: DiTConfig):
        super().__init__()
        self.config = config
        dim = config.dim
        self.patch_embedding = PatchEmbedding(config.channels * (1 + config.sees_first), config.patch, dim)
        self.text_embedding = nn.Sequential(nn.Linear(config.text_dim, dim), nn.GELU("tanh"), nn.Linear(dim, dim))
        self.time_embedding = nn.Sequential(nn.Linear(config.freq_dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(dim, 6 * dim))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.head = Head(config)
        if not self.head.head.weight.is_meta:  # there, weights are about to be read
            self.init_weights()

    def init_weights(self) -> None:
        """Xavier matrices, small embeddings, a head that starts at zero."""
        init_xavier(self)
        for layer in (self.time_embedding[0], self.time_embedding[2]):
            nn.init.normal_(layer.weight, std=0.02)
        for layer in (self.text_embedding[0], self.text_embedding[2]):
            nn.init.normal_(layer.weight, std=layer.in_features**-0.5)  # about 0.02, Wan's, for its 4,096 inputs
        for part in (*self.blocks, self.head):
            nn.init.normal_(part.modulation, std=self.config.dim**-0.5)
        nn.init.zeros_(self.head.head.weight)

    @classmethod
    def from_pretrained(
        cls, path: Path | str, network: str, dtype: torch.dtype = torch.float32, shapes_only: bool = False,
        preset: str = "", edit: Callable[[dict[str, Stored]], dict[str, Stored]] | None = None,
    ) -> "VideoDiT":  # fmt: skip
        """Read an own export, or a generator as others publish it (wan/published.py).

        `path`: a file or folder; `file.pt:key` chooses among the networks of a training checkpoint. `network`: the name
        that an own export must carry, "SlowGenerator" or "FastGenerator"; foreign files carry none. `shapes_only` as in
        `load`. `preset`: the one whose latents and prompts the network must take; any will do if empty. `edit`: changes
        the tensors before they are read, as wan/lora.py's `merge` does. UserError for a file that doesn't fit.
        """
        path, key = split_key(path)
        if path.suffix == ".safetensors" and "network" in read_safetensors(path)[0]:
            require(not key, f"{path}:{key}: this file holds one network; leave out :{key}")
            config, tensors = read_network(path, network, DiTConfig)
        else:
            shapes, tensors = read_generator(path, key)
            config = replace(PRESETS["wan5b"], **shapes)
        if preset and any(getattr(config, name) != getattr(PRESETS[preset], name) for name in ("channels", "text_dim")):
            raise UserError(f"{path}: is no network of preset {preset}; {OTHER_FILE}")
        return load(lambda: cls(config), edit(tensors) if edit else tensors, path, dtype, shapes_only)

    def grid(self, x: Tensor) -> tuple[int, ...]:
        """How many tokens a latent [B,C,F,H,W] has in time, height and width."""
        return tuple(n // p for n, p in zip(x.shape[2:], self.config.patch, strict=True))

    def time_features(self, t: Tensor) -> Tensor:
        """Sinusoids of the timestep, float32: [B, F] -> [B, F, freq_dim], cosines first."""
        half = self.config.freq_dim // 2
        rate = 10000.0 ** -(torch.arange(half, dtype=torch.float64, device=t.device) / half)
        angle = t.double()[..., None] * rate
        return torch.cat([angle.cos(), angle.sin()], dim=-1).float()

    def embed(self, x: Tensor, t: Tensor, text: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Rope]:
        """The blocks' inputs: tokens [B,N,D], timestep [B,F,D] and [B,F,6,D], text [B,L,D], rotary tables.

        Here and in the blocks N counts this process's tokens, if several share a video.
        """
        frames, height, width = self.grid(x)
        if self.config.sees_first:
            x = torch.cat([x, x[:, :, :1].expand_as(x)], dim=1)
        tables = rotary_table(frames, height, width, self.config.dim // self.config.heads, x.device)
        tokens, cos, sin = (self.split.own_tokens(y, frames) for y in (self.patch_embedding(x), *tables))
        if self.config.float32_stream or not torch.is_grad_enabled():
            tokens = tokens.float()
        rope = Rope(cos, sin, self.split, self.split.not_padding(frames, height * width, x.device))
        with torch.autocast(x.device.type, enabled=False):  # as Wan: every layer depends on these few rows
            e = self.time_embedding(self.time_features(t).to(self.time_embedding[0].weight.dtype))
            e6 = self.time_projection(e).unflatten(-1, (6, -1)).float()
        text = self.text_embedding(text.to(self.text_embedding[0].weight.dtype))
        return tokens, e, e6, text, rope

    def forward(
        self, x: Tensor, t: Tensor, text: Tensor, residuals: Iterable[Tensor] | None = None,
        shown: Shown | None = None, feature_blocks: tuple[int, ...] = (), skip_still: bool = False,
    ) -> Tensor | tuple[Tensor, list[Tensor]]:  # fmt: skip
        """Velocity of x [B,C,F,H,W], float32, at timesteps t [B,F] in [0, 1000], given text [B,L,text_dim].

        `residuals`: one [B,N,D] per block, an adapter's output, added to that block's output; taken one by one.
        `shown`: what the small preset's output is added to. `feature_blocks`: numbers of the blocks whose outputs
        [B,N,D] are returned too, as a list beside the velocity. `skip_still`: of a single video, on one process,
        leave out the tokens where `shown` lets nothing differ from frame 0; the others hardly change.
        """
        tokens, e, e6, text, rope = self.embed(x, t, text)
        (frames, height, width), (p, q, r) = self.grid(x), self.config.patch
        features, added, kept = [], iter(residuals or ()), slice(None)
        if skip_still and shown and self.split.group is None:
            free = F.max_pool3d(shown.free.masked_fill(~shown.drawn, 1), self.config.patch)
            free[:, :, 0] = 1  # the picture, at which all look
            kept = free.flatten().nonzero()[:, 0]
            tokens, rope = tokens[:, kept], rope._replace(cos=rope.cos[kept], sin=rope.sin[kept])
            e, e6 = (rows[:, kept // (height * width)] for rows in (e, e6))  # from frames to tokens
        for i, block in enumerate(self.blocks):
            tokens = block(tokens, e6, text, rope)
            if residuals:
                tokens = (tokens + next(added)[:, kept]).type_as(tokens)
            if i in feature_blocks:
                features.append(self.split.all_tokens(tokens, frames, height * width))
        out = self.head(tokens, e.float())
        if isinstance(kept, Tensor):
            out = out.new_zeros(1, frames * height * width, out.shape[-1]).index_copy_(1, kept, out)
        out = self.split.all_tokens(out, frames, height * width)
        out = rearrange(out, "b (f h w) (p q r c) -> b c (f p) (h q) (w r)", f=frames, h=height, p=p, q=q, r=r)
        if shown:
            out = torch.where(shown.drawn, shown.free * (out - 0.9 * out.clamp(-FAINT, FAINT) + shown.moved), out)
        if self.config.predicts == "x0":
            out = (x - out) / (t / 1000).clamp(min=LEAST_SIGMA)[:, None, :, None, None]
        return (out, features) if feature_blocks else out
