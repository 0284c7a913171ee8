"""sample.py as a user runs it: the shipped example, its cost, and every kind of bad input."""

import math
import sys
import weakref
from pathlib import Path

import imageio.v3 as iio
import nets
import numpy as np
import pytest
from conftest import ROOT, refused, run_measured
from PIL import Image, ImageOps

import flow
import sample
from core.media import load_image, read_picture
from model import VideoDiT
from toy.codec import ToyCodec
from toy.detail import full_size


def test_shipped_example(tmp_path, monkeypatch):
    """No arguments: a video and its overlay, in under 60 s and 2 GiB."""
    monkeypatch.chdir(tmp_path)
    job, seconds, memory = run_measured(sys.executable, ROOT / "sample.py")
    assert job.returncode == 0 and "denoise" in job.stdout and "4 steps on cpu: out/sample.mp4" in job.stdout, job
    assert seconds < 60  # of work: on a busy machine a clock would say more
    assert memory < 2 << 20  # KiB
    video, overlay = (iio.imread(tmp_path / "out" / name) for name in ("sample.mp4", "sample.boxes.mp4"))
    picture = read_picture(ROOT / "examples/balloons.jpg")
    shown = full_size(picture, (152, 184))
    assert picture.shape == (192, 240, 3) and video.shape == overlay.shape == (9, *shown.shape)
    assert shown.shape == (192, 232, 3)
    assert np.abs(video[0].astype(float) - shown).mean() < 2  # it starts from the image
    assert np.abs(video[8].astype(float) - video[0]).mean() > 1  # and moves
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["sample.boxes.mp4", "sample.mp4"]


SMALL = {"size": "48x64", "dtype": "float32"}


def pixels(**options: object) -> np.ndarray:
    sample.main(sample.Config(**SMALL | options))
    return iio.imread("out/sample.mp4").astype(float)


def test_seed_and_prompt_matter_runs_repeat_and_8_bits_give_nearly_the_same_video(here):
    quick = {"steps": 2, "detail": False}
    first = pixels(**quick)
    assert np.array_equal(first, pixels(**quick))
    assert not np.array_equal(first, pixels(**quick, seed=1))
    told = quick | {"prompt": "a red blob spinning clockwise"}
    assert not np.array_equal(first, pixels(**told))
    slow = pixels(**told, speed="slow")
    assert not np.array_equal(first, slow)
    assert not np.array_equal(slow, pixels(**told, speed="slow", guidance=2))
    assert 0.1 < np.abs(pixels(**quick, memory="low") - first).mean() < 5


def test_two_processes_and_compiled_blocks_give_the_same_video(here, run):
    alone = pixels()
    for processes, flags in ((2, ()), (1, ("--compile",))):
        job = run("sample.py", *(f"--{name}={value}" for name, value in SMALL.items()), *flags, processes=processes)
        assert job.returncode == 0 and job.stdout.count("steps on cpu") == 1, job.stderr  # one of them speaks
        assert np.abs(iio.imread("out/sample.mp4").astype(float) - alone).mean() < 0.1


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


@pytest.mark.parametrize("speed, names, found", PLACES.values(), ids=PLACES)
def test_networks_are_found_by_their_names(speed, names, found, tmp_path):
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
    (["a.safetensors", "b.safetensors"], "fast", r"which is the generator, of a\.safetensors, b\.safetensors\?"),
    (["model.pt"], "slow", r"slow_generator\.safetensors: no such file; correct --weights, or give --generator"),
    (["turbo_lora.safetensors"], "fast", r"fast_generator\.safetensors: no such file; correct --weights"),
])  # fmt: skip
def test_a_generator_that_can_not_be_told_is_one_line(names, speed, message, tmp_path):
    for name in (*names, f"{speed}_adapter.safetensors"):
        (tmp_path / name).touch()
    refused(message, sample.find_networks, sample.Config(weights=str(tmp_path), speed=speed))


def test_a_photo_is_turned_as_its_exif_says_and_garbled_exif_tells_nothing(tmp_path):
    """As browsers show it, and draw.html with them: lying on its side in the file, upright in the video."""
    pixels = np.zeros((48, 96, 3), np.uint8)
    pixels[:, :48], pixels[:20, :10] = 255, 128
    exif = Image.Exif()
    for orientation in range(10):
        exif[0x0112], exif[0x010F] = orientation, "somebody"
        Image.fromarray(pixels).save(tmp_path / "photo.png", exif=exif)
        with Image.open(tmp_path / "photo.png") as photo:
            assert np.array_equal(load_image(tmp_path / "photo.png"), ImageOps.exif_transpose(photo)), orientation
    exif[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / "photo.jpg", exif=exif)
    assert load_image(tmp_path / "photo.jpg").shape == (96, 48, 3)
    whole = (tmp_path / "photo.jpg").read_bytes()
    at, random, sizes = whole.index(b"Exif"), np.random.default_rng(0), set()
    for _ in range(200):
        garbled = bytearray(whole)
        for place in random.integers(at + 6, at + 50, 3):
            garbled[place] = random.integers(256)
        (tmp_path / "photo.jpg").write_bytes(garbled)
        sizes.add(load_image(tmp_path / "photo.jpg").shape)
    assert sizes == {(48, 96, 3), (96, 48, 3)}


@pytest.mark.parametrize("memory", ["high", "low"])
def test_the_networks_are_gone_when_the_video_is_decoded(memory, here, monkeypatch):
    held = nets.watch(monkeypatch, sample, "read_adapter", after=weakref.ref)
    held_too = nets.watch(monkeypatch, VideoDiT, "from_pretrained", after=weakref.ref)
    alive = nets.watch(monkeypatch, ToyCodec, "pieces", lambda *_: [ref() is not None for ref in held + held_too])
    sample.main(sample.Config(steps=1, detail=False, memory=memory))
    assert alive == [[False, False]]


@pytest.mark.parametrize("value, speed, sampler", [
    (math.nan, "fast", "sample_fewstep"), (math.inf, "slow", "sample_multistep"),
    (-math.inf, "fast", "sample_fewstep"),
])  # fmt: skip
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
    refused("the networks give values that are no numbers", sample.main, sample.Config(**options))
    assert not Path("out").exists() or not any(Path("out").iterdir())
    row = "examples/balloons.jpg,examples/balloons.json"
    Path("jobs.csv").write_text(f"image,traj,prompt,out\n{row},a,a.mp4\n{row},b,b.mp4\n")
    one = r"1 of 2 videos could not be made: a\.mp4: the networks give values"
    refused(one, sample.main, sample.Config(batch="jobs.csv", **options))
    assert not Path("a.mp4").exists() and Path("b.mp4").exists()
