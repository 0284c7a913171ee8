"""UMT5-XXL, Wan2.2's text encoder, run by `transformers` (requirements-wan.txt)."""

import html
from pathlib import Path

import torch
from torch import Tensor, nn

from core.config import UserError, reason, warn
from core.files import no_pointer
from core.weights import load, read_checkpoint, read_config, read_folder, rename

# Wan's names for the text encoder's parameters -> transformers' names.
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
# Wan's layout has no config for the text encoder, so here is UMT5-XXL's, as far as transformers has other defaults.
UMT5_XXL = {"vocab_size": 256384, "d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}


def read_text_encoder(path: Path, dtype: torch.dtype, shapes: dict = UMT5_XXL) -> nn.Module:
    """UMT5's encoder: `models_t5_umt5-xxl-enc-bf16.pth`, or diffusers' `text_encoder/`. `dtype`: bfloat16 or int8."""
    from transformers import UMT5Config, UMT5EncoderModel

    if path.is_dir():
        config = UMT5Config(**read_config(path / "config.json"))
        tensors = rename(read_folder(path, "model"), ((r"^encoder\.", ""), (r"^shared\.", "embed_tokens.")))
    else:
        config = UMT5Config(**shapes)
        tensors = rename(read_checkpoint(path), UMT5_NAMES)
    return load(lambda: UMT5EncoderModel(config).encoder, tensors, path, dtype).eval().requires_grad_(False)


def clean_prompt(prompt: str) -> str:
    """A prompt as Wan cleans it: ftfy (also plain commas for full-width ones), entities twice, white space folded."""
    import ftfy

    return " ".join(html.unescape(html.unescape(ftfy.fix_text(prompt))).split())


class TextEncoder:
    """`encoder(prompts)` -> [B, length, width] bfloat16, padded with zeros. Longer prompts are cut."""

    def __init__(self, tokenizer: Path, weights: Path, device: torch.device, length: int, dtype: torch.dtype):
        try:
            import ftfy  # noqa: F401  # which `clean_prompt` needs: better said before anything large is read
            from transformers import AutoTokenizer
        except ImportError as error:
            raise UserError(f"{error.name}: not installed; pip install -r requirements-wan.txt") from None
        for file in Path(tokenizer).glob("*"):
            no_pointer(file)
        try:
            self.tokenizer = AutoTokenizer.from_pretrained(tokenizer)
        except Exception as error:  # several libraries may read it, and they raise all sorts of errors
            raise UserError(f"{tokenizer}: no tokenizer can be read ({reason(error)}); get the folder again") from None
        self.device, self.length = device, length
        self.network = read_text_encoder(weights, dtype).to(device)

    @torch.no_grad()
    def __call__(self, prompts: list[str]) -> Tensor:
        clean = [clean_prompt(prompt) for prompt in prompts]
        for prompt, whole in zip(prompts, self.tokenizer(clean).input_ids, strict=True):
            if len(whole) > self.length:
                warn(f"{prompt[:40]!r}...: {len(whole)} tokens; Wan reads the first {self.length}")
        cut = {"padding": "longest", "truncation": True, "max_length": self.length}
        tokens = self.tokenizer(clean, return_tensors="pt", **cut).to(self.device)
        mask = tokens.attention_mask
        text = self.network(input_ids=tokens.input_ids, attention_mask=mask).last_hidden_state * mask[..., None]
        return nn.functional.pad(text.bfloat16(), (0, 0, 0, self.length - text.shape[1]))
