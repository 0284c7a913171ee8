"""tools/bench.py at a small shape: it compares what agrees, and refuses to time what doesn't."""

import json
import math

import pytest
import torch

from core.config import UserError
from core.parallel import fast_bfloat16
from model import DiTConfig
from tools import bench
from wan.vae import VAEConfig

pytest.importorskip("diffusers", reason="the reference needs requirements-dev.txt")
CODEC = VAEConfig(width=8, decoder_width=12)
SMALL = (DiTConfig(128, 256, 4, 2, 64, 32), (2, 4, 4), 2, (3, 8, 8), CODEC, (5, 32, 32))


def test_every_part_gives_rows_with_ratios(tmp_path, capsys, monkeypatch):
    # What is measured here need not be fast: blocks are counted. What the compiler makes of them is tested elsewhere.
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *_, **__: compiled.append(module))
    monkeypatch.setitem(bench.SHAPES, "wide", SMALL)
    bench.main(bench.Config("wide", "vae,steps,transformer", 1, str(tmp_path / "b.json")))
    rows = json.loads((tmp_path / "b.json").read_text())
    faster = "bfloat16" if fast_bfloat16(torch.device("cpu")) else "float32"
    paired = [row for row in rows if row["unit"] == "s" and row["reference"]]
    assert {(r["name"], r["dtype"], r["compiled"]) for r in paired} == {
        *((f"DiT forward{fused}", dtype, compiled) for fused in ("", ", reference fused")
          for dtype in ("float32", "bfloat16") for compiled in (False, True)),
        ("4 steps with adapter", "bfloat16", True),
        *((f"VAE {way}", "bfloat16", False) for way in ("decode", "encode")),
        *((f"step of stage {n}, reference not compiled", faster, True) for n in (1, 2, 3)),
    }  # fmt: skip
    # Both transformers, of two blocks each, in both types; then what stage 3 has of them.
    assert len(compiled) == 2 * 2 * 2 + 4 * 2
    for row in paired:
        assert row["ratio"] == pytest.approx(row["ours"] / row["reference"])  # of a single pair
    by_name = {row["name"]: row for row in rows}
    assert all(row["share_of_limit"] > 0 for row in paired if row["name"].startswith("DiT"))
    assert by_name["VAE decode"]["shape"] == by_name["VAE encode"]["shape"] == "5 frames of 32x32"
    assert {row["unit"] for row in rows} <= {"s", "GiB"} and all(row["reference"] > 0 for row in rows)
    most = 1.5 if fast_bfloat16(torch.device("cpu")) else math.inf  # elsewhere its products have no one rate
    assert all(row["share_of_limit"] < most for row in paired if row["name"].startswith("DiT"))
    assert all("python -m tools.bench --repeats 1" in row["command"] for row in rows)
    assert capsys.readouterr().out == (tmp_path / "b.md").read_text()


def test_what_a_gpu_does_alone_runs_at_a_small_shape(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: None)  # that would take minutes
    monkeypatch.setitem(bench.SHAPES, "wide", SMALL)
    bench.main(bench.Config("wide", "alone", 1, str(tmp_path / "b.json")))
    rows = json.loads((tmp_path / "b.json").read_text())
    seconds = {row["name"]: row["ours"] for row in rows if row["unit"] == "s"}
    assert list(seconds) == [
        "VAE decode", "VAE encode", "VAE decode, --memory low", "small decoder",
        "4 steps, resnet, --memory high", "encode, 4 steps, decode", "4 steps, resnet, --memory low",
    ]  # fmt: skip
    held = [f"{name}, peak memory" for name in seconds if name != "encode, 4 steps, decode"]
    assert [row["name"] for row in rows if row["unit"] == "GiB"] == held
    assert all(row["ours"] > 0 and row["reference"] is row["ratio"] is None for row in rows)


def test_what_differs_is_not_timed():
    a = torch.randn(10)
    bench.agree(a, a * (1 + 1e-5), torch.float32, "x")
    with pytest.raises(RuntimeError, match=r"x: ours and the reference differ by 1\.0e-03"):
        bench.agree(a, a * 1.001, torch.float32, "x")
    with pytest.raises(UserError, match="--repeats 0"):
        bench.main(bench.Config(repeats=0))
    with pytest.raises(UserError, match=r"--parts vae,growth: growth is none of alone, vae, steps, transformer$"):
        bench.main(bench.Config(parts="vae,growth"))


def test_floating_point_operations_of_the_real_transformer():
    """At 704x1280 and 121 frames: about 5.2e14, published."""
    assert bench.flop(bench.PRESETS["wan5b"], 31 * 22 * 40) == pytest.approx(5.2e14, rel=0.03)
