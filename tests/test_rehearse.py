"""The wan5b commands at full width and 27,280 tokens, on pretended GPUs: tools/rehearse.py."""

import pytest
import torch

from core import parallel
from tools import rehearse

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
