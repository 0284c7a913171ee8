"""toy/evaluate.py: sampling, and the script, with random networks."""

import dataclasses
import json
import math
import re
import shutil
import time
from pathlib import Path

import imageio.v3 as iio
import pytest
import torch

import adapter as adapters
import finetune_hybrid
from core import parallel
from core.config import UserError, parse_config
from core.weights import save_network
from model import PRESETS, VideoDiT
from toy import evaluate
from toy.codec import ToyCodec
from toy.metrics import subset
from toy.world import ToyBatch, ToyWorld

ALONE = parallel.Processes(0, 1, torch.device("cpu"), None)


@pytest.fixture(scope="module")
def world() -> ToyBatch:
    return ToyWorld("test").batch(list(range(16)))


# --- sampling ---------------------------------------------------------------------------------------------------------


def networks(seed: int = 0) -> tuple[VideoDiT, adapters.ResNetAdapter]:
    """One-layer networks with random weights everywhere, so that every input matters."""
    torch.manual_seed(seed)
    generator = VideoDiT(dataclasses.replace(PRESETS["tiny"], dim=32, ffn_dim=64, heads=2, layers=1))
    adapter = adapters.ResNetAdapter(adapters.AdapterConfig(generator.config.dim, 1, hidden=16, channels=16))
    torch.nn.init.xavier_uniform_(generator.head.head.weight)
    torch.nn.init.normal_(adapter.blocks[0].project.weight, std=0.3)
    return generator.requires_grad_(False), adapter.requires_grad_(False)


CFG = evaluate.Config(videos=5, batch=2, steps=2, guidance=1.0, dtype="float32", compile=False)


def test_generate_hands_each_video_its_own_inputs(world):
    codec, few = ToyCodec(), subset(world, range(5))
    seen = []

    def truthful(first, text, empty, traj, samples):
        seen.extend(samples)
        part = subset(few, samples)
        latents = codec.encode_video(part.video)
        assert torch.allclose(first, latents[:, :, :1], atol=1e-5)
        assert torch.equal(text, codec.encode_text(part.captions)) and not empty.any()
        maps = torch.stack([part.trajectory(i).maps("box") for i in range(len(samples))])
        assert torch.equal(traj, codec.encode_video(maps))
        return latents

    video = evaluate.generate(truthful, few, CFG, ALONE, "truth")
    truth = codec.decode_video(codec.encode_video(few.video))
    assert torch.allclose(video, truth, atol=1e-4) and seen == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("kind", ["slow", "fast"])
def test_samples_do_not_depend_on_the_batch(world, kind):
    few, codec = subset(world, range(3)), ToyCodec()

    def run(**changes):
        cfg = dataclasses.replace(CFG, **changes)
        sampler = (
            evaluate.slow_sampler(*networks(), cfg) if kind == "slow" else evaluate.fast_sampler(*networks(), cfg, 2)
        )
        return evaluate.generate(sampler, few, cfg, ALONE, kind)

    in_pairs = run()
    assert torch.allclose(in_pairs, run(batch=3), atol=1e-4)
    given = codec.decode_video(codec.encode_video(few.video[:, :, :1]))
    assert torch.allclose(in_pairs[:, :, :1], given, atol=1e-4)
    assert not torch.allclose(run(seed=1), in_pairs, atol=1e-2)


def test_times_are_of_each_sampler(world):
    """Each takes its turn six times, the first uncounted."""
    turns = []

    def sampler(name, pause):
        def sample(first, text, empty, traj, samples):
            turns.append(name)
            time.sleep(pause if len(turns) > 2 else 0.2)
            return traj

        return sample

    a, b = evaluate.seconds_per_video([sampler("a", 0.02), sampler("b", 0.06)], world, CFG, ALONE)
    assert turns == ["a", "b"] * 6 and 0.02 <= a < 0.05 < b < 0.15


