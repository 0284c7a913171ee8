"""The world of pictures and its measures: what is known of a video is true, and every measure says what it should."""

import dataclasses

import pytest
import torch
import torch.nn.functional as F

import adapter as adapters
import distill_fast
import flow
from core.config import UserError
from core.noise import rng
from model import PRESETS, VideoDiT
from toy import metrics, train_slow_generator
from toy import picture_metrics as measures
from toy.codec import PictureCodec
from toy.latents import ToyLatents
from toy.pictures import CANVAS, FIRST, PictureBatch, PictureWorld, crop, picture_bank
from toy.train_slow_generator import SHAPES, shape_number
from toy.world import ToyWorld

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def world() -> PictureBatch:
    return PictureWorld("validation").batch(list(range(64)))


def scene(x: list[int], side: int = 10, size: int = 32) -> PictureBatch:
    """One video of a white square on grey, whose left edge is at x[t]; every other column of it is darker."""
    masks = torch.zeros(1, 1, len(x), size, size, dtype=torch.bool)
    video, boxes = torch.zeros(1, 3, len(x), size, size), torch.zeros(1, 1, len(x), 4, dtype=torch.long)
    for t, left in enumerate(x):
        masks[0, 0, t, 8 : 8 + side, left : left + side] = True
        video[0, :, t, 8 : 8 + side, left : left + side] = 1 - 0.5 * (torch.arange(side) % 2)
        boxes[0, 0, t] = torch.tensor([left, 8, left + side, 8 + side])
    middle = (boxes[..., :2] + boxes[..., 2:]) / 2
    one = torch.ones(1, dtype=torch.long)
    plate = torch.zeros(1, 3, size, size)
    return PictureBatch(video, plate, masks, boxes, middle, one, torch.zeros(1, 1), ["a white rectangle"], one < 0)


# --- the world --------------------------------------------------------------------------------------------------------


def test_a_video_is_the_same_in_any_batch_and_another_in_every_split(world):
    again = PictureWorld("validation").batch([7, 3])
    assert torch.equal(again.video, world.video[[7, 3]]) and again.captions == [world.captions[i] for i in (7, 3)]
    assert len({*FIRST.values()}) == 4 and not torch.equal(PictureWorld("test").batch([7]).video, again.video[:1])
    shared = (picture_bank("validation", CPU)[:, None] == picture_bank("test", CPU)).flatten(2).all(2)
    assert not shared.any()


def test_away_from_things_a_video_shows_its_background(world):
    assert world.video.abs().max() <= 1
    near = F.max_pool3d(world.masks.any(1, keepdim=True).float(), (1, 5, 5), stride=1, padding=(0, 2, 2)) > 0
    away = ~near.expand_as(world.video)
    assert torch.equal(world.video[away], world.plate[:, :, None].expand_as(world.video)[away])
    assert world.masks.sum(1).max() == 1  # a pixel shows one thing


def test_boxes_are_those_of_the_silhouettes(world):
    alone = torch.nonzero(world.count == 1)[:, 0]
    boxes, seen = world.boxes[alone, 0], metrics.bounding_boxes(world.masks[alone, 0])
    height, width = world.video.shape[-2:]
    clipped = boxes.clamp(min=0).minimum(torch.tensor([width, height, width, height]))
    whole, off = (clipped == boxes).all(-1), (clipped - seen).abs()
    assert off[whole].max() <= 2 and off[whole].float().mean() < 0.6
    assert whole.float().mean() > 0.5
    assert (seen[..., :2] >= clipped[..., :2] - 2).all() and (seen[..., 2:] <= clipped[..., 2:] + 2).all()
    assert (boxes[..., 2:] > boxes[..., :2]).all()


def test_things_are_many_sided(world):
    assert world.count.bincount().tolist()[1:] == pytest.approx([21, 21, 21], abs=14)
    used = torch.arange(3) < world.count[:, None]
    assert 0.2 < (world.spin[used] != 0).float().mean() < 0.5  # rectangles stay upright, and half of the others
    words = " ".join(world.captions)
    assert all(kind in words for kind in ("blob", "polygon", "rectangle", "spinning clockwise", "counterclockwise"))
    height, width = world.video.shape[-2:]
    outside = (world.boxes[..., :2] < 0).any(-1) | (world.boxes[..., 2:] > torch.tensor([width, height])).any(-1)
    assert 0.05 < outside[used].float().mean() < 0.25  # some cross the edge
    entering, leaving = outside[..., 0] & ~outside[..., -1], outside[..., -1] & ~outside[..., 0]
    assert entering[used].any() and leaving[used].float().mean() > 0.1
    told = torch.tensor(["spinning" in caption for caption in world.captions])
    assert not told[~world.told].any() and told[world.told & ((world.spin != 0) & used).any(1)].all()


