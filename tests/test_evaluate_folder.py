"""tools/evaluate_folder.py: videos of the real world, with stand-ins for the networks that a user brings."""

import json
import shutil

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from conftest import refused
from torch import Tensor, nn

from core.media import write_image, write_video
from tools import evaluate_folder
from tools.evaluate_folder import Config

COLORS = [(200, 40, 40), (40, 200, 40)]


class Inception(nn.Module):
    def forward(self, x: Tensor, return_features: bool = False) -> Tensor:
        y = x.float() / 255
        return torch.cat([y.mean((2, 3)), y.std((2, 3))], dim=1)


class I3D(nn.Module):
    def forward(self, x: Tensor, rescale: bool = True, resize: bool = True, return_features: bool = False) -> Tensor:
        assert x.shape[1] == 3 and x.shape[3] == 224 and not rescale and not resize and return_features
        return torch.cat([x.mean((2, 3, 4)), x.std((3, 4)).mean(2)], dim=1)


class LPIPS(nn.Module):
    def forward(self, a: Tensor, b: Tensor) -> Tensor:
        return (a - b).abs().mean((1, 2, 3))


def all_masks(side, boxes=([[0, 0, 20, 20], None],) * 2, colors=COLORS):
    """Masks of two frames for every video."""
    for n in range(4):
        masks(side / "masks", f"v{n}", boxes, colors)


def masks(folder, name, boxes, colors=COLORS):
    """One frame a list of boxes, drawn in the objects' colours: [x0, y0, x1, y1] or None."""
    for t, frame in enumerate(boxes):
        image = np.zeros((48, 64, 3), np.uint8)
        for color, box in zip(colors, frame, strict=True):
            if box:
                image[box[1] : box[3], box[0] : box[2]] = color
        write_image(folder / name / f"{t}.png", image)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made")
    for n in range(4):
        for side, seed in (("generated", n), ("true", 10 + n)):
            pixels = np.random.default_rng(seed).integers(0, 255, (12, 6, 8, 3)).astype(np.uint8)
            write_video(folder / side / f"v{n}.mp4", pixels.repeat(8, 1).repeat(8, 2), fps=8)
    (folder / "networks").mkdir()
    for name, network in (("inception-2015-12-05", Inception()), ("i3d_torchscript", I3D()), ("lpips", LPIPS())):
        torch.jit.script(network).save(folder / f"networks/{name}.pt")
    return folder


@pytest.fixture
def world(made, tmp_path, monkeypatch):
    """A copy of it, for a test to spoil."""
    monkeypatch.chdir(tmp_path)
    return shutil.copytree(made, tmp_path, dirs_exist_ok=True)


def rows(folder) -> list[dict]:
    return json.loads((folder / "out/benchmark.json").read_text())


def test_distances_are_those_of_a_matrix_square_root(world):
    scipy = pytest.importorskip("scipy.linalg", reason="the reference needs requirements-dev.txt")
    evaluate_folder.main(Config(networks="networks"))
    (row,) = rows(world)
    files = [[world / side / f"v{n}.mp4" for n in range(4)] for side in ("generated", "true")]
    sets = [[evaluate_folder.read_whole(file) for file in side] for side in files]

    def reference(features: list[np.ndarray]) -> float:
        (a, b), (m, n) = ([np.cov(x.T) for x in features], [x.mean(0) for x in features])
        return ((m - n) ** 2).sum() + np.trace(a + b - 2 * scipy.sqrtm(a @ b).real)

    images = [torch.cat([Inception()(v) for v in side]).double().numpy() for side in sets]
    assert row["fid"] == pytest.approx(reference(images), rel=0.05, abs=1e-4)
    lpips = [(a.float() - b.float()).abs().mean() / 127.5 for a, b in zip(*sets, strict=True)]
    assert row["lpips"] == pytest.approx(np.mean(lpips), abs=1e-4)
    assert row["fvd"] >= 0 and row["videos"] == 4 and row["mask_iou"] is None
    assert "fid" in (world / "out/benchmark.md").read_text()
    assert all(f"networks/{file}" in evaluate_folder.__doc__ for file in evaluate_folder.NETWORKS.values())  # --help


def test_overlaps_worked_out_by_hand(world):
    """One object shifted by half its width: IoU 1/3; a second one that is lost in one of two frames."""
    for n in range(4):
        true = [[0, 0, 20, 20], None if n else [30, 10, 50, 30]]
        masks(world / "true/masks", f"v{n}", [true] * 2)
        masks(world / "generated/masks", f"v{n}", [[[10, 0, 30, 20], None]] * 2 if n else
              [[[0, 0, 20, 20], [30, 10, 50, 30]], [[0, 0, 20, 20], None]])  # fmt: skip
    evaluate_folder.main(Config())
    everyone, one, two = rows(world)
    assert [r["objects"] for r in (everyone, one, two)] == ["all", 1, 2] and [one["videos"], two["videos"]] == [3, 1]
    for measure in ("mask_iou", "box_iou"):
        assert one[measure] == pytest.approx(1 / 3, abs=1e-4)
        assert two[measure] == pytest.approx((1 + 0.5) / 2, abs=1e-4)
        assert everyone[measure] == pytest.approx((3 / 3 + 0.75) / 4, abs=1e-4)
    for n in range(4):
        objects = [{"boxes": {"0": [0, 0, 20, 20]}}, {"boxes": {"0": [30, 10, 50, 30]}}][: 1 if n else 2]
        (world / "true/boxes").mkdir(exist_ok=True)
        (world / f"true/boxes/v{n}.json").write_text(json.dumps({"objects": objects}))
    evaluate_folder.main(Config())
    assert [r["box_iou"] for r in rows(world)] == [r["box_iou"] for r in (everyone, one, two)]


