"""Wan2.2's codec: its VAE and text encoder, each read from the published folder when needed."""

from collections.abc import Callable, Iterator
from functools import cached_property
from pathlib import Path

import torch
from torch import Tensor

from core.codec import Codec
from core.config import require
from core.files import no_pointer
from core.parallel import Processes
from wan.tiny_decoder import TinyDecoder
from wan.umt5 import TextEncoder
from wan.vae import WanVAE

# What videos should not show, from Wan2.2's configuration: guidance's other branch.
NEGATIVE_PROMPT = (
    "色调艳丽，过曝，静态，细节模糊不清，字幕，风格，作品，画作，画面，静止，整体发灰，最差质量，低质量，JPEG压缩残留，丑陋的，残缺的，多余的手指，"
    "画得不好的手部，画得不好的脸部，畸形的，毁容的，形态畸形的肢体，手指融合，静止不动的画面，杂乱的背景，三条腿，背景人很多，倒着走"
)


class WanCodec(Codec):
    """Reads Wan2.2-TI2V-5B's `folder` as published, in its own layout or diffusers'.

    The VAE is kept; the text encoder, which is larger than everything else, isn't. The VAE works in `dtype`, but on a
    CPU it encodes in float32. Whole videos stay in host memory. `low`, for little memory: the text encoder has 8 bits,
    and the VAE decodes in tiles. `decoder`: a file of the small decoder, which then makes `pieces`.
    """

    channels, spatial, temporal, area, fps = 48, 16, 4, 704 * 1280, 24
    text_dim, text_tokens, negative = 4096, 512, NEGATIVE_PROMPT

    def __init__(
        self, folder: Path | str, device: torch.device, dtype=torch.float32, low: bool = False, decoder: str = ""
    ):
        self.folder, self.device, self.dtype, self.low = Path(folder), device, dtype, low
        self.small = TinyDecoder.from_pretrained(decoder, dtype).to(device) if decoder else None

    @cached_property
    def vae(self) -> WanVAE:
        vae = WanVAE.from_pretrained(self._part("Wan2.2_VAE.pth", "vae")).requires_grad_(False)
        # Encoding in bfloat16, with random weights, gave latents that differ by 1.4%.
        for part in (vae,) if self.device.type == "cuda" else (vae.conv2, vae.decoder):
            part.to(self.device, self.dtype)
        return vae

    def files(self) -> list[Path]:
        parts = ("Wan2.2_VAE.pth", "vae", "models_t5_umt5-xxl-enc-bf16.pth", "text_encoder")  # first what makes latents
        return [self.folder / name for name in parts if (self.folder / name).exists()]

    def free(self) -> None:
        vars(self).pop("vae", None)
        torch.cuda.empty_cache()  # does nothing without a GPU

    def _part(self, *names: str) -> Path:
        """The first of these files that the folder has: one per layout."""
        found = next((path for name in names if no_pointer(path := self.folder / name).exists()), None)
        require(found, f"{self.folder}: holds no {' or '.join(names)}; give Wan2.2-TI2V-5B as published")
        return found

    def encode_video(self, video: Tensor) -> Tensor:
        """[B, 3, T, height, width] in [-1, 1], T = 4 n + 1 -> [B, 48, n + 1, height / 16, width / 16]."""
        return self.vae.encode(video)

    def decode_video(self, latents: Tensor) -> Tensor:
        """[B, 48, F, H, W] -> [B, 3, 4 (F - 1) + 1, 16 H, 16 W] in [-1, 1]."""
        return self.vae.decode(latents.to(self.device), tile=32 if self.low else 0)

    def pieces(self, latents: Tensor, procs: Processes | None = None) -> Iterator[Tensor]:
        """The same as `decode_video`, a few frames at a time; with tiles, which span all frames, in one piece.

        Processes, `procs`, take turns and give their own pieces; tiles and the small decoder are rank 0's work.
        """
        if not self.low and not self.small:
            yield from self.vae.frames(latents.to(self.device), procs)
        elif procs is None or procs.rank == 0:
            yield from self.small.frames(latents.to(self.device)) if self.small else [self.decode_video(latents)]

    def text_encoder(self) -> Callable[[list[str]], Tensor]:
        """A TextEncoder, which holds the whole network: drop it when done."""
        tokenizer = self._part("google/umt5-xxl", "tokenizer")
        path = self._part("models_t5_umt5-xxl-enc-bf16.pth", "text_encoder")
        return TextEncoder(tokenizer, path, self.device, self.text_tokens, torch.int8 if self.low else torch.bfloat16)
