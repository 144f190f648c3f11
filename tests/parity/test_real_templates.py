"""Real tokenizers and the chat templates their models ship, against transformers: named and `auto` give its ids.

Skips where scripts/fetch_tokenizers.py has not fetched them.
"""

import re
from pathlib import Path

import pytest

from tests.helpers.chats import CHATS, chat, stand_in
from torchft.data.named_templates import TEMPLATES
from torchft.data.outlines import as_dict, fold_thinking
from torchft.data.templates import READS_THINKING, TODAY, Template, build_template
from torchft.data.types import Message
from torchft.errors import DataError
from torchft.tokenizers.load import load_tokenizer

transformers = pytest.importorskip("transformers")

FOLDER = Path.home() / ".cache" / "torchft" / "tokenizers"
pytestmark = pytest.mark.skipif(not (FOLDER / "gptoss").is_dir(), reason=f"{FOLDER} is not there: real chat templates are not checked")

REAL = {  # name: (tokenizer, its template if not its own, cases that differ on purpose)
    "qwen3": ("qwen3", None, ()),
    "qwen": ("qwen3", "qwen2_5", ()),
    "llama3": ("llama3_1", None, ("call", "calls")),  # the form of 3.0, which has no tools
    "llama3_1": ("llama3_1", "llama3_1", ()),
    "gemma": ("gemma3", None, ("edges", "call", "calls")),  # refused there: roles must alternate
    "deepseek3": ("deepseek_v3", None, ("call", "calls")),  # loses single calls there
    "gpt_oss": ("gptoss", "gptoss", ()),
}


@pytest.fixture(scope="module")
def real():
    """Tokenizer (ours and theirs) and template source by name, each loaded once."""
    loaded = {}

    def load(name: str):
        folder, template, _ = REAL[name]
        if folder not in loaded:
            path = FOLDER / folder
            loaded[folder] = load_tokenizer(path), transformers.PreTrainedTokenizerFast.from_pretrained(path)
        ours, theirs = loaded[folder]
        source = (FOLDER / "chat_templates" / f"{template}.jinja").read_text() if template else ours.chat_template
        return ours, theirs, dated(source)

    return load


def dated(source: str) -> str:
    """transformers writes today."""
    return re.sub(r"strftime_now\((['\"])(.*?)\1\)", lambda found: repr(TODAY.strftime(found[2])), source)


def reference_ids(theirs, source: str, messages, tools, prompt: bool) -> list[int]:
    messages = messages if READS_THINKING.search(source) else [fold_thinking(m) for m in messages]
    dicts = [as_dict(m) for m in messages]
    for call in (c for d in dicts for c in d.get("tool_calls", ())):
        call["function"]["arguments"] = dict(call["function"]["arguments"])
    options = {"chat_template": source, "tools": list(tools) or None, "add_generation_prompt": prompt}
    return theirs.apply_chat_template(dicts, tokenize=True, return_dict=True, **options)["input_ids"]


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_ids_are_those_of_transformers(real, name):
    """Ids of chats and prompts: the named template's and those of the model's own are apply_chat_template's."""
    ours, theirs, source = real(name)
    for template in (build_template(name, ours), Template("auto", source, ours)):
        for case, (messages, tools) in CHATS.items():
            if case in REAL[name][2]:
                continue
            assert template.encode(messages, where=case, tools=tools).ids.tolist() == reference_ids(theirs, source, messages, tools, False)
            asked = messages[:-1] if case != "edges" else messages[:-2]  # Qwen 3's own prompt after a reply writes another history
            assert template.prompt(asked, tools) == reference_ids(theirs, source, asked, tools, True)


@pytest.mark.slow
def test_qwen3_without_thinking(real):
    """thinking: never is enable_thinking=False: the same prompts, and one reply trained after the empty block."""
    ours, theirs, _ = real("qwen3")
    question, reply = chat("u: Hi"), Message("assistant", "Hello.", reasoning="left out")
    expected = theirs.apply_chat_template(
        [as_dict(m) for m in question], tokenize=True, return_dict=True, add_generation_prompt=True, enable_thinking=False
    )["input_ids"]
    for template in (build_template("qwen3", ours, thinking="never"), build_template("auto", ours, thinking="never")):
        assert template.prompt(question) == expected
        encoded = template.encode([*question, reply], where="here")
        assert ours.decode(encoded.ids[encoded.weights > 0].tolist(), skip_special=False) == "Hello.<|im_end|>"
        assert encoded.ids[: len(expected)].tolist() == expected


SHIPPED = sorted(p.stem for p in (FOLDER / "chat_templates").glob("*.jinja"))


@pytest.mark.slow
@pytest.mark.parametrize("shipped", SHIPPED)
def test_templates_that_models_ship(tmp_path, shipped):
    """Any of them: a chat that is accepted has the reference's text, up to an EOS in place of an end that is no token here, and begins with
    its prompt; another is an error that says why."""
    source = dated((FOLDER / "chat_templates" / f"{shipped}.jinja").read_text(encoding="utf-8"))
    folder = stand_in("llama2", tmp_path, template=source)
    tokenizer, theirs = load_tokenizer(folder), transformers.PreTrainedTokenizerFast.from_pretrained(folder)
    template = Template("auto", source, tokenizer)
    for case, (messages, tools) in CHATS.items():
        try:
            encoded = template.encode(messages, where="here", tools=tools)
        except DataError as error:
            assert re.search("refuses|does not show|can't be trained on|changes messages", str(error))
            continue
        dicts = [as_dict(m, empty=template._locator._empty) for m in template._prepared(messages)]
        text = theirs.apply_chat_template(dicts, tools=list(tools) or None, tokenize=False)
        written = tokenizer.decode(encoded.ids.tolist(), skip_special=False)
        assert written == text or text.startswith(written.removesuffix("</s>")), case
        asked = messages[:-1] if case != "edges" else messages[:-2]
        prompt = template.prompt(asked, tools)
        assert encoded.ids[: len(prompt)].tolist() == prompt and encoded.weights[len(prompt) :].any()


def test_every_named_family_is_known():
    """The rows compared here are rows of the table."""
    assert REAL.keys() <= TEMPLATES.keys()
