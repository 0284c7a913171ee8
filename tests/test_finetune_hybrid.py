"""Stage 3: what its losses weigh, whom they move, how the gradient reaches the adapter, and when who learns."""

import json
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import nets
import pytest
import torch
from conftest import refused

import discriminator as discriminators
import finetune_hybrid
import flow
from adapter import ControlNetAdapter, ControlNetConfig
from core import optim, runs
from core.noise import rng
from core.weights import read_network
from data import EXIT_STEP
from discriminator import Classifier, ClassifierConfig, DiffusionDiscriminator
from finetune_hybrid import diffusion_weight, phase
from model import VideoDiT
from toy.codec import ToyCodec


@pytest.fixture
def stage_3(here, monkeypatch):
    """stage_3(**options): a run with small networks and videos, in which adversarial learning begins at once."""
    torch.manual_seed(0)
    monkeypatch.setattr(ToyCodec, "learned_on", nets.VIDEOS)
    monkeypatch.setitem(discriminators.PRESETS, "small", nets.JUDGE)
    options = {"batch": 1, "compile": False, "dtype": "float32", "sample_every": 0, "save_every": 1000}
    options |= {"diffusion_first": 0, "adapter_start": 0, "muon": False, **nets.of_stage_3()}
    return lambda **own: finetune_hybrid.main(finetune_hybrid.Config(**options | own))


def test_diffusion_weight():
    """The two readings of the paper's formula, over its 1,000 steps."""
    assert [diffusion_weight("decay", p) for p in (0, 1)] == pytest.approx([10, 1 / 4.1])
    assert [diffusion_weight("grow", p) for p in (0, 1)] == pytest.approx([0.1, 0.35])
    assert diffusion_weight("constant", 0.3) == 1


def test_the_adversarial_loss_teaches_a_controlnet_at_every_step_of_the_generator(stage_3, monkeypatch):
    """Where the generator's sampling ends at random, each of its four levels comes up and gives a gradient."""
    adapter = ControlNetAdapter(ControlNetConfig(**vars(nets.SHAPE)))
    for p in adapter.parameters():
        torch.nn.init.normal_(p, std=0.1)
    nets.save(slow_adapter=adapter)
    draws = nets.watch(monkeypatch, finetune_hybrid, "make_draw", after=lambda draw: draw)
    frozen = nets.watch(monkeypatch, VideoDiT, "from_pretrained", after=lambda network: network)

    def taught(network, *_):
        learns = isinstance(network, ControlNetAdapter)
        return draws[-1].exit_step, learns and min(layer.weight.grad.norm() for layer in network.project)

    steps = nets.watch(monkeypatch, optim, "clip_and_step", taught)
    stage_3(ratio=1, use_diffusion=False, steps=40, exit_step="random")
    assert {exit_step for exit_step, _ in steps[1::2]} == {0, 1, 2, 3}
    assert len(steps) == 80 and all(grad > 0 for _, grad in steps[1::2])
    assert len(frozen) == 2 and all(p.grad is None for network in frozen for p in network.parameters())
    # The step follows from seed and turn alone, so it is the same on every rank.
    expected = [int(torch.randint(4, (), generator=rng(0, turn, EXIT_STEP))) for turn in range(80)]
    assert [draw.exit_step for draw in draws] == expected
    assert all(draw.sigma.min() >= 0.02 and draw.sigma.max() <= 0.98 for draw in draws)


def test_the_r1_penalty_compares_true_videos_with_their_neighbours(stage_3, monkeypatch):
    """Deviation 0.1 in later frames, the same noise level and noise; without it the discriminator sees two videos."""
    seen = nets.watch(monkeypatch, DiffusionDiscriminator, "features", lambda self, x, *_: x)
    weights = []
    for r1 in (0.0, 100.0):
        seen.clear()
        stage_3(batch=2, steps=3, ratio=5, name=f"r{r1}", r1=r1)
        assert len(seen) == 3 * (2 + (r1 > 0))
        config, tensors = read_network(Path(f"runs/r{r1}/classifier.safetensors"), "Classifier", ClassifierConfig)
        weights.append(tensors["logit.weight"].read())
        assert config == nets.JUDGE and tensors.keys() == Classifier(config).state_dict().keys()
    true, _, near = seen[:3]
    level = (near - true)[:, :, 1:]
    assert torch.equal(true[:, :, 0], near[:, :, 0]) and 0 < level.std() < 0.1 and level.abs().max() > 0
    assert not torch.equal(*weights)  # from the second step on: the first logits are zero