FOUND = {  # colours in which a segmentation network paints the two objects
    "white and grey": [(255, 255, 255), (120, 120, 120)], "the same, swapped": [COLORS[1], COLORS[0]],
    "one that is the other's": [(250, 200, 0), COLORS[0]],
}  # fmt: skip


@pytest.mark.parametrize("kind", FOUND)
def test_objects_are_matched_whatever_their_colours(kind, world):
    boxes = [[[0, 0, 20, 20], [30, 10, 50, 30]], [[4, 0, 24, 20], [30, 14, 50, 34]]]
    all_masks(world / "true", boxes)
    all_masks(world / "generated", [boxes[0], [boxes[1][0], None]], FOUND[kind])
    (world / "generated/._v9.mp4").write_bytes(b"Mac OS X")
    (world / "generated/v0.boxes.mp4").write_bytes((world / "generated/v0.mp4").read_bytes())  # as sample.py writes it
    evaluate_folder.main(Config())
    assert rows(world)[0]["videos"] == 4
    assert rows(world)[0]["mask_iou"] == rows(world)[0]["box_iou"] == 0.75  # the second is lost in frame 1


def turn(world):
    for place in (world / side / f"masks/v0/{t}.png" for side in ("true", "generated") for t in range(2)):
        write_image(place, iio.imread(place).swapaxes(0, 1))


def move(world, *color):
    """The object, in this colour, to where none of the true ones is."""
    all_masks(world / "generated", [[[30, 10, 50, 30], None]] * 2, [color] * 2)


NETWORKS = {"networks": "networks"}
BAD = [  # what the message says, what makes it so of videos with masks, options
    ("--generated empty: holds no .mp4 files", None, {"generated": "empty"}),
    ("--generated nowhere: holds no .mp4 files", None, {"generated": "nowhere"}),
    ("--true empty: holds no v0.mp4, which is generated; 4 are missing",
     lambda world: shutil.rmtree(world / "generated/masks"), {"true": "empty"}),
    ("--networks empty: holds no inception-2015-12-05.pt, i3d_torchscript", None, {"networks": "empty"}),
    ("--out x.txt: the name must end in .json", None, {"out": "x.txt"}),
    ("true/v0.mp4: can't be decoded", lambda world: (world / "true/v0.mp4").write_bytes(b"no video"), {}),
    (r"v0.mp4: \[12, 3, 48, 64\] generated, \[12, 3, 24, 32\] true",
     lambda world: write_video(world / "true/v0.mp4", np.zeros((12, 24, 32, 3), np.uint8), fps=8), {}),
    ("i3d_torchscript.pt: not a TorchScript file that works as",
     lambda world: torch.jit.script(nn.ReLU()).save(world / "networks/i3d_torchscript.pt"), NETWORKS),
    ("lpips.pt: not a TorchScript file that works as --help says",
     lambda world: (world / "networks/lpips.pt").write_text("no network"), NETWORKS),
    ("true/boxes: is compared with true/masks",
     lambda world: (world / "true/masks").rename(world / "true/boxes"), {"generated": "true"}),
    ("generated/masks: is compared with true/masks", lambda world: shutil.rmtree(world / "true/masks"), {}),
    ("generated/masks/v0: no such folder or video; every generated video needs one",
     lambda world: shutil.rmtree(world / "generated/masks"), {}),
    ("generated/masks/v0: has not as many frames as the true masks",
     lambda world: (world / "generated/masks/v0/1.png").unlink(), {}),
    (r"true/masks/v0: masks \[h, w\] \[64, 48\] of a video \[48, 64\]", turn, {}),
    ("true/masks/v0: frame 0: shows no object", lambda world: masks(world / "true/masks", "v0", [[None] * 2] * 2), {}),
    ("frame 0: an object lies where none", lambda world: move(world, 255, 255, 255), {}),
    ("shows objects, but in", lambda world: move(world, 1, 1, 1), {}),
]  # fmt: skip


@pytest.mark.parametrize("message, make, options", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(message, make, options, world):
    (world / "empty").mkdir()
    for side in ("true", "generated"):
        all_masks(world / side)
    if make:
        make(world)
    refused(message, evaluate_folder.main, Config(**options))
    assert not (world / "out").exists()


def test_videos_without_a_counterpart_are_told_of(world, capsys):
    (world / "generated/v3.mp4").unlink()
    (world / "generated/v2.mp4").rename(world / "generated/v2.MP4")  # as some cameras name them
    evaluate_folder.main(Config(networks="networks"))
    assert "--generated generated: v3.mp4 is missing, 1 in all; they are left out" in capsys.readouterr().err
    assert rows(world)[0]["videos"] == 3
    (world / "true/v0.mp4").unlink()
    lost = "--true true: holds no v0.mp4, which is generated; 1 are missing"
    refused(lost, evaluate_folder.main, Config(networks="networks"))
