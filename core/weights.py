"""Weights on disk: this project's own files, and the layouts in which others publish theirs.

A file is read as a dict of tensors that stay on disk until asked for. `load` puts them into a network one by one, so
memory never holds more than the network and one tensor. Nothing but tensors and plain containers is unpickled.
"""

import json
import pickle
import re
import struct
import sys
import typing
import warnings
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from functools import partial
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import Tensor, nn

from core.config import UserError, reason
from core.files import atomic
from core.memory import Int8Linear, use_int8
from core.parallel import fast_bfloat16


@dataclass(frozen=True)
class Stored:
    """A tensor on disk."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_safetensors(path: Path, tensors: dict[str, Tensor], header: dict[str, str], dtype=torch.bfloat16) -> None:
    """Write tensors, all in one dtype, and a header."""
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    with atomic(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, header)
        except safetensors.SafetensorError as error:
            raise OSError(reason(error)) from None


def save_network(path: Path, network: str, config, tensors: dict[str, Tensor], dtype=torch.bfloat16) -> None:
    """Write a safetensors file whose header names the network and its config."""
    write_safetensors(path, tensors, {"network": network, "config": json.dumps(asdict(config))}, dtype)


def read_network(path: Path | str, network: str, *shapes: type) -> tuple[Any, dict[str, Stored]]:
    """The config and tensors of a file written by `save_network`. UserError for any other file or network."""
    header, tensors = read_safetensors(path)
    if header.get("network") != network:
        raise UserError(f"{path}: holds a {header.get('network', 'network of unknown kind')}, expected a {network}")
    try:
        config = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(header["config"]).items()}
    except (KeyError, ValueError, AttributeError):
        config = {}
    for shape in shapes:  # the first that the config fits; an older file may lack fields that have a default
        types, optional = typing.get_type_hints(shape), {f.name: f.default for f in fields(shape)}
        values = {name: value for name, value in (optional | config).items() if value is not MISSING}
        if values.keys() == types.keys() and all(is_a(value, types[name]) for name, value in values.items()):
            return shape(**config), tensors
    raise UserError(f"{path}: its header has no config of a {network}; get the file again")


def is_a(value: object, kind: Any) -> bool:
    """Whether a value is of the type of a config's field."""
    origin = typing.get_origin(kind)
    return value in typing.get_args(kind) if origin is typing.Literal else type(value) is (origin or kind)


def read_safetensors(path: Path | str) -> tuple[dict[str, str], dict[str, Stored]]:
    """The header and tensors of a safetensors file."""

    def read(name: str) -> Tensor:  # opens the file again: an open one keeps in memory what was read from it
        with safetensors.safe_open(path, "pt") as file:
            return file.get_tensor(name)

    try:
        with safetensors.safe_open(path, "pt") as file:
            shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            header = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path") from None
    except (safetensors.SafetensorError, OSError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); get it again") from None
    return header, {name: Stored(shape, partial(read, name)) for name, shape in shapes.items()}


def read_folder(folder: Path, stem: str) -> dict[str, Stored]:
    """The tensors in `stem.safetensors`, in the shards listed by `stem.safetensors.index.json`, or in all shards."""
    index = folder / f"{stem}.safetensors.index.json"
    if not index.exists():
        shards = sorted(folder.glob(f"{stem}-*.safetensors")) or [folder / f"{stem}.safetensors"]
        return {name: tensor for shard in shards for name, tensor in read_safetensors(shard)[1].items()}
    shards = read_config(index, "weight_map")["weight_map"]
    files = {shard: read_safetensors(folder / shard)[1] for shard in sorted(set(shards.values()))}
    if absent := sorted(name for name, shard in shards.items() if name not in files[shard]):
        raise UserError(f"{index}: lists tensors that its shards lack: {brief(absent)}")
    return {name: tensor for tensors in files.values() for name, tensor in tensors.items()}


