"""toy/evaluate.py: sampling, and the script, with random networks."""

import dataclasses
import json
import math
import re
import shutil
from functools import partial
from pathlib import Path

import imageio.v3 as iio
import nets
import pytest
import torch
from conftest import refused

import finetune_hybrid
from adapter import ResNetAdapter, sample_clips
from core import parallel, tables
from flow import Sampling
from model import VideoDiT
from toy import evaluate
from toy.codec import ToyCodec
from toy.segment import segment
from toy.world import World, WorldBatch
from trajectory import Maps


@pytest.fixture(scope="module")
def world() -> WorldBatch:
    return World("validation", (32, 32)).batch(range(8))


def networks(seed: int = 0, maps: Maps = "pixels") -> tuple[VideoDiT, ResNetAdapter]:
    """One-layer networks with random weights everywhere, so that every input matters."""
    torch.manual_seed(seed)
    generator, adapter = nets.generator(0.13, layers=1), nets.adapter(layers=1, maps=maps)
    torch.nn.init.normal_(adapter.blocks[0].project.weight, std=0.3)
    return generator.requires_grad_(False), adapter.requires_grad_(False)


CPU = torch.device("cpu")


@pytest.mark.parametrize("style", ["outline", "pixels"])
def test_generate_hands_each_video_its_own_inputs(world, style, monkeypatch):
    monkeypatch.setattr(evaluate, "BATCH", 2)
    codec, few, seen = ToyCodec(), world.subset(range(5)), []

    def truthful(conditions, samples):
        first, text, traj = conditions
        seen.extend(samples)
        part = few.subset(samples)
        latents = codec.encode_video(part.video)
        assert torch.allclose(first, latents[:, :, :1], atol=1e-5)
        assert torch.equal(text, codec.encode_text(part.captions))
        assert torch.equal(traj, codec.encode_video(part.maps(style, "box", segment)))  # as sample.py paints them
        return [latents]

    video = evaluate.generate(truthful, few, CPU, "truth", style)
    truth = codec.decode_video(codec.encode_video(few.video))
    assert torch.allclose(video, truth, atol=1e-4) and seen == [0, 1, 2, 3, 4]

    def broken(conditions, samples):
        return [conditions.traj * math.nan]

    refused("fast: generates values that are no numbers", evaluate.generate, broken, few, CPU, "fast", style)


def sample(batch, generator, adapter, steps=2, seed=0, slow=True, style="pixels"):
    way = partial(sample_clips, generator, [adapter], Sampling(steps, 60.0), seed, euler=slow)
    return evaluate.generate(way, batch, CPU, "run", style)


@pytest.mark.parametrize("slow", [True, False])
def test_samples_do_not_depend_on_the_batch(world, slow, monkeypatch):
    monkeypatch.setattr(parallel, "fast_bfloat16", lambda device: False)  # which rounds by the batch's size
    few, codec, made = world.subset(range(3)), ToyCodec(), []
    for size, seed in ((2, 0), (3, 0), (2, 1)):
        monkeypatch.setattr(evaluate, "BATCH", size)
        made.append(sample(few, *networks(), seed=seed, slow=slow))
    assert torch.allclose(made[0], made[1], atol=1e-4) and not torch.allclose(made[0], made[2], atol=1e-2)
    given = codec.decode_video(codec.encode_video(few.video[:, :, :1]))
    assert torch.allclose(made[0][:, :, :1], given, atol=1e-4)


def test_times_are_of_each_sampler(world, monkeypatch):
    """Each takes its turn six times; the first is uncounted, and the median is taken."""
    turns, times = [], iter([9, 9, 1, 4, 3, 6, 2, 5, 8, 4, 1, 5])

    def timed(call, device):
        call()
        return next(times)

    monkeypatch.setattr(evaluate, "seconds", timed)
    samplers = [lambda *_, name=name: turns.append(name) for name in "ab"]
    assert evaluate.seconds_per_video(samplers, world, CPU) == [2, 5] and turns == ["a", "b"] * 6


def test_adapter_and_captions_reach_the_sample(world):
    few, (generator, adapter), calls = world.subset(range(2)), networks(), []
    adapter.register_forward_hook(lambda *_: calls.append(1))
    base = sample(few, generator, adapter)
    assert len(calls) == 1  # once a clip, whatever the steps
    assert torch.equal(sample(few, generator, adapter), base)
    alone = sample(few, generator, None)
    others = [sample(few, generator, adapter, **way) for way in ({"style": "outline"}, {"steps": 4}, {"slow": False})]
    others += [alone, sample(dataclasses.replace(few, captions=["", ""]), generator, adapter)]
    assert not any(torch.allclose(other, base, atol=1e-3) for other in others)
    silent = ResNetAdapter(adapter.config)  # its projection still is zero
    assert torch.equal(sample(few, generator, silent), alone)


