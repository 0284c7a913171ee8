"""A training run on disk: `runs/<name>/` holds config.json, log.jsonl, samples/ and ckpt/."""

import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from datetime import timedelta
from pathlib import Path
from statistics import fmean

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict

from core import parallel
from core.codec import Codec
from core.config import ROOT, UserError, reason, require, warn
from core.files import NOT_OURS, atomic, write_text
from core.media import contact_sheet, ffmpeg_version, to_uint8, write_image, write_video
from core.memory import fetch, peak_memory
from core.optim import EMA
from core.parallel import Processes, autocast, full
from core.record import READ, checksum, lock
from core.weights import read_config, save_network

Part = tuple[nn.Module, Sequence, EMA | None]  # a network, its optimizers, its EMA if it has one
KEEP = 2  # how many checkpoints
LOG_EVERY = 20  # steps
# Options that may change when a run resumes: how it is computed and shown. Its result changes by rounding at most.
FREE = ["dtype", "compile", "recompute", "sequence", "accumulate", "save_every", "sample_every", "wandb"]


def start_processes(config, heads: int = 0) -> Processes:
    """torchrun's processes. UserError if the batch doesn't divide among them."""
    procs = parallel.init_processes(getattr(config, "sequence", 1), heads)
    procs.share(config.batch, getattr(config, "accumulate", 1), 0)
    READ.clear()  # what is opened from here on is the run's
    ffmpeg_version()  # samples need it
    return procs


def unreached(config: dict) -> list[str]:
    """What a run of so few steps can't come to, a line for each."""
    begin, steps = config.get("diffusion_first", 0) + config.get("adapter_start", 0), config["steps"]
    never = (
        ("mask_steps", "sees no boxes", config.get("mask_steps", 0) >= steps),
        ("warmup", "never has its full learning rate", config.get("warmup", 0) >= steps - begin),
        ("ratio", "ends before it has taught anything", steps - steps % config.get("ratio", 1) <= begin),
    )
    return [f"--steps {steps}: with {n} {config[n]} this run {what}" for n, what, so in never if so and n in config]


def due(step: int, every: int, steps: int) -> bool:
    """Whether something is due after this step: every so many steps (0: never), and after the last one."""
    return every > 0 and (step % every == 0 or step == steps)