def test_maps_of_all_videos_at_once_are_those_that_a_trajectory_paints(world):
    dark = torch.rand(64, 9, generator=rng(1)) < 0.3
    for batch in (world, ToyWorld().batch(list(range(16)))):
        for kind, places in ((kind, places) for kind in ("box", "mask") for places in (False, True)):
            maps = batch.maps(kind, dark[: len(batch.video)], places)
            for i in range(len(maps)):
                lit = torch.nonzero(~dark[i])[:, 0].tolist()
                assert torch.equal(maps[i], batch.trajectory(i).sparse(lit).maps(kind, places))


def test_other_sizes_show_the_same_kind_of_video():
    batch = PictureWorld("test", size=(40, 72), frames=4).batch([0, 1])
    assert batch.video.shape == (2, 3, 4, 40, 72) and batch.masks.any((-1, -2))[:, 0].all()
    assert batch.trajectory(0).maps("box").shape == (3, 4, 40, 72)


def test_a_crop_of_the_whole_is_the_picture():
    picture = torch.randint(256, (1, 3, CANVAS, CANVAS), generator=rng(0), dtype=torch.uint8)
    one, place = torch.ones(1), torch.zeros(1, 2)
    whole = crop(picture, one, place, one < 0, (CANVAS, CANVAS))
    torch.testing.assert_close(whole, picture / 255, atol=1e-4, rtol=0)
    torch.testing.assert_close(crop(picture, one, place, one > 0, (CANVAS, CANVAS)), whole.flip(-1), atol=1e-4, rtol=0)


def test_photographs_move_too():
    batch = PictureWorld("photographs").batch([0, 1])
    assert batch.video.std() > 0.2 and len(picture_bank("photographs", CPU)) == 6


def test_training_sees_small_videos_first_and_then_all_shapes_in_turn():
    numbers = [shape_number(step, 10, 0.4, 4) for step in range(10)]
    assert numbers == [0, 0, 0, 0, 2, 3, 1, 2, 3, 1]
    assert [shape_number(step, 3, 0.0, 1) for step in range(3)] == [0, 0, 0]
    for _, shape in SHAPES["pictures"]:
        x0, _, traj = ToyLatents(PictureCodec(), "validation", **shape).batch([0], "box")
        assert x0.shape == traj.shape and x0.shape[2] == shape.get("frames", 9)


@pytest.mark.parametrize("wrong", [{"small": 1.5}, {"small": -0.1}, {"change": 0.0}])
def test_a_share_is_a_share(wrong):
    with pytest.raises(UserError, match=f"--{next(iter(wrong))} {next(iter(wrong.values()))}"):
        train_slow_generator.main(train_slow_generator.Config(preset="pictures", **wrong))


@pytest.mark.parametrize("most", [0.0, 1.5])
def test_scores_judge_between_no_noise_and_all(most):
    with pytest.raises(UserError, match="--judge_sigma_max"):
        distill_fast.main(distill_fast.Config(judge_sigma_max=most))


# --- its codec and networks -------------------------------------------------------------------------------------------


def test_the_codec_keeps_what_videos_show(world):
    codec, video = PictureCodec(), world.video[:16]
    back = codec.decode_video(codec.encode_video(video))
    assert -10 * ((back - video) / 2).square().mean().log10() > 38  # dB
    still = codec.encode_video(video[:, :, :1].expand_as(video))
    assert torch.equal(still[:, :, 1:], still[:, :, :-1])  # stage 0 counts what changes more


def test_holes_filled_changes_what_frame_0_hides_and_no_more(world):
    video = measures.holes_filled(world)
    assert torch.equal(video[:, :, 0], world.video[:, :, 0])
    shown, hidden = (world.video == world.plate[:, :, None]).all(1), (world.video[:, :, 0] != world.plate).any(1)
    lost = shown[:, 1:] & hidden[:, None]  # (B, T-1, H, W), where a thing went away
    same = (video == world.video).all(1)[:, 1:]
    assert same[~lost].all() and same[lost].float().mean() < 0.01
    hole = video[:, :, 1:].transpose(0, 1)[:, lost]
    assert (hole - world.video[:, :, 1:].transpose(0, 1)[:, lost]).abs().mean() < 0.2


def generator_that_sees_frame_0() -> VideoDiT:
    torch.manual_seed(0)
    generator = VideoDiT(dataclasses.replace(PRESETS["pictures"], dim=32, ffn_dim=32, heads=2, layers=2))
    torch.nn.init.normal_(generator.head.head.weight, std=0.02)
    return generator


def test_every_frame_has_frame_0_beside_it():
    generator, (x, text) = generator_that_sees_frame_0(), (torch.randn(1, 24, 3, 4, 4), torch.randn(1, 32, 64))
    tokens = generator.embed(x, torch.zeros(1, 3), text)[0].unflatten(1, (3, -1))
    other = x.clone()
    other[:, :, 0] += 1
    changed = generator.embed(other, torch.zeros(1, 3), text)[0].unflatten(1, (3, -1)) - tokens
    assert (changed[:, 1] != 0).any()
    torch.testing.assert_close(changed[:, 1], changed[:, 2])


