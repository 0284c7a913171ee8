"""Every command and every figure of the README pages is real."""

import json
import re
import shlex
from pathlib import Path

import pytest

from core import tables
from tools import bench
from toy import evaluate

ROOT = Path(evaluate.__file__).parent
PAGES = ("README.md", "checkpoints/tiny/README.md")
# The same command made short. Later flags win.
SHORT = {
    "sample.py": ["--steps", 2],
    "data.py": [],
    "trajectory.py": [],
    "evaluate.py": ["--videos", 4, "--steps", 2, "--batch", 4, "--compile", "false", "--out", "runs/e/rows.json"],
    "train_codec.py": ["--steps", 2, "--batch", 2],
    "train_slow_generator.py": ["--steps", 2, "--batch", 2, "--compile", "false"],
    "train_slow_adapter.py": ["--steps", 2, "--batch", 2, "--compile", "false"],
    "distill_fast.py": ["--steps", 5, "--batch", 2, "--compile", "false"],
    "finetune_hybrid.py": ["--steps=5", "--diffusion_first=0", "--adapter_start=0", "--batch=2", "--compile=false"],
}


def commands() -> list[str]:
    blocks = [b for page in PAGES for b in re.findall(r"```sh\n(.*?)```", (ROOT / page).read_text(), flags=re.DOTALL)]
    lines = [re.sub(r"\s+#.*", "", line).strip() for block in blocks for line in block.splitlines()]
    return sorted({line for line in lines if line})


@pytest.mark.parametrize("command", commands())
def test_command(command, run):
    words = shlex.split(command)
    if words[0] == "make":  # `make test` is what runs this, and `make demo` installs: only their targets are checked
        assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)
        return
    processes = 1
    if words[0] == "torchrun":
        processes = int(words.pop(1).removeprefix("--nproc_per_node="))
    launcher, script, *flags = words
    assert launcher in ("python", "torchrun") and script in SHORT
    short = [] if "--help" in flags else SHORT[script]
    job = run(script, *flags, *short, processes=processes)
    assert job.returncode == 0, job.stderr[-2000:]


def test_results_table_is_the_committed_one():
    rows = json.loads((ROOT / "results/tiny.json").read_text())
    assert tables.markdown(rows) in (ROOT / "README.md").read_text()
    by_name = {(row["name"], row["objects"]): row for row in rows}
    alone, slow, fast = (
        by_name[name, "all"] for name in ("SlowGenerator", "SlowGenerator + SlowAdapter", "FastGenerator + FastAdapter")
    )
    assert slow["mask_iou"] > alone["mask_iou"] and slow["box_iou"] > alone["box_iou"]  # the adapter does the work
    assert alone["mask_iou"] < 0.5
    assert slow["videos"] >= 256 and slow["mask_iou"] >= 0.88 and slow["box_iou"] >= 0.88
    assert 0.9 <= slow["sharpness"] <= 1.1 and slow["prompt_accuracy"] >= 0.9
    assert 0.1 < slow["clockwise_when_untold"] < 0.9  # where captions don't tell, both directions appear
    assert slow["steps"] == 50 and fast["steps"] == 4 and fast["fvd"] <= slow["fvd"]
    assert 0.9 <= fast["sharpness"] <= 1.1
    assert fast["mask_iou"] >= slow["mask_iou"] - 0.02 and fast["box_iou"] >= slow["box_iou"] - 0.02
    assert fast["seconds_per_video"] <= slow["seconds_per_video"] / 10
    assert {(way["name"], n) for way in (slow, fast) for n in (1, 2, 3)} <= by_name.keys()


def test_ablation_table_is_the_committed_one_and_says_what_the_page_says():
    rows = json.loads((ROOT / "results/ablation.json").read_text())
    page = (ROOT / "README.md").read_text()
    assert tables.markdown([row for row in rows if row["steps"] >= 4]) in page
    assert tables.markdown(rows) == (ROOT / "results/ablation.md").read_text().strip()
    assert all(row["videos"] >= 256 and row["seeds"] == 3 for row in rows if "hybrid" in row["name"])
    at = {n: {row["name"]: row for row in rows if row["steps"] == n} for n in (4, 2, 1)}
    full, no_gan = "FlashMotion: hybrid, decaying scale", "hybrid without GAN loss"
    as_is, no_video = "FastGenerator + SlowAdapter", "discriminator without video attention"
    for table in at.values():  # every bound outside the range of seeds
        assert table["hybrid without diffusion loss"]["mask_iou_range"][1] < table[full]["mask_iou_range"][0] - 0.03
        assert table[no_gan]["sharpness_range"][1] < table[full]["sharpness_range"][0] - 0.05
        assert table[no_gan]["fvd_range"][0] > 1.5 * table[full]["fvd_range"][1]
        assert table[as_is]["mask_iou"] < table[full]["mask_iou_range"][0]
        assert table[as_is]["box_iou"] < table[full]["box_iou_range"][0]
    assert at[4][no_gan]["fvd"] > 2 * at[4][full]["fvd"]
    assert at[1][as_is]["fvd"] > 1.5 * at[1][full]["fvd_range"][1]
    assert f"({at[1][as_is]['fvd']:.2f} against {at[1][full]['fvd']:.2f})" in page
    assert all(at[n][as_is]["fvd"] < at[n][full]["fvd"] for n in (4, 2))  # other than in the paper: the page says so
    scales = {scale: at[4][f"hybrid, {scale} scale"] for scale in ("constant", "growing")} | {"decaying": at[4][full]}
    crisp = {scale: row["sharpness_range"] for scale, row in scales.items()}
    assert [scale for scale, (low, high) in crisp.items() if low >= 0.9 and high <= 1.1] == ["decaying"]
    assert crisp["constant"][1] == pytest.approx(1.3, abs=0.02)  # "up to 30% too crisp"
    for score in ("mask_iou", "box_iou"):
        assert max(scales, key=lambda scale: scales[scale][score]) == "decaying"
    assert scales["constant"]["fvd_range"][0] < scales["decaying"]["fvd"] < scales["constant"]["fvd_range"][1]
    assert scales["growing"]["fvd_range"][1] < scales["decaying"]["fvd_range"][0]
    for score in ("mask_iou", "sharpness", "fvd"):
        for part in ("semantic", "trajectory"):
            low, high = at[4][f"discriminator without {part} attention"][f"{score}_range"]
            assert low < at[4][full][f"{score}_range"][1] and high > at[4][full][f"{score}_range"][0], (part, score)
        ranges = [at[4][name][f"{score}_range"] for name in (no_video, no_gan)]
        assert max(low for low, _ in ranges) < min(high for _, high in ranges), score


