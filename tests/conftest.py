"""Tests run from any folder: the flat scripts are importable, and `run` starts one as a user would."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)  # two workers share two cores


def start_in(folder: Path):
    """start("sample.py", "--steps", "2") in a folder that then sees the shipped examples and weights."""
    for name in ("examples", "checkpoints"):
        (folder / name).symlink_to(ROOT / name)

    def start(script: str, *flags: object, processes: int = 1, torchrun: tuple = ("--standalone",), wait: bool = True):
        launcher = [sys.executable]
        if processes > 1:
            launcher += ["-m", "torch.distributed.run", f"--nproc_per_node={processes}", *torchrun]
        command = [*launcher, str(ROOT / script), *(str(flag) for flag in flags)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        job = subprocess.Popen(
            command, cwd=folder, env=environment, text=True, start_new_session=True,
            stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        )  # fmt: skip
        if not wait:
            return job
        try:
            out, err = job.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(job.pid, signal.SIGKILL)
            raise
        return subprocess.CompletedProcess(command, job.returncode, out, err)

    return start


@pytest.fixture
def run(tmp_path):
    return start_in(tmp_path)
