"""Trajectories: known maps pixel by pixel, known curves, every error a user can meet, and maps read back from files."""

import json
import re
import subprocess
import time
import timeit
import zlib
from dataclasses import replace
from functools import partial

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import make_trajectory, refused
from PIL import Image

from core.boxes import draw_outlines, draw_overlay, fill_box, fill_hole
from core.media import to_uint8, write_image
from core.noise import random_blackout
from toy.world import World
from trajectory import PALETTE, Trajectory, load_trajectory

CELLS = {".": (0, 0, 0), "a": PALETTE[0], "b": PALETTE[1]}


def drawn(text: str) -> torch.Tensor:
    """ASCII art -> one frame of a map, [3, height, width]."""
    rgb = np.array([[CELLS[c] for c in line] for line in text.split()], dtype=np.float32)
    return torch.from_numpy(rgb).permute(2, 0, 1) / 127.5 - 1


def write(folder, **top):
    path = folder / "boxes.json"
    path.write_text(json.dumps(top))
    return path


def load(folder, boxes, frames=9, size=(48, 48), source=None, **fields) -> Trajectory:
    """One object with these boxes and fields, through a file."""
    return load_trajectory(write(folder, objects=[{"boxes": boxes, **fields}]), size, frames, source)


def test_maps_pixel_by_pixel():
    """Masks of frame 0 alone serve for box maps only."""
    masks = np.zeros((2, 2, 6, 8), dtype=bool)
    masks[0, 0, 1:5, 1:5] = masks[1, 0, 2:6, 4:8] = True
    masks[0, 1, 0:2, 0:2] = masks[1, 1, 1:3, 1:3] = True
    full = make_trajectory([[[1, 1, 5, 5], [0, 0, 6, 4]], [[4, 2, 8, 6], [3, 2, 8, 6]]], (6, 8), masks)
    outlines = "aaaaaaa. a.....a. a..bbbbb a..b..a. aaabaaa. ...b...."
    for kind, later in (("box", outlines), ("mask", "aa...... abb..... .bb..... ........ ........ ........")):
        maps = full.maps(kind)
        assert maps.dtype == torch.float32 and maps.shape == (3, 2, 6, 8)
        assert torch.equal(maps[:, 0], drawn("........ .aaaa... .aaabbbb .aaabbbb .aaabbbb ....bbbb"))
        assert torch.equal(maps[:, 1], drawn(later))
    first = replace(full, masks=full.masks[:, 0])
    assert torch.equal(first.maps(), full.maps())
    with pytest.raises(ValueError, match="every frame"):
        first.maps("mask")
    with pytest.raises(ValueError, match="kind"):
        full.maps("boxes")


def picture(height: int = 20, width: int = 24) -> torch.Tensor:
    """Every pixel another colour, [3, height, width], none near black."""
    red, green = torch.linspace(-0.8, 1, width).expand(height, -1), torch.linspace(-0.8, 1, height)[:, None]
    return torch.stack([red, green.expand(-1, width), torch.full((height, width), 0.5)])


# Objects' boxes, their masks in frame 0, as boxes, if these are others, and what frames show: in this region what the
# picture has from this place on, mirrored where that lies beyond it, or grey. Elsewhere frame 0 is black, and
# later ones are the picture, but for holes: where an object was, and where its parts are that another hid.
PLACES = {
    "moved by whole pixels": ([[[2, 3, 8, 9], [7, 5, 13, 11], [2, 3, 8, 9]]], None, [
        (0, (2, 3, 8, 9), (2, 3)), (1, (7, 5, 13, 11), (2, 3)), (2, (2, 3, 8, 9), (2, 3))]),
    "cut out of its box by a mask": ([[[2, 3, 8, 9], [12, 3, 18, 9]]], [[2, 3, 5, 9]], [
        (0, (2, 3, 5, 9), (2, 3)), (1, (12, 3, 15, 9), (2, 3))]),
    "the later in front": (
        [[[2, 3, 10, 9], [2, 12, 10, 18]], [[6, 3, 10, 9], [4, 12, 8, 18]]], None, [
            (0, (2, 3, 10, 9), (2, 3)), (1, (2, 12, 4, 18), (2, 3)), (1, (4, 12, 8, 18), (6, 3)),
            (1, (8, 12, 10, 18), "hole")]),
    "mirrored beyond the edge of frame 0": ([[[-4, 3, 4, 9], [6, 3, 14, 9]]], None, [
        (0, (0, 3, 4, 9), (0, 3)), (1, (6, 3, 14, 9), (-4, 3))]),
    "the camera": ([[[0, 0, 24, 20], [6, 0, 30, 20], [-6, -4, 18, 16]]], None, [
        (0, (0, 0, 24, 20), (0, 0)), (1, (0, 0, 24, 20), (-6, 0)), (2, (0, 0, 24, 20), (6, 4))]),
    "the camera and a thing": ([[[0, 0, 24, 20], [6, 0, 30, 20]], [[2, 3, 8, 9], [12, 3, 18, 9]]], None, [
        (0, (0, 0, 24, 20), (0, 0)), (1, (0, 0, 24, 20), (-6, 0)), (1, (0, 1, 6, 11), "hole"),
        (1, (6, 1, 16, 11), "hole"), (1, (12, 3, 18, 9), (2, 3))]),
    "no box in frame 0: grey": ([[None, [3, 3, 8, 9], None]], None, [(1, (3, 3, 8, 9), "grey")]),
    "no box in frame 0: its mask is its box": ([[None, [12, 10, 16, 14]]], [[5, 4, 9, 8]], [
        (0, (5, 4, 9, 8), (5, 4)), (1, (12, 10, 16, 14), (5, 4))]),
    "outside, and between pixels": ([[[2, 3, 8, 9], [30, 3, 36, 9], [2.6, 3, 3.4, 9]]], None, [
        (0, (2, 3, 8, 9), (2, 3))]),
}  # fmt: skip