def test_a_fresh_controlnet_embeds_what_its_generator_does():
    generator = generator_that_sees_frame_0()
    adapter = adapters.ControlNetAdapter(generator.config)
    adapter.copy_generator(generator)
    x, traj = torch.randn(2, 1, 24, 3, 4, 4)
    t, text = torch.tensor([[0.0, 400, 400]]), torch.randn(1, 32, 64)
    own, other = generator.embed(x, t, text)[0], adapter.embed(torch.cat([x, traj], 1), t, text)[0]
    torch.testing.assert_close(own, other)


def test_a_weight_says_how_much_a_place_counts():
    x0, noise = torch.zeros(2, 1, 2, 1, 2), torch.tensor([1.0, 3.0]).expand(2, 1, 2, 1, 2)
    weight = torch.tensor([[1.0, 3.0], [2.0, 2.0]])[:, None, None, None].expand(2, 1, 2, 1, 2)
    loss = flow.flow_matching_loss(lambda x, t: torch.zeros_like(x), x0, noise, torch.ones(2), weight=weight)
    assert loss == pytest.approx(((1 * 1 + 3 * 9) / 4 + (1 + 9) / 2) / 2)


# --- its measures -----------------------------------------------------------------------------------------------------


def test_a_true_video_has_the_best_of_every_measure(world):
    values = measures.score(world.video, world)
    assert values["mask_iou"] > 0.85 and values["box_iou"] > 0.9
    assert (values["thing_error"], values["ground_psnr"], values["sharpness"]) == (0, pytest.approx(100), 1)
    assert values["fvd"] == pytest.approx(0, abs=1e-6) and values["prompt_accuracy"] > 0.85


def test_a_square_is_found_where_it_is():
    batch = scene([2, 4, 6, 8])
    found = measures.find_things(batch.video, batch)
    assert float(metrics.box_iou(found, batch.masks)) > 0.8
    late = scene([2, 2, 2, 2])  # it stayed
    assert float(metrics.mask_iou(measures.find_things(late.video, batch), batch.masks)) == pytest.approx(
        sum((10 - d) / (10 + d) for d in (2, 4, 6)) / 3, abs=0.1
    )
    assert not measures.find_things(batch.plate[:, :, None].expand_as(batch.video), batch).any()


def test_errors_are_those_of_things_and_background_apart():
    batch = scene([2, 4, 6, 8])
    worse = batch.video.clone()
    worse[batch.masks.expand_as(worse)] -= 0.2  # a tenth of the range
    assert measures.thing_error(worse, batch) == pytest.approx(0.01, rel=1e-4)
    assert measures.ground_psnr(worse, batch) == pytest.approx(100)
    worse = torch.where(batch.masks.expand_as(worse), batch.video, batch.video + 0.02)
    assert measures.thing_error(worse, batch) == 0 and measures.ground_psnr(worse, batch) == pytest.approx(40, abs=0.01)


def test_blur_is_not_sharp_and_noise_is_too_sharp():
    batch = scene([2, 4, 6, 8])
    blurred = F.avg_pool3d(batch.video, (1, 3, 3), 1, (0, 1, 1))
    noisy = batch.video + 0.5 * torch.randn(batch.video.shape, generator=rng(0))
    assert measures.sharpness(blurred, batch) < 0.3 and measures.sharpness(noisy, batch) > 1.2


def test_spin_is_measured_by_its_texture():
    batch = PictureWorld("test").batch(list(range(40)))
    alone = metrics.subset(batch, [i for i in range(40) if batch.count[i] == 1 and batch.spin[i, 0] != 0])
    rate, true = measures.spin_rate(alone.video, alone)[:, 0], alone.spin[:, 0]
    assert len(true) >= 3 and ((rate - true).abs() < 0.06).float().mean() > 0.6
    backwards = dataclasses.replace(alone, **{n: getattr(alone, n).flip(2) for n in ("masks", "boxes", "middle")})
    back = measures.spin_rate(alone.video.flip(2), backwards)[:, 0]
    torch.testing.assert_close(back, -rate)
    assert measures.spin_rate(batch.video, batch).isnan().equal(batch.spin == 0)


def test_what_is_pasted_follows_the_boxes_and_leaves_no_hole():
    batch = scene([2, 4, 6, 8])
    torch.testing.assert_close(measures.pasted(batch), batch.video, atol=1e-4, rtol=0)
    assert torch.equal(measures.still(batch)[:, :, 3], batch.video[:, :, 0])


def test_a_hole_shows_what_is_around():
    picture, hole = torch.full((1, 3, 20, 20), 0.25), torch.zeros(1, 1, 20, 20, dtype=torch.bool)
    hole[..., 5:15, 5:15] = True
    torch.testing.assert_close(measures.fill(torch.where(hole, 0.9, picture), hole), picture)
    noise = torch.rand(1, 3, 20, 20, generator=rng(0))
    keep = ~hole.expand_as(noise)
    assert torch.equal(measures.fill(noise, hole)[keep], noise[keep])
