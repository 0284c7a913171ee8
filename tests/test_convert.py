"""tools/convert.py: every form of a trajectory into every other, and point tracks into boxes."""

import io
import json
from itertools import pairwise

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import refused

from tools import convert
from tools.convert import Config, read_points
from trajectory import load_trajectory

SMALL = {"size": "48x48", "frames": 9}

POINTS = np.stack([np.stack([np.linspace(10, 30, 9), np.full(9, 20.0)], -1),
                   np.stack([np.full(9, 40.0), np.linspace(8, 40, 9)], -1)], 1)  # fmt: skip
SHOWN = np.ones((9, 2), bool)
SHOWN[3:5, 1] = False
WORDS = np.where(SHOWN, [[f"{x},{y}" for x, y in frame] for frame in POINTS], "- -")
TENSOR, VISIBLE, BY_POINT = torch.tensor(POINTS), torch.tensor(SHOWN)[None], POINTS.swapaxes(0, 1)
LEARNED = TENSOR.bfloat16().requires_grad_()  # these numbers are exact in it
GRID = np.array([[12 + 10 * i, 12 + 10 * j] for j in range(3) for i in range(3)]) + np.arange(9)[:, None, None]
ALL, BOTH = np.ones((9, 9), bool), np.ones((9, 2), bool)
ATI = io.BytesIO()  # packed as ATI does it: [K, T, 1, 3], in eighths of a pixel
np.savez_compressed(ATI, array=np.dstack([8 * POINTS, SHOWN]).swapaxes(0, 1)[:, :, None])


def write(path, held):
    """What holds tracks, by the file's suffix; of a pair two .npy files, as Wan-Move writes them."""
    if path.suffix.lower() in (".pt", ".pth"):
        torch.save(held, path)
    elif isinstance(held, bytes):
        path.write_bytes(held)
    elif isinstance(held, dict):
        np.savez(path, **held)
    elif isinstance(held, tuple):
        np.save(path, held[0])
        np.save(path.with_name(path.name.replace("tracks", "visibility").replace("track", "visibility")), held[1][None])
    else:
        np.save(path, held)


TRACKS = {  # as trackers write them -> their points and which are seen; nine points in nine frames last, told by names
    "plain.npy": (POINTS, POINTS, BOTH),
    "last.npy": (np.dstack([POINTS, SHOWN]).astype(np.float32), POINTS, SHOWN),
    "named.npz": ({"tracks": POINTS, "visibility": SHOWN}, POINTS, SHOWN),
    "tensor.pt": (TENSOR, POINTS, BOTH),
    "pair.pt": ((LEARNED[None], VISIBLE), POINTS, SHOWN),
    "none.PT": ({"tracks": TENSOR, "visibility": None}, POINTS, BOTH),
    "lines.txt": ("\n".join(map(" ".join, WORDS)).encode(), np.where(SHOWN[..., None], POINTS, np.nan), SHOWN),
    "occluded.npz": ({"tracks": POINTS, "occluded": ~SHOWN}, POINTS, SHOWN),
    "visibles.npz": ({"tracks": POINTS, "visibles": SHOWN}, POINTS, SHOWN),
    "spatialtracker.npz": ({"tracks": POINTS, "vis": SHOWN.astype(np.float32)}, POINTS, SHOWN),
    "cotracker_old.pt": ({"pred_tracks": TENSOR[None], "pred_visibility": VISIBLE[..., None]}, POINTS, SHOWN),
    "tapir.npz": ({"tracks": BY_POINT, "visibles": SHOWN.T}, POINTS, SHOWN),
    "tapvid_two.npz": ({"target_points": BY_POINT, "occluded": ~SHOWN.T, "video": np.zeros(3)}, POINTS, SHOWN),
    "ati.pth": (ATI.getvalue(), POINTS, SHOWN),
    "tracks.npy": ((POINTS, SHOWN), POINTS, SHOWN),
    "x_track.npy": ((POINTS, SHOWN), POINTS, SHOWN),
    "cotracker.npz": ({"pred_tracks": GRID[None], "pred_visibility": ALL[None]}, GRID, ALL),
    "tapvid.npz": ({"target_points": GRID.swapaxes(0, 1), "occluded": ~ALL}, GRID, ALL),
    "square.txt": ("\n".join(" ".join(map(str, frame.ravel())) for frame in GRID).encode(), GRID, ALL),
    "wan_move_tracks.npy": ((GRID[None], ALL), GRID, ALL),
}