@pytest.mark.parametrize("kind", PLACES)
def test_a_map_of_pixels_shows_things_where_they_are_and_where_they_go(kind):
    (tracks, masks, regions), image = PLACES[kind], picture()
    trajectory = make_trajectory(tracks, (20, 24), masks and [fill_box(np.array(m), (20, 24)) for m in masks])
    wanted = torch.full((3, len(tracks[0]), 20, 24), -1.0)
    shown = torch.from_numpy(trajectory.first_masks).any(0, keepdim=True)
    near = F.max_pool2d(shown.float(), 5, stride=1, padding=2) > 0  # and two pixels around
    wanted[:, 1:] = torch.where(near, torch.nan, image)[:, None]
    mirrored = torch.from_numpy(np.pad(image, ((0, 0), (20, 20), (24, 24)), "symmetric"))
    for t, (x0, y0, x1, y1), source in regions:
        if isinstance(source, tuple):
            x, y = source[0] + 24, source[1] + 20
            wanted[:, t, y0:y1, x0:x1] = mirrored[:, y : y + y1 - y0, x : x + x1 - x0]
        else:
            wanted[:, t, y0:y1, x0:x1] = {"hole": torch.nan, "grey": 0.0}[source]
    known = ~wanted.isnan()
    for maps in (trajectory.maps("box", image), trajectory.maps("mask", image)):
        assert maps.dtype == torch.float32 and torch.allclose(maps[known], wanted[known], atol=1e-4)
        low, high = image.amin((1, 2)), image.amax((1, 2))
        for channel, hole in enumerate(~known):  # between the colours around
            assert (low[channel] <= maps[channel][hole]).all() and (maps[channel][hole] <= high[channel]).all()
            assert maps[channel][hole].numel() < 8 or 0 < maps[channel][hole].std() < 0.5 or channel == 2
    given = replace(trajectory, maps_given=trajectory.maps())  # whose colours are not the picture's: painted anew
    assert torch.equal(given.maps("box", image), trajectory.maps("box", image))
    assert torch.equal(given.maps("box"), trajectory.maps("box"))


def test_a_hole_gets_smooth_colours_between_those_around_it():
    image, hole = picture(64, 48), torch.zeros(64, 48, dtype=torch.bool)
    hole[8:56, 8:40] = True
    filled = fill_hole(image.masked_fill(hole, torch.nan), hole)
    assert torch.equal(filled[:, ~hole], image[:, ~hole]) and torch.allclose(filled[2], image[2])
    assert (filled - image).abs().max() < 0.01  # goes on with a slope
    step = (torch.arange(48) >= 24).float().expand(1, 64, 48)  # from black to white: a slope between them
    row = fill_hole(step, hole)[0, 32, 7:41]
    assert row[0] == 0 and row[-1] == 1 and row.diff().min() > 0.02 and row.diff().max() < 0.05
    assert torch.equal(fill_hole(image, hole & False), image)
    assert fill_hole(image, torch.ones_like(hole)).abs().max() == 0
    hole[:], hole[0, 0] = True, False  # a single pixel is known
    assert torch.allclose(fill_hole(image, hole), image[:, :1, :1].expand_as(image), atol=1e-5)


def test_a_box_that_grows_scales_what_is_in_it():
    image, near = picture(), partial(torch.testing.assert_close, atol=5e-3, rtol=0)  # PyTorch's bicubic on ramps
    red, green = image[0, 0, 2:10], image[1, 2:10, 0]
    step_x, step_y = red[1] - red[0], green[1] - green[0]
    maps = make_trajectory([[[2, 2, 10, 10], [6, 2, 22, 18], [2.5, 3.25, 10.5, 11.25]]], (20, 24)).maps("box", image)
    # Twice as large: the centres of pixels lie a quarter of a pixel beside the source's. The outer see the mask end.
    at = torch.arange(3, 13) / 2 - 0.25
    near(maps[0, 1, 5:15, 9:19], (red[0] + at * step_x).expand(10, 10))
    near(maps[1, 1, 5:15, 9:19], (green[0] + at * step_y)[:, None].expand(10, 10))
    # By half a pixel to the right and one and a quarter down: colours in between.
    near(maps[0, 2, 4:6, 4:6], (image[0, :2, 3:5] + image[0, :2, 4:6]) / 2)
    near(maps[1, 2, 5, 5], image[1, 5, 0] - 1.25 * step_y)


