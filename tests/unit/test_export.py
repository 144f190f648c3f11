"""What travels with an exported model when tokenizer and model come from different places."""

import json
from types import SimpleNamespace

from tests.helpers.recipe import ROOT
from tests.helpers.tiny import tiny_llama
from torchft.models.decoder import build_decoder
from torchft.models.init import init_weights
from torchft.train.data import TokenizerConfig, build_text
from torchft.train.finish import ExportConfig, export_hf, free_folder
from torchft.train.setup import ModelConfig


def test_token_ids_come_from_the_tokenizer_when_the_model_has_none(tmp_path):
    """A model from a family's size and a tokenizer of its own folder: config.json names bos, eos and pad; chatml travels as template."""
    tokenizer = TokenizerConfig(path=str(ROOT / "configs/debug/tiny-llama"), template="chatml")
    spec = tiny_llama()
    model = build_decoder(spec, device="cpu")
    init_weights(model.named_parameters(), spec, seed=0)
    parts = SimpleNamespace(named_parameters=model.named_parameters)
    job = SimpleNamespace(spec=spec, text=build_text(tokenizer, None), parts=parts)
    cfg = SimpleNamespace(model=ModelConfig(family="llama"), tokenizer=tokenizer, export=ExportConfig(dtype="bf16"))
    export_hf(cfg, job, tmp_path / "out")
    config = json.loads((tmp_path / "out/config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (0, 2, 0)
    assert config["torch_dtype"] == "bfloat16"
    assert (tmp_path / "out/chat_template.jinja").read_text() == job.text.template.source
    assert (tmp_path / "out/tokenizer.json").read_bytes() == (ROOT / "configs/debug/tiny-llama/tokenizer.json").read_bytes()


def test_an_earlier_export_is_left_alone(tmp_path):
    """A second export of a step goes beside the first."""
    first = free_folder(tmp_path / "step_00000003")
    assert first.name == "step_00000003"
    first.mkdir()
    assert free_folder(first).name == "step_00000003-2"
