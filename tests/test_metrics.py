"""Measures against answers computed by hand."""

import dataclasses
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.frechet import frechet_distance
from core.noise import rng
from toy import metrics
from toy.world import COLORS, ToyBatch, ToyWorld

RED, YELLOW = (list(COLORS).index(name) for name in ("red", "yellow"))


@pytest.fixture(scope="module")
def world() -> ToyBatch:
    return ToyWorld("test").batch(list(range(64)))


@pytest.fixture
def no_features(monkeypatch):
    """For scores of which overlap alone is looked at: the features take nearly all the time."""
    monkeypatch.setattr(metrics, "video_features", lambda video: torch.zeros(2, 1))


def scene(masks: Tensor, size: int = 48, **changes) -> ToyBatch:
    """Videos of single objects with these masks [B, T, S, S] in red on grey."""
    B, T = masks.shape[:2]
    red = torch.tensor(COLORS["red"])[:, None, None, None] * 2 - 1
    batch = ToyBatch(
        video=torch.where(masks[:, None], red, torch.zeros(())),
        masks=masks[:, None],
        boxes=torch.zeros(B, 1, T, 4, dtype=torch.long),
        count=torch.ones(B, dtype=torch.long),
        colors=torch.tensor([[[RED, YELLOW]]]).expand(B, 1, 2),
        sectors=torch.full((B, 1), 2),
        spin=torch.ones(B, 1),
        captions=["a red and yellow square"] * B,
        told=torch.ones(B, dtype=torch.bool),
    )
    return dataclasses.replace(batch, **changes)


def square(x: int, y: int, width: int, height: int, frames: int = 9) -> Tensor:
    """Masks [1, T, 48, 48] of a rectangle that stands still."""
    masks = torch.zeros(1, frames, 48, 48, dtype=torch.bool)
    masks[..., y : y + height, x : x + width] = True
    return masks


# --- finding objects --------------------------------------------------------------------------------------------------


def test_objects_of_true_videos_are_found_exactly(world):
    assert torch.equal(metrics.find_objects(world.video, world), world.masks)


def test_background_and_unused_slots_are_never_found(world):
    found = metrics.find_objects(torch.zeros_like(world.video), world)
    assert not found.any()
    loud = metrics.find_objects(torch.rand(world.video.shape, generator=rng(0)) * 2 - 1, world)
    unused = torch.arange(3) >= world.count[:, None]
    assert loud.any() and not loud[unused].any()


def test_true_videos_score_the_ceiling(world):
    scores = metrics.score(world.video, world)
    assert (scores["mask_iou"], scores["box_iou"], scores["sharpness"]) == (1, 1, 1)
    assert scores["fvd"] < 1e-4
    assert scores["prompt_accuracy"] >= 0.97
    untold = world.spin[~world.told][torch.arange(3) < world.count[~world.told][:, None]]
    assert scores["clockwise_when_untold"] == pytest.approx((untold > 0).float().mean().item(), abs=0.03)


# --- overlap ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shift", "expected"), [(0, 1), (1, 15 / 17), (2, 14 / 18), (16, 0)])
def test_a_square_beside_itself(shift, expected):
    batch, moved = scene(square(10, 10, 16, 16)), scene(square(10 + shift, 10, 16, 16))
    found = metrics.find_objects(moved.video, batch)
    assert metrics.mask_iou(found, batch.masks).item() == pytest.approx(expected)
    assert metrics.box_iou(found, batch.masks).item() == pytest.approx(expected)


def test_a_video_that_repeats_frame_0(world, no_features):
    still = world.video[:, :, :1].expand_as(world.video)
    measured = metrics.mask_iou(metrics.find_objects(still, world), world.masks)
    for b, k in np.ndindex(*measured.shape):
        truth, ious = world.masks[b, k].numpy(), []
        for frame in truth[1:]:
            if frame.sum() >= 20:
                ious.append((truth[0] & frame).sum() / (truth[0] | frame).sum())
        assert measured[b, k].item() == pytest.approx(np.mean(ious), nan_ok=True) if ious else measured[b, k].isnan()
    assert metrics.score(still, world)["mask_iou"] == pytest.approx(np.nanmean(measured.numpy()), abs=1e-6)


