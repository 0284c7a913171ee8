"""The toy codec gives back what it took, well enough to be measured, and tells words apart."""

import pytest
import safetensors.torch
import torch
from conftest import refused

from toy.codec import ToyCodec
from toy.metrics import score
from toy.world import World, WorldBatch


@pytest.fixture(scope="module")
def world() -> WorldBatch:
    return World("validation", (64, 64)).batch(range(24))


def test_videos_survive(world):
    codec = ToyCodec()
    latents = codec.encode_video(world.video)
    assert latents.shape == (24, 24, 9, 16, 16)
    first = latents[:, :, 0]
    assert first.square().mean().item() == pytest.approx(1, abs=0.2)
    deviation = first.std((0, 2, 3))
    assert deviation[0] > 3 * deviation[-1] > 1  # coarse components first, and stronger
    scores = score(codec.decode_video(latents), world)
    assert scores["thing_error"] < 0.002 and scores["ground_psnr"] > 34 and scores["prompt_accuracy"] > 0.8
    assert 0.85 < scores["sharpness"] < 1.25 and 0.9 < scores["seam"] < 1.1


def test_later_frames_are_differences_from_the_first(world):
    codec, video = ToyCodec(), world.video[:4]
    still = codec.encode_video(video[:, :, :1].expand_as(video))
    assert (still[:, :, 1:] == 0).all()  # exactly: stage 0 counts what changes more
    latents, change = codec.encode_video(video), codec.network.config.change
    for t in range(9):
        frame = codec.encode_video(video[:, :, t : t + 1])[:, :, 0]  # alone, it is a first frame
        assert torch.allclose(latents[:, :, 0] + (t > 0) * latents[:, :, t] / change, frame, atol=1e-4)
    back = codec.decode_video(latents)
    assert torch.allclose(back[:, :, 3:4], codec.decode_video(codec.encode_video(video[:, :, 3:4])), atol=1e-3)
    assert torch.allclose(codec.decode_video(still)[:, :, 5], back[:, :, 0], atol=1e-4)
    later = latents[:, :, 1:]
    moving = (later != 0).any(1, keepdim=True).expand_as(later)
    assert 0.5 < later[moving].std() < 2  # of variance 1 where things move
    assert codec.decode_video(10 * latents).abs().max() <= 1


def test_the_decoder_guesses_what_its_linear_part_loses(world):
    frames, network = world.video[:8].transpose(1, 2).flatten(0, 1), ToyCodec().network
    latents = network.encoder(frames)
    lost, left = ((decode(latents) - frames).square().mean() for decode in (network.linear, network.decode))
    assert left <= lost


@pytest.mark.parametrize("style", ["outline", "pixels"])
def test_maps_survive(world, style):
    """What a map says is lit in the decoded map, and what it doesn't say is not."""
    codec, maps = ToyCodec(), world.subset(range(8)).maps(style, "box")
    lit, back = (video.amax(1) > -0.7 for video in (maps, codec.decode_video(codec.encode_video(maps))))
    assert (lit & back).sum() / (lit | back).sum() > 0.85


def test_words():
    codec = ToyCodec()
    a, b, empty = codec.encode_text(["a red disc, a blue disc", "a red disc", ""])
    assert a[:6].norm(dim=1).min() > 0 and a[6:].abs().max() == 0 and empty.abs().max() == 0
    assert torch.equal(a[:3], b[:3])  # the same clause
    assert torch.equal(a[2, :32], a[5, :32]) and not torch.allclose(a[2, 32:], a[5, 32:])  # one word, two clauses


def test_weights_of_another_network_are_refused(tmp_path):
    wrong = tmp_path / "wrong.safetensors"
    tensors = safetensors.torch.load_file(ToyCodec.weights)
    safetensors.torch.save_file(tensors, wrong, {"network": "SlowAdapter", "config": "{}"})
    refused(r"wrong\.safetensors: holds a SlowAdapter, expected a ToyAutoencoder", ToyCodec, wrong)
