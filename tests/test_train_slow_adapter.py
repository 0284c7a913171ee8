"""Stage 1: which trajectories it shows, and that its loss is the generator's with the adapter's help."""

import pytest
import torch

import flow
from adapter import AdapterConfig, ResNetAdapter
from core.codec import Batch
from model import DiTConfig, VideoDiT
from train_slow_adapter import Config, adapter_loss, trajectory_kind


def test_masks_come_first_then_boxes_of_which_some_are_sparse():
    kinds = [trajectory_kind(step, 3, 0.15) for step in range(6)]
    assert kinds == [("mask", 0.0)] * 3 + [("box", 0.15)] * 3
    assert trajectory_kind(0, 0, 0.5) == ("box", 0.5)
    assert Config.mask_steps < Config.steps


def test_the_loss_moves_the_adapter_alone():
    torch.manual_seed(0)
    generator = VideoDiT(DiTConfig(32, 64, 2, 2, text_dim=16, text_tokens=8, channels=16)).requires_grad_(False)
    torch.nn.init.normal_(generator.head.head.weight, std=0.1)
    adapter = ResNetAdapter(AdapterConfig(32, 2, hidden=16, channels=16))
    x0, noise, traj = torch.randn(3, 2, 16, 3, 4, 4)
    text, sigma = torch.randn(2, 8, 16), torch.tensor([0.3, 0.8])

    def loss(traj):
        return adapter_loss(generator, adapter, Batch(x0, text, traj), noise, sigma)

    plain = flow.flow_matching_loss(lambda x_t, t: generator(x_t, t, text), x0, noise, sigma)
    assert loss(traj).item() == pytest.approx(plain.item(), rel=1e-6)  # a fresh adapter adds nothing
    for block in adapter.blocks:
        torch.nn.init.normal_(block.project.weight)
    assert loss(traj) != loss(-traj)  # and then the trajectory counts
    loss(traj).backward()
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in generator.parameters())
