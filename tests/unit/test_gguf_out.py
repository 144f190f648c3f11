"""GGUF out: our reader gives back every byte, transformers equal logits; the tokenizer's ids survive; what can't be held is said."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import sentencepiece
import torch

from tests.helpers.tiny import VOCAB, tiny_llama
from tests.helpers.tokenizers import SPECIAL, make_hf_tokenizer, make_sp_tokenizer
from torchft.batch import Layout
from torchft.checkpoint.assets import Assets, read_assets
from torchft.checkpoint.gguf import GgufFile, unpermute
from torchft.checkpoint.gguf_arch import usable_length
from torchft.checkpoint.gguf_out import permute, write_gguf
from torchft.checkpoint.hf import copy_weights, same_bytes
from torchft.checkpoint.tensor_files import LazyTensor
from torchft.errors import CheckpointError, DataError
from torchft.models.build import spec_from_config
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.models.spec import RopeScaling, RopeSpec
from torchft.tokenizers.gguf_out import gguf_metadata
from torchft.tokenizers.load import load_tokenizer

VOCAB_SIZE = 480  # more rows than the tokenizer has ids
SPEC = replace(tiny_llama(num_layers=2), vocab_size=VOCAB_SIZE)
SPEC = replace(SPEC, heads={"lm": replace(SPEC.heads["lm"], size=VOCAB_SIZE)})
assert VOCAB_SIZE != VOCAB
BASE = {"vocab_size": VOCAB_SIZE, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4, "num_attention_heads": 4}
BASE |= {"num_key_value_heads": 2, "max_position_embeddings": 40, "initializer_range": 0.1, "rms_norm_eps": 1e-5}
GEMMA = {"head_dim": 256, "query_pre_attn_scalar": 256, "sliding_window": 9, "rms_norm_eps": 1e-6}
FAMILIES = {  # config.json; head sizes and numbers that transformers does not read from GGUF are the defaults of its config classes
    "llama": BASE | {"model_type": "llama", "head_dim": 32},
    "mistral": BASE | {"model_type": "mistral", "sliding_window": 24, "rope_theta": 1e6},  # up to its window it is a llama
    "qwen2": BASE | {"model_type": "qwen2", "tie_word_embeddings": True, "rope_theta": 1e6},
    "qwen3": BASE | {"model_type": "qwen3", "head_dim": 128, "rope_theta": 1e6},
    "gemma2": BASE | GEMMA | {"model_type": "gemma2"},
    "gemma3": BASE | GEMMA | {"model_type": "gemma3_text", "num_hidden_layers": 7, "rope_theta": 1e6},
    "phi3": BASE | {"model_type": "phi3", "sliding_window": None},
}


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


@pytest.mark.parametrize("kind, bound", [("f16", 1e-5), ("bf16", 1e-5), ("q8_0", 0.06)])
@pytest.mark.parametrize("name", FAMILIES)
def test_transformers_computes_the_same(name, kind, bound, assets, tmp_path):
    """transformers(gguf_file=) on the file: logits as ours from the same file (1e-5), and as of the model written, within its kind."""
    transformers = pytest.importorskip("transformers")
    dtype = {"f16": torch.float16, "bf16": torch.bfloat16, "q8_0": torch.float32}[kind]
    spec = spec_from_config(FAMILIES[name], where=name)
    before = weights(spec, dtype)
    write_gguf(tmp_path / "m.gguf", spec, before, assets, kind, name=f"tiny {spec.family}")
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file="m.gguf", dtype=torch.float32)
    tokens = torch.randint(0, 400, (2, usable_length(spec)), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        want = theirs(tokens).logits
    own, file = logits(spec, before, tokens), GgufFile(tmp_path / "m.gguf")
    scale = own.abs().max()
    assert (logits(file.spec, file.weights().tensors, tokens) - want).abs().max() / scale <= 1e-5
    error = (own - want).abs().max() / scale
    assert error <= bound and (error > 1e-4 or kind != "q8_0")


@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_comes_back(name, assets, tmp_path):
    """Spec and tensors by our reader; norms of 1 + weight to fp32's rounding, all else byte by byte."""
    spec = spec_from_config(FAMILIES[name], where=name)
    before = weights(spec, torch.bfloat16)
    write_gguf(tmp_path / "m.gguf", spec, before, assets, "bf16", name=name)
    file = GgufFile(tmp_path / "m.gguf")
    same = {"family": file.spec.family, "init_std": file.spec.init_std, "max_seq_len": usable_length(spec)}
    assert (spec.family, file.spec.family) in (("mistral", "llama"), (spec.family, spec.family))
    assert file.spec == replace(spec, layers=file.spec.layers, **same)
    for key, tensor in file.weights().tensors.items():
        if spec.norm.unit_offset and key.endswith("norm.weight"):
            assert (tensor.read(()) - before[key].read(()).float()).abs().max() <= 1.2e-7, key
        else:
            assert same_bytes(tensor.read(()).bfloat16(), before[key].read(())), key


