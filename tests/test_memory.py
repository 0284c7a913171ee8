"""Less memory: weights of 8 bits."""

import torch
from torch import nn

from core import memory
from core.memory import Int8Linear
from core.parallel import fast_bfloat16
from core.weights import save_network
from model import DiTConfig, VideoDiT


def test_a_layer_of_8_bits_is_within_half_a_step_of_its_weights():
    torch.manual_seed(0)
    linear = nn.Linear(300, 200)
    linear.weight.data[7] = 0
    short = Int8Linear(linear)
    short.fill(linear.weight.data)
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert short.weight.dtype == torch.int8
    assert ((short.weight * short.scale - linear.weight).abs() <= step / 2 + 1e-7).all()
    x = torch.randn(50, 300)
    assert (short(x) - linear(x)).norm() < 0.01 * linear(x).norm()
    assert torch.equal(short(x)[:, 7], linear.bias[7].expand(50))


def test_a_network_read_in_8_bits_is_smaller_and_nearly_the_same(tmp_path):
    torch.manual_seed(0)
    config, path = DiTConfig(64, 256, 2, 3, text_dim=16, text_tokens=8, channels=16), tmp_path / "g.safetensors"
    model = VideoDiT(config).requires_grad_(False)
    nn.init.normal_(model.head.head.weight)
    x, t, text = torch.randn(1, 16, 3, 8, 8), torch.tensor([[0.0, 500.0, 500.0]]), torch.randn(1, 8, 16)
    save_network(path, "SlowGenerator", config, model.state_dict(), torch.float32)
    short, bf16 = (VideoDiT.from_pretrained(path, "SlowGenerator", dtype) for dtype in (torch.int8, torch.bfloat16))
    linears = [m for m in short.blocks.modules() if isinstance(m, nn.Linear | Int8Linear)]
    assert len(linears) == 30 and all(isinstance(m, Int8Linear) for m in linears)
    other = torch.bfloat16 if fast_bfloat16(torch.device("cpu")) else torch.float32  # the faster
    assert short.head.head.weight.dtype == other and short.blocks[0].norm3.weight.dtype == torch.float32

    def size(network):
        return sum(t.nbytes for t in (*network.blocks.parameters(), *network.blocks.buffers()))

    assert size(short) < 0.285 * size(model)  # of float32: a quarter, and what is not quantised
    want = model(x, t, text)
    error, rounding = ((network(x, t, text).float() - want).norm() / want.norm() for network in (short, bf16))
    assert (rounding if other == torch.bfloat16 else 1e-3) < error < 0.03


def test_a_peak_that_can_not_be_reset_is_that_since_the_start(monkeypatch):
    def forbidden(*args, **options):
        raise PermissionError("read-only")

    monkeypatch.setattr("pathlib.Path.write_text", forbidden)
    memory.reset_peak(torch.device("cpu"))
    assert memory.peak_memory(torch.device("cpu")) > 0
