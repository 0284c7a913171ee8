"""What machines do that is nobody's fault: output that nobody reads, file systems that lack calls, memory that ends."""

import errno
import os
import re
import resource
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import ROOT
from test_runs import ALONE, Options, part

from core import parallel
from core.config import UserError, run_script
from core.files import output_path, write_text
from core.media import read_record, write_image
from core.memory import shortage
from core.record import lock
from core.runs import Run
from core.tables import table_path, write_rows
from core.weights import file_errors
from finetune_hybrid import Config
from tools import bench, convert, evaluate_folder
from toy import evaluate, world

TALKS = """
import sys; sys.path.insert(0, sys.argv.pop(1))
from core.config import run_script
from toy.world import Config
def main(cfg):
    for n in range(2000):
        print("a line of the log, \\u732b \\udce9", n)
        print("and one of errors \\u732b", file=sys.stderr)
    open("done", "w").write("x")
run_script(main, Config)
"""


@pytest.mark.parametrize(
    "what", ["| head -1", "2>&1 | head -1", "> /dev/full", "> /dev/full 2>&1", ">&- 2>&-", "> log"]
)
def test_work_goes_on_though_nobody_can_read_what_it_says(what, tmp_path):
    """A closed pipe, a full disk, no output at all, and an encoding without the letters."""
    environment = os.environ | {"PYTHONIOENCODING": "latin-1"}
    command = f"set -o pipefail; {sys.executable} -c '{TALKS}' {ROOT} {what}"
    job = subprocess.run(["bash", "-c", command], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert job.returncode == 0 and (tmp_path / "done").exists() and "Traceback" not in job.stderr
    if what == "> log":
        assert (tmp_path / "log").read_text().splitlines()[7] == "a line of the log, \\u732b \\udce9 7"


# --- file systems


@pytest.mark.parametrize("call, number", [("chmod", errno.EPERM), ("chmod", errno.ENOTSUP), ("fsync", errno.EINVAL),
                                          ("fsync", errno.ENOSYS)])  # fmt: skip
def test_a_file_system_that_lacks_a_call_is_written_to(call, number, tmp_path, monkeypatch):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, call, fail)
    write_text(tmp_path / "x", "x")
    assert (tmp_path / "x").read_text() == "x\n" and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("number, room", [(errno.ENOSPC, True), (errno.EDQUOT, True), (errno.EIO, False),
                                          (errno.EROFS, False), (errno.EACCES, False)])  # fmt: skip
