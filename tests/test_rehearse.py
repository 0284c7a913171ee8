"""The wan5b commands at full width and 27,280 tokens, on pretended GPUs: tools/rehearse.py."""

import gc
import json
from functools import partial

import pytest
import torch
from conftest import ROOT

from core import parallel
from discriminator import ClassifierConfig
from model import DiTConfig
from tools import gpu, rehearse
from tools.resident import Resident
from wan.vae import VAEConfig

GIB = 2**30 / 1e9  # a GiB in GB
TABLE = json.loads((ROOT / "results/rehearsed.json").read_text())
WHERE = ("stage", "adapter", "GPUs", "sequence")


@pytest.mark.parametrize("memory, most", [("low", 11), ("medium", 22)])
def test_a_video_is_made_within_the_memory_of_small_gpus(memory, most):
    """Encoding, denoising with two blocks on the GPU, decoding; CUDA's own memory comes on top."""
    peaks = rehearse.rehearse_sample(memory, "resnet")
    assert set(peaks) == {"encode image and boxes", "denoise", "decode"}
    assert max(peaks.values()) < most * GIB, peaks


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
    """Reckoned from two and three blocks here, and there from three and four."""
    again = next(rehearse.table((2, 3), [("1", "resnet", 1, 1)]))
    (row,) = (row for row in TABLE if [row[n] for n in WHERE] == ["1", "resnet", 1, 1])
    assert again["GB"] == pytest.approx(row["GB"], rel=0.03) and again["peak_at"] == row["peak_at"]


def test_the_same_cycle_runs_on_real_tensors_and_is_measured(monkeypatch):
    """Of a small network here, in this process alone; tools.resident does so at true widths in two."""
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
    for name, stage, kind in (
        ("1, ResNet", "1", "resnet"), ("1, ControlNet", "1", "controlnet"), ("2", "2", "none"),
        ("3, ResNet", "3", "resnet"), ("3, ControlNet", "3", "controlnet"),
    ):  # fmt: skip
        figures = [f"{row['GB']:.0f} GB" for row in TABLE if (row["stage"], row["adapter"]) == (stage, kind)]
        assert f"| {name} | {' | '.join(figures)} |" in page
    measured = [row for row in TABLE if row["measured_GB"]]
    assert [row["stage"][0] for row in measured] == ["1", "2"]
    for row in measured:
        assert row["measured_GB"] == pytest.approx(row["GB"], rel=0.05)
        assert f"is rehearsed at {row['GB']:.2f} GB and takes {row['measured_GB']:.2f} GB" in " ".join(page.split())


def test_stages_fit_the_gpus_that_the_page_names():
    for row in TABLE:
        if (row["stage"], row["adapter"]) in (("1", "resnet"), ("3", "resnet")) or row["GPUs"] >= 4:
            assert row["GB"] < 80, row
        if row["stage"] == "sample, low":
            assert row["GB"] < 11 * GIB, row
        if row["stage"] == "sample, medium":
            assert row["GB"] < 22 * GIB, row


def test_what_waits_for_a_number_or_mixes_devices_is_caught():
    with rehearse.pretended() as _:
        there, here = torch.zeros(2, device=parallel.init_processes().device), torch.zeros(2)
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            there + here
        with pytest.raises(Exception, match="_local_scalar_dense"):
            there.sum().item()
    assert not torch.cuda.is_available() or torch.zeros(1, device="cuda").item() == 0  # nothing is left of it


def test_what_a_gpu_will_be_asked_runs_at_a_small_shape(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)  # that would take minutes
    vae, judge = VAEConfig(width=8, decoder_width=8, blocks=1), ClassifierConfig(64, 64, (0, 1), hidden=32)
    shapes = DiTConfig(64, 128, 2, 2, 64, 16), (2, 4, 4), vae, torch.float32, judge
    rows = list(gpu.measure(torch.device("cpu"), *shapes))
    seconds = {row["name"]: row["seconds"] for row in rows}
    parts = ["VAE encode", "4 steps, resnet, compiled", "VAE decode"]
    assert seconds["encode, 4 steps with resnet, decode"] == pytest.approx(sum(map(seconds.get, parts)))
    assert len(seconds) == len(rows) == 12 and all(taken > 0 for taken in seconds.values())
    assert [row["name"] for row in rows if row["share_of_peak"]] == [
        "step of stage 1, resnet", "step of stage 3's adapter, resnet"
    ]  # fmt: skip