def test_adapter_guidance_and_captions_reach_the_sample(world):
    few = subset(world, range(2))
    generator, adapter = networks()
    calls = []
    adapter.register_forward_hook(lambda *_: calls.append(1))

    def run(batch=few, helper=adapter, trajectory=1.0, both=True, **changes):
        cfg = dataclasses.replace(CFG, **changes)
        sampler = evaluate.slow_sampler(generator, helper, cfg, trajectory, both)
        return evaluate.generate(sampler, batch, cfg, ALONE, "run")

    base = run()
    assert len(calls) == 1  # once a clip, whatever the steps
    assert torch.equal(run(), base)
    mute = dataclasses.replace(few, captions=["", ""])
    for other in (run(helper=None), run(maps="mask"), run(guidance=3.0), run(steps=4), run(shift=1.0), run(batch=mute)):
        assert not torch.allclose(other, base, atol=1e-3)
    # Scale 0 is the other branch: without the text, and with or without the adapter.
    assert torch.allclose(run(guidance=0.0), run(batch=mute), atol=1e-4)
    assert torch.allclose(run(guidance=0.0, both=False), run(batch=mute, helper=None), atol=1e-4)
    assert torch.allclose(run(trajectory=0.0), run(helper=None), atol=1e-4)
    assert not torch.allclose(run(trajectory=2.0), base, atol=1e-3)
    silent = adapters.ResNetAdapter(adapter.config)  # its projection still is zero
    assert torch.equal(run(helper=silent), run(helper=None))


def test_broken_weights_are_the_users_fault(world):
    few = subset(world, range(2))
    with pytest.raises(UserError, match="fast: generates values that are no numbers"):
        evaluate.generate(lambda first, *_: first.expand(-1, -1, 9, -1, -1) * math.nan, few, CFG, ALONE, "fast")


# --- the script -------------------------------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path) -> dict[str, str]:
    """Options that name files of four random networks."""
    options = {}
    for speed in ("slow", "fast"):
        for part, net in zip(("generator", "adapter"), networks(len(options)), strict=True):
            path = tmp_path / f"{speed}_{part}.safetensors"
            save_network(path, f"{speed.title()}{part.title()}", net.config, net.state_dict())
            options[f"{speed}_{part}"] = str(path)
    return options


MEASURES = ["mask_iou", "box_iou", "sharpness", "fvd", "prompt_accuracy"]


def test_main_writes_rows_and_sheet(tmp_path, weights, capsys):
    out = tmp_path / "results" / "rows.json"
    cfg = evaluate.Config(**weights, out=str(out), videos=6, batch=4, steps=2, compile=False)
    evaluate.main(cfg)
    rows = json.loads(out.read_text())
    counts, sizes = ToyWorld("test").batch(list(range(6))).count.unique(return_counts=True)
    slow, fast = "SlowGenerator + SlowAdapter", "FastGenerator + FastAdapter"
    by_count = list(zip(["all", *counts.tolist()], [6, *sizes.tolist()], strict=True))
    expected = [("true video", 0, "all", 6), ("through the codec", 0, "all", 6), ("SlowGenerator", 2, "all", 6)]
    expected += [(slow, 2, *some) for some in by_count] + [("FastGenerator", 4, "all", 6)]
    expected += [(fast, 4, *some) for some in by_count] + [("the same in 8 bits", 4, "all", 6)]
    assert [(row["name"], row["steps"], row["objects"], row["videos"]) for row in rows] == expected
    columns = ("clockwise_when_untold", "seconds_per_video", "command", "machine")
    assert all(list(row) == ["name", "steps", "videos", "objects", *MEASURES, *columns] for row in rows)
    assert rows[0]["mask_iou"] == rows[0]["box_iou"] == rows[0]["sharpness"] == 1 and rows[0]["fvd"] == 0
    assert rows[1]["mask_iou"] > 0.95
    whole = [row for row in rows if row["steps"] and row["objects"] == "all"]
    assert all(row["seconds_per_video"] > 0 and row["fvd"] > 0 for row in whole)
    assert rows[0]["seconds_per_video"] is None
    assert len({row["mask_iou"] for row in whole[:-1]}) == 4  # four ways
    assert whole[-1]["mask_iou"] == pytest.approx(whole[-2]["mask_iou"], abs=0.1)  # rounded, not another
    assert all(row["fvd"] is None for row in rows if row["objects"] != "all")  # too few videos
    assert rows[0]["command"].startswith(f"python -m toy.evaluate --slow_generator {weights['slow_generator']}")
    assert rows[0]["command"].endswith("--videos 6 --steps 2 --batch 4 --compile false")
    assert "threads, torch" in rows[0]["machine"]
    sheet = iio.imread(out.with_suffix(".png"))
    assert sheet.shape[1] == 2 * (9 * 98 + 12) and sheet.shape[0] % (6 * 98 + 12) == 0
    assert iio.imread(out.with_suffix(".gif")).shape == (9, len(counts) * 196, 3 * 196, 3)
    assert {path.name for path in out.parent.iterdir()} == {f"rows.{kind}" for kind in ("json", "md", "png", "gif")}
    printed = capsys.readouterr().out.splitlines()
    assert len(printed) == 1 + len(rows) and len({len(line) for line in printed}) == 1