def test_frame_0_does_not_count():
    batch = scene(square(10, 10, 16, 16))
    found = batch.masks.clone()
    found[:, :, 0] = False
    assert metrics.mask_iou(found, batch.masks).item() == metrics.box_iou(found, batch.masks).item() == 1


def test_frames_where_little_is_visible_are_left_out():
    masks = square(10, 10, 16, 16)
    masks[:, 5:] = square(10, 10, 19, 1, frames=4)  # 19 pixels: one too few
    batch = scene(masks)
    found = batch.masks.clone()
    found[:, :, 5:] = False
    assert metrics.mask_iou(found, batch.masks).item() == 1
    assert metrics.mask_iou(found[:, :, 4:], batch.masks[:, :, 4:]).isnan().all()
    masks[:, 5:] = square(10, 10, 20, 1, frames=4)  # enough for a mask, too thin for a box
    assert metrics.mask_iou(found, scene(masks).masks).item() == pytest.approx(0.5)
    assert metrics.box_iou(found, scene(masks).masks).item() == 1


def test_nothing_found_is_zero():
    batch = scene(square(10, 10, 16, 16))
    found = torch.zeros_like(batch.masks)
    assert metrics.mask_iou(found, batch.masks).item() == metrics.box_iou(found, batch.masks).item() == 0


def test_strays_and_thin_lines_do_not_stretch_boxes():
    batch = scene(square(10, 10, 16, 16))
    found = batch.masks.clone()
    found[..., 45, 2::4] = True
    found[..., 40] = True
    assert metrics.box_iou(found, batch.masks).item() == 1
    found[..., 10:26, 26:30] = True  # a thick slab does: 20 wide instead of 16
    assert metrics.box_iou(found, batch.masks).item() == pytest.approx(16 / 20)


def test_bounding_boxes_are_x_y_and_exclusive():
    assert metrics.bounding_boxes(square(3, 10, 5, 7, frames=1)).tolist() == [[[3, 10, 8, 17]]]
    assert metrics.bounding_boxes(torch.ones(2, 48, 48, dtype=torch.bool)).tolist() == [[0, 0, 48, 48]] * 2
    assert metrics.bounding_boxes(torch.zeros(1, 48, 48, dtype=torch.bool)).tolist() == [[0, 0, 0, 0]]


# --- sharpness --------------------------------------------------------------------------------------------------------


def checkerboard(low: float = 0, high: float = 1) -> ToyBatch:
    """An object that fills the frame with pixels of red and yellow in turn, mixed by these shares of yellow."""
    batch = scene(square(0, 0, 48, 48))
    odd = (torch.arange(48) + torch.arange(48)[:, None]) % 2
    red, yellow = (torch.tensor(COLORS[name])[:, None, None, None] for name in ("red", "yellow"))
    share = low + (high - low) * odd
    return dataclasses.replace(batch, video=((1 - share) * red + share * yellow).expand(1, 3, 9, 48, 48) * 2 - 1)


