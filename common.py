"""Plumbing shared by the scripts: configs, processes and sharding, noise, checkpoints, logs, pictures.

Nothing here knows about FlashMotion. A script is a frozen dataclass of options and a `main(cfg)`; `run_script` joins
them.
"""

import ast
import contextlib
import dataclasses
import inspect
import json
import math
import os
import re
import resource
import shutil
import sys
import typing
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor

# --- configs ----------------------------------------------------------------------------------------------------------


class UserError(Exception):
    """The user's input is at fault. The message is one line that names the file, the field and the mend."""


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
        flag, _, inline = rest.pop(0).partition("=")
        if flag in ("-h", "--help"):
            print(help_text(config_class, presets))
            raise SystemExit(0)
        name = flag.removeprefix("--").replace("-", "_")
        if not flag.startswith("--") or name not in types:
            raise UserError(f"unknown flag {flag}; the flags are {flags}")
        if types[name] is bool and not inline and (not rest or rest[0].startswith("--")):
            inline = "true"  # a switch may stand alone
        if not inline and not rest:
            raise UserError(f"{flag} needs a value ({_describe(types[name])})")
        values[name] = _convert(flag, inline or rest.pop(0), types[name])
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


# --- processes and sharding -------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Processes:
    """Who this process is among those torchrun started (one, without torchrun)."""

    rank: int
    world: int
    device: torch.device
    mesh: DeviceMesh | None  # None for a single process

    def share(self, batch: int, accumulate: int, step: int) -> list[list[int]]:
        """This rank's sample numbers at a step, by micro-batch. The global batch is that of any number of ranks."""
        if batch % (self.world * accumulate):
            raise UserError(f"--batch {batch} does not divide into {self.world} processes x {accumulate} micro-batches")
        own = range(step * batch, (step + 1) * batch)[self.rank * batch // self.world :][: batch // self.world]
        size = len(own) // accumulate
        return [list(own[i * size : (i + 1) * size]) for i in range(accumulate)]

    def mean(self, value: Tensor) -> float:
        """Average of a scalar over all ranks."""
        value = value.detach().float().clone()
        if self.mesh is not None:
            dist.all_reduce(value)
        return value.item() / self.world

    def barrier(self) -> None:
        if self.mesh is not None:
            dist.barrier()


def init_processes() -> Processes:
    """Read torchrun's environment: nccl on GPUs, gloo on CPU, a (replicate, shard) mesh over several nodes."""
    kind = "cuda" if torch.cuda.is_available() else "cpu"
    if "RANK" not in os.environ:
        return Processes(0, 1, torch.device(kind), None)
    rank, world, local, local_world = (
        int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE")
    )
    device = torch.device(kind, local) if kind == "cuda" else torch.device("cpu")
    if kind == "cuda":
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if kind == "cuda" else "gloo")
    if world > local_world:  # shard within a node, replicate over nodes (HSDP)
        mesh = init_device_mesh(kind, (world // local_world, local_world), mesh_dim_names=("replicate", "shard"))
    else:
        mesh = init_device_mesh(kind, (world,), mesh_dim_names=("shard",))
    return Processes(rank, world, device, mesh)


def prepare(model: nn.Module, procs: Processes, compile: bool) -> nn.Module:
    """Move to the device, compile and shard, block by block. With one process nothing is sharded."""
    model.to(procs.device)
    # On CPU shards stay float32 and autocast computes in bf16; on GPUs bf16 is gathered and gradients reduce in
    # float32.
    on_gpu = procs.device.type == "cuda"
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32) if on_gpu else MixedPrecisionPolicy()
    for block in model.blocks:
        if compile:
            block.compile()
        if procs.mesh is not None:
            fully_shard(block, mesh=procs.mesh, mp_policy=policy)
    if procs.mesh is not None:
        fully_shard(model, mesh=procs.mesh, mp_policy=policy)
        warnings.filterwarnings("ignore", message="FSDP2-wrapped module")  # warns of in-place sums; there are none
    return model


def autocast(device: torch.device, dtype: str) -> contextlib.AbstractContextManager:
    """`dtype` is "bfloat16", "float32", or "auto": bfloat16 unless a CPU would have to emulate it."""
    if dtype == "auto":
        can = torch.cpu.get_capabilities()
        dtype = "bfloat16" if device.type == "cuda" or can.get("avx512_bf16") or can.get("amx_bf16") else "float32"
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")


def reset_peak(device: torch.device) -> None:
    """From here on `peak_memory` counts anew."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        Path("/proc/self/clear_refs").write_text("5")


def peak_memory(device: torch.device) -> float:
    """The most memory held since `reset_peak`, in GiB: a GPU's, or the process's resident set (elsewhere than on Linux
    since its start).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    if sys.platform == "linux":
        status = Path("/proc/self/status").read_text()
        return int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**30  # bytes on macOS


def full(tensor: Tensor) -> Tensor:
    """The whole of a sharded tensor (every rank must call), or the tensor itself."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


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


# --- runs: checkpoints, exports, logs ---------------------------------------------------------------------------------

Part = tuple[nn.Module, Sequence[torch.optim.Optimizer], Stateful | None]  # the last: its averages, if it has any


def _state(parts: dict[str, Part]) -> dict:
    state = {}
    for name, (model, optimizers, ema) in parts.items():
        weights, optim = get_state_dict(model, optimizers)
        state[name] = {"weights": weights, "optimizers": optim} | ({"ema": ema.state_dict()} if ema else {})
    return state


def save_checkpoint(run: Path, step: int, parts: dict[str, Part], procs: Processes, keep: int = 2) -> None:
    """Write `run/ckpt/step_00000500/` under a temporary name, fsync, rename; keep the last two.

    A kill at any moment leaves either the whole checkpoint or an ignored temporary folder.
    """
    folder, temporary = run / "ckpt" / f"step_{step:08d}", run / "ckpt" / f".step_{step:08d}.tmp"
    if procs.rank == 0:
        shutil.rmtree(temporary, ignore_errors=True)
        temporary.mkdir(parents=True)
    procs.barrier()
    _quiet_dcp(dcp.save, _state(parts), temporary, procs)  # each file is fsynced by the writer
    procs.barrier()
    if procs.rank == 0:
        _fsync_folder(temporary)
        shutil.rmtree(folder, ignore_errors=True)
        os.rename(temporary, folder)
        _fsync_folder(folder.parent)
        for old in checkpoints(run)[:-keep]:
            shutil.rmtree(old)
    procs.barrier()


def load_checkpoint(run: Path, parts: dict[str, Part], procs: Processes) -> int:
    """Fill the parts from the newest whole checkpoint and return its step, or 0 where there is none."""
    found = checkpoints(run)
    if not found:
        return 0
    state = _state(parts)
    try:
        _quiet_dcp(dcp.load, state, found[-1], procs)
    except (ValueError, RuntimeError, CheckpointException):  # another shape, or a missing name
        raise UserError(f"{found[-1]}: of a network of other shapes; give the run another --name") from None
    for name, (model, optimizers, ema) in parts.items():
        part = state[name]
        set_state_dict(model, optimizers, model_state_dict=part["weights"], optim_state_dict=part["optimizers"])
        if ema:
            ema.load_state_dict(part["ema"])
    return int(found[-1].name.removeprefix("step_"))


def _quiet_dcp(action: Callable, state: dict, folder: Path, procs: Processes) -> None:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what no_dist asks for
        action(state, checkpoint_id=folder, no_dist=procs.mesh is None)


def checkpoints(run: Path) -> list[Path]:
    """Whole checkpoints of a run, oldest first."""
    return sorted((run / "ckpt").glob("step_*"))


def _fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def output_path(text: str, suffix: str) -> Path:
    """`--out` as a path, checked before any work is done: its ending, and that its folder is or can be made."""
    if Path(text).suffix != suffix:
        raise UserError(f"--out {text}: the name must end in {suffix}")
    nearest = next(folder for folder in Path(text).absolute().parents if folder.exists())
    if not nearest.is_dir() or not os.access(nearest, os.W_OK):
        raise UserError(f"--out {text}: {nearest} is no folder that can be written to")
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


class Run:
    """`runs/<name>/`: config.json, log.jsonl, samples/, ckpt/. Only rank 0 writes."""

    def __init__(self, folder: Path | str, config, procs: Processes):
        self.folder, self.procs = Path(folder), procs
        if procs.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
            with atomic(self.folder / "config.json") as temporary:
                temporary.write_text(json.dumps(dataclasses.asdict(config), indent=1) + "\n")

    def rewind(self, step: int) -> None:
        """Drop log lines of steps that a resumed run will take again."""
        log = self.folder / "log.jsonl"
        if self.procs.rank == 0 and log.exists():
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]  # a kill may cut one
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            with atomic(log) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))

    def samples(self, step: int, videos: Sequence[Tensor]) -> None:
        """Videos [3, T, H, W] below one another as a contact sheet, and beside one another as an mp4."""
        if self.procs.rank == 0:
            frames = [to_uint8(video, scale=max(1, 96 // video.shape[-1])) for video in videos]
            write_image(self.folder / "samples" / f"step_{step:08d}.png", contact_sheet(frames))
            write_video(self.folder / "samples" / f"step_{step:08d}.mp4", np.concatenate(frames, axis=2), fps=8)

    def log(self, step: int, **values: float) -> None:
        if self.procs.rank == 0:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


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


def write_image(path: Path | str, image: np.ndarray) -> None:
    with atomic(path) as temporary:
        iio.imwrite(temporary, image)
