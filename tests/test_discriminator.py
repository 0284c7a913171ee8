"""The discriminator learns alone, passes its gradient on, and sees what each of its attentions is for."""

import math
from dataclasses import replace

import pytest
import torch

import discriminator as discriminators
from core import optim
from discriminator import Classifier, DiffusionDiscriminator, adversarial_loss, discriminator_loss, r1_penalty
from model import PRESETS, VideoDiT


def judge(**switches):
    """A classifier, and features, text and a trajectory of two videos."""
    torch.manual_seed(0)
    classifier = Classifier(replace(discriminators.PRESETS["small"], **switches))
    torch.nn.init.normal_(classifier.logit.weight)
    for name, weight in classifier.named_parameters():
        if name.endswith("out_proj.weight"):  # some start at zero, which would hide what their attention sees
            torch.nn.init.normal_(weight, std=0.1)
    return classifier, torch.randn(3, 2, 12, 256), torch.randn(2, 32, 64), torch.randn(2, 24, 3, 4, 4)


def test_losses_by_hand():
    zero, large = torch.zeros(3), torch.full((3,), 50.0)
    assert adversarial_loss(zero).item() == pytest.approx(math.log(2))
    assert adversarial_loss(large).item() == pytest.approx(0, abs=1e-9)  # taken for real: nothing left to gain
    assert adversarial_loss(-large).item() == pytest.approx(50)
    assert discriminator_loss(zero, zero).item() == pytest.approx(2 * math.log(2))
    assert discriminator_loss(large, -large).item() == pytest.approx(0, abs=1e-9)
    assert discriminator_loss(-large, large).item() == pytest.approx(100)
    assert r1_penalty(torch.tensor([1.0, 4.0]), torch.tensor([2.0, 1.0])).item() == pytest.approx(5)


def test_the_classifier_alone_learns_all_of_it_and_the_gradient_reaches_the_latent():
    classifier, _, text, traj = judge()
    discriminator = DiffusionDiscriminator(VideoDiT(PRESETS["small"]), classifier)
    x_t, t = torch.randn(2, 24, 3, 4, 4), torch.tensor([[0.0, 400, 400], [0, 900, 900]])
    x_t.requires_grad_()
    logits = discriminator(x_t, t, text, traj)
    assert logits.shape == (2,) and logits[0] != logits[1]
    adversarial_loss(logits).backward()
    assert x_t.grad.abs().amax((1, 2, 3, 4)).min() > 0
    assert all(p.grad is None for p in discriminator.backbone.parameters())
    assert all(p.grad.any() for p in classifier.parameters())


# What each attention is alone to see. The frozen backbone reads the text too: it enters here by the features.
SEES = {"semantic": {"first frame", "text"}, "trajectory": {"trajectory"}, "video": {"first frame", "later frames"}}


@pytest.mark.parametrize("alone", SEES)
def test_each_attention_sees_its_part_and_can_be_switched_off(alone):
    classifier, features, text, traj = judge(**{name: name == alone for name in SEES})
    first, later = features.clone(), features.clone()
    first[:, :, :4] += torch.randn(256)
    later[:, :, 4:] += torch.randn(256)
    with torch.no_grad():
        logit = classifier(features, text, traj)
        other = {
            "first frame": classifier(first, text, traj),
            "later frames": classifier(later, text, traj),
            "text": classifier(features, torch.randn_like(text), traj),
            "trajectory": classifier(features, text, torch.randn_like(traj)),
        }
    assert {name for name, value in other.items() if not torch.equal(value, logit)} == SEES[alone]


def test_padding_of_the_text_is_not_seen():
    """Wan's prompts are padded to 512 rows of zeros, which would take a quarter of the attention."""
    classifier, features, text, traj = judge()
    text[0, 20:], text[1, 5:] = 0, 0
    padded = classifier(features, text, traj)
    for i, length in enumerate((20, 5)):
        alone = classifier(features[:, i : i + 1], text[i : i + 1, :length], traj[i : i + 1])
        torch.testing.assert_close(padded[i : i + 1], alone, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(classifier(features, text + 1e-3 * (text == 0), traj), padded)
    assert classifier(features, torch.zeros_like(text), traj).isfinite().all()  # a dropped caption


def test_a_feed_forward_follows_the_attentions():
    classifier, features, text, traj = judge(feed_forward=96)
    before = classifier(features, text, traj)
    before.sum().backward()
    assert [layer.weight.grad.abs().max() > 0 for block in classifier.blocks for layer in block.ffn[1::2]] == [True] * 6
    torch.nn.init.zeros_(classifier.blocks[1].ffn[3].weight)
    assert not torch.allclose(classifier(features, text, traj), before)
    shapes = [replace(discriminators.PRESETS["wan5b"], feed_forward=n) for n in (0, 4096)]
    with torch.device("meta"):
        plain, wide = (sum(p.numel() for p in Classifier(shape).parameters()) for shape in shapes)
    assert plain == 67_534_849 and wide - plain == 3 * (2 * 1024 * 4096 + 4096 + 3 * 1024)


def test_presets_fit_their_networks():
    for name, shape in discriminators.PRESETS.items():
        network = PRESETS[name]
        assert (shape.dim, shape.text_dim, shape.channels) == (network.dim, network.text_dim, network.channels)
        assert shape.patch == network.patch and shape.position_dim == network.dim // network.heads
        assert max(shape.feature_blocks) == network.layers - 1 and shape.cautious == (name == "small")


@pytest.mark.parametrize("cautious, rate", [(False, 8e-6), (False, 2e-6), (True, 2e-6)])
def test_wan5b_begins_so_that_it_learns_at_its_own_rate(cautious, rate):
    """A quarter of the width, features that a mean over tokens tells apart, 250 updates of AdamW.

    Under Adam a layer's output moves by rate times width, so 2e-6 at the full width is 8e-6 here. Plain Xavier learns
    at either; the toy's cautious beginning hardly at 2e-6, and at 8e-6 much later than the plain one.
    """
    torch.manual_seed(0)
    shape = replace(discriminators.PRESETS["wan5b"], dim=768, text_dim=1024, hidden=256, cautious=cautious)
    classifier = Classifier(shape)
    optimizer = optim.adamw(classifier)
    assert optimizer.param_groups[0]["betas"] == (0.0, 0.999)
    optim.set_lr([optimizer], rate)
    draw, way = torch.Generator().manual_seed(1), torch.randn(3, 1, 1, 768)
    sign, losses = torch.tensor([1.0, 1.0, -1.0, -1.0])[None, :, None, None], []
    for step in range(250):
        features = torch.randn(3, 4, 4, 768, generator=draw) + 0.5 * sign * way
        text = torch.randn(2, 4, 1024, generator=draw).repeat(2, 1, 1)  # those of a fake are those of a true video
        traj = torch.randn(2, 48, 1, 4, 4, generator=draw).repeat(2, 1, 1, 1, 1)
        logits = classifier(list(features), text, traj)
        if step == 0:  # a cautious one begins at zero
            assert not logits.any() if cautious else logits.abs().min() > 1e-3
        loss = discriminator_loss(*logits.chunk(2))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        if sum(losses[-10:]) < 5 and len(losses) >= 10:
            break
    last = sum(losses[-10:]) / 10
    assert last > 1 if cautious else last < 0.5, last
