"""The wan5b commands on GPUs that are not there, for the tests; and the table of what they need of memory, beside what
two small runs take:

    python -m tests.rehearse --out results/rehearsed.json

Tensors have shapes and devices but no numbers (torch's FakeTensorMode), and collectives arrive at once (its `fake`
process group). The scripts' own `main` runs so at full size, as rank 0, and torch's MemTracker counts every live byte.
What meets a tensor of another device stops it, and so does anything that would wait for a number.
"""

import contextlib
import os
import re
import socket
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, product
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

import adapter as adapters
import discriminator as discriminators
import distill_fast
import finetune_hybrid
import flow
import sample
import train_slow_adapter
from core import parallel, runs
from core.codec import Batch
from core.config import run_script
from core.files import output_path
from core.memory import peak_memory, reset_peak, use_int8
from core.tables import markdown, provenance, write_rows
from model import PRESETS, VideoDiT, rotary_table
from tools import batch
from wan import umt5
from wan.codec import WanCodec
from wan.vae import WanVAE

GPU = torch.device("cuda", 0)


class Quiet(contextlib.nullcontext):
    """Stands for a stream or an event: what is called on it does nothing."""

    def __init__(self, *_: object, **__: object):
        super().__init__()

    def __getattr__(self, name: str):
        return Quiet


def apply(module: nn.Module, function, recurse: bool = True) -> nn.Module:
    """`nn.Module._apply` with new parameters: the tracker holds the old ones, so torch would refuse to swap them."""
    for child in module.children():
        child._apply(function)
    for held in (module._parameters, module._buffers):
        for name, tensor in held.items():
            if tensor is not None:
                new = function(tensor.detach())
                held[name] = nn.Parameter(new, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else new
    return module


def flash(q: Tensor, k: Tensor, v: Tensor, *_: object, **__: object) -> Tensor:
    """Attention on GPUs: torch would ask one which kernel it has. No network here masks anything."""
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v)[0]


make_subclass, to = torch.Tensor._make_subclass, torch.Tensor.to


def on_meta(*args: object, dispatch_device: bool = False, **options: object) -> Tensor:
    """A fake tensor is on a GPU for Python and on the meta device for C++, where autograd asks no GPU for streams."""
    return make_subclass(*args, **options)


def to_device(tensor: Tensor, *args: object, **options: object) -> Tensor:
    """`Tensor.to`, which would copy what is on its GPU already. The meta device too stands for that GPU."""
    if args and isinstance(args[0], Tensor):
        args = (args[0].device, args[0].dtype, *args[1:])
    where = options.pop("device", None)
    if args and isinstance(args[0], str | torch.device):
        where, *args = args
    if where is not None and torch.device(where).type == "meta":
        where = GPU
    if where is not None and torch.device(where) != tensor.device:
        args, tensor.constant = (where, *args), None  # a number that was known would be copied to a true GPU
    return to(tensor, *args, **options) if args or options else tensor


class Factories(TorchDispatchMode):
    """Puts what C++ makes like such a tensor, zeros for a gradient say, on the GPU."""

    def __torch_dispatch__(self, function, types, args=(), options=None):
        options = dict(options or {})
        if options.get("device") == torch.device("meta"):
            options["device"] = GPU
        return function(*args, **options)


class Autocast(TorchFunctionMode):
    """Autocast on GPUs, of which C++ sees none: `short` functions in bfloat16, `long` ones in float32."""

    # From torch's lists (ATen/autocast_mode.h), what can be called here.
    short = ("linear", "conv2d", "conv3d", "matmul", "mm", "bmm", "addmm", "baddbmm", "scaled_dot_product_attention")
    long = ("layer_norm", "rms_norm", "group_norm", "softmax", "log_softmax", "exp", "log", "pow", "rsqrt", "sum",
            "reciprocal", "softplus", "mse_loss", "l1_loss")  # fmt: skip

    def __init__(self):
        super().__init__()
        self.kept: dict[int, Tensor] = {}  # trained weights are cast once, until the outermost autocast ends

    def __torch_function__(self, function, types, args=(), options=None):
        name = getattr(function, "__name__", "").strip("_")
        dtype = torch.bfloat16 if name in self.short else torch.float32 if name in self.long else None
        if dtype is not None and torch.is_autocast_enabled("cuda"):
            args = [self.cast(value, dtype) for value in args]
            options = {name: self.cast(value, dtype) for name, value in (options or {}).items()}
        return function(*args, **(options or {}))

    def cast(self, value: object, dtype: torch.dtype) -> object:
        if not isinstance(value, Tensor) or not value.is_floating_point() or value.dtype == dtype:
            return value
        if not (dtype == torch.bfloat16 and value.is_leaf and value.requires_grad):
            return value.to(dtype)
        if id(value) not in self.kept:
            self.kept[id(value)] = value.to(dtype)
        return self.kept[id(value)]


