"""Measures against answers computed by hand."""

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from core.frechet import frechet_distance
from core.noise import rng
from toy import metrics
from toy.codec import ToyCodec
from toy.world import World, WorldBatch

SIZE = 40


@pytest.fixture(scope="module")
def world() -> WorldBatch:
    return World("validation", (64, 64)).batch(range(40))


def scene(lefts: list[int], side: int = 12, top: int = 10, margin: int = 0, spin: float = 0.0) -> WorldBatch:
    """One video of a square on grey, whose left edge is at lefts[t]. Every other column of it is darker.

    With a margin it has no mask, and its box is so much wider on every side.
    """
    T = len(lefts)
    video, masks = torch.zeros(1, 3, T, SIZE, SIZE), torch.zeros(1, 2, T, SIZE, SIZE, dtype=torch.bool)
    boxes, no = torch.zeros(1, 2, T, 4), torch.zeros(1, 2, dtype=torch.bool)
    boxes[:, 0] = torch.tensor([0.0, 0, SIZE, SIZE])
    for t, left in enumerate(lefts):
        masks[0, 1, t, top : top + side, left : left + side] = True
        video[0, :, t, top : top + side, left : left + side] = 1 - 0.5 * (torch.arange(side) % 2)
        boxes[0, 1, t] = torch.tensor([left - margin, top - margin, left + side + margin, top + side + margin])
    thing = torch.tensor([[False, True]])
    return WorldBatch(
        video=video, plate=torch.zeros_like(video), masks=masks, boxes=boxes, used=thing,
        shown=thing[..., None].expand(1, 2, T), by_box=thing if margin else no,
        middle=(boxes[..., :2] + boxes[..., 2:]) / 2, spin=torch.tensor([[0, spin]]),
        captions=["a white rectangle"], says_spin=torch.tensor([True]),
    )  # fmt: skip


STEPS = [4, 6, 8, 10, 12, 14, 16, 18]


def test_true_videos_score_the_ceiling(world):
    scores = metrics.score(world.video, world)
    errors = [value for name, value in scores.items() if name.startswith("thing_error")]
    assert errors == [0, 0, 0, 0]
    assert scores["ground_psnr"] == scores["camera_psnr"] == scores["hole_psnr"] == pytest.approx(100)
    assert scores["seam"] == scores["sharpness"] == 1 and scores["fvd"] == pytest.approx(0, abs=1e-6)
    assert scores["prompt_accuracy"] >= 0.9
    rate, turning = metrics.spin_rate(world.video, world), world.spin != 0
    assert rate.isnan().equal(~turning) and turning.sum() >= 6
    assert ((rate - world.spin)[turning].abs() < 0.06).float().mean() > 0.7
    backwards = dataclasses.replace(world, **{n: getattr(world, n).flip(2) for n in ("masks", "boxes", "middle")})
    torch.testing.assert_close(metrics.spin_rate(world.video.flip(2), backwards)[turning], -rate[turning])
    untold = world.spin[turning & ~world.says_spin[:, None]]
    assert scores["clockwise_unprompted"] == pytest.approx((untold > 0).float().mean().item(), abs=0.1)


def test_errors_are_those_of_things_and_ground_apart_and_split_by_mask_box_and_turning():
    batch = scene(STEPS)
    lighter = torch.where(batch.masks[:, 1:], batch.video, batch.video + 0.02)
    scores = metrics.score(lighter, batch)
    assert scores["thing_error"] == 0
    assert scores["ground_psnr"] == scores["hole_psnr"] == pytest.approx(40, abs=0.01)
    assert math.isnan(scores["camera_psnr"])
    all_shown = torch.ones_like(batch.shown)
    panned = dataclasses.replace(batch, used=all_shown[..., 0], shown=all_shown)  # a camera that stays
    scores = metrics.score(lighter, panned)
    assert scores["camera_psnr"] == pytest.approx(40, abs=0.01) and math.isnan(scores["ground_psnr"])
    for changes, name in (({"margin": 2}, "by_box"), ({"spin": 0.1}, "turning"), ({}, "by_mask")):
        batch = scene(STEPS, **changes)
        worse = torch.where(batch.masks[:, 1:], batch.video - 0.2, batch.video)  # a tenth of the range
        errors = metrics.thing_errors(worse, batch)
        assert {key for key, value in errors.items() if value == value} == {"thing_error", f"thing_error_{name}"}
        assert all(value == pytest.approx(0.01, rel=1e-4) for value in errors.values() if value == value)


def test_neither_frame_0_nor_a_thing_that_appears_later_counts():
    batch = scene(STEPS)
    worse, late = batch.video.clone(), batch.shown.clone()
    worse[:, :, 0], late[..., 0] = -1, False
    assert metrics.thing_errors(worse, batch)["thing_error"] == 0 and metrics.sharpness(worse, batch) == 1
    assert math.isnan(metrics.thing_errors(batch.video, dataclasses.replace(batch, shown=late))["thing_error"])


