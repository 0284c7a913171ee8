"""VideoDiT against diffusers' WanTransformer3DModel, its sizes, and its files."""

import dataclasses

import pytest
import torch

from core.config import UserError
from core.weights import save_network
from model import PRESETS, DiTConfig, VideoDiT, precondition
from tools import bench

SMALL = DiTConfig(128, 256, 4, 3, text_dim=40, text_tokens=7)
ONE_WIDE_BLOCK = dataclasses.replace(PRESETS["wan5b"], layers=1)


def to_diffusers(name: str) -> str:
    """Our parameter names (the original ones) in diffusers' vocabulary."""
    if name.startswith("blocks."):
        for ours, theirs in (("self_attn", "attn1"), ("cross_attn", "attn2"), ("norm3", "norm2"), (".q.", ".to_q."),
                             (".k.", ".to_k."), (".v.", ".to_v."), (".o.", ".to_out.0."), ("ffn.0", "ffn.net.0.proj"),
                             ("ffn.2", "ffn.net.2"), ("modulation", "scale_shift_table")):  # fmt: skip
            name = name.replace(ours, theirs)
        return name
    for ours, theirs in (("text_embedding.0", "condition_embedder.text_embedder.linear_1"),
                         ("text_embedding.2", "condition_embedder.text_embedder.linear_2"),
                         ("time_embedding.0", "condition_embedder.time_embedder.linear_1"),
                         ("time_embedding.2", "condition_embedder.time_embedder.linear_2"),
                         ("time_projection.1", "condition_embedder.time_proj"), ("head.head", "proj_out"),
                         ("head.modulation", "scale_shift_table")):  # fmt: skip
        name = name.replace(ours, theirs)
    return name


def diffusers_model(config: DiTConfig):
    pytest.importorskip("diffusers", reason="parity needs requirements-dev.txt")
    return bench.diffusers_transformer(config)


CASES = {"small": (SMALL, (3, 8, 12)), "wan5b block": (ONE_WIDE_BLOCK, (2, 4, 6))}