def test_guidance_table_compares_strengths(tmp_path, weights):
    out = tmp_path / "guidance.json"
    cfg = evaluate.Config(**weights, out=str(out), guidance_table=True, videos=2, batch=2, steps=2, compile=False)
    evaluate.main(cfg)
    rows = json.loads(out.read_text())
    assert [row["name"] for row in rows[:3]] == [
        "no guidance", "guidance 5, adapter in the first branch", "guidance 5, adapter in both",
    ]  # fmt: skip
    assert [row["name"] for row in rows[3:]] == [f"guidance 5, trajectory guidance {w}" for w in ("1.5", "2", "3")]
    assert len({row["fvd"] for row in rows}) == len(rows) == 6  # each another way


def save_run(variant: str, seed: int, weights_seed: int) -> None:
    net = networks(weights_seed)[1]
    file = evaluate.RUNS / f"tiny/{variant}_{seed}/fast_adapter.safetensors"
    save_network(file, "FastAdapter", net.config, net.state_dict())


def test_ablation_reads_the_runs(tmp_path, weights, monkeypatch, capsys):
    """Every variant's runs are found, each with its own adapter; the table has mean and range over them."""
    monkeypatch.chdir(tmp_path)
    cfg = evaluate.Config(**weights, out="rows.json", ablation=True, videos=2, batch=2, steps=5, compile=False)
    with pytest.raises(UserError, match=rf"tiny/{evaluate.METHOD}_0.*: no such run"):
        evaluate.main(cfg)
    assert not Path("rows.json").exists()
    for i, variant in enumerate(evaluate.VARIANTS):
        for seed in range(2):
            save_run(variant, seed, 10 + 2 * i + seed)
    evaluate.main(cfg)
    raw = json.loads(Path("rows.json").read_text())
    assert len({row["fvd"] for row in raw}) == len(raw) == 2 + 1 + 10 * 2 + 2 * (1 + 7 * 2)  # each its own way
    assert [row["run"] for row in raw[:7]] == ["", "", "", "no_diffusion_0", "no_diffusion_1", "no_gan_0", "no_gan_1"]
    rows = evaluate.over_seeds(raw)
    slow, both, method = "SlowGenerator + SlowAdapter", "FastGenerator + SlowAdapter", "FlashMotion: "
    assert [(row["name"], row["steps"], row["seeds"]) for row in rows[:3]] == [(slow, 5, 1), (slow, 4, 1), (both, 4, 1)]
    assert [row["steps"] for row in rows[3:]] == [4] * 10 + [2] * 8 + [1] * 8
    assert {row["name"].removeprefix(method) for row in rows[3:13]} == set(evaluate.VARIANTS.values())
    assert {row["name"] for row in rows if row["name"].startswith(method)} == {
        method + evaluate.VARIANTS[evaluate.METHOD]
    }
    assert all(row["seeds"] == 2 for row in rows[3:13])
    for row in rows[3:13]:
        for key in MEASURES:
            low, high = row[f"{key}_range"]
            assert row[key] == pytest.approx((low + high) / 2, abs=1e-4)
        assert row["mask_iou_range"][0] < row["mask_iou_range"][1]
    assert len({row["fvd"] for row in rows}) == len(rows)  # each its own adapter and steps
    assert f"({rows[3]['fvd_range'][0]} to " in Path("rows.md").read_text()
    sheet = iio.imread("rows.png")
    assert sheet.shape[0] % ((2 + 3 + 10) * 98 + 12) == 0
    for folder in evaluate.RUNS.glob("tiny/no_video_*"):
        shutil.rmtree(folder)
    capsys.readouterr()
    few = {name: evaluate.VARIANTS[name] for name in (evaluate.METHOD, "no_video")}
    monkeypatch.setattr(evaluate, "VARIANTS", few)
    evaluate.main(cfg)
    assert "no_video_0/fast_adapter.safetensors: no such run; the table leaves out: disc" in capsys.readouterr().out
    left = json.loads(Path("rows.json").read_text())
    assert left == [row for row in raw if row["name"] in (slow, both, method + few[evaluate.METHOD])]


