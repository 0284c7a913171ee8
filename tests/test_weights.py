"""Every layout of published weights gives the reference's output; damage gives one clear line; 8 bits, nearly it."""

import json
import shutil

import pytest
import torch
from conftest import refused
from test_model import diffusers_model
from test_vae import SMALL, pair
from torch import nn

from core.memory import Int8Linear
from core.parallel import fast_bfloat16
from core.weights import rename, save_network
from model import PRESETS, DiTConfig, VideoDiT
from wan.published import DIFFUSERS_NAMES
from wan.vae import VAEConfig, WanVAE

# wan5b's shapes but narrow: how a layout is read does not hang on its width. test_model.py has a block of true width.
SHALLOW = DiTConfig(256, 200, 2, 1, text_dim=40, text_tokens=8)


@pytest.fixture(autouse=True)
def narrow(monkeypatch):
    """What files do not say is that of the preset."""
    monkeypatch.setitem(PRESETS, "wan5b", SHALLOW)


@pytest.fixture(scope="module")
def reference():
    """Diffusers' network with random weights, an input and its output for it."""
    torch.manual_seed(0)
    # Rounded to bfloat16, so that files of either type hold the same numbers.
    network = diffusers_model(SHALLOW).requires_grad_(False).bfloat16().float()
    x, text, t = torch.randn(1, 48, 2, 4, 6), torch.randn(1, 8, 40), torch.tensor([[0.0, 700.0]])
    return network, (x, t, text), network(x, t.repeat_interleave(6, 1), text, return_dict=False)[0]


def write_wan(folder, tensors):
    """The original layout: two numbered shards and their index, with a config.json that nobody reads."""
    from huggingface_hub import save_torch_state_dict

    folder.mkdir()
    (folder / "config.json").write_text("hello")
    tensors = {name: tensor.clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()}
    most = sum(tensor.nbytes for tensor in tensors.values()) * 6 // 10
    pattern = "diffusion_pytorch_model{suffix}.safetensors"
    save_torch_state_dict(tensors, folder, filename_pattern=pattern, max_shard_size=most)
    return folder


@torch.no_grad()
@pytest.mark.parametrize("layout", ["wan", "diffusers", "diffusers sharded", "own"])
def test_each_layout_of_the_transformer_gives_the_reference_output(reference, layout, tmp_path):
    network, inputs, wanted = reference
    own = {n: p.bfloat16() for n, p in rename(network.state_dict(), DIFFUSERS_NAMES).items()}
    path = tmp_path / "weights"
    if layout == "wan":
        write_wan(path, own)
    elif layout.startswith("diffusers"):
        network.to(torch.bfloat16).save_pretrained(path, max_shard_size="300KB" if "sharded" in layout else "10GB")
        network.float()
        assert (path / "diffusion_pytorch_model.safetensors.index.json").exists() == ("sharded" in layout)
    else:
        path = tmp_path / "fast_generator.safetensors"
        save_network(path, "FastGenerator", SHALLOW, own)
    model = VideoDiT.from_pretrained(path, "FastGenerator")
    assert model.config == SHALLOW
    assert (model(*inputs) - wanted).norm() / wanted.norm() < 1e-5
    half = VideoDiT.from_pretrained(path, "FastGenerator", torch.bfloat16)
    types = {n: p.dtype for n, p in half.named_parameters()}
    assert types["blocks.0.ffn.0.weight"] == types["patch_embedding.weight"] == torch.bfloat16
    assert types["time_projection.1.weight"] == types["blocks.0.modulation"] == torch.float32
    assert types["head.modulation"] == types["blocks.0.self_attn.norm_q.weight"] == torch.float32
    assert torch.equal(half.blocks[0].ffn[0].weight, own["blocks.0.ffn.0.weight"])  # byte for byte
    assert 0 < (half(*inputs).float() - wanted).norm() / wanted.norm() < 0.03


class Code:
    """Unpickled, it would run a command."""

    def __reduce__(self):
        return print, ("code ran",)


