"""GGUF files, written here with llama.cpp's own package and its own order of q and k rows."""

import json

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from tests.helpers.gguf_files import pairs, write
from tests.helpers.tiny import tiny_llama
from torchft.checkpoint.gguf import GgufFile, unpermute
from torchft.errors import CheckpointError, ConfigError, DataError
from torchft.models.families import llama
from torchft.models.layers.rope import inverse_frequencies
from torchft.models.spec import RopeScaling, RopeSpec
from torchft.tokenizers.gguf import PRE, tokenizer_files

gguf = pytest.importorskip("gguf")


@pytest.mark.parametrize("options", [{"tied": True}, {"tied": False}, {"tied": False, "qkv_bias": True}])
def test_unquantised_weights_come_out_bit_by_bit(tmp_path, options):
    """Names, shapes, q and k row order (biases too), tied or not; and the spec is the model's."""
    spec = tiny_llama(**options)
    if "qkv_bias" in options:
        spec = llama.from_hf(llama.to_hf(tiny_llama(tied=False)) | {"attention_bias": True, "mlp_bias": True})
    expected = write(tmp_path / "m.gguf", spec)
    file = GgufFile(tmp_path / "m.gguf")
    assert llama.to_hf(file.spec) == llama.to_hf(spec) | {"initializer_range": 0.02}
    weights = file.weights().tensors
    assert weights.keys() == expected.keys()
    assert all(torch.equal(weights[name].read(()), expected[name]) for name in expected)
    part = (slice(3, 9), slice(0, 4))
    name = "layers.1.self_attn.q_proj.weight"
    assert torch.equal(weights[name].read(part), expected[name][part])


def test_unpermute_undoes_the_pairs_and_is_not_the_identity():
    """The negative control: without it q and k are other matrices."""
    weight = torch.randn(4 * 8, 5)
    assert torch.equal(unpermute(pairs(weight, 4), 4), weight) and not torch.equal(pairs(weight, 4), weight)


def test_quantised_weights_are_the_packages_values(tmp_path):
    """Exactly what llama.cpp's package makes of the original rows (it quantises row by row), near the original."""
    kind = gguf.GGMLQuantizationType.Q8_0
    expected = write(tmp_path / "m.gguf", tiny_llama(), kind=kind)
    for name, tensor in GgufFile(tmp_path / "m.gguf").weights().tensors.items():
        original = expected[name].numpy()
        wanted = original if original.ndim == 1 else gguf.quants.dequantize(gguf.quants.quantize(original, kind), kind)
        assert np.array_equal(tensor.read(()).numpy(), wanted) and np.abs(wanted - original).max() < 0.01


def test_llama3_scaling_is_recovered_from_its_factors(tmp_path):
    """rope_freqs becomes rope_scaling with Llama 3.1's constants; divisors of another rule are an error, never dropped."""
    spec = llama.from_hf(
        llama.to_hf(tiny_llama()) | {"rope_theta": 5e5, "head_dim": 64, "num_attention_heads": 1, "num_key_value_heads": 1}
    )
    scaling = RopeScaling("llama3", 32.0)
    divisors = inverse_frequencies(RopeSpec(5e5), 64) / inverse_frequencies(RopeSpec(5e5, scaling), 64)
    heads = [("attention.key_length", 64), ("attention.value_length", 64)]
    write(tmp_path / "m.gguf", spec, more=heads, extra={"rope_freqs.weight": divisors.numpy()})
    assert GgufFile(tmp_path / "m.gguf").spec.rope["default"].scaling == scaling
    write(tmp_path / "n.gguf", spec, more=heads, extra={"rope_freqs.weight": divisors.numpy() ** 2})
    with pytest.raises(CheckpointError, match="no llama3 rope scaling"):
        GgufFile(tmp_path / "n.gguf")


