"""Stage 1: which trajectories it shows, and that its loss is the generator's with the adapter's help."""

import pytest
import torch

import adapter as adapters
import distill_fast
import finetune_hybrid
import flow
import train_slow_adapter
from adapter import AdapterConfig, ControlNetAdapter, FixedNorm, ResNetAdapter, read_adapter, read_maps
from core import optim
from core.codec import Batch
from core.config import UserError
from core.weights import save_network
from model import PRESETS, DiTConfig, VideoDiT
from toy.codec import ToyCodec
from toy.latents import ToyLatents
from toy.world import WorldBatch
from train_slow_adapter import WAN5B, Config, adapter_loss


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


def test_the_bell_weighs_noise_levels_as_turbos_scheduler(stage_1, monkeypatch):
    """Values printed by its FlowMatchScheduler, for 1000 training steps: of levels 0, 100, 400, 700, 950 and 999."""
    levels = torch.tensor([1000, 900, 600, 300, 50, 1]) / 1000
    for shift, wanted in {
        1.0: [0.0, 0.4802146, 1.5001113, 1.2709510, 0.2426645, 0.0048697],
        5.0: [0.0, 0.1390749, 0.7385321, 1.7387844, 1.2507786, 0.0318790],
    }.items():
        got = train_slow_adapter.bell(flow.shift_sigma(levels, shift), shift)
        torch.testing.assert_close(got, torch.tensor(wanted), rtol=1e-4, atol=1e-6)
    assert (Config().loss_weight, WAN5B.loss_weight) == ("none", "bell")
    seen, loss = [], train_slow_adapter.adapter_loss
    monkeypatch.setattr(train_slow_adapter, "adapter_loss", lambda *args: seen.append(args[4:]) or loss(*args))
    stage_1(steps=1, loss_weight="bell", shift=5.0)
    ((sigma, weight),) = seen
    assert torch.equal(weight, train_slow_adapter.bell(sigma, 5.0))


def test_a_weight_counts_videos_in_the_loss_and_its_gradient():
    torch.manual_seed(0)
    generator = VideoDiT(DiTConfig(32, 64, 2, 2, text_dim=16, text_tokens=8, channels=16)).requires_grad_(False)
    adapter = ResNetAdapter(AdapterConfig(32, 2, hidden=16, channels=16))
    for part in (generator.head.head, *(block.project for block in adapter.blocks)):
        torch.nn.init.normal_(part.weight, std=0.1)
    x0, noise, traj = torch.randn(3, 2, 16, 3, 4, 4)
    text, sigma = torch.randn(2, 8, 16), torch.tensor([0.3, 0.8])

    def gradient(rows, *weight):
        adapter.zero_grad()
        batch = Batch(x0[rows], text[rows], traj[rows])
        loss = adapter_loss(generator, adapter, batch, noise[rows], sigma[rows], *weight)
        loss.backward()
        return torch.cat([loss[None].detach(), *(p.grad.flatten() for p in adapter.parameters())])

    alone = [gradient(slice(n, n + 1)) for n in range(2)]
    got = gradient(slice(0, 2), torch.tensor([0.0, 1.7]))
    torch.testing.assert_close(got, 1.7 * alone[1] / 2, rtol=1e-4, atol=1e-6)
    torch.testing.assert_close(gradient(slice(0, 2)), (alone[0] + alone[1]) / 2, rtol=1e-4, atol=1e-6)


def test_wan5b_learns_by_adamw_with_a_warm_up():
    assert (WAN5B.lr, WAN5B.muon) == (1e-4, False) and WAN5B.warmup > 50
    assert Config().muon


@pytest.fixture
def stage_1(here, monkeypatch):
    """stage_1(kind, fixed_norm, **options) -> its optimizers, after a run of a small network on the toy."""
    network = VideoDiT(DiTConfig(32, 64, 2, 2, text_dim=64, text_tokens=32, channels=24))
    torch.nn.init.normal_(network.head.head.weight, std=0.02)
    save_network("slow.safetensors", "SlowGenerator", network.config, network.state_dict())

    def run(**options):
        shape = AdapterConfig(32, 2, hidden=16, channels=24, fixed_norm=True)
        monkeypatch.setitem(adapters.PRESETS, "small", shape)
        monkeypatch.setitem(PRESETS, "small", network.config)
        made, adamw = [], optim.adamw

        def watched(*args):
            made.append(adamw(*args))
            return made[-1]

        monkeypatch.setattr(optim, "adamw", watched)
        options = {"steps": 2, "batch": 2, "mask_steps": 0, "warmup": 0, "compile": False, "dtype": "float32"} | options
        options["sample_every"] = 0
        train_slow_adapter.main(Config(generator="slow.safetensors", muon=False, **options))
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
        channels = 48 if name == wrong else 24
        if kind == "slow_adapter":
            network = ResNetAdapter(AdapterConfig(32, 1, hidden=16, channels=channels))
        else:
            network = VideoDiT(DiTConfig(32, 64, 2, 1, text_dim=64, text_tokens=32, channels=channels))
        given[name] = f"{name}.safetensors"
        save_network(given[name], kind.title().replace("_", ""), network.config, network.state_dict())
    with pytest.raises(UserError, match="give the --preset that it was trained with") as caught:
        script.main(script.Config(**given | {"compile": False}))
    assert str(caught.value).startswith(given[wrong]) and not (tmp_path / "runs").exists()


