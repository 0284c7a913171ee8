"""Weights on disk: this project's own files, and the layouts in which others publish theirs.

A file is read as a dict of tensors that stay on disk until asked for. `load` puts them into a network one by one, so
memory never holds more than the network and one tensor. Nothing but tensors and plain containers is unpickled.
"""

import contextlib
import csv
import json
import pickle
import re
import struct
import warnings
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, get_args, get_origin, get_type_hints

import safetensors.torch
import torch
from torch import Tensor, nn

from core.config import UserError, reason, require, warn
from core.files import atomic, no_pointer
from core.memory import Int8Linear, shortage, use_int8
from core.parallel import fast_bfloat16
from core.record import READ


class Stored(NamedTuple):
    """A tensor on disk."""

    shape: tuple[int, ...]
    read: Callable[[], Tensor]


def write_safetensors(path: Path, tensors: dict[str, Tensor], header: dict, dtype=torch.bfloat16, sums=False) -> None:
    """Write tensors, all in one dtype, and a header. `sums`: it gets their checksums, as core/record.py says."""
    tensors = {name: tensor.to("cpu", dtype).contiguous() for name, tensor in tensors.items()}
    if sums:
        header = header | {"sums": json.dumps({name: crc(tensor) for name, tensor in tensors.items()})}
    with atomic(path) as temporary:
        try:
            safetensors.torch.save_file(tensors, temporary, header)
        except safetensors.SafetensorError as error:
            raise OSError(reason(error)) from None


def crc(tensor: Tensor) -> int:
    """Of a contiguous tensor's bytes."""
    return zlib.crc32(tensor.view(torch.uint8).numpy())


def save_network(path: Path, network: str, config, tensors: dict[str, Tensor], dtype=torch.bfloat16) -> None:
    """Write a safetensors file whose header names the network and its config."""
    write_safetensors(path, tensors, {"network": network, "config": json.dumps(vars(config))}, dtype)


def read_network(path: Path | str, network: str, *shapes: type) -> tuple[Any, dict[str, Stored]]:
    """The config and tensors of a file written by `save_network`. UserError for any other file or network.

    `shapes`: dataclasses, of which the config is made into the first that has its fields. Older files may lack some.
    """
    header, tensors = read_safetensors(path)
    if header.get("network") != network:
        raise UserError(f"{path}: holds a {header.get('network', 'network of unknown kind')}, expected a {network}")
    for shape in shapes:
        with contextlib.suppress(KeyError, ValueError, AttributeError, TypeError):  # of another shape, or no config
            values = {k: tuple(v) if isinstance(v, list) else v for k, v in json.loads(header["config"]).items()}
            config = shape(**values)
            fields = ((getattr(config, name), kind) for name, kind in get_type_hints(shape).items())
            if all(value in get_args(kind) or type(value) is (get_origin(kind) or kind) for value, kind in fields):
                return config, tensors
    raise UserError(f"{path}: its header has no config of a {network}; get the file again")


@contextlib.contextmanager
def file_errors(path: Path | str, wanted: str, mend: str = "get it again") -> Iterator[None]:
    """What libraries raise while they read a file becomes a UserError. `wanted`: what the file should be."""
    no_pointer(path)
    try:
        yield
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; correct the path") from None
    except pickle.UnpicklingError:
        raise UserError(f"{path}: holds more than tensors, code perhaps, or is garbled; give another file") from None
    except (safetensors.SafetensorError, csv.Error, RuntimeError, ValueError, EOFError, OSError) as error:
        if shortage(error):
            raise
        raise UserError(f"{path}: not {wanted} ({reason(error)}); {mend}") from None


def read_safetensors(path: Path | str) -> tuple[dict[str, str], dict[str, Stored]]:
    """The header and tensors of a safetensors file. Reading a tensor that has a checksum compares it."""
    READ[Path(path)] = None

    def read(name: str) -> Tensor:  # opens the file again: an open one keeps in memory what was read from it
        with safetensors.safe_open(path, "pt") as file:
            tensor = file.get_tensor(name)
        mend = "delete this file, and run the command that made it again"
        require(name not in sums or crc(tensor) == sums[name], f"{path}: {name} isn't what was written there; {mend}")
        return tensor

    with file_errors(path, "a readable safetensors file"), safetensors.safe_open(path, "pt") as file:
        shapes = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
        header = file.metadata() or {}
        sums = json.loads(header.get("sums", "{}"))
    return header, {name: Stored(shape, partial(read, name)) for name, shape in shapes.items()}


def read_folder(folder: Path, stem: str) -> dict[str, Stored]:
    """The tensors in `stem.safetensors`, in the shards listed by `stem.safetensors.index.json`, or in all shards."""
    shards = sorted(folder.glob(f"{stem}-*.safetensors")) or [folder / f"{stem}.safetensors"]
    if (index := folder / f"{stem}.safetensors.index.json").exists():
        shards = sorted({folder / name for name in read_config(index, "weight_map")["weight_map"].values()})
    return {name: tensor for shard in shards for name, tensor in read_safetensors(shard)[1].items()}


