"""Wan2.2's transformer as others publish it: folders and files, the names and types of its tensors."""

import json
import re
from functools import partial
from pathlib import Path

from torch import Tensor

from core.config import UserError, require
from core.files import no_pointer
from core.weights import Stored, file_errors, read_checkpoint, read_folder, read_safetensors, rename

NOT_WAN = (  # what training wrappers add anywhere in a name, and what files put before every name
    (r"\b(_fsdp_wrapped_module|_orig_mod|_checkpoint_wrapped_module|module)\.", ""),
    (r"^((base_model\.model|model|diffusion_model|transformer|generator|pipe\.dit)\.)+", ""),
)
KEYS = ("generator_ema", "ema", "generator", "state_dict", "model")  # in a training checkpoint, the best first
HEAD_DIM = 128  # of every Wan transformer; no tensor has this shape
NO_PARAMETER = r"(^|\.)(scaled_fp8|comfy_quant|scale_input|input_scale|scale_weight|weight_scale)$"
# What ComfyUI may say of a layer: that it is values times scales, and what changes nothing.
PLAIN = r"format=(float8_e4m3fn(_rowwise)?|float8_e5m2|int8_tensorwise)|(full_|per_row|orig_|params|convrot_).*"
# What bitsandbytes, quanto, torchao, nunchaku, GPTQ, HQQ and ModelOpt keep beside a weight, or in its place.
QUANTIZERS = r"\.weight\.(_data|absmax)$|[._](weight_(?!scale$)\w+|qweight|W_q|SCB|smooth_factor|pre_quant_scale)$"

# Weights beside a generator in a folder, none of which is one.
NO_GENERATOR = r"(?i)\.|slow_|diffusion_pytorch_model|.*(adapter|classifier|vae|tae|lora|umt5|t5)"
# Parameter names of diffusers' WanTransformer3DModel -> Wan's own.
DIFFUSERS_NAMES = (
    (r"^condition_embedder\.(text|time)_embedder\.linear_1", r"\1_embedding.0"),
    (r"^condition_embedder\.(text|time)_embedder\.linear_2", r"\1_embedding.2"),
    (r"^condition_embedder\.time_proj", "time_projection.1"),
    (r"^proj_out", "head.head"),
    (r"^scale_shift_table", "head.modulation"),
    (r"scale_shift_table", "modulation"),
    (r"\.attn1\.", ".self_attn."),
    (r"\.attn2\.", ".cross_attn."),
    (r"\.to_([qkv])\.", r".\1."),
    (r"\.to_out\.0\.", ".o."),
    (r"(blocks\.\d+)\.norm2\.", r"\1.norm3."),
    (r"\.ffn\.net\.(\d)(\.proj)?", r".ffn.\1"),
)


