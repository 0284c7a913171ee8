"""The real codec: prompts through UMT5 as transformers computes them, both layouts on disk, videos through the VAE."""

import gc
import html
import re
import sys
import weakref
from types import SimpleNamespace

import pytest
import torch
from conftest import refused
from test_vae import SMALL, pair

from wan import umt5 as umt5_module
from wan.codec import NEGATIVE_PROMPT, WanCodec
from wan.umt5 import UMT5_XXL, TextEncoder, clean_prompt, read_text_encoder
from wan.vae import WanVAE

transformers = pytest.importorskip("transformers", reason="the text encoder needs requirements-wan.txt")
ftfy = pytest.importorskip("ftfy", reason="prompts are cleaned with requirements-wan.txt")
SHAPES = {
    "vocab_size": 60, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
    "feed_forward_proj": "gated-gelu",
}  # fmt: skip
PROMPT = "a red disc spinning"


def small_umt5():
    torch.manual_seed(0)
    network = transformers.UMT5EncoderModel(transformers.UMT5Config(**SHAPES)).eval()
    for p in network.parameters():
        torch.nn.init.normal_(p, mean=float(p.ndim == 1), std=0.2)  # norms about 1; position biases not all alike
    return network.bfloat16()


def write_tokenizer(folder, extra=()):
    """A vocabulary of letters with T5's special tokens, in the files of a published tokenizer. `extra`: more signs."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    words = ["<pad>", "</s>", "<unk>", "\u2581", *"abcdefghijklmnopqrstuvwxyz&", *extra]
    tokenizer = Tokenizer(models.Unigram([(word, -1.0) for word in words], unk_id=2))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    ).save_pretrained(folder)


def wan_name(name: str) -> str:
    """A parameter's name in Wan's file, from transformers' name."""
    name = name.replace("shared.", "token_embedding.").replace("encoder.final_layer_norm", "norm")
    name = re.sub(r"encoder\.block\.(\d+)\.layer\.0\.layer_norm", r"blocks.\1.norm1", name)
    name = re.sub(r"encoder\.block\.(\d+)\.layer\.1\.layer_norm", r"blocks.\1.norm2", name)
    name = re.sub(r"encoder\.block\.(\d+)\.layer\.\d\.", r"blocks.\1.", name)
    name = name.replace("SelfAttention.relative_attention_bias", "pos_embedding.embedding")
    for theirs, ours in (("SelfAttention", "attn"), ("DenseReluDense.wi_0", "ffn.gate.0"),
                         ("DenseReluDense.wi_1", "ffn.fc1"), ("DenseReluDense.wo", "ffn.fc2")):  # fmt: skip
        name = name.replace(theirs, ours)
    return name


@torch.no_grad()
@pytest.mark.parametrize("layout", ["wan", "diffusers"])
@pytest.mark.parametrize("fast", [True, False])  # with 8 bits, the rest is bfloat16 where that is fast
def test_text_encoder_of_each_layout_gives_transformers_output(layout, fast, tmp_path, monkeypatch):
    monkeypatch.setattr("core.weights.fast_bfloat16", lambda device: fast)
    umt5 = small_umt5()
    ids = torch.tensor([[5, 9, 33, 1, 0], [7, 7, 8, 9, 1]])
    mask = torch.tensor([[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]])
    path = tmp_path / "weights"
    if layout == "diffusers":
        umt5.save_pretrained(path)
    else:
        named = {wan_name(n): p for n, p in umt5.state_dict().items() if n != "encoder.embed_tokens.weight"}
        assert "blocks.1.ffn.gate.0.weight" in named and "blocks.0.pos_embedding.embedding.weight" in named
        torch.save(named, path)
    networks = umt5, *(read_text_encoder(path, dtype, SHAPES) for dtype in (torch.bfloat16, torch.int8))
    wanted, exact, short = (network(input_ids=ids, attention_mask=mask).last_hidden_state for network in networks)
    assert torch.equal(exact, wanted) and wanted.std() > 0.1
    wanted = umt5.float()(input_ids=ids, attention_mask=mask).last_hidden_state
    assert short.dtype == (torch.bfloat16 if fast else torch.float32)
    assert 0 < (short - wanted).norm() / wanted.norm() < 0.04  # of 8 bits, and of bfloat16's own 0.018


def write_folder(folder):
    """A small text encoder and VAE in the layout of Wan2.2-TI2V-5B-Diffusers."""
    small_umt5().save_pretrained(folder / "text_encoder")
    write_tokenizer(folder / "tokenizer")
    pair(SMALL)[1].save_pretrained(folder / "vae")
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_folder(tmp_path_factory.mktemp("wan"))


def test_prompts_become_padded_embeddings(folder):
    encode = WanCodec(folder, torch.device("cpu")).text_encoder()
    text = encode([PROMPT, "a", "  a   &amp;amp; b "])
    assert text.shape == (3, 512, 32) and text.dtype == torch.bfloat16
    tokens = [len(PROMPT) + 2, 3, 7]  # a mark before every word, and the end
    assert [int(row.any(-1).sum()) for row in text] == tokens
    assert not text[0, tokens[0] :].any()  # padding is zeros
    alone = encode(["a & b"])[0]
    assert (text[2] - alone).norm() < 0.01 * alone.norm()  # neighbours in a batch change nothing
    ids = transformers.AutoTokenizer.from_pretrained(folder / "tokenizer")(["a & b"], return_tensors="pt").input_ids
    with torch.no_grad():
        assert torch.equal(alone[: tokens[2]], small_umt5()(input_ids=ids).last_hidden_state[0])
    assert encode(["a " * 600])[0].any(-1).all()  # cut at 512


