"""Both adapters start as nothing, learn alone, and have the paper's sizes."""

import dataclasses
from types import SimpleNamespace

import imageio.v3 as iio
import nets
import pytest
import torch
from conftest import refused
from test_runs import ALONE, Options

import adapter as adapters
import flow
import sample
import train_slow_adapter
from core import optim
from core.parallel import TokenSplit
from core.runs import Run
from core.weights import read_safetensors, save_network
from model import PRESETS, VideoDiT
from toy.codec import ToyCodec
from toy.muon import muon_and_adamw


def networks(kind="resnet"):
    torch.manual_seed(0)
    generator, adapter = nets.generator(), nets.adapter(fixed_norm=True)
    if kind == "controlnet":
        adapter = adapters.ControlNetAdapter(adapters.ControlNetConfig(**vars(generator.config)))
        adapter.copy_generator(generator)
    x, traj = torch.randn(2, 2, 24, 3, 4, 4)
    t, text = torch.tensor([[0.0, 400, 400], [0, 900, 900]]), torch.randn(2, 32, 64)
    return generator, adapter, x, t, text, traj


KINDS = pytest.mark.parametrize("kind", ["resnet", "controlnet"])


@KINDS
def test_an_adapter_starts_as_nothing_and_a_step_changes_it_alone(kind):
    generator, adapter, x, t, text, traj = networks(kind)
    generator.requires_grad_(False)
    with torch.no_grad():
        residuals = adapter(traj, x, t, text)
        assert [r.shape for r in residuals[:2]] == [(2, 12, 32)] * 2 and len(residuals) == 2
        assert torch.equal(generator(x, t, text, residuals), generator(x, t, text))
    frozen = {n: p.clone() for n, p in generator.named_parameters()}
    before = {n: p.clone() for n, p in adapter.named_parameters()}
    optimizers = muon_and_adamw(adapter, adapter.blocks)
    optim.set_lr(optimizers, 1e-2)
    muon, rest = ([id(p) for g in o.param_groups for p in g["params"]] for o in optimizers)
    matrices = {id(p) for name, p in adapter.blocks.named_parameters() if p.ndim > 1 and name.endswith("weight")}
    assert set(muon) == matrices and sorted(muon + rest) == sorted(map(id, adapter.parameters()))
    for _ in range(2):  # the first step moves the zero projections alone, the second what lies behind them
        velocity = adapters.with_adapter(generator, adapter, text, traj)
        flow.flow_matching_loss(velocity, x, traj, t[:, 1] / 1000).backward()
        optim.clip_and_step(adapter, optimizers, 1.0)
    assert all(p.grad is None and torch.equal(p, frozen[n]) for n, p in generator.named_parameters())
    assert not any(torch.equal(p, before[n]) for n, p in adapter.named_parameters())


def test_the_small_presets_adapter_passes_on_what_its_maps_show():
    """With a head that gives nothing later frames are the maps', frame 0 is the picture; a black map adds nothing."""
    generator, codec = VideoDiT(PRESETS["small"]), ToyCodec()
    adapter = adapters.ResNetAdapter(adapters.PRESETS["small"])
    assert adapter.config.copies == codec.network.config.change
    video, maps = torch.rand(2, 1, 3, 3, 16, 16) * 2 - 1
    maps[:, :, 2] = -1
    adapter.black.copy_(codec.encode_video(torch.full_like(maps, -1))[0, :, :1, :1, :1])
    moved = codec.encode_video(torch.cat([video[:, :, :1], maps[:, :, 1:2], video[:, :, :1]], 2))
    level = torch.tensor([[0.0, 1.0, 1.0]])
    x_t = flow.add_noise(codec.encode_video(video), torch.randn(1, 24, 3, 4, 4), level)
    velocity = adapters.with_adapter(generator, adapter, torch.zeros(1, 32, 64), codec.encode_video(maps))
    x0 = flow.velocity_to_x0(x_t, velocity(x_t, 1000 * level), level)
    torch.testing.assert_close(x0, moved, rtol=1e-4, atol=1e-4)
    x0.square().sum().backward()
    assert generator.head.head.weight.grad.abs().max() > 0
    for output, added in ((0.2, 0.02), (-2.0, -1.28)):  # of what is faint, a tenth
        torch.nn.init.constant_(generator.head.head.bias, output)
        x0 = flow.velocity_to_x0(x_t, velocity(x_t, 1000 * level), level)[:, :, 1]
        torch.testing.assert_close(x0, moved[:, :, 1] + added, rtol=1e-4, atol=1e-4)


