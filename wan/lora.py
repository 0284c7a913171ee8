"""LoRA: small changes to a transformer's weights, published apart from it, merged while the weights are read.

    W + strength * (alpha / rank) * B A      with A [rank, in] and B [out, rank]; alpha is the rank where none is given

Names are `lora_A` and `lora_B`, or `lora_down` and `lora_up`; `diff` and `diff_b` add to a weight and a bias as they
are. Layers are called as in Wan, in diffusers, or with underscores after `lora_unet_`.
"""

import json
import re

import torch
from torch import Tensor

from core.config import UserError
from core.weights import Stored, brief, read_safetensors, rename, split_key
from wan.published import DIFFUSERS_NAMES, NOT_WAN

PART = re.compile(
    r"^(.+)\.(lora_A|lora_down|lora_B|lora_up|diff_b|diff|alpha)(?:\.(?!weight|bias)\w+)?(?:\.(weight|bias))?$"
)
NUMBER = r"-?\d*\.?\d+"
KINDS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up"}


def merge(tensors: dict[str, Stored], text: str) -> dict[str, Stored]:
    """A transformer's tensors with the changes of a LoRA, "FILE" or "FILE:strength": float32 when they are read.

    UserError if there is no such file, or if a name or shape of the LoRA finds no match.
    """
    path, strength = split_key(text)
    if not path.is_file() or not re.fullmatch(NUMBER, strength or "1"):
        raise UserError(f"--lora {text}: no such file; give FILE or FILE:strength")
    header, parts = read_safetensors(path)
    flat = {name.rpartition(".")[0].replace(".", "_"): name.rpartition(".")[0] for name in tensors}
    changes: dict[str, dict[str, Stored]] = {}  # tensor's name -> its changes by kind
    unknown = []
    for name, stored in parts.items():
        found = PART.match(name)
        layer = own_name(found[1], flat) if found else ""
        if f"{layer}.weight" not in tensors:
            unknown.append(name)
        elif found[2] == "diff_b" or found[3] == "bias":  # lora_B.bias adds to the bias
            changes.setdefault(f"{layer}.bias", {})["diff"] = stored
        else:
            changes.setdefault(f"{layer}.weight", {})[KINDS.get(found[2], found[2])] = stored
    if unknown or not changes:
        which = brief(unknown) or "like its own"
        raise UserError(f"{path}: a LoRA of another network; no layer here is called {which}")
    alpha, merged = read_alpha(header), dict(tensors)
    for target, own in changes.items():
        if target not in tensors or not have_shape(own, tensors[target].shape):
            raise UserError(f"{path}: {target} is of another shape here; the file was made for another network")
        merged[target] = add(tensors[target], own, float(strength or 1), alpha)
    return merged


def own_name(layer: str, flat: dict[str, str]) -> str:
    """A layer's name as Wan's files have it."""
    if layer.startswith("lora_unet_"):
        return flat.get(layer.removeprefix("lora_unet_"), layer)
    return next(iter(rename({f"{layer}.": None}, (*NOT_WAN, *DIFFUSERS_NAMES)))).removesuffix(".")


def read_alpha(header: dict[str, str]) -> float | None:
    """alpha / rank, if the header has both, as diffusers writes them."""
    try:
        said = json.loads(header.get("lora_adapter_metadata", "{}"))
        values = {key.rpartition(".")[2]: value for key, value in said.items()}
        return float(values["lora_alpha"]) / float(values["r"])
    except (ValueError, KeyError, AttributeError, TypeError):
        return None


def have_shape(changes: dict[str, Stored], shape: tuple[int, ...]) -> bool:
    """Whether the changes add up to a tensor of this shape."""
    shapes = {kind: stored.shape for kind, stored in changes.items()}
    up, down = shapes.get("up", ()), shapes.get("down", ())
    product = (*up[:1], *down[1:]) if up[1:2] == down[:1] else ()
    return (product == shape or not up + down) and shapes.get("diff", shape) == shape


def add(target: Stored, changes: dict[str, Stored], strength: float, alpha: float | None) -> Stored:
    """A tensor that adds its changes when it is read."""

    def read() -> Tensor:
        whole = target.read().to(torch.float32)
        if "down" in changes:
            down, up = (changes[kind].read().float().flatten(1) for kind in ("down", "up"))
            scale = changes["alpha"].read().float().item() / len(down) if "alpha" in changes else alpha or 1.0
            whole = whole + strength * scale * (up @ down).view(whole.shape)
        return whole + strength * changes["diff"].read().float() if "diff" in changes else whole

    return Stored(target.shape, read)
