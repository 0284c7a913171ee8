"""Stage 3: what its losses weigh, whom they move, how the gradient reaches the adapter, and when who learns."""

from itertools import pairwise
from pathlib import Path

import pytest
import torch

import adapter as adapters
import discriminator as discriminators
import finetune_hybrid
import flow
from adapter import AdapterConfig, ControlNetAdapter, ControlNetConfig, ResNetAdapter
from core import optim
from core.config import UserError
from core.noise import draw_integer
from core.weights import read_safetensors, save_network
from discriminator import Classifier, DiffusionDiscriminator, adversarial_loss
from finetune_hybrid import diffusion_weight, phase
from model import PRESETS, DiTConfig, VideoDiT


def test_diffusion_weight():
    """The two readings of the paper's formula, over its 1,000 steps."""
    assert [diffusion_weight("decay", p) for p in (0, 1)] == pytest.approx([10, 1 / 4.1])
    assert [diffusion_weight("grow", p) for p in (0, 1)] == pytest.approx([0.1, 0.35])
    assert diffusion_weight("constant", 0.3) == 1


def test_diffusion_loss_by_hand():
    """L_diffusion: a velocity that lands on x0 + 0.5 in every later frame costs 0.25; frame 0 costs nothing."""
    x0, noise, sigma = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2), torch.tensor([0.3, 0.9])
    level = flow.frame_sigma(sigma, 4)

    def velocity(x_t, t):
        torch.testing.assert_close(t, 1000 * level)
        torch.testing.assert_close(x_t, flow.add_noise(x0, noise, level))
        return noise - x0 - 0.5 / sigma[:, None, None, None, None]

    assert flow.flow_matching_loss(velocity, x0, noise, sigma, "x0").item() == pytest.approx(0.25, rel=1e-4)


def test_adversarial_gradient_reaches_the_adapter_through_the_noisy_latent_alone():
    torch.manual_seed(0)
    generator, backbone = (VideoDiT(PRESETS["small"]).requires_grad_(False) for _ in range(2))
    torch.nn.init.normal_(generator.head.head.weight, std=0.02)
    adapter, classifier = ResNetAdapter(adapters.PRESETS["small"]), Classifier(discriminators.PRESETS["small"])
    torch.nn.init.normal_(classifier.logit.weight)
    discriminator = DiffusionDiscriminator(backbone, classifier)
    traj, text, noise = torch.randn(2, 24, 3, 4, 4), torch.randn(2, 32, 64), torch.randn(5, 2, 24, 3, 4, 4)
    level = flow.frame_sigma(torch.tensor([0.4, 0.9]), 3)

    def loss(cut: bool):
        residuals = adapter(traj)
        fake = flow.backward_simulation(
            lambda x, t: generator(x, t, text, residuals), noise[4][:, :, :1], noise[:4], flow.sigma_schedule(4, 3), 3
        )
        x_t = flow.add_noise(fake.detach() if cut else fake, noise[4], level)
        return adversarial_loss(discriminator(x_t, flow.timestep(level), text, traj))

    loss(cut=True).backward()
    assert all(p.grad is None for p in adapter.parameters())
    loss(cut=False).backward()
    assert all(block.project.weight.grad.abs().max() > 0 for block in adapter.blocks)
    assert all(p.grad is None for network in (generator, backbone) for p in network.parameters())


def test_the_adversarial_loss_teaches_a_controlnet_at_every_step_of_the_generator(files, monkeypatch):
    """Where the generator's sampling ends at random, each of its four levels comes up and gives a gradient."""
    generator = VideoDiT.from_pretrained(files["generator"], "FastGenerator")
    shape = ControlNetConfig(**vars(generator.config))
    adapter = ControlNetAdapter(shape)
    adapter.copy_generator(generator)
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.1)
    save_network("adapter.safetensors", "SlowAdapter", shape, adapter.state_dict())
    norms, draws, make_draw, stepped = {}, [], finetune_hybrid.make_draw, optim.clip_and_step

    def watched_draw(samples, turn, cfg, *rest):
        draws.append((turn, make_draw(samples, turn, cfg, *rest)))
        return draws[-1][1]

    def watched_step(network, optimizers, clip):
        norm = stepped(network, optimizers, clip)
        if isinstance(network, ControlNetAdapter):
            norms.setdefault(draws[-1][1].exit_step, []).append(norm.item())
        return norm

    monkeypatch.setattr(finetune_hybrid, "make_draw", watched_draw)
    monkeypatch.setattr(optim, "clip_and_step", watched_step)
    quiet = {"batch": 1, "compile": False, "dtype": "float32", "sample_every": 0, "save_every": 1000}
    own = {"ratio": 1, "diffusion_first": 0, "adapter_start": 0, "use_diffusion": False, "muon": False}
    finetune_hybrid.main(finetune_hybrid.Config(**files, **quiet, **own, steps=40, exit_step="random"))
    assert sorted(norms) == [0, 1, 2, 3] and all(min(values) > 0 for values in norms.values())
    assert sum(map(len, norms.values())) == 40
    # The step follows from seed and turn alone, so it is the same on every rank.
    steps = {turn: draw.exit_step for turn, draw in draws}
    assert steps == {turn: draw_integer(4, 0, turn, flow.EXIT_STEP) for turn in range(80)}
    assert all(draw.level[:, 1:].min() >= 0.02 and draw.level.max() <= 0.98 for _, draw in draws)