@pytest.fixture
def options(tmp_path, monkeypatch) -> dict:
    """Of a script with a world of few pixels and four random networks, half of them in each of two folders."""
    monkeypatch.setattr(evaluate, "World", lambda split: World("validation", (32, 32)))
    (slow, slow_adapter), (fast, fast_adapter) = networks(0, "outline"), networks(2)
    nets.save(tmp_path / "slow", slow_generator=slow, slow_adapter=slow_adapter)
    nets.save(tmp_path / "fast", fast_generator=fast, fast_adapter=fast_adapter)
    return {"weights": (str(tmp_path / "slow"), str(tmp_path / "fast")), "compile": False}


def test_main_writes_rows_and_sheet_and_each_adapter_sees_maps_of_its_own_kind(tmp_path, options, monkeypatch, capsys):
    out = tmp_path / "results" / "rows.json"
    seen = nets.watch(monkeypatch, evaluate, "generate", lambda *args: args[-2:])
    evaluate.main(evaluate.Config(**options, out=str(out), videos=6, steps=2))
    rows = json.loads(out.read_text())
    known = ["true video", "through the codec", "the first frame, still", "pasted by mask", "pasted by box"]
    slow, fast = ("SlowGenerator", "SlowGenerator + SlowAdapter"), ("FastGenerator", "FastGenerator + SlowAdapter",
                                                                    "FastGenerator + FastAdapter")  # fmt: skip
    expected = [(name, 0) for name in known] + [(name, 2) for name in slow] + [(name, 4) for name in fast]
    assert [(row["name"], row["steps"]) for row in rows] == expected and all(row["videos"] == 6 for row in rows)
    columns = ("clockwise_unprompted", "seconds_per_video", "command", "machine")
    assert all(list(row) == ["name", "steps", "videos", *evaluate.MEASURES, *columns] for row in rows)
    true, coded, still, by_mask, _, *made = rows
    assert true["thing_error"] == true["fvd"] == 0 and true["seam"] == true["sharpness"] == 1
    assert coded["thing_error"] < by_mask["thing_error"] < still["thing_error"]
    assert all(row["seconds_per_video"] > 0 and row["fvd"] > 0 for row in made) and true["seconds_per_video"] is None
    assert len({(row["thing_error"], row["fvd"]) for row in made}) == 5  # five ways
    assert rows[0]["command"].startswith(f"python -m toy.evaluate --weights {' '.join(options['weights'])}")
    assert rows[0]["command"].endswith("--videos 6 --steps 2 --compile false")
    assert "threads, torch" in rows[0]["machine"]
    sheet = iio.imread(out.with_suffix(".png"))
    assert sheet.shape == (3 * ((1 + 6) * 34 + 12), 2 * (9 * 34 + 12), 3)  # three pairs of clips: maps, truth, made
    assert {path.name for path in out.parent.iterdir()} == {f"rows.{kind}" for kind in ("json", "md", "png")}
    assert capsys.readouterr().out == out.with_suffix(".md").read_text()
    assert len(out.with_suffix(".md").read_text().splitlines()) == 2 + len(rows)
    assert seen[1] == ("SlowGenerator + SlowAdapter, 2 steps", "outline")
    assert seen[3] == ("FastGenerator + SlowAdapter, 4 steps", "outline")
    assert seen[4] == ("FastGenerator + FastAdapter, 4 steps", "pixels")


def save_run(variant: str, seed: int, weights_seed: int) -> None:
    nets.save(evaluate.RUNS / f"{variant}_{seed}", fast_adapter=networks(weights_seed)[1])


