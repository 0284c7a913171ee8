"""sample.py as a user runs it: the shipped example, its cost, and every kind of bad input."""

import json
import math
import os
import subprocess
import sys
import time
import weakref
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

import flow
import sample
from core.config import UserError, run_script
from core.media import cover_frames, load_image, read_picture
from core.weights import save_network
from model import PRESETS, DiTConfig, VideoDiT
from toy.codec import ToyCodec
from toy.detail import full_size
from trajectory import load_trajectory

ROOT = Path(sample.__file__).parent


def test_shipped_example(run, tmp_path):
    """No arguments: a video and its overlay, in under 60 s and 2 GiB."""
    script = "import os, resource, sys, subprocess; code = subprocess.call([sys.executable, sys.argv[1]]); " \
             "print('peak', resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss); sys.exit(code)"  # fmt: skip
    began = time.time()
    job = subprocess.run(
        [sys.executable, "-c", script, str(ROOT / "sample.py")], cwd=tmp_path, capture_output=True, text=True
    )
    assert job.returncode == 0, job.stderr
    assert time.time() - began < 60
    assert int(job.stdout.split()[-1]) < 2 << 20  # KiB
    assert "denoise" in job.stdout and "4 steps on cpu: out/sample.mp4" in job.stdout
    video, overlay = (iio.imread(tmp_path / "out" / name) for name in ("sample.mp4", "sample.boxes.mp4"))
    picture = read_picture(ROOT / "examples/balloons.jpg")
    shown = full_size(picture, (152, 184))
    assert picture.shape == (192, 240, 3) and video.shape == overlay.shape == (9, *shown.shape)
    assert shown.shape == (192, 232, 3)
    assert np.abs(video[0].astype(float) - shown).mean() < 2  # it starts from the image
    assert np.abs(video[8].astype(float) - video[0]).mean() > 1  # and moves
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["sample.boxes.mp4", "sample.mp4"]


@pytest.fixture
def pixels(run, tmp_path):
    def make(*flags: object, processes: int = 1) -> np.ndarray:
        job = run("sample.py", "--size", "48x64", "--dtype", "float32", *flags, processes=processes)
        assert job.returncode == 0 and job.stdout.count("steps on cpu") == 1, job.stderr  # one of them speaks
        return iio.imread(tmp_path / "out/sample.mp4").astype(float)

    return make


def test_seed_and_prompt_matter_and_runs_repeat(pixels):
    first = pixels("--steps", 2)
    assert np.array_equal(first, pixels("--steps", 2))
    assert not np.array_equal(first, pixels("--steps", 2, "--seed", 1))
    told = "--steps", 2, "--prompt", "a red blob spinning clockwise"
    assert not np.array_equal(first, pixels(*told))
    slow = pixels(*told, "--speed", "slow")
    assert not np.array_equal(first, slow)
    assert not np.array_equal(slow, pixels(*told, "--speed", "slow", "--guidance", 2))


def test_two_processes_and_compiled_blocks_give_the_same_video_and_8_bits_nearly(pixels):
    alone = pixels()
    assert np.abs(pixels(processes=2) - alone).mean() < 0.1
    assert np.abs(pixels("--compile") - alone).mean() < 0.1
    assert 0.1 < np.abs(pixels("--memory", "low") - alone).mean() < 5


def boxes(**changes) -> dict:
    return {"objects": [{"boxes": {"0": [4, 4, 20, 20], "8": [20, 20, 40, 40]}, **changes}]}


GOOD = boxes()


