"""Distribution matching: each loss moves its own network and no other, and a known distribution is matched."""

from functools import partial

import nets
import pytest
import torch
from torch import nn

import distill_fast
import flow
from core import optim
from core.codec import Batch
from data import Draw
from distill_fast import WAN5B, Config, fake_score_loss, student_loss
from toy.codec import ToyCodec
from toy.latents import ToyLatents

SIGMAS = flow.sigma_schedule(4, 3)


def networks():
    torch.manual_seed(0)
    student, fake, real = (nets.generator() for _ in range(3))
    return student, fake, real.requires_grad_(False)


def conditions(*sigma):
    """Captions, and a draw of two videos."""
    random = torch.Generator().manual_seed(1)
    noise = torch.randn(5, 2, 24, 3, 4, 4, generator=random)
    first, text = torch.randn(2, 24, 1, 4, 4, generator=random), torch.randn(2, 32, 64, generator=random)
    return text, Draw(Batch(first, text, None), SIGMAS, 2, noise[:-1], noise[-1], torch.tensor(sigma))


def losses(*networks):
    text, draw = conditions(0.4, 0.9)
    student, fake, real = (partial(network, text=text) for network in networks)
    return student_loss(student, real, fake, draw), fake_score_loss(fake, student, draw)


def test_each_loss_reads_the_right_networks_and_moves_its_own_alone():
    student, fake, real = networks()
    before = losses(student, fake, real)
    moved = {}
    for name, network in (("student", student), ("fake", fake), ("real", real)):
        bias = network.head.head.bias
        bias.data += 0.1
        moved[name] = [a.item() != b.item() for a, b in zip(losses(student, fake, real), before, strict=True)]
        bias.data -= 0.1
    assert moved == {"student": [True, True], "fake": [True, True], "real": [True, False]}
    for which, learner in enumerate((student, fake)):
        losses(student, fake, real)[which].backward()
        with_gradient = [n for n in (student, fake, real) if any(p.grad is not None for p in n.parameters())]
        assert with_gradient == [learner]
        learner.zero_grad()
    optimizers = [optim.adamw(network) for network in (student, fake)]
    owned = [{id(p) for g in o.param_groups for p in g["params"]} for o in optimizers]
    assert not owned[0] & owned[1] and not (owned[0] | owned[1]) & {id(p) for p in real.parameters()}


def test_gradient_is_the_normalised_difference_of_the_scores():
    """With fake(x_t) = a and real(x_t) = b as clean videos: (a - b) / mean of |x0 - b|, over the number of values."""
    x0 = torch.randn(2, 1, 3, 2, 2, requires_grad=True)
    first, noise = x0[:, :, :1].detach(), torch.zeros(1, 2, 1, 3, 2, 2)
    draw = Draw(Batch(first, None, None), [1.0, 0.0], 0, noise, torch.randn_like(noise[0]), torch.full((2,), 0.5))
    scores = {"real_score": nets.lands_on(0.2), "fake_score": nets.lands_on(0.7)}
    loss = student_loss(nets.lands_on(x0), **scores, draw=draw)
    (gradient,) = torch.autograd.grad(loss, x0)
    scale = (x0[:, :, 1:] - 0.2).abs().mean((1, 2, 3, 4), keepdim=True)
    expected = (0.5 / scale / x0[:, :, 1:].numel()).expand_as(x0[:, :, 1:])
    torch.testing.assert_close(gradient[:, :, 1:], expected, rtol=1e-3, atol=1e-6)
    assert (gradient[:, :, 0] == 0).all()


@torch.no_grad()
def test_fake_score_loss_is_the_diffusion_loss_on_the_students_videos():
    """On x0, unless it is told otherwise: so each video weighs by its squared noise level, as test_flow.py has it."""
    student, fake, _ = networks()
    text, draw = conditions(0.3, 0.9)
    student, fake = partial(student, text=text), partial(fake, text=text)
    x0 = flow.backward_simulation(student, draw.batch.x0, draw.noise, SIGMAS, 2)
    for asked in ("velocity", "x0"):
        wanted = flow.flow_matching_loss(fake, x0, draw.renoise, draw.sigma, asked).item()
        assert fake_score_loss(fake, student, draw, asked).item() == pytest.approx(wanted, rel=1e-5)
    assert fake_score_loss(fake, student, draw).item() == pytest.approx(wanted, rel=1e-5)


