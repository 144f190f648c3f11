"""GGUF out: our reader gives back every byte, transformers equal logits; the tokenizer's ids survive; what can't be held is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from tests.helpers.tiny import VOCAB, tiny_llama
from tests.helpers.tokenizers import SPECIAL, make_hf_tokenizer
from torchft.batch import Layout
from torchft.checkpoint.assets import Assets, read_assets
from torchft.checkpoint.gguf import GgufFile, unpermute
from torchft.checkpoint.gguf_out import permute, write_gguf
from torchft.checkpoint.hf import copy_weights, same_bytes
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.errors import CheckpointError, DataError
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.models.spec import RopeScaling, RopeSpec
from torchft.tokenizers.load import load_tokenizer

VOCAB_SIZE = 480  # more rows than the tokenizer has ids
SPEC = replace(tiny_llama(num_layers=2), vocab_size=VOCAB_SIZE)
SPEC = replace(SPEC, heads={"lm": replace(SPEC.heads["lm"], size=VOCAB_SIZE)})
assert VOCAB_SIZE != VOCAB


def lazy(tensor: torch.Tensor) -> LazyTensor:
    return LazyTensor(tuple(tensor.shape), tensor.dtype, lambda part: tensor[part])


def weights(spec, dtype: torch.dtype) -> dict[str, LazyTensor]:
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, 0)
    return {name: lazy(p.detach().to(dtype)) for name, p in model.named_parameters()}


@pytest.fixture(scope="module")
def assets(tmp_path_factory) -> Assets:
    return read_assets(make_hf_tokenizer(tmp_path_factory.mktemp("tok"), bos_token="<|bos|>"))


@torch.no_grad()
def logits(spec, tensors: dict[str, LazyTensor], tokens: torch.Tensor) -> torch.Tensor:
    model = build_decoder(spec, device="cpu")
    copy_weights(model.named_parameters(), tensors)
    index, document = torch.arange(tokens.shape[1], dtype=torch.int32), torch.zeros(tokens.shape, dtype=torch.int32)
    return model(tokens, layout=Layout(document, document, index, index, plain_causal=True), positions=index[None])


@pytest.mark.parametrize("kind, dtype", [("f16", torch.float16), ("bf16", torch.bfloat16)])
@pytest.mark.parametrize("variant", ["tied", "untied", "bias", "head_dim", "linear", "llama3"])
def test_our_reader_gives_back_every_byte(kind, dtype, variant, assets, tmp_path):
    """Spec and tensors of each variant of the architecture, matrices and vectors, are what was written."""
    tied = variant != "untied"
    spec = replace(SPEC, tie_embeddings=tied)
    if variant == "bias":
        spec = replace(spec, attention=replace(spec.attention, qkv_bias=True, out_bias=True))
    elif variant == "head_dim":
        spec = replace(spec, attention=replace(spec.attention, head_dim=16))
    elif variant in ("linear", "llama3"):
        scaling = RopeScaling("linear", 2.0) if variant == "linear" else RopeScaling("llama3", 8.0)
        spec = replace(spec, rope={"default": RopeSpec(5e5, scaling)}, attention=replace(spec.attention, head_dim=64))
    before = weights(spec, dtype)
    write_gguf(tmp_path / "m.gguf", spec, before, assets, kind, name="tiny")
    file = GgufFile(tmp_path / "m.gguf")
    assert replace(file.spec, init_std=spec.init_std) == spec
    after = file.weights().tensors
    assert list(after) == list(before)
    for name, tensor in before.items():
        assert same_bytes(after[name].read(()).to(dtype), tensor.read(())), name
    assert [p.name for p in tmp_path.iterdir()] == ["m.gguf"]


@pytest.mark.parametrize("kind, bound", [("f16", 1e-5), ("bf16", 1e-5), ("q8_0", 0.03)])
def test_transformers_computes_the_same(kind, bound, assets, tmp_path):
    """transformers(gguf_file=) on the file: logits as ours from the same file (1e-5), and as of the model written, within its kind."""
    transformers = pytest.importorskip("transformers")
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "q8_0": torch.float32}[kind]
    spec = replace(SPEC, tie_embeddings=False)
    before = weights(spec, dtype)
    write_gguf(tmp_path / "m.gguf", spec, before, assets, kind, name="tiny")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    tokens = torch.randint(0, 400, (2, 24), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(tokens).logits
    own = logits(spec, before, tokens)
    scale = own.abs().max()
    assert (logits(spec, GgufFile(tmp_path / "m.gguf").weights().tensors, tokens) - want).abs().max() / scale <= 1e-5
    error = (own - want).abs().max() / scale
    assert error <= bound and (error > 1e-4 or kind != "q8_0")
    ours = load_tokenizer(_folder(assets, tmp_path / "tok"))
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "The red boat sails over 12 apples!\n\n  naïve café"
    assert reader.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (reader.bos_token_id, reader.eos_token_id) == (ours.bos_id, ours.eos_id)


def test_the_tokenizer_comes_back(assets, tmp_path):
    """Read by our reader: equal ids of texts, special and added tokens as such, template and special ids; padding ids are unused."""
    write_gguf(tmp_path / "m.gguf", SPEC, weights(SPEC, torch.float16), assets, "f16", name="tiny")
    files = GgufFile(tmp_path / "m.gguf").assets().files
    before, after = load_tokenizer(_folder(assets, tmp_path / "a")), load_tokenizer(_folder(Assets({}, {}, files), tmp_path / "b"))
    for text in ("The teacher answers: 12 pears?", "é ü 😀 日本", "<|im_start|>user <think>", "a\n\n\nb   c"):
        assert after.encode(text) == before.encode(text)
    assert set(SPECIAL) <= set(after.special_tokens) and after.special_tokens.items() >= before.special_tokens.items()
    assert after.added_words == before.added_words and after.chat_template == before.chat_template
    assert (after.bos_id, after.eos_id, after.pad_id, after.adds_bos) == (before.bos_id, before.eos_id, before.pad_id, before.adds_bos)


def test_permutations_are_inverse():
    """Rows and biases, any number of heads."""
    for heads, shape in ((3, (24, 5)), (1, (8,)), (4, (16, 2))):
        x = torch.randn(shape)
        assert torch.equal(unpermute(permute(x, heads), heads), x) and torch.equal(permute(unpermute(x, heads), heads), x)


def test_what_gguf_can_not_hold_is_said(assets, tmp_path):
    """A value beyond f16, a tokenizer with a splitting rule of its own, no tokenizer, another family: an error, and no file."""
    big = weights(SPEC, torch.float32)
    big["layers.0.mlp.up_proj.weight"] = lazy(torch.full(big["layers.0.mlp.up_proj.weight"].shape, 1e5))
    rules = json.loads(assets.files["tokenizer.json"])
    rules["pre_tokenizer"]["pretokenizers"][0]["pattern"]["Regex"] += "|x"
    odd = Assets({}, {}, assets.files | {"tokenizer.json": json.dumps(rules).encode()})
    cases = [(SPEC, big, assets, CheckpointError, "use bf16"), (SPEC, big, odd, DataError, "rule of its own")]
    cases += [(SPEC, big, Assets(), DataError, "no tokenizer.json")]
    cases += [(replace(SPEC, family="other"), big, assets, CheckpointError, "family other")]
    for spec, tensors, given, error, words in cases:
        with pytest.raises(error, match=words):
            write_gguf(tmp_path / "m.gguf", spec, tensors, given, "f16", name="tiny")
        assert not list(tmp_path.iterdir())
    write_gguf(tmp_path / "m.gguf", SPEC, big, assets, "bf16", name="tiny")


def _folder(assets: Assets, folder: Path) -> Path:
    folder.mkdir()
    for name, content in assets.files.items():
        (folder / name).write_bytes(content)
    return folder
