"""Generators as others publish them, LoRAs, and the small decoder: made small, with the published names and types."""

import json
import math
import re
from functools import partial
from pathlib import Path

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from conftest import refused
from torch import Tensor, nn

from model import DiTConfig, VideoDiT
from wan.lora import merge
from wan.tiny_decoder import TinyDecoder

SHAPES = DiTConfig(256, 512, 2, 2, text_dim=64, text_tokens=512, float32_stream=True)


@pytest.fixture(scope="module")
def weights() -> dict[str, Tensor]:
    torch.manual_seed(0)
    network = VideoDiT(SHAPES)
    nn.init.normal_(network.head.head.weight, std=0.02)
    return {name: p.detach() for name, p in network.state_dict().items()}


@torch.no_grad()
def answer(given: VideoDiT | dict[str, Tensor] | Path | str) -> Tensor:
    """What a network predicts: this one, one with these weights, or the one in a file or folder."""
    if isinstance(given, dict):
        network = VideoDiT(SHAPES)
        network.load_state_dict(given)
    else:
        network = given if isinstance(given, VideoDiT) else VideoDiT.from_pretrained(given, "FastGenerator")
    draw = torch.Generator().manual_seed(1)
    x, text = torch.randn(1, 48, 2, 4, 4, generator=draw), torch.randn(1, 512, 64, generator=draw)
    return network(x, torch.tensor([[0.0, 500.0]]), text)


def wrapped(name: str) -> str:
    """As FSDP names parameters of a model that is wrapped block by block."""
    return "model._fsdp_wrapped_module." + re.sub(r"^(blocks\.\d+)\.", r"\1._fsdp_wrapped_module.", name)


CHECKPOINTS = {
    "flat, as Turbo's model.pt": lambda w: {wrapped(n): p for n, p in w.items()},
    "flat and bare": lambda w: dict(w),
    "generator": lambda w: {"generator": {f"model.{n}": p for n, p in w.items()}, "step": 7},
    "state_dict": lambda w: {"state_dict": {f"module.model.{n}": p for n, p in w.items()}, "epoch": 1},
    "model": lambda w: {"model": {f"model.diffusion_model.{n}": p for n, p in w.items()}},
}


@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_training_checkpoints(kind, weights, tmp_path):
    torch.save(CHECKPOINTS[kind](weights), tmp_path / "model.pt")
    assert torch.equal(answer(tmp_path / "model.pt"), answer(weights))


def test_one_network_of_several_is_chosen_by_its_key(weights, tmp_path, capsys):
    file = tmp_path / "several.pt"
    zeros = {f"model._orig_mod.{name}": torch.zeros_like(p) for name, p in weights.items()}
    torch.save({"generator": weights, "generator_ema": zeros}, file)
    assert not answer(file).any()
    assert "holds generator_ema, generator; generator_ema is taken" in capsys.readouterr().err
    assert torch.equal(answer(f"{file}:generator"), answer(weights))
    assert capsys.readouterr().err == ""
    refused("no dict of tensors under the key 'critic'", answer, f"{file}:critic")


@pytest.mark.parametrize("prefix, dtype", [
    ("", torch.float32), ("model.", torch.float16), ("model.diffusion_model.", torch.bfloat16),
    ("diffusion_model.", torch.float32), ("module._orig_mod.", torch.float16), ("", torch.float8_e5m2),
])  # fmt: skip
@pytest.mark.parametrize("shards", [1, 2])
def test_bare_safetensors(shards, prefix, dtype, weights, tmp_path):
    """Of any type; of 8 bits without scales are matrices alone. In one file, or in shards without their index."""
    small = {n: p.to(dtype) if p.ndim == 2 or dtype.itemsize > 1 else p for n, p in weights.items()}
    file = "turbo.safetensors" if shards == 1 else "diffusion_pytorch_model-{:05}-of-00002.safetensors"
    for number in range(shards):
        part = {f"{prefix}{n}": small[n] for n in sorted(weights)[number::shards]}
        safetensors.torch.save_file(part, tmp_path / file.format(number + 1))
    got = VideoDiT.from_pretrained(tmp_path / file if shards == 1 else tmp_path, "FastGenerator")
    assert got.config == SHAPES
    assert torch.equal(answer(got), answer({n: p.float() for n, p in small.items()}))


LAYER = "blocks.0.ffn.0"