def test_room_is_asked_for_where_it_lacks(number, room, tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(UserError, match=os.strerror(number)) as caught:
        write_text(tmp_path / "x", "x")
    assert ("make room" in str(caught.value)) == room and not list(tmp_path.iterdir())


def test_a_link_that_leads_nowhere_is_found_before_the_work(tmp_path):
    (tmp_path / "disk").symlink_to(tmp_path / "unmounted")
    with pytest.raises(UserError, match=r"--out .*/disk/a/x\.mp4: .*/disk is a link that leads nowhere; is the disk"):
        output_path(str(tmp_path / "disk/a/x.mp4"), ".mp4")
    with pytest.raises(UserError, match=r"disk is a link that leads nowhere"):
        lock(tmp_path / "disk/run")


@pytest.mark.parametrize("taken", ["x.json", "x_mask_0.png", "x_mask_7.png", "x.preview.mp4"])
def test_convert_overwrites_nothing(taken, tmp_path):
    (tmp_path / taken).write_text("mine")
    options = {"image": str(ROOT / "examples/balloons.jpg")}
    with pytest.raises(UserError, match=rf"/{taken} exists, and would be lost; move it"):
        convert.main(
            convert.Config(source=str(ROOT / "examples/balloons.json"), to=str(tmp_path / "x.json"), **options)
        )
    assert [file.name for file in tmp_path.iterdir()] == [taken] and (tmp_path / taken).read_text() == "mine"


@pytest.mark.parametrize("script, out, taken", [
    *((script, "x.json", taken) for script in (evaluate, bench, evaluate_folder) for taken in ("x.json", "x.md")),
    (evaluate, "x.json", "x.png"),
    *((world, "", taken) for taken in ("image.png", "boxes.json", "prompt.txt", "mask_7.png", "truth.mp4")),
])  # fmt: skip
@pytest.mark.parametrize("held", [b"", b"mine", b'[{"name": "me"}]'])
def test_tables_and_the_world_overwrite_nothing_of_others(script, out, taken, held, tmp_path):
    (tmp_path / taken).write_bytes(held)
    with pytest.raises(UserError, match=rf"/{taken}:? exists, and (was not|isn't what was) made here; move it, or"):
        script.main(script.Config(out=str(tmp_path / out)))
    assert [file.name for file in tmp_path.iterdir()] == [taken] and (tmp_path / taken).read_bytes() == held


def test_what_was_made_here_is_made_anew(tmp_path):
    """A table and a picture of it; and the world's files, unless one of them was changed since."""
    write_rows(tmp_path / "x.json", [{"name": "a", "videos": 1}])
    assert table_path(str(tmp_path / "x.json")) == tmp_path / "x.json"
    write_image(tmp_path / "x.png", np.zeros((8, 8, 3), np.uint8))
    assert read_record(tmp_path / "x.png") == {}
    made = []
    for number in (62, 62, 0):
        world.main(world.Config(out=str(tmp_path / "toy"), video=number))
        made.append({file.name: file.read_bytes() for file in (tmp_path / "toy").iterdir()})
    assert made[0] == made[1] != made[2]
    (tmp_path / "toy/boxes.json").write_text((tmp_path / "toy/boxes.json").read_text().replace("1", "2"))
    with pytest.raises(UserError, match=r"toy/boxes\.json exists, and isn't what was made here"):
        world.main(world.Config(out=str(tmp_path / "toy")))


@pytest.mark.parametrize("held", ['{"_class_name": "WanTransformer3DModel"}', "mine"])
def test_a_run_overwrites_no_config_of_others(held, tmp_path):
    (tmp_path / "config.json").write_text(held)
    with pytest.raises(UserError, match=r"/config\.json: (exists, and was not made here|not JSON)"):
        Run(tmp_path, Options(), ALONE, part(4)).resume()
    assert (tmp_path / "config.json").read_text() == held and not (tmp_path / "log.jsonl").exists()


# --- launchers

TORCHRUN = {
    "RANK": "0",
    "WORLD_SIZE": "1",
    "LOCAL_RANK": "0",
    "LOCAL_WORLD_SIZE": "1",
    "MASTER_ADDR": "x",
    "MASTER_PORT": "1",
}


@pytest.mark.parametrize("lacks, value", [("LOCAL_RANK", None), ("LOCAL_WORLD_SIZE", None), ("MASTER_PORT", None),
                                          ("WORLD_SIZE", ""), ("RANK", "none")])  # fmt: skip
def test_ranks_of_other_launchers_are_one_line(lacks, value, monkeypatch):
    for name, own in (TORCHRUN | {lacks: value}).items():
        monkeypatch.setenv(name, own) if own is not None else monkeypatch.delenv(name, False)
    with pytest.raises(UserError, match=rf"RANK is set, and {lacks} is not, or is no number; start with torchrun"):
        parallel.init_processes()


def test_without_a_rank_the_rest_says_nothing(monkeypatch):
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "8")
    monkeypatch.delenv("RANK", False)
    assert parallel.init_processes(heads=2).world == 1


# --- memory

GPU = (
    "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 23.65 GiB of which 1.20 GiB is free."
)


def no_gpu_memory():
    raise torch.OutOfMemoryError(GPU)


@pytest.mark.parametrize("allocate, asked", [
    (lambda: torch.empty(1 << 50), f"{1 << 52} bytes asked for, and this process may have"),
    (lambda: np.empty(1 << 50), r"8\.00 PiB asked for, and this process may have"),
    (lambda: bytes(1 << 60), "more asked for, and this process may have"),
    (no_gpu_memory, r"2\.50 GiB asked for, and 1\.20 GiB of the GPU are free"),
])  # fmt: skip
def test_memory_that_ends_is_one_line_with_the_options_that_help(allocate, asked, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["x.py"])
    with pytest.raises(SystemExit):
        run_script(lambda cfg: allocate(), Config)
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(f"^x.py: out of memory: {asked}", line)
    assert line.endswith("; try --accumulate 0, --recompute full, a larger --sequence")
    with pytest.raises((RuntimeError, MemoryError)), file_errors("x.pt", "a readable checkpoint"):
        allocate()  # the file is not to blame
    assert shortage(RuntimeError("shapes differ")) == ""


def test_what_a_limit_leaves_is_said(monkeypatch):
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3 << 29, 0))
    assert "may have 1.5 GiB" in shortage(MemoryError())