def unpickle(path: Path | str) -> object:
    """What a `torch.save` file holds, left on disk if it can be. UnpicklingError if garbled, or more than tensors."""
    try:
        with warnings.catch_warnings(action="ignore"):  # about old file formats
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except (ArithmeticError, AttributeError, LookupError, MemoryError, TypeError, ValueError, struct.error) as error:
        raise pickle.UnpicklingError(f"garbled: {error}") from None


def split_key(text: Path | str) -> tuple[Path, str]:
    """ "file.pt:key" -> the file, and which of its networks is meant ("" if it isn't said)."""
    path, _, key = str(text).rpartition(":")
    return (Path(path), key) if path and not Path(text).exists() and no_pointer(path).exists() else (Path(text), "")


def read_checkpoint(path: Path | str, key: str = "", keys: Sequence[str] = ()) -> dict[str, Stored]:
    """The tensors of a `torch.save` file: a dict of them, or that in it under `key`, else under the first of `keys`."""
    READ[Path(path)] = None
    with file_errors(path, "a readable checkpoint"):
        tensors = unpickle(path)
    if isinstance(tensors, dict):
        held = [key] if key else [name for name in keys if isinstance(tensors.get(name), dict)]
        if len(held) > 1:
            warn(f"{path}: holds {', '.join(held)}; {held[0]} is taken ({path}:{held[1]} for another)")
        tensors = tensors.get(held[0]) if held else tensors
    valid = isinstance(tensors, dict) and all(isinstance(n, str) and isinstance(t, Tensor) for n, t in tensors.items())
    require(valid and tensors, f"{path}: no dict of tensors{f' under the key {key!r}' if key else ''}")
    return {name: Stored(tuple(tensor.shape), lambda tensor=tensor: tensor) for name, tensor in tensors.items()}


def read_config(path: Path, *fields: str) -> dict:
    """The JSON object in a file. UserError if there is none, or if it lacks one of the fields."""
    with file_errors(path, "JSON"):
        config = json.loads(path.read_text(encoding="utf-8-sig"))
    require(isinstance(config, dict), f"{path}: not a JSON object")
    if missing := [name for name in fields if name not in config]:
        raise UserError(f"{path}: fields are missing: {', '.join(missing)}; give the folder as it was published")
    return config


def rename(tensors: dict[str, Any], table: Sequence[tuple[str, str]]) -> dict[str, Any]:
    """Apply every (pattern, replacement) of the table to every name, in order."""
    for pattern, replacement in table:
        tensors = {re.sub(pattern, replacement, name): tensor for name, tensor in tensors.items()}
    return tensors


def brief(names: Iterable[str]) -> str:
    """The first eight names in their order, and how many more there are."""
    names = sorted(names)
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def load(
    build: Callable[[], nn.Module], tensors: dict[str, Stored], path: Path | str, dtype=torch.float32, shapes_only=False
) -> nn.Module:
    """Build a network on the meta device and fill it tensor by tensor. UserError if a name or shape doesn't match.

    Parameters get `dtype`, but those that match the network's regex `float32` stay in float32. With int8, linear layers
    inside the blocks are quantised, and the rest has 16 bits where they are fast. `shapes_only`: all stays on meta.
    """
    with torch.device("meta"):
        network = build()
    own = network.state_dict()
    shapes = ((name, list(tensors[name].shape), list(own[name].shape)) for name in own.keys() & tensors.keys())
    wrong = [f"{name} is {shape}, expected {expected}" for name, shape, expected in shapes if shape != expected]
    problems = {"missing": own.keys() - tensors.keys(), "unexpected": tensors.keys() - own.keys(), "wrong shape": wrong}
    if found := "; ".join(f"{problem}: {brief(names)}" for problem, names in problems.items() if names):
        raise UserError(f"{path}: {found}")
    if dtype == torch.int8:
        use_int8(network)
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        dtype = torch.bfloat16 if fast_bfloat16(device) else torch.float32
    for name, empty in own.items():
        parent, _, leaf = name.rpartition(".")
        module, exact = network.get_submodule(parent), re.search(getattr(network, "float32", "$^"), name)
        tensor = empty if shapes_only else tensors[name].read()
        if not tensor.is_floating_point():
            raise UserError(f"{path}: {name} holds whole numbers, without a scale that is read; get it in 16 bits")
        if not tensor.is_meta and not tensor.float().isfinite().all():
            raise UserError(f"{path}: {name} holds values that are no finite numbers; get the file again")
        tensor = tensor.to(torch.float32 if exact else dtype, copy=True)
        if isinstance(module, Int8Linear) and leaf == "weight":
            module.fill(tensor)
        else:  # one tensor at a time: that none is missing was checked above
            module.load_state_dict({leaf: tensor}, strict=False, assign=True)
    return network