def backward(loss: Tensor) -> None:
    """`Tensor.backward`, which would leave `Autocast` behind, and then recompute without it."""
    ones = (torch.ones_like(loss),)
    torch.autograd.graph._engine_run_backward(
        (loss,), ones, False, False, (), allow_unreachable=True, accumulate_grad=True
    )


@contextlib.contextmanager
def patched(patches: list[tuple[object, str, object]]) -> Iterator[None]:
    """Inside, attributes of objects are replaced."""
    with contextlib.ExitStack() as stack:
        for patch in patches:
            stack.enter_context(mock.patch.object(*patch))
        yield


@contextlib.contextmanager
def pretend_gpus(world: int = 1) -> Iterator[None]:
    """Inside, this is rank 0 of `world` processes, each with a GPU, in nodes of 8."""
    import torch._dynamo  # lists torch's functions: before any is replaced
    from torch._subclasses.fake_tensor import FakeTensorMode
    from torch.distributed.fsdp._fully_shard._fsdp_param_group import FSDPParamGroup
    from torch.testing._internal.distributed.fake_pg import FakeStore

    places = {"RANK": 0, "WORLD_SIZE": world, "LOCAL_RANK": 0, "LOCAL_WORLD_SIZE": min(world, 8)}
    places |= {"MASTER_ADDR": "localhost", "MASTER_PORT": 1}
    environment = {name: str(value) for name, value in places.items()} if world > 1 else {}
    init, new_group, casts = dist.init_process_group, dist.new_group, Autocast()
    init_processes = _disable_current_modes()(parallel.init_processes)  # the mesh looks at its own numbers
    patches = [
        (torch.cuda, "is_available", lambda: True), (torch.cuda, "is_bf16_supported", lambda *_: True),
        (torch.cuda, "current_device", lambda: 0), (torch.cuda, "device_count", lambda: 8),
        *((torch.cuda, name, Quiet) for name in ("Stream", "stream", "current_stream", "Event")),
        (torch.accelerator, "current_stream", Quiet), (torch, "clear_autocast_cache", casts.kept.clear),
        (torch.cuda, "set_device", Quiet), (torch.cuda, "empty_cache", Quiet),
        (torch.Tensor, "record_stream", Quiet), (torch.Tensor, "pin_memory", lambda tensor: tensor),
        (torch.Tensor, "_make_subclass", on_meta), (torch.Tensor, "to", to_device),
        (torch.Tensor, "backward", backward),
        (torch.Tensor, "__int__", lambda tensor: 0 if tensor.device.type == "cpu" else tensor.item()),
        (FSDPParamGroup, "_validate_no_meta_params", Quiet), (nn.Module, "_apply", apply),
        (dist, "init_process_group", lambda *_, **__: init("fake", store=FakeStore(), rank=0, world_size=world)),
        (dist, "new_group", lambda *_, **__: new_group(backend="fake")),
        (dist.distributed_c10d, "_get_pg_default_device", lambda: GPU),
        (torch.nn.functional, "scaled_dot_product_attention", flash), (parallel, "init_processes", init_processes),
        (parallel.Processes, "gather", lambda _, own: own),
    ]  # fmt: skip
    with patched(patches), mock.patch.dict(os.environ, environment), FakeTensorMode(), Factories(), casts:
        rotary_table.cache_clear()
        try:
            yield
        finally:
            rotary_table.cache_clear()  # no fake table must be found later
            if dist.is_initialized():
                dist.destroy_process_group()


def peak(tracker) -> float:
    """Most bytes of the GPU so far, in GB."""
    snapshot = tracker.get_tracker_snapshot("peak")
    return sum(kinds["Total"] for device, kinds in snapshot.items() if device.type != "cpu") / 1e9


GRID = (31, 44, 80)  # of the latents of 121 frames of 704x1280


