"""What scripts write: files that appear whole or not at all, and pictures."""

import pytest
import torch
from conftest import refused

from core.files import atomic, output_path, write_text
from core.media import contact_sheet, to_uint8


def test_atomic_leaves_nothing_behind_on_failure(tmp_path):
    with pytest.raises(RuntimeError), atomic(tmp_path / "a" / "x.txt") as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert list((tmp_path / "a").iterdir()) == []
    with atomic(tmp_path / "x.txt") as temporary:
        temporary.write_text("whole")
    assert [p.name for p in tmp_path.glob("*.txt")] == ["x.txt"]
    write_text(tmp_path / "x.txt", "über")
    assert (tmp_path / "x.txt").read_bytes() == b"\xc3\xbcber\n"
    (tmp_path / "d.mp4").mkdir()
    refused(r"d\.mp4: is a folder; give another name", output_path, str(tmp_path / "d.mp4"), ".mp4")


def test_pictures():
    video = torch.stack([torch.full((2, 4, 6), v) for v in (-1.0, 0.0, 1.0)])  # [3, T, H, W]
    frames = to_uint8(video, scale=2)
    assert frames.shape == (2, 8, 12, 3) and frames[0, 0, 0].tolist() == [0, 128, 255]
    sheet = contact_sheet([frames, frames], gap=2)
    assert sheet.shape == (20, 28, 3) and sheet[8].min() == 255
