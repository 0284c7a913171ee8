"""The wan5b commands at full width and 27,280 tokens, on pretended GPUs: tests/rehearse.py."""

import gc
import json
from functools import partial

import pytest
import torch
from conftest import ROOT

from core import parallel
from model import DiTConfig
from tests import rehearse
from tests.rehearse import Resident

TABLE = json.loads((ROOT / "results/rehearsed.json").read_text())
WHERE = ("stage", "adapter", "GPUs", "sequence")


@pytest.mark.parametrize("memory, most", [("low", 11), ("high", 18)])
def test_a_video_is_made_within_the_memory_of_small_gpus(memory, most):
    """Each network has gone when the next one comes. Reckoned from two and three blocks; CUDA's own comes on top."""
    peaks = rehearse.extrapolate(partial(rehearse.rehearse_sample, memory, "resnet"), (2, 3))
    assert set(peaks) == {"encode prompt", "encode image and boxes", "denoise", "decode"}
    assert max(peaks.values()) < most, peaks
    rows = [row for row in TABLE if (row["stage"], row["adapter"]) == (f"sample, {memory}", "resnet")]
    assert {row["peak_at"]: row["GB"] for row in rows} == pytest.approx(peaks, rel=0.03)


@pytest.mark.parametrize(
    "stage, kind, world, sequence", [("1", "controlnet", 16, 1), ("2", "none", 8, 8), ("3", "resnet", 8, 1)]
)
def test_the_first_cycle_of_a_stage_meets_no_other_device_and_waits_for_no_number(stage, kind, world, sequence):
    """Step, checkpoint, samples and export, as the first of all those GPUs, with one block of 30."""
    peaks = rehearse.rehearse_stage(stage, kind, world, sequence, layers=1)
    assert list(peaks) == ["step", "checkpoint", "samples", "decode", "export"]
    (row,) = (row for row in TABLE if [row[n] for n in WHERE] == [stage, kind, world, sequence])
    assert min(peaks.values()) > 0.1 and max(peaks.values()) < row["GB"]


def test_the_table_is_what_is_rehearsed():
    """Reckoned from two and three blocks here, and there from five and six."""
    again = next(rehearse.rehearsed((2, 3), [("1", "resnet", 1, 1)]))
    (row,) = (row for row in TABLE if [row[n] for n in WHERE] == ["1", "resnet", 1, 1])
    assert again["GB"] == pytest.approx(row["GB"], rel=0.03) and again["peak_at"] == row["peak_at"]


def test_the_same_cycle_runs_on_real_tensors_and_is_measured(monkeypatch):
    """Of a small network here, in this process alone; `measured` does so at true widths in two."""
    monkeypatch.setitem(rehearse.PRESETS, "wan5b", DiTConfig(64, 128, 2, 2, text_dim=4096, text_tokens=512))
    run = partial(rehearse.rehearse_stage, "1", "controlnet", 1, 1, 2, (2, 4, 4), dtype="float32", sample_every=0)
    assert list(run(resident=Resident())) == list(run()) == ["step", "checkpoint", "export"]
    gc.collect()
    tracker = Resident()
    tracker.clear()
    taken = torch.ones(250_000_000)
    assert rehearse.peak(tracker) == pytest.approx(taken.nbytes / 1e9, rel=0.1)


def test_the_page_shows_the_table():
    """docs/SCALE.md has these figures, in whole GB, and names as fitting what is below 80."""
    page = (ROOT / "docs/SCALE.md").read_text(encoding="utf-8").partition("## Rehearsed")[2].partition("\n## ")[0]
    names = {"resnet": ", ResNet", "controlnet": ", ControlNet", "none": ""}
    for stage, kind in {(stage, kind) for stage, kind, *_ in rehearse.CASES}:
        figures = [f"{row['GB']:.0f} GB" for row in TABLE if (row["stage"], row["adapter"]) == (stage, kind)]
        assert f"| {stage}{names[kind]} | {' | '.join(figures)} |" in page
    measured = [row for row in TABLE if row["measured_GB"]]
    assert [row["stage"][0] for row in measured] == ["1", "2"]
    for row in measured:
        assert row["measured_GB"] == pytest.approx(row["GB"], rel=0.05)
        assert f"is rehearsed at {row['GB']:.2f} GB and takes {row['measured_GB']:.2f} GB" in " ".join(page.split())


def test_the_page_of_the_real_model_shows_what_sampling_needs():
    page = (ROOT / "docs/WAN.md").read_text(encoding="utf-8").partition("## Smaller GPUs")[2].partition("\n## ")[0]
    rows = [row for row in TABLE if row["stage"].startswith("sample")]
    places = {(row["stage"].removeprefix("sample, "), row["adapter"]) for row in rows}
    assert len(places) == 6 and len(rows) == 24
    for stage, kind in places:
        level, *batch = stage.split(", ")
        what = f", {batch[0]}" if batch else ", ControlNet" if kind == "controlnet" else ", for "
        figures = [f"{r['GB']:.1f} GB" for r in rows if (r["stage"], r["adapter"]) == (f"sample, {stage}", kind)]
        (line,) = (line for line in page.splitlines() if line.startswith(f"| `{level}`{what}"))
        assert line.endswith(f" | {' | '.join(figures)} |")


def test_stages_fit_the_gpus_that_the_page_names():
    for row in TABLE:
        if (row["stage"], row["adapter"]) in (("1", "resnet"), ("3", "resnet")) or row["GPUs"] >= 4:
            assert row["GB"] < 80, row
        if row["stage"].startswith("sample") and row["adapter"] == "resnet":
            most = {"sample, low": 11, "sample, high": 18, "sample, low, a table of videos": 11}
            assert row["GB"] < most.get(row["stage"], 24), row


def test_what_waits_for_a_number_or_mixes_devices_is_caught():
    with rehearse.pretend_gpus():
        there, here = torch.zeros(2, device=parallel.init_processes().device), torch.zeros(2)
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            there + here
        with pytest.raises(Exception, match="_local_scalar_dense"):
            there.sum().item()
    assert not torch.cuda.is_available() or torch.zeros(1, device="cuda").item() == 0  # nothing is left of it
