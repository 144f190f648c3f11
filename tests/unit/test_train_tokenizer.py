"""scripts/train_tokenizer.py: a tokenizer folder from text, read alike by this library and transformers."""

import importlib.util
import json
from pathlib import Path

import pytest

from torchft.tokenizers.load import load_tokenizer

SCRIPT = Path(__file__).parents[2] / "scripts" / "train_tokenizer.py"
TEXT = "The red boat sails over the lake in 1912.\nNobody answers, é 😀.\n" * 20


@pytest.fixture(scope="module")
def script():
    module_spec = importlib.util.spec_from_file_location("train_tokenizer", SCRIPT)
    module = importlib.util.module_from_spec(module_spec)
    module_spec.loader.exec_module(module)
    return module


def test_trains_and_loads(script, tmp_path, capsys):
    """Any text comes back to the byte; digits are tokens of their own; the size is the one asked for; equal files, equal tokenizer."""
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.jsonl").write_text(json.dumps({"body": TEXT}) + "\n")
    command = [str(tmp_path / "a.txt"), str(tmp_path / "b.jsonl"), "--vocab-size", "300", "--text-key", "body"]
    assert script.main([str(tmp_path / "one"), *command]) == script.main([str(tmp_path / "two"), *command]) == 0
    tokenizer = load_tokenizer(tmp_path / "one")
    assert tokenizer.digest == load_tokenizer(tmp_path / "two").digest and "300 tokens" in capsys.readouterr().out
    assert tokenizer.vocab_size == 300 and tokenizer.adds_bos and len(tokenizer.special_tokens) == 4
    for text in (TEXT, " lead", "日本\r\n\t x", "<|end_of_text|>"):
        ids = tokenizer.encode(text)
        assert tokenizer.decode(ids) == text and not set(ids) & set(tokenizer.special_tokens.values())
    assert len(tokenizer.encode("1912")) == 4 and len(tokenizer.encode("boat sails")) < 10


def test_transformers_reads_it(script, tmp_path):
    """The same ids, BOS in front, in transformers."""
    transformers = pytest.importorskip("transformers")
    (tmp_path / "a.txt").write_text(TEXT)
    assert script.main([str(tmp_path / "tok"), str(tmp_path / "a.txt"), "--vocab-size", "280"]) == 0
    ours = load_tokenizer(tmp_path / "tok")
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path / "tok")
    assert theirs("The boat, é")["input_ids"] == [ours.bos_id, *ours.encode("The boat, é")]
    assert (theirs.bos_token_id, theirs.eos_token_id) == (ours.bos_id, ours.eos_id)


@pytest.mark.parametrize(
    ("change", "message"),
    [(["--vocab-size", "100"], "260"), (["--text-key", "body"], "text-key"), (["{tmp}/none.txt"], "none.txt")],
)
def test_wrong_input(script, tmp_path, capsys, change, message):
    """Exit code 2 and a message that says what to change; an existing tokenizer is never written over."""
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": TEXT}) + "\n")
    argv = [str(tmp_path / "tok"), str(tmp_path / "a.jsonl"), "--vocab-size", "300"]
    assert script.main([*argv, *(part.format(tmp=tmp_path) for part in change)]) == 2
    assert message in capsys.readouterr().err and not (tmp_path / "tok").exists()
    assert script.main(argv) == 0 and script.main(argv) == 2 and "delete" in capsys.readouterr().err