@pytest.mark.parametrize("name", TRACKS)
def test_point_tracks_of_every_kind(name, tmp_path):
    held, wanted, seen = TRACKS[name]
    write(tmp_path / name, held)
    points, shown = read_points(tmp_path / name, 9)
    np.testing.assert_allclose(points, wanted)
    assert np.array_equal(shown, seen)


LATE = np.dstack([POINTS, BOTH])
LATE[0, 1, 2] = 0
BAD_TRACKS = [  # a file, what it holds, and what the message says; no tracks at all are in test_malformed.py
    ("flat.npy", POINTS[:, 0], r"is \[9, 2\]; give \[T, K, 2\]"),
    ("parts.npy", (POINTS - 9) / 30, "most coordinates lie within 1 pixel; if they are parts"),  # some lie beyond it
    ("negative.npz", {"tracks": np.full((9, 2, 2), -0.5)}, "most coordinates lie within 1 pixel"),
    ("share.npy", np.dstack([POINTS, 0.7 * BOTH]), "the third number of a point is visibility, 0 or 1; leave it out"),
    ("nan.npy", POINTS * np.nan, "no point has a place in any frame"),
    ("late.npy", LATE, "point 1 is not to be seen in frame 0; leave it out with --pick"),
    ("many.npy", np.full((9, 21, 2), 20.0), "21 points, 20 at most; choose some with --pick"),
    ("square.npy", np.full((9, 9, 2), 20.0), "has as many points as frames, 9; save the array in an .npz"),
    ("pair.pth", (torch.full((1, 9, 9, 2), 20.0), torch.ones(1, 9, 9)), "has as many points as frames, 9; save"),
    ("list.pt", [TENSOR], "holds a list, neither an array nor a dict of them; give"),
    ("other.npz", {"points": POINTS}, "holds points; name the tracks tracks or pred_tracks or"),
    ("twice.npz", {"tracks": POINTS, "pred_tracks": POINTS}, "holds tracks, pred_tracks; name the tracks"),
    ("seen.npz", {"tracks": POINTS, "occluded": ~SHOWN, "visibles": SHOWN},
     "holds visibles and occluded; leave one out"),
    ("short.npz", {"tracks": POINTS, "visibility": SHOWN[1:]}, r"visibility: is \[8, 2\]; give \[9, 2\]"),
    ("logits.npz", {"tracks": POINTS, "occlusion": SHOWN * 9.0 - 4},
     "occlusion: holds more than 0 to 1, logits perhaps; give visibility, 0 to 1"),
    ("doubts.npz", {"tracks": POINTS, "occlusion": SHOWN * 0.8, "expected_dist": SHOWN * 0.8},
     "expected_dist: not understood; which points are seen is told by"),
    ("header.npy", b"\x93NUMPY\x01\x00v\x00" + b"((((".ljust(118), "can't be read as point tracks"),
    ("uneven.txt", b"1 2 3 4\n1 2\n", "can't be read as point tracks"),
]  # fmt: skip


@pytest.mark.parametrize("name, held, message", BAD_TRACKS)
def test_tracks_that_can_not_be_used_are_one_line(name, held, message, tmp_path):
    write(tmp_path / name, held)
    cfg = Config(str(tmp_path / name), str(tmp_path / "out.json"), **SMALL)
    refused(f"{name}: {message}", convert.main, cfg)
    assert list(tmp_path.iterdir()) == [tmp_path / name]


