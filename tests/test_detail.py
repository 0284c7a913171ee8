"""The picture's own detail in a small video: back where the video shows what the picture shows, and nowhere else."""

import base64
import json
import sys

import imageio.v3 as iio
import nets
import numpy as np
import pytest
import skimage.data
import torch
from conftest import ROOT, make_trajectory, run_measured
from PIL import Image
from scipy.ndimage import gaussian_filter

import sample
from core.boxes import move
from core.media import cover_frames, crop_box, write_image
from toy.codec import ToyCodec
from toy.detail import add_detail, enlarge, full_size
from trajectory import load_trajectory

SMALL = (48, 80)


def small(picture: np.ndarray) -> np.ndarray:
    return np.asarray(Image.fromarray(picture).resize(SMALL[::-1], Image.Resampling.LANCZOS))


def soft(frame: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """A small frame enlarged by Pillow's bicubic filter."""
    return np.asarray(Image.fromarray(frame).resize(size[::-1], Image.Resampling.BICUBIC)).astype(float)


def fine(frame: np.ndarray) -> np.ndarray:
    """What making it small takes away."""
    return frame - soft(small(frame), frame.shape[:2])


def likeness(got: np.ndarray, true: np.ndarray, rows: slice, columns: slice) -> tuple[float, float]:
    """Of the fine detail there: its correlation with the truth, and its energy relative to it."""
    a, b = (fine(frame)[rows, columns] for frame in (got, true))
    return (a * b).sum() / np.sqrt((a * a).sum() * (b * b).sum()), (a * a).sum() / (b * b).sum()


@pytest.fixture(scope="module")
def picture():
    return full_size(skimage.data.coffee(), SMALL)  # a cup on a table: [362, 600, 3]


def restored(frames: list[np.ndarray], path: list, masks: np.ndarray | None = None) -> np.ndarray:
    """Frames of full size [height, width, 3], made small and given back their detail. The first is the picture."""
    video = np.stack([small(frame) for frame in frames])
    return add_detail(video, frames[0], make_trajectory(path, frames[0].shape[:2], masks))


STILL = [[[100, 40, 220, 200]] * 4]
# A cup and what is around it go to the right and down, and grow.
PATH = [[[174, 12, 420, 240], [214, 22, 470, 262], [254, 32, 520, 286], [294, 52, 560, 300]]]


def pasted(picture: np.ndarray, path: list) -> list[np.ndarray]:
    """The picture, and what is in the first box pasted into each of the others by another resizer."""
    frames = [picture]
    (a, b, c, d), *others = path[0]
    for x0, y0, x1, y1 in others:
        cut = Image.fromarray(picture[b:d, a:c]).resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC)
        frames.append(picture.copy())
        frames[-1][y0:y1, x0:x1] = np.asarray(cut)
    return frames


def test_a_still_video_is_the_picture_again(picture):
    got = restored([picture] * 4, STILL)
    assert np.array_equal(got[0], picture)
    off = np.abs(got.astype(int) - picture)
    # Pillow rounds and clips between its two passes, which shows beside the brightest lights alone.
    assert off.max() <= 4 and np.mean(off > 1) < 1e-3 and off.mean() < 0.3
    # And so it is with the first frame that the networks are given, which is cut by whole small pixels.
    pixels = skimage.data.coffee()
    video = cover_frames(np.stack([pixels] * 2), SMALL).round().byte().permute(1, 2, 3, 0).numpy()
    got = add_detail(video, picture, make_trajectory(STILL, picture.shape[:2]))
    correlation, energy = likeness(got[1], picture, slice(None), slice(None))
    assert correlation > 0.99 and 0.9 < energy < 1.05


def test_what_moves_along_its_boxes_keeps_its_detail(picture):
    true = pasted(picture, PATH)
    got = restored(true, PATH)
    for t in (1, 2, 3):
        x0, y0, x1, y1 = PATH[0][t]
        inside = slice(y0, y1), slice(x0, x1)
        correlation, energy = likeness(got[t], true[t], *inside)
        assert correlation > 0.9 and 0.75 < energy < 1.1, t
        assert likeness(soft(small(true[t]), picture.shape[:2]).round().astype(np.uint8), true[t], *inside)[1] < 0.05
        assert np.abs(got[t].astype(float) - true[t]).mean() < 2  # and nothing is made up at the seams


