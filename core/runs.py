"""A training run on disk: `runs/<name>/` holds config.json, log.jsonl, samples/ and ckpt/.

Checkpoints are copied to the CPU's memory and written while training goes on, under a temporary name that is renamed
when all is on disk: a kill at any moment leaves whole checkpoints alone.
"""

import dataclasses
import json
import os
import shutil
import warnings
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.checkpoint.stateful import Stateful

from core.config import UserError
from core.files import atomic
from core.media import contact_sheet, to_uint8, write_image, write_video
from core.parallel import Processes
from core.weights import read_config

Part = tuple[nn.Module, Sequence, Stateful | None]  # a network, its optimizers, its averages if it has any
KEEP = 2  # checkpoints
COUNTS = ("steps", "batch", "accumulate", "ratio", "denoising_steps", "log_every", "save_every", "sample_every")
# Options that may change when a run is resumed: they change how it is computed and what is seen of it, not what.
FREE = ("dtype", "compile", "recompute", "sequence", "accumulate", "log_every", "save_every", "sample_every")


def check_counts(config) -> None:
    """UserError if something that is counted, of those that the script has, is none at all."""
    for name in COUNTS:
        if getattr(config, name, 1) < 1:
            raise UserError(f"--{name} {getattr(config, name)}: at least 1")


def due(step: int, every: int, start: int, last: bool) -> bool:
    """Is it time, before this step, for what comes every so many steps and after the last? Not where a run begins."""
    return last or (step % every == 0 and step > start)


class Run:
    """What a training script leaves in its folder. Every rank calls; rank 0 writes all but its own shards."""

    def __init__(self, folder: Path | str, config, procs: Processes, parts: dict[str, Part]):
        self.folder, self.config, self.procs, self.parts = Path(folder), dataclasses.asdict(config), procs, parts
        self.writer, self.written = ThreadPoolExecutor(1), Future()
        self.written.set_result(None)
        # Writers talk among themselves, from a thread of their own, while training's collectives go on.
        self.writers = None if procs.mesh is None else dist.new_group(backend="gloo")
        if procs.mesh is None:
            warnings.filterwarnings("ignore", message="torch.distributed is disabled")  # that is what no_dist asks for
        if procs.rank == 0:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.state()  # makes what an optimizer keeps, by a step without gradient, which is not to be counted
        for _, optimizers, _ in parts.values():
            for kept in (kept for optimizer in optimizers for kept in optimizer.state.values() if "step" in kept):
                kept["step"].zero_()

    def state(self) -> dict:
        state = {}
        for name, (model, optimizers, ema) in self.parts.items():
            weights, optim = get_state_dict(model, optimizers)
            state[name] = {"weights": weights, "optimizers": optim} | ({"ema": ema.state_dict()} if ema else {})
        return state

    def save(self, step: int, wait: bool = False) -> None:
        """Write `ckpt/step_00000500/`. Returns when its content is safe in memory, or with `wait` on disk."""
        self.written.result()  # one at a time; raises what went wrong with the last
        folder, temporary = self.folder / "ckpt" / f"step_{step:08d}", self.folder / "ckpt" / f".step_{step:08d}.tmp"
        if folder.exists():  # a finished run, begun again
            return
        if self.procs.rank == 0:
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir(parents=True)
        self.procs.barrier()
        alone = self.procs.mesh is None
        saved = dcp.async_save(self.state(), checkpoint_id=temporary, process_group=self.writers, no_dist=alone)
        self.written = self.writer.submit(self.publish, saved, temporary, folder)
        if wait:
            self.written.result()
            self.procs.barrier()

    def publish(self, saved: Future, temporary: Path, folder: Path) -> None:
        """Rename a checkpoint once it is on disk, each file fsynced by its writer; keep the last ones."""
        saved.result()  # rank 0's is done when that of every rank is
        if self.procs.rank == 0:
            fsync_folder(temporary)
            os.rename(temporary, folder)
            fsync_folder(folder.parent)
            for old in self.checkpoints()[:-KEEP]:
                shutil.rmtree(old)

    def checkpoints(self) -> list[Path]:
        """Whole checkpoints, oldest first."""
        return sorted((self.folder / "ckpt").glob("step_*"))

    def resume(self) -> int:
        """Fill the parts from the newest checkpoint, and drop log lines of steps that will be taken again.

        Returns the checkpoint's step, or 0 where there is none. UserError if it was made under other options.
        """
        found, step, options = self.checkpoints(), 0, self.folder / "config.json"
        if found:
            before = read_config(options) if options.exists() else {}
            for name, now in self.config.items():
                if name not in FREE and before.get(name, now) != now:
                    mend = f"with {now} give the run another --name (or, if it is a file that moved, correct this one)"
                    raise UserError(f"{options}: the run began with --{name} {before[name]}; {mend}")
            state = self.state()
            try:
                dcp.load(state, checkpoint_id=found[-1], no_dist=self.procs.mesh is None)
            except (ValueError, RuntimeError, CheckpointException):  # another shape, or a missing name or file
                mend = "delete it, or give the run another --name"
                raise UserError(f"{found[-1]}: damaged, or of networks of other shapes; {mend}") from None
            for name, (model, optimizers, ema) in self.parts.items():
                part = state[name]
                set_state_dict(model, optimizers, model_state_dict=part["weights"], optim_state_dict=part["optimizers"])
                if ema:
                    ema.load_state_dict(part["ema"])
            step = int(found[-1].name.removeprefix("step_"))
        log = self.folder / "log.jsonl"
        if self.procs.rank == 0:
            with atomic(options) as temporary:
                temporary.write_text(json.dumps(self.config, indent=1) + "\n")
        if self.procs.rank == 0 and log.exists():
            lines = [line for line in log.read_text().splitlines() if line.endswith("}")]  # a kill may cut one
            kept = [line for line in lines if json.loads(line)["step"] <= step]
            with atomic(log) as temporary:
                temporary.write_text("".join(line + "\n" for line in kept))
        return step

    def samples(self, step: int, videos: Sequence[Tensor]) -> None:
        """Videos [3, T, H, W] below one another as a contact sheet, and beside one another as an mp4.

        Small ones are enlarged, large ones thinned out; the sheet shows nine frames of each.
        """
        if self.procs.rank == 0:
            height, width = videos[0].shape[-2:]
            thin, scale = max(1, width // 256), max(1, 96 // width)
            even = (..., *(slice(0, n // (2 * thin) * 2 * thin, thin) for n in (height, width)))
            frames = [to_uint8(video[even], scale) for video in videos]
            shown = np.linspace(0, len(frames[0]) - 1, min(9, len(frames[0]))).round().astype(int)
            sheet = contact_sheet([video[shown] for video in frames])
            write_image(self.folder / "samples" / f"step_{step:08d}.png", sheet)
            write_video(self.folder / "samples" / f"step_{step:08d}.mp4", np.concatenate(frames, axis=2), fps=8)

    def log(self, step: int, **values: float) -> None:
        if self.procs.rank == 0:
            with (self.folder / "log.jsonl").open("a") as file:
                file.write(json.dumps({"step": step, **values}) + "\n")


def fsync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)
