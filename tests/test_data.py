"""The toy world: exact, seeded, and rich enough for what it must show."""

import json
from itertools import pairwise

import numpy as np
import pytest
import torch

from core.config import UserError
from toy import world
from toy.codec import ToyCodec
from toy.latents import ToyLatents
from toy.world import COLORS, SPLITS, ToyWorld
from trajectory import load_trajectory


def test_a_video_depends_on_its_number_alone():
    source = ToyWorld()
    together, alone = source.batch([3, 8]), source.batch([8])
    for name in ("video", "masks", "boxes", "spin"):
        assert torch.equal(getattr(together, name)[1:], getattr(alone, name))
    assert together.captions[1:] == alone.captions
    others = [ToyWorld(split).batch([8]).video for split in ("validation", "test")]
    assert not torch.equal(alone.video, others[0]) and not torch.equal(others[0], others[1])


def test_split_seeds_are_disjoint():
    firsts = sorted(SPLITS.values())
    assert min(b - a for a, b in pairwise(firsts)) >= 1 << 40  # more videos than can be made


def test_boxes_and_masks_are_exact():
    batch = ToyWorld().batch(list(range(64)))
    assert set(batch.count.tolist()) == {1, 2, 3}
    for b in range(64):
        for k in range(3):
            if k >= batch.count[b]:
                assert not batch.masks[b, k].any()
                continue
            for t in range(9):
                x0, y0, x1, y1 = batch.boxes[b, k, t].tolist()
                assert x0 >= 0 and x1 <= 48 and y0 >= 0 and y1 <= 48 and 14 <= x1 - x0 == y1 - y0 <= 23
                ys, xs = np.nonzero(batch.masks[b, k, t].numpy())
                assert len(xs) == 0 or (xs.min() >= x0 and xs.max() < x1 and ys.min() >= y0 and ys.max() < y1)
                if k == batch.count[b] - 1:  # in front: the box is exactly its extent
                    assert (xs.min(), ys.min(), xs.max() + 1, ys.max() + 1) == (x0, y0, x1, y1)
        assert batch.masks[b].sum(0).max() <= 1  # a pixel belongs to one object
        colors = torch.tensor(list(COLORS.values()))[batch.colors[b]] * 2 - 1  # (K, 2, 3)
        for k in range(batch.count[b]):
            pixels = batch.video[b].permute(1, 2, 3, 0)[batch.masks[b, k]]
            axis = colors[k, 1] - colors[k, 0]
            share = (pixels - colors[k, 0]) @ axis / axis.square().sum()
            mixed = torch.lerp(colors[k, :1], colors[k, 1:], share[:, None])  # the object's two colours and between
            assert torch.allclose(pixels, mixed, atol=1e-5) and share.min() > -1e-5 and share.max() < 1 + 1e-5
            assert ((share < 1e-5) | (share > 1 - 1e-5)).float().mean() > 0.3


def test_captions_tell_what_is_there_and_half_the_directions():
    batch = ToyWorld().batch(list(range(400)))
    names = list(COLORS)
    for b, caption in enumerate(batch.captions):
        clauses = caption.split(", ")
        assert len(clauses) == batch.count[b]
        for k, clause in enumerate(clauses):
            one, two = (names[c] for c in batch.colors[b, k])
            assert f" {one} and {two} " in clause
            turning = "clockwise" if batch.spin[b, k] > 0 else "counterclockwise"
            assert clause.endswith(f"spinning {turning}") == bool(batch.told[b])
    assert 0.4 < batch.told.float().mean() < 0.6
    assert 0.4 < (batch.spin > 0).float().mean() < 0.6
    rate = torch.rad2deg(batch.spin.abs())
    assert rate.min() >= 10 and rate.max() <= 20


def test_pinwheels_turn_as_said():
    """A lone disc of two sectors: the colour boundary advances by `spin` a frame."""
    batch = ToyWorld().batch(list(range(300)))
    lone = [b for b in range(300) if batch.count[b] == 1 and batch.sectors[b, 0] == 2]
    assert len(lone) > 20
    for b in lone:
        color = torch.tensor(list(COLORS.values()))[batch.colors[b, 0, 1]] * 2 - 1
        angles = []
        for t in range(9):
            on = ((batch.video[b, :, t] - color[:, None, None]).abs().amax(0) < 1e-6).nonzero().double() + 0.5
            x0, y0, x1, y1 = batch.boxes[b, 0, t].tolist()
            dy, dx = (on - torch.tensor([(y0 + y1) / 2, (x0 + x1) / 2])).T
            angles.append(torch.atan2(dy.sum(), dx.sum()).item())
        turned = np.diff(np.unwrap(angles)).mean()
        assert abs(turned - batch.spin[b, 0].item()) < np.deg2rad(3)


def test_training_batches():
    codec = ToyCodec()
    source = ToyLatents(codec)
    x0, text, none = source.batch([1, 2, 3], drop_text=0.0)
    assert x0.shape == (3, 16, 9, 12, 12) and text.shape == (3, 32, 64) and none is None
    empty = source.batch(list(range(200)), drop_text=0.3)[1].flatten(1).abs().amax(1) == 0
    assert 0.2 < empty.float().mean() < 0.4
    other = ToyLatents(codec, seed=1)
    assert not torch.equal(other.batch([1])[0], source.batch([1])[0])
    with pytest.raises(UserError, match="--seed 256: use 0 to 255"):
        ToyLatents(codec, seed=256)
    box, mask = (source.batch([1, 2, 3], kind)[2] for kind in ("box", "mask"))
    assert torch.allclose(box[:, :, 0], mask[:, :, 0], atol=1e-5)  # frame 0 is always the mask
    assert not torch.allclose(box[:, :, 1:], mask[:, :, 1:], atol=0.1)
    black = codec.encode_video(-torch.ones(1, 3, 1, 48, 48))
    dark = (source.batch(list(range(400)), "box", sparse=0.5)[2] - black).abs().amax((1, 3, 4)) < 1e-4  # (B, F)
    assert not dark[:, 0].any()
    assert 0.38 < dark.any(1).float().mean() < 0.51  # about half lose a frame or more
    assert len({tuple(row.tolist()) for row in dark}) > 20


def test_example_script_writes_what_sampling_reads(tmp_path, capsys):
    world.main(world.Config(out=str(tmp_path / "out/toy"), video=40))
    assert capsys.readouterr().out.startswith(f"{tmp_path}/out/toy: ")
    batch = ToyWorld("test").batch([40])
    loaded = load_trajectory(tmp_path / "out/toy/boxes.json", (48, 48), 9, (48, 48))
    assert loaded.names == batch.trajectory(0).names
    for t in (0, 4, 8):
        assert np.array_equal(loaded.boxes[:, t], batch.boxes[0, :2, t])
    assert np.array_equal(loaded.masks, batch.masks[0, :2, 0])
    assert (tmp_path / "out/toy/prompt.txt").read_text().strip() == batch.captions[0]
    top = json.loads((tmp_path / "out/toy/boxes.json").read_text())
    assert top["num_frames"] == 9 and top["width"] == top["height"] == 48