def test_the_r1_penalty_compares_true_videos_with_their_neighbours(files, monkeypatch):
    """Deviation 0.1 in later frames, the same noise level and noise; without it the discriminator sees two videos."""
    seen, features = [], DiffusionDiscriminator.features
    monkeypatch.setattr(
        DiffusionDiscriminator, "features", lambda self, x, *rest: seen.append(x) or features(self, x, *rest)
    )
    quiet = {"batch": 2, "compile": False, "dtype": "float32", "sample_every": 0, "save_every": 1000, "steps": 3}
    own = {"ratio": 5, "diffusion_first": 0, "adapter_start": 0, "muon": False}
    weights = []
    for r1 in (0.0, 100.0):
        seen.clear()
        finetune_hybrid.main(finetune_hybrid.Config(**files, **quiet, **own, name=f"r{r1}", r1=r1))
        assert len(seen) == 3 * (2 + (r1 > 0))
        weights.append(read_safetensors(Path(f"runs/r{r1}/classifier.safetensors"))[1]["logit.weight"].read())
    true, _, near = seen[:3]
    level = (near - true)[:, :, 1:]
    assert torch.equal(true[:, :, 0], near[:, :, 0]) and 0 < level.std() < 0.1 and level.abs().max() > 0
    assert not torch.equal(*weights)  # from the second step on: the first logits are zero


# --- when who learns --------------------------------------------------------------------------------------------------

PLANS = [  # steps, ratio, diffusion_first, adapter_start
    (600, 5, 300, 60),  # the defaults
    (1000, 5, 0, 0),  # the paper's
    (300, 5, 0, 60),
    (40, 3, 10, 7),  # parts that end amid a cycle
    (12, 1, 4, 3),
    (7, 10, 2, 0),  # no cycle comes to its end
]


@pytest.mark.parametrize("steps, ratio, first, rest", PLANS)
def test_phases(steps, ratio, first, rest):
    plan = [phase(step, steps=steps, ratio=ratio, diffusion_first=first, adapter_start=rest) for step in range(steps)]
    assert [now.judged for now in plan] == [False] * first + [True] * (steps - first)
    learns = [step for step, now in enumerate(plan) if now.adapter_learns]
    resting = range(first, first + rest)
    assert learns == [step for step in range(ratio - 1, steps, ratio) if step not in resting]  # the last of each cycle
    for step, now in enumerate(plan):
        start, end = (first, steps) if step >= first else (0, first)
        assert (now.begin, now.end) == (start, end) and start <= step < end
        assert now.adapter_begin == start + (rest if step >= first else 0)
        if now.adapter_learns:
            assert now.adapter_begin <= step < end  # so lambda goes from its first value to its last


def test_progress_of_the_defaults():
    at = {step: phase(step, 600, 5, diffusion_first=300, adapter_start=60) for step in (0, 299, 300, 599)}
    assert at[0] == (False, False, 0, 0, 300) and at[299] == (False, True, 0, 0, 300)
    assert at[300] == (True, False, 300, 360, 600)  # the discriminator begins, the adapter rests
    assert at[599] == (True, True, 300, 360, 600)


@pytest.fixture
def files(here):
    """Small networks in the test's own folder, and the options that name them."""
    torch.manual_seed(0)
    small, wide = (DiTConfig(*shape, 64, 32, channels=24) for shape in ((32, 64, 2, 1), (256, 64, 2, 6)))
    for name, network, shape in (("fast", "FastGenerator", small), ("slow", "SlowGenerator", wide)):
        generator = VideoDiT(shape)
        torch.nn.init.normal_(generator.head.head.weight, std=0.02)
        save_network(f"{name}.safetensors", network, shape, generator.state_dict())
    shape = AdapterConfig(32, 1, hidden=16, channels=24)
    save_network("adapter.safetensors", "SlowAdapter", shape, ResNetAdapter(shape).state_dict())
    return {"generator": "fast.safetensors", "backbone": "slow.safetensors", "adapter": "adapter.safetensors"}