def test_ablation_reads_the_runs(tmp_path, options, monkeypatch, capsys):
    """Every variant's runs are found, each with its own adapter; the table has mean and range over them."""
    monkeypatch.chdir(tmp_path)
    cfg = evaluate.Config(**options, out="rows.json", ablation=True, videos=2, steps=5)
    refused(rf"ablation/{evaluate.METHOD}_0.*: no such run", evaluate.main, cfg)
    assert not Path("rows.json").exists()
    for i, variant in enumerate(evaluate.VARIANTS):
        for seed in range(2):
            save_run(variant, seed, 10 + 2 * i + seed)
    evaluate.main(cfg)
    raw = json.loads(Path("rows.json").read_text())
    assert len(raw) == 2 + 1 + 10 * 2 + 2 * (1 + 7 * 2)
    assert len({(row["fvd"], row["hole_psnr"]) for row in raw}) == len(raw)  # each its own way
    assert [row["run"] for row in raw[:7]] == ["", "", "", "no_diffusion_0", "no_diffusion_1", "no_gan_0", "no_gan_1"]
    rows = evaluate.over_seeds(raw)
    slow, both = "SlowGenerator + SlowAdapter", "FastGenerator + SlowAdapter"
    assert [(row["name"], row["steps"], row["seeds"]) for row in rows[:3]] == [(slow, 5, 1), (slow, 4, 1), (both, 4, 1)]
    assert [row["steps"] for row in rows[3:]] == [4] * 10 + [2] * 8 + [1] * 8
    assert {row["name"] for row in rows[3:13]} == set(evaluate.VARIANTS.values())
    assert evaluate.VARIANTS[evaluate.METHOD].startswith("FlashMotion: ")
    assert finetune_hybrid.Config.diffusion_scale == evaluate.METHOD  # what stage 3 does by itself
    assert all(row["seeds"] == 2 for row in rows[3:13])
    assert len({row["fvd"] for row in rows}) == len(rows)  # each its own adapter and steps
    assert rows[3]["fvd"] in Path("rows.md").read_text()
    assert iio.imread("rows.png").shape[0] % ((2 + 3 + 10) * 34 + 12) == 0
    for folder in evaluate.RUNS.glob("no_video_*"):
        shutil.rmtree(folder)
    capsys.readouterr()
    few = {name: evaluate.VARIANTS[name] for name in (evaluate.METHOD, "no_video")}
    monkeypatch.setattr(evaluate, "VARIANTS", few)
    evaluate.main(cfg)
    assert "no_video_0/fast_adapter.safetensors: no such run; the table leaves out: disc" in capsys.readouterr().out
    left = json.loads(Path("rows.json").read_text())
    assert left == [row for row in raw if row["name"] in (slow, both, few[evaluate.METHOD])]


def test_a_measure_that_counts_for_no_seed_is_left_empty():
    about = {"name": "a", "steps": 4, "videos": 2}
    seeds = [about | dict.fromkeys(evaluate.MEASURES, value) | {"prompt_accuracy": None} for value in (1.0, 2.0)]
    (row,) = evaluate.over_seeds(seeds)
    assert row["fvd"] == "1.5 (1.0 to 2.0)" and row["seeds"] == 2
    assert row["prompt_accuracy"] is None and tables.markdown([row]).splitlines()[-1].endswith("|  |")


def test_a_killed_ablation_goes_on_where_it_was(tmp_path, options, monkeypatch, capsys):
    """Only what is new is measured: runs added or trained anew, or everything with other settings or networks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "VARIANTS", {evaluate.METHOD: "hybrid"})
    cfg = evaluate.Config(**options, out="rows.json", ablation=True, videos=2, steps=2)
    made, generate = [], evaluate.generate

    def counted(*args):
        made.append(args[-2].split(",")[0])
        if len(made) == stop:
            raise KeyboardInterrupt
        return generate(*args)

    def measured_by(cfg: evaluate.Config) -> list[str]:
        made.clear()
        evaluate.main(cfg)
        return made

    monkeypatch.setattr(evaluate, "generate", counted)
    save_run(evaluate.METHOD, 0, 10)
    run, stop = f"{evaluate.METHOD}_0", 5
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(cfg)
    assert len(json.loads(Path("rows.json").read_text())) == 4
    stop = None
    assert measured_by(cfg) == ["FastGenerator + SlowAdapter", run] * 2
    assert "rows.png: not written" in capsys.readouterr().out and not Path("rows.png").exists()
    rows = json.loads(Path("rows.json").read_text())
    Path("rows.json").unlink()
    assert len(measured_by(cfg)) == 8
    assert json.loads(Path("rows.json").read_text()) == rows  # at once as with a break
    assert Path("rows.png").exists() and "not written" not in capsys.readouterr().out
    save_run(evaluate.METHOD, 1, 11)
    assert measured_by(cfg) == [f"{evaluate.METHOD}_1"] * 3
    save_run(evaluate.METHOD, 0, 12)  # trained anew
    assert measured_by(cfg) == [run] * 3 and measured_by(cfg) == []
    cfg = dataclasses.replace(cfg, seed=1)
    assert len(measured_by(cfg)) == 11
    nets.save(Path("fast"), fast_generator=networks(13)[0])
    assert len(measured_by(cfg)) == 9  # all but those of the SlowGenerator
    for text in ("no rows", "3", '{"a": 1}', "[1]", '[{"name": "a"}]', '[{"command": ""}]'):
        Path("rows.json").write_text(text)
        assert evaluate.earlier_rows(Path("rows.json"), "") == {}


def test_networks_that_do_not_fit_are_one_line_and_leave_nothing(options, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    nets.save(tmp_path / "slow", slow_adapter=nets.adapter(dim=64))
    before, folder = sorted(tmp_path.rglob("*")), tmp_path / "slow"
    wanted = f"{folder}/slow_adapter.safetensors: was made for a generator of other shape than {folder}/slow_generator"
    refused(f"^{re.escape(wanted)}", evaluate.main, evaluate.Config(**options))
    assert sorted(tmp_path.rglob("*")) == before
