"""UMT5-XXL, Wan2.2's text encoder, through `transformers` (requirements-wan.txt), and embeddings on disk."""

import html
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from core.config import UserError, reason
from core.memory import offload
from core.weights import load, read_checkpoint, read_config, read_folder, read_safetensors, rename, write_safetensors

# Wan's names of the text encoder's parameters -> those in transformers.
UMT5_NAMES = (
    (r"^token_embedding", "embed_tokens"),
    (r"^norm\.", "final_layer_norm."),
    (r"^blocks\.(\d+)\.norm1", r"block.\1.layer.0.layer_norm"),
    (r"^blocks\.(\d+)\.norm2", r"block.\1.layer.1.layer_norm"),
    (r"^blocks\.(\d+)\.attn", r"block.\1.layer.0.SelfAttention"),
    (r"^blocks\.(\d+)\.pos_embedding\.embedding", r"block.\1.layer.0.SelfAttention.relative_attention_bias"),
    (r"^blocks\.(\d+)\.ffn\.gate\.0", r"block.\1.layer.1.DenseReluDense.wi_0"),
    (r"^blocks\.(\d+)\.ffn\.fc1", r"block.\1.layer.1.DenseReluDense.wi_1"),
    (r"^blocks\.(\d+)\.ffn\.fc2", r"block.\1.layer.1.DenseReluDense.wo"),
)
# UMT5-XXL, whose file in Wan's layout has no config beside it.
UMT5_XXL = {
    "vocab_size": 256384, "d_model": 4096, "d_kv": 64, "d_ff": 10240, "num_layers": 24, "num_heads": 64,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip


def read_text_encoder(path: Path, shapes: dict | None = None) -> nn.Module:
    """The encoder of UMT5 in bfloat16: `models_t5_umt5-xxl-enc-bf16.pth`, or the folder `text_encoder/` of diffusers.

    `shapes`: UMT5Config's fields, of a file that isn't UMT5-XXL's; a folder tells its own.
    """
    from transformers import UMT5Config, UMT5EncoderModel

    if path.is_dir():
        config = UMT5Config(**read_config(path / "config.json"))
        tensors = rename(read_folder(path, "model"), ((r"^encoder\.", ""), (r"^shared\.", "embed_tokens.")))
    else:
        config = UMT5Config(**(shapes or UMT5_XXL))
        tensors = rename(read_checkpoint(path), UMT5_NAMES)
    return load(lambda: UMT5EncoderModel(config).encoder, tensors, path, torch.bfloat16).eval().requires_grad_(False)


class TextEncoder:
    """`encoder(prompts)` -> [B, length, width] bfloat16, zeros after the last token. What is longer is cut."""

    def __init__(self, tokenizer: Path, weights: Path, device: torch.device, length: int, aside: bool = False):
        try:
            from transformers import AutoTokenizer
        except ImportError:
            raise UserError("transformers: not installed; pip install -r requirements-wan.txt") from None
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except Exception as error:  # libraries of several kinds read it, and raise whatever they like
            raise UserError(f"{tokenizer}: no tokenizer can be read ({reason(error)}); get the folder again") from None
        self.device, self.length = device, length
        network = read_text_encoder(weights)
        self.network = offload(network, device) if aside else network.to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        clean = [" ".join(html.unescape(html.unescape(prompt)).split()) for prompt in prompts]
        cut = {"padding": "longest", "truncation": True, "max_length": self.length}
        tokens = self.tokenizer(clean, return_tensors="pt", **cut).to(self.device)
        ids, mask = tokens.input_ids, tokens.attention_mask
        seen = self.network(input_ids=ids, attention_mask=mask).last_hidden_state
        return F.pad(seen * mask[..., None], (0, 0, 0, self.length - seen.shape[1]))


def save_text(path: Path, prompts: list[str], text: Tensor) -> None:
    """Embeddings [B, L, D] of these prompts as a safetensors file, so that another machine needs no text encoder."""
    write_safetensors(path, {"text": text}, {"prompts": json.dumps(prompts)}, text.dtype)


def read_text(path: Path, prompts: list[str]) -> Tensor:
    """Embeddings of these prompts, among those that `save_text` wrote. UserError if one is not there."""
    header, tensors = read_safetensors(path)
    try:
        held = json.loads(header.get("prompts", "[]"))
    except ValueError:
        held = []
    fine = isinstance(held, list) and "text" in tensors and tensors["text"].shape[0] == len(held)
    for prompt in prompts:
        if not fine or prompt not in held:
            raise UserError(f"{path}: holds no embeddings of {json.dumps(prompt)}; give another file")
    return tensors["text"].read()[[held.index(prompt) for prompt in prompts]]