@pytest.mark.parametrize("config, grid", CASES.values(), ids=CASES.keys())
def test_parity_with_diffusers(config, grid):
    torch.manual_seed(0)
    model = VideoDiT(config)
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.5 * config.dim**-0.5)  # nothing at zero: every parameter takes part
    reference = diffusers_model(config)
    reference.load_state_dict({to_diffusers(n): p for n, p in model.state_dict().items()})  # strict
    x, text = torch.randn(2, 48, *grid), torch.randn(2, config.text_tokens, config.text_dim)
    t = torch.tensor([700.0, 311.5])[:, None].repeat(1, grid[0])
    t[:, 0] = 0  # image-to-video: the first frame is clean
    per_token = t.repeat_interleave(grid[1] * grid[2] // 4, 1)
    weight = torch.randn(x.shape)  # a random direction for the gradient

    results = []
    for call in (lambda y: model(y, t, text), lambda y: reference(y, per_token, text, return_dict=False)[0]):
        y = x.clone().requires_grad_()
        out = call(y)
        (grad,) = torch.autograd.grad((out * weight).sum(), y)
        results.append((out.detach(), grad))
    with torch.no_grad():
        fused = model(x, t, text)  # without gradient attention takes another path
    (ours, our_grad), (theirs, their_grad) = results
    for a, b in ((ours, theirs), (fused, theirs), (our_grad, their_grad)):
        assert ((a - b).norm() / b.norm()).item() < 1e-5


def test_parameter_count_of_wan5b():
    with torch.device("meta"):
        ours = sum(p.numel() for p in VideoDiT(PRESETS["wan5b"]).parameters())
        theirs = sum(p.numel() for p in diffusers_model(PRESETS["wan5b"]).parameters())
    assert ours == theirs == 4_999_787_712


def small(batch: int) -> tuple[VideoDiT, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A network that predicts something, and its x, t and text."""
    torch.manual_seed(0)
    model = VideoDiT(SMALL)
    torch.nn.init.normal_(model.head.head.weight)
    return model, torch.randn(batch, 48, 2, 4, 4), torch.full((batch, 2), 500.0), torch.randn(batch, 7, 40)


def test_every_video_reads_its_own_text():
    model, x, t, text = small(2)
    with torch.no_grad():
        tokens, _, _, seen, _ = model.embed(x, t, text)
        assert seen.shape == (2, 7, 128) and tokens.shape == (2, 8, 128)
        torch.testing.assert_close(model(x[1:], t[1:], text[1:]), model(x, t, text)[1:], rtol=1e-4, atol=1e-5)
        assert not torch.allclose(model(x, t, text + 1), model(x, t, text))


def test_features_and_residuals():
    model, x, t, text = small(1)
    with torch.no_grad():
        plain, features = model(x, t, text, feature_blocks=(0, 2))
        assert [f.shape for f in features] == [(1, 8, 128)] * 2
        residuals = [torch.zeros(1, 8, 128) for _ in range(3)]
        assert torch.equal(model(x, t, text, residuals), plain)
        residuals[1] += 1
        moved, after = model(x, t, text, residuals, feature_blocks=(0, 1))
    assert torch.equal(after[0], features[0])  # block 0 is before the residual
    assert not torch.allclose(moved, plain)


def test_export_round_trip_and_refusals(tmp_path):
    torch.manual_seed(0)
    model, path = VideoDiT(SMALL), tmp_path / "g.safetensors"
    save_network(path, "SlowGenerator", SMALL, model.state_dict(), torch.float32)
    again = VideoDiT.from_pretrained(path, "SlowGenerator")
    assert again.config == SMALL
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))

    def refused(message, network="SlowGenerator"):
        with pytest.raises(UserError, match=message) as caught:
            VideoDiT.from_pretrained(path, network)
        assert str(path) in str(caught.value) and "\n" not in str(caught.value)

    refused("holds a SlowGenerator, expected a FastGenerator", "FastGenerator")
    tensors = model.state_dict()
    del tensors["head.head.bias"]
    tensors["head.extra"] = torch.zeros(1)
    tensors["patch_embedding.bias"] = torch.zeros(5)
    save_network(path, "SlowGenerator", SMALL, tensors)
    refused(r"missing: head.head.bias; unexpected: head.extra; wrong shape: patch_embedding.bias is \[5\]")
    path.write_bytes(path.read_bytes()[:1000])
    refused("not a readable safetensors file")
    path.write_text("hello")
    refused("not a readable safetensors file")
    path.unlink()
    refused("no such file")


# --- preconditioning --------------------------------------------------------------------------------------------------


def level(sigma: float) -> torch.Tensor:
    return torch.full((1, 2), 1000 * sigma)


def test_preconditioning_by_hand():
    """v from a head's output: x_t - x0 at pure noise; of clean data the noise; in between the velocity."""
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 1, 3, 2, 4, 4)
    velocity = noise - x0
    assert torch.allclose(precondition(x0, noise, level(1)), velocity, atol=1e-6)  # the head gives x0
    assert torch.allclose(precondition(-noise, x0, level(0)), velocity, atol=1e-6)  # the noise, but for its sign
    x_t = (x0 + noise) / 2
    assert torch.allclose(precondition(-velocity / 2**0.5, x_t, level(0.5)), velocity, atol=1e-6)
    for sigma in (0.2, 0.7):
        square = (1 - sigma) ** 2 + sigma**2
        out = torch.randn_like(x0)
        wanted = (2 * sigma - 1) / square * x_t - out / square**0.5
        torch.testing.assert_close(precondition(out, x_t, level(sigma)), wanted)


@pytest.mark.parametrize("sigma", [0.0, 0.1, 0.5, 0.8, 1.0])
def test_what_the_head_has_to_give_has_unit_variance_and_nothing_of_its_input(sigma):
    generator = torch.Generator().manual_seed(0)
    x0, noise = torch.randn(2, 1, 8, 2, 64, 64, generator=generator)
    x_t, s = (1 - sigma) * x0 + sigma * noise, ((1 - sigma) ** 2 + sigma**2) ** 0.5
    target = s * (precondition(torch.zeros_like(x0), x_t, level(sigma)) - (noise - x0))  # solved for the output
    assert torch.allclose(precondition(target, x_t, level(sigma)), noise - x0, atol=1e-5)
    assert target.var().item() == pytest.approx(1, abs=0.03)
    assert (target * x_t).mean().abs() < 0.02


def test_levels_count_frame_by_frame():
    x, out = torch.randn(2, 1, 3, 2, 4, 4)
    both = precondition(out, x, torch.tensor([[0.0, 1000.0]]))
    assert torch.equal(both[:, :, 0], -x[:, :, 0] - out[:, :, 0])
    assert torch.equal(both[:, :, 1], x[:, :, 1] - out[:, :, 1])


def test_a_fresh_preconditioned_network_takes_all_of_noise_for_noise():
    """Its head is zero: x0 is predicted as 0 at pure noise, and its output is float32 whatever its weights are."""
    shape = dataclasses.replace(SMALL, layers=1, preconditioned=True, channels=4)
    model, x = VideoDiT(shape), torch.randn(1, 4, 2, 4, 4)
    text = torch.randn(1, 7, 40)
    assert torch.equal(model(x, level(1), text), x)
    plain = VideoDiT(dataclasses.replace(shape, preconditioned=False))
    torch.nn.init.normal_(model.head.head.weight)
    plain.load_state_dict(model.state_dict())
    wanted = precondition(plain(x, level(0.3), text), x, level(0.3))
    assert torch.equal(model(x, level(0.3), text), wanted)
    velocity, (features,) = model(x, level(0.3), text, feature_blocks=(0,))
    assert torch.equal(velocity, wanted) and features.shape == (1, 8, 128)
