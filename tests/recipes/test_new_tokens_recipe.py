"""New tokens through the whole of a run: trained, resumed on another layout, exported, converted, generated from."""

import shutil

import torch
from safetensors.torch import load_file

from tests.helpers.recipe import ROOT, arguments, rows, train
from torchft.checkpoint.source import open_source
from torchft.generate.model import open_model
from torchft.models.build import read_config
from torchft.tokenizers.load import load_tokenizer

MODEL = ROOT / "configs/debug/tiny-llama"


def test_a_run_with_new_tokens(tmp_path):
    """Size and tokenizer of export and checkpoint are the run's, without padding; a resume under tp 2 goes on to the same weights."""
    base, tokenizer = read_config(MODEL)[0], load_tokenizer(MODEL)
    size = tokenizer.vocab_size + 2 if tokenizer.vocab_size + 2 > base.vocab_size else base.vocab_size + 1
    options = ["tokenizer.add_tokens=[<note>]", "tokenizer.add_special_tokens=[<|tool|>]", f"model.vocab.size={size}"]
    options += [
        "model.vocab.multiple_of=4",
        "model.init=random",
        "train.steps=4",
        "checkpoint.every_steps=2",
        "data.cache=" + str(tmp_path / "c"),
    ]
    assert train([*arguments(tmp_path / "one", tmp_path / "c"), *options]) == 0
    shutil.copytree(tmp_path / "one", tmp_path / "two")
    for gone in ("export", "checkpoints/step_00000004", "checkpoints/latest", "lock"):
        path = tmp_path / "two" / gone
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    assert train([*arguments(tmp_path / "two", tmp_path / "c"), *options, "parallel.tp=2"], 2) == 0
    first, second = (tmp_path / name / "export" / "step_00000004" for name in ("one", "two"))
    assert read_config(first)[0].vocab_size == size
    weights, others = load_file(first / "model.safetensors"), load_file(second / "model.safetensors")
    assert all((weights[name] - others[name]).abs().max() < 1e-4 for name in weights) and len(rows(tmp_path / "two")) >= 2
    exported = load_tokenizer(first)
    assert exported.vocab_size == tokenizer.vocab_size + 2 and "<|tool|>" in exported.special_tokens
    source = open_source(tmp_path / "one" / "checkpoints" / "step_00000004")
    assert source.spec.vocab_size == size and source.spec.padding_rows == 0
    assert torch.equal(source.tensors["embed_tokens.weight"].read(()), weights["model.embed_tokens.weight"])
    assert source.assets.files["tokenizer.json"] == (first / "tokenizer.json").read_bytes()
    model = open_model(tmp_path / "one" / "checkpoints" / "step_00000004")
    assert model.tokenizer.encode("a<note>") == exported.encode("a<note>")
    _check_new_rows(first, tmp_path, size, weights["model.embed_tokens.weight"])


def _check_new_rows(model, tmp_path, size: int, before: torch.Tensor) -> None:
    """A run that goes on from the export with one more token: its row is the mean and noise, the others are read."""
    options = [f"model.path={model}", f"model.vocab.size={size + 1}", "model.vocab.noise=0.5", "model.init=weights"]
    options += ["train.steps=1", "optim.lr=1e-12", "schedule.warmup_steps=0", "precision.params=fp32"]
    assert train([*arguments(tmp_path / "three", tmp_path / "c"), *options]) == 0
    after = load_file(tmp_path / "three" / "export" / "step_00000001" / "model.safetensors")["model.embed_tokens.weight"]
    assert after.shape[0] == size + 1 and (after[:size] - before).abs().max() < 1e-6
    assert 0.2 < ((after[size] - before.mean(0)) / before.std(0)).std() < 0.9