# What boxes.json holds, or None where there is none; what the line must say.
BAD_BOXES = [
    (None, "boxes.json: no such file"),
    ("{,", "boxes.json: line 1: not valid JSON"),
    ([], "boxes.json: holds a list"),
    ({**GOOD, "boxs": 1}, "boxes.json: boxs: unknown field"),
    (boxes(colour=[1, 2, 3]), "boxes.json: objects[0].colour: unknown field"),
    ({"objects": []}, "boxes.json: objects: "),
    (boxes(boxes={"0": [4, 50, 20, 60]}), 'objects[0].boxes["0"]: [4, 50, 20, 60] lies outside'),
    (boxes(boxes={"0": [4, 4, 4, 20]}), 'objects[0].boxes["0"]: [4, 4, 4, 20] has no area'),
    (boxes(boxes={"0": [4, 4, 9, 9], "9": [4, 4, 9, 9]}), "frame 9 is beyond num_frames 9"),
    (boxes(boxes={"0": [4, float("nan"), 9, 9]}), 'objects[0].boxes["0"]: [4, NaN, 9, 9] is not a box'),
    ({**GOOD, "num_frames": 49}, "num_frames is 49 but the video has 9 frames"),
    (boxes(mask="wide.png"), "objects[0].mask: "),
    (boxes(mask="none.png"), "objects[0].mask: "),
]
# Flags, with a good boxes.json -> what the line must say.
BAD_FLAGS = {
    "--image none.png": "none.png: no such image",
    "--image text.png": "text.png: not a readable image",
    "--image cut.png": "cut.png: not a readable image",
    "--size 48x50": "--size 48x50: takes auto, or height x width, both multiples of 8; the nearest is 48x48",
    "--size 8x16392": "--size 8x16392: 16384 pixels a side are the most",
    "--image large.png --frames 4000": "--frames 4000: 1098304000 pixels; 1073741824 is the most; add --detail false",
    "--preset wan5b --detail true": "--detail true: preset wan5b makes large videos as it is; leave it out",
    "--scale 4": "unknown flag --scale",
    "--adapter .": "--adapter .: is a folder; give the file in it",
    "--generator checkpoints/small/fast_generator.safetensors:ema": "this file holds one network; leave out :ema",
    "--traj b.mp4 --out b.mp4": "--out: would overwrite b.mp4, which --traj",
    "--traj b.boxes.mp4 --out ./b.mp4": "--out: would overwrite b.boxes.mp4, which --traj reads; give another name",
    "--size 48": "--size 48: takes auto, or height x width, both multiples of 8, as 32x48",
    "--preset wan5b --frames 9 --size 64x50": "--size 64x50",
    "--preset wan5b --frames 8": "--frames 8: must be 4 n + 1, at least 2; 9 is",
    "--preset wan5b --frames 9": "fast_generator.safetensors: no such file",
    "--stpes 3": "unknown flag --stpes; did you mean --steps? --help",
    "--steps few": "argument --steps: invalid int value: 'few'",
    "--steps -1": "--steps -1: at least 0",
    "--guidance 2": "--guidance 2.0: the fast networks have none",
    "--shift -1": "--shift -1.0: at least 0",
    "--decoder t.pth": "--decoder t.pth: preset small has one of its own",
    "--lora l.safetensors:0.5": "--lora l.safetensors:0.5: no such file",
    "--out out/x.avi": "--out out/x.avi: the name must end in .mp4",
    "--weights nowhere": "nowhere/fast_generator.safetensors: no such file",
    "--generator other/fast_generator.safetensors": "other/fast_generator.safetensors: is no network of preset small",
    "--generator swapped/fast_generator.safetensors": "holds a SlowAdapter, expected a FastGenerator",
    "--generator broken/fast_generator.safetensors": "not a readable safetensors file",
}


BAD = [*((content, "", message) for content, message in BAD_BOXES), *((GOOD, *case) for case in BAD_FLAGS.items())]