def test_a_killed_ablation_goes_on_where_it_was(tmp_path, weights, monkeypatch, capsys):
    """Only what is new is measured: runs added or trained anew, or everything with other settings or networks."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(evaluate, "VARIANTS", {evaluate.METHOD: "hybrid"})
    cfg = evaluate.Config(**weights, out="rows.json", ablation=True, videos=2, batch=2, steps=2, compile=False)
    made, generate = [], evaluate.generate

    def counted(*args):
        made.append(args[-1].split(",")[0])
        if len(made) == stop:
            raise KeyboardInterrupt
        return generate(*args)

    monkeypatch.setattr(evaluate, "generate", counted)
    save_run(evaluate.METHOD, 0, 10)
    run, stop = f"{evaluate.METHOD}_0", 5
    with pytest.raises(KeyboardInterrupt):
        evaluate.main(cfg)
    assert len(json.loads(Path("rows.json").read_text())) == 4
    made, stop = [], None
    evaluate.main(cfg)
    assert made == ["FastGenerator + SlowAdapter", run, "FastGenerator + SlowAdapter", run]
    assert "rows.png: not written" in capsys.readouterr().out and not Path("rows.png").exists()
    rows, made = json.loads(Path("rows.json").read_text()), []
    Path("rows.json").unlink()
    evaluate.main(cfg)
    assert json.loads(Path("rows.json").read_text()) == rows and len(made) == 8  # at once as with a break
    assert Path("rows.png").exists() and "not written" not in capsys.readouterr().out

    def measured_by(cfg: evaluate.Config) -> list[str]:
        made.clear()
        evaluate.main(cfg)
        return made

    save_run(evaluate.METHOD, 1, 11)
    assert measured_by(cfg) == [f"{evaluate.METHOD}_1"] * 3
    save_run(evaluate.METHOD, 0, 12)  # trained anew
    assert measured_by(cfg) == [run] * 3 and measured_by(cfg) == []
    cfg = dataclasses.replace(cfg, seed=1)
    assert len(measured_by(cfg)) == 11
    net = networks(13)[0]
    save_network(weights["fast_generator"], "FastGenerator", net.config, net.state_dict())
    assert len(measured_by(cfg)) == 11
    for text in ("no rows", "3", '{"a": 1}', "[1]", '[{"name": "a"}]'):
        Path("rows.json").write_text(text)
        assert evaluate.measured(Path("rows.json"), {"command": "", "networks": ""}, {"": ""}) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"videos": 1}, "--videos 1: must be at least 2"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"batch": 0}, "--batch 0: must be at least 1"),
        ({"seed": -1}, "--seed -1: must be at least 0"),
        ({"shift": 0.0}, "--shift 0.0: must be at least 0.01"),
        ({"out": "rows.txt"}, "--out rows.txt: the name must end in .json"),
        ({"fast_generator": "no.safetensors"}, "no.safetensors: no such file"),
    ],
)
def test_bad_options(changes, words, weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UserError) as error:
        evaluate.main(evaluate.Config(**{**weights, "compile": False, **changes}))
    assert words in str(error.value) and "\n" not in str(error.value)
    assert sorted(tmp_path.rglob("*")) == before


def test_networks_that_do_not_fit(weights, tmp_path):
    config = adapters.AdapterConfig(64, 2, hidden=16)
    path = Path(weights["slow_adapter"])
    save_network(path, "SlowAdapter", config, adapters.ResNetAdapter(config).state_dict())
    wrong = f"{path}: has 2 blocks of width 64, but {weights['slow_generator']} has 1 blocks of width 32"
    with pytest.raises(UserError, match=re.escape(wrong)):
        evaluate.main(evaluate.Config(**weights, out=str(tmp_path / "rows.json"), compile=False))


def test_errors_end_in_one_line(weights, tmp_path, run):
    (tmp_path / "file").write_text("")
    flags = [f"--{name}={value}" for name, value in weights.items()]
    result = run("toy.evaluate", *flags, f"--out={tmp_path / 'file' / 'rows.json'}", "--compile=false")
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("evaluate.py: ") and "file" in result.stderr


def test_the_method_is_what_stage_3_does_by_itself():
    assert finetune_hybrid.Config.diffusion_scale == evaluate.METHOD and evaluate.METHOD in evaluate.VARIANTS


def test_help_describes_every_flag(capsys):
    with pytest.raises(SystemExit):
        parse_config(evaluate.Config, ["--help"])
    text = capsys.readouterr().out
    assert all(f"--{field.name} " in text for field in dataclasses.fields(evaluate.Config))