def test_an_object_between_pixels_fades_at_its_edge_and_is_not_cut_by_its_box():
    image, same = torch.full((3, 14, 20), -0.5), partial(np.allclose, atol=1e-4)
    image[:, 4:10, 4:10] = 0.8
    maps = make_trajectory([[[4, 4, 10, 10], [6.5, 4, 12.5, 10], [6.3, 4, 12.3, 10]]], (14, 20)).maps("box", image)
    row = maps[0, :, 7]
    assert same(row[1, [5, 13]], -0.5) and same(row[1, 8:11], 0.8) and same(row[1].roll(1), row[1].flip(0))
    assert torch.allclose(row[1, [6, 12]], torch.tensor(0.15), atol=0.02)  # half of either column is the object's
    assert 0.6 > row[2, 6] > 0.2 > 0.1 > row[2, 12] > -0.4  # more of column 6, less of column 12


# Pixels that cv2.rectangle(image, (x0, y0), (x1, y1), color, thickness) of OpenCV 4 paints, and the CRC of their mask.
OPENCV = [
    ((704, 1280), [100, 200, 300, 420], 7528, 3402925787), ((704, 1280), [-30, 40, 260, 729], 8308, 3153468899),
    ((704, 1280), [611, 77, 640, 83], 538, 3433285077), ((480, 832), [100, 200, 300, 420], 4188, 1729970597),
    ((480, 832), [-30, 40, 260, 505], 3497, 2031520355), ((480, 832), [611, 77, 640, 83], 338, 3314417185),
    ((480, 720), [100, 200, 300, 420], 4188, 3855275780),
]  # fmt: skip


@pytest.mark.parametrize("size, box, count, crc", OPENCV)
def test_outlines_are_those_of_opencv(size, box, count, crc):
    video = np.zeros((3, 1, *size), np.uint8)
    draw_outlines(video, np.array([box], float), np.ones((3, 1, 1), np.uint8))
    assert (video == video[:1]).all() and video[0].sum() == count
    assert zlib.crc32(np.packbits(video[0, 0]).tobytes()) == crc


def test_edges_round_to_the_nearest_pixel_and_stay_inside(tmp_path):
    boxes = [[0, 0, 1, 1], [1.5, 1.49, 4.5, 4.49], [-3, 2, 20, 4], [6.1, 5.2, 6.2, 5.3], [9, 9, 12, 12]]
    maps = make_trajectory([boxes], (6, 8)).maps()
    for t, wanted in enumerate((
        "........ ..aaaa.. ..a..a.. ..a..a.. ..aaaa.. ........",
        "........ ........ aaaaaaaa ........ aaaaaaaa ........",
        "........ ........ ........ ........ ........ ......a.", "........ " * 6,  # never nothing of what is inside
    )):  # fmt: skip
        assert torch.equal(maps[:, t + 1], drawn(wanted))
    for box, shown in (([-10, 5, 0.3, 20], [0, 5, 1, 20]), ([47.8, 47.6, 60, 90], [47, 47, 48, 48])):
        ys, xs = load(tmp_path, {"0": box, "8": [4, 4, 20, 20]}).masks[0].nonzero()
        assert [xs.min(), ys.min(), xs.max() + 1, ys.max() + 1] == shown  # by less than half a pixel: one


def test_palette_colors_are_far_apart():
    assert len(PALETTE) >= 12 and torch.pdist(torch.tensor(PALETTE, dtype=torch.float64)).min() >= 45


def test_in_a_share_of_draws_a_random_subset_of_frames_is_black():
    draws = np.array([random_blackout(u, 0.4) for u in np.random.default_rng(0).random((2000, 10))])
    assert not draws[:, 0].any() and 0.3 < draws.any(1).mean() < 0.4  # some subsets are empty
    assert 0.15 < draws[:, 1:].mean() < 0.25 and draws[:, 1:].all(1).any()
    assert not random_blackout(np.zeros(5), 0).any() and random_blackout(np.zeros(5), 1).tolist() == [0, 1, 1, 1]


def test_smooth_passes_keyframes_and_equals_hand_computed_values(tmp_path):
    # x0: 0, 10, 40 at frames 0, 2, 8. Secants 5 and 5: a straight line. y0: 0, 12, 18, secants 6 and 1, h = 2 and 6:
    # inner slope (14 + 10) / (14 / 6 + 10 / 1) = 72 / 37. At t = 1, s = 1/2: 6 + 2/4 * (0 - (72/37 - 6) / 2).
    # At t = 5, s = 1/2: 15 + 6/4 * ((72/37 - 1) / 2 - 0).
    keys = {"0": [0, 0, 4, 25], "2": [10, 12, 14, 25], "8": [40, 18, 44, 25]}
    track = load(tmp_path, keys).boxes[0]
    for frame, box in keys.items():
        assert track[int(frame)].tolist() == box
    np.testing.assert_allclose(track[:, 0], 5 * np.arange(9), atol=1e-12)
    np.testing.assert_allclose(track[1, 1], 6 - (72 / 37 - 6) / 4, rtol=1e-12)
    np.testing.assert_allclose(track[5, 1], 15 + 0.75 * (72 / 37 - 1), rtol=1e-12)
    assert (track[:, 3] == 25).all()


