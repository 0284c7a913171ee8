"""A training run on disk: `runs/<name>/` holds config.json, log.jsonl, samples/ and ckpt/.

Checkpoints are copied to host memory and written in the background, under a temporary name that is renamed once
everything is on disk. So a run killed at any moment leaves only whole checkpoints.
"""

import dataclasses
import json
import math
import os
import re
import shutil
import time
import warnings
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from core.codec import Batch, Codec
from core.config import ROOT, UserError, reason
from core.files import atomic, write_text
from core.media import contact_sheet, to_uint8, write_image, write_video
from core.memory import fetch, peak_memory
from core.parallel import Processes, autocast
from core.weights import read_config

Part = tuple[nn.Module, Sequence, Stateful | None]  # a network, its optimizers, its EMA if it has one
KEEP = 2  # how many checkpoints
# Options that may change when a run resumes: how it is computed and shown. Its result changes by rounding at most.
FREE = ("dtype", "compile", "recompute", "sequence", "accumulate", "log_every", "save_every", "sample_every")

COUNTS = ("steps", "batch", "ratio", "denoising_steps", "log_every", "save_every", "shard")
MAY_BE_0 = (
    "accumulate", "sample_every", "warmup", "mask_steps", "seed", "lr", "fake_lr", "classifier_lr", "weight_decay",
)  # fmt: skip
SHARES = ("sparse", "drop_text", "ema", "judge_sigma_min", "judge_sigma_max")
# The least and the greatest that an option may be.
RANGES = {
    **dict.fromkeys(COUNTS, (1, math.inf)),
    **dict.fromkeys(MAY_BE_0, (0, math.inf)),
    **dict.fromkeys(SHARES, (0, 1)),
    "shift": (0.01, math.inf),
}


def check_options(config) -> None:
    """UserError if the run's name can't be one, or if a number is out of its range."""
    name = getattr(config, "name", "run")
    if {"", ".", ".."} & set(name.split("/")):
        raise UserError(f"--name {name}: is a folder under runs/; give a name, or several with / between them")
    for name, (least, most) in RANGES.items():
        if not least <= getattr(config, name, least) <= most:
            within = f"at least {least}" if most == math.inf else f"from {least} to {most}"
            raise UserError(f"--{name} {getattr(config, name)}: {within}")


def due(step: int, every: int, start: int, last: bool) -> bool:
    """Whether to do, before this step, what is done every so many steps and after the last, but not at the start.

    With `every` 0, never.
    """
    return every > 0 and (last or (step % every == 0 and step > start))