def with_codes(weights, folder, codes=None, header=None, **beside) -> Path:
    """A file in which a layer's weight is replaced by codes, with tensors beside it: `_` in their names is the dot."""
    name, file = f"{LAYER}.weight", folder / "quantized.safetensors"
    stored = {n: p for n, p in weights.items() if n != name} | ({} if codes is None else {name: codes})
    safetensors.torch.save_file(stored | {f"{LAYER}.{n}": p for n, p in beside.items()}, file, header)
    return file


def told(**fields) -> Tensor:
    return torch.tensor(list(json.dumps(fields).encode()), dtype=torch.uint8)


@pytest.mark.parametrize("name", ["scale_weight", "weight_scale"])
@pytest.mark.parametrize("dtype", [torch.float8_e4m3fn, torch.int8])
@pytest.mark.parametrize("shape", [(), (512,), (512, 1), (512, 4, 1)], ids=str)
def test_values_times_scales_are_read_exactly(shape, dtype, name, weights, tmp_path):
    """One scale a tensor, an output, or a part of an output; the marks that lie beside them are no parameters."""
    weight = weights[f"{LAYER}.weight"]  # (512, 256)
    parts = weight.view(max(1, math.prod(shape)), -1)
    scale = parts.abs().amax(1, keepdim=True) / 127
    codes = (parts / scale).round().to(dtype)
    fields = {"format": "int8_tensorwise", "per_row": True, "convrot": False}
    header = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": {LAYER: fields}})}
    beside = {name: scale.view(shape), "scale_input": torch.ones(1), "comfy_quant": told(**fields)}
    marked = weights | {"scaled_fp8": torch.zeros(2).to(torch.float8_e4m3fn)}
    got = answer(with_codes(marked, tmp_path, codes.view_as(weight), header, **beside))
    meant = (codes.float() * scale).view_as(weight)
    assert torch.equal(got, answer(weights | {f"{LAYER}.weight": meant})) and not torch.equal(meant, weight)


BYTES, ROWS = torch.zeros(512, 256, dtype=torch.int8), torch.ones(512, 1)
ROTATED = {"format": "int8_tensorwise", "params": {"convrot": True, "convrot_groupsize": 256}}
FOREIGN = {  # what quantizers write -> codes, header, tensors beside, what the message names
    "ConvRot": (BYTES, None, {"weight_scale": ROWS, "comfy_quant": told(**ROTATED)}, "comfy_quant convrot=True"),
    "ConvRot in the header": (BYTES, {"_quantization_metadata": json.dumps({"layers": {LAYER: ROTATED}})},
                              {"weight_scale": ROWS}, "comfy_quant convrot=True"),
    "NVFP4": (BYTES[:, :128].to(torch.uint8), None, {"weight_scale": torch.ones(512, 16), "comfy_quant":
              told(format="nvfp4"), "weight_scale_2": torch.ones(())}, "weight_scale_2"),
    "MXFP8": (torch.zeros(512, 256).to(torch.float8_e4m3fn), None, {"weight_scale": torch.ones(512, 8)},
              r"weight_scale \[512, 8\] for a weight \[512, 256\]"),
    "a format to come": (BYTES, None, {"comfy_quant": told(format="int7")}, "comfy_quant format=int7"),
    "bitsandbytes": (torch.zeros(65536, 1, dtype=torch.uint8), None, {"weight.absmax": torch.ones(2048),
                     "weight.quant_state.bitsandbytes__nf4": told(blocksize=64)}, r"ffn\.0\.weight\.absmax"),
    "quanto": (None, None, {"weight._data": BYTES, "weight._scale": ROWS}, r"weight\._data"),
    "nunchaku": (None, None, {"qweight": BYTES, "wscales": ROWS, "smooth_factor": torch.ones(256)}, "qweight"),
    "torchao": (None, None, {"_weight_qdata": BYTES, "_weight_scale": ROWS}, "_weight_qdata"),
    "a scale without its weight": (None, None, {"weight_scale": ROWS}, r"weight_scale \[512, 1\]"),
}  # fmt: skip


@pytest.mark.parametrize("kind", FOREIGN)
def test_what_other_quantizers_write_is_refused_by_name(kind, weights, tmp_path):
    codes, header, beside, name = FOREIGN[kind]
    file = with_codes(weights, tmp_path, codes, header, **beside)
    refused(rf"{name}.*: quantized in a way that is not read; get .* in 16 bits", answer, file)


