"""Stage 1: which trajectories it shows, and that its loss is the generator's with the adapter's help."""

import pytest
import torch

import adapter as adapters
import distill_fast
import finetune_hybrid
import flow
import train_slow_adapter
from adapter import AdapterConfig, ControlNetAdapter, FixedNorm, ResNetAdapter, read_adapter
from core import optim
from core.codec import Batch
from core.config import ROOT, UserError, parse_config
from core.weights import save_network
from model import PRESETS, DiTConfig, VideoDiT
from toy.latents import ToyLatents
from train_slow_adapter import WAN5B, Config, adapter_loss, trajectory_kind


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


def test_wan5b_learns_by_adamw_with_a_warm_up():
    cfg = parse_config(Config, ["--preset", "wan5b"], {"wan5b": WAN5B})
    assert (cfg.lr, cfg.muon, cfg.copied_rate) == (1e-4, False, 0.1) and cfg.warmup > 50
    assert parse_config(Config, []).muon


def test_what_a_controlnet_copies_learns_at_a_tenth_of_the_rate():
    network = ControlNetAdapter(DiTConfig(32, 64, 2, 2, text_dim=16, text_tokens=8, channels=16))
    optimizer = optim.adamw(network, 0.01, 0.9, network.copied, 0.1)
    optim.set_lr([optimizer], 1e-4)
    new, copied = optimizer.param_groups
    assert (new["lr"], copied["lr"]) == (1e-4, pytest.approx(1e-5))
    assert new["betas"] == copied["betas"] == (0.9, 0.999)
    names = {id(p): name for name, p in network.named_parameters()}
    groups = [{names[id(p)] for p in group["params"]} for group in (new, copied)]
    assert not groups[0] & groups[1] and groups[0] | groups[1] == set(names.values())
    assert sum(len(group["params"]) for group in (new, copied)) == len(names)
    assert groups[0] == {n for n in names.values() if n.startswith(("project.", "patch_embedding."))}
    assert any(name.startswith("blocks.1.") for name in groups[1]) and "text_embedding.0.weight" in groups[1]
    light = ResNetAdapter(AdapterConfig(32, 2, hidden=16, channels=16))
    (all_new,) = optim.adamw(light, 0.01, 0.9, light.copied, 0.1).param_groups
    assert all_new["lr_scale"] == 1 and len(all_new["params"]) == len(list(light.parameters()))


@pytest.fixture
def stage_1(here, monkeypatch):
    """stage_1(kind, fixed_norm, **options) -> its optimizers, after a run of a small network on the toy."""
    network = VideoDiT(DiTConfig(32, 64, 2, 2, text_dim=64, text_tokens=32, channels=16))
    torch.nn.init.normal_(network.head.head.weight, std=0.02)
    save_network("slow.safetensors", "SlowGenerator", network.config, network.state_dict())

    def run(**options):
        shape = AdapterConfig(32, 2, hidden=16, channels=16, fixed_norm=True)
        monkeypatch.setitem(adapters.PRESETS, "tiny", shape)
        monkeypatch.setitem(PRESETS, "tiny", network.config)
        made, adamw = [], optim.adamw

        def watched(*args):
            made.append(adamw(*args))
            return made[-1]

        monkeypatch.setattr(optim, "adamw", watched)
        options = {"steps": 2, "batch": 2, "mask_steps": 0, "warmup": 0, "compile": False, "dtype": "float32"} | options
        train_slow_adapter.main(Config(generator="slow.safetensors", muon=False, **options))
        return made

    return run


WEIGHTS = {preset: {name: str(ROOT / f"checkpoints/{preset}/{name}.safetensors") for name in (
    "slow_generator", "slow_adapter", "fast_generator")} for preset in ("tiny", "pictures")}  # fmt: skip
PICTURES = WEIGHTS["pictures"]


@pytest.mark.parametrize(
    "script, options, path",
    [
        (train_slow_adapter, {"generator": PICTURES["slow_generator"]}, PICTURES["slow_generator"]),
        (train_slow_adapter, {"init": PICTURES["slow_adapter"]}, PICTURES["slow_adapter"]),
        (train_slow_adapter, {"preset": "pictures"}, WEIGHTS["tiny"]["slow_generator"]),
        (distill_fast, {"generator": PICTURES["slow_generator"]}, PICTURES["slow_generator"]),
        (finetune_hybrid, {"generator": PICTURES["fast_generator"]}, PICTURES["fast_generator"]),
        (finetune_hybrid, {"backbone": PICTURES["slow_generator"]}, PICTURES["slow_generator"]),
        (finetune_hybrid, {"adapter": PICTURES["slow_adapter"]}, PICTURES["slow_adapter"]),
    ],
)
def test_weights_of_another_preset_are_refused_before_there_is_a_run(script, options, path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    given = {name: WEIGHTS["tiny"][f"{kind}_{name.replace('backbone', 'generator')}"] for name, kind in (
        ("generator", "fast" if script is finetune_hybrid else "slow"), ("backbone", "slow"), ("adapter", "slow"))
        if name in script.Config.__dataclass_fields__}  # fmt: skip
    with pytest.raises(UserError, match="give the --preset that it was trained with") as caught:
        script.main(script.Config(**given | {"compile": False} | options))
    assert str(caught.value).startswith(path) and not (tmp_path / "runs").exists()


def test_a_run_without_muon_moves_copied_layers_ten_times_slower(stage_1):
    (optimizer,) = stage_1(kind="controlnet", lr=1e-3, steps=1)
    assert [group["lr"] for group in optimizer.param_groups] == [1e-3, pytest.approx(1e-4)]
    trained = read_adapter("runs/slow_adapter/slow_adapter.safetensors", "SlowAdapter")
    assert isinstance(trained, ControlNetAdapter) and trained.project[0].weight.any()


def test_the_fixed_norm_is_set_from_the_first_trajectories_and_kept(stage_1):
    """From the data at the start, not again when a run goes on; and it reaches the exported file."""
    stage_1(save_every=1)
    seen = torch.cat([ToyLatents(train_slow_adapter.open_codec("tiny", "", "cpu"), seed=1).batch([n], "box").traj
                      for n in range(16)])  # fmt: skip
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
