"""The thing in a box is found: the crop that the network sees, what comes of it, and where it is used."""

import json
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch

import sample
from core.boxes import fill_box
from core.media import to_uint8
from core.weights import load, read_network
from toy import segment as segmenting
from toy.codec import ToyCodec
from toy.segment import CROP, INNER, MARGIN, BoxSegmenter, SegmenterConfig, look, segment, thing_logits
from toy.train_segmenter import make_crops
from toy.world import World


def overlap(a: np.ndarray, b: np.ndarray) -> float:
    return (a & b).sum() / (a | b).sum()


def test_a_colour_of_the_thing_as_first_found_counts_for_the_thing():
    """Of a red square on grey the network is sure of the upper half alone. Mirror images and negatives are the same."""
    crop = torch.cat([torch.zeros(1, 3, CROP, CROP), torch.ones(1, 1, CROP, CROP)], 1)
    crop[:, 0, 36:60, 36:60], crop[:, 1:3, 36:60, 36:60] = 0.8, -0.6
    unsure = torch.full((1, 1, CROP, CROP), -0.5)
    unsure[..., 36:48, 36:60] = 2
    logits = thing_logits(lambda crops: unsure, crop)
    assert logits[..., 49:59, 37:59].min() > 0 and logits[..., 62:, :].max() < -0.5


@pytest.mark.parametrize("box", [(40, 30, 120, 90), (100, 50, 108, 70), (-30, 20, 50, 100), (150, 100, 250, 260)])
def test_a_crop_shows_the_box_in_its_middle_and_nothing_beyond_the_picture(box):
    y, x = np.mgrid[:120, :200]
    picture = np.stack([x, y, 0 * x], -1).astype(np.uint8)
    crop, box = look(picture, np.array(box, float)), np.array(box, float)
    at = (np.arange(CROP) + 0.5 - CROP / 2) / INNER  # -0.5 and 0.5 are the box's sides
    x, y = ((box[n] + box[n + 2]) / 2 + at * (box[n + 2] - box[n]) for n in range(2))
    shown = crop[3].numpy() > 0
    pixel = (box[2:] - box[:2]) / INNER
    assert not shown[:, (x < 0) | (x > 200)].any() and not shown[(y < 0) | (y > 120)].any()
    assert shown[np.ix_((y > pixel[1]) & (y < 120 - pixel[1]), (x > pixel[0]) & (x < 200 - pixel[0]))].all()
    assert (crop[:, ~shown] == 0).all()
    inner = np.ix_((y > 4) & (y < 116), (x > 4) & (x < 196))  # at the picture's edge a resize has less to average
    colors = (crop[:2].numpy() + 1) * 127.5
    assert np.abs(colors[0][inner] - (x[(x > 4) & (x < 196)] - 0.5)).max() < 1
    assert np.abs(colors[1][inner] - (y[(y > 4) & (y < 116), None] - 0.5)).max() < 1


@pytest.mark.parametrize("scale", [1, 3])
def test_a_disc_is_found_in_its_box_at_any_size(scale):
    y, x = np.mgrid[:200, :300] + 0.5
    disc, ripple = (x - 170) ** 2 + (y - 90) ** 2 < 40**2, 12 * np.sin(x / 5)
    picture = np.where(disc[..., None], (190, 120, 60), 90 + ripple[..., None]).astype(np.uint8)
    large = disc.repeat(scale, 0).repeat(scale, 1)
    for box in ((130, 50, 210, 130), (122, 46, 214, 138)):  # tight, and loose
        found = segment(picture, np.array(box, float) * scale, large.shape)
        assert overlap(found, large) > 0.9 and not (found & ~fill_box(np.array(box) * scale, large.shape)).any()


