"""What a user may hand over by mistake or in malice, script by script: one line, exit status 2, at once, nothing left.

boxes.json has its own list in test_trajectory.py.
"""

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

import distill_fast
import finetune_hybrid
import sample
import train_slow_adapter
from core.config import run_script
from core.weights import save_network
from model import PRESETS, DiTConfig, VideoDiT
from tools import convert, prepare_clips
from toy import evaluate

SCRIPTS = {
    "sample.py": (sample.main, sample.Config, {"presets": {"wan5b": sample.WAN5B}}),
    "convert.py": (convert.main, convert.Config, {"positional": "source"}),
    "prepare_clips.py": (prepare_clips.main, prepare_clips.Config, {"presets": {"wan5b": prepare_clips.WAN5B}}),
    "evaluate.py": (evaluate.main, evaluate.Config, {}),
    "train_slow_adapter.py": (train_slow_adapter.main, train_slow_adapter.Config, {}),
    "distill_fast.py": (distill_fast.main, distill_fast.Config, {}),
    "finetune_hybrid.py": (finetune_hybrid.main, finetune_hybrid.Config, {}),
}
SECONDS = 20  # of work, the most that a refusal may take: on a busy machine a clock would say more
HUGE = 60_000
BOX = [4, 4, 20, 20]


def png_of(width: int, height: int, content: bytes = bytes(1000)) -> bytes:
    """A PNG file that says to be of this size and holds next to nothing."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(content)) + chunk(b"IEND", b"")


def map_video(path: Path, size: str, seconds: int, codec: str) -> None:
    """One frame a second: a red square that stays."""
    source = f"color=black:s={size}:r=1:d={seconds},drawbox=x=8:y=8:w=16:h=16:color=red:t=fill"
    program = imageio_ffmpeg.get_ffmpeg_exe()
    subprocess.run([program, "-loglevel", "error", "-f", "lavfi", "-i", source, "-c:v", codec, path], check=True)


def boxes(**objects) -> str:
    return json.dumps({"objects": [{"boxes": {"0": BOX}, **objects}]})


def network(header: dict) -> bytes:
    return safetensors.torch.save({"x": torch.zeros(2)}, header)


class Code:
    def __reduce__(self):
        return (os.mkdir, ("code_ran",))


def npy_of(shape: str) -> bytes:
    """The head of a NumPy file of this shape."""
    head = f"{{'descr': '<f8', 'fortran_order': False, 'shape': {shape}, }}".ljust(117).encode() + b"\n"
    return b"\x93NUMPY\x01\x00" + struct.pack("<H", len(head)) + head


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> Path:
    """A folder of malformed files."""
    folder = tmp_path_factory.mktemp("malformed")
    written = {
        "good.json": boxes(),
        "keyframes.json": boxes(boxes={str(n): BOX for n in range(100_000)}),
        "listed.json": boxes(boxes=[BOX] * 100_000),
        "objects.json": json.dumps({"objects": [{"boxes": {"0": BOX}}] * 100_000}),
        "ranges.json": boxes(visible=[[0, 9]] * 100_000),
        "nested.json": "[" * 100_000,
        "bomb_mask.json": boxes(mask="bomb.png"),
        "masked.json": boxes(mask="wide.png"),
        "mask_lost.json": boxes(mask="none.png"),
        "digits.json": '{"num_frames": ' + "9" * 100_000 + "}",
        "bomb.png": png_of(HUGE, HUGE),
        "large.png": png_of(10_000, 10_000),  # Pillow would only warn
        "short.png": png_of(48, 48),
        "text.png": "no image",
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
        "empty.csv": "",
        "untagged.safetensors": network({}),
        "unshaped.safetensors": network({"network": "FastGenerator"}),
        "slow_generator.safetensors": network({"network": "SlowGenerator"}),
        "garbled.safetensors": network({"network": "FastGenerator", "config": "{dim: 3"}),
        "listed.safetensors": network({"network": "FastGenerator", "config": "[1, 2]"}),
        "worded.safetensors": network({"network": "FastGenerator", "config": '{"dim": "wide"}'}),
        "slow.safetensors": network({"network": "SlowAdapter", "config": "{}"}),
        "broken/fast_generator.safetensors": os.urandom(4096),
        "long_head.safetensors": struct.pack("<Q", 1 << 40) + b"{}",
        "code.pt": pickle.dumps(Code()),
        "noise.pt": os.urandom(5000),
        "text.pt": "not weights",
        "claimed.npy": npy_of("(1000000000000, 2, 2)"),
        "cut.npy": npy_of("(9, 2, 2)"),
        "code.npy": b"\x93NUMPY\x01\x00" + pickle.dumps(Code()),
        "nul.txt": "\0\0\0",
    }
    for name, content in written.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    for name, shape in (("good.png", (48, 48, 3)), ("wide.png", (48, 60, 3)), ("photo.png", (524, 524, 3))):
        iio.imwrite(folder / name, np.full(shape, 90, np.uint8))
    (folder / "cut.png").write_bytes((folder / "good.png").read_bytes()[:60])
    small = DiTConfig(64, 64, 2, 1, text_dim=64, text_tokens=32)
    save_network(folder / "other/fast_generator.safetensors", "FastGenerator", small, VideoDiT(small).state_dict())
    save_network(folder / "swapped/fast_generator.safetensors", "SlowAdapter", PRESETS["small"], {})
    map_video(folder / "minute.mp4", "48x48", 60, "mpeg4")
    again = [imageio_ffmpeg.get_ffmpeg_exe(), "-loglevel", "error", "-stream_loop", "599", "-i", folder / "minute.mp4"]
    subprocess.run([*again, "-c", "copy", folder / "ten_hours.mp4"], check=True)
    map_video(folder / "gigantic.mkv", "9000x9000", 1, "mjpeg")
    for name in ("examples", "checkpoints"):
        (folder / name).symlink_to(ROOT / name)
    return folder


# Script and flags -> what the line must say. Where sample.py is told neither a table nor a picture or boxes: good ones.
CASES = {
    # boxes
    "sample.py --traj keyframes.json": 'keyframes.json: objects[0].boxes["9"]: frame 9 is beyond',
    "sample.py --traj listed.json": "listed.json: objects[0].boxes: a list of 100000 boxes for 9",
    "sample.py --traj objects.json": "objects.json: objects: must be a list of 1 to 64",
    "sample.py --traj ranges.json": "ranges.json: objects[0].visible[0]: [0, 9] is not a range",
    "sample.py --traj nested.json": "nested.json: can't be read as JSON",
    "sample.py --traj digits.json": "digits.json: can't be read as JSON",
    "sample.py --traj bomb.png": "bomb.png: can't be read as JSON",
    "sample.py --traj nul.txt": "nul.txt: is no boxes.json; point tracks are .npy, .npz, .txt",
    "sample.py --traj cut.npy": "point tracks are .npy, .npz, .txt, .pt or .pth, for python -m tools",
    "convert.py keyframes.json --size 48x48": 'objects[0].boxes["9"]: frame 9 is beyond',
    # pictures
    "sample.py --traj bomb_mask.json": "bomb_mask.json: objects[0].mask: bomb.png is not an image",
    "sample.py --image bomb.png": "bomb.png: not a readable image (Image size (3600000000 pixels)",
    "sample.py --image large.png": "(100000000 pixels) exceeds limit of 67108864 pixels",
    "sample.py --image short.png": "short.png: not a readable image",
    "sample.py --image ten_hours.mp4": "ten_hours.mp4: not a readable image",
    "sample.py --image good.json": "good.json: not a readable image",
    "sample.py --image .": ".: no such image",
    "convert.py good.json --size 48x48 --image bomb.png": "bomb.png: not a readable image",
    # maps and videos
    "sample.py --traj bomb_maps": "bomb_maps: can't be decoded (Image size (3600000000 pixels)",
    "sample.py --traj no_maps": "no_maps: a folder without PNG files",
    "sample.py --traj ten_hours.mp4": "ten_hours.mp4: more than 1009 maps but the video has 9 frames",
    "sample.py --traj gigantic.mkv": "gigantic.mkv: can't be decoded (a frame of 9000x9000 is larger",
    "sample.py --traj noise.mp4": "noise.mp4: can't be decoded",
    "sample.py --traj empty.mp4": "empty.mp4: can't be decoded",
    "convert.py noise.mp4": "noise.mp4: can't be decoded",
    # points
    "convert.py claimed.npy --size 48x48": "claimed.npy: can't be read as point tracks",
    "convert.py cut.npy --size 48x48": "cut.npy: can't be read as point tracks",
    "convert.py code.npy --size 48x48": "code.npy: can't be read as point tracks",
    "convert.py code.pt --size 48x48": "code.pt: holds more than tensors",
    "convert.py noise.pt --size 48x48": "noise.pt: ",
    "convert.py nul.txt --size 48x48": "nul.txt: can't be read as point tracks",
    # sizes and lengths
    "sample.py --size 48x48 --frames 864001": "--size 48x48 --frames 864001: 1990658304 pixels; ",
    "sample.py --size 80000x80000": "--size 80000x80000 --frames 9: 57600000000 pixels",
    "sample.py --size=-48x48": "--size -48x48: takes auto, or height x width",
    "sample.py --seed -1": "--seed -1: at least 0",
    "sample.py --out good.png/x.mp4": "--out good.png/x.mp4: ",
    "convert.py good.json --size 48x48 --frames 1000000000": "--frames 1000000000: at least 1, and",
    "convert.py good.json --size 99998x99998": "--frames 9: at least 1, and",
    "convert.py good.json --size 48x48 --to checkpoints": "--to checkpoints: exists",
    "prepare_clips.py --source rows.csv --frames 999999999": "--size 64x64 --frames 999999999: ",
    # tables
    "prepare_clips.py --source none.csv": "none.csv: not a readable CSV file",
    "prepare_clips.py --source quotes.csv": "quotes.csv: not a readable CSV file",
    "prepare_clips.py --source wide.csv": "wide.csv: not a readable CSV file",
    "prepare_clips.py --source rows.csv": "rows.csv: line 2: a frame number is not a whole number",
    "prepare_clips.py --source headless.csv": "headless.csv: no rows; give 1 to 100000",
    "prepare_clips.py --source empty.csv": "empty.csv: no rows; give 1 to 100000",
    "sample.py --batch none.csv": "none.csv: not a readable CSV file",
    "sample.py --batch headless.csv": "headless.csv: no rows; give 1 to 100000",
    "sample.py --batch foreign.csv": "foreign.csv: column 'x.mp4' is unknown",
    "sample.py --batch no_maps": "no_maps: not a readable CSV file",
    # weights
    "sample.py --generator untagged.safetensors": "no transformer of Wan2.2: it holds no patch_embedding.we",
    "sample.py --generator unshaped.safetensors": "its header has no config of a FastGenerator",
    "sample.py --generator garbled.safetensors": "its header has no config of a FastGenerator",
    "sample.py --generator listed.safetensors": "its header has no config of a FastGenerator",
    "sample.py --generator worded.safetensors": "its header has no config of a FastGenerator",
    "sample.py --adapter slow.safetensors": "slow.safetensors: holds a SlowAdapter, expected a FastAdapter",
    "sample.py --generator long_head.safetensors": "long_head.safetensors: not a readable safetensors file",
    "sample.py --generator code.pt": "code.pt: holds more than tensors",
    "sample.py --generator noise.pt": "noise.pt: ",
    "sample.py --generator text.pt": "text.pt: ",
    "evaluate.py --weights .": "slow_generator.safetensors: its header has no config of a SlowGenerator",
    "evaluate.py --weights nowhere": "nowhere/slow_generator.safetensors: no such file",
    "finetune_hybrid.py --adapter noise.pt": "noise.pt: not a readable safetensors file",
    "distill_fast.py --data no_maps": "no_maps",
    "train_slow_adapter.py --data nowhere": "nowhere",
    # flags and logs
    "evaluate.py --videos 0": "--videos 0: at least 2",
    "evaluate.py --out rows.md": "--out rows.md: the name must end in .json",
    "finetune_hybrid.py --adapter_start 300": "--adapter_start 300 --diffusion_first 400: give less than",
    "finetune_hybrid.py --diffusion_first 9 --use_diffusion false": "--diffusion_first 9: needs",
    "finetune_hybrid.py --diffusion_scale fast": "--diffusion_scale: invalid choice: 'fast' (choose from",
    "finetune_hybrid.py --lr nan": "--lr nan: more than 0, and finite",
    "finetune_hybrid.py --lr": "argument --lr: expected one argument",
    "distill_fast.py --compile perhaps": "argument --compile: invalid choice: 'perhaps'",
    "train_slow_adapter.py tiny": "unknown flag tiny; --help lists them all",
    # flags of sample.py
    "sample.py --image none.png": "none.png: no such image",
    "sample.py --image text.png": "text.png: not a readable image",
    "sample.py --image cut.png": "cut.png: not a readable image",
    "sample.py --size 48x50": "--size 48x50: takes auto, or height x width, both multiples of 8; the nearest is 48x48",
    "sample.py --size 8x16392": "--size 8x16392: 16384 pixels a side are the most",
    "sample.py --image photo.png --frames 4000": "--frames 4000: 1098304000 pixels; 1073741824 is the most; add --det",
    "sample.py --preset wan5b --detail true": "--detail true: preset wan5b makes large videos as it is; leave it out",
    "sample.py --scale 4": "unknown flag --scale",
    "sample.py --adapter .": "--adapter .: is a folder; give the file in it",
    "sample.py --generator checkpoints/small/fast_generator.safetensors:ema": "holds one network; leave out :ema",
    "sample.py --traj b.mp4 --out b.mp4": "--out: would overwrite b.mp4, which --traj",
    "sample.py --traj b.boxes.mp4 --out ./b.mp4": "would overwrite b.boxes.mp4, which --traj reads; give another name",
    "sample.py --size 48": "--size 48: takes auto, or height x width, both multiples of 8, as 32x48",
    "sample.py --preset wan5b --frames 9 --size 64x50": "--size 64x50",
    "sample.py --preset wan5b --frames 8": "--frames 8: must be 4 n + 1, at least 2; 9 is",
    "sample.py --preset wan5b --frames 9": "fast_generator.safetensors: no such file",
    "sample.py --stpes 3": "unknown flag --stpes; did you mean --steps? --help",
    "sample.py --steps few": "argument --steps: invalid int value: 'few'",
    "sample.py --steps -1": "--steps -1: at least 0",
    "sample.py --guidance 2": "--guidance 2.0: the fast networks have none",
    "sample.py --shift -1": "--shift -1.0: at least 0",
    "sample.py --decoder t.pth": "--decoder t.pth: preset small has one of its own",
    "sample.py --lora l.safetensors:0.5": "--lora l.safetensors:0.5: no such file",
    "sample.py --out out/x.avi": "--out out/x.avi: the name must end in .mp4",
    "sample.py --weights nowhere": "nowhere/fast_generator.safetensors: no such file",
    "sample.py --generator other/fast_generator.safetensors": "generator.safetensors: is no network of preset small",
    "sample.py --generator swapped/fast_generator.safetensors": "holds a SlowAdapter, expected a FastGenerator",
    "sample.py --generator broken/fast_generator.safetensors": "not a readable safetensors file",
    "sample.py --traj none.json": "none.json: no such file",
    "sample.py --traj masked.json": "masked.json: objects[0].mask: wide.png is 60x48 but the image is 48x48",
    "sample.py --traj mask_lost.json": "mask_lost.json: objects[0].mask: ",
}


@pytest.mark.parametrize("command", CASES)
def test_one_line_exit_2_at_once_and_nothing_left(command, files, monkeypatch, capfd):
    script, *flags = command.split()
    main, config, more = SCRIPTS[script]
    for flag, file in (("--image", "good.png"), ("--traj", "good.json")):
        if script == "sample.py" and not {flag, "--batch"} & set(flags):
            flags += [flag, file]
    monkeypatch.chdir(files)
    monkeypatch.setattr(sys, "argv", [script, *flags])
    before, began = sorted(files.rglob("*")), time.process_time()
    with pytest.raises(SystemExit) as caught:
        run_script(main, config, **more)
    out, err = capfd.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith(f"{script}: ") and CASES[command] in err, err
    assert sorted(files.rglob("*")) == before
    assert time.process_time() - began < SECONDS
