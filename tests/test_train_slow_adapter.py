"""Stage 1: which trajectories it shows, and that its loss is the generator's with the adapter's help."""

from pathlib import Path

import nets
import pytest
import torch
from conftest import refused

import adapter as adapters
import distill_fast
import finetune_hybrid
import flow
import train_slow_adapter
from adapter import FixedNorm, ResNetAdapter, read_adapter, read_maps
from core import optim
from core.codec import Batch
from model import PRESETS
from toy.codec import ToyCodec
from toy.latents import ToyLatents
from toy.world import WorldBatch
from train_slow_adapter import WAN5B, Config, adapter_loss

TOLD = {"rtol": 1e-4, "atol": 1e-6}


@pytest.mark.parametrize("predicts", ["velocity", "x0"])
def test_the_loss_moves_the_adapter_alone_and_its_weight_counts_videos(predicts):
    torch.manual_seed(0)
    shape = {"text_dim": 16, "text_tokens": 8, "channels": 16, "predicts": predicts}
    generator, adapter = nets.generator(0.1, **shape).requires_grad_(False), nets.adapter(channels=16)
    x0, noise, traj = torch.randn(3, 2, 16, 3, 4, 4)
    text, sigma = torch.randn(2, 8, 16), torch.tensor([0.3, 0.8])

    def loss(traj, rows=slice(0, 2), *weight):
        batch = Batch(x0[rows], text[rows], traj[rows])
        return adapter_loss(generator, adapter, batch, noise[rows], sigma[rows], *weight)

    def gradient(rows, *weight):
        adapter.zero_grad()
        value = loss(traj, rows, *weight)
        value.backward()
        return torch.cat([value[None].detach(), *(p.grad.flatten() for p in adapter.parameters())])

    plain = flow.flow_matching_loss(lambda x_t, t: generator(x_t, t, text), x0, noise, sigma, predicts)
    assert loss(traj).item() == pytest.approx(plain.item(), rel=1e-6)  # a fresh adapter adds nothing
    for block in adapter.blocks:
        torch.nn.init.normal_(block.project.weight, std=0.1)
    assert loss(traj) != loss(-traj)  # and then the trajectory counts
    both = gradient(slice(0, 2))
    assert all(p.grad.abs().max() > 0 for p in adapter.parameters())
    assert all(p.grad is None for p in generator.parameters())
    alone = [gradient(slice(n, n + 1)) for n in range(2)]
    torch.testing.assert_close(gradient(slice(0, 2), torch.tensor([0.0, 1.7])), 1.7 * alone[1] / 2, **TOLD)
    torch.testing.assert_close(both, (alone[0] + alone[1]) / 2, **TOLD)


def test_the_bell_weighs_noise_levels_as_turbos_scheduler(stage_1, monkeypatch):
    """Values printed by its FlowMatchScheduler, for 1000 training steps: of levels 0, 100, 400, 700, 950 and 999."""
    levels = torch.tensor([1000, 900, 600, 300, 50, 1]) / 1000
    for shift, wanted in {
        1.0: [0.0, 0.4802146, 1.5001113, 1.2709510, 0.2426645, 0.0048697],
        5.0: [0.0, 0.1390749, 0.7385321, 1.7387844, 1.2507786, 0.0318790],
    }.items():
        got = train_slow_adapter.bell(flow.shift_sigma(levels, shift), shift)
        torch.testing.assert_close(got, torch.tensor(wanted), **TOLD)
    assert (Config().loss_weight, WAN5B.loss_weight) == ("none", "bell")
    seen = nets.watch(monkeypatch, train_slow_adapter, "adapter_loss")
    (optimizer,) = stage_1(steps=1, loss_weight="bell", shift=5.0, lr=1e-3)
    ((*_, sigma, weight),) = seen
    assert torch.equal(weight, train_slow_adapter.bell(sigma, 5.0))
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3]  # without Muon there is one rate


def test_wan5b_learns_by_adamw_with_a_warm_up():
    assert (WAN5B.lr, WAN5B.muon) == (1e-4, False) and WAN5B.warmup > 50
    assert Config().muon


