"""The toy codec gives back what it took, well enough to be measured, and tells words apart."""

import pytest
import safetensors.torch
import torch

from core.config import UserError
from toy.codec import CODECS, ToyCodec
from toy.metrics import score
from toy.world import ToyWorld


def test_videos_survive():
    codec, batch = ToyCodec(), ToyWorld("test").batch(list(range(24)))
    latents = codec.encode_video(batch.video)
    assert latents.shape == (24, 16, 9, 12, 12)
    assert latents.square().mean().item() == pytest.approx(1, abs=0.1)
    deviation = latents.std((0, 2, 3, 4))
    assert deviation[0] > 3 * deviation[-1] > 1  # coarse components first, and stronger
    scores = score(codec.decode_video(latents), batch)
    assert scores["mask_iou"] > 0.97 and scores["box_iou"] > 0.97 and scores["prompt_accuracy"] > 0.97
    assert 0.85 < scores["sharpness"] < 1.1  # trained to bear errors in latents, it softens those that have none


@pytest.mark.parametrize("preset", CODECS)
def test_the_decoder_guesses_what_its_linear_part_loses(preset):
    frames = CODECS[preset].world("test").batch(list(range(8))).video.transpose(1, 2).flatten(0, 1)
    network = CODECS[preset]().network
    latents = network.encode(frames)
    lost, left = ((decode(latents) - frames).square().mean() for decode in (network.linear, network.decode))
    assert left < 0.6 * lost


def test_maps_survive():
    """A pixel of a box's outline is lit in the decoded map, another is not."""
    codec, batch = ToyCodec(), ToyWorld("test").batch(list(range(8)))
    maps = torch.stack([batch.trajectory(i).maps("box") for i in range(8)])
    lit, back = (video.amax(1) > -0.7 for video in (maps, codec.decode_video(codec.encode_video(maps))))
    assert (lit & back).sum() / (lit | back).sum() > 0.9


def test_frames_are_coded_one_by_one():
    codec, video = ToyCodec(), ToyWorld().batch([0, 1]).video
    latents = codec.encode_video(video)
    assert torch.allclose(codec.encode_video(video[1:, :, 3:4]), latents[1:, :, 3:4], atol=1e-5)
    assert codec.decode_video(10 * latents).abs().max() <= 1


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
    with pytest.raises(UserError, match=r"wrong\.safetensors: holds a SlowAdapter, expected a ToyAutoencoder"):
        ToyCodec(wrong)
