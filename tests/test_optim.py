"""Muon against PyTorch's, the learning rate, and averaged weights."""

import pytest
import torch

from core import optim
from finetune_hybrid import watch_gradients


@pytest.mark.parametrize(("fast", "error"), [(False, 1e-4), (True, 0.03)])
def test_orthogonal_keeps_singular_vectors_and_levels_singular_values(monkeypatch, fast, error):
    """In bfloat16 where that is faster, else in float32."""
    monkeypatch.setattr(optim, "fast_bfloat16", lambda device: fast)
    torch.manual_seed(0)
    for shape in ((3, 48, 24), (2, 24, 48), (1, 32, 32)):
        matrices = torch.randn(shape)
        u, _, v = torch.linalg.svd(matrices, full_matrices=False)
        inner = u.mT @ optim.orthogonal(matrices) @ v.mT
        values = inner.diagonal(dim1=1, dim2=2)
        assert (inner - torch.diag_embed(values)).abs().max() < error
        assert values[:, :-1].min() > 0.6 and values.max() < 1.25  # the least of a square one may lag


def test_muon_steps_as_pytorch_does():
    """torch.optim.Muon iterates in bfloat16, hence the tolerance."""
    torch.manual_seed(0)
    shapes = [(32, 32), (32, 32), (48, 16), (16, 48)]
    ours, theirs = ([torch.nn.Parameter(torch.ones(s)) for s in shapes] for _ in range(2))
    mine = optim.Muon(ours, weight_decay=0.1)
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


def test_muon_takes_large_matrices_a_few_at_a_time():
    """The same step, whatever fits at once."""

    def stepped(most):
        torch.manual_seed(0)
        params = [torch.nn.Parameter(torch.randn(8, 16)) for _ in range(5)]
        for p in params:
            p.grad = torch.randn_like(p)
        muon, seen, orthogonal = optim.Muon(params, 0.1), [], optim.orthogonal
        muon.most = most
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(optim, "orthogonal", lambda m: seen.append(len(m)) or orthogonal(m))
            optim.set_lr([muon], 1e-2)
            muon.step()
        return params, seen

    (whole, once), (parts, few), (singles, each) = stepped(1 << 20), stepped(2 * 128), stepped(1)
    assert (once, few, each) == ([5], [2, 2, 1], [1] * 5)
    for a, b, c in zip(whole, parts, singles, strict=True):
        torch.testing.assert_close(a, b)
        torch.testing.assert_close(a, c)


def test_learning_rate():
    rates = [optim.learning_rate(step, 2.0, 10, 110) for step in range(110)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == rates[10] == pytest.approx(2.0)
    assert rates[60] == pytest.approx(1.0) and rates[-1] < 1e-3 and rates[10:] == sorted(rates[10:], reverse=True)


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


def test_optimizers_hold_every_parameter_once():
    model = torch.nn.Module()
    model.blocks = torch.nn.ModuleList([torch.nn.Linear(4, 4)])
    model.head = torch.nn.Linear(4, 2)
    muon, adamw = optim.make_optimizers(model, model.blocks, 0.0)
    assert [id(p) for g in muon.param_groups for p in g["params"]] == [id(model.blocks[0].weight)]
    rest = {id(p) for g in adamw.param_groups for p in g["params"]}
    assert rest == {id(p) for p in model.parameters()} - {id(model.blocks[0].weight)}


def test_what_watches_gradients_changes_none():
    """The same gradients to the bit; and their squared norms, per backward pass and tensor."""
    torch.manual_seed(0)
    layers = [torch.nn.Linear(8, 8) for _ in range(3)]
    x, weights = torch.randn(4, 8), torch.randn(3, 4, 8)

    def gradients(watch):
        for layer in layers:
            layer.zero_grad()
        outputs = [layer(x) for layer in layers]
        once, twice = watch(outputs), watch(outputs)
        loss = sum((torch.tanh(y) * w).sum() for y, w in zip(once, weights, strict=True))
        loss = loss + 3 * sum((z**3 * w).sum() for z, w in zip(twice, weights, strict=True))
        loss.backward()
        return [p.grad.clone() for layer in layers for p in layer.parameters()]

    norms = [], []
    passes = iter(norms)
    plain = gradients(lambda tensors: list(tensors))

    def watch(tensors):
        return watch_gradients(tensors, next(passes))

    assert all(torch.equal(a, b) for a, b in zip(plain, gradients(watch), strict=True))
    outputs = [layer(x).detach() for layer in layers]
    first = sum(((1 - torch.tanh(y) ** 2) * w).square().sum() for y, w in zip(outputs, weights, strict=True))
    second = sum((9 * y**2 * w).square().sum() for y, w in zip(outputs, weights, strict=True))
    assert [len(squares) for squares in norms] == [3, 3]
    assert [sum(squares).item() for squares in norms] == [pytest.approx(v.item(), rel=1e-5) for v in (first, second)]
    silent = []
    with torch.no_grad():
        assert all(torch.equal(a, b) for a, b in zip(watch_gradients(outputs, silent), outputs, strict=True))
    assert not silent


def test_learning_rate_that_stays():
    rates = [optim.learning_rate(step, 2.0, 4, 110, "constant") for step in range(110)]
    assert rates[:4] == [0.5, 1.0, 1.5, 2.0] and set(rates[4:]) == {2.0}
    assert optim.learning_rate(0, 2.0, 0, 110, "constant") == 2.0


def test_ema_exports_buffers_as_they_are():
    model = torch.nn.Linear(1, 1)
    model.register_buffer("mean", torch.zeros(2))
    ema = optim.EMA(model, 0.5)
    model.mean.copy_(torch.tensor([3.0, 4.0]))
    assert ema.weights()["mean"].tolist() == [3, 4] and set(ema.weights()) == {"weight", "bias", "mean"}