def test_the_hole_is_what_the_thing_left():
    batch = scene([4, 20])
    shown, hole = metrics.ground(batch)
    expected = torch.zeros(SIZE, SIZE, dtype=torch.bool)
    expected[10 - 2 : 22 + 2, 4 - 2 : 16 + 2] = True  # and two pixels around, which neither counts
    expected &= ~torch.zeros_like(expected).index_fill(1, torch.arange(18, 34), True)  # near the thing itself
    assert torch.equal(hole[0, 0], expected)
    near = torch.zeros_like(expected)
    near[8:24, 18:34] = True
    assert torch.equal(shown[0, 0], ~near & ~hole[0, 0])


def test_ground_doesnt_count_in_boxes_whose_silhouettes_nobody_can_know():
    """A thing appears later, or turns and its caption doesn't say which way."""
    told = scene([4, 20], margin=5, spin=0.1)
    silent = dataclasses.replace(told, says_spin=torch.tensor([False]))
    later = dataclasses.replace(told, spin=told.spin * 0, shown=torch.tensor([[[False, False], [False, True]]]))
    for batch, reach in ((told, 2), (silent, 7), (later, 7)):  # two pixels around the thing, or its box
        near = torch.zeros(SIZE, SIZE, dtype=torch.bool)
        near[10 - reach : 22 + reach, 20 - reach : 32 + reach] = True
        shown, hole = metrics.ground(batch)
        assert torch.equal(shown[0, 0] | hole[0, 0], ~near)


def test_the_ground_that_a_camera_moved_counts_where_frame_0_shows_it(world):
    shown, holes = metrics.ground(world)
    assert not (shown & holes).any()
    bare = (world.video == world.plate).all(1)[:, 1:].float()  # neither thing nor shadow
    told = (world.shown[..., 0] & ((world.spin == 0) | world.says_spin[:, None]) | ~world.used).all(1)
    assert 10 < told.sum() < 40
    assert torch.equal((shown | holes)[told], -F.max_pool2d(-bare[told], 5, 1, 2) > 0)
    pans = [i for i in world.used[:, 0].nonzero()[:, 0].tolist() if not world.masks[i, 0, -1].all()]
    beyond = ~world.masks[pans, 0, 1:]
    assert pans and not (shown[pans] & beyond).any()


def test_a_rectangle_of_ground_that_comes_along_is_a_seam():
    """The thing's box is two pixels wider than the thing; on a ground of a slope, what comes along is a step."""
    batch = scene([4, 22], margin=2)
    slope = (0.4 * torch.arange(SIZE) / SIZE).expand_as(batch.video)
    batch = dataclasses.replace(batch, video=torch.where(batch.masks[:, 1:], batch.video, slope), plate=slope)
    assert metrics.seam(batch.video, batch) == 1
    edges = metrics.box_edges(batch)
    assert [int(pairs.sum()) for pairs in edges] == [2 * 16, 2 * 16]  # sides, pixels
    assert edges[0][0, 0, 8:24, 19].all() and edges[0][0, 0, 8:24, 35].all()  # the box's edge at x = 20: pixels 19, 20
    along = batch.video.clone()
    along[..., 1, 8:24, 20:36] = batch.video[..., 0, 8:24, 2:18]
    # A step of 18 pixels of slope, or a pixel more or less, at each side; above and below no step was.
    true, made = 2 * 16 * 0.01, 16 * (0.17 + 0.19) + 2 * 16 * 0.18
    assert metrics.seam(along, batch) == pytest.approx(made / true, rel=1e-4)
    assert not any(pairs.any() for pairs in metrics.box_edges(scene(STEPS)))  # things with masks have no seams
    near = metrics.box_edges(scene([4, 8], margin=2))[0][0, 0]  # where frame 0 doesn't show the ground nothing counts
    assert near[:, 21].sum() == 16 and not near[:, 5].any()


def test_blur_is_not_sharp_and_noise_is_too_sharp():
    batch = scene(STEPS)
    blurred = F.avg_pool3d(batch.video, (1, 3, 3), 1, (0, 1, 1))
    noisy = batch.video + 0.5 * torch.randn(batch.video.shape, generator=rng(0))
    assert metrics.sharpness(blurred, batch) < 0.3 and metrics.sharpness(noisy, batch) > 1.2
    # Columns of 1 and 0.5 in turn: each differs by 0.5 from two of four neighbours. Columns blurred to a third.
    energy = metrics.detail(batch.video, batch.masks[:, 1:])
    assert energy.item() == pytest.approx(7 * 8**2 * 3 * 0.25**2)  # of 8 x 8 inner pixels in 7 frames
    columns = F.avg_pool3d(batch.video, (1, 1, 3), 1, (0, 0, 1))
    assert metrics.sharpness(columns, batch) == pytest.approx(1 / 9, rel=1e-3)
    assert math.isnan(metrics.sharpness(batch.video, scene(STEPS, spin=0.1)))  # what turns can't be pasted
    flat = torch.where(batch.masks[:, 1:], 0.5, batch.video)
    assert metrics.sharpness(flat, batch) == pytest.approx(0, abs=1e-9)
    half, masks = batch.video.clone(), batch.masks.clone()
    for t, left in enumerate(STEPS):
        half[..., t, :, left : left + 6] = 0.5
    assert metrics.sharpness(half, batch) < 0.7
    masks[:, 1, 0, :, : STEPS[0] + 6] = False  # nobody saw that half
    assert metrics.sharpness(half, dataclasses.replace(batch, masks=masks)) == 1


