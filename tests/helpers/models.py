"""A whole HF folder of a tiny random model with a tokenizer, written by the library."""

from dataclasses import replace
from pathlib import Path

from tests.helpers.recipe import ROOT
from torchft.checkpoint.assets import read_assets
from torchft.checkpoint.hf import save_hf
from torchft.models.build import read_config
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights

TINY = ROOT / "configs" / "debug" / "tiny-llama"


def make_model(folder: Path, *, seed: int = 0, max_seq_len: int | None = None) -> Path:
    """The debug llama with lively random weights (std 0.3) and its own tokenizer and template."""
    spec, _ = read_config(TINY)
    spec = replace(spec, init_std=0.3, max_seq_len=max_seq_len or spec.max_seq_len)
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, seed)
    save_hf(folder, spec, model.named_parameters(), read_assets(TINY))
    return folder