def test_what_is_not_read_says_what_is(weights, tmp_path):
    whole = with_codes(weights, tmp_path, BYTES)
    refused(r"blocks\.0\.ffn\.0\.weight holds whole numbers, without a scale", answer, whole)
    refused(r"x\.gguf: GGUF is not read; get the same network as \.safetensors", answer, tmp_path / "x.gguf")
    kept = ("patch_embedding.weight", "blocks.0.ffn.0.weight", "text_embedding.0.weight", "time_embedding.0.weight")
    wrong = {n: weights[n] for n in kept} | {f"{n}.x{i}": p.clone() for n, p in weights.items() for i in range(3)}
    safetensors.torch.save_file(wrong, tmp_path / "wrong.safetensors")
    assert len(refused(r"missing: .* and .* more; unexpected: ", answer, tmp_path / "wrong.safetensors")) < 1500


DIFFUSERS = {
    "blocks.0.self_attn.q": "blocks.0.attn1.to_q", "blocks.0.self_attn.o": "blocks.0.attn1.to_out.0",
    "blocks.1.cross_attn.k": "blocks.1.attn2.to_k", "blocks.1.ffn.0": "blocks.1.ffn.net.0.proj",
    "blocks.1.ffn.2": "blocks.1.ffn.net.2",
}  # fmt: skip
Q = "blocks.0.self_attn.q"
FORMS = {  # prefix, name of a layer, names of both matrices, alpha
    "ComfyUI": ("diffusion_model.", str, ("lora_A", "lora_B"), None),
    "original": ("", str, ("lora_down", "lora_up"), 2.0),
    "diffusers": ("transformer.", DIFFUSERS.get, ("lora_A", "lora_B"), None),
    "peft": ("base_model.model.", DIFFUSERS.get, ("lora_A.default", "lora_B.default"), None),
    "kohya": ("lora_unet_", lambda layer: layer.replace(".", "_"), ("lora_down", "lora_up"), 2.0),
    "VideoX-Fun": ("lora_unet__", lambda layer: layer.replace(".", "_"), ("lora_down", "lora_up"), 2.0),
    "SimpleTuner": ("lycoris_", lambda layer: DIFFUSERS[layer].replace(".", "_"), ("lora_down", "lora_up"), 2.0),
    "DiffSynth": ("pipe.dit.", str, ("lora_A.default", "lora_B.default"), None),
}


def factors(weights: dict[str, Tensor], layer: str = Q) -> tuple[Tensor, Tensor]:
    """A [4, in] and B [out, 4]."""
    draw = torch.Generator().manual_seed(len(layer))
    rows, columns = weights[f"{layer}.weight"].shape
    return torch.randn(4, columns, generator=draw) * 0.2, torch.randn(rows, 4, generator=draw) * 0.2


def merged_with(lora, weights, folder, strength=1.0, header=None, dtype=torch.float32) -> VideoDiT:
    safetensors.torch.save_file(weights, folder / "g.safetensors")
    safetensors.torch.save_file(lora, folder / "lora.safetensors", header)
    text = f"{folder / 'lora.safetensors'}:{strength}" if strength != 1 else str(folder / "lora.safetensors")
    return VideoDiT.from_pretrained(folder / "g.safetensors", "FastGenerator", dtype, edit=partial(merge, text=text))