def test_damaged_weights_give_one_line_that_says_what_is_wrong(tmp_path, capsys):
    with torch.device("meta"):
        shapes = {n: p.shape for n, p in VideoDiT(SHALLOW).state_dict().items()}
    one = torch.zeros(1, dtype=torch.bfloat16)
    tensors = {n: one.expand(shape) for n, shape in shapes.items()}
    whole = write_wan(tmp_path / "whole", tensors)
    stem = "diffusion_pytorch_model"
    index, shard = f"{stem}.safetensors.index.json", f"{stem}-00002-of-00002.safetensors"

    def wrong(message, path, load=lambda path: VideoDiT.from_pretrained(path, "SlowGenerator")):
        refused(rf"{tmp_path}.*({message})", load, path)

    def damaged(name, file, content):
        """A copy of the whole folder, but for what one file holds."""
        folder = shutil.copytree(whole, tmp_path / name)
        (folder / file).write_bytes(content)
        return folder

    wrong("not a readable safetensors file.*get it again", damaged("cut", shard, (whole / shard).read_bytes()[:-100]))
    wrong("index.json: fields are missing: weight_map; give", damaged("bare", index, b"{}"))
    wrong("index.json: not JSON", damaged("text", index, b"hello"))
    lacking = damaged("lacking", shard, b"")
    (lacking / shard).unlink()
    wrong(f"{shard}: no such file", lacking)
    assert VideoDiT.from_pretrained(whole, "SlowGenerator").config == SHALLOW
    deeper = tensors | {"blocks.2.modulation": tensors["blocks.0.modulation"]}
    wrong("missing: blocks.1.*and 45 more", write_wan(tmp_path / "deeper", deeper))
    narrower = write_wan(tmp_path / "narrower", tensors | {"blocks.0.ffn.0.bias": one.expand(199)})
    wrong(r"wrong shape: blocks.0.ffn.0.bias is \[199\], expected \[200\]", narrower)

    pt = tmp_path / "generator.pt"
    torch.save({"generator": {"model.patch_embedding.bias": torch.zeros(256)}, "other": Code()}, pt)
    wrong("more than tensors, code perhaps", pt)
    assert "code ran" not in capsys.readouterr().out
    for content, message in (
        ({"critic": {}}, "no dict of tensors"),
        ({"generator": {"model.x": one}}, "no transformer of Wan2.2: it holds no patch_embedding.weight"),
        ({"generator": {n: t for n, t in tensors.items() if n != "head.head.bias"}}, "missing: head.head.bias"),
    ):
        torch.save(content, pt)
        wrong(message, pt)
    pt.write_bytes(pt.read_bytes()[:-200])
    wrong("not a readable checkpoint.*get it again", pt)
    wrong("no such file", tmp_path / "nowhere.pt")

    wrong("not a readable checkpoint|more than tensors", whole / "config.json", WanVAE.from_pretrained)
    other = damaged("vae", "config.json", b'{"_class_name": "WanModel"}')
    wrong("config.json: _class_name is not that of Wan2.2", other, WanVAE.from_pretrained)


def test_both_layouts_of_the_vae_give_the_reference_output(tmp_path):
    ours, theirs = pair(SMALL)
    theirs.save_pretrained(tmp_path / "vae")
    again = WanVAE.from_pretrained(tmp_path / "vae")
    assert again.config == SMALL
    latents = torch.randn(1, 48, 2, 2, 3)
    assert torch.equal(again.decode(latents), ours.decode(latents))
    video = torch.rand(1, 3, 5, 32, 48)
    assert torch.equal(again.encode(video), ours.encode(video))
    config = tmp_path / "vae/config.json"
    whole = json.loads(config.read_text())
    for name in ("latents_mean", "latents_std"):
        said = f"config.json: {name} is not that of Wan2.2; give the vae folder of"
        for wrong in ([*whole[name][:-1], whole[name][-1] + 0.01], whole[name][:16], "none"):
            config.write_text(json.dumps(whole | {name: wrong}))
            refused(said, WanVAE.from_pretrained, tmp_path / "vae")
    config.write_text(json.dumps({k: v for k, v in whole.items() if not k.startswith("latents_")}))
    assert WanVAE.from_pretrained(tmp_path / "vae").config == SMALL  # what is not said is Wan2.2's
    file = tmp_path / "Wan2.2_VAE.pth"
    torch.save(ours.state_dict(), file)
    assert torch.equal(WanVAE.from_pretrained(file, config=SMALL).decode(latents), ours.decode(latents))
    refused("wrong shape: conv1", WanVAE.from_pretrained, file, config=VAEConfig(channels=16))


def test_a_layer_of_8_bits_is_within_half_a_step_of_its_weights():
    torch.manual_seed(0)
    linear, x = nn.Linear(300, 200), torch.randn(50, 300)
    linear.weight.data[7] = 0
    short = Int8Linear(linear)
    short.fill(linear.weight.data)
    step = linear.weight.abs().amax(1, keepdim=True) / 127
    assert short.weight.dtype == torch.int8
    assert ((short.weight * short.scale - linear.weight).abs() <= step / 2 + 1e-7).all()
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
