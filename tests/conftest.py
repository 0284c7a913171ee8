"""Makes the modules importable from any folder; `run` starts a script as a user would."""

import os
import subprocess
import sys
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = "1"  # for the processes that tests start
# glibc hands large tensors back to the system when they are freed. Getting the pages anew takes longer than the work.
os.environ |= {"MALLOC_MMAP_THRESHOLD_": str(1 << 28), "MALLOC_TRIM_THRESHOLD_": str(1 << 32)}

import numpy as np
import pytest
import torch
import warm

ROOT = Path(__file__).resolve().parent.parent
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"}  # what it sets, of one process
TORCHRUN |= {"MASTER_ADDR": "x", "MASTER_PORT": "1"}
sys.path.insert(0, str(ROOT))
pytest_plugins = ["browser"]
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # two workers share two cores


def start_in(folder: Path):
    """start("sample.py", "--steps", 2) or start("toy.evaluate") in this folder."""

    def start(script: str, *flags: object, processes: int = 1, nodes: int = 1, wait: bool = True) -> warm.Job:
        job = warm.Job(script, [str(flag) for flag in flags], folder, processes, nodes)
        return job.wait() if wait else job

    return start


@pytest.fixture
def run(tmp_path):
    return start_in(tmp_path)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Works in an empty folder with links to the shipped examples and weights."""
    for name in ("examples", "checkpoints"):
        (tmp_path / name).symlink_to(ROOT / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refused(message: str, call, *given, **options) -> str:
    """This call raises a UserError of one line, which matches, and is returned."""
    from core.config import UserError

    with pytest.raises(UserError, match=message) as caught:
        call(*given, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def run_measured(*command: object) -> tuple[subprocess.CompletedProcess, float, int]:
    """Run a command; also the seconds of work and the KiB that it took at most.

    A small process starts it: what a large one starts counts the large one's memory, too.
    """
    script = "import resource, subprocess, sys; code = subprocess.call(sys.argv[1:]); " \
             "used = resource.getrusage(resource.RUSAGE_CHILDREN); " \
             "print(used.ru_utime + used.ru_stime, used.ru_maxrss); sys.exit(code)"  # fmt: skip
    job = subprocess.run([sys.executable, "-c", script, *map(str, command)], capture_output=True, text=True)
    seconds, memory = job.stdout.split()[-2:]
    return job, float(seconds), int(memory)


def make_trajectory(boxes: list, size: tuple[int, int], masks=None):
    """Of each object's boxes, one per frame or None, and the masks in frame 0: the first boxes, if none are given."""
    from core.boxes import fill_box
    from trajectory import PALETTE, Trajectory

    boxes = np.array([[[np.nan] * 4 if box is None else box for box in track] for track in boxes], dtype=float)
    masks = [fill_box(track[0], size) for track in boxes] if masks is None else masks
    colors = np.array(PALETTE[: len(boxes)], dtype=np.uint8)
    return Trajectory(boxes, np.array(masks), colors, [f"object {k}" for k in range(len(boxes))])
