"""LoRA: small changes to a transformer's weights, published apart from it, merged while the weights are read.

    W + strength * (alpha / rank) * B A      with A [rank, in] and B [out, rank]; alpha is the rank where none is given

Names are `lora_A` and `lora_B`, or `lora_down` and `lora_up`; `diff`, `diff_b` and `diff_m` add to a weight, a bias and
a modulation as they are. Layers are called as in Wan, in diffusers, or with underscores after `lora_unet_` or the like.
Whatever else a file or its config says would change the result too, so it is refused by name.
"""

import json
import re
from functools import partial
from pathlib import Path

from torch import Tensor

from core.config import UserError, require, warn
from core.files import no_pointer
from core.weights import Stored, brief, file_errors, read_config, read_safetensors, rename, split_key
from wan.published import DIFFUSERS_NAMES, NOT_WAN

PART = r"(.+)\.(lora_(?:A|down|B|up)|diff(?:_[bm])?|[wb]_norm|alpha)(?:\.(?!weight|bias)\w+)?(?:\.(weight|bias))?$"
KINDS = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", "w_norm": "diff", "b_norm": "diff_b"}
TARGETS = {"up": "weight", "diff": "weight", "up_bias": "bias", "diff_b": "bias", "diff_m": "modulation"}
FLAT = r"^(lora_unet|lora_transformer|lycoris)_+"  # before layers' names with underscores
FLAT_NAMES = [(old.replace(r"\.", "_"), new.replace(".", "_")) for old, new in DIFFUSERS_NAMES]
OTHERS = {"dora": "DoRA", "magnitude": "DoRA", "hada": "LoHa", "lokr": "LoKr", "oft": "OFT", "lora_mid": "LoCon"}
NOT_READ = "not read, only plain LoRA is; merge it into the generator with the program that made it"
# Of PEFT's config, field=value: what is heeded, and what leaves the sum above as it is.
PLAIN = (
    r"peft_type=LORA|init_lora_weights=(True|gaussian|eva|orthogonal)|(r|lora_alpha|use_rslora|revision)=.*"
    r"|((rank|alpha|layers)_pattern|(eva|corda|loftq|lora_ga|runtime)_config|qalora_group_size|ensure_weight_tying)=.*"
    r"|\w*(_modules|_to_save|_to_transform|_version|task_type|_mode|_path|_mapping|_core|bias|dropout)=.*"
)


def merge(tensors: dict[str, Stored], text: str) -> dict[str, Stored]:
    """A transformer's tensors with the changes of a LoRA, "FILE" or "FILE:strength": float32 when they are read.

    UserError if there is no such file, if a name or shape in it finds no match, or if it is more than a LoRA.
    """
    path, strength = split_key(text)
    require(not path.is_dir(), f"--lora {text}: is a folder; give the .safetensors in it")
    if not no_pointer(path).is_file() or not re.fullmatch(r"-?\d*\.?\d+", strength or "1"):
        raise UserError(f"--lora {text}: no such file; give FILE or FILE:strength")
    header, parts = read_safetensors(path)
    layers = {name.rpartition(".")[0] for name in tensors}
    flat, places = {layer.replace(".", "_"): layer for layer in layers}, layers | tensors.keys()
    changes, foreign = {}, []  # layer's name in the file -> what changes it, by kind; names that nothing here has
    for name, stored in parts.items():
        found = re.match(PART, name)
        if not found and any(own_name(name[: dot.start()], flat) in layers for dot in re.finditer(r"\.", name)):
            other = next((f" ({kind})" for part, kind in OTHERS.items() if part in name), "")
            raise UserError(f"{path}: {name}{other}: {NOT_READ}")
        kind = KINDS.get(found[2], found[2]) + "_bias" * (found[3] == "bias") if found else ""
        if kind not in (*TARGETS, "down", "alpha") or own_name(found[1], flat) not in places:
            foreign.append(name)
        elif changes.setdefault(found[1], {}).setdefault(kind, stored) is not stored:
            raise UserError(f"{path}: {name}: a second LoRA in one file; give a file for each")
    which = brief(foreign) or "like its own"
    require(changes and not foreign, f"{path}: a LoRA of another network; no layer here is called {which}")
    config, merged = read_adapter_config(path, header, parts), dict(tensors)
    for name, own in changes.items():
        layer, down, alpha, scale = own_name(name, flat), own.pop("down", None), own.pop("alpha", None), 1.0
        require(own and bool(down) == ("up" in own), f"{path}: {name} has half of a LoRA; get the file again")
        if down:
            rank, own["up"] = down.shape[0], product(own["up"], down)
            scale = alpha.read().float().item() / rank if alpha else scaling(path, config, name, rank)
        for kind, change in own.items():
            target = layer if layer in tensors else f"{layer}.{TARGETS[kind]}"
            if target not in tensors or tensors[target].shape != change.shape:
                raise UserError(f"{path}: {target} is of another shape here; the file was made for another network")
            factor = float(strength or 1) * (scale if kind.startswith("up") else 1)
            merged[target] = Stored(change.shape, partial(add, merged[target], change, factor))
    return merged