class Clips:
    """In the place of prepared clips, whose latents have this grid."""

    def __init__(self, grid: tuple[int, int, int]):
        self.grid = grid

    def batch(self, samples: list[int], kind: str | None = None, *_: object, **__: object) -> Batch:
        shape = (len(samples), 48, *self.grid)
        return Batch(torch.randn(shape), torch.randn(len(samples), 512, 4096), torch.randn(shape) if kind else None)

    def unconditional(self) -> Tensor:
        return torch.randn(1, 512, 4096)


def new_tracker():
    """torch's tracker of memory, for frozen networks too."""
    from torch.distributed._tools.mem_tracker import MemTracker

    tracker = MemTracker()
    tracker._mod_tracker = Quiet()  # it counts by module, but wants every parameter to learn
    return tracker


def cast(network: nn.Module, dtype: torch.dtype) -> nn.Module:
    """A network with its parameters in the dtypes that `load` gives them."""
    if dtype == torch.int8:
        use_int8(network)
        dtype = torch.bfloat16
    for name, p in network.named_parameters():
        p.data = p.data.to(torch.float32 if re.search(getattr(network, "float32", "$^"), name) else dtype)
    return network


def reading(kind: str, layers: int, script: object, always: torch.dtype | None = None) -> list[tuple]:
    """Patches by which a script makes networks with so many blocks instead of reading them. `always`: a dtype."""
    shape = replace(PRESETS["wan5b"], layers=layers)
    light = replace(adapters.PRESETS["wan5b"], layers=layers)

    def read(path: str, network: str, dtype: torch.dtype = torch.float32, *_: object, **__: object) -> VideoDiT:
        return cast(VideoDiT(shape), always or dtype)

    def read_adapter(path: str, network: str, dtype: torch.dtype = torch.float32, **_: object) -> adapters.Adapter:
        heavy = adapters.ControlNetConfig(**vars(shape))
        return adapters.ResNetAdapter(light) if kind == "resnet" else cast(adapters.ControlNetAdapter(heavy), dtype)

    return [
        (VideoDiT, "from_pretrained", read), (WanVAE, "from_pretrained", lambda _: WanVAE()),
        *((module, "read_adapter", read_adapter) for module in (adapters, script) if hasattr(module, "read_adapter")),
        (adapters, "PRESETS", {"wan5b": light}), (WanCodec, "_part", lambda *_: "absent"),
    ]  # fmt: skip


STAGES = {"1": train_slow_adapter, "2": distill_fast, "3": finetune_hybrid}


def rehearse_stage(
    stage: str, kind: str, world: int, sequence: int, layers: int, grid: tuple[int, int, int] = GRID,
    resident: object = None, **more: object,
) -> dict[str, float]:  # fmt: skip
    """Peak GB of each part of a stage's first cycle on rank 0, with so many blocks: step to export.

    `resident`: a Resident, to measure. This is then one of torchrun's processes on a CPU, and all of it is real.
    """
    script, always = STAGES[stage], torch.float32 if more.get("dtype") == "float32" else None
    judge = replace(discriminators.PRESETS["wan5b"], feature_blocks=tuple(range(layers))[-3:])
    networks, prepare, begin, schedule = [], parallel.prepare, runs.Run.__init__, flow.sigma_schedule
    tracker, peaks = resident or new_tracker(), {}

    def ends(part: str) -> None:
        """The peak since the last part's end is this part's."""
        peaks[part] = max(peaks.get(part, 0), peak(tracker))
        tracker._peak_mem.clear()

    def keep(network: nn.Module, *args: object) -> nn.Module:
        networks.append(prepare(network, *args))
        return networks[-1]

    def start_run(run: runs.Run, folder: str, config: object, procs: parallel.Processes, parts: dict) -> None:
        tracker.track_external(*networks, *(list(ema.average.values()) for _, _, ema in parts.values() if ema))
        stack.enter_context(tracker)  # building is over
        begin(run, folder, config, procs, parts)

    def save(run: runs.Run, *_: object, **__: object) -> None:
        ends("step")
        run.state()
        ends("checkpoint")

    def decode_video(codec: WanCodec, latents: Tensor) -> Tensor:
        ends("samples")
        if "decode" in peaks:
            return latents  # one video shows what decoding takes; `small_frames` looks at none
        video = decode(codec, latents[:, :, :3])  # later pieces take no more
        ends("decode")
        return video

    options = {"preset": "wan5b", "data": "clips", "steps": 1, "compile": False, "sequence": sequence}
    options |= {"batch": 2 * world // sequence}  # from the second micro-batch on, gradients lie there from the first
    options |= {"kind": kind} if stage == "1" else {"ratio": 1}
    decode = WanCodec.decode_video
    patches = [
        *reading(kind, layers, script, always), (parallel, "prepare", keep),
        (discriminators, "PRESETS", {"wan5b": judge}), (runs, "save_network", Quiet), (runs.Run, "save", save),
        (script, "training_data", lambda *_: (Clips(grid), Clips(grid))), (runs, "write_image", Quiet),
        (runs.Run, "__init__", start_run), (runs.Run, "resume", lambda run: 0), (runs.Run, "check_finite", Quiet),
        (runs, "small_frames", lambda video: np.zeros((9, 16, 16, 3), np.uint8)), (runs, "write_video", Quiet),
        (flow, "sigma_schedule", lambda steps, shift: schedule(min(steps, 2), shift)),
        (flow, "FAST", {"wan5b": flow.Sampling(2, 5.0)}), (WanCodec, "decode_video", decode_video),
        (adapters.ResNetAdapter, "fit", Quiet),
    ]  # fmt: skip
    pretended = contextlib.nullcontext() if resident else pretend_gpus(world)
    with (
        tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), pretended, patched(patches),
        contextlib.ExitStack() as stack,
    ):  # fmt: skip
        script.main(replace(script.WAN5B, **options | more))
        ends("export")
    return peaks


