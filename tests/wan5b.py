"""Write a folder of random weights, of the true size and in the layout of Wan2.2-TI2V-5B as published.

    python tests/wan5b.py out/Wan2.2-TI2V-5B           # 35 GB on disk
    python sample.py --preset wan5b --weights out/Wan2.2-TI2V-5B --generator out/Wan2.2-TI2V-5B \\
        --size 256x256 --frames 9

The transformer in float32 shards with their index, the VAE and UMT5-XXL as .pth files, a tokenizer of letters, and an
adapter for the few-step sampler in this project's own format. The video is noise; the path to it is the real one.
"""

import json
import math
import sys
from pathlib import Path

import torch
from huggingface_hub import split_torch_state_dict_into_shards
from safetensors.torch import save_file
from test_wan_codec import wan_name, write_tokenizer  # it brings conftest, which puts the project on the path
from torch import Tensor, nn

import adapter as adapters
import model
from core.weights import save_network
from wan.umt5 import UMT5_XXL
from wan.vae import WanVAE

SHARD = 5 << 30  # bytes


def random(name: str, like: Tensor, dtype: torch.dtype, draw: torch.Generator) -> Tensor:
    """Weights that keep activations of order 1: gains of 1, biases of 0, matrices by their fan-in."""
    if like.ndim == 1 or "gamma" in name:
        return torch.full(like.shape, float("norm" in name or "gamma" in name), dtype=dtype)
    fan_in = 1 if "embedding.weight" in name and "patch" not in name else math.prod(like.shape[1:])
    return torch.randn(like.shape, generator=draw, dtype=dtype) * fan_in**-0.5


def weights(build, dtype: torch.dtype, draw: torch.Generator):
    """(name, random tensor) for every parameter of the network that `build` makes."""
    with torch.device("meta"):
        network: nn.Module = build()
    for name, like in network.state_dict().items():
        yield name, random(name, like, dtype, draw)


def write_transformer(folder: Path, draw: torch.Generator) -> None:
    """A shard after the other: the whole does not fit into memory beside them."""
    (folder / "config.json").write_text('{"_class_name": "WanModel"}')
    with torch.device("meta"):
        empty = model.VideoDiT(model.PRESETS["wan5b"]).state_dict()
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    plan = split_torch_state_dict_into_shards(empty, filename_pattern=pattern, max_shard_size=SHARD)
    for file, names in plan.filename_to_tensors.items():
        shard = {name: random(name, empty[name], torch.float32, draw) for name in names}
        save_file(shard, folder / file, {"format": "pt"})
    index = {"metadata": plan.metadata, "weight_map": plan.tensor_to_filename}
    (folder / "diffusion_pytorch_model.safetensors.index.json").write_text(json.dumps(index))


def main(folder: Path) -> None:
    from transformers import UMT5Config, UMT5EncoderModel

    folder.mkdir(parents=True)
    draw = torch.Generator().manual_seed(0)
    write_transformer(folder, draw)
    torch.save(dict(weights(WanVAE, torch.float32, draw)), folder / "Wan2.2_VAE.pth")
    umt5 = weights(lambda: UMT5EncoderModel(UMT5Config(**UMT5_XXL)), torch.bfloat16, draw)
    encoder = {wan_name(name): tensor for name, tensor in umt5 if name != "encoder.embed_tokens.weight"}
    torch.save(encoder, folder / "models_t5_umt5-xxl-enc-bf16.pth")
    write_tokenizer(folder / "google/umt5-xxl")
    config = adapters.PRESETS["wan5b"]
    adapter = dict(weights(lambda: adapters.ResNetAdapter(config), torch.float32, draw))
    save_network(folder / "fast_adapter.safetensors", "FastAdapter", config, adapter)


if __name__ == "__main__":
    if len(sys.argv) != 2 or sys.argv[1].startswith("-"):
        sys.exit(f"{__doc__}\nGive the folder to write, which must not exist yet.")
    main(Path(sys.argv[1]))
