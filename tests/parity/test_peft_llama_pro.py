"""LLaMA Pro in transformers: the grown model begins as its base, in every family that can say so, and is trained there as here."""

import pytest
import torch

from tests.helpers.tiny import relative_error
from tests.parity.test_families import T, hf_model, ours, reopened, run
from torchft.checkpoint.hf import load_hf, save_hf
from torchft.checkpoint.source import open_source
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.peft.llama_pro import LlamaProConfig, expanded, is_new, origin
from torchft.peft.methods import apply_adapter, base_names, init_adapter

pytest.importorskip("transformers")

CFG = LlamaProConfig(num_new=2)


def grown_model(folder):
    base, _ = read_config(folder)
    model = build_decoder(expanded(base, CFG))
    apply_adapter([model], CFG)
    model.to_empty(device="cpu")
    names = base_names((name for name, _ in model.named_parameters()), base, CFG)
    load_hf(folder, base, [(names[name], p) for name, p in model.named_parameters()])
    init_adapter([model], CFG, seed=0)
    return model


def test_which_layers_are_new():
    """Four layers in two groups: each followed by a copy of its last."""
    assert [(origin(i, 4, CFG), is_new(i, 4, CFG)) for i in range(6)] == [
        (0, False),
        (1, False),
        (1, True),
        (2, False),
        (3, False),
        (3, True),
    ]
    assert [origin(i, 3, LlamaProConfig(num_new=3)) for i in range(6)] == [0, 0, 1, 1, 2, 2]


@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "mistral"])
def test_begins_as_the_base_and_trains_as_in_transformers(tmp_path, name):
    """The exported grown model has the base's logits, in transformers too; new weights have the gradients they have there."""
    hf_model(tmp_path / "base", name)
    model, tokens = grown_model(tmp_path / "base"), torch.randint(0, 96, (2, T))
    assert relative_error(run(model, tokens), run(ours(tmp_path / "base"), tokens)) <= 1e-5
    with torch.no_grad():  # away from the silent start, where most gradients are zero
        generator = torch.Generator().manual_seed(0)
        for p in model.parameters():
            if p.requires_grad:
                p.add_(0.02 * torch.randn(p.shape, generator=generator))
    save_hf(tmp_path / "grown", model.spec, model.named_parameters(), open_source(tmp_path / "base").assets)
    theirs = reopened(tmp_path / "grown")
    expected, got = theirs(tokens).logits, run(model, tokens)
    assert theirs.config.num_hidden_layers == 6 and relative_error(got, expected) <= 1e-5
    weight = torch.randn_like(expected)
    (expected * weight).sum().backward()
    (got * weight).sum().backward()
    mine = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert {name.split(".")[1] for name in mine} == {"2", "5"}
    if name not in ("phi3", "gpt2"):  # which store several of our weights as one
        other = {key.removeprefix("model."): p.grad for key, p in theirs.named_parameters()}
        for key, grad in mine.items():
            assert relative_error(grad, other[key]) <= 1e-5, key