def test_points_become_boxes_of_one_size_cut_at_the_edge(tmp_path):
    for name in ("named.npz", "plain.npy"):
        write(tmp_path / name, TRACKS[name][0])
    convert.main(Config(str(tmp_path / "named.npz"), str(tmp_path / "out.json"), box="10x12", **SMALL))
    got = load_trajectory(tmp_path / "out.json", (48, 48), 9)
    assert got.boxes[0, 0].tolist() == [4, 15, 16, 25] and got.boxes[0, 8].tolist() == [24, 15, 36, 25]
    assert np.isnan(got.boxes[1, 3:5]).all() and got.boxes[1, 8].tolist() == [34, 35, 46, 45]
    assert got.masks[0].sum() == 120 and got.masks[0][15:25, 4:16].all()
    wide = {"size": "96x96", "frames": 9, "source_size": "48x48", "box": "20x40", "pick": "1"}
    convert.main(Config(str(tmp_path / "plain.npy"), str(tmp_path / "wide.json"), **wide))
    (one,) = load_trajectory(tmp_path / "wide.json", (96, 96), 9).boxes
    assert one[0].tolist() == [60, 6, 96, 26]  # twice as large, and cut at the right edge


BAD = [
    ("no.npy", {}, "no.npy: no such file"),
    ("boxes.json", {"to": "boxes.json"}, "--to: would overwrite boxes.json, which --source reads"),
    ("plain.npy", {"to": "p.json", "image": "p.preview.mp4"}, "--to: would overwrite p.preview.mp4, which --image"),
    ("plain.npy", {"frames": 0}, "--frames 0: at least 1, and at most 466033 of 48x48"),
    ("plain.npy", {"frames": 5}, "9 frames but the video has 5; pass --frames"),
    ("plain.npy", {"pick": "0,2"}, "--pick 0,2: takes numbers from 0 to 1"),
    ("plain.npy", {"pick": "a"}, "--pick a: takes numbers"),
    ("plain.npy", {"box": "0x5"}, "--box 0x5: takes height x width"),
    ("plain.npy", {"size": "big"}, "--size big: takes height x width"),
    ("plain.npy", {"to": "x.gif"}, "--to x.gif: give a .json, an .mp4, or a folder"),
    ("plain.npy", {"to": ""}, "--to .: give a .json, an .mp4, or a folder"),
    ("plain.npy", {"image": "words.txt", "to": "x.json"}, "words.txt: not a readable image"),
    ("boxes.json", {"to": "m.mp4", "size": "45x45"}, "--size 45x45: an mp4 takes an even height and width"),
    ("plain.npy", {"size": ""}, "plain.npy: .*doesn't say how large its frame is; give --size"),
    ("boxes.json", {"size": ""}, "boxes.json: .*give --size"),
    ("empty", {"size": ""}, "empty: .*a folder without PNG files"),
    ("no.json", {"size": ""}, "no.json: no such file"),
]


