"""The VAE against diffusers' AutoencoderKLWan in its Wan2.2 configuration; streaming, tiling."""

import pytest
import torch

from core.weights import rename
from tools import bench
from wan import vae
from wan.published import vae_names
from wan.vae import VAEConfig, WanVAE

SMALL = VAEConfig(width=8, decoder_width=12)
WIDE = VAEConfig(multipliers=(1, 2, 2), blocks=1, temporal=(True, True))  # true widths, at three levels of four


def pair(config: VAEConfig) -> tuple[WanVAE, torch.nn.Module]:
    """Our network and diffusers', with the same random weights of a size that keeps activations of order 1."""
    pytest.importorskip("diffusers")
    theirs = bench.diffusers_vae(config).eval()
    draw = torch.Generator().manual_seed(0)
    for name, p in theirs.named_parameters():
        std = 0.3 if p.ndim == 1 or "gamma" in name else p[0].numel() ** -0.5
        p.data = torch.randn(p.shape, generator=draw) * std + ("gamma" in name)
    ours = WanVAE(config)
    ours.load_state_dict(rename(theirs.state_dict(), vae_names(config.blocks)))
    return ours, theirs


CASES = [(SMALL, 1, 32, 48), (SMALL, 5, 48, 32), (SMALL, 9, 32, 64), (SMALL, 17, 64, 32), (WIDE, 5, 16, 24)]


@pytest.mark.parametrize("config, frames, height, width", CASES)
def test_parity_with_diffusers(config, frames, height, width):
    ours, theirs = pair(config)
    mean, std = (torch.tensor(v)[:, None, None, None] for v in (vae.MEAN, vae.STD))
    video = torch.rand(2, 3, frames, height, width, generator=torch.Generator().manual_seed(1)) * 2 - 1
    with torch.no_grad():
        wanted = (theirs.encode(video).latent_dist.mode() - mean) / std
    latents = ours.encode(video)
    length = (frames - 1) // ours.temporal + 1
    assert latents.shape == (2, 48, length, height // ours.spatial, width // ours.spatial)
    torch.testing.assert_close(latents, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))

    z = torch.randn(latents.shape, generator=torch.Generator().manual_seed(2))
    with torch.no_grad():
        wanted = theirs.decode(z * std + mean).sample
    decoded = ours.decode(z)
    assert [part.shape[2] for part in ours.frames(z)] == [1] + [ours.temporal] * (length - 1)
    assert decoded.shape == video.shape and 0.1 < wanted.std() < 0.9
    torch.testing.assert_close(decoded, wanted, rtol=1e-4, atol=1e-4)


def test_bfloat16_changes_latents_little():
    """As a GPU encodes. At the true widths, with random weights, it is 1.4% of what varies."""
    network, _ = pair(SMALL)
    video = torch.rand(1, 3, 9, 32, 48, generator=torch.Generator().manual_seed(1)) * 2 - 1
    exact = network.encode(video)
    for part in (network.conv1, network.encoder):
        part.to(torch.bfloat16)
    error = (network.encode(video) - exact).norm() / (exact - exact.mean((2, 3, 4), keepdim=True)).norm()
    assert 1e-4 < error < 0.03, error


def test_the_past_does_not_see_the_future():
    torch.manual_seed(0)
    network, latents = WanVAE(SMALL), torch.randn(1, 48, 3, 2, 2)
    changed = latents.clone()
    changed[:, :, 2] += 1
    a, b = network.decode(latents), network.decode(changed)
    assert torch.equal(a[:, :, :5], b[:, :, :5]) and not torch.equal(a[:, :, 5:], b[:, :, 5:])


def test_tiles_fade_into_one_another():
    """Where a tile lies alone: its own decoding, to the bit. At seams: no jump beyond those between other pixels."""
    torch.manual_seed(0)
    network, latents = WanVAE(SMALL), torch.randn(1, 48, 2, 4, 28)
    video = network.decode(latents, tile=16)  # the second tile begins at 12
    alone = network.decode(latents[..., :16])
    assert torch.equal(video[..., : 16 * 12], alone[..., : 16 * 12])
    jumps = video.diff(dim=-1).abs().mean((0, 1, 2, 3))
    seams = torch.tensor([16 * 12, 16 * 16]) - 1  # where the second tile begins, where the first ends
    assert jumps[seams].max() < 1.5 * jumps[: 16 * 12 - 2].max()


@pytest.mark.parametrize("length, tile, number", [(20, 12, 2), (80, 32, 3), (33, 32, 2), (44, 11, 5), (20, 20, 1),
                                                  (20, 32, 1), (20, 0, 1), (1, 0, 1), (9, 1, 9)])  # fmt: skip
def test_weights_of_tiles_add_up_to_one(length, tile, number):
    total, found = torch.zeros(16 * length), vae.tiles(length, tile, 16)
    assert len(found) == number
    for place, weights in found:
        assert place.stop - place.start == min(tile or length, length) and weights.min() >= 0
        total[16 * place.start : 16 * place.stop] += weights
    assert torch.allclose(total, torch.ones_like(total)) and (number > 1 or torch.equal(weights, total))
