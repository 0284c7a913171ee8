"""The wan5b commands at full width and 27,280 tokens, on pretended GPUs: tools/rehearse.py."""

import pytest
import torch

from core import parallel
from model import DiTConfig
from tools import gpu, rehearse
from wan.vae import VAEConfig

GIB = 2**30 / 1e9  # a GiB in GB


@pytest.mark.parametrize("memory, most", [("low", 11), ("medium", 22)])
def test_a_video_is_made_within_the_memory_of_small_gpus(memory, most):
    """Encoding, denoising with two blocks on the GPU, decoding; CUDA's own memory comes on top."""
    peaks = rehearse.rehearse_sample(memory, "resnet")
    assert set(peaks) == {"encode image and boxes", "denoise", "decode"}
    assert max(peaks.values()) < most * GIB, peaks


def test_the_first_cycle_of_stage_1_meets_no_other_device_and_waits_for_no_number():
    """Two blocks of 30; the table's figure for 80 GB leaves them far less room than this."""
    assert 10 < rehearse.rehearse_stage("1", "resnet", 1, 1, layers=2) < 26


def test_what_waits_for_a_number_or_mixes_devices_is_caught():
    with rehearse.pretended() as _:
        there, here = torch.zeros(2, device=parallel.init_processes().device), torch.zeros(2)
        with pytest.raises(RuntimeError, match="two devices, cuda:0 and cpu"):
            there + here
        with pytest.raises(Exception, match="_local_scalar_dense"):
            there.sum().item()
    assert not torch.cuda.is_available() or torch.zeros(1, device="cuda").item() == 0  # nothing is left of it


def test_what_a_gpu_will_be_asked_runs_at_a_small_shape(monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)
    vae = VAEConfig(width=8, decoder_width=8, blocks=1)
    rows = list(gpu.measure(torch.device("cpu"), DiTConfig(64, 128, 2, 2, 64, 16), (2, 4, 4), vae, torch.float32))
    names = [row["name"] for row in rows]
    assert names[:2] == ["4 steps, controlnet, compiled", "4 steps, resnet, compiled"] and len(names) == 7
    assert all(row["seconds"] > 0 for row in rows)
    assert rows[5]["seconds"] == pytest.approx(sum(rows[i]["seconds"] for i in (1, 3, 4)))
