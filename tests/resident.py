"""The rehearsed memory of two small runs beside what they take: the last rows of `python -m tests.rehearse`."""

import os
import re
import socket
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from unittest import mock

import torch
import torch.distributed as dist

from core.memory import peak_memory, reset_peak
from tests.rehearse import GPU, rehearse_stage


class Resident:
    """In the place of torch's tracker, where tensors are real: the memory of this process since now.

    It answers to what `rehearse_stage` asks of that one, whose `_peak_mem` is cleared between parts.
    """

    def __init__(self):
        self.before = int(re.search(r"VmRSS:\s+(\d+) kB", Path("/proc/self/status").read_text())[1]) * 1024
        self._peak_mem = self

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


def rows() -> Iterator[dict]:
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