def test_smooth_never_overshoots_and_differs_from_linear(tmp_path):
    rng = np.random.default_rng(0)
    for _ in range(20):
        frames = np.sort(rng.choice(41, 6, replace=False))
        low = rng.uniform(0, 20, (6, 2)).round(2)
        keys = {str(t): [*low[i], *(low[i] + 25)] for i, t in enumerate(frames)}
        track = load(tmp_path, keys, frames=41).boxes[0]
        for i in range(5):
            piece, ends = track[frames[i] : frames[i + 1] + 1, :2], low[i : i + 2]
            assert (piece[[0, -1]] == ends).all()
            assert (np.diff(piece, axis=0) * np.sign(ends[1] - ends[0]) >= -1e-9).all()  # it never turns back
        assert not np.allclose(track, load(tmp_path, keys, frames=41, interpolate="linear").boxes[0], atol=0.1)


def test_linear_midpoint_held_ends_lists_and_a_single_keyframe(tmp_path):
    keys = {"6": [20, 30, 40, 40], "2": [0, 10, 10, 20]}  # in any order
    for kind in ("linear", "smooth"):  # two keyframes make a straight line in both
        track = load(tmp_path, keys, interpolate=kind).boxes[0]
        assert track[4].tolist() == [10, 20, 25, 30]
        assert (track[:3] == keys["2"]).all() and (track[6:] == keys["6"]).all()
    boxes = [[t, 0, t + 4, 5] for t in range(9)]
    assert load(tmp_path, boxes).boxes[0].tolist() == boxes
    assert (load(tmp_path, {"3": [1, 2, 3, 4]}).boxes[0] == [1, 2, 3, 4]).all()
    assert load(tmp_path, **GOOD).boxes.shape == (1, 9, 4)  # what the errors spoil


@pytest.mark.parametrize("fields, frames", [
    ({"boxes": {"0": [4, 4, 20, 20], "5": [4, 4, 20, 20]}, "interpolate": "none"}, [0, 5]),
    ({"boxes": {"0": [4, 4, 20, 20]}, "visible": [[2, 3], [6, 8]]}, [2, 3, 6, 7, 8]),  # it enters late
])  # fmt: skip
def test_other_frames_stay_black(tmp_path, fields, frames):
    trajectory = load(tmp_path, **fields)
    assert np.isfinite(trajectory.boxes[0]).all(1).nonzero()[0].tolist() == frames
    lit = (trajectory.maps() > -1).any(0)
    assert lit.flatten(1).any(1).nonzero().flatten().tolist() == frames
    assert lit[0, 4:20, 4:20].all() == (frames[0] == 0)  # frame 0 is filled


def test_scaling_from_the_source_to_the_generated_size(tmp_path):
    keys, size = {"0": [320, 176, 640, 352]}, (44, 80)
    stated = {"width": 1280, "height": 704}
    for top, source in ((stated, None), ({}, (704, 1280)), (stated, (88, 161))):
        scaled = load_trajectory(write(tmp_path, **top, objects=[{"boxes": keys}]), size, 9, source)
        assert (scaled.boxes[0] == [20, 11, 40, 22]).all()
        assert np.argwhere(scaled.masks[0]).tolist() == [[y, x] for y in range(11, 22) for x in range(20, 40)]
    assert load(tmp_path, {"0": [1, 2, 3, 4]}).boxes[0, 0].tolist() == [1, 2, 3, 4]  # nothing stated: generated pixels


def test_a_frame_of_another_shape_covers_the_video_and_is_cut_to_its_middle(tmp_path):
    keys = {"0": [20, 0, 40, 10]}  # of 100 x 50, twice as wide as high; the video is square: x from 25 to 75 is kept
    sizes = {"size": (100, 100), "source": (50, 100)}
    square = load(tmp_path, keys, **sizes)
    assert (square.boxes[0] == [-10, 0, 30, 20]).all()
    assert np.argwhere(square.masks[0]).tolist() == [[y, x] for y in range(20) for x in range(30)]
    mask = np.zeros((50, 100), dtype=np.uint8)
    mask[:10, 20:40] = 1
    Image.fromarray(mask).save(tmp_path / "m.png")
    assert (load(tmp_path, keys, mask="m.png", **sizes).masks == square.masks).all()
    for t in range(9):
        write_image(tmp_path / f"maps/{t}.png", mask[..., None] * np.array(PALETTE[0], dtype=np.uint8))
    given = load_trajectory(tmp_path / "maps", (100, 100), 9)
    assert (given.masks == square.masks).all() and (given.boxes[0] == [-10, 0, 30, 20]).all()
    lost = r"objects\[0\].boxes.*box of object 0 lies outside what --size 100x50 keeps"
    refused(lost, load, tmp_path, {"0": [0, 0, 10, 50]}, size=(100, 50), source=(50, 100))


def test_mask_image_defaults_and_fields(tmp_path):
    mask = np.zeros((8, 16), dtype=np.uint8)
    mask[5:, 13:] = 1  # any value but 0 is inside; the pixel under a centre counts, not the corner's
    Image.fromarray(mask).save(tmp_path / "cat.png")
    item = {"mask": "cat.png", "boxes": {"2": [0, 0, 8, 8]}, "interpolate": "none"}
    other = {"name": "dog", "color": [1, 2, 3], "boxes": {"0": [0, 0, 8, 8]}}
    path = write(tmp_path, num_frames=3, width=16, height=8, objects=[item, other])
    trajectory = load_trajectory(path, (4, 8), 3)
    assert np.argwhere(trajectory.masks[0]).tolist() == [[2, 6], [2, 7], [3, 6], [3, 7]]
    assert np.isnan(trajectory.boxes[0, :2]).all()
    assert trajectory.names == ["object 0", "dog"] and trajectory.colors.tolist() == [list(PALETTE[0]), [1, 2, 3]]
    assert trajectory.num_frames == 3 and trajectory.size == (4, 8)
    # Outside may be transparent instead of black; a mask may have the user's image's size where the boxes have another.
    rgba = np.full((24, 48, 4), 255, dtype=np.uint8)
    rgba[..., 3] = 255 * np.kron(mask, np.ones((3, 3), dtype=np.uint8))
    Image.fromarray(rgba).save(tmp_path / "cat.png")
    assert (load_trajectory(path, (4, 8), 3, source_size=(24, 48)).masks == trajectory.masks).all()