@pytest.mark.parametrize("source, flags, message", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(source, flags, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.save("plain.npy", POINTS)
    (tmp_path / "empty").mkdir()
    for name, text in (("p.preview.mp4", ""), ("words.txt", "one two"), ("boxes.json", '{"objects": []}')):
        (tmp_path / name).write_text(text)
    before = sorted(tmp_path.rglob("*"))
    refused(message, convert.main, Config(source, **{"to": "out.json", **SMALL, **flags}))
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("size, scale", [((40, 60), 1), ((320, 480), 8)])
def test_boxes_become_maps_and_a_video_and_boxes_again(size, scale, tmp_path, monkeypatch, capsys):
    """All of the size of the source. PNG maps are exact, and boxes of a video within a pixel."""
    monkeypatch.chdir(tmp_path)
    objects = [
        {"boxes": {"0": [2, 3, 14, 15], "8": [20, 25, 34, 36]}},
        {"boxes": {"0": [26, 4, 40, 20], "8": [30, 2, 38, 14]}, "visible": [[0, 4], [7, 7]]},  # hidden for a while
    ]
    for item in objects:
        item["boxes"] = {t: [scale * v for v in box] for t, box in item["boxes"].items()}
    top = {"height": size[0], "width": size[1], "objects": objects}
    (tmp_path / "boxes.json").write_text(json.dumps(top))
    files = ["boxes.json", "maps", "maps.mp4", "back.json"]
    for source, to in pairwise(files):
        convert.main(Config(source, to))
    said = capsys.readouterr()
    assert "2 objects, 9 frames: maps.mp4" in said.out
    assert "colours" not in said.err  # what a codec leaves beside thin lines is no object
    first, maps, video, back = (load_trajectory(file, size, 9) for file in files)
    assert iio.imread("maps/00000.png").shape == iio.imread("maps.mp4").shape[1:] == (*size, 3)
    assert torch.equal(maps.maps(), first.maps())
    hidden = np.isnan(first.boxes[..., 0])
    assert hidden.any()
    for again, within in ((maps, 0), (video, 1), (back, 1)):
        order = [int(np.abs(again.boxes[:, 0] - box).sum(-1).argmin()) for box in first.boxes[:, 0]]
        assert sorted(order) == [0, 1]
        boxes = again.boxes[order]
        assert (np.isnan(boxes[..., 0]) == hidden).all()
        assert np.abs(boxes - np.floor(first.boxes + 0.5))[~hidden].max() <= within  # in whole pixels
        assert (again.masks[order] == first.masks).mean() > 0.99


def test_points_and_preview_are_cut_as_the_image_is(tmp_path):
    """A wide source: the middle is kept, as sample.py keeps it."""
    track = np.full((9, 1, 2), [60.0, 20.0])
    np.save(tmp_path / "t.npy", track)
    image = np.zeros((48, 144, 3), np.uint8)
    image[15:25, 55:65] = 255
    iio.imwrite(tmp_path / "image.png", image)
    flags = {"source_size": "48x144", "box": "10x10", "image": str(tmp_path / "image.png"), **SMALL}
    convert.main(Config(str(tmp_path / "t.npy"), str(tmp_path / "t.json"), **flags))
    made = load_trajectory(tmp_path / "t.json", (48, 48), 9)
    assert made.boxes[0, 0].tolist() == [7, 15, 17, 25]  # 48 columns are cut from either side
    shown = iio.imread(tmp_path / "t.preview.mp4")
    bright = (shown[4, 17:23].mean(-1) > 128).nonzero()[1]
    assert shown.shape == (9, 48, 48, 3) and bright.min() >= 7 and bright.max() <= 16


@pytest.mark.parametrize("second", [
    {"boxes": {"0": [60, 10, 80, 30], "8": [40, 10, 60, 30]}},  # leaves the cut, as the format allows
    *({"boxes": {"4": [74, 4, 88, 20], "8": [78, 2, 86, 14]}, "visible": late}
      for late in ([[4, 8]], [[2, 3], [6, 7]], [[8, 8]])),
])  # fmt: skip
def test_boxes_come_back_as_far_as_they_are_inside_and_where_an_object_enters_later(second, tmp_path):
    objects = [{"boxes": {"0": [50, 3, 62, 15]}}, second]
    (tmp_path / "a.json").write_text(json.dumps({"width": 144, "height": 48, "objects": objects}))
    convert.main(Config(str(tmp_path / "a.json"), str(tmp_path / "b.json"), **SMALL))
    want, back = (load_trajectory(tmp_path / name, (48, 48), 9) for name in ("a.json", "b.json"))
    np.testing.assert_allclose(back.boxes.clip(0, 48), want.boxes.clip(0, 48), atol=1e-3)
    assert np.array_equal(back.masks, want.masks)
    assert (tmp_path / "b_mask_1.png").exists() == ("visible" not in second)
