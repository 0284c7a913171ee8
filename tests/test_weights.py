"""Every layout in which weights are published loads and gives the reference's output; damage gives one clear line."""

import json
import shutil

import pytest
import torch
from test_model import diffusers_model
from test_vae import SMALL, pair

from core.config import UserError
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
    network = diffusers_model(SHALLOW).requires_grad_(False)
    for p in network.parameters():
        torch.nn.init.normal_(p, std=0.5 * SHALLOW.dim**-0.5)
    network = network.bfloat16().float()  # so that files of either type hold the same numbers
    x, text, t = torch.randn(1, 48, 2, 4, 6), torch.randn(1, 8, 40), torch.tensor([[0.0, 700.0]])
    return network, (x, t, text), network(x, t.repeat_interleave(6, 1), text, return_dict=False)[0]


def write_wan(folder, tensors, shards=2):
    """The original layout: numbered shards and their index, with a config.json that nobody reads."""
    from safetensors.torch import save_file

    folder.mkdir()
    (folder / "config.json").write_text("hello")
    stem, where = "diffusion_pytorch_model", {}
    for shard in range(shards):
        file = f"{stem}-{shard + 1:05}-of-{shards:05}.safetensors"
        names = sorted(tensors)[shard::shards]
        save_file({name: tensors[name].contiguous() for name in names}, folder / file, {"format": "pt"})
        where |= dict.fromkeys(names, file)
    (folder / f"{stem}.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": where}))
    return folder


@pytest.mark.parametrize("layout", ["wan", "diffusers", "diffusers sharded", "generator.pt", "own"])
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
    elif layout == "generator.pt":
        path = tmp_path / "generator.pt"
        torch.save({"generator": {f"model.{n}": p for n, p in own.items()}}, path)
    else:
        path = tmp_path / "fast_generator.safetensors"
        save_network(path, "FastGenerator", SHALLOW, own)
    model = VideoDiT.from_pretrained(path, "FastGenerator")
    assert model.config == SHALLOW
    with torch.no_grad():
        out = model(*inputs)
    assert ((out - wanted).norm() / wanted.norm()).item() < 1e-5
    half = VideoDiT.from_pretrained(path, "FastGenerator", torch.bfloat16)
    types = {n: p.dtype for n, p in half.named_parameters()}
    assert types["blocks.0.ffn.0.weight"] == types["patch_embedding.weight"] == torch.bfloat16
    assert types["time_projection.1.weight"] == types["blocks.0.modulation"] == torch.float32
    assert types["head.modulation"] == types["blocks.0.self_attn.norm_q.weight"] == torch.float32
    assert torch.equal(half.blocks[0].ffn[0].weight, own["blocks.0.ffn.0.weight"])  # byte for byte
    with torch.no_grad():
        error = (half(*inputs).float() - wanted).norm() / wanted.norm()
    assert 0 < error < 0.03


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

    def refused(message, path, load=lambda path: VideoDiT.from_pretrained(path, "SlowGenerator")):
        with pytest.raises(UserError, match=message) as caught:
            load(path)
        assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)

    def damaged(name, file, content):
        """A copy of the whole folder, but for what one file holds."""
        folder = shutil.copytree(whole, tmp_path / name)
        (folder / file).write_bytes(content)
        return folder

    refused("not a readable safetensors file.*get it again", damaged("cut", shard, (whole / shard).read_bytes()[:-100]))
    refused("index.json: fields are missing: weight_map; give", damaged("bare", index, b"{}"))
    refused("index.json: not JSON", damaged("text", index, b"hello"))
    lacking = damaged("lacking", shard, b"")
    (lacking / shard).unlink()
    refused(f"{shard}: no such file", lacking)
    assert VideoDiT.from_pretrained(whole, "SlowGenerator").config == SHALLOW
    deeper = tensors | {"blocks.2.modulation": tensors["blocks.0.modulation"]}
    refused("missing: blocks.1.*and 45 more", write_wan(tmp_path / "deeper", deeper))
    wrong = tensors | {"blocks.0.ffn.0.bias": one.expand(199)}
    refused(r"wrong shape: blocks.0.ffn.0.bias is \[199\], expected \[200\]", write_wan(tmp_path / "narrower", wrong))

    pt = tmp_path / "generator.pt"
    torch.save({"generator": {"model.patch_embedding.bias": torch.zeros(256)}, "other": Code()}, pt)
    refused("more than tensors, code perhaps", pt)
    assert "code ran" not in capsys.readouterr().out
    for content, message in (
        ({"critic": {}}, "no dict of tensors"),
        ({"generator": {"model.x": one}}, "no transformer of Wan2.2: it holds no patch_embedding.weight"),
        ({"generator": {n: t for n, t in tensors.items() if n != "head.head.bias"}}, "missing: head.head.bias"),
    ):
        torch.save(content, pt)
        refused(message, pt)
    pt.write_bytes(pt.read_bytes()[:-200])
    refused("not a readable checkpoint.*get it again", pt)
    refused("no such file", tmp_path / "nowhere.pt")

    refused("not a readable checkpoint|more than tensors", whole / "config.json", WanVAE.from_pretrained)
    other = damaged("vae", "config.json", b'{"_class_name": "WanModel"}')
    refused("config.json: _class_name is not that of Wan2.2", other, WanVAE.from_pretrained)


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
        for wrong in ([*whole[name][:-1], whole[name][-1] + 0.01], whole[name][:16], "none"):
            config.write_text(json.dumps(whole | {name: wrong}))
            with pytest.raises(UserError, match=f"config.json: {name} is not that of Wan2.2; give the vae folder of"):
                WanVAE.from_pretrained(tmp_path / "vae")
    config.write_text(json.dumps({k: v for k, v in whole.items() if not k.startswith("latents_")}))
    assert WanVAE.from_pretrained(tmp_path / "vae").config == SMALL  # what is not said is Wan2.2's
    file = tmp_path / "Wan2.2_VAE.pth"
    torch.save(ours.state_dict(), file)
    assert torch.equal(WanVAE.from_pretrained(file, config=SMALL).decode(latents), ours.decode(latents))
    with pytest.raises(UserError, match="wrong shape: conv1"):
        WanVAE.from_pretrained(file, config=VAEConfig(channels=16))
