"""The diffusion discriminator: is this noisy latent a real video that follows its trajectory? And the two GAN losses.

The backbone is the frozen SlowGenerator, which reads a noisy latent. Features of some of its blocks go to a classifier,
the only part that learns: a learned query attends to the first frame and the text, then to the trajectory, then to the
video, and becomes one logit (paper, section on the diffusion discriminator).

The paper gives no sizes. That of wan5b has 68M parameters: a query of a third of the backbone's width, no feed-forward.
Wan2.2-TI2V-5B-Turbo's, some 260M, has the full width, norms of queries and keys, and a feed-forward of 8,192.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from model import PatchEmbedding, VideoDiT, init_xavier, rotary_table


@dataclass(frozen=True)
class ClassifierConfig:
    """Shapes of a classifier, and which of its attentions are in use (paper, table 3)."""

    dim: int  # width of the backbone
    text_dim: int
    feature_blocks: tuple[int, ...]  # of the backbone: their outputs are judged
    hidden: int = 128  # width of the query
    heads: int = 4
    channels: int = 48  # of the trajectory latent
    patch: tuple[int, int, int] = (1, 2, 2)
    position_dim: int = 64  # the backbone's head width, for its rotary angles as positions
    semantic: bool = True  # self-attention of the query with first-frame and text tokens
    trajectory: bool = True  # cross-attention to the trajectory's tokens
    video: bool = True  # cross-attention to the video's tokens
    feed_forward: int = 0  # width of a feed-forward after the attentions; none if 0
    cautious: bool = False  # starts almost silent: in a small world it soon knows videos by their text and trajectory


PRESETS = {
    "small": ClassifierConfig(256, 64, feature_blocks=(1, 3, 5), channels=24, cautious=True),
    "wan5b": ClassifierConfig(3072, 4096, feature_blocks=(13, 21, 29), hidden=1024, heads=8, position_dim=128),
}


class ClassifierBlock(nn.Module):
    """Judges one block's features: a query goes through three attentions."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        width = config.hidden
        used = [name for name in ("semantic", "trajectory", "video") if getattr(config, name)]
        self.query = nn.Parameter(torch.empty(1, 1, width))
        self.norms = nn.ModuleDict({n: nn.LayerNorm(width) for n in used})
        self.attentions = nn.ModuleDict({n: nn.MultiheadAttention(width, config.heads, batch_first=True) for n in used})
        self.ffn = None
        if ffn := config.feed_forward:
            self.ffn = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, ffn), nn.GELU("tanh"), nn.Linear(ffn, width))

    def forward(self, video: Tensor, text: Tensor, padding: Tensor, traj: Tensor, per_frame: int) -> Tensor:
        """video and traj [B,N,hidden], text [B,L,hidden], padding [B,L]; tokens of a frame -> [B,hidden]."""
        query = self.query.expand(len(video), -1, -1)
        for name, attention in self.attentions.items():
            y = self.norms[name](query)
            seen = {"semantic": torch.cat([y, video[:, :per_frame], text], 1), "trajectory": traj, "video": video}[name]
            hidden = F.pad(padding, (1 + per_frame, 0)) if name == "semantic" else None
            query = query + attention(y, seen, seen, hidden, need_weights=False)[0]
        return (query if self.ffn is None else query + self.ffn(query))[:, 0]


class Classifier(nn.Module):
    """The trainable part of the discriminator."""

    def __init__(self, config: ClassifierConfig):
        super().__init__()
        self.config = config
        dim, width, count = config.dim, config.hidden, len(config.feature_blocks)
        self.patch_embedding = PatchEmbedding(config.channels, config.patch, width)
        self.text = nn.Linear(config.text_dim, width)
        self.position = nn.Linear(config.position_dim, width)
        self.tokens = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(dim), nn.Linear(dim, 2 * width), nn.GELU("tanh"), nn.Linear(2 * width, width))
            for _ in range(count)
        )
        self.blocks = nn.ModuleList(ClassifierBlock(config) for _ in range(count))
        self.norm, self.logit = nn.LayerNorm(count * width), nn.Linear(count * width, 1)
        init_xavier(self)
        for block in self.blocks:
            nn.init.normal_(block.query, std=0.02)
        if config.cautious:  # attention nearly uniform, and to the video alone if it is attended to; logits of zero
            for name, attention in ((n, a) for block in self.blocks for n, a in block.attentions.items()):
                attention.in_proj_weight.data[: 2 * width] *= 0.1  # queries and keys
                if name != "video" and config.video:
                    nn.init.zeros_(attention.out_proj.weight)
            nn.init.zeros_(self.logit.weight)

    def forward(self, features: list[Tensor], text: Tensor, traj: Tensor) -> Tensor:
        """Features [B,N,D] of each block, text [B,L,Dt], traj [B,C,F,H,W] -> logits [B], large for real.

        Rows of zeros in the text are padding, which is not attended to. Wan's own attention reads it.
        """
        frames, height, width = (n // p for n, p in zip(traj.shape[2:], self.config.patch, strict=True))
        cos, sin = rotary_table(frames, height, width, self.config.position_dim, traj.device)
        where = self.position(torch.cat([cos, sin], dim=1))  # (N, hidden)
        padding = (text == 0).all(-1)  # (B, L)
        tokens, text = self.patch_embedding(traj) + where, self.text(text)
        seen = [
            block(embed(feature.float()) + where, text, padding, tokens, height * width)
            for block, embed, feature in zip(self.blocks, self.tokens, features, strict=True)
        ]
        return self.logit(self.norm(torch.cat(seen, dim=1)))[:, 0].float()


class DiffusionDiscriminator(nn.Module):
    """`discriminator(x_t, t, text, traj)` -> logits [B]. Gradients pass through the frozen backbone."""

    def __init__(self, backbone: VideoDiT, classifier: Classifier):
        super().__init__()
        self.backbone, self.classifier = backbone.requires_grad_(False), classifier

    def features(self, x_t: Tensor, t: Tensor, text: Tensor) -> list[Tensor]:
        """The outputs of `feature_blocks` for a noisy latent [B,C,F,H,W]: [B,N,D] each."""
        return self.backbone(x_t, t, text, feature_blocks=self.classifier.config.feature_blocks)[1]

    def forward(self, x_t: Tensor, t: Tensor, text: Tensor, traj: Tensor) -> Tensor:
        return self.classifier(self.features(x_t, t, text), text, traj)


def adversarial_loss(fake: Tensor) -> Tensor:
    """`softplus(-D(fake))` [paper, L_G]: falls as the fake looks more real. Logits [B] -> scalar."""
    return F.softplus(-fake).mean()


def discriminator_loss(real: Tensor, fake: Tensor) -> Tensor:
    """`softplus(-D(real)) + softplus(D(fake))` [paper, L_D]. Logits [B] each -> scalar."""
    return F.softplus(-real).mean() + F.softplus(fake).mean()


def r1_penalty(real: Tensor, near: Tensor) -> Tensor:
    """`(D(real) - D(near))^2`, near being the true video with a little noise. Logits [B] each -> scalar.

    For R1, the gradient's square, without second derivatives (Lin et al. 2025, "Diffusion adversarial post-training").
    """
    return (real - near).square().mean()