def test_far_from_objects_the_small_presets_frames_are_frame_0():
    """Free is what lies near an object in frame 0, or near what the maps show otherwise; where a map is black, all."""
    adapter, codec = adapters.ResNetAdapter(adapters.PRESETS["small"]), ToyCodec()
    generator = VideoDiT(PRESETS["small"])
    torch.nn.init.normal_(generator.head.head.weight)
    picture = torch.rand(3, 1, 64, 128)
    maps = picture.repeat(1, 4, 1, 1)
    maps[:, 0], maps[:, 2] = -1, -1  # frame 2 is blacked out
    for t, x in ((0, 4), (1, 60), (3, 100)):
        maps[:, t, 28:36, x : x + 8] = -0.5
    traj = codec.encode_video(maps[None])
    adapter.fit([traj])
    assert torch.allclose(adapter.black.flatten(), codec.encode_video(-torch.ones(1, 3, 1, 4, 4)).flatten(), atol=1e-4)
    first = codec.encode_video(picture[None])
    x_t, level = torch.cat([first, torch.randn(1, 24, 3, 16, 32)], 2), torch.tensor([[0.0, 1.0, 1.0, 1.0]])
    text = torch.zeros(1, 32, 64)
    velocity = adapters.with_adapter(generator, adapter, text, traj)
    with torch.no_grad():
        x0 = flow.velocity_to_x0(x_t, velocity(x_t, 1000 * level, skip_still=True), level)
        shown = adapter.shown(traj, first)
        nothing = shown._replace(drawn=shown.drawn & False)  # as stage 0 leaves some videos without
        plain = [generator(x_t, 1000 * level, text, shown=shown) for shown in (nothing, None)]
    assert torch.equal(*plain)
    moves = x0[0].abs().amax(0) > 1e-4
    assert moves[2].all()
    for t, objects in ((1, (1, 15)), (3, (1, 25))):  # columns of latents where an object begins
        near = torch.zeros(16, 32, dtype=torch.bool)
        for x in objects:
            near[7 - 3 : 9 + 3, max(0, x - 3) : x + 2 + 3] = True
        assert torch.equal(moves[t], near), t
    for block in generator.blocks:  # without attention, which alone sees that tokens are left out
        torch.nn.init.zeros_(block.self_attn.o.weight)
    counts: list[int] = []
    generator.blocks[0].register_forward_pre_hook(lambda block, args: counts.append(args[0].shape[1]))
    with torch.no_grad():
        fewer, all_tokens = (velocity(x_t, 1000 * level, skip_still=skip) for skip in (True, False))
    torch.testing.assert_close(fewer, all_tokens, rtol=1e-5, atol=1e-4)
    assert counts[1] == 4 * 8 * 16 and 2 * 8 * 16 < counts[0] < 0.8 * counts[1]


@pytest.mark.parametrize("frames", [1, 2, 3])
def test_gradients_in_bfloat16_are_those_in_float32(frames):
    """Freed memory holds what is no number: a kernel that leaves a part of its result unwritten shows."""
    torch.manual_seed(0)
    block, h, way = adapters.ResNetBlock(32, 16), torch.randn(2, 32, frames, 4, 4), torch.randn(2, 16 * frames, 16)

    def gradients(bfloat16):
        block.zero_grad()
        for size in (2**i for i in range(8, 19)):
            torch.full((size,), torch.nan)
        with torch.autocast("cpu", torch.bfloat16, enabled=bfloat16):
            _, residual = block(h, TokenSplit())
        (residual.float() * way).sum().backward()
        return {name: p.grad.clone() for name, p in block.named_parameters()}

    exact, rough = gradients(False), gradients(True)
    for name, grad in exact.items():
        assert (rough[name] - grad).norm() < 0.03 * grad.norm(), name


