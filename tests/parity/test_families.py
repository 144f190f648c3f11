"""Every family against its transformers model (eager attention), on random tiny models that transformers itself wrote to disk."""

import copy
import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from tests.helpers.families import FAMILIES, config_of, tiny_spec
from tests.helpers.tiny import relative_error
from torchft.batch import Layout
from torchft.checkpoint.assets import read_assets
from torchft.checkpoint.fused import join
from torchft.checkpoint.hf import load_hf, same_bytes, save_hf
from torchft.checkpoint.tensor_files import open_tensors
from torchft.generate.generate import generate
from torchft.generate.sampling import SamplingConfig
from torchft.models import build
from torchft.models.build import read_config
from torchft.models.decoder import Decoder, build_decoder
from torchft.models.keys import stored_as
from torchft.models.spec import HeadSpec

transformers = pytest.importorskip("transformers")
T = 24


def hf_model(folder: Path, name: str, dtype: torch.dtype = torch.float32):
    """A random model with biases and norms away from 0 and 1, saved by transformers; and the model, opened again."""
    config, model, changes = FAMILIES[name]
    torch.manual_seed(0)
    made = getattr(transformers, model)(getattr(transformers, config)(**copy.deepcopy(changes)))  # it writes into the dicts it is given
    with torch.no_grad():
        for parameter in made.parameters():
            if parameter.ndim == 1:
                parameter.add_(0.1 * torch.randn(parameter.shape))
    made.to(dtype).save_pretrained(folder)
    return reopened(folder, dtype)


def reopened(folder: Path, dtype: torch.dtype = torch.float32):
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="eager").eval()


def ours(folder: Path, dtype: torch.dtype = torch.float32) -> Decoder:
    spec, _ = read_config(folder)
    model = build_decoder(spec, device="cpu", dtype=dtype)
    load_hf(folder, spec, model.named_parameters())
    return model


def run(
    model: Decoder, tokens: Tensor, documents: Tensor | None = None, positions: Tensor | None = None, noise: Tensor | None = None
) -> Tensor:
    b, t = tokens.shape
    index = torch.arange(t, dtype=torch.int32)
    plain = documents is None
    documents = torch.zeros(b, t, dtype=torch.int32) if plain else documents
    positions = index.expand(b, t) if positions is None else positions
    return model(tokens, layout=Layout(documents, documents, index, index, plain_causal=plain), positions=positions, noise=noise)


def in_their_words(model: Decoder) -> dict[str, Tensor]:
    """Our gradients under transformers' names, joined and turned as the weights are."""
    rules, named = build.FAMILIES[model.spec.family].KEYS, dict(model.named_parameters())
    stored = [stored_as(rules, name) for name in named]
    return dict(join(stored, list(named), [p.grad for p in named.values()]))


@pytest.mark.parametrize("name", FAMILIES)
def test_noise_is_added_where_transformers_adds_it(tmp_path, name):
    """The same noise on the output of transformers' embedding module, where its NEFTune hook acts: the same logits."""
    theirs, model = hf_model(tmp_path, name), ours(tmp_path)
    tokens, noise = torch.randint(0, 96, (2, T)), torch.randn(2, T, 64)
    quiet = run(model, tokens)
    theirs.get_input_embeddings().register_forward_hook(lambda module, args, output: output + noise)
    expected, got = theirs(tokens).logits, run(model, tokens, noise=noise)
    assert relative_error(got, expected) <= 1e-5 and relative_error(quiet, expected) > 1e-2


@pytest.mark.parametrize("name", FAMILIES)
def test_logits_and_gradients(tmp_path, name):
    """Logits and every gradient equal transformers' to 1e-5 in fp32, beyond the windows' ends."""
    theirs, model = hf_model(tmp_path, name), ours(tmp_path)
    tokens = torch.randint(0, 96, (2, T))
    expected, got = theirs(tokens).logits, run(model, tokens)
    assert relative_error(got, expected) <= 1e-5
    weights = torch.randn(expected.shape)
    (expected * weights).mean().backward()
    (got * weights).mean().backward()
    want, mine = {name: p.grad for name, p in theirs.named_parameters()}, in_their_words(model)
    assert mine.keys() == want.keys()
    worst = {key: relative_error(mine[key], want[key]) for key in mine}
    assert max(worst.values()) <= 1e-5, max(worst.items(), key=lambda item: item[1])


