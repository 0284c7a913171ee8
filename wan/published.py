"""Wan2.2's transformer as others publish it: folders and files, the names of its tensors, and the types they are in."""

import re
from pathlib import Path

import torch
from torch import Tensor

from core.config import UserError
from core.weights import Stored, read_checkpoint, read_config, read_folder, read_safetensors, rename

# What wrappers leave anywhere in a name, and what files put before every name.
WRAPPERS = ((r"\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|module)\.", ""),)
PREFIXES = ((r"^((model|diffusion_model|transformer|generator)\.)+", ""),)
KEYS = ("generator_ema", "ema", "generator", "state_dict", "model")  # in a training checkpoint, the best first
HEAD_DIM = 128  # of every Wan transformer; no tensor tells it
SCALES = ("scale_weight", "weight_scale")  # of weights in 8-bit floating point
ASIDE = r"(^|\.)(scaled_fp8|comfy_quant|scale_input|input_scale|scale_weight|weight_scale)$"  # no parameters
# Parameter names of diffusers' WanTransformer3DModel -> Wan's own.
DIFFUSERS_NAMES = (
    (r"^condition_embedder\.text_embedder\.linear_1", "text_embedding.0"),
    (r"^condition_embedder\.text_embedder\.linear_2", "text_embedding.2"),
    (r"^condition_embedder\.time_embedder\.linear_1", "time_embedding.0"),
    (r"^condition_embedder\.time_embedder\.linear_2", "time_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^proj_out", "head.head"),
    (r"^scale_shift_table", "head.modulation"),
    (r"scale_shift_table", "modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"\.ffn\.net\.0\.proj", ".ffn.0"),
    (r"\.ffn\.net\.2", ".ffn.2"),
)


def read_generator(path: Path, key: str = "") -> tuple[dict[str, object], dict[str, Stored]]:
    """The shapes of a transformer, as DiTConfig names them, and its tensors by Wan's own names.

    `path`: the folder of Wan2.2-TI2V-5B or diffusers' `transformer/`; a `.pt` or `.pth`, a dict of tensors or one of
    several such, of which `key` chooses; or a `.safetensors`. Float32, float16, bfloat16, and 8-bit floating point with
    or without scales. UserError for anything else.
    """
    if path.suffix == ".gguf":
        raise UserError(f"{path}: GGUF is not read; get the same network as .safetensors (16 bits or fp8) or .pt")
    shapes = {}
    if path.is_dir():
        tensors = read_folder(path, "diffusion_pytorch_model")
        if (path / "config.json").exists():
            shapes = configured(path / "config.json")
    elif path.suffix == ".safetensors":
        tensors = read_safetensors(path)[1]
    else:
        tensors = read_checkpoint(path, key, KEYS)
    tensors = scaled(rename(tensors, (*WRAPPERS, *PREFIXES)))
    if any(name.startswith("condition_embedder.") for name in tensors):
        tensors = rename(tensors, DIFFUSERS_NAMES)
    return shapes or measured(path, tensors), tensors


def configured(file: Path) -> dict[str, object]:
    """The shapes in a config.json of Wan2.2 or diffusers."""
    config = read_config(file)
    kind = config.get("_class_name")
    try:
        if kind == "WanModel":
            shapes = [config[n] for n in ("dim", "ffn_dim", "num_heads", "num_layers", "in_dim", "freq_dim", "eps")]
        elif kind == "WanTransformer3DModel":
            heads = config["num_attention_heads"]
            names = ("ffn_dim", "num_attention_heads", "num_layers", "in_channels", "freq_dim", "eps")
            shapes = [heads * config["attention_head_dim"], *(config[n] for n in names)]
        else:
            raise UserError(f"{file}: _class_name is {kind}, expected WanModel or WanTransformer3DModel")
    except KeyError as error:
        raise UserError(f"{file}: the field {error} is missing; give the folder as it was published") from None
    return dict(zip(("dim", "ffn_dim", "heads", "layers", "channels", "freq_dim", "eps"), shapes, strict=True))


def measured(path: Path, tensors: dict[str, Stored]) -> dict[str, object]:
    """The shapes that the tensors themselves have, where no config lies beside them."""
    wanted = ("patch_embedding", "blocks.0.ffn.0", "text_embedding.0", "time_embedding.0")
    if absent := [f"{name}.weight" for name in wanted if f"{name}.weight" not in tensors]:
        raise UserError(f"{path}: no transformer of Wan2.2: it holds no {absent[0]}; give another file")
    (dim, channels, *patch), (ffn_dim, _), (_, text_dim), (_, freq_dim) = (
        tensors[f"{name}.weight"].shape for name in wanted
    )
    if dim % HEAD_DIM:
        raise UserError(f"{path}: its width {dim} is no multiple of {HEAD_DIM}, the width of Wan's heads")
    layers = len({name.split(".")[1] for name in tensors if name.startswith("blocks.")})
    return {
        "dim": dim, "ffn_dim": ffn_dim, "heads": dim // HEAD_DIM, "layers": layers, "channels": channels,
        "patch": tuple(patch), "text_dim": text_dim, "freq_dim": freq_dim,
    }  # fmt: skip


def scaled(tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Weights in 8-bit floating point multiplied by the scales that lie beside them; what is no parameter left out."""

    def times(weight: Stored, scale: Stored) -> Tensor:
        factor = scale.read().float()
        return weight.read().to(torch.float32) * factor.reshape(-1, *[1] * (len(weight.shape) - 1))

    out = {}
    for name, stored in tensors.items():
        if re.search(ASIDE, name):
            continue
        layer = name.removesuffix(".weight")
        scale = next((tensors[f"{layer}.{s}"] for s in SCALES if name != layer and f"{layer}.{s}" in tensors), None)
        read = stored.read if scale is None else lambda w=stored, s=scale: times(w, s)
        out[name] = Stored(stored.shape, read)
    return out
