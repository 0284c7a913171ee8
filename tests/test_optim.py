"""Muon against PyTorch's, the learning rate, and averaged weights."""

import pytest
import torch
from test_runs import ALONE, Options

from core import optim
from core.runs import Run
from core.weights import read_safetensors
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


def test_ema_follows_and_lends_its_weights_and_exports_buffers_as_they_are(tmp_path):
    model = torch.nn.Linear(1, 1, bias=False)
    model.register_buffer("mean", torch.zeros(2))
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
    model.mean.copy_(torch.tensor([3.0, 4.0]))
    model.config = Options()
    Run(tmp_path, Options(), ALONE, {}).export("net", model, ema)
    tensors = {name: stored.read() for name, stored in read_safetensors(tmp_path / "net.safetensors")[1].items()}
    assert tensors["mean"].tolist() == [3, 4] and set(tensors) == {"weight", "mean"}
    assert tensors["weight"].item() == pytest.approx(0.75)


def test_optimizers_hold_every_parameter_once():
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    model.head = torch.nn.Linear(4, 2)
    inside, adamw = muon.muon_and_adamw(model, model.blocks)
    assert [id(p) for g in inside.param_groups for p in g["params"]] == [id(model.blocks[0].weight)]
    rest = {id(p) for g in adamw.param_groups for p in g["params"]}
    assert rest == {id(p) for p in model.parameters()} - {id(model.blocks[0].weight)}