def test_wan5b_has_the_values_of_its_sources():
    cfg, toy, (optimizer,) = WAN5B, Config(), optim.adamw(nn.Linear(1, 1)).param_groups
    assert (cfg.batch, cfg.clip, cfg.guidance, cfg.schedule, cfg.warmup) == (16, 10, 7, "constant", 0)
    assert (cfg.lr, cfg.fake_lr, cfg.ema, cfg.steps, cfg.ratio) == (5e-7, 1e-7, 0.99, 5500, 5)
    assert (optimizer["betas"], optimizer["weight_decay"], flow.FAST["wan5b"]) == ((0, 0.999), 0.01, (4, 5, 1))
    assert (toy.clip, toy.guidance, toy.schedule) == (1, 1, "cosine")


@pytest.mark.parametrize("most", [1.0, 0.5])
def test_a_run_judges_where_its_recipe_says_at_the_rates_it_says(most, here, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(ToyCodec, "learned_on", nets.VIDEOS)
    nets.save(slow_generator=nets.generator(layers=1))
    seen = nets.watch(monkeypatch, distill_fast, "fake_score_loss", lambda fake, student, draw, on: draw)
    updates = nets.watch(monkeypatch, optim, "clip_and_step", lambda network, optimizers, clip: (network, clip))
    rates = nets.watch(monkeypatch, optim, "set_lr", lambda optimizers, lr: lr)
    guided = nets.watch(monkeypatch, flow, "guided")
    monkeypatch.setattr(ToyLatents, "unconditional", lambda self: torch.full((1, 32, 64), 0.5))
    cfg = Config(
        generator="slow_generator.safetensors", steps=6, batch=4, clip=10.0, guidance=7.0, schedule="constant",
        warmup=0, lr=1e-5, fake_lr=2e-5, compile=False, dtype="float32", ratio=3, judge_sigma_max=most, sample_every=0,
    )  # fmt: skip
    distill_fast.main(cfg)
    assert len(seen) == 6 and len({draw.exit_step for draw in seen}) > 1
    low, high = (min(0.98, most * flow.shift_sigma(u, flow.FAST["small"].shift)) for u in (0.25, 0.75))
    for draw in seen:  # four stratified levels, warped as the sampler's are
        assert 0.02 <= draw.sigma.min() <= low and high <= draw.sigma.max() <= min(0.98, most)
    assert {clip for _, clip in updates} == {10.0} and rates == [1e-5, 2e-5] * 6
    # The student learns in the last step of each cycle of three: the fake score has followed it before.
    assert [network is updates[0][0] for network, _ in updates] == ([True] * 3 + [False]) * 2
    assert [scale for *_, scale in guided] == [7.0, 7.0]
    assert all((negative.keywords["text"] == 0.5).all() for _, negative, _ in guided)


class Points(nn.Module):
    """A velocity of points in the plane: the exact one, and a correction that starts at zero.

    So all networks begin at the slow one, as in stage 2. A "video" is four points, in frame 1 of [B,2,2,2,2], under one
    noise level.
    """

    def __init__(self, width: int = 64):
        super().__init__()
        layers = [nn.Linear(2 + 16, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, 2)]
        self.net = nn.Sequential(*layers)
        nn.init.zeros_(layers[-1].weight)
        nn.init.zeros_(layers[-1].bias)

    def forward(self, x, t):
        angle = t[:, 1:2] / 1000 * torch.arange(1, 9) * torch.pi / 2
        time = torch.cat([angle.cos(), angle.sin()], dim=1)[:, None].expand(-1, 4, -1)
        return mixture_velocity(x, t) + as_video(self.net(torch.cat([as_points(x), time], dim=2)))


def as_points(x):
    return x[:, :, 1].flatten(2).transpose(1, 2)  # (B, 4, 2)


def as_video(points):
    frame = points.transpose(1, 2).unflatten(2, (2, 2))
    return torch.stack([torch.zeros_like(frame), frame], dim=2)


CENTERS = torch.tensor([[-1.0, 0.0], [1.0, 0.6], [0.6, -1.2]])
SPREAD = torch.tensor([[0.60, 0.40], [0.40, 0.60], [0.50, 0.50]])  # standard deviations along the axes
SHARES = torch.tensor([0.5, 0.3, 0.2])


def mixture_velocity(x, t):
    """The exact velocity of the mixture: E[noise - x0 | x_t], a component at a time (flow.py, eq. 1 and 2)."""
    sigma, point = t[:, 1, None, None, None] / 1000, as_points(x)[:, :, None]  # (B, 1, 1, 1), (B, 4, 1, 2)
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2  # (B, 1, 3, 2), of x_t under each component
    offset = point - (1 - sigma) * CENTERS
    x0 = CENTERS + (1 - sigma) * SPREAD**2 / variance * offset
    noise = sigma / variance * offset
    return as_video((responsibilities(point, sigma)[..., None] * (noise - x0)).sum(2))


def responsibilities(points, sigma=0.0):
    """Posterior shares of the components in points [..., 1, 2] at noise level sigma [..., 1, 1]: [..., 3]."""
    variance = (1 - sigma) ** 2 * SPREAD**2 + sigma**2
    offset = points - (1 - sigma) * CENTERS
    return (SHARES.log() - 0.5 * (offset**2 / variance + variance.log()).sum(-1)).softmax(-1)


def errors(student, sigmas):
    """Largest error of the components' shares, means and covariances, sampled points shared out by the true mixture."""
    noise = torch.randn(4, 16384, 2, 2, 2, 2)
    video = flow.sample_fewstep(student, torch.zeros(16384, 2, 1, 2, 2), noise, sigmas)
    points = as_points(video).flatten(0, 1)  # (n, 2)
    owned = responsibilities(points[:, None])  # (n, 3)
    total = owned.sum(0)
    mean = owned.T @ points / total[:, None]
    covariance = torch.stack([points.T.cov(correction=0, aweights=share) for share in owned.T])
    errors = (total / len(points) - SHARES, mean - CENTERS, covariance - torch.diag_embed(SPREAD**2))
    return torch.tensor([error.abs().max() for error in errors])


def test_distilled_sampler_matches_a_gaussian_mixture():
    """Four steps of a small network, distilled by the same two losses from the mixture's exact score."""
    torch.manual_seed(0)
    student, fake, batch, steps = Points(), Points(), 128, 2000
    first, sigmas = torch.zeros(batch, 2, 1, 2, 2), flow.sigma_schedule(4, 1)
    optimizers = {n: torch.optim.AdamW(n.parameters(), betas=(0.0, 0.999), weight_decay=0) for n in (student, fake)}
    ema = optim.EMA(student, 0.99)
    tolerances = torch.tensor([0.03, 0.08, 0.08])  # of shares, 0.2 to 0.5; of means; of covariances, up to 0.36
    assert (errors(student, sigmas) > 2 * tolerances).all()  # the slow network, in so few steps, misses each
    for step in range(steps):
        noise, exit_step = torch.randn(5, batch, 2, 2, 2, 2), int(torch.randint(4, ()))
        # From the level to which the sampler noises a step's prediction up: below it nobody sees that prediction.
        sigma = (1 - (1 - torch.rand(batch)) * (exit_step + 1) / 4).clamp(0.02, 0.98)
        draw = Draw(Batch(first, None, None), sigmas, exit_step, noise[:-1], noise[-1], sigma)
        for learner in (fake, student) if step % 2 else (fake,):
            optim.set_lr([optimizers[learner]], 3e-3 * (1 - step / steps))
            optimizers[learner].zero_grad()
            if learner is fake:
                loss = fake_score_loss(fake, student, draw, on="velocity")
            else:
                loss = student_loss(student, real_score=mixture_velocity, fake_score=fake, draw=draw)
            loss.backward()
            optimizers[learner].step()
        ema.update(step)
    with ema.applied():
        left = errors(student, sigmas)
    assert (left < tolerances).all(), left
