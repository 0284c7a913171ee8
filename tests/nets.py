"""Small networks with random weights, files of them, and a watch on the calls of a function."""

from dataclasses import replace
from pathlib import Path

import torch

import discriminator
from adapter import AdapterConfig, ResNetAdapter
from core.weights import save_network
from model import PRESETS, VideoDiT

SHAPE = replace(PRESETS["small"], dim=32, ffn_dim=64, heads=2, layers=2)
LIGHT = AdapterConfig(32, 2, hidden=16, channels=24)
JUDGE = replace(discriminator.PRESETS["small"], dim=32, feature_blocks=(0, 1), hidden=32, position_dim=16)  # of SHAPE
VIDEOS = {"size": (32, 32), "frames": 3}  # of the small world, for runs where their size does not matter


def generator(std: float = 0.02, **changes) -> VideoDiT:
    """Its head is not zero, as it would be at first: so it predicts something."""
    network = VideoDiT(replace(SHAPE, **changes))
    torch.nn.init.normal_(network.head.head.weight, std=std)
    return network


def adapter(**changes) -> ResNetAdapter:
    return ResNetAdapter(replace(LIGHT, **changes))


def save(folder: Path = Path(), **networks: torch.nn.Module) -> dict[str, str]:
    """save(slow_generator=network) writes a SlowGenerator into slow_generator.safetensors. Returns the files' paths."""
    files = {name: folder / f"{name}.safetensors" for name in networks}
    for name, network in networks.items():
        save_network(files[name], name.title().replace("_", ""), network.config, network.state_dict())
    return {name: str(file) for name, file in files.items()}


def of_stage_3(folder: Path = Path()) -> dict[str, str]:
    """Files of what stage 3 starts from, by its options, for a classifier of JUDGE."""
    files = save(folder, slow_generator=generator(), slow_adapter=adapter(maps="pixels"), fast_generator=generator())
    return dict(zip(("backbone", "adapter", "generator"), files.values(), strict=True))


def lands_on(c):
    """The velocity at which equation (3) of flow.py gives c."""
    return lambda x, t: (x - c) / (t[:, None, :, None, None] / 1000).clamp_min(1e-9)


def watch(monkeypatch, owner: object, name: str, see=lambda *args, **_: args, after=None) -> list:
    """What `see` says of each call from now on, or `after` of what it returns. The function works as before."""
    seen, function = [], getattr(owner, name)

    def watched(*args, **named):
        if not after:
            seen.append(see(*args, **named))
        result = function(*args, **named)
        if after:
            seen.append(after(result))
        return result

    monkeypatch.setattr(owner, name, watched)
    return seen
