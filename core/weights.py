"""Weights on disk: this project's own files, and the layouts in which others publish theirs.

A file is a table of tensors that stay on disk until one is asked for; `load` puts them into a network one at a time, so
memory never holds more than the network and one tensor. Nothing is unpickled.
"""

import json
import pickle
import re
import struct
import typing
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from core.config import UserError, reason
from core.files import atomic
from core.memory import Int8Linear, use_int8


@dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_safetensors(
    path: Path, tensors: dict[str, Tensor], header: dict[str, str], dtype: torch.dtype = torch.bfloat16
) -> None:
    """Tensors in one type, and what the header says of them."""
    with atomic(path) as temporary:
        safetensors.torch.save_file({n: t.to("cpu", dtype).contiguous() for n, t in tensors.items()}, temporary, header)


def save_network(path: Path, network: str, config, tensors: dict[str, Tensor], dtype=torch.bfloat16) -> None:
    """One safetensors file that says in its header which network it holds and with which config."""
    write_safetensors(path, tensors, {"network": network, "config": json.dumps(asdict(config))}, dtype)


def read_network(path: Path | str, network: str, *shapes: type) -> tuple[Any, dict[str, Stored]]:
    """The config and tensors of a file written by `save_network`. UserError if it is none, or of another network.

    `shapes`: dataclasses of configs; the one whose fields and types the header has is made.
    """
    header, tensors = read_safetensors(path)
    if header.get("network") != network:
        raise UserError(f"{path}: holds a {header.get('network', 'network of unknown kind')}, expected a {network}")
    try:
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(header["config"]).items()}
    except (KeyError, ValueError, AttributeError):
        config = {}
    for shape in shapes:
        types = {name: typing.get_origin(kind) or kind for name, kind in typing.get_type_hints(shape).items()}
        if {name: type(value) for name, value in config.items()} == types:
            return shape(**config), tensors
    raise UserError(f"{path}: its header has no config of a {network}; get the file again")


def read_safetensors(path: Path | str) -> tuple[dict[str, str], dict[str, Stored]]:
    """A safetensors file's header and tensors."""

    def read(name: str) -> Tensor:
        # Opened anew for every tensor: an open file keeps in memory what was read of it.
        with safetensors.safe_open(path, "pt") as file:
            return file.get_tensor(name)

    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); get it again") from None
    return header, {name: Stored(shape, lambda name=name: read(name)) for name, shape in shapes.items()}


def read_folder(folder: Path, stem: str) -> dict[str, Stored]:
    """The tensors of `stem.safetensors`, or of the shards that `stem.safetensors.index.json` names."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        return read_safetensors(folder / f"{stem}.safetensors")[1]
    try:
        shards = json.loads(index.read_text())["weight_map"]
    except (ValueError, KeyError, TypeError):
        raise UserError(f"{index}: not a JSON object with a weight_map; get it again") from None
    files = {shard: read_safetensors(folder / shard)[1] for shard in sorted(set(shards.values()))}
    if absent := sorted(name for name, shard in shards.items() if name not in files[shard]):
        raise UserError(f"{index}: lists tensors that its shards lack: {brief(absent)}")
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def unpickle(path: Path | str, mmap: bool = False) -> object:
    """What `torch.save` wrote: tensors and plain containers alone. pickle.UnpicklingError if more, or garbled."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of the file's age
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError, struct.error) as error:
        raise pickle.UnpicklingError(f"garbled: {error}") from None


def read_checkpoint(path: Path | str, key: str = "", prefix: str = "") -> dict[str, Stored]:
    """The tensors of a `torch.save` file: a dict, or one in it under `key`. `prefix` is cut from their names."""

    def read() -> object:
        # Anew for every tensor, as above.
        whole = unpickle(path, zipfile.is_zipfile(path))
        return whole.get(key) if key and isinstance(whole, dict) else whole

    try:
        tensors = read()
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors, code perhaps, or is garbled; it is not opened") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({reason(error)}); get it again") from None
    fine = isinstance(tensors, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items())
    if not fine:
        raise UserError(f"{path}: no dict of tensors{f' under the key {key!r}' if key else ''}")
    return {n.removeprefix(prefix): Stored(tuple(t.shape), lambda n=n: read()[n]) for n, t in tensors.items()}


def read_config(path: Path) -> dict:
    """A JSON object. UserError if there is none."""
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder as it was published") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    return config


def rename(tensors: dict[str, Stored], table: Sequence[tuple[str, str]]) -> dict[str, Stored]:
    """Every (pattern, replacement) of the table applied to every name, in order."""

    def own(name: str) -> str:
        for theirs, ours in table:
            name = re.sub(theirs, ours, name)
        return name

    return {own(name): tensor for name, tensor in tensors.items()}


def brief(names: Sequence[str], most: int = 8) -> str:
    """The first of them, and how many more there are."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more


def load(
    build: Callable[[], nn.Module], tensors: dict[str, Stored], path: Path | str, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """The network that `build` makes, with these weights: built on the meta device, filled tensor by tensor.

    `dtype` is that of all parameters but those whose names its class attribute `float32` finds; int8 is that of the
    linear layers inside the blocks, and the rest is bfloat16. Every name and shape must match, or one UserError lists
    what does not.
    """
    with torch.device("meta"):
        network = build()
    own = network.state_dict()
    missing, extra = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    wrong = [
        f"{n} is {list(tensors[n].shape)}, expected {list(own[n].shape)}"
        for n in sorted(own.keys() & tensors.keys())
        if tuple(own[n].shape) != tensors[n].shape
    ]
    problems = [f"{what}: {brief(names)}" for what, names in
                (("missing", missing), ("unexpected", extra), ("wrong shape", wrong)) if names]  # fmt: skip
    if problems:
        raise UserError(f"{path}: {'; '.join(problems)}")
    kept = re.compile(getattr(network, "float32", "$^"))
    if dtype == torch.int8:
        use_int8(network.blocks)
        dtype = torch.bfloat16
    for name in own:
        path_to, _, leaf = name.rpartition(".")
        module, tensor = network.get_submodule(path_to), tensors[name].read()
        tensor = tensor.to(torch.float32 if kept.search(name) else dtype, copy=True)
        if isinstance(module, Int8Linear) and leaf == "weight":
            module.fill(tensor)
        else:
            # Not strict, for its other tensors have turns of their own; that all names and shapes fit is checked above.
            module.load_state_dict({leaf: tensor}, strict=False, assign=True)
    return network