def own_name(layer: str, flat: dict[str, str]) -> str:
    """A layer's name as Wan's files have it. `flat`: those names by what they are with underscores."""
    if (bare := re.sub(FLAT, "", layer)) != layer:
        return flat.get(next(iter(rename({f"{bare}_": None}, FLAT_NAMES))).removesuffix("_"), bare)
    return next(iter(rename({f"{layer}.": None}, (*NOT_WAN, *DIFFUSERS_NAMES)))).removesuffix(".")


def read_adapter_config(path: Path, header: dict[str, str], parts: dict[str, Stored]) -> dict[str, object]:
    """PEFT's config: from the header, as diffusers writes it, or from beside the file; else alpha from the header."""
    place, peft = path.with_name("adapter_config.json"), any(name.startswith("base_model.") for name in parts)
    if said := header.get("lora_adapter_metadata"):
        with file_errors(path, "a file whose lora_adapter_metadata is JSON"):
            config = {name.removeprefix("transformer."): value for name, value in json.loads(said).items()}
    elif no_pointer(place).exists() and (peft or path.stem == "adapter_model"):
        config = read_config(place)
    else:
        config = {"lora_alpha": header[name] for name in sorted(header) if name.endswith("alpha")}  # noqa: B035
        if peft and not config and not any(name.endswith("alpha") for name in parts):
            warn(f"{path}: tells no alpha, nor does a file {place.name} beside it; alpha / rank is 1")
    fields = [f"{name}={value}" for name, value in config.items() if value]
    if changed := [field for field in fields if not re.fullmatch(PLAIN, field, re.DOTALL)]:
        raise UserError(f"{path}: its config says {changed[0]}: {NOT_READ}")
    return config


def scaling(path: Path, config: dict, layer: str, rank: int) -> float:
    """alpha / rank of a layer whose alpha is no tensor, as PEFT works it out; 1 if the config is empty."""
    layer, patterns = next(iter(rename({layer: None}, NOT_WAN))), config.get("alpha_pattern") or {}
    if not config.get("rank_pattern") and config.get("r", rank) != rank:
        raise UserError(f"{path}: {layer} has rank {rank}, its config says {config['r']}; give the config of this file")
    matching = [value for name, value in patterns.items() if re.fullmatch(rf"(.*\.)?({name})", layer)]
    alpha = [*matching, config.get("lora_alpha", 8 if "r" in config else rank)][0]  # 8 is PEFT's default
    with file_errors(f"{path}: alpha of {layer}", "a number"):
        return float(f"{alpha}") / (rank**0.5 if config.get("use_rslora") else rank)


def product(up: Stored, down: Stored) -> Stored:
    """B A as a weight. It has no weight's shape if they don't fit."""
    fits = up.shape[1:] == (*down.shape[:1], *[1] * (len(down.shape) - 2))
    shape = (*up.shape[:1], *down.shape[1:]) if fits else ()
    return Stored(shape, lambda: (up.read().float().flatten(1) @ down.read().float().flatten(1)).view(shape))


def add(target: Stored, change: Stored, factor: float) -> Tensor:
    return target.read().float() + factor * change.read().float()
