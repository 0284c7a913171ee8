"""What torch.compile makes of a stage: how many graphs, and none given up."""

import nets
import pytest
import torch
from torch._dynamo.utils import counters

import discriminator as discriminators
import distill_fast
import finetune_hybrid
import train_slow_adapter

SLOW, FAST, LIGHT = (f"{name}.safetensors" for name in ("slow_generator", "fast_generator", "slow_adapter"))


# Of a generator's block: without gradients, with them, and with one for its input. Of the adapter's: without and with.
# Of the classifier's: with its features' gradient and without. All within dynamo's limit of 8, but for a ControlNet.
STAGES = {
    train_slow_adapter: (3, 6, {"generator": SLOW, "init": LIGHT, "mask_steps": 0}),
    distill_fast: (3, 6, {"generator": SLOW, "ratio": 1}),
    finetune_hybrid: (
        5, 8, {"generator": FAST, "backbone": SLOW, "adapter": LIGHT, "ratio": 1, "diffusion_first": 0,
               "adapter_start": 0},
    ),
}  # fmt: skip


@pytest.mark.parametrize("script", STAGES)
def test_a_stage_compiles_with_recomputing_and_never_goes_back_to_eager(script, here, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setitem(discriminators.PRESETS, "small", nets.JUDGE)
    network, adapter = nets.generator(), nets.adapter()
    nets.save(slow_generator=network, fast_generator=network, slow_adapter=adapter)
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend="aot_eager"))
    torch._dynamo.reset()
    counters.clear()
    least, most, options = STAGES[script]
    options = options | {"recompute": "full", "dtype": "float32", "steps": 1, "batch": 2, "accumulate": 0}
    script.main(script.Config(**options))
    assert least <= counters["stats"]["unique_graphs"] <= most
    assert counters["frames"]["total"] == counters["frames"]["ok"] == counters["stats"]["unique_graphs"]
    assert not counters["graph_break"] and not counters["unimplemented"]
    assert torch._dynamo.config.fail_on_recompile_limit_hit  # and so no block was left to eager code