class Run:
    """A training run's folder. Every rank must call; rank 0 writes everything but the other ranks' shards."""

    def __init__(self, folder: Path | str, config, procs: Processes, parts: dict[str, Part]):
        self.folder, self.procs, self.parts = Path(folder), procs, parts
        fix = "is a folder under runs/; give a name, or several with / between them"
        require(not {"", ".", ".."} & set(config.name.split("/")), f"--name {config.name}: {fix}")
        self.config = {  # files that come with the project have one name, wherever the command is run
            name: value.removeprefix(f"{ROOT}{os.sep}") if isinstance(value, str) else value
            for name, value in vars(config).items()
        }
        if procs.rank == 0:
            lock(folder)
            for line in unreached(self.config):
                warn(line)
        # Checksums of the weights and data that were opened for it; rank 0 opens all.
        made_of = [(str(file).removeprefix(f"{ROOT}{os.sep}"), checksum(file)) for file in READ if procs.rank == 0]
        self.made_of = dict(procs.gather(made_of))
        self.saving = None  # the Future of a checkpoint that is being written, and its temporary folder
        self.unchecked: list[tuple[int, dict[str, Callable[[], Tensor]]]] = []  # values of the last steps
        self.printed = time.perf_counter(), 0  # when the last line was, and of which step
        self.wandb = None
        # Checkpoint writers communicate from a thread of their own, at the same time as the training's collectives.
        self.writers = dist.new_group(backend="gloo") if procs.mesh else None
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # one process needs none

    def state(self) -> dict:
        """All that a run needs to go on."""
        state = {}
        for name, (model, optimizers, ema) in self.parts.items():
            fresh = [optimizer for optimizer in optimizers if not optimizer.state]
            weights, optim = get_state_dict(model, optimizers)
            for kept in (kept for optimizer in fresh for kept in optimizer.state.values() if "step" in kept):
                kept["step"].zero_()  # `get_state_dict` makes fresh optimizers take a step without gradients
            state[name] = {"weights": weights, "optimizers": optim} | ({"ema": ema.average} if ema else {})
        return state

    def save(self, step: int) -> None:
        """Write `ckpt/step_00000500/`. Returns once all is copied to memory; after the last step, once written."""
        self.check_finite(all_steps=True)
        self.finish_saving()  # one at a time
        temporary = self.folder / "ckpt" / f".step_{step:08d}.tmp"
        if self.procs.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
        self.procs.barrier()
        self.saving = dcp.async_save(self.state(), checkpoint_id=temporary, process_group=self.writers), temporary
        if step == self.config["steps"]:
            self.finish_saving()
            if self.wandb:
                self.wandb.finish()

    def finish_saving(self) -> None:
        """Wait for the checkpoint being written, rename it, delete old ones. UserError if it can't be written."""
        if self.saving is None:
            return
        (written, temporary), self.saving = self.saving, None
        try:
            written.result()  # on rank 0 this waits for all ranks
            if self.procs.rank == 0:
                write_text(temporary / "config.json", json.dumps(self.config | {"made_of": self.made_of}, indent=1))
                temporary.rename(temporary.parent / temporary.stem[1:])  # only now, so that a kill leaves no half one
                for old in self.checkpoints()[:-KEEP]:
                    shutil.rmtree(old)
        except (UserError, OSError, RuntimeError, dcp.CheckpointException) as error:
            if self.procs.rank == 0:
                shutil.rmtree(temporary, ignore_errors=True)
            cause = next((first for first, _ in getattr(error, "failures", {}).values()), error)
            while cause.__context__:  # torch's complaint about the file hides what the system said
                cause = cause.__context__
            fix = "once that is fixed, run the same command again"
            raise UserError(f"{temporary.parent}: a checkpoint can't be written ({reason(cause)}); {fix}") from None

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first. What else a user keeps beside them is not ours."""
        return sorted(p for p in (self.folder / "ckpt").glob("step_*") if re.fullmatch(r"step_\d{8}", p.name))

    def resume(self) -> int:
        """Load the newest checkpoint; its step, or 0. UserError if the run began with other options or files."""
        found, step, options, log = self.checkpoints(), 0, self.folder / "config.json", self.folder / "log.jsonl"
        if found:
            before, fix = read_config(record := found[-1] / "config.json"), "give the run another --name"
            for name, now in self.config.items():
                if name not in FREE and before.get(name, now) != now:
                    fix += " (or, if it is a file that moved, correct this one)"
                    raise UserError(f"{record}: the run began with {name} {before[name]!r}; with {now!r} {fix}")
            files = before.get("made_of", self.made_of)
            if files != self.made_of and [*files.values()] != [*self.made_of.values()]:  # they may have been moved
                other = next(name for name in files | self.made_of if files.get(name) != self.made_of.get(name))
                raise UserError(f"{record}: the run began with another {other}; bring that back, or {fix}")
            self.load(found[-1])
            step = int(found[-1].name.removeprefix("step_"))
        elif finished := sorted(self.folder.glob("*.safetensors")):
            raise UserError(f"{finished[0]}: of a run whose checkpoints are gone; move it, or give another --name")
        elif options.exists() and "save_every" not in read_config(options):  # which every run has
            raise UserError(f"{options}: {NOT_OURS}")
        if self.procs.rank == 0:
            write_text(options, json.dumps(self.config, indent=1))
            lines = re.findall(rb".*\n", log.read_bytes()) if log.exists() else []  # a kill may have cut the last one
            kept = [line for line in lines if not (at := re.match(rb'{"step": (\d+)', line)) or int(at[1]) <= step]
            with atomic(log) as temporary:
                temporary.write_bytes(b"".join(kept))
            if self.config.get("wandb"):
                self.wandb = start_wandb(self.folder, self.config)
        self.printed = time.perf_counter(), step
        return step

    def load(self, checkpoint: Path) -> None:
        """Fill networks, optimizers and averages. UserError if the checkpoint is damaged or of other networks."""
        state = self.state()
        try:
            if not (checkpoint / ".metadata").exists():
                raise ValueError("torch would log a traceback")
            dcp.load(state, checkpoint_id=checkpoint)  # averages are loaded in place
        except (ValueError, RuntimeError, dcp.CheckpointException):  # wrong shapes, missing names or files
            fix = "delete it, or give the run another --name"
            raise UserError(f"{checkpoint}: damaged, or of networks of other shapes; {fix}") from None
        for part, (model, optimizers, _) in zip(state.values(), self.parts.values(), strict=True):
            set_state_dict(model, optimizers, model_state_dict=part["weights"], optim_state_dict=part["optimizers"])

    def samples(self, step: int, videos: Iterable[Tensor]) -> None:
        """Write videos [3, T, H, W], of which rank 0 takes one at a time: nine frames of each, and an mp4 of all."""
        if self.procs.rank == 0:
            frames = list(map(small_frames, videos))
            picked = np.linspace(0, len(frames[0]) - 1, min(9, len(frames[0]))).round().astype(int)
            path = self.folder / "samples" / f"step_{step:08d}"
            write_image(path.with_suffix(".png"), contact_sheet([video[picked] for video in frames]))
            write_video(path.with_suffix(".mp4"), np.concatenate(frames, axis=2), fps=8)
        self.procs.barrier()

    def write_samples(self, step: int, codec: Codec, source, make: Callable, kind: str | None = None) -> None:
        """Four held-out clips of `source`: the truth, and the latents that `make(batch, [number])` lists, in turn."""
        self.check_finite(all_steps=True)
        self.finish_saving()  # whatever goes wrong with samples, no training is lost
        latents = []
        with torch.no_grad(), autocast(self.procs.device, self.config["dtype"]):
            for number in range(4):
                batch = source.batch([number], kind).to(self.procs.device)
                latents += [batch.x0, *make(batch, [number])]
        self.samples(step, (codec.decode_video(z)[0] for z in latents))
        codec.free()

    def export(self, name: str, network: nn.Module, ema: EMA | None) -> None:
        """Write a network's weights, averaged if there is an average, as runs/<name>/slow_adapter.safetensors."""
        weights = ema.average if ema else dict(network.named_parameters())
        gathered = ((n, full(tensor)) for n, tensor in weights.items())  # one by one: rank 0 alone keeps them
        whole = {n: tensor.cpu() for n, tensor in gathered if self.procs.rank == 0} | dict(network.named_buffers())
        if self.procs.rank == 0:
            save_network(self.folder / f"{name}.safetensors", name.title().replace("_", ""), network.config, whole)

    def check_finite(self, all_steps: bool) -> None:
        """UserError if a step gave a loss or gradient that is not finite; nothing of it has been saved."""
        while len(self.unchecked) > (not all_steps):  # else without the last one, on which a GPU may still be at work
            step, values = self.unchecked.pop(0)
            if wrong := [name for name, read in values.items() if not read().isfinite().all()]:
                self.finish_saving()
                good = [f"{path} is the last good checkpoint" for path in self.checkpoints()] or ["nothing was saved"]
                failure = f"step {step}: {wrong[0]} is not a finite number"
                raise UserError(f"{self.folder}: {failure}; {good[-1]}; lower the learning rate")

    def log(self, step: int, **values: Tensor | float) -> None:
        """What a step gave, averaged over ranks; written every LOG_EVERY steps. Every rank must call."""
        self.unchecked.append((step, {name: fetch(torch.as_tensor(value).detach()) for name, value in values.items()}))
        if step % LOG_EVERY == 0:
            everywhere = self.procs.gather([{name: float(value) for name, value in values.items()}])
            numbers = {name: fmean(own[name] for own in everywhere) for name in values}
            if self.procs.rank == 0 and all(map(math.isfinite, numbers.values())):
                self.write(step, numbers)
        self.check_finite(all_steps=self.procs.device.type == "cpu")
        if self.saving and self.saving[0].done():
            self.finish_saving()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """A line in log.jsonl, and one to read, with speed, memory and the time that is left."""
        log = self.folder / "log.jsonl"
        try:
            with log.open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **numbers}) + "\n")
        except OSError as error:  # a full disk's names no file
            raise UserError(f"{log}: can't be written ({reason(error)})") from None
        if self.wandb:
            self.wandb.log(numbers, step=step)
        total, (then, before), self.printed = self.config["steps"], self.printed, (time.perf_counter(), step)
        seconds = (self.printed[0] - then) / max(1, step - before)
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        speed = f"{seconds:.2f} s/step  {self.config['batch'] / seconds:.1f} videos/s"
        memory, left = peak_memory(self.procs.device), timedelta(seconds=round(seconds * (total - step)))
        print(f"step {step}/{total}  {shown}  {speed}  {memory:.1f} GiB  {left} left", flush=True)


def start_wandb(folder: Path, config: dict):
    """A run on Weights & Biases, in the project that --wandb names. UserError if that package can't be used."""
    try:
        import wandb  # no requirement of this project

        return wandb.init(project=config["wandb"], name=config["name"], config=config, dir=folder)
    except ImportError:
        raise UserError("--wandb: the package is missing; pip install wandb") from None
    except wandb.Error as error:
        raise UserError(f"--wandb {config['wandb']}: {reason(error)}") from None


def small_frames(video: Tensor) -> np.ndarray:
    """A video [3, T, H, W] as samples show it, uint8 [T, height, width, 3]."""
    height, width = video.shape[-2:]
    thin, scale = max(1, width // 256), max(1, 96 // width)  # shrink large videos, enlarge small ones
    even = (..., *(slice(0, n // (2 * thin) * 2 * thin, thin) for n in (height, width)))  # mp4 needs even sides
    return to_uint8(video[even], scale)
