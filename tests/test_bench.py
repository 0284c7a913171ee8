"""bench.py at a small shape: it compares what agrees, and refuses to time what doesn't."""

import json
import math

import pytest
import torch

from core.config import UserError
from core.parallel import has_bfloat16
from tools import bench

pytest.importorskip("diffusers", reason="the reference needs requirements-dev.txt")


def test_every_part_gives_rows_with_ratios(tmp_path, capsys):
    bench.main(bench.Config(preset="small", repeats=1, out=str(tmp_path / "b.json")))
    rows = json.loads((tmp_path / "b.json").read_text())
    paired = [row for row in rows if row["unit"] == "s" and row["reference"]]
    assert {(r["name"], r["dtype"], r["compiled"]) for r in paired} == {
        *((f"DiT forward{fused}", dtype, compiled) for fused in ("", ", reference fused")
          for dtype in ("float32", "bfloat16") for compiled in (False, True)),
        ("4 steps with adapter", "bfloat16", True),
        *((f"VAE {way}", "bfloat16", False) for way in ("decode", "encode")),
        *((f"--memory {mode}: forward", "bfloat16", False) for mode in ("medium", "low")),
        *(("attention, reference torch's", dtype, True) for dtype in ("float32", "bfloat16")),
    }  # fmt: skip
    for row in paired:
        assert row["ratio"] == pytest.approx(row["ours"] / row["reference"])  # of a single pair
    by_name = {row["name"]: row for row in rows}
    most = 1.5 if has_bfloat16(torch.device("cpu")) else math.inf  # emulated products have no one rate
    for stage in ("stage 1, a step", "stage 2, a cycle", "stage 3, a step"):
        assert by_name[stage]["ours"] > 0 and 0 < by_name[stage]["share_of_limit"] < most
        assert by_name[f"{stage}, peak memory"]["unit"] == "GiB" and by_name[f"{stage}, speed"]["ours"] > 0
    error = by_name["8 bits: error of what a block adds"]
    assert error["reference"] < error["ours"] < 0.05 and 0.5 < by_name["8 bits: weights"]["ratio"] < 0.55
    assert by_name["--memory medium: error of a forward pass"]["ours"] == 0
    assert 0 < by_name["--memory low: error of a forward pass"]["ours"] < 0.05
    assert by_name["4 steps with ControlNet"]["ours"] > 0
    assert by_name["block: b / a of a N + b N^2"]["reference"] > 0
    assert all("python bench.py --preset small" in row["command"] for row in rows)
    assert capsys.readouterr().out == (tmp_path / "b.md").read_text()


def test_what_differs_is_not_timed():
    a = torch.randn(10)
    bench.agree(a, a * (1 + 1e-5), torch.float32, "x")
    with pytest.raises(RuntimeError, match=r"x: ours and the reference differ by 1\.0e-03"):
        bench.agree(a, a * 1.001, torch.float32, "x")
    with pytest.raises(UserError, match="--repeats 0"):
        bench.main(bench.Config(repeats=0))


def test_floating_point_operations_of_the_real_transformer():
    """At 704x1280 and 121 frames: about 5.2e14, published."""
    assert bench.flop(bench.PRESETS["wan5b"], 31 * 22 * 40) == pytest.approx(5.2e14, rel=0.03)