def test_sharpness_of_a_checkerboard():
    truth = checkerboard()
    found = metrics.find_objects(truth.video, truth)
    assert metrics.sharpness(truth.video, found, truth) == 1
    energy, pixels = metrics.detail(truth.video, found)
    # Every neighbour differs by the same step, yellow - red = (0, 0.9, 0), twice that in [-1, 1].
    assert pixels.item() == 8 * 44**2
    assert energy.item() == pytest.approx(8 * 44**2 * 1.8**2, rel=1e-5)
    # A 3x3 box blur leaves 5/9 of a pixel's own colour and 4/9 of the other: a ninth of the contrast.
    blurred = checkerboard(4 / 9, 5 / 9).video
    box = F.avg_pool2d(truth.video[0].transpose(0, 1), 3, 1).transpose(0, 1)
    assert torch.allclose(box, blurred[0, ..., 1:-1, 1:-1], atol=1e-6)
    found = metrics.find_objects(blurred, truth)
    assert metrics.sharpness(blurred, found, truth) == pytest.approx(1 / 81, rel=1e-4)
    flat = checkerboard(0.5, 0.5).video
    assert metrics.sharpness(flat, metrics.find_objects(flat, truth), truth) == pytest.approx(0, abs=1e-9)


def test_sharpness_ignores_displacement_and_counts_what_is_missing():
    pattern = checkerboard().video
    outside = torch.zeros(())
    truth = scene(square(4, 4, 16, 16))
    truth = dataclasses.replace(truth, video=torch.where(truth.masks, pattern, outside))
    moved = torch.where(square(24, 20, 16, 16)[:, None], pattern, outside)
    assert metrics.sharpness(moved, metrics.find_objects(moved, truth), truth) == pytest.approx(1)
    half = torch.where(square(4, 4, 16, 9)[:, None], pattern, outside)  # 12 x 5 inner pixels of 12 x 12
    assert metrics.sharpness(half, metrics.find_objects(half, truth), truth) == pytest.approx(5 / 12)
    larger = torch.where(square(4, 4, 32, 32)[:, None], pattern, outside)
    assert metrics.sharpness(larger, metrics.find_objects(larger, truth), truth) == pytest.approx(1)


def test_a_flat_silhouette_has_no_detail():
    batch = scene(square(10, 10, 16, 16))
    assert metrics.detail(batch.video, batch.masks)[0].item() == pytest.approx(0, abs=1e-9)


# --- spin -------------------------------------------------------------------------------------------------------------


def test_spin_of_true_videos(world):
    spin = metrics.spin_direction(world.video, world.masks, world)
    used = torch.arange(3) < world.count[:, None]
    assert torch.equal(spin.isnan(), ~used)
    assert (spin.sign() == world.spin.sign())[used].float().mean() >= 0.97
    single = world.count == 1
    assert torch.allclose(spin[single, 0], world.spin[single, 0].float(), atol=math.radians(3))
    assert (spin[single, 0] - world.spin[single, 0]).abs().mean() < math.radians(1)


def test_spin_follows_mirrors_and_displacement(world):
    single = metrics.subset(world, torch.nonzero(world.count == 1)[:, 0].tolist())
    for video, sign in ((single.video.flip(-1), -1), (single.video.flip(2), -1), (single.video.flip((-1, -2)), 1)):
        found = metrics.find_objects(video, single)
        spin = metrics.spin_direction(video, found, single)[:, 0]
        assert torch.equal(spin.sign(), sign * single.spin[:, 0].sign().float())


def test_no_spin_without_motion_or_object(world):
    still = world.video[:, :, :1].expand_as(world.video)
    for video in (still, torch.zeros_like(still)):
        spin = metrics.spin_direction(video, metrics.find_objects(video, world), world)
        assert torch.equal(spin.nan_to_num(0), torch.zeros_like(spin))


def test_prompt_accuracy_by_hand():
    batch = scene(square(0, 0, 4, 4).repeat(4, 1, 1, 1))
    spin = torch.tensor([[1.0, -1, 1], [-1, 1, 0], [1, 1, 0], [1, 0, 0]])
    told = torch.tensor([True, True, False, False])
    batch = dataclasses.replace(batch, spin=spin, told=told)
    nan = math.nan
    measured = torch.tensor([[0.2, -0.3, -0.1], [0.0, nan, nan], [0.3, -0.2, nan], [0.1, 0.0, nan]])
    assert metrics.prompt_accuracy(measured, batch) == pytest.approx(2 / 4)  # no motion is no obedience
    assert metrics.clockwise_when_untold(measured, batch) == pytest.approx(2 / 3)  # and no direction
    assert math.isnan(metrics.prompt_accuracy(measured, dataclasses.replace(batch, told=~told & told)))
    assert math.isnan(metrics.clockwise_when_untold(measured, dataclasses.replace(batch, told=told | ~told)))


