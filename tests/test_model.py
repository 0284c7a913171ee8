"""VideoDiT against diffusers' WanTransformer3DModel, its sizes, its precision, and its files."""

import dataclasses
import re
from copy import deepcopy

import pytest
import torch
from conftest import refused

import flow
from core.weights import rename, save_network
from model import PRESETS, DiTConfig, VideoDiT
from tools import bench
from wan.published import DIFFUSERS_NAMES

SMALL = DiTConfig(128, 256, 4, 3, text_dim=40, text_tokens=7)
ONE_WIDE_BLOCK = dataclasses.replace(PRESETS["wan5b"], layers=1)


def diffusers_model(config: DiTConfig):
    """With random weights, none of them zero, so that every parameter takes part."""
    pytest.importorskip("diffusers", reason="parity needs requirements-dev.txt")
    network = bench.diffusers_transformer(config)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.5 * config.dim**-0.5)
    return network


@pytest.mark.parametrize("config, grid", [(SMALL, (3, 8, 12)), (ONE_WIDE_BLOCK, (2, 4, 6))], ids=["small", "wide"])
def test_parity_with_diffusers(config, grid, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(torch.nn.Linear, "reset_parameters", lambda self: None)  # its weights are set here
    with torch.device("meta"):
        model = VideoDiT(config)
    reference = diffusers_model(config)
    model.load_state_dict(rename(reference.state_dict(), DIFFUSERS_NAMES), assign=True)  # strict
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


@torch.no_grad()
def test_texts_features_and_residuals():
    """Every video reads its own text."""
    model, x, t, text = small(2)
    plain, features = model(x, t, text, feature_blocks=(0, 2))
    torch.testing.assert_close(model(x[1:], t[1:], text[1:]), plain[1:], rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x, t, text + 1), plain)
    assert [f.shape for f in features] == [(2, 8, 128)] * 2
    residuals = [torch.zeros(2, 8, 128) for _ in range(3)]
    assert torch.equal(model(x, t, text, residuals), plain)
    residuals[1] += 1
    moved, after = model(x, t, text, residuals, feature_blocks=(0, 1))
    assert torch.equal(after[0], features[0])  # block 0 is before the residual
    assert not torch.allclose(moved, plain)


def test_bfloat16_keeps_tokens_velocity_and_guidance_in_float32():
    """Error against float32, as a share of the velocity. With tokens in bfloat16: 0.013, 0.080 and 0.115."""
    torch.manual_seed(0)
    exact = VideoDiT(DiTConfig(384, 1536, 6, 30, text_dim=64, text_tokens=32))
    torch.nn.init.xavier_uniform_(exact.head.head.weight)
    short = deepcopy(exact)
    for name, p in short.named_parameters():
        p.data = p.data if re.search(VideoDiT.float32, name) else p.data.bfloat16()
    exact.load_state_dict(short.state_dict())  # so that only what is computed differs
    x, t = torch.randn(1, 48, 3, 16, 16), torch.tensor([[0.0, 500.0, 500.0]])
    prompt, negative = torch.randn(2, 1, 32, 64)
    with torch.no_grad():
        made = [[network(x, t, text) for text in (prompt, negative)] for network in (exact, short)]
    for scale, most in ((1, 0.006), (5, 0.03), (7, 0.04)):
        a, b = (flow.guided(lambda *_, v=v: v, lambda *_, w=w: w, scale)(x, t) for v, w in made)
        assert a.dtype == b.dtype == torch.float32
        assert 0 < (a - b)[:, :, 1:].norm() / made[0][0][:, :, 1:].norm() < most


def test_tokens_are_float32_in_training_only_if_the_config_says_so():
    model, x, t, text = small(1)
    model.bfloat16()
    for wide, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        model.config = dataclasses.replace(SMALL, float32_stream=wide)
        velocity, features = model(x, t, text, feature_blocks=(0, 2))
        assert {f.dtype for f in features} == {dtype} and velocity.dtype == torch.float32
        velocity.sum().backward()
        with torch.no_grad():
            assert model(x, t, text, feature_blocks=(0,))[1][0].dtype == torch.float32
    assert PRESETS["wan5b"].float32_stream and not PRESETS["small"].float32_stream


def test_export_reads_back_and_what_does_not_fit_is_named(tmp_path):
    """Files that can't be read, or hold another network, are in test_malformed.py."""
    torch.manual_seed(0)
    model, path = VideoDiT(SMALL), tmp_path / "g.safetensors"
    save_network(path, "SlowGenerator", SMALL, model.state_dict(), torch.float32)
    again = VideoDiT.from_pretrained(path, "SlowGenerator")
    assert again.config == SMALL
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))
    tensors = model.state_dict()
    del tensors["head.head.bias"]
    tensors |= {"head.extra": torch.zeros(1), "patch_embedding.bias": torch.zeros(5)}
    save_network(path, "SlowGenerator", SMALL, tensors)
    wrong = r"missing: head.head.bias; unexpected: head.extra; wrong shape: patch_embedding.bias is \[5\]"
    refused(f"{path}.*{wrong}", VideoDiT.from_pretrained, path, "SlowGenerator")


def test_a_head_that_gives_x0_is_turned_into_the_velocity():
    """Frame by frame, `x_t - sigma * v` is what the head gives, in float32; below sigma 0.05 nothing is magnified."""
    torch.manual_seed(0)
    shape = dataclasses.replace(SMALL, layers=1, predicts="x0", channels=4)
    model, x, text = VideoDiT(shape), torch.randn(1, 4, 3, 4, 4), torch.randn(1, 7, 40)
    # A fresh head is zero: all of pure noise is noise.
    assert torch.equal(model(x, torch.full((1, 3), 1000.0), text), x)
    torch.nn.init.normal_(model.head.head.weight)
    plain = VideoDiT(dataclasses.replace(shape, predicts="velocity"))
    plain.load_state_dict(model.state_dict())
    sigma = torch.tensor([[0.0, 0.3, 1.0]])
    velocity, (features,) = model(x, 1000 * sigma, text, feature_blocks=(0,))
    x0 = plain(x, 1000 * sigma, text)
    torch.testing.assert_close(velocity, (x - x0) / torch.tensor([0.05, 0.3, 1.0])[:, None, None])
    back = flow.velocity_to_x0(x, velocity, sigma)
    torch.testing.assert_close(back[:, :, 1:], x0[:, :, 1:], atol=1e-5, rtol=1e-5)
    assert torch.equal(back[:, :, 0], x[:, :, 0]) and features.shape == (1, 12, 128)
