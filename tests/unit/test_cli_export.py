"""`torchft export`: any step of a real run as a HF folder or GGUF, with a card that tells no secret and no path of this machine."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from tests.helpers.recipe import CONFIG, ROOT, load_recipe
from torchft.checkpoint.gguf import GgufFile
from torchft.cli.main import main
from torchft.train.card import model_card
from torchft.train.record import read_run

SECRET = "hf_" + "b" * 30


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    """Four steps of the debug model, checkpoints of 2 and 4."""
    folder = tmp_path_factory.mktemp("secret_place") / "my-run"
    more = ["train.steps=4", "checkpoint.every_steps=2", "validate.every_steps=2", "checkpoint.best_by=val/heldout/loss", "optim.lr=1e-2"]
    assert load_recipe().main(["--config", str(CONFIG), f"output_dir={folder}", f"data.cache={folder.parent / 'cache'}", *more]) == 0
    return folder


def test_the_last_step_is_what_the_run_exported(run, tmp_path, capsys):
    """File by file, card included."""
    assert main(["export", str(run), "--out", str(tmp_path / "out")]) == 0
    ours, theirs = ({p.name: p.read_bytes() for p in folder.iterdir()} for folder in (tmp_path / "out", run / "export/step_00000004"))
    assert ours == theirs and "README.md" in ours and "20 tensors" in capsys.readouterr().out


def test_another_step_dtype_and_shards(run, tmp_path, capsys):
    """Step 2 in bf16 differs from step 4, in files of the size asked for, and transformers loads it."""
    transformers = pytest.importorskip("transformers")
    assert main(["export", str(run), "--step", "2", "--out", str(tmp_path / "a"), "--dtype", "bf16", "--shard-size", "1MB"]) == 0
    assert main(["export", str(run), "--step", "best", "--out", str(tmp_path / "b")]) == 0
    a, b = (load_file(tmp_path / name / "model.safetensors") for name in ("a", "b"))
    name = "model.norm.weight"
    assert a[name].dtype == torch.bfloat16 and (a[name].float() - b[name]).abs().max() > 1e-3
    assert "step 2" in (tmp_path / "a/README.md").read_text()
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "a", dtype="auto")
    assert torch.equal(model.model.norm.weight, a[name])
    assert main(["export", str(run), "--step", "3", "--out", str(tmp_path / "c")]) == 2
    assert "a step: 2, 4" in capsys.readouterr().err and not (tmp_path / "c").exists()
    assert main(["export", str(run), "--out", str(tmp_path / "a")]) == 2  # never over an existing folder


def test_gguf_with_its_modelfile(run, tmp_path, capsys):
    """The weights of the HF export, a Modelfile and a card; an existing folder is left alone; --dtype besides is refused."""
    out = tmp_path / "out"
    assert main(["export", str(run), "--out", str(out), "--gguf", "bf16"]) == 0
    assert sorted(p.name for p in out.iterdir()) == ["Modelfile", "README.md", "my-run-bf16.gguf"]
    hf = load_file(run / "export/step_00000004/model.safetensors")
    found = GgufFile(out / "my-run-bf16.gguf").weights().tensors
    assert torch.equal(found["embed_tokens.weight"].read(()), hf["model.embed_tokens.weight"].bfloat16().float())
    assert "FROM ./my-run-bf16.gguf" in (out / "Modelfile").read_text() and "ollama create" in (out / "README.md").read_text()
    assert main(["export", str(run), "--out", str(out), "--gguf", "bf16"]) == 2
    assert main(["export", str(run), "--out", str(tmp_path / "x"), "--gguf", "bf16", "--dtype", "bf16"]) == 2
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    capsys.readouterr()


def test_the_card_tells_what_was_done_and_nothing_else(run):
    """Front matter that parses, base, data, the changed hyper-parameters, the numbers of that step; no path, host or secret."""
    record = read_run(run)
    record.facts["data"][0]["name"] = f"/data/{SECRET}/chats|<b>.jsonl"
    record.facts["changed"]["train.note"] = [f"https://me:{SECRET}@x", None]
    record.facts["changed"]["optim.note"] = [SECRET, None]
    record.facts["changed"]["optim.file"] = ["C:\\mine", None]
    card = model_card(record, 2)
    front = yaml.safe_load(card.split("---")[1])
    assert front == {"library_name": "transformers", "tags": ["torchft"]}
    val = next(row for row in record.rows if row["step"] == 2 and "val/heldout/loss" in row)["val/heldout/loss"]
    for text in ("**tiny-llama**", "| optim.lr | 0.01 |", "chats\\|&lt;b>.jsonl", f"| val/heldout/loss | {val:.6g} |", "# my-run, step 2"):
        assert text in card, text
    for text in (SECRET, str(run.parent), str(ROOT), record.facts["host"] + "\n", "mine", "/data", "<b>"):
        assert text not in card, text
    assert not re.search(r"(^|[\s(\"'])/[a-z]+/", card)
    record.config["model"]["path"] = "org/name@abc"
    assert yaml.safe_load(model_card(record, 4).split("---")[1])["base_model"] == "org/name"


def test_a_model_by_family_and_size_needs_no_base(run, tmp_path, monkeypatch):
    """A run from scratch: spec by size's name, tokenizer from its own folder, the template it was trained with."""
    from torchft.models.build import FAMILIES, read_config

    spec, _ = read_config(ROOT / "configs/debug/tiny-llama")
    monkeypatch.setitem(FAMILIES["llama"].SIZES, "tiny", spec)
    out, tokenizer = tmp_path / "run", f"tokenizer.path={ROOT / 'configs/debug/tiny-llama'}"
    argv = ["--config", str(CONFIG), f"output_dir={out}", f"data.cache={tmp_path}", "train.steps=3", "export.hf=false", tokenizer]
    argv += ["model.path=null", "model.family=llama", "model.size=tiny", "tokenizer.template=chatml", "validate.every_steps=0"]
    assert load_recipe().main(argv) == 0
    assert main(["export", str(out), "--out", str(tmp_path / "hf")]) == 0
    assert (tmp_path / "hf/chat_template.jinja").read_text() and json.loads((tmp_path / "hf/config.json").read_text())["eos_token_id"] == 2
    assert "**random weights**" in (tmp_path / "hf/README.md").read_text()