def read_generator(path: Path, key: str = "") -> tuple[dict[str, object], dict[str, Stored]]:
    """The shapes of a transformer, as DiTConfig names them, and its tensors by Wan's own names.

    `path`: the folder of Wan2.2-TI2V-5B or diffusers' `transformer/`; a `.pt` or `.pth`, a dict of tensors or one of
    several such, of which `key` chooses; or a `.safetensors`. Float32, float16, bfloat16, and 8-bit floating point with
    or without scales. UserError for anything else.
    """
    if path.suffix == ".gguf":
        raise UserError(f"{path}: GGUF is not read; get the same network as .safetensors (16 bits or fp8) or .pt")
    if path.is_dir():
        header, tensors = {}, read_folder(path, "diffusion_pytorch_model")
    elif path.suffix == ".safetensors":
        header, tensors = read_safetensors(path)
    else:
        header, tensors = {}, read_checkpoint(path, key, KEYS)
    tensors = unscale(path, header, rename(tensors, NOT_WAN))
    if any(name.startswith("condition_embedder.") for name in tensors):
        tensors = rename(tensors, DIFFUSERS_NAMES)
    wanted = ["patch_embedding.weight", "blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight"]
    if missing := [name for name in wanted if name not in tensors]:
        raise UserError(f"{path}: no transformer of Wan2.2: it holds no {missing[0]}; give another file")
    (dim, channels, *patch), (ffn_dim, _), (_, text_dim), (_, freq_dim) = (tensors[name].shape for name in wanted)
    require(dim % HEAD_DIM == 0, f"{path}: its width {dim} is no multiple of {HEAD_DIM}, the width of Wan's heads")
    blocks = 1 + max(int(name.split(".")[1]) for name in tensors if re.match(r"blocks\.\d+\.", name))
    shapes = {"dim": dim, "ffn_dim": ffn_dim, "heads": dim // HEAD_DIM, "layers": blocks, "channels": channels}
    return shapes | {"patch": tuple(patch), "text_dim": text_dim, "freq_dim": freq_dim}, tensors


def unscale(path: Path, header: dict[str, str], tensors: dict[str, Stored]) -> dict[str, Stored]:
    """Weights in 8 bits times the scales beside them, without what is no parameter. UserError for other quantizers'.

    A scale is of a tensor, [] or [1]; of an output, [out] or [out, 1]; or of a part of an output, [out, parts, 1].
    """

    def multiply(weight: Stored, scale: Stored) -> Tensor:
        factor = scale.read().float().reshape(*scale.shape[:2], 1)
        return (weight.read().float().reshape(*factor.shape[:-1], -1) * factor).reshape(weight.shape)

    out = {name: stored for name, stored in tensors.items() if not re.search(NO_PARAMETER, name)}
    foreign = [name for name in tensors if re.search(QUANTIZERS, name)]
    said = [bytes(stored.read().tolist()) for name, stored in tensors.items() if name.endswith("comfy_quant")]
    with file_errors(path, "a file that says in JSON how it is quantized"):
        listed = json.loads(header.get("_quantization_metadata", "{}")).get("layers", {})
        for layer in [*map(json.loads, said), *listed.values()]:
            fields = [f"{name}={value}" for name, value in (layer | layer.get("params", {})).items() if value]
            foreign += [f"comfy_quant {field}" for field in fields if not re.fullmatch(PLAIN, field)]
    for name in (name for name in tensors if re.search(r"\.(scale_weight|weight_scale)$", name)):
        scale, target = tensors[name], f"{name.rpartition('.')[0]}.weight"
        weight = out.get(target, scale)
        rows, shape = weight.shape[:1], scale.shape
        parts = shape[::2] == (*rows, 1) and len(shape) == 3 and weight.shape[1] % shape[1] == 0
        if target not in out or not (parts or shape in (rows, (*rows, 1)) or set(shape) <= {1}):
            foreign.append(f"{name} {list(shape)} for a weight {list(weight.shape)}")
        out[target] = Stored(weight.shape, partial(multiply, weight, scale))
    if foreign:
        mend = "get the same network in 16 bits, or in fp8 with scales"
        raise UserError(f"{path}: {foreign[0]}: quantized in a way that is not read; {mend}")
    return out


def vae_names(blocks: int) -> list[tuple[str, str]]:
    """Parameter names of diffusers' AutoencoderKLWan -> Wan's own. `blocks` as in VAEConfig."""
    residual = {"norm1": 0, "conv1": 2, "norm2": 3, "conv2": 6}
    return [
        (r"^quant_conv", "conv1"),
        (r"^post_quant_conv", "conv2"),
        (r"coder\.conv_in", "coder.conv1"),
        (r"coder\.norm_out", "coder.head.0"),
        (r"coder\.conv_out", "coder.head.2"),
        (r"mid_block\.resnets\.0", "middle.0"),
        (r"mid_block\.attentions\.0", "middle.1"),
        (r"mid_block\.resnets\.1", "middle.2"),
        (r"(down|up)_blocks\.(\d)\.resnets", r"\1samples.\2.\1samples"),
        (r"down_blocks\.(\d)\.downsampler", rf"downsamples.\1.downsamples.{blocks}"),
        (r"up_blocks\.(\d)\.upsampler", rf"upsamples.\1.upsamples.{blocks + 1}"),
        *((rf"(samples\.\d|middle\.[02])\.{theirs}", rf"\1.residual.{ours}") for theirs, ours in residual.items()),
        (r"conv_shortcut", "shortcut"),
    ]


def find_generator(folder: Path, speed: str) -> Path:
    """A generator in a folder: this project's, else by others' names for it. UserError if several could be it."""
    own = folder / f"{speed}_generator.safetensors"
    if speed == "slow":
        base = [folder for name in ("config.json", "diffusion_pytorch_model*") if any(folder.glob(name))]
        return next((place for place in (own, folder / "transformer", *base) if no_pointer(place).exists()), own)
    named = [folder / name for name in (own.name, "generator.pt", "model.pt", "model.safetensors")]
    named = [file for file in named if no_pointer(file).exists()]
    others = [file for file in sorted(folder.glob("*.safetensors")) if not re.match(NO_GENERATOR, file.name)]
    names = ", ".join(file.name for file in others)
    require(named or len(others) < 2, f"{folder}: which is the generator, of {names}? give --generator")
    return next(iter(named + others), own)
