"""Plumbing shared by the scripts: options, noise, files, pictures.

Nothing here knows about FlashMotion. A script is a frozen dataclass of options and a `main(cfg)`; `run_script` joins
them.
"""

import ast
import contextlib
import dataclasses
import inspect
import math
import os
import platform
import re
import sys
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor

# --- configs ----------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """The user's input is at fault. The message is one line that names the file, the field and the mend."""


def reason(error: BaseException) -> str:
    """The first line of what a library says went wrong, or the error's kind if it says nothing."""
    return next(iter(str(error).splitlines()), type(error).__name__)


def parse_config(config_class: type, argv: Sequence[str], presets: Mapping[str, dict] = {}):
    """`--lr 1e-4 --compile false` -> an instance of the frozen dataclass.

    `presets`: other defaults under another `--preset`.

    Raises UserError for an unknown flag (listing the known ones) or a value of the wrong type. `--help` prints every
    field with its default and the comment beside it in the source.
    """
    types = typing.get_type_hints(config_class)
    flags = ", ".join(f"--{name}" for name in types)
    values, rest = {}, list(argv)
    while rest:
        flag, given, inline = rest.pop(0).partition("=")
        if flag in ("-h", "--help"):
            print(help_text(config_class, presets))
            raise SystemExit(0)
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in types:
            raise UserError(f"unknown flag {flag}; the flags are {flags}")
        if types[name] is bool and not given and (not rest or rest[0].startswith("--")):
            given, inline = "=", "true"  # a switch may stand alone
        if not given and not rest:
            raise UserError(f"{flag} needs a value ({_describe(types[name])})")
        values[name] = _convert(flag, inline if given else rest.pop(0), types[name])
    return config_class(**presets.get(values.get("preset", ""), {}) | values)


def _describe(kind: type) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return "|".join(typing.get_args(kind))
    return {bool: "true|false"}.get(kind, kind.__name__)


def _convert(flag: str, text: str, kind: type):
    choices = {"true": True, "false": False} if kind is bool else {c: c for c in typing.get_args(kind)}
    try:
        value = choices[text] if choices else kind(text)
        if kind is float and not math.isfinite(value):
            raise ValueError
    except (KeyError, ValueError):
        raise UserError(f"{flag} {text}: not a valid value; it takes {_describe(kind)}") from None
    return value


def help_text(config_class: type, presets: Mapping[str, dict] = {}) -> str:
    """The module's docstring, then one line a field, then the defaults of the other presets."""
    comments = dict(re.findall(r"^    (\w+): [^#\n]*#\s*(.*)$", inspect.getsource(config_class), flags=re.MULTILINE))
    module = ast.get_docstring(ast.parse(Path(inspect.getfile(config_class)).read_text())) or ""
    types, lines = typing.get_type_hints(config_class), [module, "", "flags:"]
    for field in dataclasses.fields(config_class):
        default = str(field.default).lower() if types[field.name] is bool else field.default
        lines.append(f"  --{field.name} {_describe(types[field.name])} (default {default!s}): {comments[field.name]}")
    for preset, values in presets.items():
        lines += ["", f"defaults with --preset {preset}:", *(f"  --{name} {value}" for name, value in values.items())]
    return "\n".join(lines)


def run_script(
    main: Callable, config_class: type, *user_errors: type[Exception], presets: Mapping[str, dict] = {}
) -> None:
    """Parse the command line and call `main(cfg)`. User errors end as one line on stderr and exit status 2."""
    status = 0
    try:
        main(parse_config(config_class, sys.argv[1:], presets))
        if dist.is_initialized():
            dist.barrier()  # nobody leaves while another still talks
    except (UserError, *user_errors) as error:
        print(f"{Path(sys.argv[0]).name}: {error}", file=sys.stderr)
        status = 2
    finally:
        if parallel := dist.is_initialized():
            dist.destroy_process_group()
    if parallel:
        # Gloo's threads outlive their process group, and one that drops its last tensor while the interpreter shuts
        # down aborts the process. So there is no shutdown.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
    if status:
        sys.exit(status)


# --- randomness -------------------------------------------------------------------------------------------------------


