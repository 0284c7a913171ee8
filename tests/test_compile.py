"""What torch.compile makes of a stage: how many graphs, and none given up."""

import torch
from torch._dynamo.utils import counters

import adapter as adapters
import discriminator as discriminators
import finetune_hybrid
from core.weights import save_network
from model import DiTConfig, VideoDiT

SHAPE = DiTConfig(32, 64, 2, 2, text_dim=64, text_tokens=32, channels=16)
JUDGE = discriminators.ClassifierConfig(32, 64, (0, 1), hidden=32, channels=16, position_dim=16)


def test_stage_3_compiles_with_recomputing_and_never_goes_back_to_eager(here, monkeypatch):
    """A generator's block without gradients, with them, and with one for its input; the adapter's without and with; the
    classifier's with its features' gradient and without. That is within dynamo's own limit of 8, but for a ControlNet.
    """
    torch.manual_seed(0)
    monkeypatch.setitem(discriminators.PRESETS, "tiny", JUDGE)
    network, adapter = VideoDiT(SHAPE), adapters.ResNetAdapter(adapters.AdapterConfig(32, 2, 16, channels=16))
    for name, net in {"SlowGenerator": network, "FastGenerator": network, "SlowAdapter": adapter}.items():
        save_network(here / f"{name}.safetensors", name, net.config, net.state_dict())
    compile = torch.nn.Module.compile
    monkeypatch.setattr(torch.nn.Module, "compile", lambda module: compile(module, backend="eager"))
    torch._dynamo.reset()
    counters.clear()
    options = {"generator": "FastGenerator.safetensors", "backbone": "SlowGenerator.safetensors"}
    options |= {"adapter": "SlowAdapter.safetensors", "recompute": "full", "dtype": "float32", "reuse_fakes": False}
    options |= {"steps": 1, "ratio": 1, "diffusion_first": 0, "adapter_start": 0, "batch": 2, "accumulate": 0}
    finetune_hybrid.main(finetune_hybrid.Config(**options))
    assert 5 <= counters["stats"]["unique_graphs"] <= 8
    assert counters["frames"]["total"] == counters["frames"]["ok"] == counters["stats"]["unique_graphs"]
    assert not counters["graph_break"] and not counters["unimplemented"]
    assert torch._dynamo.config.fail_on_recompile_limit_hit  # and so no block was left to eager code