def changed(merged: VideoDiT, weights: dict[str, Tensor], changes: dict[str, Tensor]) -> None:
    """By these differences, and nowhere else."""
    wanted = {name: p + changes[name] if name in changes else p for name, p in weights.items()}
    torch.testing.assert_close(dict(merged.state_dict()), wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("strength", [1.0, 0.5])
def test_a_lora_is_merged_as_by_hand(form, strength, weights, tmp_path):
    (prefix, call, (down, up), alpha), stored, changes = FORMS[form], {}, {}
    for layer in DIFFUSERS:
        a, b = factors(weights, layer)
        stored[f"{prefix}{call(layer)}.{down}.weight"], stored[f"{prefix}{call(layer)}.{up}.weight"] = a, b
        if alpha:
            stored[f"{prefix}{call(layer)}.alpha"] = torch.tensor(alpha)
        changes[f"{layer}.weight"] = strength * (alpha or 4) / 4 * (b @ a)
    merged = merged_with(stored, weights, tmp_path, strength)
    changed(merged, weights, changes)
    assert (answer(merged) - answer(weights)).norm() > 0.005 * strength * answer(weights).norm()


@pytest.mark.parametrize("head", ["head.diff_m", "head.modulation.diff"])
def test_differences_of_weights_biases_norms_and_modulations(head, weights, tmp_path):
    names = {
        "blocks.1.ffn.0.weight": "blocks.1.ffn.0.diff", "blocks.1.ffn.0.bias": "blocks.1.ffn.0.diff_b",
        "blocks.1.norm3.weight": "blocks.1.norm3.diff", "blocks.1.modulation": "blocks.1.diff_m",
        "blocks.1.self_attn.norm_q.weight": "blocks.1.self_attn.norm_q.diff", "head.modulation": head,
        "blocks.1.self_attn.k.bias": "blocks.1.self_attn.k.lora_B.bias",
    }  # fmt: skip
    stored = {f"diffusion_model.{change}": torch.randn_like(weights[name]) for name, change in names.items()}
    merged = merged_with(stored, weights, tmp_path, 2.0)
    changed(merged, weights, {name: 2 * stored[f"diffusion_model.{change}"] for name, change in names.items()})


CONFIGS = {  # PEFT's config of a LoRA of rank 4, and alpha / rank
    "alpha": ({"peft_type": "LORA", "r": 4, "lora_alpha": 8}, 2),
    "rslora": ({"r": 4, "lora_alpha": 6, "use_rslora": True, "lora_dropout": 0.1, "init_lora_weights": True}, 3),
    "a pattern": ({"r": 4, "lora_alpha": 8, "alpha_pattern": {"attn2.to_q": 4, r"blocks\.\d+\.attn1\.to_q": 12}}, 3),
    "ranks": ({"r": 16, "rank_pattern": {"to_q": 4}, "lora_alpha": 16, "target_modules": ["to_q", "to_k"]}, 4),
}


@pytest.mark.parametrize("kind", CONFIGS)
@pytest.mark.parametrize("place", ["header", "file"])
def test_alpha_of_peft_and_diffusers(kind, place, weights, tmp_path):
    """From the header, as diffusers writes it, or adapter_config.json; a bias of B is a part of the product."""
    (config, scale), header = CONFIGS[kind], None
    if place == "header":
        header = {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in config.items()})}
    else:
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    (a, b), bias = factors(weights), torch.randn(256)
    layer = f"{'transformer' if place == 'header' else 'base_model.model'}.{DIFFUSERS[Q]}"
    stored = {f"{layer}.lora_A.weight": a, f"{layer}.lora_B.weight": b, f"{layer}.lora_B.bias": bias}
    merged = merged_with(stored, weights, tmp_path, header=header)
    changed(merged, weights, {f"{Q}.weight": scale * b @ a, f"{Q}.bias": scale * bias})


def peft(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    names = (f"base_model.model.{Q}.lora_{kind}.weight" for kind in "AB")
    return dict(zip(names, factors(weights), strict=True))


def test_alpha_of_a_header_alone_and_of_a_config_that_is_lost(weights, tmp_path, capsys):
    a, b = factors(weights)
    for header, scale, says in (({"ss_network_alpha": "6"}, 1.5, ""), (None, 1, "tells no alpha, nor does a file")):
        merged = merged_with(peft(weights), weights, tmp_path, header=header)
        changed(merged, weights, {f"{Q}.weight": scale * b @ a})
        assert says in capsys.readouterr().err


@pytest.mark.parametrize("config, message", [
    ({"use_dora": True}, "use_dora=True: not read"), ({"peft_type": "LOHA"}, "peft_type=LOHA: not read"),
    ({"init_lora_weights": "pissa_niter_4"}, "init_lora_weights=pissa_niter_4"), ({"fan_in_fan_out": True}, "fan_in"),
    ({"r": 8}, "rank 4, its config says 8; give the config of this"), ({"lora_alpha": "x"}, "not a number"),
])  # fmt: skip
def test_a_config_that_means_more_than_a_lora_is_refused(config, message, weights, tmp_path):
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 4, "lora_alpha": 4} | config))
    refused(message, merged_with, peft(weights), weights, tmp_path)


def test_a_lora_is_merged_before_rounding_to_8_bits(weights, tmp_path):
    a, b = factors(weights)
    layer = merged_with(peft(weights), weights, tmp_path, dtype=torch.int8).blocks[0].self_attn.q
    wanted, got = weights[f"{Q}.weight"] + b @ a, layer.weight.float() * layer.scale.float()
    assert (got - wanted).abs().max() < wanted.abs().max() / 100