def test_static_adapter_reads_the_trajectory_alone():
    _, _, x, t, text, traj = networks()
    adapter = nets.adapter(fixed_norm=True, maps="pixels", copies=1.5)
    for block in adapter.blocks:
        torch.nn.init.normal_(block.project.weight)
    with torch.no_grad():
        once = adapter(traj)
        assert adapter.static and all(torch.equal(a, b) for a, b in zip(once, adapter(traj, x, t, text), strict=True))
        assert not any(torch.allclose(a, b) for a, b in zip(once, adapter(-traj, x, t, text), strict=True))


def test_controlnet_sees_the_noisy_latent_as_its_generator_does():
    generator, adapter, x, t, text, traj = networks("controlnet")
    with torch.no_grad():
        for layer in adapter.project:  # the identity: residuals become the blocks' outputs
            torch.nn.init.eye_(layer.weight)
        _, wanted = generator(x, t, text, feature_blocks=(0, 1))
        assert not adapter.static
        for seen in (traj, torch.zeros_like(traj)):  # the trajectory's weights start at zero
            for a, b in zip(adapter(seen, x, t, text), wanted, strict=True):  # zeros too are summed, so not to the bit
                torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-5)
        torch.nn.init.normal_(adapter.patch_embedding.weight)
        assert not torch.allclose(adapter(traj, x, t, text)[0], adapter(-traj, x, t, text)[0])
        one_by_one = generator(x, t, text, adapter.residuals(traj, x, t, text))  # each when its block asks for it
        assert torch.equal(one_by_one, generator(x, t, text, adapter(traj, x, t, text)))


@KINDS
def test_export_reads_back_as_its_kind_and_with_its_maps(kind, tmp_path):
    generator, adapter, *_ = networks(kind)
    path = tmp_path / "adapter.safetensors"
    for maps in ("outline", "pixels"):
        config = dataclasses.replace(adapter.config, maps=maps)
        save_network(path, "SlowAdapter", config, adapter.state_dict(), torch.float32)
        assert adapters.read_maps(path, "SlowAdapter") == maps
        again = adapters.read_adapter(path, "SlowAdapter")
        assert type(again) is type(adapter) and again.config == config
        assert all(torch.equal(p, again.state_dict()[n]) for n, p in adapter.state_dict().items())
    adapters.check_fit(again, path, generator, "g.pt")
    other = r"adapter\.safetensors: was made for a generator of other shape than g\.pt"
    refused(other, adapters.check_fit, again, path, nets.generator(layers=5), "g.pt")
    for read in (adapters.read_adapter, adapters.read_maps):
        refused("holds a SlowAdapter, expected a FastAdapter", read, path, "FastAdapter")
    save_network(path, "SlowAdapter", dataclasses.replace(config, maps="paint"), adapter.state_dict())
    refused("its header has no config of a SlowAdapter", adapters.read_maps, path, "SlowAdapter")


@pytest.mark.parametrize("maps", ["outline", "pixels"])
def test_stage_1_trains_a_controlnet_and_sample_uses_it(maps, here, monkeypatch):
    generator = nets.generator()
    monkeypatch.setitem(PRESETS, "small", generator.config)  # nothing here hangs on its width
    nets.save(slow_generator=generator)
    options = {"steps": 2, "batch": 2, "compile": False, "generator": "slow_generator.safetensors"}
    train_slow_adapter.main(train_slow_adapter.Config(kind="controlnet", maps=maps, sample_every=0, **options))
    file = "runs/slow_adapter/slow_adapter.safetensors"
    adapter = adapters.read_adapter(file, "SlowAdapter")
    assert isinstance(adapter, adapters.ControlNetAdapter) and adapter.project[0].weight.any()
    assert adapter.config.maps == adapters.read_maps(file, "SlowAdapter") == maps
    painted = nets.watch(monkeypatch, ToyCodec, "encode_video", lambda codec, video: video)
    options = {"speed": "slow", "steps": 2, "detail": False, "adapter": file, "weights": ".", "size": "48x48"}
    sample.main(sample.Config(**options))
    assert iio.imread("out/sample.mp4").shape == (9, 48, 48, 3)
    image, trajectory, _ = sample.read_condition(sample.Config(**options), ToyCodec(), maps)
    wanted = trajectory.maps("box", image[0, :, 0] if maps == "pixels" else None)
    assert torch.equal(painted[-1][0], wanted)