def rehearse_sample(mode: str, kind: str, layers: int, videos: int = 1) -> dict[str, float]:
    """Peak GB of each part of sample.py, with so many blocks: one video, or a table of them with --batch."""
    from transformers import AutoTokenizer, BatchEncoding, UMT5Config, UMT5EncoderModel

    tracker, peaks, pieces = new_tracker(), {}, WanCodec.pieces

    @contextlib.contextmanager
    def clock(part: str) -> Iterator[None]:
        tracker._peak_mem.clear()
        yield
        if tracker._peak_mem and not part.startswith("read"):  # what is read is at work later
            peaks[part] = max(peaks.get(part, 0), peak(tracker))

    def text_encoder(_: object, dtype: torch.dtype) -> nn.Module:
        return cast(UMT5EncoderModel(UMT5Config(**umt5.UMT5_XXL)).encoder, dtype).eval()

    def tokenize(prompts: list[str], **_: object) -> BatchEncoding:
        whole = torch.ones(len(prompts), 512, dtype=torch.long)  # as long as can be
        return BatchEncoding({"input_ids": whole, "attention_mask": whole})

    def condition(*_: object, **__: object) -> sample.Condition:
        video = torch.empty(3, 9, 704, 1280)  # the VAE's later pieces take no more, either way
        return sample.Condition(video[None, :, :1], mock.Mock(maps=lambda *_: video, unmasked=[]), None)

    def encode_video(codec: WanCodec, video: Tensor) -> Tensor:
        return torch.empty(1, 48, 1 if codec.vae.encode(video).shape[2] == 1 else GRID[0], *GRID[1:])

    options = {"preset": "wan5b", "memory": mode, "steps": 1, "compile": False, "prompt": "a cat"}
    patches = [
        (sample, "find_networks", lambda _: ("", "")), (sample, "read_maps", lambda *_: "outline"),
        (sample, "read_condition", condition), (sample, "check_fit", Quiet),
        (batch, "read_jobs", lambda _: [{"out": f"{n}.mp4"} for n in range(videos)]),
        *reading(kind, layers, sample), (sample, "write_video", Quiet), (sample, "draw_overlay", Quiet),
        (umt5, "read_text_encoder", text_encoder), (AutoTokenizer, "from_pretrained", lambda _: tokenize),
        (WanCodec, "encode_video", encode_video), (sample.memory, "Clock", lambda _: clock),
        (WanCodec, "pieces", lambda codec, latents, procs: pieces(codec, latents[:, :, :3], procs)),
        (sample, "to_uint8", lambda _: np.zeros((1, 8, 8, 3))), (torch.Tensor, "isfinite", lambda _: np.array(True)),
        (sample, "sdpa_kernel", lambda *_, **__: contextlib.nullcontext()),
    ]  # fmt: skip
    options |= {"batch": "jobs.csv"} if videos > 1 else {}
    with pretend_gpus(), patched(patches), tracker, contextlib.redirect_stdout(None):
        sample.main(replace(sample.WAN5B, **options))
    return peaks