def test_the_tokenizer_is_transformers(assets, tmp_path):
    """transformers reads the byte-level tokenizer from the file: equal ids of a text and of the named tokens."""
    transformers = pytest.importorskip("transformers")
    write_gguf(tmp_path / "m.gguf", SPEC, weights(SPEC, torch.float16), assets, "f16", name="tiny")
    ours = load_tokenizer(_folder(assets, tmp_path / "tok"))
    reader = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    text = "The red boat sails over 12 apples!\n\n  naïve café"
    assert reader.encode(text, add_special_tokens=False) == ours.encode(text)
    assert (reader.bos_token_id, reader.eos_token_id) == (ours.bos_id, ours.eos_id)


@pytest.mark.parametrize("family, prefix", [("mistral", True), ("gemma3", False)])
def test_a_sentencepiece_tokenizer_travels(family, prefix, tmp_path):
    """Pieces, scores, types, byte fallback and added tokens: transformers reads equal ids of texts from the file."""
    transformers = pytest.importorskip("transformers")
    added = {"430": {"content": "<extra>", "special": True}}
    config = {"add_bos_token": True, "bos_token": "<s>", "eos_token": "</s>", "add_prefix_space": prefix, "added_tokens_decoder": added}
    folder = make_sp_tokenizer(tmp_path / "tok", user_defined=("<|im_start|>", "<|im_end|>", "▁▁", "▁▁▁"), **config)
    ours, spec = load_tokenizer(folder), spec_from_config(FAMILIES[family], where=family)
    write_gguf(tmp_path / "m.gguf", spec, weights(spec, torch.float16), read_assets(folder), "f16", name=f"tiny {family}")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path, gguf_file="m.gguf")
    for text in ("The red boat sails over 12 apples!", "naïve café 日本 😀", "a\nb", "x   y  z"):
        assert theirs.encode(text, add_special_tokens=False) == ours.encode(text), text
    assert theirs.encode("a", add_special_tokens=True)[:1] == [ours.bos_id] and theirs.eos_token_id == ours.eos_id
    assert theirs.convert_tokens_to_ids(["<extra>", "<|im_end|>"]) == [430, ours.special_tokens["<|im_end|>"]]


def test_pieces_keep_their_scores_and_types(tmp_path):
    """As sentencepiece itself reads them: llama.cpp merges by the scores; ids beyond are unused, and never merged into."""
    folder = make_sp_tokenizer(tmp_path / "tok", user_defined=("<|im_start|>", "<|im_end|>"))
    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    found = gguf_metadata(read_assets(folder).files, 480, where="x")
    tokens, scores, types = (found[f"tokenizer.ggml.{key}"] for key in ("tokens", "scores", "token_type"))
    size = model.get_piece_size()
    assert tokens[:size] == [model.id_to_piece(i) for i in range(size)] and scores[:size] == [model.get_score(i) for i in range(size)]
    assert {types[i] for i in range(size) if model.is_byte(i)} == {6} and {types[i] for i in range(size) if model.is_unknown(i)} == {2}
    assert (
        {types[i] for i in range(size) if model.is_control(i)} == {3} and {*types[size:]} == {5} and max(scores[size:]) < min(scores[:size])
    )


def test_a_unigram_model_is_refused(tmp_path):
    """llama.cpp would cut it otherwise."""
    files = read_assets(make_sp_tokenizer(tmp_path, model_type="unigram")).files
    with pytest.raises(DataError, match="no BPE"):
        gguf_metadata(files, 480, where="x")
    with pytest.raises(DataError, match="no SentencePiece model"):
        gguf_metadata({"tokenizer.model": b"\x0a\x05abc"}, 480, where="x")


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
    cases += [(replace(SPEC, family="gpt2"), big, assets, CheckpointError, "family gpt2")]
    for spec, tensors, given, error, words in cases:
        with pytest.raises(error, match=words):
            write_gguf(tmp_path / "m.gguf", spec, tensors, given, "f16", name="tiny")
        assert not list(tmp_path.iterdir())
    write_gguf(tmp_path / "m.gguf", SPEC, big, assets, "bf16", name="tiny")


@pytest.mark.parametrize(
    "name, change, words",
    [
        ("qwen2", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, "rope"),
        ("qwen3", {"attention_bias": True}, "attention"),
        ("gemma2", {"query_pre_attn_scalar": 144}, "attention"),
        ("gemma2", {"layer_types": ["full_attention"] * 4}, "layers"),
        ("gemma3", {"rope_local_base_freq": 5e4}, "rope"),
        ("gemma3", {"final_logit_softcapping": 30.0}, "softcapping"),
        ("phi3", {"partial_rotary_factor": 0.5}, "rope"),
    ],
)
def test_maths_that_llama_cpp_fixes_otherwise_is_refused(name, change, words, assets, tmp_path):
    """What the file can't say is found by reading it back, and named; nothing is written."""
    spec = spec_from_config(FAMILIES[name] | change, where=name)
    with pytest.raises(CheckpointError, match=words):
        write_gguf(tmp_path / "m.gguf", spec, weights(spec, torch.float16), assets, "f16", name="tiny")
    assert not list(tmp_path.iterdir())


def _folder(assets: Assets, folder: Path) -> Path:
    folder.mkdir()
    for name, content in assets.files.items():
        (folder / name).write_bytes(content)
    return folder
