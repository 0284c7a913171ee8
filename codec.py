"""Codecs: pixels and prompts <-> latents and embeddings.

Every codec has `encode_video`, `decode_video`, `encode_text` and the attributes `channels`, `spatial` and `temporal`
(pixels and video frames per latent position), so nothing downstream knows which one it holds.
"""

import zlib

import torch
from einops import rearrange
from torch import Tensor


class ToyCodec:
    """The toy world's codec: pixel-unshuffle by 4 (exactly invertible) and a fixed embedding of words.

    48 channels like Wan's VAE, one latent frame a video frame. A word becomes a random vector seeded by its bytes,
    beside the mean vector of its clause (the words between commas): so "clockwise" carries which object it speaks of,
    as it would after a real text encoder.
    """

    channels, spatial, temporal = 48, 4, 1

    def __init__(self, text_dim: int = 64, text_tokens: int = 32):
        self.text_dim, self.text_tokens = text_dim, text_tokens
        self._words: dict[str, Tensor] = {}

    def encode_video(self, video: Tensor) -> Tensor:
        """[B, 3, T, height, width] in [-1, 1] -> [B, 48, T, height / 4, width / 4]."""
        return rearrange(video, "b c t (h p) (w q) -> b (c p q) t h w", p=4, q=4)

    def decode_video(self, latents: Tensor) -> Tensor:
        """[B, 48, T, H, W] -> [B, 3, T, 4 H, 4 W], clamped to [-1, 1]."""
        return rearrange(latents, "b (c p q) t h w -> b c t (h p) (w q)", p=4, q=4).clamp(-1, 1)

    def _word(self, word: str) -> Tensor:
        if word not in self._words:
            seed = torch.Generator().manual_seed(zlib.crc32(word.encode()))
            self._words[word] = torch.randn(self.text_dim // 2, generator=seed)
        return self._words[word]

    def encode_text(self, prompts: list[str]) -> Tensor:
        """Prompts -> [B, L, text_dim], zeros after the last word. Words past `text_tokens` are dropped."""
        out = torch.zeros(len(prompts), self.text_tokens, self.text_dim)
        for row, prompt in zip(out, prompts, strict=True):
            tokens = []
            for clause in prompt.lower().split(","):
                words = [self._word(word) for word in clause.split()]
                tokens += [torch.cat([word, torch.stack(words).mean(0) * len(words) ** 0.5]) for word in words]
            if tokens:
                row[: len(tokens)] = torch.stack(tokens)[: self.text_tokens]
        return out
