"""Clips of several shapes: prepared each in its own, and read so that all of a step are of one."""

import json
import re
import shutil

import nets
import numpy as np
import pytest
import torch
from conftest import refused
from test_prepare_clips import write_plain

import discriminator as discriminators
import finetune_hybrid
import train_slow_adapter
from core.record import checksum
from core.weights import write_safetensors
from data import ClipLatents, training_data
from tools import prepare_clips
from toy.codec import ToyCodec
from toy.latents import ToyLatents
from wan.codec import WanCodec

SIZES = {"square": (48, 48), "wide": (32, 64)}  # height, width
LATENTS = {"square": (24, 9, 12, 12), "wide": (24, 9, 8, 16)}
KINDS = ["square", "wide", "square"] * 6 + ["wide", "wide"]  # 12 square clips and 8 wide ones
NEGATIVE = "a grey square"


def write_clip(folder, number: int, size: tuple[int, int], length: int = 9) -> None:
    """A square goes to the right before a background of its own colour."""
    frames = np.full((length, *size, 3), 20 + 8 * number, np.uint8)
    for t in range(length):
        frames[t, 8:20, 4 + t : 16 + t] = (200, 40, 40)
    boxes = {"0": [4, 8, 16, 20], str(length - 1): [3 + length, 8, 15 + length, 20]}
    write_plain(folder, f"{number:02}", boxes, frames, f"a red square, number {number}")


@pytest.fixture(scope="module")
def both(tmp_path_factory):
    """A folder of clips, and the shards that they become."""
    root = tmp_path_factory.mktemp("shapes")
    for number, kind in enumerate(KINDS):
        write_clip(root / "both", number, SIZES[kind])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ToyCodec, "negative", NEGATIVE)
        patch.setattr(ToyCodec, "area", 48 * 48)  # what small clips have
        prepare_clips.main(prepare_clips.Config(source=str(root / "both"), out=str(root / "both shards"), size="auto"))
    return root / "both shards"


