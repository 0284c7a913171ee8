"""The two baselines: whose gradient each loss gives, what the consistency loss compares, and a run of each."""

import nets
import pytest
import torch

from adapter import read_adapter
from core import runs
from tools.train_baseline import Config, consistency_loss, main


def test_the_consistency_loss_compares_two_ends_of_one_step_of_the_teacher():
    """The student sees level `high`; its average sees where the teacher's Euler step to `low` leads, worked by hand."""
    torch.manual_seed(0)
    x0, noise = torch.randn(2, 2, 1, 3, 2, 2)
    high, low = torch.tensor([0.9, 0.5]), torch.tensor([0.7, 0.0])
    seen = {}

    def watched(name, c):
        return lambda x, t: seen.update({name: (x.clone(), t.clone())}) or nets.lands_on(c)(x, t)

    args = watched("student", 0.3), watched("averaged", 0.8), watched("teacher", 0.6)
    loss = consistency_loss(*args, x0, noise, high, low)
    for i in range(2):
        x_t = (1 - high[i]) * x0[i, :, 1:] + high[i] * noise[i, :, 1:]
        torch.testing.assert_close(seen["student"][0][i, :, 1:], x_t)
        assert torch.equal(seen["student"][0][i, :, 0], x0[i, :, 0]) and not seen["student"][1][i, 0]
        x_low = x_t - (high[i] - low[i]) * (x_t - 0.6) / high[i]
        torch.testing.assert_close(seen["averaged"][0][i, :, 1:], x_low)
        assert seen["averaged"][1][i, 1].item() == pytest.approx(1000 * low[i].item())
    # At level 0 the average predicts what it is given, which is where the teacher's step leads: 0.6.
    assert loss.item() == pytest.approx((0.5**2 + 0.3**2) / 2, rel=1e-5)


def test_the_consistency_loss_moves_the_student_alone():
    nets = [torch.tensor(w, requires_grad=True) for w in (0.5, 0.6, 0.7)]
    x0, noise = torch.randn(2, 2, 1, 3, 2, 2)
    velocities = [lambda x, t, w=w: w * x for w in nets]

    def loss():
        return consistency_loss(*velocities, x0, noise, torch.tensor([0.9, 0.5]), torch.tensor([0.7, 0.2]))

    base = loss()
    base.backward()
    assert [w.grad is not None for w in nets] == [True, False, False]
    for w in nets:  # and each is read
        w.data += 0.1
        assert loss().item() != base.item()
        w.data -= 0.1


@pytest.mark.parametrize("loss", ["dmd", "lcm"])
def test_a_run_trains_the_adapter_and_exports_it(here, loss, monkeypatch):
    torch.manual_seed(0)
    adapter = nets.adapter()
    nets.save(slow_generator=nets.generator(), fast_generator=nets.generator(), slow_adapter=adapter)
    monkeypatch.setattr(runs, "LOG_EVERY", 1)
    cfg = Config(
        name="whole", loss=loss, weights=".", steps=4, batch=2, ratio=2, warmup=1, lr=1e-2, save_every=2,
        sample_every=4, compile=False, dtype="float32",
    )  # fmt: skip
    main(cfg)
    trained = read_adapter("runs/whole/fast_adapter.safetensors", "FastAdapter").state_dict()
    before = adapter.state_dict()
    assert any(not torch.allclose(trained[n].float(), before[n], atol=1e-3) for n in before if "project" in n)
    assert all(t.isfinite().all() for t in trained.values())
    lines = (here / "runs/whole/log.jsonl").read_text().splitlines()
    assert len(lines) == 4 and ("fake_loss" if loss == "dmd" else "consistency_loss") in lines[0]