@pytest.mark.parametrize("name", FAMILIES)
def test_score_head(tmp_path, name):
    """A reward model's scores and every gradient, the head's among them, equal transformers' sequence classification's to 1e-5."""
    config, model, changes = FAMILIES[name]
    kind = model.replace("LMHeadModel", "ForCausalLM").replace("Gemma3For", "Gemma3TextFor")
    settings = getattr(transformers, config)(**copy.deepcopy(changes | {"num_labels": 3, "pad_token_id": 0}))
    torch.manual_seed(0)
    made = getattr(transformers, kind.replace("CausalLM", "SequenceClassification"))(settings)
    with torch.no_grad():
        for parameter in made.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape))
    made.save_pretrained(tmp_path)
    theirs = type(made).from_pretrained(tmp_path, attn_implementation="eager").eval()
    spec = replace(tiny_spec(name), heads={"score": HeadSpec(3)})
    mine = build_decoder(spec, device="cpu")
    load_hf(tmp_path, spec, mine.named_parameters())
    tokens, index = torch.randint(1, 96, (2, T)), torch.arange(T, dtype=torch.int32)
    documents = torch.zeros(2, T, dtype=torch.int32)
    layout = Layout(documents, documents, index, index, plain_causal=True)
    got = mine(tokens, layout=layout, positions=index.expand(2, T), reduce=lambda hidden, heads: heads["score"].logits(hidden[:, -1]))
    expected = theirs(tokens).logits
    assert got.shape == (2, 3) and relative_error(got, expected) <= 1e-5
    weights = torch.randn(expected.shape)
    (expected * weights).sum().backward()
    (got * weights).sum().backward()
    want, have = {key: p.grad for key, p in theirs.named_parameters()}, in_their_words(mine)
    assert have.keys() == want.keys() and "score.weight" in have
    for key, grad in have.items():
        if name != "gpt2" or not key.endswith("c_attn.bias"):  # a part of it is zero but for noise: k's, without rotation
            assert relative_error(grad, want[key]) <= 1e-5, key


@pytest.mark.parametrize("name", FAMILIES)
def test_packed_documents_equal_separate_ones(tmp_path, name):
    """Three documents in one row give what transformers gives for each alone; the second is beyond longrope's original length."""
    theirs, model, lengths = hf_model(tmp_path, name), ours(tmp_path), [5, 40, 9]
    tokens = torch.randint(0, 96, (1, sum(lengths)))
    documents = torch.repeat_interleave(torch.arange(3, dtype=torch.int32), torch.tensor(lengths))[None]
    positions = torch.cat([torch.arange(n, dtype=torch.int32) for n in lengths])[None]
    packed = run(model, tokens, documents, positions).split(lengths, dim=1)
    for part, piece in zip(packed, tokens.split(lengths, dim=1), strict=True):
        assert relative_error(part, theirs(piece).logits) <= 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("name", FAMILIES)
def test_round_trip_is_byte_identical(tmp_path, name, dtype):
    """HF -> ours -> HF gives the same names, dtypes and bytes, and transformers computes the same logits from the result."""
    theirs = hf_model(tmp_path / "in", name, dtype)
    spec, _ = read_config(tmp_path / "in")
    save_hf(tmp_path / "out", spec, ours(tmp_path / "in", dtype).named_parameters(), read_assets(tmp_path / "in"), shard_bytes=100_000)
    before, after = open_tensors(tmp_path / "in"), open_tensors(tmp_path / "out")
    assert before.keys() == after.keys()
    assert all(same_bytes(before[key].read(()), after[key].read(())) for key in before)
    again, tokens = reopened(tmp_path / "out", dtype), torch.randint(0, 96, (1, 40))
    assert type(again) is type(theirs) and again.dtype == dtype
    assert torch.equal(theirs(tokens).logits, again(tokens).logits)


@pytest.mark.parametrize("name", FAMILIES)
def test_both_spellings_of_the_config(tmp_path, name):
    """What transformers 5 writes of a config in the words of 4 gives the same spec, and ours -> HF -> ours is stable."""
    getattr(transformers, FAMILIES[name][0])(**copy.deepcopy(FAMILIES[name][2])).save_pretrained(tmp_path)
    new = json.loads((tmp_path / "config.json").read_text())
    assert "rope_theta" not in new and "rope_scaling" not in new
    spec, _ = read_config(tmp_path)
    family = build.FAMILIES[spec.family]
    assert spec == tiny_spec(name) == family.from_hf(family.to_hf(spec))
    assert config_of(name)["model_type"] in family.MODEL_TYPES


@pytest.mark.parametrize("name", ["mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3", "phi3", "gpt2"])
def test_absent_keys_take_transformers_defaults(tmp_path, name):
    """A config that gives the shape alone means the same here and there."""
    shape = {"vocab_size": 96, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 12, "num_attention_heads": 4}
    given = {} if name == "gpt2" else shape if name == "phi3" else shape | {"num_key_value_heads": 2}
    getattr(transformers, FAMILIES[name][0])(**given).save_pretrained(tmp_path)
    written, _ = read_config(tmp_path)
    assert written == build.spec_from_config(given | {"model_type": config_of(name)["model_type"]}, where=name)


@pytest.mark.parametrize("name", FAMILIES)
def test_cached_greedy_ids_equal_uncached(tmp_path, name):
    """Token by token through the cache, three prompts of different lengths together: the argmax of whole forwards, and of transformers."""
    theirs, model = hf_model(tmp_path, name), ours(tmp_path)
    g = torch.Generator().manual_seed(1)
    prompts = [torch.randint(0, 96, (n,), generator=g).tolist() for n in (3, 12, 7)]
    completions = generate(model, prompts, cfg=SamplingConfig(temperature=0.0, max_new_tokens=10))
    for prompt, completion in zip(prompts, completions, strict=True):
        for forward in (lambda x: run(model, x), lambda x: theirs(x).logits):
            tokens = list(prompt)
            for _ in range(10):
                tokens.append(int(forward(torch.tensor([tokens]))[0, -1].argmax()))
            assert completion.tokens == tokens[len(prompt) :]