def test_where_the_networks_made_something_else_the_video_stays_soft(picture):
    """A grey patch, and another photograph altogether."""
    frame = small(picture).copy()
    frame[8:40, 20:60] = 128
    got = add_detail(np.stack([frame] * 2), picture, make_trajectory(STILL, picture.shape[:2]))[1]
    enlarged = soft(frame, picture.shape[:2])
    scale = np.array(picture.shape[:2]) / SMALL
    y0, x0, y1, x1 = (np.array([12, 24, 36, 56]) * np.tile(scale, 2)).astype(int)  # weights reach 4 small pixels far
    assert np.abs(got[y0:y1, x0:x1] - enlarged[y0:y1, x0:x1]).max() <= 1
    assert likeness(got, picture, slice(None), slice(0, int(15 * scale[1])))[0] > 0.98  # beside it all is as it was

    other = small(full_size(skimage.data.chelsea(), SMALL))
    for path in ([[[0, 0, 600, 362], [-60, -40, 660, 400]]], PATH):
        got = add_detail(np.stack([other] * 2), picture, make_trajectory(path, picture.shape[:2]))[1]
        added = got - soft(other, picture.shape[:2])
        assert np.square(added).mean() < 0.02 * np.square(fine(picture)).mean()


def test_smeared_things_get_less_detail_than_sharp_ones_and_never_more_than_there_is(picture):
    true, energies = pasted(picture, PATH)[2], []
    x0, y0, x1, y1 = PATH[0][2]
    for blur in (0, 1, 2, 4):  # small pixels
        made = gaussian_filter(small(true).astype(float), (blur, blur, 0))
        video = np.stack([small(picture), small(picture), made.round().astype(np.uint8)])
        got = add_detail(video, picture, make_trajectory([PATH[0][:3]], picture.shape[:2]))[2]
        energies.append(likeness(got, true, slice(y0, y1), slice(x0, x1))[1])
    assert energies == sorted(energies, reverse=True) and energies[0] > 0.75 and energies[-1] < 0.15


def test_the_one_in_front_hides_the_one_behind(picture):
    """Two parts of the picture go to one place. The video shows one of them there, and that one's detail comes."""
    there = [300, 100, 460, 260]
    path = [[[100, 30, 260, 190], there], [[40, 180, 200, 340], there]]
    for shown in (0, 1):
        true = pasted(picture, [path[shown]])[1]
        got = restored([picture, true], path)[1]
        assert likeness(got, true, slice(100, 260), slice(300, 460))[0] > 0.9


def test_a_mask_gives_the_things_outline_and_not_its_box(picture):
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]] + 0.5
    disc = (x - 300) ** 2 + (y - 130) ** 2 < 90**2
    path = [[[210, 40, 390, 220], [310, 100, 490, 280]]]
    moved, there = np.roll(disc, (60, 100), (0, 1)), (slice(100, 280), slice(310, 490))
    true = np.where(moved[..., None], np.roll(picture, (60, 100), (0, 1)), picture)
    correlation, energy = likeness(restored([picture, true], path, disc[None])[1], true, *there)
    assert correlation > 0.97 and energy > 0.9
    assert likeness(restored([picture, true], path)[1], true, *there)[0] < correlation


def test_a_camera_that_moves_and_boxes_that_are_not_there_or_beyond_the_edge(picture):
    """Without a box in frame 0 or in frame t nothing moves; over the edge, what is inside does."""
    boxes, true = [[0, 0, 600, 362], [-30, -20, 640, 380], [-60, -40, 680, 402]], [picture]
    for x0, y0, x1, y1 in boxes[1:]:
        large = np.asarray(Image.fromarray(picture).resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC))
        true.append(large[-y0 : 362 - y0, -x0 : 600 - x0])
    got = restored(true, [boxes])
    for t in (1, 2):
        assert likeness(got[t], true[t], slice(None), slice(None))[0] > 0.95
    for path in ([None, [0, 0, 90, 90], None], [[0, 0, 90, 90], None, None], [[700, 0, 800, 9], [9, 9, 70, 70], None]):
        assert np.abs(restored([picture] * 3, [path]).astype(int) - picture).max() <= 4
    true = picture.copy()
    true[60:, 80:] = picture[:-60, :-80]
    got = restored([picture, true], [[[300, 200, 640, 400], [380, 260, 720, 460]]])[1]
    assert likeness(got, true, slice(260, None), slice(380, None))[0] > 0.9


# height and width of the picture -> of the generated video and of the written one
SIZES = {
    "landscape": ((427, 640), (136, 200), (426, 626)),
    "portrait": ((900, 500), (224, 128), (876, 500)),
    "panorama": ((300, 1500), (72, 376), (244, 1280)),
    "of 12 megapixels": ((3000, 4000), (144, 192), (960, 1280)),
    "odd sides": ((201, 301), (136, 200), (200, 294)),
    "smaller than the video": ((30, 40), (144, 192), (144, 192)),
}