class Run:
    """A training run's folder. Every rank must call; rank 0 writes everything but the other ranks' shards."""

    def __init__(self, folder: Path | str, config, procs: Processes, parts: dict[str, Part]):
        self.folder, self.procs, self.parts = Path(folder), procs, parts
        self.config = {  # files that come with the project have one name, wherever the command is run
            name: value.removeprefix(f"{ROOT}{os.sep}") if isinstance(value, str) else value
            for name, value in dataclasses.asdict(config).items()
        }
        self.writer, self.written = ThreadPoolExecutor(1), Future()
        self.written.set_result(None)
        self.unseen: list[tuple[int, dict[str, Callable[[], Tensor]]]] = []  # what the last steps gave
        self.alone = procs.mesh is None
        # Checkpoint writers communicate from a thread of their own, at the same time as the training's collectives.
        self.writers = None if self.alone else dist.new_group(backend="gloo")
        if self.alone:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # as no_dist asks
        if procs.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.began, self.told = time.perf_counter(), 0  # when the last line was printed, and of which step

    def state(self) -> dict:
        """All that a run needs to go on."""
        state = {}
        for name, (model, optimizers, ema) in self.parts.items():
            fresh = [optimizer for optimizer in optimizers if not optimizer.state]
            weights, optim = get_state_dict(model, optimizers)
            # It makes a fresh optimizer's state by a step without gradients, which must not count.
            for kept in (kept for optimizer in fresh for kept in optimizer.state.values() if "step" in kept):
                kept["step"].zero_()
            state[name] = {"weights": weights, "optimizers": optim} | ({"ema": ema.state_dict()} if ema else {})
        return state

    def save(self, step: int, wait: bool = False) -> None:
        """Write `ckpt/step_00000500/`. Returns once everything is copied to memory or, with `wait`, is on disk."""
        self.check_finite(all_steps=True)
        self.settle()  # one at a time
        folder, temporary = self.folder / "ckpt" / f"step_{step:08d}", self.folder / "ckpt" / f".step_{step:08d}.tmp"
        if folder.exists():  # a finished run that was started again
            return
        if self.procs.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.procs.barrier()
        saved = dcp.async_save(self.state(), checkpoint_id=temporary, process_group=self.writers, no_dist=self.alone)
        self.written = self.writer.submit(self.publish, saved, temporary, folder)
        if wait:
            self.settle()
            self.procs.barrier()

    def settle(self) -> None:
        """Wait for the checkpoint that is being written. UserError if it can't be."""
        try:
            self.written.result()
        except (OSError, RuntimeError, CheckpointException) as error:
            failures = getattr(error, "failures", {})
            cause = next((first for first, _ in failures.values()), error)
            for left in (self.folder / "ckpt").glob(".step_*.tmp") if self.procs.rank == 0 else ():
                shutil.rmtree(left, ignore_errors=True)
            fix = "make room and run the same command again"
            raise UserError(f"{self.folder / 'ckpt'}: a checkpoint can't be written ({reason(cause)}); {fix}") from None

    def publish(self, saved: Future, temporary: Path, folder: Path) -> None:
        """Rename a checkpoint once it is on disk (the writers fsync their files), and delete old ones."""
        saved.result()  # on rank 0 this waits for all ranks
        if self.procs.rank == 0:
            fsync_folder(temporary)
            os.rename(temporary, folder)
            fsync_folder(folder.parent)
            for old in self.checkpoints()[:-KEEP]:
                shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first. What else a user keeps beside them is not ours."""
        return sorted(p for p in (self.folder / "ckpt").glob("step_*") if re.fullmatch(r"step_\d{8}", p.name))

    def resume(self) -> int:
        """Load the newest checkpoint. Returns its step, or 0. UserError if the run was started with other options."""
        found, step, options = self.checkpoints(), 0, self.folder / "config.json"
        if found:
            before = read_config(options) if options.exists() else {}
            for name, now in self.config.items():
                if name not in FREE and before.get(name, now) != now:
                    fix = f"with {now} give the run another --name (or, if it is a file that moved, correct this one)"
                    began = f"without --{name}" if before[name] == "" else f"with --{name} {before[name]}"
                    raise UserError(f"{options}: the run began {began}; {fix}")
            state, index = self.state(), found[-1] / ".metadata"
            try:
                if not index.exists() or not index.stat().st_size:
                    raise ValueError(f"{index}: missing or empty")
                dcp.load(state, checkpoint_id=found[-1], no_dist=self.alone)
            except (ValueError, RuntimeError, CheckpointException):  # wrong shapes, missing names or files
                fix = "delete it, or give the run another --name"
                raise UserError(f"{found[-1]}: damaged, or of networks of other shapes; {fix}") from None
            for name, (model, optimizers, ema) in self.parts.items():
                part = state[name]
                set_state_dict(model, optimizers, model_state_dict=part["weights"], optim_state_dict=part["optimizers"])
                if ema:
                    ema.load_state_dict(part["ema"])
            step = self.told = int(found[-1].name.removeprefix("step_"))
        log = self.folder / "log.jsonl"
        if self.procs.rank == 0:
            write_text(options, json.dumps(self.config, indent=1))
        if self.procs.rank == 0 and log.exists():
            kind = {"encoding": "utf-8", "errors": "surrogateescape"}  # whatever somebody else wrote there stays
            lines = log.read_text(**kind).splitlines(keepends=True)
            if lines and not lines[-1].endswith("\n"):  # cut by a kill
                del lines[-1]
            with atomic(log) as temporary:  # without the steps that will be repeated
                temporary.write_text("".join(line for line in lines if logged_step(line) <= step), **kind)
        return step

    def samples(self, step: int, videos: Iterable[Tensor]) -> None:
        """Write videos [3, T, H, W] as a contact sheet of nine frames each, and side by side as an mp4.

        They are asked for one by one, by rank 0 alone: an iterator may decode each when its turn comes.
        """
        if self.procs.rank == 0:
            frames = list(map(small_frames, videos))
            picked = np.linspace(0, len(frames[0]) - 1, min(9, len(frames[0]))).round().astype(int)
            path = self.folder / "samples" / f"step_{step:08d}"
            write_image(path.with_suffix(".png"), contact_sheet([video[picked] for video in frames]))
            write_video(path.with_suffix(".mp4"), np.concatenate(frames, axis=2), fps=8)
        self.procs.wait_for_first(f"{self.folder}: samples of step {step}")

    def write_samples(
        self, step: int, codec: Codec, source, make: Callable[[Batch, int], list[Tensor]], kind: str | None = None
    ) -> None:
        """Four held-out clips of `source`: the truth, and the latents that `make(batch, number)` gives, in turn."""
        self.check_finite(all_steps=True)
        self.settle()  # first the checkpoint: whatever goes wrong with samples, no training is lost
        latents = []
        with torch.no_grad(), autocast(self.procs.device, self.config["dtype"]):
            for number in range(4):
                batch = source.batch([number], kind).to(self.procs.device)
                latents += [batch.x0, *make(batch, number)]
        self.samples(step, (codec.decode_video(z)[0] for z in latents))
        codec.free()

    def check_finite(self, all_steps: bool) -> None:
        """UserError if a step gave a loss or gradient that is no finite number; nothing of it has been saved.

        A GPU is still at work on the last step, and would be waited for. So that one is left out, but for `all_steps`.
        Of the steps before it copies are read: the GPU's own numbers would come after the last step.
        """
        while len(self.unseen) > (0 if all_steps else 1):
            step, values = self.unseen.pop(0)
            wrong = [name for name, read in values.items() if not read().isfinite().all()]
            if not wrong:
                continue
            self.settle()
            good = f"{kept[-1]} is the last good checkpoint" if (kept := self.checkpoints()) else "nothing was saved"
            raise UserError(
                f"{self.folder}: step {step}: {wrong[0]} is no finite number; {good}; lower the learning rate"
            )

    def log(self, step: int, always: bool = False, **values: Tensor | float) -> None:
        """What a step gave, averaged over ranks; written every `log_every` steps, or always. Every rank must call."""
        self.unseen.append((step, {name: fetch(torch.as_tensor(value).detach()) for name, value in values.items()}))
        if step % self.config["log_every"] == 0 or always:
            numbers = {n: self.procs.mean(v) if isinstance(v, Tensor) else v for n, v in values.items()}
            if self.procs.rank == 0 and all(map(math.isfinite, numbers.values())):
                self.write(step, numbers)
        self.check_finite(all_steps=self.procs.device.type == "cpu")
        if self.written.done():
            self.settle()

    def write(self, step: int, numbers: dict[str, float]) -> None:
        """A line in log.jsonl, and one to read, with speed, memory and the time that is left."""
        try:
            with (self.folder / "log.jsonl").open("a", encoding="utf-8") as file:
                file.write(json.dumps({"step": step, **numbers}, allow_nan=False) + "\n")
        except OSError as error:
            raise UserError(f"{self.folder / 'log.jsonl'}: can't be written ({reason(error)}); make room") from None
        now, total = time.perf_counter(), self.config["steps"]
        seconds = (now - self.began) / max(1, step - self.told)
        self.began, self.told = now, step
        speed = f"{seconds:.2f} s/step  {self.config.get('batch', 1) / seconds:.1f} videos/s"
        shown = "  ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        left = timedelta(seconds=round(seconds * (total - step)))
        memory = peak_memory(self.procs.device)
        print(f"step {step}/{total}  {shown}  {speed}  {memory:.1f} GiB  {left} left", flush=True)


def logged_step(line: str) -> int:
    """The step of a line of log.jsonl; 0 of a line that is none."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, LookupError, TypeError):
        return 0


def small_frames(video: Tensor) -> np.ndarray:
    """A video [3, T, H, W] as samples show it, uint8 [T, height, width, 3]."""
    height, width = video.shape[-2:]
    thin, scale = max(1, width // 256), max(1, 96 // width)  # shrink large videos, enlarge small ones
    even = (..., *(slice(0, n // (2 * thin) * 2 * thin, thin) for n in (height, width)))  # mp4 needs even sides
    return to_uint8(video[even], scale)


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