def test_things_of_the_world_are_found_better_than_by_their_boxes():
    batch, found, boxes, inside = World("test", frames=2).batch(range(24)), [], [], []
    for i, k in (batch.used & batch.shown[:, :, 0]).nonzero().tolist():
        true, box = batch.masks[i, k, 0].numpy(), batch.boxes[i, k, 0].double().numpy()
        if k and true.sum() > 50:
            mask = segment(to_uint8(batch.video[i, :, :1])[0], box, true.shape)
            found, boxes = [*found, overlap(mask, true)], [*boxes, overlap(fill_box(box, true.shape), true)]
            inside.append((mask & true).sum() / true.sum())
    assert len(found) > 40 and np.mean(found) > 0.9 > np.mean(boxes) + 0.1 and np.mean(inside) > 0.96


def test_where_nothing_is_found_the_box_is_taken_and_the_whole_picture_is_a_camera(monkeypatch):
    picture, box = np.zeros((40, 60, 3), np.uint8), np.array([10.0, 10, 30, 30])
    monkeypatch.setattr(segmenting, "segmenter", lambda: lambda crops: torch.full((1, 1, CROP, CROP), -9.0))
    assert (segment(picture, box, (40, 60)) == fill_box(box, (40, 60))).all()
    monkeypatch.setattr(segmenting, "segmenter", lambda: pytest.fail("there is nothing to look for"))
    assert segment(picture, np.array([0.0, -5, 60, 40]), (40, 60)).all()
    assert not segment(picture, np.full(4, np.nan), (40, 60)).any()


def test_sampling_cuts_things_out_of_their_boxes_and_leaves_masks_as_they_are(here):
    y, x = np.mgrid[:240, :320] + 0.5
    disc = (x - 100) ** 2 + (y - 100) ** 2 < 60**2
    iio.imwrite("x.png", np.where(disc[..., None], (200, 60, 40), (60, 90, 60)).astype(np.uint8))
    painted = fill_box(np.array([200.0, 100, 280, 180]), disc.shape)
    iio.imwrite("mask.png", painted.astype(np.uint8) * 255)
    objects = [{"boxes": {"0": [40, 40, 160, 160]}}, {"boxes": {"0": [200, 100, 280, 180]}, "mask": "mask.png"}]
    Path("boxes.json").write_text(json.dumps({"objects": objects}))
    condition = sample.read_condition(sample.Config(image="x.png", traj="boxes.json"), ToyCodec(), "pixels")
    for trajectory in (condition.trajectory, condition.full[1]):
        height, width = trajectory.size
        rows, columns = ((np.arange(n) * m // n) for n, m in ((height, 240), (width, 320)))
        for mask, true in zip(trajectory.masks, (disc, painted), strict=True):
            assert overlap(mask, true[np.ix_(rows, columns)]) > 0.9
    assert condition.full[1].size == (240, 320) and (condition.full[1].masks[1] == painted).all()


def test_made_up_crops_and_a_short_training(run, tmp_path):
    crops, shown = make_crops(32, 0, 5)
    assert crops.shape == (32, 4, CROP, CROP) and shown.shape == (32, 1, CROP, CROP)
    assert torch.equal(make_crops(32, 0, 5)[0], crops) and not torch.equal(make_crops(32, 0, 6)[0], crops)
    assert crops.abs().max() <= 1 and (crops[:, :3] * (1 - crops[:, 3:]) == 0).all()
    edge = MARGIN - 4
    inside = shown[..., edge:-edge, edge:-edge].sum((1, 2, 3))
    assert (inside >= 0.98 * shown.sum((1, 2, 3))).all() and 0.1 < shown.mean() < 0.4
    done = run("toy.train_segmenter", "--steps", 2)
    assert done.returncode == 0 and "IoU of held-out things" in done.stdout, done.stderr
    file = tmp_path / "runs/box_segmenter/box_segmenter.safetensors"
    config, tensors = read_network(file, "BoxSegmenter", SegmenterConfig)
    network = load(lambda: BoxSegmenter(config), tensors, file)
    assert network(crops[:2]).shape == (2, 1, CROP, CROP)