def test_the_discriminator_sees_what_the_adapter_makes_now(files, monkeypatch):
    """A run of stage 3: fakes are made at every step of the discriminator, by the adapter as it is."""
    adapter, made, updates = [], [], []
    read, sampler, stepped = finetune_hybrid.read_adapter, flow.backward_simulation, optim.clip_and_step

    def state():
        return torch.cat([p.detach().flatten() for p in adapter[0].parameters()])

    def watched_read(*args, **more):
        adapter.append(read(*args, **more))
        return adapter[0]

    def watched_sampler(*args):
        if not torch.is_grad_enabled():
            made.append((len(updates), state()))
        return sampler(*args)

    def watched_step(network, *args):
        before = state()
        norm = stepped(network, *args)
        updates.append(("adapter" if network is adapter[0] else "classifier", before, state()))
        return norm

    monkeypatch.setattr(finetune_hybrid, "read_adapter", watched_read)
    monkeypatch.setattr(flow, "backward_simulation", watched_sampler)
    monkeypatch.setattr(optim, "clip_and_step", watched_step)
    finetune_hybrid.main(
        finetune_hybrid.Config(
            **files, steps=7, ratio=2, diffusion_first=2, adapter_start=1, batch=1, compile=False, dtype="float32"
        )
    )
    kinds = [kind for kind, *_ in updates]
    assert kinds == ["adapter", *["classifier", "classifier", "adapter"] * 2, "classifier"]
    assert [number for number, _ in made[:-4]] == [1, 2, 4, 5, 7]  # the last are the final samples
    for number, seen in made[:-4]:
        assert updates[number][0] == "classifier" and torch.equal(seen, updates[number][1])  # the adapter as it is
        kind, before, after = updates[number - 1]
        assert torch.equal(seen, after) and torch.equal(before, after) == (kind == "classifier")


def test_fakes_have_the_true_videos_conditions_at_every_step(files, monkeypatch):
    """The same first frames, texts and trajectories."""
    seen, judged, made = [], [], []
    sampler, features = flow.backward_simulation, DiffusionDiscriminator.features
    judge = Classifier.forward

    def watched_sampler(*args):
        if not torch.is_grad_enabled():
            made.append(args)
        return sampler(*args)

    def watched_features(self, x_t, t, text):
        if not torch.is_grad_enabled():  # the discriminator's own step
            seen.append([x_t[:, :, 0], text, t])
        return features(self, x_t, t, text)

    def watched_judge(self, features, text, traj):
        if len(text) == 4:  # true videos and fakes
            judged.append([text, traj])
        return judge(self, features, text, traj)

    monkeypatch.setattr(flow, "backward_simulation", watched_sampler)
    monkeypatch.setattr(DiffusionDiscriminator, "features", watched_features)
    monkeypatch.setattr(Classifier, "forward", watched_judge)
    finetune_hybrid.main(
        finetune_hybrid.Config(
            **files, steps=4, ratio=2, diffusion_first=0, adapter_start=0, batch=2, compile=False, dtype="float32"
        )
    )
    assert (len(seen), len(judged)) == (8, 4) and len(made) == 4 + 4  # and the final samples
    true, fake = seen[::2], seen[1::2]
    alike = [
        all(map(torch.equal, *two)) and all(torch.equal(*part.chunk(2)) for part in parts)
        for *two, parts in zip(true, fake, judged, strict=True)
    ]
    assert alike == [True] * 4
    assert not any(torch.equal(a[1], b[1]) for a, b in pairwise(true))  # true videos are new at every step


@pytest.mark.parametrize("changes, message", [
    ({"use_gan": False, "use_diffusion": False}, "no loss is left; use one or both"),
    ({"steps": 160}, "--adapter_start 60 --diffusion_first 100: give less than --steps 160 in all"),
    ({"use_diffusion": False}, "--diffusion_first 100: needs --use_diffusion true"),
])  # fmt: skip
def test_options_that_contradict_one_another(changes, message):
    with pytest.raises(UserError, match=message):
        finetune_hybrid.check(finetune_hybrid.Config(**changes))
    finetune_hybrid.check(finetune_hybrid.Config())
