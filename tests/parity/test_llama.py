"""The llama family against transformers' LlamaForCausalLM, on random tiny models that transformers itself wrote to disk."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from torchft.batch import Layout
from torchft.checkpoint.assets import read_assets
from torchft.checkpoint.hf import load_hf, same_bytes, save_hf
from torchft.checkpoint.tensor_files import open_tensors
from torchft.models.build import read_config
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.families import llama

transformers = pytest.importorskip("transformers")

BASE = {"vocab_size": 97, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
BASE |= {"num_key_value_heads": 2, "max_position_embeddings": 4096, "rms_norm_eps": 1e-5, "initializer_range": 0.1}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
SHAPES = {
    "gqa": {},
    "mha": {"num_key_value_heads": 4, "rms_norm_eps": 1e-6},
    "one kv head": {"num_key_value_heads": 1},
    "wide heads": {"head_dim": 32},
    "narrow heads": {"head_dim": 8},
    "attention bias": {"attention_bias": True},
    "mlp bias": {"mlp_bias": True},
    "all biases": {"attention_bias": True, "mlp_bias": True, "head_dim": 24},
    "tied": {"tie_word_embeddings": True},
    "linear rope": {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0}},
    "llama3 rope": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0}},
    "llama3 rope tied": {"rope_parameters": {**LLAMA3, "rope_theta": 500000.0, "factor": 32.0}, "tie_word_embeddings": True},
}


@pytest.fixture(autouse=True)
def exact_reference(monkeypatch):
    """transformers' norm casts to fp32, which would spoil an fp64 reference: here it casts to at least fp32."""
    from transformers.models.llama.modeling_llama import LlamaRMSNorm

    def forward(self, x: Tensor) -> Tensor:
        h = x if x.dtype == torch.float64 else x.float()
        h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * h.to(x.dtype)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)


def hf_model(folder: Path, changes: dict, dtype: torch.dtype = torch.float32):
    """A random model with biases and norms away from 0 and 1, saved by transformers; and the model, opened again."""
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**(BASE | changes))).to(dtype)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape).to(dtype))
    model.save_pretrained(folder)
    return reopened(folder, dtype)


def reopened(folder: Path, dtype: torch.dtype):
    """transformers' model of a folder. (`model.to(bf16)` would cast its rotary frequencies as well.)"""
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="sdpa").eval()


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    spec, _ = read_config(folder)
    model = build_decoder(spec, device="cpu", dtype=dtype)
    load_hf(folder, spec, model.named_parameters())
    return model


def run(model: Decoder, tokens: Tensor, positions: Tensor | None = None, documents: Tensor | None = None) -> Tensor:
    b, t = tokens.shape
    index = torch.arange(t, dtype=torch.int32)
    plain = documents is None
    documents = torch.zeros(b, t, dtype=torch.int32) if plain else documents
    positions = index.expand(b, t) if positions is None else positions
    return model(tokens, layout=Layout(documents, documents, index, index, plain_causal=plain), positions=positions)


def rel(a: Tensor, b: Tensor) -> float:
    largest = b.abs().max()
    return ((a - b).abs().max() / largest).item() if largest else a.abs().max().item()


@pytest.mark.parametrize("dtype, bound", [(torch.float32, 1e-5), (torch.float64, 1e-9)])
@pytest.mark.parametrize("name", SHAPES)
def test_logits_and_gradients(tmp_path, name, dtype, bound):
    """Logits and every gradient equal transformers' for all shapes and scalings, in fp64 to 1e-9."""
    theirs = hf_model(tmp_path, SHAPES[name], dtype)
    model = ours(tmp_path, dtype)
    tokens = torch.randint(0, 97, (2, 80))
    expected, got = theirs(tokens).logits, run(model, tokens)
    assert rel(got, expected) <= bound
    weights = torch.randn(expected.shape, dtype=dtype)
    (expected * weights).mean().backward()
    (got.to(dtype) * weights).mean().backward()
    gradients = {name.removeprefix("model."): p.grad for name, p in theirs.named_parameters()}
    mine = {name: p.grad for name, p in model.named_parameters()}
    assert mine.keys() == gradients.keys()
    worst = {key: rel(mine[key], gradients[key]) for key in mine}
    assert max(worst.values()) <= bound, worst