@pytest.mark.parametrize("names, shapes, message", [
    ("blocks.9.self_attn.q.lora_A.weight", (4, 256), r"is called blocks\.9\.self_attn\.q\.lora_A"),
    ("text_model.x.lora_A.weight", (4, 256), "a LoRA of another network"),
    (f"{Q}.lora_A.weight", (4, 256), r"self_attn\.q has half of a LoRA"),
    (f"{Q}.alpha", (), r"self_attn\.q has half of a LoRA"),
    (f"{Q}.lora_A.one.weight {Q}.lora_A.two.weight", (4, 256), "a second LoRA in one file"),
    (f"{Q}.lora_magnitude_vector.weight", (256,), r"\(DoRA\): not read"),
    ("lycoris_blocks_0_attn1_to_q.lokr_w1", (2, 2), r"\(LoKr\): not read"),
    ("lora_unet_blocks_0_self_attn_q.oft_blocks", (2, 2), r"\(OFT\): not read"),
    ("diffusion_model.patch_embedding.set_weight", (2,), "set_weight: not read"),
    ("base_model.model.head.head.weight", (192, 256), r"head\.head\.weight: not read"),
    (f"{Q}.lora_A.weight {Q}.lora_B.weight", (4, 4), r"q\.weight is of another shape here"),
    ("blocks.0.norm3.diff", (7,), r"norm3\.weight is of another shape here"),
])  # fmt: skip
def test_a_lora_that_does_not_match_is_refused(names, shapes, message, weights, tmp_path):
    refused(message, merged_with, {name: torch.ones(shapes) for name in names.split()}, weights, tmp_path)


def decode_by_description(tensors: dict[str, Tensor], latents: Tensor) -> Tensor:
    """All frames at once, functions alone: [1, 48, F, H, W] -> [1, 3, 4 F - 3, 16 H, 16 W] in [-1, 1]."""

    def conv(x: Tensor, name: str, padding: int = 1) -> Tensor:
        return F.conv2d(x, tensors[f"{name}.weight"], tensors.get(f"{name}.bias"), padding=padding)

    x = torch.tanh(latents[0].transpose(0, 1) / 3) * 3  # (F, C, H, W)
    x, layer = conv(x, "decoder.1").relu(), 3
    for times in (1, 2, 2):
        for _ in range(3):
            past = F.pad(x, (0, 0, 0, 0, 0, 0, 1, 0))[:-1]
            y = conv(torch.cat([x, past], 1), f"decoder.{layer}.conv.0").relu()
            y = conv(y, f"decoder.{layer}.conv.2").relu()
            x, layer = (conv(y, f"decoder.{layer}.conv.4") + x).relu(), layer + 1
        x = F.interpolate(x, scale_factor=2)
        x = conv(x, f"decoder.{layer + 1}.conv", padding=0)
        x = x.reshape(times * len(x), -1, *x.shape[2:])
        x, layer = conv(x, f"decoder.{layer + 2}"), layer + 3
    video = F.pixel_shuffle(conv(x.relu(), f"decoder.{layer + 1}"), 2).clamp(0, 1)[3:]
    return video.transpose(0, 1)[None] * 2 - 1


@pytest.fixture(scope="module")
def decoder_tensors() -> dict[str, Tensor]:
    torch.manual_seed(0)
    tensors = {name: torch.randn_like(p) * 0.03 for name, p in TinyDecoder().state_dict().items()}
    return tensors | {"encoder.0.weight": torch.zeros(64, 12, 3, 3)}


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_the_small_decoder_does_what_its_description_says(suffix, decoder_tensors, tmp_path):
    file = tmp_path / f"taew2_2.{suffix}"
    (torch.save if suffix == "pth" else safetensors.torch.save_file)(decoder_tensors, file)
    latents = torch.randn(1, 48, 4, 4, 6)
    pieces = list(TinyDecoder.from_pretrained(file).frames(latents))
    assert [piece.shape[2] for piece in pieces] == [1, 4, 4, 4]
    wanted = decode_by_description(decoder_tensors, latents)
    assert wanted.std() > 0.01
    torch.testing.assert_close(torch.cat(pieces, dim=2), wanted, rtol=1e-4, atol=1e-5)


def test_a_decoder_made_to_grow_at_its_first_level_too(decoder_tensors, tmp_path):
    """Such a file's projection has twice the outputs, of which the last half is that of the frame that is kept."""
    name, file = "decoder.7.conv.weight", tmp_path / "t.pth"
    torch.save(decoder_tensors | {name: torch.cat([torch.randn(256, 256, 1, 1), decoder_tensors[name]])}, file)
    kept = TinyDecoder.from_pretrained(file).state_dict()[name]
    assert torch.equal(kept, decoder_tensors[name])
    torch.save({"decoder.1.weight": torch.zeros(1)}, file)
    refused(r"t\.pth: missing: decoder", TinyDecoder.from_pretrained, file)