@pytest.mark.parametrize("content, flags, message", BAD, ids=[message[:50] for *_, message in BAD])
def test_bad_input_is_one_line_and_leaves_nothing(content, flags, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checkpoints").symlink_to(ROOT / "checkpoints")
    for name, shape in (("x.png", (48, 48, 3)), ("wide.png", (48, 60, 3)), ("large.png", (524, 524, 3))):
        iio.imwrite(tmp_path / name, np.full(shape, 90, np.uint8))
    (tmp_path / "text.png").write_text("no image")
    (tmp_path / "cut.png").write_bytes((tmp_path / "x.png").read_bytes()[:60])
    if content is not None:
        (tmp_path / "boxes.json").write_text(content if isinstance(content, str) else json.dumps(content))
    config = DiTConfig(64, 64, 2, 1, text_dim=64, text_tokens=32)
    save_network(tmp_path / "other/fast_generator.safetensors", "FastGenerator", config, VideoDiT(config).state_dict())
    save_network(tmp_path / "swapped/fast_generator.safetensors", "SlowAdapter", PRESETS["small"], {})
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken/fast_generator.safetensors").write_bytes(os.urandom(4096))
    for video in ("b.mp4", "b.boxes.mp4"):
        (tmp_path / video).write_text("maps")
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.setattr(sys, "argv", ["sample.py", "--image", "x.png", "--traj", "boxes.json", *flags.split()])
    with pytest.raises(SystemExit) as caught:
        run_script(sample.main, sample.Config, presets={"wan5b": sample.WAN5B})
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert err.count("\n") == 1 and err.startswith("sample.py: ") and message in err, err
    assert sorted(tmp_path.rglob("*")) == before


# What a folder of weights holds -> where the networks of this speed are found in it.
PLACES = {
    "own": ("fast", ["fast_generator.safetensors", "model.pt", "generator.pt"], "fast_generator.safetensors"),
    "generator.pt": ("fast", ["generator.pt", "model.pt"], "generator.pt"),
    "Turbo's model.pt": ("fast", ["model.pt", "models_t5_umt5-xxl-enc-bf16.pth", "Wan2.2_VAE.pth"], "model.pt"),
    "a single other": ("fast", ["Turbo_fp8.safetensors", "wan2.2_vae.safetensors"], "Turbo_fp8.safetensors"),
    "a single other among the base's": (
        "fast", ["turbo.safetensors", "diffusion_pytorch_model-00001-of-00002.safetensors", "my_lora.safetensors",
                 "slow_generator.safetensors", "umt5_xxl.safetensors", "classifier.safetensors",
                 "taew2_2.safetensors"], "turbo.safetensors",
    ),
    "slow, own": ("slow", ["slow_generator.safetensors", "config.json"], "slow_generator.safetensors"),
    "slow, diffusers": ("slow", ["transformer/config.json", "model.pt"], "transformer"),
    "slow, as published": ("slow", ["config.json", "diffusion_pytorch_model.safetensors.index.json"], ""),
    "slow, shards without index or config": ("slow", ["diffusion_pytorch_model-00001-of-00003.safetensors"], ""),
    "slow, one file": ("slow", ["diffusion_pytorch_model.safetensors"], ""),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_networks_are_found_by_their_names(kind, tmp_path):
    speed, names, found = PLACES[kind]
    for name in (*names, f"{speed}_adapter.safetensors"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    generator, adapter = sample.find_networks(sample.Config(weights=str(tmp_path), speed=speed))
    assert Path(generator) == tmp_path / found and adapter == tmp_path / f"{speed}_adapter.safetensors"
    other = tmp_path / "other.pt"
    other.touch()
    for named in (str(other), f"{other}:generator"):
        cfg = sample.Config(weights=str(tmp_path), speed=speed, generator=named)
        assert sample.find_networks(cfg) == (named, adapter)


@pytest.mark.parametrize("names, speed, message", [
    (["a.safetensors", "b.safetensors"], "fast", "which is the generator, of a.safetensors, b.safetensors? give --gen"),
    (["model.pt"], "slow", "slow_generator.safetensors: no such file; correct --weights, or give --generator"),
    (["turbo_lora.safetensors"], "fast", "fast_generator.safetensors: no such file; correct --weights"),
])  # fmt: skip
def test_a_generator_that_can_not_be_told_is_one_line(names, speed, message, tmp_path):
    for name in (*names, f"{speed}_adapter.safetensors"):
        (tmp_path / name).touch()
    with pytest.raises(UserError) as caught:
        sample.find_networks(sample.Config(weights=str(tmp_path), speed=speed))
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_exit_status_of_the_script_itself(run, tmp_path):
    job = run("sample.py", "--image", "none.png")
    assert (job.returncode, job.stdout) == (2, "") and job.stderr.count("\n") == 1
    assert not (tmp_path / "out").exists()


def fitted(path: Path, size: tuple[int, int]) -> tuple[torch.Tensor, tuple[int, int]]:
    """The first frame of a video of this size, and the picture's own."""
    pixels = load_image(str(path))
    return cover_frames(pixels[None], size)[None] / 127.5 - 1, pixels.shape[:2]


def test_an_image_of_another_size_is_resized_and_cut_to_its_middle(tmp_path):
    pixels = np.zeros((96, 192, 3), np.uint8)
    pixels[:, 48:144] = 90  # what is kept of it
    iio.imwrite(tmp_path / "big.png", pixels)
    image, size = fitted(tmp_path / "big.png", (48, 48))
    assert image.shape == (1, 3, 1, 48, 48) and size == (96, 192)
    torch.testing.assert_close(image[..., 2:-2], torch.full_like(image[..., 2:-2], 90 / 127.5 - 1))


@pytest.mark.parametrize("size", [(704, 1280), (480, 832)])
def test_a_box_stays_on_its_object_through_resize_and_cut(size, tmp_path):
    """A square drawn on a 1920x1080 image is found again by colour, in the image and in the map."""
    pixels = np.full((1080, 1920, 3), 60, np.uint8)
    pixels[300:700, 900:1500] = (200, 40, 40)
    iio.imwrite(tmp_path / "x.png", pixels)
    boxes = {"objects": [{"color": [128, 32, 32], "boxes": {"0": [900, 300, 1500, 700]}}]}
    (tmp_path / "b.json").write_text(json.dumps(boxes))
    image, source = fitted(tmp_path / "x.png", size)
    trajectory = load_trajectory(tmp_path / "b.json", size, 5, source)
    red = image[0, 0, 0] > image[0, 1, 0] + 0.5
    found = torch.nonzero(red)
    (top, left), (bottom, right) = found.amin(0).tolist(), (found.amax(0) + 1).tolist()
    assert np.abs(trajectory.boxes[0, 0] - [left, top, right, bottom]).max() <= 1
    filled = trajectory.maps("box")[0, 0] > -0.9
    assert (filled ^ red).float().mean() < 0.002 and red.float().mean() > 0.1


def test_a_photo_is_turned_as_its_exif_says(tmp_path):
    """As browsers show it, and draw.html with them: lying on its side in the file, upright in the video."""
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[:, :48] = 255  # the left half, which turned by 90 degrees clockwise is the upper one
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif)
    image, size = fitted(tmp_path / "photo.jpg", (96, 48))
    assert size == (96, 48) and image[..., :40, :].min() > 0.9 and image[..., 56:, :].max() < -0.9
    pixels[:20, :10] = 128
    for orientation in range(10):
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
        with Image.open(tmp_path / "photo.png") as photo:
            assert np.array_equal(read_picture(tmp_path / "photo.png"), ImageOps.exif_transpose(photo)), orientation


@pytest.mark.parametrize("flags", [{}, {"memory": "low"}])
def test_the_networks_are_gone_when_the_video_is_decoded(monkeypatch, tmp_path, flags):
    held, alive = [], []

    def watched(read):
        def wrapper(*args, **options):
            network = read(*args, **options)
            held.append(weakref.ref(network))
            return network

        return wrapper

    monkeypatch.setattr(sample, "read_adapter", watched(sample.read_adapter))
    monkeypatch.setattr(VideoDiT, "from_pretrained", watched(VideoDiT.from_pretrained))
    pieces = ToyCodec.pieces

    def decode(codec, latents, procs):
        alive.extend(ref() is not None for ref in held)
        return pieces(codec, latents, procs)

    monkeypatch.setattr(ToyCodec, "pieces", decode)
    monkeypatch.chdir(ROOT)
    sample.main(sample.Config(steps=1, detail=False, out=str(tmp_path / "s.mp4"), **flags))
    assert alive == [False, False]


def test_garbled_exif_tells_nothing(tmp_path):
    exif = Image.Exif()
    exif[0x0112], exif[0x010F] = 6, "somebody"
    Image.new("RGB", (96, 48)).save(tmp_path / "photo.jpg", exif=exif)
    whole = (tmp_path / "photo.jpg").read_bytes()
    at = whole.index(b"Exif")
    random, sizes = np.random.default_rng(0), set()
    for _ in range(200):
        garbled = bytearray(whole)
        for place in random.integers(at + 6, at + 50, 3):
            garbled[place] = random.integers(256)
        (tmp_path / "photo.jpg").write_bytes(garbled)
        sizes.add(fitted(tmp_path / "photo.jpg", (48, 48))[1])
    assert sizes == {(48, 96), (96, 48)}


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("speed, sampler", [("fast", "sample_fewstep"), ("slow", "sample_multistep")])
def test_latents_that_are_no_numbers_make_no_video(value, speed, sampler, here, monkeypatch):
    """Alone it is an error; in a table, that row's."""
    right, calls = getattr(flow, sampler), []

    def broken(*args):
        latents = right(*args)
        calls.append(1)
        if len(calls) < 3:  # the first, alone, and the first of the table
            latents[0, 0, -1, 0, 0] = value
        return latents

    monkeypatch.setattr(flow, sampler, broken)
    options = {"speed": speed, "steps": 1, "detail": False, "size": "48x64"}
    with pytest.raises(UserError, match="the networks give values that are no numbers"):
        sample.main(sample.Config(**options))
    assert not Path("out").exists() or not any(Path("out").iterdir())
    image, boxes = (ROOT / "examples" / name for name in ("balloons.jpg", "balloons.json"))
    Path("jobs.csv").write_text(f"image,traj,prompt,out\n{image},{boxes},a,a.mp4\n{image},{boxes},b,b.mp4\n")
    with pytest.raises(UserError, match=r"1 of 2 videos could not be made: a\.mp4: the networks give values"):
        sample.main(sample.Config(batch="jobs.csv", **options))
    assert not Path("a.mp4").exists() and Path("b.mp4").exists()