def unpickle(path: Path | str, mmap: bool = False) -> object:
    """Read a `torch.save` file. UnpicklingError if it is garbled or holds more than tensors and plain containers."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about old file formats
            return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError, struct.error) as error:
        raise pickle.UnpicklingError(f"garbled: {error}") from None


def split_key(text: Path | str) -> tuple[Path, str]:
    """ "file.pt:key" -> the file, and which of its networks is meant ("" if it isn't said)."""
    path, _, key = str(text).rpartition(":")
    return (Path(path), key) if path and not Path(text).exists() and Path(path).exists() else (Path(text), "")


def read_checkpoint(path: Path | str, key: str = "", keys: Sequence[str] = ()) -> dict[str, Stored]:
    """The tensors of a `torch.save` file: a dict of them, or the one in it under `key`, else under the first of `keys`.

    Where several of `keys` are there, a line on stderr says which is read.
    """

    def read(key: str) -> object:  # reads the file again, as above
        whole = unpickle(path, zipfile.is_zipfile(path))
        return whole.get(key) if key and isinstance(whole, dict) else whole

    try:
        tensors = read(key)
        if isinstance(tensors, dict) and not key and (held := [k for k in keys if isinstance(tensors.get(k), dict)]):
            key, tensors = held[0], tensors[held[0]]
            if len(held) > 1:
                says = f"holds {', '.join(held)}; {key} is taken ({path}:{held[1]} for another)"
                print(f"{path}: {says}", file=sys.stderr)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path") from None
    except pickle.UnpicklingError:
        says = "holds more than tensors, code perhaps, or is garbled, so it is not opened"
        raise UserError(f"{path}: {says}; give another file") from None
    except (RuntimeError, EOFError, OSError) as error:
        raise UserError(f"{path}: not a readable checkpoint ({reason(error)}); get it again") from None
    fine = isinstance(tensors, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items())
    if not fine or not tensors:
        raise UserError(f"{path}: no dict of tensors{f' under the key {key!r}' if key else ''}")
    return {n: Stored(tuple(t.shape), lambda n=n: read(key)[n]) for n, t in tensors.items()}


def read_config(path: Path, *fields: str) -> dict:
    """The JSON object in a file. UserError if there is none, or if it lacks one of the fields."""
    try:
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; give the folder as it was published") from None
    except ValueError as error:
        raise UserError(f"{path}: not JSON ({error})") from None
    if not isinstance(config, dict):
        raise UserError(f"{path}: not a JSON object")
    if missing := [name for name in fields if name not in config]:
        raise UserError(f"{path}: fields are missing: {', '.join(missing)}; give the folder as it was published")
    return config


def rename(tensors: dict[str, Any], table: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Apply every (pattern, replacement) of the table to every name, in order."""
    for pattern, replacement in table:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


def brief(names: Sequence[str], most: int = 8) -> str:
    """The first names, and how many more there are."""
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def load(
    build: Callable[[], nn.Module], tensors: dict[str, Stored], path: Path | str, dtype: torch.dtype = torch.float32,
    shapes_only: bool = False,
) -> nn.Module:  # fmt: skip
    """Build a network on the meta device and fill it tensor by tensor. UserError if a name or shape doesn't match.

    Parameters get `dtype`, but those that match the network's regex `float32` stay in float32. With int8, linear layers
    inside the blocks are quantised; other parameters get the faster of bfloat16 and float32. `shapes_only`: the network
    stays on the meta device; another process reads the weights and hands them on.
    """
    with torch.device("meta"):
        network = build()
    own = network.state_dict()
    wrong = [
        f"{name} is {list(tensors[name].shape)}, expected {list(own[name].shape)}"
        for name in sorted(own.keys() & tensors.keys())
        if tuple(own[name].shape) != tensors[name].shape
    ]
    missing, unexpected = sorted(own.keys() - tensors.keys()), sorted(tensors.keys() - own.keys())
    problems = {"missing": missing, "unexpected": unexpected, "wrong shape": wrong}
    if found := "; ".join(f"{problem}: {brief(names)}" for problem, names in problems.items() if names):
        raise UserError(f"{path}: {found}")
    if dtype == torch.int8:
        use_int8(network)
        fast = torch.cuda.is_available() or fast_bfloat16(torch.device("cpu"))
        dtype = torch.bfloat16 if fast else torch.float32
    for name in own:
        parent, _, leaf = name.rpartition(".")
        module, kept = network.get_submodule(parent), re.search(getattr(network, "float32", "$^"), name)
        tensor = own[name] if shapes_only else tensors[name].read()
        if not shapes_only and tensor.is_floating_point() and not tensor.to(torch.float32).isfinite().all():
            raise UserError(f"{path}: {name} holds values that are no finite numbers; get the file again")
        tensor = tensor.to(torch.float32 if kept else dtype, copy=True)
        if isinstance(module, Int8Linear) and leaf == "weight":
            module.fill(tensor)
        else:  # not strict, because it gets one tensor at a time; names and shapes were checked above
            module.load_state_dict({leaf: tensor}, strict=False, assign=True)
    return network
