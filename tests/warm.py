"""Scripts in processes that have imported the project already: a fresh interpreter takes seconds to do so.

A server imports everything once and forks for each process that is asked for. The script then runs as under `python`,
or as under torchrun: with the same variables in its environment.
"""

import contextlib
import faulthandler
import multiprocessing
import os
import runpy
import shutil
import signal
import socket
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["warm", "sample", "train_slow_adapter", "distill_fast", "finetune_hybrid", "toy.train_slow_generator",
     "toy.evaluate", "tools.prepare_clips", "tools.convert",
     "torch._dynamo", "fsspec.core", "imageio.plugins.ffmpeg", "imageio.plugins.pillow"]  # else imported when needed
)  # fmt: skip
LIMIT = 300  # seconds that a job may take


def work(script: str | Callable, flags: Sequence, folder: str, environment: dict[str, str], output: str) -> None:
    """What a forked process does: run the script as if it had been started in this folder; or call a function."""
    for number, name in ((1, "out"), (2, "err")):
        with open(f"{output}.{name}", "w") as file:
            os.dup2(file.fileno(), number)
    faulthandler.enable(2)  # a crash says where
    signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored, where the tests are a shell's background job
    os.chdir(folder)
    os.environ.update(environment)
    sys.stdout, sys.stderr = (os.fdopen(os.dup(number), "w", buffering=1) for number in (1, 2))
    if callable(script):
        return script(*flags)
    sys.argv = [script, *flags]
    if script.endswith(".py"):
        runpy.run_path(str(ROOT / script), run_name="__main__")
    else:
        sys.modules.pop(script, None)  # runpy warns of a script that has been imported before
        runpy.run_module(script, run_name="__main__", alter_sys=True)


class Job:
    """A script, or a function, at work in one process or many."""

    def __init__(self, script: str | Callable, flags: Sequence, folder: Path, processes: int, nodes: int):
        self.outputs, world = Path(tempfile.mkdtemp()), processes * nodes
        with socket.create_server(("127.0.0.1", 0)) as server:
            meet = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(server.getsockname()[1])}
        self.forks = []
        for rank in range(world):
            place = {"RANK": rank, "WORLD_SIZE": world, "LOCAL_RANK": rank % processes, "LOCAL_WORLD_SIZE": processes}
            environment = {} if world == 1 else meet | {name: str(value) for name, value in place.items()}
            arguments = (script, flags, str(folder), environment, str(self.outputs / str(rank)))
            self.forks.append(FORKS.Process(target=work, args=arguments))
            self.forks[-1].start()

    def poll(self) -> int | None:
        """The exit status: None while a process is alive, else that of the first that failed, or 0."""
        codes = [fork.exitcode for fork in self.forks]
        return None if None in codes else next(filter(None, codes), 0)

    def kill(self) -> None:
        """kill -9 of every process."""
        for fork in self.forks:
            with contextlib.suppress(ProcessLookupError):
                os.kill(fork.pid, signal.SIGKILL)
        for fork in self.forks:
            fork.join()

    def wait(self) -> "Job":
        """Until all are done. Where one fails the rest has some seconds more, as under torchrun."""
        deadline = time.monotonic() + LIMIT
        while self.poll() is None:
            if any(fork.exitcode for fork in self.forks):
                deadline = min(deadline, time.monotonic() + 10)
            if time.monotonic() > deadline:
                self.kill()
            time.sleep(0.02)
        self.returncode, self.stdout, self.stderr = self.poll(), self.read("out"), self.read("err")
        shutil.rmtree(self.outputs)
        return self

    def read(self, kind: str) -> str:
        """What all processes have said so far."""
        return "".join(file.read_text() for file in sorted(self.outputs.glob(f"*.{kind}")))