def test_speed_is_the_committed_one_and_ahead_everywhere():
    rows = json.loads((ROOT / "results/bench-cpu.json").read_text())
    names = bench.Row.__dataclass_fields__
    own = [bench.Row(**{name: row[name] for name in names}) for row in rows]
    table, page = bench.markdown(own), (ROOT / "README.md").read_text()
    assert table == (ROOT / "results/bench-cpu.md").read_text().strip()
    beside = [row for row in own if row.name.startswith(("DiT", "4 steps", "VAE", "attention")) and row.reference]
    assert len(beside) == 14 and bench.markdown(beside) in page
    assert all(row.ratio < 1 for row in beside)
    ratio = {(row.name, row.dtype, row.compiled): row.ratio for row in own}
    for fused in ("", ", reference fused"):
        assert ratio[f"DiT forward{fused}", "float32", False] <= 0.93
        assert ratio[f"DiT forward{fused}", "bfloat16", True] <= 0.85
    assert ratio["4 steps with adapter", "bfloat16", True] <= 0.8
    assert ratio["VAE decode", "bfloat16", False] <= 0.8
    assert ratio["VAE decode, peak memory", "bfloat16", False] <= 0.6
    flat = [row.ours for row in own if "piece by piece" in row.name]
    assert len(flat) == 2 and max(flat) <= 1.01 * min(flat)
    growth = next(row.ratio for row in own if row.name.startswith("block: b / a"))
    assert 0.8 < growth < 1.25 and f"the ratio of both terms is {growth:.2f} of the predicted" in page
    error = {row.name: row.ours for row in own}
    assert error["--memory medium: error of a forward pass"] == 0  # "the same to the bit"
    error = error["--memory low: error of a forward pass"]
    assert f"differs by a relative {error:.2f}" in page


def test_training_times_are_the_committed_ones():
    rows, page = json.loads((ROOT / "results/training.json").read_text()), (ROOT / "README.md").read_text()
    for row in rows:
        assert f"stage {row['stage']} took {row['seconds'] / 60:.0f} minutes" in page
    assert [row["stage"] for row in rows] == [1, 2, 3] and sum(row["seconds"] for row in rows) < 6 * 3600
    assert rows[0]["mask_iou"] >= 0.88 and f"comes to a mask IoU of {rows[0]['mask_iou']:.3f}" in page


def test_memory_of_the_real_model_is_the_committed_one():
    cost = json.loads((ROOT / "results/wan5b-cpu.json").read_text())
    page, peak, low = (ROOT / "README.md").read_text(), max(cost["peak_gib"].values()), cost["low"]["peak_gib"]
    assert peak < 14 and f"a peak of {peak:.1f} GiB" in page
    low = max(value for part, value in low.items() if part != "encode prompt")
    assert low < 9 and f"`--memory low` of {low:.1f} GiB" in page


def test_links_lead_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)]+)\)", (ROOT / page).read_text()):
            assert target.startswith("https://") or ((ROOT / page).parent / target).exists(), target


def test_memory_at_scale_is_what_its_formula_gives():
    """2 bytes of a frozen parameter, 20 of a trained one (16 of the fake score), over W; the rest over S."""
    rows = {}
    for line in (ROOT / "docs/SCALE.md").read_text().splitlines():
        if line.endswith(" GB |"):
            stage, _, _, kept, *cells = line.strip("| ").split(" | ")
            rows[stage] = (sum(map(int, kept.split(" + "))), [int(cell.removesuffix(" GB")) for cell in cells])
    generator, resnet, control, classifier = 5.000e9, 0.018e9, 5.283e9, 0.068e9
    held = {
        "1, ResNet": 2 * generator + 20 * resnet,
        "1, ControlNet": 2 * generator + 20 * control,
        "2": (2 + 20 + 16) * generator,
        "3, ResNet": 4 * generator + 20 * (resnet + classifier),
        "3, ControlNet": 4 * generator + 20 * (control + classifier),
    }
    assert rows.keys() == held.keys()
    for stage, (kept, cells) in rows.items():
        activations = kept * 2 * 27280 * 3072 * 30 + 5e9
        for (gpus, share), cell in zip(((1, 1), (4, 1), (4, 4), (8, 1), (8, 8)), cells, strict=True):
            assert cell == round((held[stage] / gpus + activations / share + 0.7e9) / 1e9)