def test_spin_of_a_disc_by_hand():
    """Eight frames of a disc of sectors that turns by 10 degrees a frame, or not at all."""
    y, x = (torch.arange(SIZE) + 0.5 - SIZE / 2 for _ in range(2))
    angle, inside = torch.atan2(y[:, None], x[None]), torch.hypot(y[:, None], x[None]) < 12
    batch = scene([8] * 8, side=24, top=8, spin=1.0)
    batch = dataclasses.replace(batch, masks=batch.masks & inside)
    for degrees in (10, -10, 0):
        turned = torch.stack([torch.sin(3 * (angle - math.radians(degrees * t))) for t in range(8)])
        video = (turned * inside).expand(1, 3, 8, SIZE, SIZE)
        assert metrics.spin_rate(video, batch)[0, 1].item() == pytest.approx(math.radians(degrees), abs=1e-6)


def test_prompt_accuracy_by_hand():
    spin = torch.tensor([[1.0, -1, 1], [-1, 1, 0], [1, 1, 0], [1, 0, 0]])
    says = torch.tensor([True, True, False, False])
    batch = dataclasses.replace(scene(STEPS), spin=spin, says_spin=says)
    nan = math.nan
    measured = torch.tensor([[0.2, -0.3, -0.1], [0.0, nan, nan], [0.3, -0.2, nan], [0.1, 0.0, nan]])
    # No motion is no obedience, and no direction.
    scores = {"prompt_accuracy": pytest.approx(2 / 4), "clockwise_unprompted": pytest.approx(2 / 3)}
    assert metrics.spin_scores(measured, batch) == scores
    for every, name in ((says & ~says, "prompt_accuracy"), (says | ~says, "clockwise_unprompted")):
        assert math.isnan(metrics.spin_scores(measured, dataclasses.replace(batch, says_spin=every))[name])


def test_what_is_pasted_follows_the_boxes_and_leaves_no_hole():
    batch = scene(STEPS)
    known = metrics.baselines(batch, ToyCodec())
    torch.testing.assert_close(known["pasted by mask"], batch.video, atol=1e-4, rtol=0)
    still = known["the first frame, still"]
    assert torch.equal(still[:, :, 3], batch.video[:, :, 0])
    still = metrics.score(still, batch)
    assert still["thing_error"] > 0.01 and still["ground_psnr"] == 100 and still["hole_psnr"] < 20


def test_pasting_by_box_takes_ground_along(world):
    world = world.subset(range(12))
    _, _, *known = metrics.baselines(world, ToyCodec()).values()
    still, by_mask, by_box = (metrics.score(video, world) for video in known)
    assert by_box["seam"] > 2 * by_mask["seam"] and by_mask["seam"] < 1.5
    assert still["ground_psnr"] == pytest.approx(100) and by_mask["ground_psnr"] > by_box["ground_psnr"]
    assert by_mask["camera_psnr"] > by_box["camera_psnr"] > still["camera_psnr"]
    assert by_mask["thing_error"] < by_box["thing_error"] < 0.3 * still["thing_error"]
    assert by_mask["fvd"] < 0.5 * still["fvd"]


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
    a = sample(200, 16)
    assert frechet_distance(a, a) == pytest.approx(0, abs=1e-6)
    assert frechet_distance(a[:3], a[:3]) == pytest.approx(0, abs=1e-6)  # singular covariance
    assert frechet_distance(a[:1], a[1:2]) == pytest.approx((a[0] - a[1]).square().sum().item())


def test_features_are_fixed_and_see_detail_and_motion(world):
    truth = metrics.video_features(world.video)
    assert truth.shape == (40, metrics.FEATURES) and truth.dtype == torch.float64
    assert torch.allclose(truth[35:], metrics.video_features(world.video[35:]), rtol=1e-5)
    assert torch.equal(truth, metrics.video_features(world.video))
    blurred = F.avg_pool3d(world.video, (1, 3, 3), 1, (0, 1, 1))
    jumbled = world.video[:, :, [0, 3, 1, 5, 2, 7, 4, 8, 6]]
    other = metrics.video_features(World("train", (64, 64)).batch(range(40)).video)
    chance = frechet_distance(other, truth)
    for worse in (blurred, jumbled):
        assert frechet_distance(metrics.video_features(worse), truth) > 1.5 * chance
