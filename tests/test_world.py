"""The small preset's world: what is known of a video is true, and it is as rich as it must be."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from conftest import refused

from core.boxes import move
from toy import example, latents, world
from toy.codec import ToyCodec
from toy.latents import ToyLatents
from toy.pictures import BANK, PHOTOGRAPHS, SPLITS, picture_bank
from toy.train_slow_generator import SHAPES, shape_number
from toy.world import COLORS, World, WorldBatch
from trajectory import load_trajectory

CPU = torch.device("cpu")
SIZE = (64, 64)


@pytest.fixture(scope="module")
def many() -> WorldBatch:
    return World("validation", SIZE).batch(range(96))


def test_a_video_is_the_same_in_any_batch(many):
    again = World("validation", SIZE).batch([7, 3])
    for name, value in vars(many.subset([7, 3])).items():
        assert getattr(again, name) == value if name == "captions" else torch.equal(getattr(again, name), value), name


def test_splits_share_neither_seeds_nor_pictures(many):
    firsts = sorted(SPLITS.values())
    assert min(b - a for a, b in pairwise(firsts)) >= 1 << 40  # more videos than can be made
    others = [World(split, SIZE).batch([3]).video for split in ("train", "photographs")]
    assert not any(torch.equal(video, many.video[3:4]) for video in others)
    seeds = [range(SPLITS[split], SPLITS[split] + BANK[split]) for split in BANK]  # of the pictures
    assert all(a.stop <= b.start for a, b in pairwise(sorted(seeds, key=lambda r: r.start)))
    known = {picture.numpy().tobytes() for picture in picture_bank("train", CPU)}
    assert not known & {picture.numpy().tobytes() for picture in picture_bank("validation", CPU)}
    assert others[1].std() > 0.2 and len(picture_bank("photographs", CPU)) == len(PHOTOGRAPHS)


def test_away_from_things_a_video_shows_its_background(many):
    assert many.video.abs().max() <= 1 and many.plate.abs().max() <= 1
    assert (many.video == many.plate)[:, :, 0].float().mean() > 0.5
    near = F.max_pool3d(many.masks[:, 1:].any(1, keepdim=True).float(), (1, 11, 11), 1, (0, 5, 5)) > 0
    change = (many.video - many.plate)[~near.expand_as(many.video)]
    assert (change > 1e-6).float().mean() < 1e-4  # shadows only darken; a soft edge reaches in from outside the picture
    assert 0.9 < (change == 0).float().mean() < 1


def test_silhouettes_lie_in_their_boxes(many):
    """To the pixel by which a soft edge reaches out. A box drawn closely touches the silhouette on all sides."""
    gaps, loose = [], []
    for b, k, t in many.masks[:, 1:].any((-1, -2)).nonzero().tolist():
        rows, columns = many.masks[b, k + 1, t].nonzero(as_tuple=True)
        x0, y0, x1, y1 = many.boxes[b, k + 1, t].tolist()
        gap = [columns.min() - x0, rows.min() - y0, x1 - columns.max() - 1, y1 - rows.max() - 1]
        assert min(gap) > -1.5
        in_front = not many.used[b, k + 2 :].any()
        if in_front and x0 >= 0 and y0 >= 0 and x1 <= SIZE[1] and y1 <= SIZE[0]:
            (loose if many.by_box[b, k + 1] else gaps).append(max(gap))
    assert max(gaps) < 2 and max(loose) > 2
    assert many.masks[:, 1:].sum(1).max() == 1  # a pixel shows one thing
    assert not many.masks[~many.used].any()


def test_the_cameras_box_shows_where_the_first_frames_ground_went(many):
    cameras = many.used[:, 0].nonzero()[:, 0].tolist()
    assert 15 <= len(cameras) <= 35
    moves = 0
    for i in cameras:
        first = torch.cat([many.plate[i, :, 0], torch.ones(1, *SIZE)])
        for t in (4, 8):
            boxes = [many.boxes[i, 0, n].double().numpy() for n in (0, t)]
            there = move(first, *boxes, (0, SIZE[0], 0, SIZE[1]))
            inside = there[3] > 0.999
            error = (there[:3] - many.plate[i, :, t])[:, inside].square().mean()
            assert error < 2e-3, (i, t)
            moves += (many.plate[i, :, 0] - many.plate[i, :, t])[:, inside].square().mean() > 10 * error
            shown = many.masks[i, 0, t]
            assert not (shown & (there[3] < 0.2)).any() and shown[inside].all()  # its mask is that box
    assert moves > len(cameras)
    assert many.masks[cameras, 0, 0].all()
    still = ~many.used[:, 0]
    assert torch.equal(many.plate[still], many.plate[still][:, :, :1].expand_as(many.plate[still]))


def test_some_things_appear_later(many):
    late = (many.used & ~many.shown[..., 0]).nonzero().tolist()
    assert 5 < len(late) < 0.25 * many.used.sum() and all(k > 0 for _, k in late)
    for b, k in late:
        start = int(many.shown[b, k].int().argmax())
        assert many.shown[b, k, start:].all() and not many.masks[b, k, :start].any()
        trajectory, n = many.trajectory(b), many.used[b, :k].sum()
        assert np.isnan(trajectory.boxes[n, :start]).all() and not np.isnan(trajectory.boxes[n, start:]).any()
        assert not trajectory.masks[n].any()
    assert any(many.masks[b, k].any() for b, k in late)
    assert not many.shown[~many.used].any()


def test_half_of_the_things_have_a_box_alone(many):
    things = many.used[:, 1:] & many.shown[:, 1:, 0]
    by_box = many.by_box[:, 1:] & things
    assert 0.35 < by_box.sum() / things.sum() < 0.65 and not many.by_box[:, 0].any()
    for b in range(16):
        trajectory = many.trajectory(b)
        for n, k in enumerate(many.used[b].nonzero()[:, 0].tolist()):
            assert trajectory.names[n] == ("the camera" if k == 0 else f"thing {k}")
            mask, true = torch.from_numpy(trajectory.masks[n]), many.masks[b, k, 0]
            if k == 0 or not many.by_box[b, k] or not many.shown[b, k, 0]:
                assert torch.equal(mask, true)
                continue
            x0, y0, x1, y1 = many.boxes[b, k, 0].round().int().tolist()
            assert mask[max(y0, 0) : y1, max(x0, 0) : x1].all() and not (true & ~mask).sum() > 4
    dense = many.trajectory(0, "mask")
    assert torch.equal(torch.from_numpy(dense.masks), many.masks[0, many.used[0]])


def test_videos_are_many_sided(many):
    counts = many.used[:, 1:].sum(1).bincount(minlength=7)[1:]
    assert counts.sum() == 96 and counts.min() >= 2 and counts[0] > counts[-1]
    used = many.used[:, 1:]
    assert 0.15 < (many.spin[:, 1:][used] != 0).float().mean() < 0.4
    low, high = many.boxes[:, 1:, :, :2], many.boxes[:, 1:, :, 2:]
    outside = (low < 0).any(-1) | (high > torch.tensor(SIZE[::-1])).any(-1)
    assert 0.05 < outside[used].float().mean() < 0.4  # some cross the edge
    side = (high - low)[used].amax(-1)
    assert side.min() < 0.25 * SIZE[0] and side.max() > 0.7 * SIZE[0]


def test_captions_say_what_is_there_and_half_of_them_the_directions(many):
    spins = 0
    for b, caption in enumerate(many.captions):
        clauses = caption.split(", ")
        spin = many.spin[b, 1:][many.used[b, 1:]].tolist()
        assert len(clauses) == len(spin)
        for clause, rate in zip(clauses, spin, strict=True):
            color, shape = clause.split()[1:3]
            assert color in COLORS and shape in world.SHAPES
            turning = " spinning clockwise" if rate > 0 else " spinning counterclockwise"
            assert clause.endswith(turning) == bool(many.says_spin[b] and rate)
            assert rate == 0 or (shape != "rectangle" and 5 <= abs(math.degrees(rate)) <= 15)
            spins += bool(rate)
    assert spins > 20 and 0.3 < many.says_spin.float().mean() < 0.7


@pytest.mark.parametrize("style", ["outline", "pixels"])
@pytest.mark.parametrize("kind", ["box", "mask"])
def test_maps_are_those_that_a_trajectory_paints_whatever_the_size(many, style, kind):
    other = World("validation", (40, 72), frames=4).batch([0, 1])
    assert other.video.shape == (2, 3, 4, 40, 72) and other.masks.any((-1, -2))[:, 1:].any(1).any()
    for few in (many.subset(range(8)), other):
        maps = few.maps(style, kind)
        assert maps.shape == few.video.shape
        for i, video in enumerate(few.video):
            painted = few.trajectory(i, kind).maps(kind, video[:, 0] if style == "pixels" else None)
            assert torch.equal(maps[i], painted)


def test_the_script_writes_what_sampling_reads(tmp_path, capsys):
    example.main(example.Config(out=str(tmp_path / "out"), split="validation", video=6))
    assert capsys.readouterr().out.startswith(f"{tmp_path}/out: ")
    batch = World("validation").batch([6])
    loaded, true = load_trajectory(tmp_path / "out/boxes.json", (128, 128), 9, (128, 128)), batch.trajectory(0)
    assert loaded.names == true.names
    np.testing.assert_allclose(loaded.boxes[:, ::4], true.boxes[:, ::4], atol=0.051)  # or both nowhere
    assert (loaded.masks != true.masks).mean() < 0.01
    assert (tmp_path / "out/prompt.txt").read_text().strip() == batch.captions[0]
    assert json.loads((tmp_path / "out/boxes.json").read_text())["num_frames"] == 9
    assert (tmp_path / "out/truth.mp4").stat().st_size > 1000


def test_training_batches():
    codec, shape = ToyCodec(), {"size": (16, 16), "frames": 3}
    source = ToyLatents(codec, "outline", **shape)
    x0, text, none = source.batch([1, 2, 3], drop_text=0.0)
    assert x0.shape == (3, 24, 3, 4, 4) and text.shape == (3, 32, 64) and none is None
    assert torch.equal(source.batch([3, 1])[0], x0[[2, 0]])
    other = ToyLatents(codec, "outline", seed=1, **shape)
    assert not torch.equal(other.batch([1])[0], x0[:1])
    refused("--seed 256: use 0 to 255", ToyLatents, codec, "outline", seed=256)
    with pytest.raises(ValueError, match="how they are painted"):
        ToyLatents(codec, **shape).batch([1], "box")


@pytest.mark.parametrize("found", [0, 1])
def test_training_maps_are_the_worlds(found, monkeypatch):
    """Things told by a box alone are shown as their boxes, or all as if they had been found in them."""
    monkeypatch.setattr(latents, "FOUND", found)
    codec, shape = ToyCodec(), {"size": (32, 32), "frames": 4}
    batch = World(**shape).batch([1, 2, 3])
    assert batch.by_box.any()
    batch = replace(batch, by_box=batch.by_box & (not found))
    for style in ("outline", "pixels"):
        source = ToyLatents(codec, style, **shape)
        for kind in ("box", "mask"):
            assert torch.equal(source.batch([1, 2, 3], kind)[2], codec.encode_video(batch.maps(style, kind)))
    both = [codec.decode_video(source.batch(list(range(60)), "box", sparse)[2]) for sparse in (0.5, 0)]
    # (B, F) each: which frames are black, and which are already because all things have left
    dark, already = ((maps < -0.8).all(1).flatten(2).float().mean(-1) > 0.999 for maps in both)
    made = dark & ~already
    assert not made[:, 0].any()
    assert 0.25 < made.any(1).float().mean() < 0.55  # of a half, those that lose a frame or more
    assert len({tuple(row.tolist()) for row in made}) >= 6


def test_training_sees_small_videos_first_and_then_all_shapes_in_turn():
    numbers = [shape_number(step, 10, 0.4, 4) for step in range(10)]
    assert numbers == [0, 0, 0, 0, 2, 3, 1, 2, 3, 1]
    assert [shape_number(step, 3, 0.0, 1) for step in range(3)] == [0, 0, 0]
    for _, shape in SHAPES:
        x0, _, traj = ToyLatents(ToyCodec(), "pixels", "validation", **shape).batch([0], "box")
        assert x0.shape == traj.shape and x0.shape[2] == shape.get("frames", 9)