# Stage, adapter, GPUs, GPUs that share a video: what docs/SCALE.md names.
CASES = [
    (stage, kind, world, sequence)
    for stage, kind in (("1", "resnet"), ("1", "controlnet"), ("2", "none"), ("3", "resnet"), ("3", "controlnet"))
    for world, sequence in ((1, 1), (4, 1), (4, 4), (8, 1), (8, 8), (16, 1))
]


def extrapolate(peaks: Callable[[int], dict[str, float]], layers: tuple[int, int]) -> dict[str, float]:
    """Peaks with all blocks, from those with two small numbers of blocks: memory is linear in the number."""
    few, more = map(peaks, layers)
    steps = (PRESETS["wan5b"].layers - layers[0]) / (layers[1] - layers[0])
    return {part: few[part] + steps * (more[part] - few[part]) for part in few}


def rehearsed(layers: tuple[int, int] = (5, 6), cases: list = CASES) -> Iterator[dict]:
    """Rows of the memory table: a stage's highest peak, and that of each part of making a video."""
    for case in cases:
        peaks = extrapolate(partial(rehearse_stage, *case), layers)
        most = max(peaks, key=peaks.get)
        about = dict(zip(("stage", "adapter", "GPUs", "sequence"), case, strict=True))
        yield about | {"GB": round(peaks[most], 1), "peak_at": most, "measured_GB": None}
    for mode, (kind, videos) in product(("low", "high"), (("resnet", 1), ("controlnet", 1), ("resnet", 2))):
        peaks = extrapolate(lambda n: rehearse_sample(mode, kind, n, videos), layers)
        about = {"stage": f"sample, {mode}{', a table of videos' if videos > 1 else ''}", "adapter": kind}
        for part, most in peaks.items():
            yield about | {"GPUs": 1, "sequence": 1, "GB": round(most, 1), "peak_at": part, "measured_GB": None}


class Resident:
    """In the place of torch's tracker, where tensors are real: the memory of this process since now."""

    def __init__(self):
        self.before = int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        self._peak_mem = self  # which `rehearse_stage` clears between parts

    def track_external(self, *_: object) -> None:
        reset_peak(torch.device("cpu"))

    clear = __enter__ = __exit__ = track_external

    def get_tracker_snapshot(self, _: str) -> dict:
        return {GPU: {"Total": peak_memory(torch.device("cpu")) * 2**30 - self.before}}


# What two processes of a machine with 24 GB can run, with two blocks: stage, adapter, grid.
SMALL = (("1", "controlnet", (4, 16, 32)), ("2", "none", (2, 16, 16)))


def resident(stage: str, kind: str, grid: tuple[int, int, int], port: int, rank: int) -> float:
    """GB that a stage's step takes in this process, one of two on a CPU."""
    places = {"RANK": rank, "WORLD_SIZE": 2, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
    os.environ |= {name: str(value) for name, value in places.items()} | {"MASTER_ADDR": "127.0.0.1"}
    try:
        return rehearse_stage(stage, kind, 2, 1, 2, grid, Resident(), dtype="float32", sample_every=0)["step"]
    finally:
        dist.destroy_process_group()


def measured() -> Iterator[dict]:
    """Rows of steps that two processes of this machine really take, with true widths and two blocks."""
    for stage, kind, grid in SMALL:
        counted = rehearse_stage(stage, kind, 2, 1, 2, grid, dtype="float32", sample_every=0)["step"]
        with socket.create_server(("127.0.0.1", 0)) as server:
            port = server.getsockname()[1]
        # What is freed goes back to the system at once, and so counts no more.
        environment = {"MALLOC_MMAP_THRESHOLD_": "4194304", "OMP_NUM_THREADS": "1"}
        with mock.patch.dict(os.environ, environment), ProcessPoolExecutor(2, get_context("spawn")) as pool:
            held = list(pool.map(partial(resident, stage, kind, grid, port), range(2)))
        about = {"stage": f"{stage}, two blocks on CPUs", "adapter": kind, "GPUs": 0, "sequence": 1}
        yield about | {"GB": round(counted, 2), "peak_at": "step", "measured_GB": round(max(held), 2)}


@dataclass(frozen=True)
class Config:
    out: str = "out/rehearsed.json"  # rows; the table goes beside it


def main(cfg: Config) -> None:
    out, table = output_path(cfg.out, ".json"), []
    for row in chain(rehearsed(), measured()):
        print(row, file=sys.stderr, flush=True)
        table.append(row | provenance("-m tests.rehearse", cfg, torch.device("cpu")))
        write_rows(out, table)
    print(markdown(table))


if __name__ == "__main__":
    run_script(main, Config)
