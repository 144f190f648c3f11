"""One chat, four ways to tokens: what the recipe trains on, what `torchft chat` and generation ask the model, what the export gives."""

import io
import json

import pytest

from tests.helpers.recipe import arguments, load_recipe, train
from torchft.data.cache import open_cache
from torchft.data.prompts import PromptsConfig, read_prompts
from torchft.data.templates import build_template
from torchft.data.types import Message
from torchft.generate import chat as chats
from torchft.generate.chat import Chat, converse
from torchft.generate.model import open_model
from torchft.generate.sampling import SamplingConfig
from torchft.tokenizers.load import load_tokenizer

TURNS = ["Be kind, 日本.", "A table for two at 7 pm? ", "<think>\nEasy.\n</think>\n\nYes.", "é\nand\tthen?", "No 😀."]
ROLES = ["system", "user", "assistant", "user", "assistant"]


@pytest.fixture(scope="module")
def transformers():
    return pytest.importorskip("transformers")


@pytest.mark.parametrize(
    "template, thinking", [("auto", "mixed"), ("chatml", "mixed"), ("qwen3", "mixed"), ("qwen3", "never"), ("alpaca", "mixed")]
)
def test_training_chat_generate_and_export(tmp_path, monkeypatch, transformers, template, thinking):
    """The prompts of chat and generation are equal and begin the trained ids; the exported folder, read by this library or by
    transformers, gives those ids again."""
    turns = [{"role": role, "content": text} for role, text in zip(ROLES, TURNS, strict=True)]
    messages = [Message(role, text) for role, text in zip(ROLES, TURNS, strict=True)]
    (tmp_path / "chats.jsonl").write_text(json.dumps({"messages": turns}) + "\n")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"messages": turns[:-1]}) + "\n")
    how = [f"tokenizer.template={template}", f"tokenizer.thinking={thinking}", f"data.train.0.path={tmp_path / 'chats.jsonl'}"]
    assert (
        train([*arguments(tmp_path / "run", tmp_path / "cache", *how), "train.steps=1", "schedule.warmup_steps=0", "data.truncation=error"])
        == 0
    )
    (encoded,) = open_cache(next((tmp_path / "cache").glob("chats-*"))).unit(0)
    trained = encoded.ids.tolist()
    folder = next((tmp_path / "run" / "export").glob("step_*"))

    model, asked = open_model(folder), []
    monkeypatch.setattr(chats, "stream", lambda decoder, prompt, **options: asked.append(prompt) or iter(()))
    chat = Chat(model, SamplingConfig(), TURNS[0])
    chat.messages = messages[1:3]
    converse(chat, iter([TURNS[3], None]).__next__, io.StringIO())
    prompts = read_prompts(PromptsConfig(str(tmp_path / "prompts.jsonl")))
    assert load_recipe("generate").encode_all(model, prompts) == asked and trained[: len(asked[0])] == asked[0]

    exported = build_template("auto", load_tokenizer(folder))
    again = exported.encode(messages, where="here")
    assert again.ids.tolist() == trained and again.weights.tolist() == encoded.weights.tolist()
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    assert theirs.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False) == asked[0]
    text = theirs.apply_chat_template(turns, tokenize=False)
    assert theirs.decode(trained) == text and (template == "alpaca" or theirs.encode(text, add_special_tokens=False) == trained)
