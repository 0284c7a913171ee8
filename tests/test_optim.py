"""Muon against PyTorch's, the learning rate, and averaged weights."""

import pytest
import torch

from core import optim
from toy import muon


@pytest.mark.parametrize(("fast", "error"), [(False, 1e-4), (True, 0.03)])
def test_orthogonal_keeps_singular_vectors_and_levels_singular_values(monkeypatch, fast, error):
    """In bfloat16 where that is faster, else in float32."""
    monkeypatch.setattr(muon, "fast_bfloat16", lambda device: fast)
    torch.manual_seed(0)
    for shape in ((3, 48, 24), (2, 24, 48), (1, 32, 32)):
        matrices = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        inner = u.mT @ muon.orthogonal(matrices) @ v.mT
        values = inner.diagonal(dim1=1, dim2=2)
        assert (inner - torch.diag_embed(values)).abs().max() < error
        assert values[:, :-1].min() > 0.6 and values.max() < 1.25  # the least of a square one may lag


def test_muon_steps_as_pytorch_does():
    """torch.optim.Muon iterates in bfloat16, hence the tolerance."""
    torch.manual_seed(0)
    shapes = [(32, 32), (32, 32), (48, 16), (16, 48)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    mine = muon.Muon(ours, weight_decay=0.1)
    reference = torch.optim.Muon(theirs, lr=1e-2, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    optim.set_lr([mine], 1e-2)
    for _ in range(3):
        for a, b in zip(ours, theirs, strict=True):
            a.grad = torch.randn_like(a)
            b.grad = a.grad.clone()
        mine.step()
        reference.step()
    for a, b in zip(ours, theirs, strict=True):
        assert (a - b).norm() / (b - 1).norm() < 0.02


def test_learning_rate():
    rates = [optim.learning_rate(step, 2.0, 10, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0) and rates[-1] < 1e-3 and rates[10:] == sorted(rates[10:], reverse=True)
    rates = [optim.learning_rate(step, 2.0, 4, 110, "constant") for step in range(110)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and set(rates[4:]) == {2.0}
    assert optim.learning_rate(0, 2.0, 0, 110, "constant") == 2.0


def test_ema_follows_and_lends_its_weights():
    model = torch.nn.Linear(1, 1, bias=False)
    torch.nn.init.zeros_(model.weight)
    ema = optim.EMA(model, 0.5)
    with torch.no_grad():
        model.weight.fill_(1)
    ema.update(step=100)
    ema.update(step=101)
    assert ema.average["weight"].item() == pytest.approx(0.75)
    with ema.applied():
        assert model.weight.item() == pytest.approx(0.75)
    assert model.weight.item() == 1