def test_the_fixed_norm_is_that_of_all_clips_and_exported_as_it_is_with_averaged_weights(tmp_path):
    """So a line weighs the same however large its box. A clip's own would weigh lines the more, the fewer it has."""
    torch.manual_seed(0)
    adapter, path = nets.adapter(channels=16, fixed_norm=True), tmp_path / "slow_adapter.safetensors"
    ema, channels = optim.EMA(adapter, 0.9), torch.linspace(-2, 2, 16)[:, None, None, None]
    clips = [channels + 0.1 * n * torch.randn(1, 16, 3, 16, 4 * n) for n in (1, 2, 4)]
    adapter.fit(clips)
    std, mean = torch.std_mean(torch.cat([clip.transpose(0, 1).flatten(1) for clip in clips], 1), 1)
    for clip in clips:
        normed = (clip.movedim(1, -1) - mean) / std
        torch.testing.assert_close(adapter.norm(clip), normed.movedim(-1, 1))
    adapter.blocks[0].project.weight.data += 1  # the average has not seen it
    Run(tmp_path, Options(), ALONE, {}).export("slow_adapter", adapter, ema)
    names = read_safetensors(path)[1].keys()
    assert names == adapter.state_dict().keys() and "norm.mean" in names
    again = adapters.read_adapter(path, "SlowAdapter", torch.bfloat16)
    assert not again.blocks[0].project.weight.any()
    assert again.config.fixed_norm and again.norm.mean.dtype == torch.float32
    for name in ("mean", "std"):  # a file has 16 bits
        assert torch.equal(getattr(again.norm, name), getattr(adapter.norm, name).bfloat16().float())
    assert not torch.allclose(again.norm.mean, torch.zeros(1)) and adapters.PRESETS["wan5b"].fixed_norm


def test_files_from_before_the_fixed_norm_are_read(tmp_path):
    """Their header has no such field: the clip's own statistics and outlines, as they were trained."""
    adapter, path = nets.adapter(), tmp_path / "slow_adapter.safetensors"
    config = SimpleNamespace(**{k: v for k, v in vars(adapter.config).items() if k not in ("fixed_norm", "maps")})
    save_network(path, "SlowAdapter", config, adapter.state_dict(), torch.float32)
    again = adapters.read_adapter(path, "SlowAdapter")
    assert again.config == adapter.config and isinstance(again.norm, torch.nn.GroupNorm)
    traj = torch.randn(1, 24, 3, 4, 4)
    assert all(torch.equal(a, b) for a, b in zip(again(traj), adapter(traj), strict=True))


def test_every_frame_has_frame_0_beside_it():
    generator, _, x, t, text, _ = networks()
    other = x.clone()
    other[:, :, 0] += 1
    before, after = (generator.embed(y, t, text)[0].unflatten(1, (3, -1)) for y in (x, other))
    changed = after - before
    assert (changed[:, 1] != 0).any()
    torch.testing.assert_close(changed[:, 1], changed[:, 2])


def test_size_at_wan5b():
    """Base + adapter = 5.02B in the paper with an adapter of 15M to 25M, and 10.28B with a ControlNet."""
    shape, light = PRESETS["wan5b"], adapters.PRESETS["wan5b"]
    assert (light.layers, light.dim) == (shape.layers, shape.dim)
    with torch.device("meta"):
        control = adapters.ControlNetAdapter(adapters.ControlNetConfig(**vars(shape)))
        three = VideoDiT(shape), adapters.ResNetAdapter(light), control
    base, small, large = (sum(p.numel() for p in network.parameters()) for network in three)
    assert 15e6 < small < 25e6 and round((base + large) / 1e9, 2) == 10.28