@pytest.mark.parametrize("source, size, written", SIZES.values(), ids=SIZES)
def test_sizes(source, size, written):
    assert ToyCodec().video_size("auto", 9, source) == size
    y, x = (np.linspace(0, 200, n, dtype=np.float32) for n in source)
    pixels = np.stack(np.broadcast_arrays(y[:, None], x[None], np.float32(90)), -1).round().astype(np.uint8)
    picture = full_size(pixels, size)
    assert picture.shape == (*written, 3) and max(written) <= 1280 and not any(n % 2 for n in written)
    first = cover_frames(pixels[None], size)[:, 0].permute(1, 2, 0).numpy()
    shown = np.asarray(Image.fromarray(picture).resize(size[::-1], Image.Resampling.BOX))
    assert np.abs(shown - first)[2:-2, 2:-2].max() < 3  # the same part of it as the networks see


def test_a_picture_that_is_not_made_smaller_keeps_its_pixels():
    pixels = np.random.default_rng(0).integers(0, 256, (427, 640, 3), dtype=np.uint8)
    picture = full_size(pixels, SMALL)
    top = int(crop_box(pixels.shape[:2], SMALL)[1])
    assert any(np.array_equal(picture, pixels[y : y + len(picture)]) for y in (top, top + 1))


def test_move_takes_a_picture_along_its_boxes():
    """By whole pixels it moves pixels; else it scales; beyond the edge there is nothing."""
    picture = torch.rand(3, 9, 12, generator=torch.Generator().manual_seed(0))
    for source, target in (((1, 2, 5, 6), (1, 2, 5, 6)), ((1, 2, 5, 6), (4, 0, 8, 4))):
        got = move(picture, np.array(source), np.array(target), (0, 9, 0, 12))
        right, up = target[0] - source[0], source[1] - target[1]
        want = torch.zeros_like(picture)
        want[..., : 9 - up, right:] = picture[..., up:, : 12 - right]
        torch.testing.assert_close(got, want, atol=1e-5, rtol=0)
        torch.testing.assert_close(move(picture, np.array(source), np.array(target), (2, 7, 3, 11)), got[:, 2:7, 3:11])
    y, x = torch.meshgrid(torch.arange(20) + 0.5, torch.arange(30) + 0.5, indexing="ij")
    ramp = torch.stack([x, y])
    for source, target in (([4.0, 4, 14, 9], [5.0, 3, 25, 18]), ([10.0, 2, 20, 12], [2.0, 1, 12.5, 15])):
        got = move(ramp, np.array(source), np.array(target), (0, 20, 0, 30))
        (a, c, d, e), (p, q, r, s) = source, target
        want = torch.stack([a + (x - p) * (d - a) / (r - p), c + (y - q) * (e - c) / (s - q)])
        inside = (x > p) & (x < r) & (y > q) & (y < s)
        torch.testing.assert_close(got[:, inside], want[:, inside], atol=0.05, rtol=0)  # PyTorch's bicubic on ramps
        assert not move(ramp, np.array(source), np.array(source) + 40, (0, 20, 0, 30)).any()
    line = (torch.arange(12) == 5).float().expand(1, 9, 12)  # half a pixel to the right: crisper than by the mean
    crisp = move(line, np.array([0, 0, 12, 9]), np.array([0.5, 0, 12.5, 9]), (0, 9, 0, 12))[0, 4, 4:9]
    assert 0.55 < crisp[1] == crisp[2] < 0.65 and crisp[0] == crisp[3] == crisp[4] == 0  # and nothing below black


