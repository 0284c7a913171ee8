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


def statistics() -> tuple[torch.Tensor, torch.Tensor]:
    return tuple(torch.tensor(v)[:, None, None, None] for v in (vae.MEAN, vae.STD))


CASES = [(SMALL, 1, 32, 48), (SMALL, 5, 48, 32), (SMALL, 9, 32, 64), (SMALL, 17, 64, 32), (WIDE, 5, 16, 24)]


@pytest.mark.parametrize("config, frames, height, width", CASES)
def test_parity_with_diffusers(config, frames, height, width):
    ours, theirs = pair(config)
    mean, std = statistics()
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
    assert decoded.shape == video.shape and 0.1 < wanted.std() < 0.9
    torch.testing.assert_close(decoded, wanted, rtol=1e-4, atol=1e-4)


def test_a_video_streams_like_the_whole_at_once():
    torch.manual_seed(0)
    network = WanVAE(SMALL)
    video, latents = torch.rand(1, 3, 17, 32, 32) * 2 - 1, torch.randn(1, 48, 5, 2, 2)
    for chunk in (1, 2, 3):
        torch.testing.assert_close(network.encode(video, chunk), network.encode(video, 5), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(network.decode(latents, chunk), network.decode(latents, 5), rtol=1e-4, atol=1e-5)
    assert [part.shape[2] for part in network.frames(latents)] == [1, 4, 4, 4, 4]


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
    network, latents = WanVAE(SMALL), torch.randn(1, 48, 2, 4, 20)
    video = network.decode(latents, tile=12, overlap=4)
    alone = network.decode(latents[..., :12])
    assert torch.equal(video[..., : 16 * 8], alone[..., : 16 * 8])
    jumps = video.diff(dim=-1).abs().mean((0, 1, 2, 3))
    seams = torch.tensor([16 * 8, 16 * 12]) - 1  # where the second tile begins, where the first ends
    assert jumps[seams].max() < 1.5 * jumps[: 16 * 8 - 2].max()


@pytest.mark.parametrize("length,tile,overlap", [(20, 12, 4), (80, 32, 8), (33, 32, 16), (44, 11, 1)])
def test_counts_of_tiles_add_up_to_one(length, tile, overlap):
    total = torch.zeros(16 * length)
    for place, count in vae.tiles(length, tile, overlap, 16):
        assert place.stop - place.start == tile and count.min() >= 0
        total[16 * place.start : 16 * place.stop] += count
    torch.testing.assert_close(total, torch.ones_like(total))


def test_a_tile_as_large_as_the_video_is_no_tile():
    (place, count), *others = vae.tiles(20, 20, 4, 16)
    assert not others and place == slice(0, 20) and torch.equal(count, torch.ones(320))
    with pytest.raises(ValueError, match="half a tile"):
        vae.tiles(20, 8, 5, 16)