@pytest.fixture
def stage_1(here, monkeypatch):
    """stage_1(**options) -> its optimizers, after a run of a small network on small videos."""
    monkeypatch.setattr(ToyCodec, "learned_on", nets.VIDEOS)
    network = nets.generator()
    files = nets.save(slow_generator=network)
    monkeypatch.setitem(adapters.PRESETS, "small", nets.adapter(fixed_norm=True).config)
    monkeypatch.setitem(PRESETS, "small", network.config)

    def run(**options):
        made = nets.watch(monkeypatch, optim, "adamw", after=lambda optimizer: optimizer)
        options = {"steps": 2, "batch": 2, "mask_steps": 0, "warmup": 0, "compile": False, "dtype": "float32"} | options
        train_slow_adapter.main(Config(generator=files["slow_generator"], muon=False, sample_every=0, **options))
        return made

    return run


FILES = {
    train_slow_adapter: {"generator": "slow_generator"},
    distill_fast: {"generator": "slow_generator"},
    finetune_hybrid: {"generator": "fast_generator", "adapter": "slow_adapter", "backbone": "slow_generator"},
}


@pytest.mark.parametrize("script, wrong", [(s, name) for s, names in FILES.items() for name in names])
def test_weights_of_another_preset_are_refused_before_there_is_a_run(script, wrong, tmp_path, monkeypatch):
    """Networks of 24 channels, and one of another codec's 48."""
    monkeypatch.chdir(tmp_path)
    given = {}
    for name, kind in FILES[script].items():
        make = nets.adapter if kind == "slow_adapter" else nets.generator
        (given[name],) = nets.save(Path(name), **{kind: make(channels=48 if name == wrong else 24)}).values()
    cfg = script.Config(**given | {"compile": False})
    refused(rf"^{given[wrong]}.*give the --preset that it was trained with", script.main, cfg)
    assert not (tmp_path / "runs").exists()


def test_an_adapter_to_go_on_from_must_fit(here):
    nets.save(slow_adapter=nets.adapter(layers=1))
    cfg = Config(init="slow_adapter.safetensors", compile=False)
    refused(r"slow_adapter\.safetensors: was made for a generator of other shape", train_slow_adapter.main, cfg)


def test_masks_come_first_then_boxes_of_which_some_are_sparse(stage_1, monkeypatch):
    nets.save(slow_adapter=nets.adapter())
    kinds = nets.watch(monkeypatch, ToyLatents, "batch", lambda *args, drop_text: (*args[2:], drop_text))
    stage_1(init="slow_adapter.safetensors", steps=5, mask_steps=3)
    assert kinds == [("mask", 0.0, 0.1)] * 3 + [("box", 0.15, 0.1)] * 2
    assert Config.mask_steps < Config.steps


@pytest.mark.parametrize("maps, other", [("outline", "pixels"), ("pixels", "outline")])
def test_maps_are_painted_as_the_new_adapters_config_says(maps, other, stage_1, monkeypatch):
    """Whether it is asked for, or what an adapter to go on from says."""
    seen = nets.watch(monkeypatch, WorldBatch, "maps", lambda batch, style, *_: style)
    stage_1(maps=maps, steps=1)
    assert set(seen) == {maps}
    file = "runs/slow_adapter/slow_adapter.safetensors"
    assert read_maps(file, "SlowAdapter") == maps
    stage_1(maps=other, init=file, name="on", steps=1)
    assert set(seen) == {maps} and read_maps("runs/on/slow_adapter.safetensors", "SlowAdapter") == maps


def test_the_fixed_norm_is_set_from_the_first_trajectories_and_kept(stage_1, monkeypatch):
    """From the data at the start, not again when a run goes on; and it reaches the exported file."""
    stage_1(save_every=1)
    data = ToyLatents(ToyCodec(), "pixels", seed=1, **ToyCodec.learned_on)
    seen = torch.cat([data.batch([n], "box").traj for n in range(16)])
    wanted = [value.flatten() for value in torch.std_mean(seen, (0, 2, 3, 4))]
    trained = read_adapter("runs/slow_adapter/slow_adapter.safetensors", "SlowAdapter")
    assert isinstance(trained.norm, FixedNorm)
    for got, value in zip((trained.norm.std, trained.norm.mean), wanted, strict=True):
        torch.testing.assert_close(got.flatten(), value, rtol=2**-8, atol=1e-6)  # files are in bfloat16
    monkeypatch.setattr(ResNetAdapter, "fit", lambda *args: pytest.fail("set again"))
    stage_1(save_every=1)  # the finished run again: read from its checkpoint, and exported
    again = read_adapter("runs/slow_adapter/slow_adapter.safetensors", "SlowAdapter").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in trained.state_dict().items())
