"""Any picture: the size that `--size auto` chooses, boxes that stay on their objects, and what a wrong size is told."""

import json
import random

import imageio.v3 as iio
import nets
import numpy as np
import pytest
import torch
from conftest import refused

import sample
from core.codec import best_size
from core.media import MOST_VIDEO, cover
from toy.codec import ToyCodec
from trajectory import load_trajectory
from wan.codec import WanCodec

SHAPES = [(400, 400), (400, 300), (480, 270), (270, 480), (210, 490)]  # height, width


def wans_rule(picture: tuple[int, int], area: int, unit: int) -> tuple[int, int]:
    """Among all sides: each in turn is the longest that is no longer than the ideal one, the other the longest that the
    area then allows. The nearer ratio wins, and the second way where both are as near.
    """

    def longest(ideal: float) -> int:
        return max(side for side in range(unit, 8192, unit) if side <= ideal)

    def distance(size: tuple[int, int]) -> float:
        return max(ratio / (size[1] / size[0]), size[1] / size[0] / ratio)

    ratio = picture[1] / picture[0]
    width, height = longest((area * ratio) ** 0.5), longest((area / ratio) ** 0.5)
    by_width, by_height = (longest(area / width), width), (height, longest(area / height))
    return by_width if distance(by_width) < distance(by_height) else by_height


@pytest.mark.parametrize("area, unit", [(704 * 1280, 32), (128 * 128, 8)])
def test_sizes_are_those_of_wans_rule(area, unit):
    draw = random.Random(0)
    for _ in range(500):
        picture = draw.randint(200, 4000), draw.randint(200, 4000)
        size = best_size(picture, area, unit)
        assert size == wans_rule(picture, area, unit), picture
        assert size[0] % unit == size[1] % unit == 0 and size[0] * size[1] <= area


def test_sizes_of_wan5b_by_hand_and_how_much_of_a_picture_is_kept():
    wanted = {(704, 1280): (704, 1280), (1280, 704): (1280, 704), (1000, 1000): (928, 960), (1080, 1920): (704, 1248)}
    assert {picture: best_size(picture, WanCodec.area, 32) for picture in wanted} == wanted
    for picture in (*SHAPES, *((4 * height, 4 * width) for height, width in SHAPES)):
        size = best_size(picture, WanCodec.area, 32)
        (height, width), _, _ = cover(picture, size)
        assert size[0] * size[1] / (height * width) >= 0.95
        assert size[0] * size[1] >= 0.93 * WanCodec.area  # and the area is used


@pytest.mark.parametrize("shape", SHAPES)
def test_a_square_stays_in_its_box_whatever_the_pictures_shape(shape, here, capsys):
    """From the picture to the video with `--size auto`, on preset small. Any number of objects is fine."""
    height, width = shape
    side = min(height, width) // 2
    left, top = int(0.6 * width) - side // 2, int(0.45 * height) - side // 2
    pixels = np.full((height, width, 3), 60, np.uint8)
    pixels[top : top + side, left : left + side] = (220, 40, 40)
    iio.imwrite("x.png", pixels)
    box = [left, top, left + side, top + side]
    (here / "b.json").write_text(json.dumps({"objects": [{"boxes": {"0": box, "8": box}}] * 12}))
    nets.save(fast_generator=nets.generator(layers=1), fast_adapter=nets.adapter(layers=1, maps="pixels"))
    job = sample.Config(weights=".", image="x.png", traj="b.json", steps=1, detail=False)
    image, trajectory, _ = sample.read_condition(job, ToyCodec(), "pixels")
    assert len(trajectory.names) == 12 and not capsys.readouterr().err
    size = best_size((height, width), ToyCodec.area, 8)
    assert image.shape == (1, 3, 1, *size) and trajectory.size == size
    red = torch.nonzero(image[0, 0, 0] > image[0, 1, 0] + 0.7)
    (y0, x0), (y1, x1) = red.amin(0).tolist(), (red.amax(0) + 1).tolist()
    assert np.abs(trajectory.boxes[0][0] - [x0, y0, x1, y1]).max() <= 1
    sample.main(job)
    assert iio.imread("out/sample.mp4").shape == (9, *size, 3)


@pytest.mark.parametrize("frames, near", [(120, 121), (119, 117), (1, 5), (2, 5), (122, 121), (123, 121)])
def test_a_wrong_length_is_told_the_nearest(frames, near):
    """With a picture and without."""
    for given in ("auto", frames), ("auto", frames, (704, 1280)), ("704x1280", frames):
        message = rf"^--frames {frames}: must be 4 n \+ 1, at least 2; {near} is$"
        refused(message, WanCodec.video_size, WanCodec, *given)
    assert WanCodec.video_size(WanCodec, "auto", 121) == (0, 0)


@pytest.mark.parametrize("size, mend", [
    ("1x1", "; the nearest is 32x32"), ("720x1280", "; the nearest is 704x1280"), ("0x5", "; the nearest is 32x32"),
    ("700x1290", "; the nearest is 704x1280"), ("large", ", as 128x192"),
])  # fmt: skip
def test_a_wrong_size_is_told_the_nearest(size, mend):
    message = f"^--size {size}: takes auto, or height x width, both multiples of 32{mend}$"
    refused(message, WanCodec.video_size, WanCodec, size, 121)
    assert WanCodec.video_size(WanCodec, "480x832", 121) == (480, 832)


def test_a_video_may_not_have_too_many_pixels():
    message = f"^--size auto --frames 4001: {704 * 1280 * 4001} pixels; {MOST_VIDEO} is the most$"
    refused(message, WanCodec.video_size, WanCodec, "auto", 4001, (704, 1280))


def test_a_box_outside_what_is_kept_is_one_line(tmp_path):
    """A wide video of a tall photo keeps its middle, rows 221 to 419; a box above it has nothing to steer."""
    boxes = {"0": [10, 300, 60, 350], "4": [10, 20, 60, 70]}
    (tmp_path / "b.json").write_text(json.dumps({"objects": [{"name": "cat\ntwo", "boxes": boxes}]}))
    message = r'objects\[0\]\.boxes\["4"\].*the box of cat two lies outside.*--size 352x640'
    refused(message, load_trajectory, tmp_path / "b.json", (352, 640), 5, (640, 360))
    load_trajectory(tmp_path / "b.json", (640, 352), 5, (640, 360))  # where all is kept