@pytest.mark.parametrize(
    "options, words",
    [
        ({"more": [("expert_count", 8)]}, "llama.expert_count"),
        ({"more": [("attention.sliding_window", 8)]}, "llama.attention.sliding_window"),
        ({"more": [("rope.scaling.type", "yarn")]}, "llama.rope.scaling.type"),
        ({"more": [("rope.dimension_count", 4)]}, "llama.rope.dimension_count"),
        ({"more": [("vocab_size", 5)]}, "llama.vocab_size"),
        ({"drop": ["block_count"]}, "llama.block_count"),
        ({"arch": "gemma"}, "architecture 'gemma'"),
        ({"extra": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, "blk.0.attn_q_norm.weight"),
        ({"more": [("block_count", 5)]}, "missing"),
        ({"more": [("feed_forward_length", 32)]}, "another shape"),
    ],
)
def test_models_that_are_not_plain_llama_are_refused(tmp_path, options, words):
    """A Mixtral, a window, another scaling, a foreign tensor, metadata that contradict the weights: named, not ignored."""
    write(tmp_path / "m.gguf", tiny_llama(), **options)
    with pytest.raises((CheckpointError, ConfigError), match=words):
        GgufFile(tmp_path / "m.gguf").weights()


def test_broken_files_are_refused(tmp_path):
    """Missing, empty, of another kind, cut in the metadata or in the tensors."""
    write(tmp_path / "m.gguf", tiny_llama())
    content = (tmp_path / "m.gguf").read_bytes()
    for name, part in [("empty", b""), ("other", b"PK\x03\x04" * 99), ("metadata", content[:300]), ("tensors", content[:-64])]:
        (tmp_path / f"{name}.gguf").write_bytes(part)
        with pytest.raises(CheckpointError, match="damaged"):
            GgufFile(tmp_path / f"{name}.gguf")
    with pytest.raises(CheckpointError, match="does not exist"):
        GgufFile(tmp_path / "none.gguf")


def metadata(pre: str, **changes) -> tuple[dict, Tokenizer]:
    """A small byte-level BPE trained with the split of `pre`, as GGUF metadata; and the tokenizer itself."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer, tokenizer.decoder = PRE[pre](), decoders.ByteLevel()
    texts = ["the cat sat on the mat in 2024 and 2025", "it's the 12th  time\n\n  don't"] * 20
    trainer = trainers.BpeTrainer(vocab_size=330, special_tokens=special, initial_alphabet=pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    model = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    fields = {"model": "gpt2", "pre": pre, "tokens": tokens, "merges": merges, "token_type": [3, 3, 3] + [1] * (len(tokens) - 3)}
    fields |= {"bos_token_id": 1, "eos_token_id": 2, "padding_token_id": 2, "unknown_token_id": 0} | changes
    return {"general.architecture": "llama", "llama.context_length": 77} | {f"tokenizer.ggml.{k}": v for k, v in fields.items()}, tokenizer


@pytest.mark.parametrize("pre", PRE)
def test_the_rebuilt_tokenizer_gives_the_same_ids(pre):
    """Every known split: ids, special tokens as one id, decoding back."""
    fields, original = metadata(pre, add_bos_token=False)
    rebuilt = Tokenizer.from_str(tokenizer_files(fields, where="x")["tokenizer.json"].decode())
    for text in ["the cat  sat\n on 2024", "it's 12345 don't\t\u00fc \u4f60\u597d \U0001f642", "   3  4", "a<|im_end|>b"]:
        assert rebuilt.encode(text).ids == original.encode(text).ids
        assert rebuilt.decode(rebuilt.encode(text).ids, skip_special_tokens=False) == text
    assert rebuilt.decode(rebuilt.encode("a<|im_end|>b").ids) == "ab", "special tokens are known as such"
    assert rebuilt.get_vocab() == original.get_vocab()


def test_digits_are_split_before_the_spaces():
    """smollm: one token a digit, whatever the merges know."""
    fields, _ = metadata("smollm")
    rebuilt = Tokenizer.from_str(tokenizer_files(fields, where="x")["tokenizer.json"].decode())
    assert rebuilt.encode("in 2024").tokens[-4:] == ["2", "0", "2", "4"]


def test_bos_is_added_once_and_only_if_the_file_says_so():
    """llama-bpe adds BOS by default, as llama.cpp does; the flag decides otherwise."""
    text, bos = "the cat", 1
    for pre, flag, expected in [("llama-bpe", None, 1), ("llama-bpe", False, 0), ("smollm", None, 0), ("smollm", True, 1)]:
        fields, _ = metadata(pre, **({} if flag is None else {"add_bos_token": flag}))
        files = tokenizer_files(fields, where="x")
        rebuilt = Tokenizer.from_str(files["tokenizer.json"].decode())
        assert rebuilt.encode(text).ids.count(bos) == expected == rebuilt.encode(text).ids[:1].count(bos)
        assert rebuilt.encode(text, add_special_tokens=False).ids.count(bos) == 0
        assert json.loads(files["tokenizer_config.json"])["add_bos_token"] == bool(expected)


def test_settings_carry_special_tokens_template_and_length():
    """What a reader of the folder needs beside the ids."""
    fields, _ = metadata("smollm")
    files = tokenizer_files(fields | {"tokenizer.chat_template": "{{ x }}"}, where="x")
    settings = json.loads(files["tokenizer_config.json"])
    expected = {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>", "unk_token": "<|endoftext|>"}
    assert expected.items() <= settings.items()
    assert (settings["model_max_length"], settings["chat_template"], files["chat_template.jinja"]) == (77, "{{ x }}", b"{{ x }}")


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"pre": "tekken"}, "'tekken'"),
        ({"model": "llama"}, "--tokenizer FOLDER"),
        ({"merges": ["zz qq"]}, "merges that don't fit"),
        ({"merges": ["a"]}, "merges that don't fit"),
        ({"tokens": ["a", "b", "a"], "token_type": [1, 1, 1], "merges": []}, "2 distinct"),
        ({"token_type": [1]}, "1 types"),
        ({"eos_token_id": 10**6}, "special token id"),
        ({"eos_token_id": "2"}, "special token id"),
        ({"tokens": 5}, "must be lists"),
        ({"merges": [1]}, "must be lists"),
    ],
)
def test_tokenizers_that_can_not_be_rebuilt_are_refused(changes, words):
    """Another split or a broken table gives other ids without any sign: an error instead."""
    fields, _ = metadata("smollm")
    with pytest.raises(DataError, match=words):
        tokenizer_files(fields | {f"tokenizer.ggml.{k}": v for k, v in changes.items()}, where="x")
