"""tools/bench.py at a small shape: it compares what agrees, and refuses to time what doesn't."""

import json
import math
from functools import partial

import pytest
import torch
from conftest import refused

from core.parallel import fast_bfloat16
from model import DiTConfig
from tools import bench
from wan.vae import VAEConfig

pytest.importorskip("diffusers", reason="the reference needs requirements-dev.txt")
VAE = VAEConfig(width=8, decoder_width=12)
SMALL = bench.Shape(DiTConfig(128, 256, 4, 2, 64, 32), (2, 4, 4), 2, (3, 8, 8), VAE, (5, 32, 32))


def measure(parts, tmp_path, monkeypatch):
    """The rows, and the blocks that would be compiled, which takes minutes and is tested elsewhere."""
    compiled = []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module, *_, **__: compiled.append(module))
    monkeypatch.setattr(bench, "SHAPES", dict.fromkeys(bench.SHAPES, SMALL))
    bench.main(bench.Config(parts, 1, str(tmp_path / "b.json")))
    return json.loads((tmp_path / "b.json").read_text()), compiled


def test_every_part_gives_rows_with_ratios(tmp_path, capsys, monkeypatch):
    rows, compiled = measure("vae,steps,transformer", tmp_path, monkeypatch)
    faster = "bfloat16" if fast_bfloat16(torch.device("cpu")) else "float32"
    paired = [row for row in rows if row["unit"] == "s" and row["reference"]]
    assert {(r["name"], r["dtype"], r["compiled"]) for r in paired} == {
        *((f"DiT forward{fused}", dtype, compiled) for fused in ("", ", reference fused")
          for dtype in ("float32", "bfloat16") for compiled in (False, True)),
        *((f"VAE {way}", "bfloat16", False) for way in ("decode", "encode")),
        *((f"step of stage {n}, reference not compiled", faster, True) for n in (1, 2, 3)),
    }  # fmt: skip
    # Both transformers, of two blocks each, in both types; then what stage 3 has of them.
    assert len(compiled) == 2 * 2 * 2 + 4 * 2
    for row in paired:
        assert row["ratio"] == pytest.approx(row["ours"] / row["reference"])  # of a single pair
    assert {row["shape"] for row in rows if row["name"].startswith("VAE")} == {"5 frames of 32x32"}
    assert {row["unit"] for row in rows} <= {"s", "GiB"} and all(row["reference"] > 0 for row in rows)
    most = 1.5 if faster == "bfloat16" else math.inf  # elsewhere its products have no one rate
    assert all(0 < row["share_of_limit"] < most for row in paired if row["name"].startswith("DiT"))
    assert all("python -m tools.bench --repeats 1" in row["command"] for row in rows)
    assert capsys.readouterr().out == (tmp_path / "b.md").read_text()


def test_what_a_gpu_does_alone_runs_at_a_small_shape(tmp_path, monkeypatch):
    rows, _ = measure("alone", tmp_path, monkeypatch)
    names = [
        "VAE decode", "VAE encode", "VAE decode, --memory low", "small decoder",
        "4 steps, resnet, --memory high", "4 steps, resnet, --memory low",
    ]  # fmt: skip
    assert [row["name"] for row in rows if row["unit"] == "s"] == names
    assert [row["name"] for row in rows if row["unit"] == "GiB"] == [f"{name}, peak memory" for name in names]
    assert all(row["ours"] > 0 and row["reference"] is row["ratio"] is None for row in rows)


def test_what_differs_is_not_timed():
    a, device = torch.randn(10), torch.device("cpu")
    near, far = (bench.Case("x", a.clone, partial(torch.mul, a, n), "10", torch.float32) for n in (1 + 1e-5, 1.001))
    assert len(list(bench.measure(near, 1, device))) == 1
    with pytest.raises(RuntimeError, match=r"x: ours and the reference differ by 1\.0e-03"):
        list(bench.measure(far, 1, device))
    some = "--parts vae,growth: give some of alone, vae, steps, transformer, "
    refused(some, bench.main, bench.Config(parts="vae,growth"))


def test_floating_point_operations_of_the_real_transformer():
    """At 704x1280 and 121 frames: about 5.2e14, published."""
    assert bench.flop(bench.PRESETS["wan5b"], 31 * 22 * 40) == pytest.approx(5.2e14, rel=0.03)
