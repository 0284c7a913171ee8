"""Random numbers that depend on their key alone."""

import torch

from core.noise import sample_noise, sample_uniform, step_noise


def test_randomness_depends_on_its_key_alone():
    together = sample_noise((3, 2), [5, 9], 0, 7)
    assert torch.equal(together[1:], sample_noise((3, 2), [9], 0, 7))
    assert not torch.equal(together[0], together[1])
    assert not torch.equal(together, sample_noise((3, 2), [5, 9], 0, 8))
    u = sample_uniform(list(range(32, 48)), 16, 0)
    assert torch.equal((u * 16).floor(), torch.arange(16.0))  # stratified
    assert torch.equal(u[4:6], sample_uniform([36, 37], 16, 0))
    steps = step_noise(4, (3, 2), [5, 9], 0, 7)  # every step has noise of its own
    assert steps.shape == (4, 2, 3, 2) and len(steps.flatten().unique()) == 48
    assert torch.equal(steps[:, 1:], step_noise(4, (3, 2), [9], 0, 7))


def test_a_uniform_number_stays_below_1(monkeypatch):
    greatest = 1 - torch.tensor([2.0**-24])
    monkeypatch.setattr(torch, "rand", lambda *shape, generator: greatest)
    assert (sample_uniform(list(range(16)), 16, 0) < 1).all()