# As users type and paste them -> as Wan's tokenizer gets them.
PROMPTS = {
    "full-width commas": ("a disc，red，round", "a disc,red,round"),
    "entities escaped twice": ("Tom &amp;amp; Jerry &amp;lt;3", "Tom & Jerry <3"),
    "entities escaped once": ("salt &amp; pepper &#39;n&#39; all", "salt & pepper 'n' all"),
    "white space": ("  a  red\tdisc\n\n spins \u3000 ", "a red disc spins"),
    "mojibake": ("a cafÃ© at nightâ€”busy", "a café at night—busy"),
    "curly quotes": ("it’s “red”", 'it\'s "red"'),  # noqa: RUF001
    "ligatures and full-width letters": ("ﬂoating ＡＢＣ", "floating ABC"),  # noqa: RUF001
    "nothing": (" \n", ""),
}


def test_prompts_are_cleaned_as_wan_cleans_them_and_so_are_token_ids(tmp_path, monkeypatch):
    """Of the negative prompt too: ftfy makes plain signs of its 27 full-width ones."""
    for typed, meant in PROMPTS.values():
        assert clean_prompt(typed) == meant == reference_cleaning(typed)
    write_tokenizer(tmp_path, extra=sorted({*NEGATIVE_PROMPT, *",<>'\"é—"}))
    monkeypatch.setattr(umt5_module, "read_text_encoder", lambda path, dtype: TokenIds())
    encoder = TextEncoder(tmp_path, tmp_path / "none", torch.device("cpu"), 512, torch.bfloat16)
    prompts = [NEGATIVE_PROMPT, PROMPT, *(typed for typed, _ in PROMPTS.values())]
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path)
    text = encoder(prompts)
    assert text.shape == (len(prompts), 512, 1)
    for row, mask, prompt in zip(encoder.network.ids, encoder.network.mask, prompts, strict=True):
        assert row[mask.bool()].tolist() == tokenizer(reference_cleaning(prompt)).input_ids
    changed = sum(a != b for a, b in zip(NEGATIVE_PROMPT, reference_cleaning(NEGATIVE_PROMPT), strict=True))
    assert (len(NEGATIVE_PROMPT), changed) == (137, 27)
    raw = tokenizer(NEGATIVE_PROMPT).input_ids
    assert tokenizer.unk_token_id not in raw and raw != tokenizer(clean_prompt(NEGATIVE_PROMPT)).input_ids


def reference_cleaning(prompt: str) -> str:
    """Wan's, as its tokenizer's file has it: ftfy, two rounds of HTML entities, white space."""
    prompt = html.unescape(html.unescape(ftfy.fix_text(prompt))).strip()
    return re.sub(r"\s+", " ", prompt).strip()


class TokenIds(torch.nn.Module):
    """In place of the network: keeps what it is given, and gives each token's id as its embedding."""

    def forward(self, input_ids, attention_mask):
        self.ids, self.mask = input_ids, attention_mask
        return SimpleNamespace(last_hidden_state=input_ids[..., None].bfloat16())


def test_missing_ftfy_is_named_before_anything_large_is_read_and_so_is_an_incomplete_folder(tmp_path, monkeypatch):
    write_tokenizer(tmp_path / "tokenizer")
    codec = WanCodec(tmp_path, torch.device("cpu"))
    nothing = r"holds no Wan2.2_VAE.pth or vae; give"
    refused(nothing, codec.encode_video, torch.zeros(1, 3, 1, 32, 32))
    (tmp_path / "text_encoder").mkdir()
    (tmp_path / "text_encoder/config.json").write_text("{}")
    refused(r"model.safetensors: no such file", codec.text_encoder)
    monkeypatch.setitem(sys.modules, "ftfy", None)  # an import of it fails
    monkeypatch.setattr(umt5_module, "read_text_encoder", lambda path, dtype: pytest.fail("read for nothing"))
    refused(r"^ftfy: not installed; pip install -r requirements-wan\.txt$", codec.text_encoder)


def test_the_published_text_encoder_has_its_size():
    with torch.device("meta"):
        network = transformers.UMT5EncoderModel(transformers.UMT5Config(**UMT5_XXL)).encoder
    assert sum(p.numel() for p in network.parameters()) == 5_680_910_336


def test_a_text_encoder_that_is_dropped_leaves_its_memory_at_once(folder):
    encoder = WanCodec(folder, torch.device("cpu"), low=True).text_encoder()
    alive = weakref.ref(encoder.network.block[0].layer[0].SelfAttention.q.weight)
    encoder([PROMPT])
    gc.disable()
    del encoder
    gone = alive() is None
    gc.enable()
    assert gone


def test_videos_pass_through_the_vae(folder):
    codec, alone = WanCodec(folder, torch.device("cpu"), torch.bfloat16), WanVAE.from_pretrained(folder / "vae")
    video = torch.rand(1, 3, 5, 32, 48) * 2 - 1
    latents = codec.encode_video(video)
    assert torch.equal(latents, alone.encode(video)) and latents.dtype == torch.float32
    decoded, wanted = codec.decode_video(latents), alone.decode(latents)
    assert torch.equal(torch.cat(list(codec.pieces(latents)), dim=2).float(), decoded)
    (tiled,) = WanCodec(folder, torch.device("cpu"), torch.bfloat16, low=True).pieces(latents)
    assert torch.equal(tiled, decoded)  # it is no larger than a tile
    assert decoded.shape == video.shape and decoded.dtype == torch.float32
    assert 0 < (decoded - wanted).norm() / wanted.norm() < 0.05  # bfloat16