def generator(*key: int) -> torch.Generator:
    """A CPU generator for this key. Randomness has no state to save: the same key gives the same numbers anywhere."""
    seed = np.random.SeedSequence([int(k) for k in key]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(seed) >> 1)


def sample_noise(shape: Sequence[int], samples: Sequence[int], *key: int) -> Tensor:
    """Gaussian noise [len(samples), *shape], each row seeded by its sample number, whichever rank draws it."""
    return torch.stack([torch.randn(*shape, generator=generator(*key, sample)) for sample in samples])


def step_noise(steps: int, shape: Sequence[int], samples: Sequence[int], *key: int) -> Tensor:
    """Fresh noise for each step of a sampler: [steps, len(samples), *shape], drawn as `sample_noise` draws."""
    return sample_noise((steps, *shape), samples, *key).transpose(0, 1)


def sample_uniform(samples: Sequence[int], batch: int, *key: int) -> Tensor:
    """One number in [0, 1) a sample, stratified: the i-th of a batch of n falls in [i/n, (i+1)/n)."""
    u = torch.cat([torch.rand(1, generator=generator(*key, sample, 1)) for sample in samples])
    return (torch.tensor([sample % batch for sample in samples]) + u) / batch


def output_path(text: str, suffix: str, flag: str = "out") -> Path:
    """A flag's value as a path, checked before any work is done: its ending, and that its folder is or can be made."""
    if Path(text).suffix != suffix:
        raise UserError(f"--{flag} {text}: the name must end in {suffix}")
    if suffix and Path(text).is_dir():
        raise UserError(f"--{flag} {text}: is a folder; give another name")
    nearest = next(folder for folder in Path(text).absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--{flag} {text}: {nearest} is no folder that can be written to")
    return Path(text)


@contextlib.contextmanager
def atomic(path: Path | str) -> Iterator[Path]:
    """Yields a temporary path beside `path`; renames it on success, removes it on any failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.stem}.tmp{os.getpid()}{path.suffix}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def provenance(script: str, config, device: torch.device) -> dict[str, str]:
    """The command that makes a result again, and the machine that made it."""
    values = [(field.name, getattr(config, field.name), field.default) for field in dataclasses.fields(config)]
    flags = [f" --{name} {str(v).lower() if isinstance(v, bool) else v}" for name, v, default in values if v != default]
    info = Path("/proc/cpuinfo")  # Linux only
    models = re.findall(r"model name\s*: (.+)", info.read_text()) if info.exists() else []
    if device.type == "cuda":
        models = [torch.cuda.get_device_name(device)]
    machine = f"{(models or [platform.machine()])[0]}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    return {"command": f"python {script}" + "".join(flags), "machine": machine}


# --- pictures ---------------------------------------------------------------------------------------------------------


def to_uint8(video: Tensor, scale: int = 1) -> np.ndarray:
    """[3, T, H, W] in [-1, 1] -> [T, scale H, scale W, 3] uint8, enlarged by repeating pixels."""
    frames = ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 3, 0).cpu().numpy()
    return frames.repeat(scale, axis=1).repeat(scale, axis=2)


def contact_sheet(rows: Sequence[np.ndarray], gap: int = 2) -> np.ndarray:
    """One row a video [T, H, W, 3], its frames from left to right."""
    border = ((0, gap), (0, gap), (0, 0))
    return np.concatenate(
        [np.concatenate([np.pad(f, border, constant_values=255) for f in row], axis=1) for row in rows], axis=0
    )


def write_video(path: Path | str, frames: np.ndarray, fps: int) -> None:
    """[T, H, W, 3] uint8 -> an h264 mp4 that plays anywhere."""
    with atomic(path) as temporary:
        iio.imwrite(temporary, frames, fps=fps, codec="libx264", macro_block_size=2, quality=9)


def write_animation(path: Path | str, frames: np.ndarray, fps: int) -> None:
    """[T, H, W, 3] uint8 -> a gif that plays for ever."""
    with atomic(path) as temporary:
        iio.imwrite(temporary, frames, plugin="pillow", duration=1000 / fps, loop=0)


def write_image(path: Path | str, image: np.ndarray) -> None:
    with atomic(path) as temporary:
        iio.imwrite(temporary, image)
