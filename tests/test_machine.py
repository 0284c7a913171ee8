"""What machines do that is nobody's fault: output that nobody reads, file systems that lack calls, memory that ends."""

import errno
import os
import re
import resource
import subprocess
import sys
from unittest.mock import Mock

import numpy as np
import pytest
import torch
from conftest import ROOT, TORCHRUN, refused
from test_runs import new

from core import memory, parallel
from core.config import run_script
from core.files import output_path, write_text
from core.media import read_record, write_image
from core.record import lock
from core.tables import table_path, write_rows
from core.weights import file_errors
from finetune_hybrid import Config
from tools import bench, convert, evaluate_folder
from toy import evaluate, example

TALKS = """
import sys; sys.path.insert(0, sys.argv.pop(1))
from core.config import run_script
from toy.example import Config
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


@pytest.mark.parametrize("call, number, fine, room", [
    ("chmod", errno.EPERM, True, False), ("chmod", errno.ENOTSUP, True, False), ("fsync", errno.EINVAL, True, False),
    ("fsync", errno.ENOSYS, True, False), ("fsync", errno.ENOSPC, False, True), ("fsync", errno.EDQUOT, False, True),
    ("fsync", errno.EIO, False, False), ("fsync", errno.EROFS, False, False), ("fsync", errno.EACCES, False, False),
])  # fmt: skip
def test_a_file_system_that_lacks_a_call_is_written_to_and_room_is_asked_for_where_it_lacks(
    call, number, fine, room, tmp_path, monkeypatch
):
    monkeypatch.setattr(os, call, Mock(side_effect=OSError(number, os.strerror(number))))
    if not fine:
        said = refused(os.strerror(number), write_text, tmp_path / "x", "x")
        assert ("make room" in said) == room and not list(tmp_path.iterdir())
    else:
        write_text(tmp_path / "x", "x")
        assert (tmp_path / "x").read_text() == "x\n" and len(list(tmp_path.iterdir())) == 1


def test_a_link_that_leads_nowhere_is_found_before_the_work(tmp_path):
    (tmp_path / "disk").symlink_to(tmp_path / "unmounted")
    out = r"--out .*/disk/a/x\.mp4: .*/disk is a link that leads nowhere; is the disk"
    refused(out, output_path, str(tmp_path / "disk/a/x.mp4"), ".mp4")
    refused(r"disk is a link that leads nowhere", lock, tmp_path / "disk/run")


BALLOONS = {"source": str(ROOT / "examples/balloons.json"), "image": str(ROOT / "examples/balloons.jpg")}


@pytest.mark.parametrize("script, options, taken", [
    *((convert, BALLOONS | {"to": "x.json"}, n) for n in ("x.json", "x_mask_0.png", "x_mask_7.png", "x.preview.mp4")),
    *((script, {"out": "x.json"}, n) for script in (evaluate, bench, evaluate_folder) for n in ("x.json", "x.md")),
    (evaluate, {"out": "x.json"}, "x.png"),
    *((example, {"out": "."}, n) for n in ("image.png", "boxes.json", "prompt.txt", "mask_7.png", "truth.mp4")),
])  # fmt: skip
@pytest.mark.parametrize("held", [b"", b"mine", b'[{"name": "me"}]'])
def test_nothing_of_others_is_overwritten(script, options, taken, held, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / taken).write_bytes(held)
    why = "would be lost; move it" if script == convert else "was not made here; move it, or"
    said = rf"(^|/|: ){taken}:? exists, and {why}"
    if script == example:
        said = r"^--out \.: exists and is no empty folder; give another"
    refused(said, script.main, script.Config(**options))
    assert [file.name for file in tmp_path.iterdir()] == [taken] and (tmp_path / taken).read_bytes() == held


def test_what_was_made_here_is_made_anew(tmp_path):
    """A table and a picture of it. The world writes the same again, but to another folder."""
    write_rows(tmp_path / "x.json", [{"name": "a", "videos": 1}])
    assert table_path(str(tmp_path / "x.json")) == tmp_path / "x.json"
    write_image(tmp_path / "x.png", np.zeros((8, 8, 3), np.uint8))
    assert read_record(tmp_path / "x.png") == {}
    (tmp_path / "0").mkdir()
    made, folders = [], [tmp_path / name for name in "012"]
    for folder, number in zip(folders, (62, 62, 0), strict=True):
        example.main(example.Config(out=str(folder), video=number))
        made.append({file.name: file.read_bytes() for file in folder.iterdir()})
    assert made[0] == made[1] != made[2]
    again = example.Config(out=str(folders[0]))
    refused(rf"--out {folders[0]}: exists and is no empty folder; give another", example.main, again)
    assert {file.name: file.read_bytes() for file in folders[0].iterdir()} == made[0]


@pytest.mark.parametrize("held", ['{"_class_name": "WanTransformer3DModel"}', "mine"])
def test_a_run_overwrites_no_config_of_others(held, tmp_path):
    (tmp_path / "config.json").write_text(held)
    refused(r"/config\.json: (exists, and was not made here|not JSON)", new(tmp_path).resume)
    assert (tmp_path / "config.json").read_text() == held and not (tmp_path / "log.jsonl").exists()


def test_ranks_of_other_launchers_are_one_line_and_without_a_rank_the_rest_says_nothing(monkeypatch):
    for lacks, value in (("LOCAL_RANK", None), ("LOCAL_WORLD_SIZE", None), ("MASTER_PORT", None), ("WORLD_SIZE", ""),
                         ("RANK", "none")):  # fmt: skip
        for name, own in (TORCHRUN | {lacks: value}).items():
            monkeypatch.setenv(name, own) if own is not None else monkeypatch.delenv(name, False)
        refused(rf"RANK is set, and {lacks} is not, or is no number; start with torchrun", parallel.init_processes)
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE", "LOCAL_RANK"):
        monkeypatch.setenv(name, "8")
    monkeypatch.delenv("RANK")
    assert parallel.init_processes(heads=2).world == 1


GPU = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 8.00 GiB of which 1.20 GiB is free"


@pytest.mark.parametrize("allocate, asked", [
    (lambda: torch.empty(1 << 50), f"{1 << 52} bytes asked for, and this process may have"),
    (lambda: np.empty(1 << 50), r"8\.00 PiB asked for, and this process may have"),
    (lambda: bytes(1 << 60), "more asked for, and this process may have"),
    (Mock(side_effect=torch.OutOfMemoryError(GPU)), r"2\.50 GiB asked for, and 1\.20 GiB of the GPU are free"),
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
    assert memory.shortage(RuntimeError("shapes differ")) == ""
    monkeypatch.setattr(resource, "getrlimit", lambda _: (3 << 29, 0))
    assert "may have 1.5 GiB" in memory.shortage(MemoryError())  # what a limit leaves


def test_a_peak_that_can_not_be_reset_is_that_since_the_start(monkeypatch):
    monkeypatch.setattr("pathlib.Path.write_text", Mock(side_effect=PermissionError("read-only")))
    memory.reset_peak(torch.device("cpu"))
    assert memory.peak_memory(torch.device("cpu")) > 0
