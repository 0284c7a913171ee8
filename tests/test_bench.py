"""bench.py at a small shape: it compares what agrees, and refuses to time what doesn't."""

import json

import pytest
import torch

import bench
import common

pytest.importorskip("diffusers", reason="the reference needs requirements-dev.txt")


def test_every_part_gives_rows_with_ratios(tmp_path, capsys):
    bench.main(bench.Config(preset="small", repeats=1, out=str(tmp_path / "b.json")))
    rows = json.loads((tmp_path / "b.json").read_text())
    timed = [row for row in rows if row["unit"] == "s"]
    assert {(r["name"], r["dtype"], r["compiled"]) for r in timed} == {
        (name, dtype, compiled)
        for dtype in ("float32", "bfloat16")
        for name, ways in (("DiT forward", (False, True)), ("4 steps with adapter", (False, True)),
                           ("VAE decode", (False,)), ("VAE encode", (False,)))
        for compiled in ways
    }  # fmt: skip
    for row in timed:
        assert row["ratio"] == pytest.approx(row["ours"] / row["reference"])  # of a single pair
        assert (row["share_of_limit"] is not None) == (row["name"] == "DiT forward")
    assert capsys.readouterr().out == (tmp_path / "b.md").read_text()


def test_what_differs_is_not_timed():
    a = torch.randn(10)
    bench.agree(a, a * (1 + 1e-5), torch.float32, "x")
    with pytest.raises(RuntimeError, match=r"x: ours and the reference differ by 1\.0e-03"):
        bench.agree(a, a * 1.001, torch.float32, "x")
    with pytest.raises(common.UserError, match="--repeats 0"):
        bench.main(bench.Config(repeats=0))


def test_floating_point_operations_of_the_real_transformer():
    """At 704x1280 and 121 frames: about 5.2e14, published."""
    assert bench.flop(bench.PRESETS["wan5b"], 31 * 22 * 40) == pytest.approx(5.2e14, rel=0.03)