@pytest.mark.parametrize("batch", [1, 2, 3, 8, 16])
def test_a_step_is_of_one_shape_and_an_epoch_shows_every_clip(both, batch):
    data = ClipLatents(both, 32, seed=3, batch=batch)
    held_out = {n for n in range(len(KINDS)) if all(n not in clips for clips in data.shapes)}
    assert len(held_out) == 4 and {KINDS[n] for n in held_out} == {"square"}  # the most frequent
    steps, orders = 2 * -(-8 // batch), []  # of the squares that are left, and of the wide ones
    for first in (0, steps, 2 * steps):  # of three epochs
        picks = [[data.pick((first + step) * batch + i) for i in range(batch)] for step in range(steps)]
        assert all(len({KINDS[n] for n in step}) == 1 for step in picks)
        assert {n for step in picks for n in step} == set(range(len(KINDS))) - held_out
        assert sum(map(len, picks)) - 16 < 2 * max(batch, 1)  # few come twice
        orders.append(picks)
    assert orders[0] != orders[1] != orders[2]


def test_batches_stack_and_carry_their_clips_parts(both):
    data = ClipLatents(both, 32, seed=3, batch=3)
    seen = set()
    for step in range(6):
        samples = range(3 * step, 3 * step + 3)
        x0, text, traj = data.batch(list(samples), "box")
        kind = KINDS[data.pick(samples[0])]
        assert x0.shape == traj.shape == (3, *LATENTS[kind]) and text.shape == (3, 32, 64)
        wanted = ToyCodec().encode_text([f"a red square, number {data.pick(n)}" for n in samples])
        assert torch.equal(text, wanted.bfloat16().float())
        seen.add(kind)
    assert seen == set(SIZES)


def test_seed_and_number_fix_the_order_and_the_four_held_out_are_of_one_shape(both):
    one, same, other = (ClipLatents(both, 32, seed=seed, batch=4) for seed in (1, 1, 2))
    order = [one.pick(n) for n in range(48)]
    assert order == [same.pick(n) for n in reversed(range(48))][::-1] != [other.pick(n) for n in range(48)]
    held_out = ClipLatents(both, 32, "validation", batch=3)
    picked = [held_out.pick(n) for n in range(4)]
    assert len(set(picked)) == 4 and {KINDS[n] for n in picked} == {"square"}
    assert held_out.batch(list(range(4)), "box").traj.shape == (4, *LATENTS["square"])
    assert not set(picked) & {n for clips in ClipLatents(both, 32).shapes for n in clips}


def test_dropped_captions_are_the_empty_prompt_or_the_negative_one(both, monkeypatch):
    """And guidance goes away from the negative one."""
    wanted = ToyCodec().encode_text([NEGATIVE]).bfloat16().float()
    assert torch.equal(ClipLatents(both, 32).unconditional(), wanted) and wanted.any()
    monkeypatch.setattr(ToyCodec, "negative", NEGATIVE)
    for data in (ClipLatents(both, 32, "validation"), ToyLatents(ToyCodec(), **nets.VIDEOS)):
        whole, some, again = (data.batch(list(range(120)), drop_text=share).text for share in (0, 0.5, 0.5))
        negative, empty = (some == data.unconditional()).flatten(1).all(1), ~some.flatten(1).any(1)
        assert 15 < negative.sum() < 45 > empty.sum() > 15 and torch.equal(some, again)
        assert torch.equal(some[~negative & ~empty], whole[~negative & ~empty])


@pytest.mark.parametrize("count", [6, 0])
def test_too_few_clips_of_a_shape_are_one_line(count, tmp_path):
    """Three of each; and a set of which all were rejected."""
    few = tmp_path / "few"
    shards = {f"{n}.video": torch.zeros(LATENTS["square" if n % 2 else "wide"]) for n in range(count)}
    write_safetensors(few / "latents-00000.safetensors", shards, {"made_of": "{}"})
    made_of = {"maps": "pixels", "codec": {}, "shards": {"latents-00000.safetensors": checksum(*few.iterdir())}}
    (few / "config.json").write_text(json.dumps(made_of))
    refused("few: no shape has over 4 clips, of which 4 are held out; prepare more clips", ClipLatents, few, 32)


def test_shards_of_another_preset_and_a_lost_caption_are_one_line(both, tmp_path):
    other = "both shards: was prepared with another preset; pass it with --preset"
    refused(other, training_data, str(both), WanCodec(tmp_path, torch.device("cpu")), 0, 2)
    shutil.copytree(both, tmp_path / "lost")
    (tmp_path / "lost/text-00001.safetensors").unlink()
    lost = r"text-00001\.safetensors: isn't the file that was prepared .*; run python -m"
    refused(lost, training_data, str(tmp_path / "lost"), ToyCodec(), 0, 2)


def test_the_stages_ask_for_their_adapters_maps(both, here):
    """Where there are others, one line names folder, styles and mend; where none are read, none of it matters."""
    for maps in ("pixels", None):
        assert len(training_data(str(both), ToyCodec(), 0, 2, maps)) == 2
    mend = "prepare the clips anew with --maps outline, or give an adapter that reads pixels"
    wanted = f"{both}: holds pixels maps, and the adapter reads outline; {mend}"
    generator, adapter = nets.generator(), nets.adapter(maps="outline")
    slow, fast, light = nets.save(slow_generator=generator, fast_generator=generator, slow_adapter=adapter).values()
    for script, given in (
        (train_slow_adapter, {"generator": slow, "maps": "outline"}),
        (train_slow_adapter, {"generator": slow, "init": light}),
        (finetune_hybrid, {"generator": fast, "backbone": slow, "adapter": light, "diffusion_first": 0}),
    ):
        refused(f"^{re.escape(wanted)}$", script.main, script.Config(data=str(both), steps=100, compile=False, **given))


def test_stage_3_trains_on_clips_of_two_shapes(both, here, monkeypatch):
    """Every step's fakes have the shape of its clips."""
    monkeypatch.setitem(discriminators.PRESETS, "small", nets.JUDGE)
    options = {"data": str(both), "steps": 4, "ratio": 2, "batch": 2, "diffusion_first": 0, "adapter_start": 0}
    finetune_hybrid.main(finetune_hybrid.Config(**options, **nets.of_stage_3(), compile=False, sample_every=0))
    assert (here / "runs/fast_adapter/fast_adapter.safetensors").exists()