# --- Frechet distance -------------------------------------------------------------------------------------------------


def sample(*shape: int, key: int = 0) -> Tensor:
    return torch.randn(*shape, generator=rng(key), dtype=torch.float64)


def test_frechet_closed_forms():
    a, b = 2 * sample(100, 1) + 3, 0.5 * sample(80, 1, key=1)
    expected = (a.mean() - b.mean()) ** 2 + (a.std(correction=0) - b.std(correction=0)) ** 2
    assert frechet_distance(a, b) == pytest.approx(expected.item())
    # Diagonal: orthonormal, centred columns scaled by hand.
    q, _ = torch.linalg.qr(sample(50, 4) - sample(50, 4).mean(0))
    unit = q * 50**0.5  # covariance is the identity
    s, t = torch.tensor([1.0, 2, 3, 0]).double(), torch.tensor([4.0, 2, 1, 1]).double()
    assert frechet_distance(unit * s + 1, unit * t) == pytest.approx(4 + 9 + 0 + 4 + 1)
    # Two dimensions that don't commute: tr (AB)^1/2 = (tr AB + 2 (det AB)^1/2)^1/2.
    a, b = sample(30, 2) @ sample(2, 2, key=2), sample(30, 2, key=3) @ sample(2, 2, key=4)
    A, B = (x.T.cov(correction=0) for x in (a, b))
    cross = ((A @ B).trace() + 2 * (A @ B).det().sqrt()).sqrt()
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    assert frechet_distance(a, b) == pytest.approx(expected.item())
    assert frechet_distance(b, a) == pytest.approx(expected.item())


def test_frechet_of_identical_and_of_tiny_sets():
    a = sample(200, 16)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a[:3], a[:3]) == pytest.approx(0, abs=1e-6)  # singular covariance
    assert frechet_distance(a[:1], a[1:2]) == pytest.approx((a[0] - a[1]).square().sum().item())


def test_features_are_fixed_and_see_detail_and_motion(world):
    few = world.video[:40]
    features = metrics.video_features(few)
    assert features.shape == (40, metrics.FEATURES) and features.dtype == torch.float64
    assert torch.allclose(features[35:], metrics.video_features(few[35:]), rtol=1e-5)
    assert torch.equal(features, metrics.video_features(few))
    truth = metrics.video_features(world.video)
    blurred = F.avg_pool3d(world.video, (1, 3, 3), 1, (0, 1, 1))
    jumbled = world.video[:, :, [0, 3, 1, 5, 2, 7, 4, 8, 6]]
    other = metrics.video_features(ToyWorld("validation").batch(list(range(64))).video)
    chance = frechet_distance(other, truth)
    for worse in (blurred, jumbled):
        assert frechet_distance(metrics.video_features(worse), truth) > 2 * chance


def test_parts_weigh_as_the_whole(world, no_features):
    """Rows by number of objects are the same measures on a part: over objects they average to the whole."""
    still = world.video[:, :, :1].expand_as(world.video)
    total, objects = 0, 0
    for n in range(1, 4):
        keep = torch.nonzero(world.count == n)[:, 0].tolist()
        part = metrics.subset(world, keep)
        values = metrics.mask_iou(metrics.find_objects(still[keep], part), part.masks)
        cases = (~values.isnan()).sum().item()
        total, objects = total + cases * metrics.score(still[keep], part)["mask_iou"], objects + cases
    assert metrics.score(still, world)["mask_iou"] == pytest.approx(total / objects)