@pytest.mark.parametrize("name", ["gqa", "linear rope", "llama3 rope"])
@pytest.mark.parametrize("first", [0, 1024, 60000])
def test_long_positions(tmp_path, name, first):
    """Rotary angles equal transformers' far out, where a wrong scaling or angles in bf16 would show."""
    theirs, tokens = hf_model(tmp_path, SHAPES[name]), torch.randint(0, 97, (1, 12))
    positions = first + torch.arange(0, 12 * 37, 37)[None]
    expected = theirs(tokens, position_ids=positions).logits
    assert rel(run(ours(tmp_path), tokens, positions.int()), expected) <= 1e-5


def test_packed_documents_equal_separate_ones(tmp_path):
    """Three documents in one row give what transformers gives for each alone."""
    theirs, model = hf_model(tmp_path, SHAPES["llama3 rope"], torch.float64), ours(tmp_path, torch.float64)
    lengths = [5, 17, 9]
    tokens = torch.randint(0, 97, (1, sum(lengths)))
    documents = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])[None]
    packed = run(model, tokens, positions, documents).split(lengths, dim=1)
    for part, piece in zip(packed, tokens.split(lengths, dim=1), strict=True):
        assert rel(part, theirs(piece).logits) <= 1e-9


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float16])
@pytest.mark.parametrize("name", ["all biases", "tied", "llama3 rope"])
def test_round_trip_is_byte_identical(tmp_path, name, dtype):
    """HF -> ours -> HF gives the same names, dtypes and bytes, and transformers opens the result with the same config and logits."""
    theirs = hf_model(tmp_path / "in", SHAPES[name], dtype)
    spec, _ = read_config(tmp_path / "in")
    save_hf(tmp_path / "out", spec, ours(tmp_path / "in", dtype).named_parameters(), read_assets(tmp_path / "in"))
    before, after = open_tensors(tmp_path / "in"), open_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same_bytes(before[key].read(()), after[key].read(())) for key in before)
    again = reopened(tmp_path / "out", dtype)
    assert type(again) is type(theirs) and again.dtype == dtype
    assert not _changed(theirs.config.to_dict(), again.config.to_dict())
    tokens = torch.randint(0, 97, (1, 9))
    assert torch.equal(theirs(tokens).logits, again(tokens).logits)


def _changed(old: dict, new: dict) -> set:
    return {key for key in old.keys() | new.keys() if old.get(key) != new.get(key)} - {"_name_or_path", "architectures", "dtype"}


@pytest.mark.parametrize("name", SHAPES)
def test_config_round_trip_in_both_spellings(tmp_path, name):
    """transformers 5 writes rope_parameters, 4 wrote rope_theta and rope_scaling: both give one spec, and ours -> HF -> ours is stable."""
    transformers.LlamaConfig(**(BASE | SHAPES[name])).save_pretrained(tmp_path)
    spec, new = read_config(tmp_path)
    rope = new.pop("rope_parameters")
    old = new | {"rope_theta": rope.pop("rope_theta"), "torch_dtype": new.pop("dtype", "float32"), "rope_scaling": rope}
    if rope["rope_type"] == "default":
        old["rope_scaling"] = None
    assert llama.from_hf(old) == spec == llama.from_hf(llama.to_hf(spec))
    renamed = old | {"rope_scaling": old["rope_scaling"] and {"type": rope.pop("rope_type"), **rope}}
    assert llama.from_hf(renamed) == spec
    (tmp_path / "config.json").write_text(json.dumps(llama.to_hf(spec)))
    read_back = transformers.AutoConfig.from_pretrained(tmp_path)
    assert not _changed(transformers.LlamaConfig(**(BASE | SHAPES[name])).to_dict(), read_back.to_dict())


def test_bf16_angles_stay_exact(tmp_path):
    """A model in bf16 tells position 257 from 256 and 4097 from 4096, as transformers does."""
    theirs, model = hf_model(tmp_path, {}, torch.bfloat16), ours(tmp_path, torch.bfloat16)
    tokens = torch.randint(0, 97, (1, 4))
    for last in (257, 4097):
        exact, rounded = (torch.tensor([[last - 100, last - 50, last - 7, p]]) for p in (last, last - 1))
        got, other = (run(model, tokens, p.int())[0, -1] for p in (exact, rounded))
        assert not torch.equal(got, other)
        expected = theirs(tokens, position_ids=exact).logits[0, -1].float()
        assert rel(got, expected) <= 2e-2 and rel(got, expected) < rel(other, expected) / 2
