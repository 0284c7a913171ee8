"""What a user may hand over by mistake or in malice, script by script: one line, exit status 2, at once, nothing left.

boxes.json has its own list in test_trajectory.py.
"""

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import time
import zlib
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import safetensors.torch
import torch
from conftest import ROOT
from test_config import CONFIGS
from test_weights import Code

from core.config import run_script
from core.media import write_video
from core.weights import save_network
from model import DiTConfig, VideoDiT

SECONDS = 20  # of work, the most that a refusal may take: on a busy machine a clock would say more
HUGE = 60_000


def png_of(width: int, height: int) -> bytes:
    """A PNG file that says to be of this size and holds next to nothing."""
    png = bytearray(iio.imwrite("<bytes>", np.zeros((2, 2, 3), np.uint8), extension=".png"))
    png[16:24] = struct.pack(">II", width, height)
    png[29:33] = struct.pack(">I", zlib.crc32(png[12:29]))  # of the head
    return bytes(png)


def boxes(**objects) -> str:
    return json.dumps({"objects": [{"boxes": {"0": [4, 4, 20, 20]}, **objects}]})


def network(header: dict) -> bytes:
    return safetensors.torch.save({"x": torch.zeros(2)}, header)


def npy_of(*shape: int) -> bytes:
    """The head of a NumPy file of this shape."""
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": shape})
    return head.getvalue()


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of malformed files."""
    folder = tmp_path_factory.mktemp("malformed")
    written = {
        "good.json": boxes(),
        "bomb_mask.json": boxes(mask="bomb.png"),
        "bomb.png": png_of(HUGE, HUGE),
        "large.png": png_of(10_000, 10_000),  # Pillow would only warn
        "short.png": png_of(48, 48),
        "bomb_maps/0.png": png_of(HUGE, HUGE),
        "no_maps/read.me": "nothing",
        "noise.mp4": os.urandom(5000),
        "b.mp4": "maps",
        "b.boxes.mp4": "maps",
        "empty.mp4": b"",
        "none.csv": b"\x80\x81\xff",
        "quotes.csv": 'path,num_frames,text\nx.mp4,9,"and so on\n',
        "wide.csv": "path,num_frames,text\n" + "x" * 200_000 + ",9,a\n",
        "rows.csv": "path,num_frames,text\nx.mp4\n",
        "headless.csv": "x.mp4,9,a disc\n",
        "foreign.csv": "x.mp4,9,a disc\ny.mp4,9,a disc\n",
        "unshaped.safetensors": network({"network": "FastGenerator"}),
        "garbled.safetensors": network({"network": "FastGenerator", "config": "{dim: 3"}),
        "listed.safetensors": network({"network": "FastGenerator", "config": "[1, 2]"}),
        "worded.safetensors": network({"network": "FastGenerator", "config": '{"dim": "wide"}'}),
        "slow.safetensors": network({"network": "SlowAdapter", "config": "{}"}),
        "long_head.safetensors": struct.pack("<Q", 1 << 40) + b"{}",
        "code.pt": pickle.dumps(Code()),
        "noise.pt": os.urandom(5000),
        "claimed.npy": npy_of(10**12, 2, 2),
        "cut.npy": npy_of(9, 2, 2),
        "code.npy": b"\x93NUMPY\x01\x00" + pickle.dumps(Code()),
        "nul.txt": "\0\0\0",
    }
    for name, content in written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, shape in (("good.png", (48, 48, 3)), ("photo.png", (524, 524, 3))):
        iio.imwrite(folder / name, np.full(shape, 90, np.uint8))
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])
    small = DiTConfig(64, 64, 2, 1, text_dim=64, text_tokens=32)
    save_network(folder / "other/fast_generator.safetensors", "FastGenerator", small, VideoDiT(small).state_dict())
    square = np.zeros((60, 48, 48, 3), np.uint8)
    square[:, 8:24, 8:24, 0] = 255
    write_video(folder / "minute.mp4", square, fps=1)
    for source, codec, name in (
        (["-stream_loop", "599", "-i", folder / "minute.mp4"], "copy", "ten_hours.mp4"),
        (["-f", "lavfi", "-i", "color=red:s=9000x9000:r=1:d=1"], "mjpeg", "gigantic.mkv"),
    ):
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", *source, "-c:v", codec, folder / name]
        subprocess.run(command, check=True)
    for name in ("examples", "checkpoints"):
        (folder / name).symlink_to(ROOT / name)
    return folder


# Script and flags -> what the line must say. Where sample.py is told neither a table nor a picture or boxes: good ones.
CASES = {
    # boxes
    "sample.py --traj nul.txt": "nul.txt: is no boxes.json; point tracks are .npy, .npz, .txt",
    "sample.py --traj cut.npy": "point tracks are .npy, .npz, .txt, .pt or .pth, for python -m tools",
    # pictures
    "sample.py --traj bomb_mask.json": "bomb_mask.json: objects[0].mask: bomb.png is not an image",
    "sample.py --image bomb.png": "bomb.png: not a readable image (Image size (3600000000 pixels)",
    "sample.py --image large.png": "(100000000 pixels) exceeds limit of 67108864 pixels",
    "sample.py --image short.png": "short.png: not a readable image",
    "sample.py --image ten_hours.mp4": "ten_hours.mp4: not a readable image",
    "sample.py --image good.json": "good.json: not a readable image",
    "sample.py --image .": ".: no such image",
    # maps and videos
    "sample.py --traj bomb_maps": "bomb_maps: can't be decoded (Image size (3600000000 pixels)",
    "sample.py --traj ten_hours.mp4": "ten_hours.mp4: more than 1009 maps but the video has 9 frames",
    "sample.py --traj gigantic.mkv": "gigantic.mkv: can't be decoded (a frame of 9000x9000 is larger",
    "sample.py --traj empty.mp4": "empty.mp4: can't be decoded",
    "convert.py noise.mp4": "noise.mp4: can't be decoded",
    # points
    "convert.py claimed.npy --size 48x48": "claimed.npy: can't be read as point tracks",
    "convert.py cut.npy --size 48x48": "cut.npy: can't be read as point tracks",
    "convert.py code.npy --size 48x48": "code.npy: can't be read as point tracks",
    "convert.py code.pt --size 48x48": "code.pt: holds more than tensors",
    "convert.py noise.pt --size 48x48": "noise.pt: ",
    # sizes and lengths
    "sample.py --size 48x48 --frames 864001": "--size 48x48 --frames 864001: 1990658304 pixels; ",
    "sample.py --out good.png/x.mp4": "--out good.png/x.mp4: ",
    "convert.py good.json --size 48x48 --frames 1000000000": "--frames 1000000000: at least 1, and",
    "convert.py good.json --size 48x48 --to checkpoints": "--to checkpoints: exists",
    "prepare_clips.py --source rows.csv --frames 999999999": "--size 64x64 --frames 999999999: ",
    # tables
    "prepare_clips.py --source none.csv": "none.csv: not a readable CSV file",
    "prepare_clips.py --source quotes.csv": "quotes.csv: not a readable CSV file",
    "prepare_clips.py --source wide.csv": "wide.csv: not a readable CSV file",
    "prepare_clips.py --source headless.csv": "headless.csv: no rows; give 1 to 100000",
    "sample.py --batch none.csv": "none.csv: not a readable CSV file",
    "sample.py --batch foreign.csv": "foreign.csv: column 'x.mp4' is unknown",
    "sample.py --batch no_maps": "no_maps: not a readable CSV file",
    "sample.py --batch jobs.csv --out x.mp4": "--out: each row of --batch says its own; leave it out",
    "sample.py --batch jobs.csv --serve": "--serve: goes without",
    # weights
    "sample.py --generator unshaped.safetensors": "its header has no config of a FastGenerator",
    "sample.py --generator garbled.safetensors": "its header has no config of a FastGenerator",
    "sample.py --generator listed.safetensors": "its header has no config of a FastGenerator",
    "sample.py --generator worded.safetensors": "its header has no config of a FastGenerator",
    "sample.py --adapter slow.safetensors": "slow.safetensors: holds a SlowAdapter, expected a FastAdapter",
    "sample.py --generator long_head.safetensors": "long_head.safetensors: not a readable safetensors file",
    "evaluate.py --weights nowhere": "nowhere/slow_generator.safetensors: no such file",
    "finetune_hybrid.py --adapter noise.pt": "noise.pt: not a readable safetensors file",
    "distill_fast.py --data no_maps": "no_maps: holds no finished shards",
    "train_slow_adapter.py --data nowhere": "nowhere: holds no finished shards",
    # flags and logs
    "evaluate.py --out rows.md": "--out rows.md: the name must end in .json",
    "finetune_hybrid.py --adapter_start 300": "--adapter_start 300 --diffusion_first 900: give less than",
    "finetune_hybrid.py --diffusion_first 9 --use_diffusion false": "--diffusion_first 9: needs",
    # flags of sample.py
    "sample.py --image none.png": "none.png: no such image",
    "sample.py --image cut.png": "cut.png: not a readable image",
    "sample.py --size 48x50": "--size 48x50: takes auto, or height x width, both multiples of 8; the nearest is 48x48",
    "sample.py --size 8x16392": "--size 8x16392: 16384 pixels a side are the most",
    "sample.py --image photo.png --frames 4000": "--frames 4000: 1098304000 pixels; 1073741824 is the most; add --det",
    "sample.py --preset wan5b --detail true": "--detail true: preset wan5b makes large videos as it is; leave it out",
    "sample.py --adapter .": "--adapter .: is a folder; give the file in it",
    "sample.py --generator checkpoints/small/fast_generator.safetensors:ema": "holds one network; leave out :ema",
    "sample.py --traj b.mp4 --out b.mp4": "--out: would overwrite b.mp4, which --traj",
    "sample.py --traj b.boxes.mp4 --out ./b.mp4": "would overwrite b.boxes.mp4, which --traj reads; give another name",
    "sample.py --size 48": "--size 48: takes auto, or height x width, both multiples of 8, as 32x48",
    "sample.py --preset wan5b --frames 9 --size 64x50": "--size 64x50",
    "sample.py --preset wan5b --frames 8": "--frames 8: must be 4 n + 1, at least 2; 9 is",
    "sample.py --preset wan5b --frames 9": "fast_generator.safetensors: no such file",
    "sample.py --stpes 3": "unknown flag --stpes; did you mean --steps? --help",
    "sample.py --steps -1": "--steps -1: at least 0",
    "sample.py --guidance 2": "--guidance 2.0: the fast networks have none",
    "sample.py --decoder t.pth": "--decoder t.pth: preset small has one of its own",
    "sample.py --lora l.safetensors:0.5": "--lora l.safetensors:0.5: no such file",
    "sample.py --out out/x.avi": "--out out/x.avi: the name must end in .mp4",
    "sample.py --weights nowhere": "nowhere/fast_generator.safetensors: no such file",
    "sample.py --generator other/fast_generator.safetensors": "generator.safetensors: is no network of preset small",
    "sample.py --generator slow.safetensors": "holds a SlowAdapter, expected a FastGenerator",
}

WITH_FILES = ("image", "traj", "weights", "generator", "adapter", "batch", "lora", "preset wan5b --decoder")
BAD_NAMES = ("x" * 300, "/etc/passwd/x", "/etc")  # of which a disk says something
CASES |= {f"sample.py --{flag} {name}": "" for flag in WITH_FILES for name in BAD_NAMES}


@pytest.mark.parametrize("command", CASES)
def test_one_line_exit_2_at_once_and_nothing_left(command, files, monkeypatch, capfd):
    script, *flags = command.split()
    module = CONFIGS[script.removesuffix(".py")]
    for flag, file in (("--image", "good.png"), ("--traj", "good.json")):
        if script == "sample.py" and not {flag, "--batch"} & set(flags):
            flags += [flag, file]
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    before, began = sorted(files.rglob("*")), time.process_time()
    with pytest.raises(SystemExit) as caught:
        positional = "source" if script == "convert.py" else ""
        run_script(module.main, module.Config, {"wan5b": getattr(module, "WAN5B", None)}, positional)
    out, err = capfd.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith(f"{script}: ") and CASES[command] in err, err
    assert sorted(files.rglob("*")) == before
    assert time.process_time() - began < SECONDS
