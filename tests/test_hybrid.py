"""Stage 3's losses: what they weigh, whom they move, and how the gradient reaches the adapter."""

import pytest
import torch

import adapter as adapters
import discriminator as discriminators
import flow
from adapter import ResNetAdapter
from discriminator import Classifier, DiffusionDiscriminator, adversarial_loss
from finetune_hybrid import diffusion_loss, diffusion_weight
from model import PRESETS, VideoDiT


def test_diffusion_weight():
    """The two readings of the paper's formula, over its 1,000 steps."""
    assert [diffusion_weight("decay", p) for p in (0, 1)] == pytest.approx([10, 1 / 4.1])
    assert [diffusion_weight("grow", p) for p in (0, 1)] == pytest.approx([0.1, 0.35])
    assert diffusion_weight("constant", 0.3) == 1


def test_diffusion_loss_by_hand():
    """A velocity that lands on x0 + 0.5 in every later frame costs 0.25; frame 0 costs nothing."""
    x0, noise, sigma = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2), torch.tensor([0.3, 0.9])
    level = flow.frame_sigma(sigma, 4)

    def velocity(x_t, t):
        torch.testing.assert_close(t, 1000 * level)
        torch.testing.assert_close(x_t, flow.add_noise(x0, noise, level))
        return noise - x0 - 0.5 / sigma[:, None, None, None, None]

    assert diffusion_loss(velocity, x0, noise, sigma).item() == pytest.approx(0.25, rel=1e-4)


def test_adversarial_gradient_reaches_the_adapter_through_the_noisy_latent_alone():
    torch.manual_seed(0)
    generator, backbone = (VideoDiT(PRESETS["tiny"]).requires_grad_(False) for _ in range(2))
    torch.nn.init.normal_(generator.head.head.weight, std=0.02)
    adapter, classifier = ResNetAdapter(adapters.PRESETS["tiny"]), Classifier(discriminators.PRESETS["tiny"])
    torch.nn.init.normal_(classifier.logit.weight)
    discriminator = DiffusionDiscriminator(backbone, classifier)
    traj, text, noise = torch.randn(2, 16, 3, 4, 4), torch.randn(2, 32, 64), torch.randn(5, 2, 16, 3, 4, 4)
    level = flow.frame_sigma(torch.tensor([0.4, 0.9]), 3)

    def loss(cut: bool):
        residuals = adapter(None, None, None, traj)
        fake = flow.backward_simulation(
            lambda x, t: generator(x, t, text, residuals), noise[4][:, :, :1], noise[:4], flow.sigma_schedule(4, 3), 3
        )
        x_t = flow.add_noise(fake.detach() if cut else fake, noise[4], level)
        return adversarial_loss(discriminator(x_t, flow.timestep(level), text, traj))

    loss(cut=True).backward()
    assert all(p.grad is None for p in adapter.parameters())
    loss(cut=False).backward()
    assert all(block.project.weight.grad.abs().max() > 0 for block in adapter.blocks)
    assert all(p.grad is None for network in (generator, backbone) for p in network.parameters())
