"""The rectified-flow maths against answers worked out by hand."""

import numpy as np
import pytest
import torch
from torch import nn

import flow
from wan import unipc


def test_path_and_its_inverse():
    x0, noise = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2)
    level = flow.frame_sigma(torch.tensor([0.3, 0.8]), 4)
    assert level.tolist() == [[0, *[pytest.approx(0.3)] * 3], [0, *[pytest.approx(0.8)] * 3]]
    x_t = flow.add_noise(x0, noise, level)
    assert torch.equal(x_t[:, :, 0], x0[:, :, 0])  # the first frame stays clean
    torch.testing.assert_close(x_t[1, :, 1:], 0.2 * x0[1, :, 1:] + 0.8 * noise[1, :, 1:])
    torch.testing.assert_close(flow.velocity_to_x0(x_t, noise - x0, level), x0)


def test_schedule():
    assert flow.sigma_schedule(4, 1) == [1, 0.75, 0.5, 0.25, 0]
    assert flow.sigma_schedule(4, 5) == pytest.approx([1, 15 / 16, 5 / 6, 5 / 8, 0])  # 5u / (1 + 4u)
    with pytest.raises(ValueError, match="at least 1"):
        flow.sigma_schedule(0, 5)


@pytest.mark.parametrize("steps", [1, 4])
def test_samplers_reach_a_point_mass(steps):
    """Where all data is one point c, the exact velocity is (x - c) / sigma: every sampler must land on c."""
    c, first = torch.full((2, 3, 4, 2, 2), 0.7), torch.randn(2, 3, 1, 2, 2)
    seen = []

    def velocity(x, t):
        seen.append(t)
        assert torch.equal(x[:, :, :1], first)  # the clean frame is in every input
        return (x - c) / (t[:, None, :, None, None] / 1000).clamp_min(1e-3)

    noise = torch.randn(steps, 2, 3, 4, 2, 2)
    sigmas = flow.sigma_schedule(steps, 3)
    for out in (flow.sample_multistep(velocity, first, noise[0], sigmas),
                flow.sample_fewstep(velocity, first, noise, sigmas)):  # fmt: skip
        torch.testing.assert_close(out[:, :, 1:], c[:, :, 1:])
        assert torch.equal(out[:, :, :1], first)
    assert len(seen) == 2 * steps and all((t[:, 0] == 0).all() for t in seen)
    assert [t[0, 1].item() for t in seen[:steps]] == pytest.approx([1000 * s for s in sigmas[:-1]])


def test_multistep_integrates_the_ode():
    """Gaussian data N(0, d^2): the flow is linear with a known solution, x(0) = d * x(1); Euler converges to it."""
    d, noise = 0.5, torch.randn(1, 1, 2, 4, 4, generator=torch.Generator().manual_seed(0))

    def velocity(x, t):
        s = t[:, None, :, None, None] / 1000
        return x * (s - (1 - s) * d**2) / (s**2 + (1 - s) ** 2 * d**2)  # E[noise - x0 | x_t]

    errors = []
    for steps in (10, 100):
        out = flow.sample_multistep(velocity, noise[:, :, :1], noise, flow.sigma_schedule(steps, 1))
        errors.append((out - d * noise)[:, :, 1:].abs().max().item())
    assert errors[1] < errors[0] / 5 and errors[1] < 0.02


def test_guidance_calls_each_velocity_once_and_none_for_nothing():
    x, t, calls = torch.randn(2, 3), torch.zeros(2, 1), []

    def velocity(name, factor):
        return lambda x, t: calls.append(name) or factor * x

    cond, uncond = velocity("cond", 2.0), velocity("uncond", 0.5)
    assert flow.guided(cond, uncond, 1) is cond
    for scale in (0, 5, 6):
        calls.clear()
        torch.testing.assert_close(flow.guided(cond, uncond, scale)(x, t), (0.5 + scale * 1.5) * x)
        assert calls == ["cond", "uncond"]


def test_loss_is_that_of_the_network_it_was_given():
    x0, noise, sigma = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2), torch.tensor([0.2, 0.9])
    level = flow.frame_sigma(sigma, 4)

    def loss(off: float | torch.Tensor, on: str = "velocity") -> float:
        def velocity(x_t, t):
            torch.testing.assert_close(t, 1000 * level)
            torch.testing.assert_close(x_t, flow.add_noise(x0, noise, level))
            return noise - x0 + off

        return flow.flow_matching_loss(velocity, x0, noise, sigma, on).item()

    assert loss(0) == 0 and loss(2) == pytest.approx(4, rel=1e-5)
    assert loss(2, "x0") == pytest.approx((0.2**2 + 0.9**2) / 2 * 4, rel=1e-5)  # sigma times the velocity's error
    wrong_in_frame_0 = torch.zeros(4, 1, 1).index_fill(0, torch.tensor(0), 5)
    assert loss(wrong_in_frame_0) == 0  # it is given, so it does not count


@pytest.mark.parametrize("last", range(4))
def test_backward_simulation_has_gradient_in_its_last_step_alone(last):
    seen, sigmas = [], flow.sigma_schedule(4, 3)

    def velocity(x, t):
        seen.append((t[0, 1].item() / 1000, torch.is_grad_enabled()))
        return weight * x

    weight, first = torch.tensor(0.5, requires_grad=True), torch.randn(2, 3, 1, 2, 2)
    x0 = flow.backward_simulation(velocity, first, torch.randn(4, 2, 3, 4, 2, 2), sigmas, last)
    assert [sigma for sigma, _ in seen] == pytest.approx(sigmas[: last + 1])
    assert [on for _, on in seen] == [False] * last + [True]
    assert x0.requires_grad and torch.equal(x0[:, :, :1], first)


@pytest.mark.parametrize("steps", [1, 2, 3, 50])
def test_unipc_is_that_of_diffusers(steps):
    """With Wan's levels and whole timesteps, on a random network, where frame 0 is given."""
    from diffusers import UniPCMultistepScheduler  # seconds

    torch.manual_seed(0)
    network = torch.nn.Sequential(nn.Conv3d(4, 16, 3, padding=1), nn.Tanh(), nn.Conv3d(16, 4, 3, padding=1))
    first, noise, asked = torch.randn(1, 4, 1, 8, 8), torch.randn(1, 4, 3, 8, 8), []

    @torch.no_grad()
    def velocity(x, t):
        asked.append(t[0].tolist())
        return network(x) * (1 + t[:, None, :, None, None] / 1000)

    got = unipc.sample_unipc(velocity, first, noise, steps, 5.0)
    times = [t for _, t, _ in asked]
    solver = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=5.0)
    solver.set_timesteps(sigmas=0.999 * (1 - np.arange(steps) / steps))
    assert times == solver.timesteps.tolist() and (steps < 50 or times[:4] == [999, 995, 991, 987])
    rest = noise[:, :, 1:]
    for t in solver.timesteps:
        v = velocity(torch.cat([first, rest], 2), torch.tensor([[0, t, t]]))
        rest = solver.step(v[:, :, 1:], t, rest).prev_sample
    torch.testing.assert_close(got, torch.cat([first, rest], 2), atol=1e-5, rtol=0)