BOX = {"0": [4, 4, 20, 20]}
GOOD = {"boxes": BOX}


def one(**fields):
    return {"objects": [{**GOOD, **fields}]}


def top(**fields):
    return {"objects": [GOOD], **fields}


def at_zero(*box):
    return one(boxes={"0": list(box)})


TURNS = {"0": [0, 0, 12, 9], "2": [10, 0, 12, 9], "6": [30, 0, 32, 9], "8": [30, 0, 44, 9]}  # left early, right late
TWICE = "stands twice in one object; keep one"

ERRORS = {  # name: (what boxes.json holds, or several such, the field the message must name, a part of the mend)
    "not JSON": ('{"objects":\n [}', "line 2, column 3", "not valid JSON"),
    "no JSON in UTF-8": (
        ('{"objects": [{"name": "\xe9t\xe9"}]}'.encode("latin-1"), b"\x89PNG\r\n\xff\xfe\x00", "[" * 200_000,
         '{"num_frames": ' + "9" * 100_000 + "}"),
        "boxes.json", "can't be read as JSON in UTF-8; give a boxes.json, a map video"),
    "a keyframe twice": ('{"objects": [{"boxes": {"0": [4, 4, 20, 20], "0": [9, 9, 30, 30]}}]}', '"0"', TWICE),
    "objects twice": ('{"objects": [], "objects": [{"boxes": {"0": [4, 4, 20, 20]}}]}', '"objects"', TWICE),
    "a colour twice": ('{"objects": [{"color": [9, 9, 9], "boxes": {}, "color": [0, 99, 0]}]}', '"color"', TWICE),
    "spline points": (
        ([[{"x": 1, "y": 2}]], [{"x": 1, "y": 2}], []), "perhaps of spline points", "an object; point tracks are .npy"),
    "top level": ([1], "holds a list", "boxes.json is an object"),
    "unknown top field": ({"objects": [GOOD], "fps": 24}, "fps", "num_frames, width, height, objects"),
    "unknown object field": (one(colour=[1, 2, 3]), "objects[0].colour", "name, mask, color"),
    "unknown field breaks lines": (one(**{"a\nb\u2028c": 1}), "objects[0].a b c", "unknown"),
    "objects": (({}, *({"objects": given} for given in ([], GOOD, [GOOD] * 65))), "objects",
                "must be a list of 1 to 64 objects; draw at least one or delete some"),
    "object no object": ({"objects": [GOOD, 3]}, "objects[1]", "boxes"),
    "name": (one(name=3), "objects[0].name", "quotes"),
    "other num_frames": ({"num_frames": 121, "objects": [GOOD]}, "num_frames", "change it or pass --frames 121"),
    "num_frames": ((top(num_frames=0), top(num_frames=True)), "num_frames", "whole number"),
    "width": ((top(width=1.5, height=3), top(width="48", height=48)), "width", "whole number"),
    "height": ((top(width=48, height=-48), top(width=48, height=10**400)), "height", "whole number"),
    "width alone": ({"width": 48, "objects": [GOOD]}, "width", "both"),
    "boxes": (({"objects": [{}]}, one(boxes={}), one(boxes=[]), one(boxes="all")), "objects[0].boxes",
              'missing, empty or no boxes; give {"0"'),
    "no numbers": (
        (at_zero(1, 2, 3), at_zero(1, 2, float("nan"), 4), at_zero(1, 2, float("inf"), 4), at_zero(False, 2, 3, 4),
         at_zero("1", 2, 3, 4), one(boxes={"0": None})), 'objects[0].boxes["0"]', "four finite numbers"),
    "box in a list": (one(boxes=[BOX["0"]] * 8 + [[1, 2]]), "objects[0].boxes[8]", "four finite numbers"),
    "no area": ((at_zero(5, 2, 5, 4), at_zero(1, 9, 5, 4)), 'objects[0].boxes["0"]', "no area"),
    "outside": (
        (at_zero(48.5, 2, 60, 4), at_zero(-8, 2, -1, 4), at_zero(1, 2, 10**400, 4)), 'objects[0].boxes["0"]',
        "lies outside the image; use 0 to 48"),
    "parts of the picture": (one(boxes={"0": [0.1, 0.2, 0.4, 0.5], "8": [0, 0, 1, 1]}), "objects[0].boxes", "by its"),
    "outside later": (
        tuple(one(boxes={**BOX, "8": box}) for box in ([-20, 4, 0, 20], [48, 4, 60, 20], [4, 50, 20, 60])),
        'boxes["8"]', "lies outside the image"),
    "keyframe beyond": (one(boxes={**BOX, "9": BOX["0"]}), 'objects[0].boxes["9"]', "beyond num_frames 9; use 0 to 8"),
    "keyframe negative": (one(boxes={"-1": BOX["0"]}), 'objects[0].boxes["-1"]', "negative"),
    **{f"keyframe {key[:5]}": (one(boxes={**BOX, key: BOX["0"]}), f'objects[0].boxes["{key[:40]}', "a frame number")
       for key in ("first", "0.5", "00", "9" * 5000)},
    "list too short": (one(boxes=[BOX["0"]] * 8), "objects[0].boxes", "8 boxes for 9 frames"),
    "interpolate": ((one(interpolate="cubic"), one(interpolate=[])), "objects[0].interpolate", "smooth, linear or"),
    "sides cross": (one(boxes=TURNS), "objects[0].boxes", "inside out in frame 3; add a keyframe"),
    "nothing in frame 0": (one(boxes={"3": BOX["0"]}, interpolate="none"), "objects[0].boxes", "mask"),
    "colour": (tuple(one(color=given) for given in ([1, 2], [1, 2, 256], [0.5, 0, 0], "red")), "objects[0].color",
               "a colour; give [red, green, blue], whole numbers from 0 to 255"),
    "colour black": (one(color=[0, 0, 0]), "objects[0].color", "background"),
    "colour twice": ({"objects": [one(color=list(PALETTE[1]))["objects"][0], GOOD]}, "objects[1].color", "objects[0]"),
    "colour beyond palette": ({"objects": [GOOD] * 21}, "objects[20].color", "missing"),
    "visible": ((one(visible=3), one(visible=[])), "objects[0].visible", "[[first, last], ...]"),
    "range": (tuple(one(visible=given) for given in ([0, 3], [[0, 2.5]], [[0, 9]])), "objects[0].visible[0]",
              "[[first, last], ...], frames from 0 to 8"),
    "visible backwards": (one(visible=[[0, 2], [5, 4]]), "objects[0].visible[1]", "[[first, last], ...]"),
    "mask number": (one(mask=3), "objects[0].mask", "file name"),
    "mask missing": (one(mask="nowhere.png"), "objects[0].mask", "does not exist"),
    "mask no image": (
        (one(mask="boxes.json"), one(mask="."), one(mask="truncated.png")), "objects[0].mask", "not an image"),
    "mask of another size": (one(mask="wide.png"), "objects[0].mask", "is 64x48 but the image is 48x48"),
    "mask empty": (one(mask="empty.png"), "objects[0].mask", "empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", ERRORS)
def test_error_is_one_line_naming_file_field_and_mend(tmp_path, name):
    contents, field, mend = ERRORS[name]
    noise, path = np.random.default_rng(0).integers(0, 256, (48, 48), dtype=np.uint8), tmp_path / "boxes.json"
    for file, pixels in (("wide", np.full((48, 64), 255, np.uint8)), ("empty", 0 * noise), ("truncated", noise)):
        Image.fromarray(pixels).save(tmp_path / f"{file}.png")
    (tmp_path / "truncated.png").write_bytes((tmp_path / "truncated.png").read_bytes()[:1000])
    for content in contents if isinstance(contents, tuple) else (contents,):
        content = json.dumps(content) if isinstance(content, dict | list) else content
        path.write_bytes(content.encode() if isinstance(content, str) else content)
        message = complaint(path)
        assert field in message and mend in message and len(message) < len(str(path)) * 2 + 250


def complaint(path, frames=9) -> str:
    """The line that says why, which begins with the file."""
    return refused(f"^{re.escape(str(path))}: ", load_trajectory, path, (48, 48), frames)


def test_error_for_missing_and_large_files(tmp_path):
    for path in (tmp_path / "boxes.json", tmp_path / ("x" * 300)):
        assert "no such file" in complaint(path)
    with open(tmp_path / "boxes.json", "wb") as file:
        file.truncate((16 << 20) + 1)  # sparse: takes no disk
    assert "boxes.json: larger than 16 MiB" in complaint(tmp_path / "boxes.json")


def moving(size, frames=9, colors=(0, 2)) -> Trajectory:
    """An object that goes right and one that goes down and ends before the last frame."""
    t = np.arange(frames)[:, None]
    right = np.array([4, 6, 24, 30]) + t * [2, 0, 2, 0]
    down = np.array([size[1] - 30, 4, size[1] - 10, 22]) + t * [0, 2, 0, 2]
    trajectory = make_trajectory([right, [*down[:-1], None]], size)
    return replace(trajectory, colors=np.array(PALETTE, dtype=np.uint8)[list(colors)])


def matched(found: Trajectory, truth: Trajectory) -> list[int]:
    """For each true object the found one of the nearest colour."""
    distance = np.linalg.norm(truth.colors[:, None].astype(float) - found.colors[None].astype(float), axis=-1)
    assert distance.min(1).max() < 16
    return distance.argmin(1).tolist()


def through_a_video(folder, truth: Trajectory) -> tuple[Trajectory, list[int]]:
    """What is found in a video of its maps, and which found object is which true one."""
    iio.imwrite(folder / "maps.mp4", to_uint8(truth.maps()), plugin="FFMPEG", fps=8, macro_block_size=1)
    found = load_trajectory(folder / "maps.mp4", truth.size, truth.num_frames)
    order = matched(found, truth)
    np.testing.assert_allclose(found.boxes[order], truth.boxes, atol=1.01)  # NaN equals NaN
    return found, order


@pytest.mark.parametrize("size, colors", [((64, 96), (0, 2)), ((64, 96), (1, 3)), ((480, 720), (0, 1))])
def test_map_video_round_trip(tmp_path, size, colors):
    truth = moving(size, colors=colors)
    found, order = through_a_video(tmp_path, truth)
    assert found.names == ["object 0", "object 1"] and sorted(order) == [0, 1]
    for k in range(2):
        mask, true = found.masks[order[k]], truth.masks[k]
        assert (mask & true).sum() / (mask | true).sum() > 0.8
    assert not torch.equal(found.maps(), truth.maps())  # the codec's noise is real
    assert (found.maps() - truth.maps()).abs().mean() < 0.03
    assert torch.equal(found.maps("mask"), found.maps("box"))


def test_blends_at_edges_are_not_taken_for_another_object(tmp_path):
    y, x = np.mgrid[:480, :720] + 0.5
    discs = [(201, 163, 97.5), (503, 301, 120.5), (90, 400, 60.5)]
    masks = np.stack([np.hypot(x - cx, y - cy) < r for cx, cy, r in discs])
    boxes = np.array([[[cx - r, cy - r, cx + r, cy + r]] * 3 for cx, cy, r in discs])
    colors = np.array([[128, 32, 32], [128, 80, 80], [128, 59, 26]], dtype=np.uint8)  # MagicMotion's first three
    through_a_video(tmp_path, Trajectory(boxes, masks, colors, ["red", "pink", "orange"]))


@pytest.mark.parametrize("size", [(48, 64), (304, 400)])
def test_png_folder_round_trip_is_exact(tmp_path, size):
    """But for what the edge cuts off."""
    two = moving(size, frames=12)
    truth = make_trajectory([*two.boxes, [[-4, 35, 9, 44]] * 12], size)
    for t, frame in enumerate(to_uint8(truth.maps())):
        Image.fromarray(frame).save(tmp_path / f"{t}.png")  # 10.png comes after 9.png
    (tmp_path / "notes.txt").write_text("not a map")
    found = load_trajectory(tmp_path, size, 12)
    assert torch.equal(found.maps(), truth.maps())
    order = matched(found, truth)
    assert (found.colors[order] == truth.colors).all() and (found.masks[order] == truth.masks).all()
    np.testing.assert_array_equal(found.boxes[order], truth.boxes.clip(0))
    half = load_trajectory(tmp_path, (size[0] // 2, size[1] // 2), 12)
    np.testing.assert_array_equal(half.boxes[order], truth.boxes.clip(0) / 2)
    assert half.maps().shape == (3, 12, size[0] // 2, size[1] // 2)


def test_map_errors(tmp_path):
    maps, folder = to_uint8(moving((48, 48)).maps()), tmp_path / "maps"
    iio.imwrite(tmp_path / "maps.mp4", maps, plugin="FFMPEG", fps=8, macro_block_size=1)
    assert all("pass --frames 9" in complaint(tmp_path / "maps.mp4", frames) for frames in (8, 10))
    folder.mkdir()
    assert "without PNG" in complaint(folder)
    for t, frame in enumerate(maps):
        Image.fromarray(frame).save(folder / f"{t}.png")
    Image.fromarray(maps[3][:32]).save(folder / "3.png")
    assert "frame 3: is of another size" in complaint(folder)
    (folder / "3.png").write_bytes(b"no image")
    assert "can't be decoded" in complaint(folder)
    blocks = np.arange(48)[None, :] // 4 * 10 + np.arange(48)[:, None] // 4 * 1000
    colors = np.stack([blocks % 256, blocks // 256 * 16 % 256, blocks * 7 % 256], -1).astype(np.uint8)
    for picture, says in ((maps[0] * 0, "frame 0: shows no object"), (colors, "over 64")):
        Image.fromarray(picture).save(folder / "0.png")
        assert says in complaint(folder)


GROUNDS = {  # two RGBA maps -> files in which the ground is transparent, by Pillow or by these options of ffmpeg
    "rgba.png": lambda path, picture, _: picture.save(path),
    "palette.png": lambda path, picture, _: picture.quantize(8).save(path, transparency=0),
    "maps.gif": lambda path, picture, other: picture.save(path, save_all=True, append_images=[other], disposal=2),
    "vp9.webm": ["-c:v", "libvpx-vp9", "-pix_fmt", "yuva420p", "-crf", "5", "-b:v", "0"],
    "vp8.webm": ["-c:v", "libvpx", "-pix_fmt", "yuva420p", "-auto-alt-ref", "0", "-b:v", "2M"],
    "png.mov": ["-c:v", "png"], "prores.mov": ["-c:v", "prores_ks", "-pix_fmt", "yuva444p10le"],
}  # fmt: skip


@pytest.mark.parametrize("kind", GROUNDS)
def test_a_transparent_ground_of_maps_is_black(kind, tmp_path):
    """Whatever colour lies beneath: here white."""
    rgba, write = np.full((2, 64, 64, 4), (255, 255, 255, 0), np.uint8), GROUNDS[kind]
    rgba[:, 10:30, 8:28] = *PALETTE[0], 255
    rgba[1, 20, 20, 3] = 0  # Pillow drops a frame like the one before
    path, pictures = tmp_path / "maps" / kind, [Image.fromarray(frame) for frame in rgba]
    path.parent.mkdir()
    if callable(write):
        write(path, *pictures)
    else:
        command = [imageio_ffmpeg.get_ffmpeg_exe(), "-v", "error", "-f", "rawvideo", "-pix_fmt", "rgba", "-s", "64x64"]
        subprocess.run([*command, "-i", "-", *write, path], input=rgba.tobytes(), check=True)
    frames = 1 if path.suffix == ".png" else 2
    given = load_trajectory(path.parent if frames == 1 else path, (64, 64), frames)
    assert given.boxes.tolist() == [[[8, 10, 28, 30]] * frames] and (given.maps()[:, :, 40:] < -0.9).all()


@pytest.mark.parametrize("kind", ["a white ground", "a mask in black on white"])
def test_a_white_ground_of_maps_is_refused(kind, tmp_path):
    picture = np.full((64, 64, 3), 250, np.uint8)
    picture[10:30, 8:28] = PALETTE[0] if kind == "a white ground" else 0
    Image.fromarray(picture).save(tmp_path / "0.png")
    refused("frame 0: its ground is white; paint the ground of maps black", load_trajectory, tmp_path, (64, 64), 1)
    picture[0, 0] = 0  # a white object that reaches three corners is one
    Image.fromarray(picture).save(tmp_path / "0.png")
    assert load_trajectory(tmp_path, (64, 64), 1).colors.max() == 250


def test_small_objects_and_near_colours_are_found_where_no_codec_was(tmp_path, capsys):
    """And one that comes later, in a colour that frame 0 doesn't show, is told of. Files of macOS are passed over."""
    places = {(128, 32, 32): (100, 100, 400, 300), (128, 44, 32): (500, 100, 700, 300)}
    places[32, 64, 128] = 800, 50, 804, 53
    for t in range(2):
        picture = np.zeros((704, 1280, 3), np.uint8)
        for color, (x0, y0, x1, y1) in places.items():
            picture[y0:y1, x0:x1] = color
        if t == 1:
            picture[400:600, 100:500] = 32, 128, 32
        Image.fromarray(picture).save(tmp_path / f"{t}.png")
        (tmp_path / f"._{t}.png").write_bytes(b"Mac OS X")
    given = load_trajectory(tmp_path, (704, 1280), 2)
    assert dict(zip(map(tuple, given.colors.tolist()), map(tuple, given.boxes[:, 1].tolist()), strict=True)) == places
    assert "frame 1: shows colours that frame 0 doesn't; no boxes are found for them" in capsys.readouterr().err


def test_the_worlds_mask_maps_are_its_masks_painted():
    batch = World("train", (48, 48)).batch(range(6))
    for i in range(6):
        trajectory = batch.trajectory(i, "mask")
        maps = trajectory.maps("mask")
        assert maps.shape == batch.video[i].shape
        painted = torch.full_like(maps, -1)
        for n, k in enumerate(batch.used[i].nonzero()[:, 0].tolist()):  # the visible parts of things never overlap
            painted[:, batch.masks[i, k]] = torch.tensor(PALETTE[n])[:, None] / 127.5 - 1
        assert torch.equal(maps, painted)
        assert torch.equal(trajectory.maps("box")[:, 0], painted[:, 0])


def test_maps_are_cheap_enough_for_a_training_step():
    batch = World("train", (64, 64)).batch(range(16))
    i = int(batch.used.sum(1).argmax())
    for paint, most in (
        (batch.trajectory(i).maps, 2e-3),
        (lambda: batch.trajectory(i, "mask").maps("mask"), 4e-3),
        (lambda: batch.trajectory(i).maps("box", batch.video[i, :, 0]), 40e-3),
    ):
        seconds = timeit.repeat(paint, timer=time.thread_time, number=1, repeat=20)
        assert min(seconds) < most  # about a fifth; the rest is for a busy machine


def test_overlay(tmp_path):
    truth = moving((48, 64))
    gray = np.full((9, 48, 64, 3), 128, np.uint8)
    large = gray.repeat(3, 1).repeat(3, 2)
    overlay = draw_overlay(large, 3 * truth.boxes, truth.colors)
    assert overlay.shape == (9, 144, 192, 3) and overlay.dtype == np.uint8
    bright = [255, 64, 64]  # (128, 32, 32) with its brightest channel at 255
    assert overlay[2, 18, 24:84].tolist() == [bright] * 60  # the upper edge of box [8, 6, 28, 30], three times as large
    assert overlay[2, 17, 30].tolist() == overlay[2, 20, 30].tolist() == [128] * 3
    for t in range(9):  # a dot at every centre of the path, in every frame
        assert (overlay[:, 54, 3 * (14 + 2 * t)] == bright).all()
    green = (overlay[-1] == [64, 255, 64]).all(-1)
    assert 0 < green.sum() <= 8 * 4  # no box in the last frame, only dots
    assert draw_overlay(gray, truth.boxes, truth.colors).shape == (9, 48, 64, 3)
    assert (gray == 128).all() and (large == 128).all()  # drawn on a copy