def test_an_adapter_to_go_on_from_must_fit(here):
    network = ResNetAdapter(AdapterConfig(32, 1, hidden=16, channels=24))
    save_network("a.safetensors", "SlowAdapter", network.config, network.state_dict())
    with pytest.raises(UserError, match=r"a\.safetensors: was made for a generator of other shape"):
        train_slow_adapter.main(Config(init="a.safetensors", compile=False))


def test_masks_come_first_then_boxes_of_which_some_are_sparse(stage_1, monkeypatch):
    kinds, batch = [], ToyLatents.batch

    def watched(data, samples, kind, sparse=0, drop_text=0):
        kinds.append((kind, sparse, drop_text))
        return batch(data, samples, kind, sparse, drop_text)

    network = ResNetAdapter(AdapterConfig(32, 2, hidden=16, channels=24))
    save_network("a.safetensors", "SlowAdapter", network.config, network.state_dict())
    monkeypatch.setattr(ToyLatents, "batch", watched)
    stage_1(init="a.safetensors", steps=5, mask_steps=3)
    assert kinds == [("mask", 0.0, 0.1)] * 3 + [("box", 0.15, 0.1)] * 2
    assert Config.mask_steps < Config.steps


@pytest.mark.parametrize("maps", ["outline", "pixels"])
def test_maps_are_painted_as_the_new_adapters_config_says(maps, stage_1, monkeypatch):
    """Whether it is asked for, or what an adapter to go on from says."""
    seen, paint = set(), WorldBatch.maps
    monkeypatch.setattr(WorldBatch, "maps", lambda batch, style, *rest: seen.add(style) or paint(batch, style, *rest))
    stage_1(maps=maps, steps=1)
    assert seen == {maps}
    file = "runs/slow_adapter/slow_adapter.safetensors"
    assert read_maps(file, "SlowAdapter") == maps
    other = {"outline": "pixels", "pixels": "outline"}[maps]
    stage_1(maps=other, init=file, name="on", steps=1)
    assert seen == {maps} and read_maps("runs/on/slow_adapter.safetensors", "SlowAdapter") == maps


def test_a_run_without_muon_has_one_rate_and_trains_a_controlnet(stage_1):
    (optimizer,) = stage_1(kind="controlnet", lr=1e-3, steps=1)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3]
    trained = read_adapter("runs/slow_adapter/slow_adapter.safetensors", "SlowAdapter")
    assert isinstance(trained, ControlNetAdapter) and trained.project[0].weight.any()


def test_the_fixed_norm_is_set_from_the_first_trajectories_and_kept(stage_1):
    """From the data at the start, not again when a run goes on; and it reaches the exported file."""
    stage_1(save_every=1)
    data = ToyLatents(ToyCodec(), "pixels", seed=1, **ToyCodec.learned_on)
    seen = torch.cat([data.batch([n], "box").traj for n in range(16)])
    wanted = [value.flatten() for value in torch.std_mean(seen, (0, 2, 3, 4))]
    trained = read_adapter("runs/slow_adapter/slow_adapter.safetensors", "SlowAdapter")
    assert isinstance(trained.norm, FixedNorm)
    for got, value in zip((trained.norm.std, trained.norm.mean), wanted, strict=True):
        torch.testing.assert_close(got.flatten(), value, rtol=2**-8, atol=1e-6)  # files are in bfloat16
    before = {n: t.clone() for n, t in trained.state_dict().items()}
    FixedNorm.fit, fit = lambda *args: pytest.fail("set again"), FixedNorm.fit
    try:
        stage_1(save_every=1)  # the finished run again: read from its checkpoint, and exported
    finally:
        FixedNorm.fit = fit
    again = read_adapter("runs/slow_adapter/slow_adapter.safetensors", "SlowAdapter").state_dict()
    assert all(torch.equal(tensor, again[name]) for name, tensor in before.items())