PLANS = [  # steps, ratio, diffusion_first, adapter_start
    (1060, 5, 900, 30),  # the defaults
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


def test_the_discriminator_sees_what_the_adapter_makes_now(stage_3, monkeypatch):
    """A run of stage 3: fakes are made at every step of the discriminator, by the adapter as it is."""
    adapter = nets.watch(monkeypatch, finetune_hybrid, "read_adapter", after=lambda network: network)
    updates, stepped = [], optim.clip_and_step

    def state():
        return torch.cat([p.detach().flatten() for p in adapter[0].parameters()])

    # With gradient it is the adapter's step, without the discriminator's own.
    made = nets.watch(
        monkeypatch, flow, "backward_simulation",
        lambda *_: (len(updates), None if torch.is_grad_enabled() else state()),
    )  # fmt: skip

    def watched_step(network, *args):
        before = state()
        norm = stepped(network, *args)
        updates.append(("adapter" if network is adapter[0] else "classifier", before, state()))
        return norm

    monkeypatch.setattr(optim, "clip_and_step", watched_step)
    monkeypatch.setattr(runs, "LOG_EVERY", 1)
    stage_3(steps=7, ratio=2, diffusion_first=2, adapter_start=1, muon=True)
    assert [kind for kind, *_ in updates] == ["adapter", *["classifier", "classifier", "adapter"] * 2, "classifier"]
    made = [(number, seen) for number, seen in made if seen is not None]
    assert [number for number, _ in made] == [1, 2, 4, 5, 7]
    for number, seen in made:
        assert updates[number][0] == "classifier" and torch.equal(seen, updates[number][1])  # the adapter as it is
        kind, before, after = updates[number - 1]
        assert torch.equal(seen, after) and torch.equal(before, after) == (kind == "classifier")
    # The adapter learns from diffusion, then rests, then from both.
    log = [json.loads(line) for line in Path("runs/fast_adapter/log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in log if "discriminator_loss" in line] == list(range(3, 8))
    learned = {line["step"]: line for line in log if "diffusion_loss" in line}
    assert list(learned) == [2, 4, 6] and all(line["diffusion_loss"] > 0 for line in learned.values())
    assert learned[2]["adversarial_loss"] == 0 < min(learned[4]["adversarial_loss"], learned[6]["adversarial_loss"])


def test_fakes_have_the_true_videos_conditions_at_every_step(stage_3, monkeypatch):
    """The same first frames, texts and trajectories."""
    made = nets.watch(monkeypatch, flow, "backward_simulation", lambda *_: torch.is_grad_enabled())
    seen = nets.watch(
        monkeypatch, DiffusionDiscriminator, "features",
        lambda self, x_t, t, text: (torch.is_grad_enabled(), [x_t[:, :, 0], text, t]),
    )  # fmt: skip
    judged = nets.watch(monkeypatch, Classifier, "forward", lambda self, features, text, traj: [text, traj])
    stage_3(steps=4, ratio=2, batch=2, muon=True)
    seen, judged = [its for grad, its in seen if not grad], [its for its in judged if len(its[0]) == 4]  # true and fake
    assert (len(seen), len(judged), made.count(False)) == (8, 4, 4)
    true, fake = seen[::2], seen[1::2]
    for *two, parts in zip(true, fake, judged, strict=True):
        assert all(map(torch.equal, *two)) and all(torch.equal(*part.chunk(2)) for part in parts)
    assert not any(torch.equal(a[1], b[1]) for a, b in pairwise(true))  # true videos are new at every step


def test_a_run_needs_a_loss_and_all_its_phases():
    """Longer phases than the run, and one without its loss, are in test_malformed.py."""
    check, config = finetune_hybrid.check, finetune_hybrid.Config()
    check(config)
    refused("no loss is left; use one or both", check, replace(config, use_gan=False, use_diffusion=False))
    none_left = "--adapter_start 30 --diffusion_first 900: give less than --steps 930 in all"
    refused(none_left, check, replace(config, steps=930))