def test_an_enlarged_trajectory_has_its_masks_at_full_size(tmp_path):
    """A painted one, a filled box, one that enters later, and those of a map video."""
    mask = np.zeros((427, 640), np.uint8)
    mask[101:203, 211:307] = 255
    iio.imwrite(tmp_path / "m.png", mask)
    objects = [
        {"mask": "m.png", "boxes": {"0": [211, 101, 307, 203], "8": [300, 150, 396, 252]}},
        {"boxes": {"0": [33, 51, 80, 120]}},
        {"boxes": {"3": [400, 200, 500, 300]}, "visible": [[3, 8]]},
    ]
    (tmp_path / "b.json").write_text(json.dumps({"objects": objects}))
    picture = full_size(np.zeros((427, 640, 3), np.uint8), SMALL)
    top = round((sum(crop_box((427, 640), SMALL)[1::2]) - len(picture)) / 2)
    read = load_trajectory(tmp_path / "b.json", SMALL, 9, (427, 640))
    large = enlarge(read, tmp_path / "b.json", picture.shape[:2])
    assert large.size == picture.shape[:2] and np.isnan(large.boxes[2, 0]).all()
    assert np.abs(large.boxes[0, 8] - [300, 150 - top, 396, 252 - top]).max() < 1.5
    assert np.mean(large.masks[0] ^ (mask[top : top + len(picture)] > 0)) < 0.001  # 0.004 from the small mask
    rows, columns = (np.flatnonzero(large.masks[1].any(axis)) for axis in (1, 0))
    extent = np.array([rows[0], rows[-1] + 1, columns[0], columns[-1] + 1])
    assert np.abs(extent - [51 - top, 120 - top, 33, 80]).max() <= 2
    assert not large.masks[2].any()

    for t in range(9):
        frame = np.zeros((427, 640, 3), np.uint8)
        frame[101:203, 211 + 10 * t : 307 + 10 * t] = 128, 32, 32
        write_image(tmp_path / f"maps/{t}.png", frame)
    large = enlarge(load_trajectory(tmp_path / "maps", SMALL, 9), tmp_path / "maps", picture.shape[:2])
    assert np.mean(large.masks[0] ^ (mask[top : top + len(picture)] > 0)) < 0.01 and large.maps_given is None
    assert np.abs(large.boxes[0, 8] - [291, 101 - top, 387, 203 - top]).max() < 1.5


def test_videos_are_as_large_as_their_pictures_alone_in_a_table_and_in_the_page(here, monkeypatch):
    """And with --detail false as small as the networks make them."""
    made, written, files, rows = {}, {}, [], ["image,traj,prompt,out"]
    for name, (height, width) in {"tall": (200, 120), "wide": (120, 380), "dot": (20, 24)}.items():
        pixels = np.full((height, width, 3), 90, np.uint8)
        iio.imwrite(f"{name}.png", pixels)
        boxes = [{"boxes": {"0": [2, 2, width // 2, height // 2], "8": [4, 3, width // 2 + 2, height // 2 + 1]}}]
        (here / f"{name}.json").write_text(json.dumps({"objects": boxes}))
        rows.append(f"{name}.png,{name}.json,,{name}.mp4")
        size = ToyCodec().video_size("auto", 9, (height, width))
        made[name], written[name] = (9, *size, 3), (9, *full_size(pixels, size).shape)
    (here / "jobs.csv").write_text("\n".join(rows))

    nets.save(fast_generator=nets.generator(layers=1), fast_adapter=nets.adapter(layers=1, maps="pixels"))
    options = {"weights": ".", "steps": 1, "compile": False}
    for detail, sizes in ((True, written), (False, made)):
        sample.main(sample.Config(batch="jobs.csv", detail=detail, **options))
        for name in sizes:
            for ending in (".mp4", ".boxes.mp4"):
                assert iio.imread(name + ending).shape == sizes[name], (name, ending)
                (here / (name + ending)).unlink()
    sample.main(sample.Config(image="tall.png", traj="tall.json", out="one.mp4", **options))
    assert iio.imread("one.mp4").shape == iio.imread("one.boxes.mp4").shape == written["tall"]

    request = {"image": base64.b64encode((here / "wide.png").read_bytes()).decode(), "masks": [""], "prompt": "",
               "boxes": json.loads((here / "wide.json").read_text()), "seed": 0, "steps": 1, "size": "auto",
               "frames": 9}  # fmt: skip
    (here / "page").mkdir()
    monkeypatch.setattr("tools.serve.serve", lambda *_, answer: files.extend(answer(request, here / "page", dict)))
    sample.main(sample.Config(serve=True, **options))
    assert [iio.imread(file).shape for file in files] == [written["wide"]] * 2


def test_a_photograph_of_12_megapixels_takes_less_than_a_gigabyte(here):
    """Small networks: those of the preset take 0.1 GB more."""
    nets.save(fast_generator=nets.generator(layers=1), fast_adapter=nets.adapter(layers=1, maps="pixels"))
    Image.fromarray(skimage.data.coffee()).resize((4240, 2830), Image.Resampling.LANCZOS).save("photo.jpg")
    boxes = [{"boxes": {"0": [1230, 85, 2970, 1700], "16": [2080, 370, 3810, 1980]}}]
    (here / "b.json").write_text(json.dumps({"objects": boxes}))
    flags = "--image photo.jpg --traj b.json --frames 17 --steps 1 --compile false --weights ."
    job, _, memory = run_measured(sys.executable, ROOT / "sample.py", *flags.split())
    assert job.returncode == 0, job.stderr
    assert memory < 900 << 10  # KiB
    assert iio.imread("out/sample.mp4").shape == (17, 870, 1280, 3)
